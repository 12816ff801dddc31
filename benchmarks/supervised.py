"""What labels of whole slides cost: the same network, told of every patch of the training slides where tumour is.

    python -m benchmarks.supervised slides.csv NAME --weights resnet18.pth --rasters rasters --truth truth --full

ResNet-18 up to layer3, averaged over a patch, and two layers on top, learn which patches are tumour: what nobody
knows who has one label a slide. A patch's logit is averaged with those of the patches around it, or not, and a
slide's answer is the mean of its strongest patches; which of these, the validation slides tell.

frozen    the network stands still, and the two layers learn.        trained   all learn, but the network's stem.

An epoch has every patch of tumour, and as many others; which epoch, the validation slides' patches tell, all of
tumour and a quarter of the others. `_auroc` is the slides' in the test part, mean of `--seeds` trainings,
`_seeds` each, `_interval` that of their mean answers, over patients; `_patches_auroc` the patches'. FOLDER of
`--truth` is as `benchmarks.heatmaps` takes it; the patches are a grid on the slide. Without a cohort, on a few
drawn slides: to see that it runs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import Figure, Options, Result, main
from benchmarks.heatmaps import picture_of
from benchmarks.mil import PARTS, cohort_arguments, network, prepared_slides
from benchmarks.plain import normalised
from holoslide.evaluation.metrics import compute_metrics
from holoslide.geometry import Box, ceil_div
from holoslide.models.classifier import LocalClassifier
from holoslide.prepared import Prepared
from holoslide.slides.raster import Raster

BATCH = 64
AROUND = (1, 3)  # side of the square of patches that a patch's logit is the mean of
STRONGEST = (1, 2, 4, 8, 16)  # patches, whose mean is a slide's answer
RATES = {"network": 1e-4, "top": 1e-3}


@dataclass(frozen=True, slots=True)
class Slide:
    """A slide's patches (N, side, side, 3), their row and column (N, 2), which of them are tumour (N,), and what is
    known of the whole.
    """

    patches: NDArray[np.uint8]
    places: NDArray[np.int64]
    tumour_N: NDArray[np.bool_]
    label: int
    patient: str


Slides = dict[str, list[Slide]]  # by part


# --- Patches ----------------------------------------------------------------------------------------------------


def tumour_px(picture: NDArray[np.bool_], raster: Raster) -> NDArray[np.bool_]:
    """Which pixels of a raster are tumour, from a picture of the whole slide, of any scale."""
    places = []
    for axis in (0, 1):
        middles_px = np.arange(raster.shape_px[axis]) + 0.5
        middles_l0 = raster.origin_l0[axis] + middles_px * raster.l0_per_px[axis]
        there = (middles_l0 * picture.shape[axis] / raster.record.shape_l0[axis]).astype(int)
        places.append(there.clip(0, picture.shape[axis] - 1))
    return picture[np.ix_(*places)]


def patches_of(
    raster: Raster, picture: NDArray[np.bool_], side: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
    """The patches that are at least half tissue, one at least, on a grid from the slide's corner; their places; and
    which of them are at least half tumour.
    """
    before = [round(o / each) % side for o, each in zip(raster.origin_l0, raster.l0_per_px, strict=True)]

    def share(inside: NDArray[np.bool_]) -> NDArray[np.float64]:
        height, width = (ceil_div(n + b, side) for n, b in zip(raster.shape_px, before, strict=True))
        padded = np.zeros((height * side, width * side), np.bool_)
        rows, columns = (slice(b, b + n) for b, n in zip(before, raster.shape_px, strict=True))
        padded[rows, columns] = inside
        found: NDArray[np.float64] = padded.reshape(height, side, width, side).mean(axis=(1, 3))
        return found

    cell = raster.mask_cell_px
    mask = raster.mask.repeat(cell, 0).repeat(cell, 1)[: raster.shape_px[0], : raster.shape_px[1]]
    tissue, tumour = share(mask), share(tumour_px(picture, raster))
    places = np.argwhere(tissue >= min(0.5, tissue.max()))
    boxes = [Box.at(y * side - before[0], x * side - before[1], side, side) for y, x in places.tolist()]
    return np.stack([raster.read(box) for box in boxes]), places, tumour[tuple(places.T)] >= 0.5


def slides_of(prepared: Prepared, truth: Path, side: int) -> Slides:
    """Every slide of the cohort, by part."""
    found: Slides = {part: [] for part in PARTS}
    for part in PARTS:
        for row in getattr(prepared.cohort, part):
            picture = picture_of(truth, row.slide_id)
            with Raster.open(prepared.rasters[row.slide_id]) as raster:
                patches, places, tumour_N = patches_of(raster, picture, side)
            label = prepared.cohort.classes.index(row.label)
            found[part].append(Slide(patches, places, tumour_N, label, row.patient_id))
    return found


# --- A network that is told of them -----------------------------------------------------------------------------


class Told(nn.Module):
    """Logits (B, 2) of patches, of 0 to 255, (B, 3, H, W)."""

    def __init__(self, model: LocalClassifier, *, frozen: bool) -> None:
        super().__init__()
        self.model = model
        self.model.stem.requires_grad_(requires_grad=False)
        self.model.parts.requires_grad_(requires_grad=not frozen)
        with torch.no_grad():
            width = self.features(torch.zeros(1, 3, 64, 64)).shape[1]
        self.top = nn.Sequential(nn.Linear(width, 512), nn.ReLU(), nn.Dropout(0.2), nn.Linear(512, 2))

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        """(B, C): the mean over a patch."""
        found: Tensor = self.model.parts[0](self.model.stem(normalised(self.model, pixels_BCHW)))
        return found.mean(dim=(2, 3))

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2)."""
        logits_BL: Tensor = self.top(self.features(pixels_BCHW))
        return logits_BL


def varied(patches: NDArray[np.uint8], rng: np.random.Generator) -> Tensor:
    """Patches (B, 3, H, W), each turned and turned over at random, and its colours changed a little."""
    found = []
    for pixels_CHW in pixels(patches):
        turned_CHW = torch.rot90(pixels_CHW, int(rng.integers(4)), (1, 2))
        turned_CHW = turned_CHW.flip(2) if rng.random() < 0.5 else turned_CHW
        contrast_C, brightness_C = rng.uniform(0.9, 1.1, (3, 1, 1)), rng.uniform(-20, 20, (3, 1, 1))
        found.append((turned_CHW - 190) * torch.from_numpy(contrast_C) + 190 + torch.from_numpy(brightness_C))
    return torch.stack(found).clamp(0, 255).float()


def pixels(patches: NDArray[np.uint8]) -> Tensor:
    """(B, H, W, 3) -> (B, 3, H, W), 0 to 255."""
    return torch.from_numpy(patches).permute(0, 3, 1, 2).float()


def train(slides: Slides, weights: str, *, frozen: bool, epochs: int, seed: int) -> Told:
    """The network of the epoch in which the validation slides' patches are told apart best."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = Told(network(weights), frozen=frozen)
    groups = [{"params": net.top.parameters(), "lr": RATES["top"]}]
    if not frozen:
        groups.append({"params": net.model.parts.parameters(), "lr": RATES["network"]})
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    patches = np.concatenate([slide.patches for slide in slides["train"]])
    tumour_N = np.concatenate([slide.tumour_N for slide in slides["train"]])
    watched = [some_of(slide, 4) for slide in slides["valid"]]
    best, kept = -1.0, net
    for _ in range(epochs):
        net.top.train()  # all else keeps its statistics, as in a run
        others = rng.choice(np.flatnonzero(~tumour_N), min(tumour_N.sum(), (~tumour_N).sum()), replace=False)
        order = rng.permutation([*np.flatnonzero(tumour_N), *others])
        for some in np.array_split(order, ceil_div(len(order), BATCH)):
            loss = F.cross_entropy(
                net(varied(patches[some], rng)), torch.from_numpy(tumour_N[some].astype(int))
            )
            optimizer.zero_grad()
            torch.autograd.backward([loss])
            optimizer.step()
        schedule.step()
        if (told := of_patches(watched, scores(net, watched))) > best:
            best, kept = told, copy.deepcopy(net)
    return kept


@torch.no_grad()
def scores(net: Told, slides: Sequence[Slide]) -> list[NDArray[np.float64]]:
    """How much each slide's patches (N,) look like tumour: the logit."""
    net.eval()
    found = []
    for slide in slides:
        logits_NL = torch.cat([net(some) for some in torch.split(pixels(slide.patches), BATCH)]).double()
        found.append((logits_NL[:, 1] - logits_NL[:, 0]).numpy())
    return found


def of_patches(slides: Sequence[Slide], found: Sequence[NDArray[np.float64]]) -> float:
    """AUROC of all slides' patches."""
    truth = np.concatenate([slide.tumour_N for slide in slides])
    return float(roc_auc_score(truth, np.concatenate(found)))


def of_slides(slides: Sequence[Slide], answer: NDArray[np.float64]) -> float:
    """AUROC of the slides."""
    return float(roc_auc_score([slide.label for slide in slides], answer))


def some_of(slide: Slide, every: int) -> Slide:
    """The slide with all its patches of tumour, and one in `every` of the others."""
    kept_N = slide.tumour_N.copy()
    kept_N[np.flatnonzero(~slide.tumour_N)[::every]] = True
    return replace(
        slide, patches=slide.patches[kept_N], places=slide.places[kept_N], tumour_N=slide.tumour_N[kept_N]
    )


def answers(
    slides: Sequence[Slide], found: Sequence[NDArray[np.float64]], around: int, strongest: int
) -> NDArray[np.float64]:
    """Of each slide the mean of its strongest patches, each averaged over a square of them."""
    given = []
    for slide, logits_N in zip(slides, found, strict=True):
        given.append(np.sort(averaged(slide.places, logits_N, around))[-strongest:].mean())
    return np.array(given)


def averaged(places: NDArray[np.int64], logits_N: NDArray[np.float64], around: int) -> NDArray[np.float64]:
    """Each patch's mean with those that are there of the square around it."""
    near_NN = (np.abs(places[:, None] - places) <= around // 2).all(axis=2)
    return np.asarray((near_NN @ logits_N) / near_NN.sum(axis=1))


# --- The benchmark ----------------------------------------------------------------------------------------------


def reached(slides: Slides, weights: str, *, frozen: bool, epochs: int, seeds: int) -> dict[str, Figure]:
    """The figures of one of the two."""
    tested, patients = slides["test"], [slide.patient for slide in slides["test"]]
    aurocs, patches, chances, chosen = [], [], [], []
    for seed in range(seeds):
        net = train(slides, weights, frozen=frozen, epochs=epochs, seed=seed)
        valid, test = scores(net, slides["valid"]), scores(net, tested)
        ways = {
            way: of_slides(slides["valid"], answers(slides["valid"], valid, *way))
            for way in product(AROUND, STRONGEST)
        }
        chosen.append(max(ways, key=lambda way: ways[way]))
        answer = answers(tested, test, *chosen[-1])
        aurocs.append(of_slides(tested, answer))
        patches.append(of_patches(tested, test))
        chances.append(1 / (1 + np.exp(-answer)))
    chance = np.mean(chances, axis=0)
    mean_NL = np.stack([1 - chance, chance], axis=1)
    labels = [slide.label for slide in tested]
    interval = compute_metrics(labels, mean_NL, patients, ("no", "yes")).auroc
    name = "frozen" if frozen else "trained"
    return {
        f"{name}_auroc": round(statistics.mean(aurocs), 4),
        f"{name}_seeds": ", ".join(f"{value:.3f}" for value in aurocs),
        f"{name}_interval": f"{interval.low:.3f} to {interval.high:.3f}",
        f"{name}_patches_auroc": round(statistics.mean(patches), 4),
        f"{name}_chosen": "; ".join(f"the strongest {n}, averaged {a} x {a}" for a, n in chosen),
    }


def measure(options: Options) -> Result:
    """Test AUROC of slides and of patches, the network frozen and trained."""
    values = options.values
    epochs, side = values["epochs"] or (2 if options.quick else 12), values["patch_px"]
    if values["cohort"] and not values["truth"]:
        raise SystemExit("give --truth, the folder of pictures of where the tumour is")
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepared_slides(values, Path(folder))
        slides = slides_of(prepared, Path(values["truth"] or Path(folder) / "truth"), side)
    figures: dict[str, Figure] = {}
    for frozen in (True, False):
        figures |= reached(slides, values["weights"], frozen=frozen, epochs=epochs, seeds=values["seeds"])
    tumour = sum(int(slide.tumour_N.sum()) for slide in slides["train"])
    figures |= {
        "tumour_patches": tumour,
        "other_patches": sum(len(s.tumour_N) for s in slides["train"]) - tumour,
    }
    sizes = {part: len(slides[part]) for part in PARTS}
    configuration = {"slides": sizes, "patch_px": side, "mpp": values["mpp"], "rates": RATES, "epochs": epochs} | {
        "seeds": values["seeds"], "network": "resnet18 to layer3"
    }  # fmt: skip
    return Result(figures=figures, configuration=configuration, variant=values["name"] or "drawn")


def _arguments(parser: argparse.ArgumentParser) -> None:
    cohort_arguments(parser)
    parser.add_argument("--truth", metavar="FOLDER", help="where the tumour is, a PNG of each slide")
    parser.add_argument("--patch-px", type=int, default=50, metavar="SIDE", help="of a patch (50)")
    parser.add_argument("--epochs", type=int, metavar="N", help="of every training (2, --full 12)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="trainings of each of the two (1)")


if __name__ == "__main__":
    main("supervised", __doc__, measure, add_arguments=_arguments)
