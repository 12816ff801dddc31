"""Heads alone, on frozen features of a pretrained network: each setting varied by itself, in seconds a training.

    python -m benchmarks.heads slides.csv NAME --weights resnet18.pth --rasters rasters --full

ResNet-18 up to layer3 runs once over every slide; then a head is trained on its maps as the last head of a run is,
one slide a step, no augmentation. This is what a run's first epochs do (`train.heads_first`), and an upper bound of
MIL on the same features; what the backbone gains by training is not in it. A question is one setting:

pooling   how cells become one answer        kernel   side of a cell, in cells of layer3
norm      of the cells, over cohort or slide lr       the learning rate
stem      stride of the first convolution    slides   share of the training slides
noise     share of training labels turned    maps     pooling and norm together

The epoch is chosen on the validation slides (AUROC, then loss). `QUESTION_VALUE_auroc` is the test AUROC, mean of
`--seeds` trainings, `_seeds` each of them; `seeds_spread` the mean over all settings of their deviation. With
`--truth`, `_pointing_evidence`, `_auprc_attention`, ... are those of `benchmarks.heatmaps`, and `_pointing_seeds`
each training's. Without a cohort, on a few drawn slides: to see that it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import Figure, Options, Result, main
from benchmarks.heatmaps import judge_maps, picture_of
from benchmarks.mil import PARTS, cohort_arguments, prepared_slides
from benchmarks.supervised import tumour_px
from holoslide.evaluation.scales import evidence_for
from holoslide.geometry import Box
from holoslide.models.classifier import LocalClassifier
from holoslide.models.heads import Head, StandardConv
from holoslide.models.options import BackboneConfig, HeadConfig, InputConfig, ModelConfig, StreamConfig
from holoslide.models.precision import mixed_dtype
from holoslide.models.streamed import StreamedClassifier, head_stride
from holoslide.prepared import Prepared
from holoslide.slides.raster import Raster
from holoslide.streaming.receptive import Receptive
from holoslide.streaming.tissue import Tissue

CLASSES = ("no", "yes")
CELLS = HeadConfig(pooling="auto", norm="cohort", kernel=3)
PX_PER_CELL = 8  # of layer3, times the stem's stride


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One training; by default with heads that classify each cell by itself."""

    heads: HeadConfig = CELLS
    lr: float = 2e-4
    stem: int = 2
    slides: float = 1.0
    noise: float = 0.0


@dataclass(frozen=True, slots=True)
class Slide:
    """Layer3 of one slide (C, H, W), what glass is there (C,), where its tissue is, and which cells have lesion."""

    map_CHW: Tensor
    glass_C: Tensor
    tissue: Tissue
    lesion_HW: NDArray[np.bool_]
    label: int
    patient: str


@dataclass(frozen=True, slots=True)
class Reached:
    """What a head came to on the test slides: AUROC, and `benchmarks.heatmaps`' figures of those with a lesion."""

    auroc: float
    maps: dict[str, float]


Slides = dict[str, list[Slide]]  # by part
VALUES: dict[str, tuple[Any, ...]] = {
    "pooling": ("auto", "gated", "attention", "mean"),
    "kernel": (1, 2, 3, 4, 5, 7),
    "norm": ("cohort", "slide"),
    "lr": (5e-5, 2e-4, 1e-3),
    "stem": (2, 3),
    "slides": (0.25, 0.5, 1.0),
    "noise": (0.0, 0.1, 0.2),
    "maps": ("auto-cohort", "auto-slide", "gated-cohort", "gated-slide"),
}


def settings(question: str) -> dict[str, Setting]:
    """Each value of a question, the rest as by default."""
    return {
        f"{value:g}" if isinstance(value, float) else str(value): _setting(question, value)
        for value in VALUES[question]
    }


def _setting(question: str, value: Any) -> Setting:
    heads: dict[str, Any] = {}
    if question == "maps":
        heads = dict(zip(("pooling", "norm"), value.split("-"), strict=True))
    elif question in {"pooling", "kernel", "norm"}:
        heads = {question: value}
    if heads:
        return Setting(heads=dataclasses.replace(CELLS, **heads))
    return dataclasses.replace(Setting(), **{question: value})


# --- Features ---------------------------------------------------------------------------------------------------


def network(weights: str, glass: tuple[int, int, int], stem: int) -> StreamedClassifier:
    """ResNet-18 up to layer3; the stem strides by `stem` and its pooling by 2, as in the network's own 2 and 2."""
    backbone = BackboneConfig(
        name="resnet18", weights=weights, truncate="layer3", stem_stride=None if stem == 2 else stem
    )
    config = ModelConfig(backbone=backbone, modules=1, pool="all")
    generator = torch.Generator().manual_seed(0)
    model = LocalClassifier.from_config(
        config, classes=CLASSES, inputs=InputConfig(glass=glass), generator=generator
    )
    mixed = mixed_dtype("auto", torch.device("cpu"))
    return StreamedClassifier(model.eval(), StreamConfig(), mixed=mixed)


@torch.no_grad()
def slides_of(prepared: Prepared, weights: str, stem: int, truth: Path | None = None) -> Slides:
    """Every slide of the cohort, in half precision, by part; without `truth` no lesion is known."""
    cohort, net = prepared.cohort, None
    found: Slides = {part: [] for part in PARTS}
    for part in PARTS:
        for row in getattr(cohort, part):
            with Raster.open(prepared.rasters[row.slide_id]) as raster:
                net = net or network(weights, tuple(int(v) for v in raster.glass), stem)  # type: ignore[arg-type]
                output = net.part_map(0, net.stem_map(raster))
                map_CHW = output.windows([output.frame])[0].half().contiguous()
                lesion = np.zeros(raster.shape_px, bool)
                if truth is not None:
                    lesion = tumour_px(picture_of(truth, row.slide_id), raster)
            label = cohort.classes.index(row.label)
            lesion_HW = touched(lesion, PX_PER_CELL * stem)
            glass_C = output.glass.float()
            found[part].append(Slide(map_CHW, glass_C, output.tissue, lesion_HW, label, row.patient_id))
            output.free()
    return found


def touched(mask: NDArray[np.bool_], side: int) -> NDArray[np.bool_]:
    """Which squares of a grid over a mask hold any of it; the last ones may reach beyond."""
    found = F.max_pool2d(torch.from_numpy(mask)[None].float(), side, ceil_mode=True)
    return found[0].bool().numpy()


# --- A head on them ---------------------------------------------------------------------------------------------


def whole_cells(slide: Slide, kernel: int) -> Tensor:
    """The map (1, C, H, W), filled up with glass to whole cells of a head."""
    channels, height, width = slide.map_CHW.shape
    shape = (math.ceil(height / kernel) * kernel, math.ceil(width / kernel) * kernel)
    filled = slide.glass_C[:, None, None].expand(channels, *shape).clone()
    filled[:, :height, :width] = slide.map_CHW
    return filled[None]


def votes(slide: Slide, kernel: int, cell_px: int) -> Tensor:
    """Which of those cells hold tissue, (h, w)."""
    height, width = (math.ceil(n / kernel) for n in slide.map_CHW.shape[1:])
    side_px = kernel * cell_px
    return torch.from_numpy(
        slide.tissue.seen_by(Box(0, 0, height, width), Receptive(side_px, 0, side_px - 1))
    )


def cells(head: Head, slide: Slide, cell_px: int) -> Tensor:
    """Those of a slide that vote, (N, C)."""
    kernel = head_stride(head)
    cells_hwC = head.stem(whole_cells(slide, kernel))[0].permute(1, 2, 0)
    found: Tensor = cells_hwC[votes(slide, kernel, cell_px)]
    return found


def logits(head: Head, slide: Slide, cell_px: int, *, generator: torch.Generator | None = None) -> Tensor:
    """(L,) of a slide; `generator` draws the dropout."""
    found: Tensor = head.readout(cells(head, slide, cell_px), generator=generator)
    return found


def train(slides: Slides, setting: Setting, *, epochs: int, seed: int) -> Reached:
    """What the epoch that validates best comes to."""
    torch.manual_seed(seed)  # a head draws its weights from it
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    cell_px = PX_PER_CELL * setting.stem
    head = Head(slides["train"][0].map_CHW.shape[0], len(CLASSES), setting.heads, depth=4)
    if isinstance(head.stem, StandardConv):
        some = [s.map_CHW.float().flatten(1) for s in slides["train"][:24]]
        head.stem.measure(torch.cat(some, dim=1)[None, :, :, None])
    given = chosen(slides["train"], setting, rng)
    optimizer = torch.optim.AdamW(head.parameters(), lr=setting.lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(given))
    best, reached = (-1.0, 0.0), Reached(0.5, {})
    for _ in range(epochs):
        for index in rng.permutation(len(given)):
            slide, label = given[int(index)]
            loss = F.cross_entropy(logits(head, slide, cell_px, generator=generator), torch.tensor(label))
            optimizer.zero_grad()
            torch.autograd.backward([loss])
            optimizer.step()
            schedule.step()
        measure = validated(head, slides["valid"], cell_px)
        if measure > best:
            auroc = validated(head, slides["test"], cell_px)[0]
            best, reached = measure, Reached(auroc, pointed(head, slides["test"], cell_px))
    return reached


def chosen(slides: Sequence[Slide], setting: Setting, rng: np.random.Generator) -> list[tuple[Slide, int]]:
    """The training slides of a share of the patients, some with their label turned."""
    patients = sorted({slide.patient for slide in slides})
    kept = set(rng.permutation(patients)[: max(2, round(setting.slides * len(patients)))].tolist())
    given = [slide for slide in slides if slide.patient in kept]
    turned = set(rng.permutation(len(given))[: round(setting.noise * len(given))].tolist())
    return [(slide, slide.label ^ (i in turned)) for i, slide in enumerate(given)]


@torch.no_grad()
def validated(head: Head, slides: Iterable[Slide], cell_px: int) -> tuple[float, float]:
    """AUROC, and the loss with its sign turned."""
    slides = list(slides)
    found = torch.stack([logits(head, slide, cell_px) for slide in slides])
    truth = torch.tensor([slide.label for slide in slides])
    chance = found.softmax(dim=1)[:, 1]
    return float(roc_auc_score(truth, chance)), -float(F.cross_entropy(found, truth))


@torch.no_grad()
def pointed(head: Head, slides: Iterable[Slide], cell_px: int) -> dict[str, float]:
    """How well attention and evidence point at the lesions, in the mean over the slides that have one known."""
    kernel, judged = head_stride(head), list[dict[str, float]]()
    for slide in slides:
        if slide.lesion_HW.any():
            lesion_N = touched(slide.lesion_HW, kernel)[votes(slide, kernel, cell_px).numpy()]
            found = head.readout.explain(cells(head, slide, cell_px))
            shown = {
                "evidence": evidence_for(found.evidence_NL.T.numpy(), slide.label),
                "attention": found.attention_N.numpy(),
            }
            judged.append(judge_maps(shown, lesion_N))
            judged[-1]["auprc_chance"] = float(lesion_N.mean())
    return {key: statistics.fmean(one[key] for one in judged) for key in judged[0]} if judged else {}


# --- The benchmark ----------------------------------------------------------------------------------------------


def measure(options: Options) -> Result:
    """Test AUROC by question and value."""
    values = options.values
    questions = values["only"].split(",") if values["only"] else list(VALUES)
    epochs, seeds = values["epochs"] or (2 if options.quick else 8), range(values["seeds"])
    wanted = {(q, name): setting for q in questions for name, setting in settings(q).items()}
    reached: dict[Setting, list[Reached]] = {}  # a default is in every question, and trained once
    with tempfile.TemporaryDirectory() as folder:
        prepared, truth = prepared_slides(values, Path(folder)), values["truth"]
        if values["cohort"] is None:
            truth = Path(folder) / "truth"
        sizes = {part: len(getattr(prepared.cohort, part)) for part in PARTS}
        for stem in sorted({setting.stem for setting in wanted.values()}):
            slides = slides_of(prepared, values["weights"], stem, truth)
            for setting in dict.fromkeys(s for s in wanted.values() if s.stem == stem):
                reached[setting] = [train(slides, setting, epochs=epochs, seed=seed) for seed in seeds]
    figures: dict[str, Figure] = {}
    for (question, name), setting in wanted.items():
        figures |= {f"{question}_{name}_{key}": value for key, value in _summed(reached[setting]).items()}
    spreads = [statistics.pstdev(one.auroc for one in each) for each in reached.values()]
    figures["seeds_spread"] = round(statistics.mean(spreads), 4)
    configuration = {"slides": sizes, "epochs": epochs, "seeds": len(seeds)} | {
        "default": dataclasses.asdict(Setting()), "network": "resnet18 to layer3, frozen"
    }  # fmt: skip
    return Result(figures=figures, configuration=configuration, variant=values["name"] or "drawn")


def _summed(trainings: list[Reached]) -> dict[str, Figure]:
    """The mean of a setting's trainings, and each of them."""
    aurocs = [one.auroc for one in trainings]
    figures: dict[str, Figure] = {"auroc": round(statistics.mean(aurocs), 4), "seeds": _listed(aurocs)}
    if all(one.maps for one in trainings):
        for key in trainings[0].maps:
            figures[key] = round(statistics.mean(one.maps[key] for one in trainings), 3)
        figures["pointing_seeds"] = _listed([one.maps["pointing_evidence"] for one in trainings])
    return figures


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _arguments(parser: argparse.ArgumentParser) -> None:
    cohort_arguments(parser)
    parser.add_argument(
        "--truth", type=Path, metavar="FOLDER", help="where the lesions are, a PNG of each slide"
    )
    parser.add_argument("--only", metavar="QUESTIONS", help=f"some of {','.join(VALUES)}")
    parser.add_argument("--epochs", type=int, metavar="N", help="of every training (2, --full 8)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of every setting (3)")


if __name__ == "__main__":
    main("heads", __doc__, measure, add_arguments=_arguments)
