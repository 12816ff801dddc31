"""What people would use instead: multiple-instance learning on frozen features of the same pretrained network.

    python -m benchmarks.mil slides.csv NAME --weights resnet18.pth --rasters rasters --full

ResNet-18 with ImageNet weights up to layer3, averaged over each patch of 64 or of 128 px (`--patch-px`) that is at
least half tissue; mean and max pooling, ABMIL, CLAM-SB, DSMIL, TransMIL and DTFD on top (`benchmarks.mil_models`).
AdamW, one slide a step, no augmentation, as is usual with features. Patch size, learning rate and epoch are chosen
for each method on the validation slides (AUROC, then loss); then `--seeds` trainings with what was chosen, and the
test slides once. `_auroc` is the mean of the seeds, `_interval` of their averaged probabilities, over patients.

`features_s` is what reading and features took for all slides, `slide_s` for one, `training_s` all trainings of all
methods. Without a cohort, on a few drawn slides: to see that it runs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import Figure, Options, Result, main
from benchmarks.mil_models import MODELS
from benchmarks.plain import normalised
from holoslide.evaluation.metrics import compute_metrics
from holoslide.geometry import Box
from holoslide.models.classifier import LocalClassifier
from holoslide.models.options import BackboneConfig, InputConfig, ModelConfig
from holoslide.models.precision import mixed_dtype
from holoslide.prepared import Prepared, prepare_cohort
from holoslide.slides.cohort import Cohort, SplitConfig
from holoslide.slides.phantom import PhantomConfig, write_phantoms
from holoslide.slides.prepare import PrepareConfig
from holoslide.slides.raster import Raster

RATES = (1e-3, 3e-4, 1e-4)
PARTS = ("train", "valid", "test")
DRAWN = PhantomConfig(mpp=2.0, least_um=1500, most_um=1700)


@dataclass(frozen=True, slots=True)
class Bag:
    """A slide as MIL has it: features (N, D) of its patches."""

    features_ND: Tensor
    label: int
    patient: str


@dataclass(frozen=True, slots=True)
class Trained:
    """One training: the best epoch's measure on the validation slides, and probabilities of the test slides."""

    valid: tuple[float, float]  # AUROC, and the loss with its sign turned
    test_NL: NDArray[np.float64]
    epoch: int


# --- Features ---------------------------------------------------------------------------------------------------


def network(weights: str) -> LocalClassifier:
    """ResNet-18 up to layer3, as holoslide has it."""
    backbone = BackboneConfig(name="resnet18", weights=weights, truncate="layer3")
    config = ModelConfig(backbone=backbone, modules=1)
    return LocalClassifier.from_config(config, classes=("no", "yes"), inputs=InputConfig()).eval()


@torch.no_grad()
def features(model: LocalClassifier, raster: Raster, side: int) -> Tensor:
    """(N, D) of a slide's patches; one at least."""
    height, width = (max(1, n // side) for n in raster.shape_px)
    cell = raster.mask_cell_px
    inside = raster.mask.repeat(cell, 0).repeat(cell, 1)[: height * side, : width * side]
    padded = np.zeros((height * side, width * side), np.bool_)
    padded[: inside.shape[0], : inside.shape[1]] = inside
    shares = padded.reshape(height, side, width, side).mean(axis=(1, 3))
    places = np.argwhere(shares >= min(0.5, shares.max()))
    patches = np.stack([raster.read(Box.at(y * side, x * side, side, side)) for y, x in places.tolist()])
    pixels = torch.from_numpy(patches).permute(0, 3, 1, 2)
    found = []
    mixed = mixed_dtype("auto", torch.device("cpu"))  # bf16 where the processor has it, as holoslide
    with torch.autocast("cpu", mixed or torch.bfloat16, enabled=mixed is not None):
        for chunk in torch.split(pixels, max(1, 2**20 // side**2)):
            maps_BCHW = model.parts[0](model.stem(normalised(model, chunk)))
            found.append(maps_BCHW.float().mean(dim=(2, 3)))
    return torch.cat(found)


# --- Training ---------------------------------------------------------------------------------------------------


def train(name: str, bags: dict[str, list[Bag]], *, rate: float, epochs: int, seed: int) -> Trained:
    """The epoch that validates best, of a training that stops after ten without a better one."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = MODELS[name](bags["train"][0].features_ND.shape[1], 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4)
    best: Trained | None = None
    for epoch in range(epochs):
        model.train()
        for index in rng.permutation(len(bags["train"])):
            bag = bags["train"][index]
            logits_L, extra = model(bag.features_ND, bag.label)
            loss = F.cross_entropy(logits_L, torch.tensor(bag.label)) + extra
            optimizer.zero_grad()
            torch.autograd.backward([loss])
            optimizer.step()
        valid_NL = scores(model, bags["valid"])
        truth = np.array([bag.label for bag in bags["valid"]])
        loss_now = -float(np.log(np.clip(valid_NL[np.arange(len(truth)), truth], 1e-9, 1)).mean())
        measure = (float(roc_auc_score(truth, valid_NL[:, 1])), -loss_now)
        if best is None or measure > best.valid:
            best = Trained(measure, scores(model, bags["test"]), epoch + 1)
        elif epoch + 1 - best.epoch >= 10:
            break
    assert best is not None
    return best


@torch.no_grad()
def scores(model: nn.Module, bags: Sequence[Bag]) -> NDArray[np.float64]:
    """Probabilities (slides, L)."""
    model.eval()
    logits = torch.stack([model(bag.features_ND)[0] for bag in bags])
    return np.asarray(logits.double().softmax(dim=1).numpy())


def best_of(
    name: str, bags: dict[int, dict[str, list[Bag]]], *, epochs: int, seeds: int
) -> dict[str, Figure]:
    """What a method reaches, with what was chosen for it."""
    tried = {
        (side, rate): train(name, given, rate=rate, epochs=epochs, seed=0)
        for side, given in bags.items()
        for rate in RATES
    }
    side, rate = max(tried, key=lambda key: tried[key].valid)
    runs = [tried[side, rate]]
    runs += [train(name, bags[side], rate=rate, epochs=epochs, seed=seed) for seed in range(1, seeds)]
    tested = bags[side]["test"]
    truth, patients = [bag.label for bag in tested], [bag.patient for bag in tested]
    aurocs = [float(roc_auc_score(truth, run.test_NL[:, 1])) for run in runs]
    mean_NL = np.mean([run.test_NL for run in runs], axis=0)
    interval = compute_metrics(truth, mean_NL, patients, ("no", "yes")).auroc
    return {
        f"{name}_auroc": round(statistics.mean(aurocs), 4),
        f"{name}_seeds": ", ".join(f"{value:.3f}" for value in aurocs),
        f"{name}_interval": f"{interval.low:.3f} to {interval.high:.3f}",
        f"{name}_valid_auroc": round(statistics.mean(run.valid[0] for run in runs), 4),
        f"{name}_chosen": f"patches of {side} px, lr {rate:g}, epoch {runs[0].epoch}",
    }


# --- The benchmark ----------------------------------------------------------------------------------------------


def measure(options: Options) -> Result:
    """Test AUROC of every method, and of the best by validation."""
    values = options.values
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepared_slides(values, Path(folder))
        started = time.perf_counter()
        sides = tuple(int(side) for side in values["patch_px"].split(","))
        bags = _bags(prepared, network(values["weights"]), sides)
        features_s = time.perf_counter() - started
    torch.set_num_threads(1)  # bags are small
    started, figures = time.perf_counter(), dict[str, Figure]()
    epochs = values["epochs"] or (3 if options.quick else 50)
    for name in values["only"].split(",") if values["only"] else MODELS:
        figures |= best_of(name, bags, epochs=epochs, seeds=values["seeds"])
    names = [key.removesuffix("_valid_auroc") for key in figures if key.endswith("_valid_auroc")]
    best = max(names, key=lambda name: float(figures[f"{name}_valid_auroc"] or 0))
    slides = sum(len(part) for part in bags[sides[0]].values())
    figures |= {
        "best_by_validation": best,
        "best_auroc": figures[f"{best}_auroc"],
        "features_s": round(features_s, 1),
        "slide_s": round(features_s / slides / len(sides), 3),
        "training_s": round(time.perf_counter() - started, 1),
    }
    sizes = {part: len(bags[sides[0]][part]) for part in PARTS}
    configuration = {"slides": sizes, "patch_px": sides, "mpp": values["mpp"], "rates": RATES, "epochs": epochs} | {
        "seeds": values["seeds"], "network": "resnet18 to layer3, frozen"
    }  # fmt: skip
    return Result(figures=figures, configuration=configuration, variant=values["name"] or "drawn")


def cohort_arguments(parser: argparse.ArgumentParser) -> None:
    """Which slides, where and at what resolution, as `prepared_slides` takes them, and the network's weights."""
    parser.add_argument("cohort", nargs="?", help="slide table with splits (default: some drawn slides)")
    parser.add_argument("name", nargs="?", help="goes into the name of the result file")
    parser.add_argument("--rasters", metavar="DIR", help="where the prepared slides are, or go")
    parser.add_argument("--mpp", type=float, default=4.0, help="um per pixel to prepare at (4)")
    parser.add_argument("--weights", default="none", help="ImageNet weights of ResNet-18, a file")


def prepared_slides(values: Mapping[str, Any], folder: Path) -> Prepared:
    table, rasters, mpp = values["cohort"], values["rasters"] or folder / "rasters", values["mpp"]
    if table is None:
        table, mpp = write_phantoms(folder, task="focus", slides=40, config=DRAWN), DRAWN.mpp
    cohort = Cohort.from_csv(table).with_splits(SplitConfig())
    prepared = prepare_cohort(cohort, Path(rasters), PrepareConfig(mpp=mpp), labels=True)
    if prepared.left_out:
        raise SystemExit("; ".join(f"{slide}: {reason}" for slide, reason in prepared.left_out))
    return prepared


def _bags(
    prepared: Prepared, model: LocalClassifier, sides: Sequence[int]
) -> dict[int, dict[str, list[Bag]]]:
    cohort = prepared.cohort
    bags: dict[int, dict[str, list[Bag]]] = {}
    for side in sides:
        bags[side] = {}
        for part in PARTS:
            bags[side][part] = []
            for row in getattr(cohort, part):
                with Raster.open(prepared.rasters[row.slide_id]) as raster:
                    found = features(model, raster, side)
                bags[side][part].append(Bag(found, cohort.classes.index(row.label), row.patient_id))
    return bags


def _arguments(parser: argparse.ArgumentParser) -> None:
    cohort_arguments(parser)
    parser.add_argument(
        "--patch-px", default="64,128", metavar="SIDES", help="sides of a patch that are tried (64,128)"
    )
    parser.add_argument("--only", metavar="METHODS", help=f"some of {','.join(MODELS)}")
    parser.add_argument("--epochs", type=int, metavar="N", help="at most (3, --full 50)")
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="trainings with what was chosen (3)"
    )


if __name__ == "__main__":
    main("mil", __doc__, measure, add_arguments=_arguments)
