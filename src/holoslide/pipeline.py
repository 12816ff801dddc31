"""The whole way from a slide table to a report, as the command line walks it. Each step finds what the one before left.

A run's folder holds: `config.yaml`, `cohort.csv`, `left_out.csv`, `run.json` (command, versions, machine),
`best/` (the model), `last.ckpt`, `history.csv`, `tensorboard/`, and, once evaluated, `predictions.csv`,
`predictions_modules.csv`, `metrics.json`, `heatmaps/` and `report.html`.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import math
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from holoslide.config import RunConfig
from holoslide.errors import CheckpointError, CohortError, ConfigError, SlideError
from holoslide.evaluation.overlay import (
    Placement,
    attention_scale,
    box_on_picture,
    evidence_for,
    evidence_scale,
    overlay,
    relative_attention,
)
from holoslide.inference.heatmap import Heatmap, make_heatmap
from holoslide.inference.predict import SlideScores, score_slide
from holoslide.models.classifier import InputConfig, LocalClassifier
from holoslide.models.streamed import StreamedClassifier
from holoslide.slides.cohort import Cohort, SlideRow
from holoslide.slides.prepare import PrepareConfig, PrepareJob, PrepareResult, prepare
from holoslide.slides.raster import Raster
from holoslide.streaming.plan import Plan
from holoslide.training.loop import FitResult, Progress, Sample, fit
from holoslide.training.parallel import mixed_dtype

LEFT_OUT = "left_out.csv"
Advance = Callable[[int, int, str], None]  # (done, total, what was done last)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """The slides of a cohort that can be used, with their rasters, and those that cannot, with the reason."""

    cohort: Cohort
    rasters: dict[str, Path]
    left_out: list[tuple[str, str]]
    results: list[PrepareResult]


def default_rasters(table: Path) -> Path:
    """Where the prepared slides of a table go unless told otherwise."""
    return table.parent / "rasters"


def prepare_cohort(
    cohort: Cohort, rasters: Path, config: PrepareConfig, *, labels: bool = False, workers: int = 0,
    progress: Advance | None = None,
) -> Prepared:  # fmt: skip
    """Prepare what is not prepared; a slide that fails is left out with its reason, the rest go on.

    With `labels`, slides without one are left out, too.
    """
    usable, findings = cohort.usable(labels=labels)
    jobs = [PrepareJob(row.slide_id, row.path, row.mpp) for row in usable if row.path is not None]
    results = prepare(jobs, rasters, config, workers=workers or os.cpu_count() or 1, progress=progress)
    left_out = [(finding.where, f"{finding.what}; {finding.remedy}") for finding in findings]
    left_out += [(r.slide_id, r.reason or "failed") for r in results if r.status == "failed"]
    paths = {r.slide_id: r.path for r in results if r.path is not None and r.status != "failed"}
    kept = dataclasses.replace(usable, rows=tuple(row for row in usable if row.slide_id in paths))
    return Prepared(kept, paths, left_out, results)


def train(
    prepared: Prepared,
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> FitResult:
    """Train on the train part, choose on the valid part; the test part is not looked at."""
    cohort = prepared.cohort
    parts = {
        "train": samples(cohort.train, prepared.rasters),
        "valid": samples(cohort.valid, prepared.rasters),
    }
    generator = torch.Generator().manual_seed(config.train.seed)
    inputs = normalisation([s.raster for s in parts["train"]], config)
    model = LocalClassifier.from_config(
        config.model, classes=cohort.classes, inputs=inputs, generator=generator
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    cohort.to_csv(out / "cohort.csv")
    write_left_out(prepared.left_out, out / LEFT_OUT)
    write_facts(out / "run.json")
    return fit(
        model,
        parts["train"],
        parts["valid"],
        config=config.train,
        stream=config.stream,
        augment=config.augment,
        out=out,
        resume=resume,
        progress=progress,
    )


def samples(cohort: Cohort, rasters: dict[str, Path]) -> list[Sample]:
    """The slides of a part as training takes them."""
    return [
        Sample(row.slide_id, row.patient_id, cohort.classes.index(row.label), rasters[row.slide_id])
        for row in cohort
        if row.label is not None
    ]


def normalisation(rasters: Sequence[Path], config: RunConfig) -> InputConfig:
    """Mean and deviation of all tissue pixels of the training rasters; background has no part in it."""
    total, first, second = 0.0, np.zeros(3), np.zeros(3)
    glass = (0, 0, 0)
    for path in rasters:
        with Raster.open(path) as raster:
            mean, std = (np.asarray(v) / 255 for v in (raster.record.tissue_mean, raster.record.tissue_std))
            total += raster.tissue_px
            first += raster.tissue_px * mean
            second += raster.tissue_px * (std**2 + mean**2)
            glass = tuple(int(v) for v in raster.glass)  # type: ignore[assignment]
    if not total:
        raise CohortError("train", "holds no slide", "give the table a split, or let one be drawn")
    mean = first / total
    std = np.sqrt(np.maximum(second / total - mean**2, 1e-6))
    return InputConfig(
        mpp=config.prepare.mpp,
        mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        std=(float(std[0]), float(std[1]), float(std[2])),
        glass=glass,
    )


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model says about one slide of a cohort, and its heatmap."""

    row: SlideRow
    raster: Path
    scores: SlideScores
    heatmap: Heatmap


class Predictor:
    """A trained model, ready to score rasters; `folder` is a run or a saved model."""

    def __init__(self, folder: Path, config: RunConfig | None = None) -> None:
        model_folder = folder / "best" if (folder / "best").is_dir() else folder
        if not model_folder.is_dir():
            raise CheckpointError(folder, "is not a run or a model", "give the folder that train wrote")
        self.model = LocalClassifier.load(model_folder)
        self.config = config or (
            RunConfig.load(folder / "config.yaml") if (folder / "config.yaml").exists() else RunConfig()
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(device)
        mixed = mixed_dtype(self.config.train.precision, device)
        self.network = StreamedClassifier(self.model, self.config.stream, mixed=mixed)

    def score(self, row: SlideRow, raster_path: Path) -> Scored:
        """Run one slide; the heatmap comes from the same pass as the prediction."""
        last = len(self.network.heads) - 1
        with Raster.open(raster_path) as raster:
            if self.model.mpp is not None and not math.isclose(raster.mpp, self.model.mpp, rel_tol=1e-6):
                raise SlideError(
                    raster_path,
                    f"is at {raster.mpp} um/px and the model at {self.model.mpp}",
                    f"prepare it with --mpp {self.model.mpp}",
                )
            scores = score_slide(self.network, raster, explain=[last])
            heatmap = make_heatmap(scores.cells[last], raster, self.model.classes)
        return Scored(row, raster_path, scores, heatmap)

    def prepare_config(self) -> PrepareConfig:
        """How rasters must be made for this model."""
        mpp = self.model.mpp or self.config.prepare.mpp
        return dataclasses.replace(self.config.prepare, mpp=mpp)


def prediction_table(
    scored: Iterable[Scored], classes: Sequence[str], *, head: int = -1
) -> list[dict[str, str]]:
    """Rows of `slide_id, patient_id, label, prediction, p_<class>...`."""
    rows = []
    for one in scored:
        probabilities = one.scores.probabilities[head]
        rows.append(
            {
                "slide_id": one.row.slide_id,
                "patient_id": one.row.patient_id,
                "label": one.row.label or "",
                "prediction": classes[int(probabilities.argmax())],
                **{f"p_{name}": f"{p:.6f}" for name, p in zip(classes, probabilities, strict=True)},
            }
        )
    return rows


def predict_cohort(
    predictor: Predictor, prepared: Prepared, out: Path, *, heatmaps: Path | None = None,
    progress: Advance | None = None,
) -> int:  # fmt: skip
    """Score slides into a table, and draw their heatmaps; a slide that fails is added to those left out."""
    scored = []
    for done, row in enumerate(prepared.cohort, start=1):
        try:
            one = predictor.score(row, prepared.rasters[row.slide_id])
            if heatmaps is not None:
                draw_heatmap(one, heatmaps)
            scored.append(one)
        except SlideError as error:
            prepared.left_out.append((row.slide_id, str(error)))
        if progress is not None:
            progress(done, len(prepared.cohort), row.slide_id)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_rows(prediction_table(scored, predictor.model.classes), out)
    return len(scored)


def draw_heatmap(one: Scored, folder: Path) -> None:
    """Write a slide's raw scores, and its attention and the predicted class's evidence over the slide."""
    folder.mkdir(parents=True, exist_ok=True)
    one.heatmap.save(folder / f"{one.row.slide_id}.npz")
    picture = slide_picture(one)
    target = int(one.scores.probabilities[-1].argmax())
    relative = relative_attention(one.heatmap.attention_HW)
    evidence = evidence_for(one.heatmap.evidence_LHW, target)
    place = Placement.in_box(picture.grid_px, one.heatmap.attention_HW.shape)
    layers = {
        "attention": (relative, attention_scale([relative])),
        "evidence": (evidence, evidence_scale(evidence, one.heatmap.classes[target])),
    }
    for name, (values, scale) in layers.items():
        drawn = overlay(picture.pixels, values, place, scale)
        write_png(drawn, folder / f"{one.row.slide_id}-{name}.png")


@dataclass(frozen=True, slots=True)
class Pictured:
    """A small picture of a raster, and where the heatmap's grid lies on it: (top, left, bottom, right)."""

    pixels: NDArray[np.uint8]
    grid_px: tuple[float, float, float, float]


def slide_picture(one: Scored, *, side: int = 900) -> Pictured:
    """The slide as it was given to the network, at most about `side` pixels."""
    with Raster.open(one.raster) as raster:
        pixels = raster.thumbnail(side)
        (top, left), (height, width) = raster.origin_l0, raster.shape_px
        (per_y, per_x) = raster.l0_per_px
    whole = (top, left, top + height * per_y, left + width * per_x)
    return Pictured(pixels, box_on_picture(one.heatmap.box_l0, whole, pixels.shape[:2]))


def write_png(pixels: NDArray[np.uint8], path: Path) -> None:
    """RGB pixels as a PNG, whole or not at all."""
    temporary = path.with_name(f".{path.stem}.tmp.png")
    PIL.Image.fromarray(pixels).save(temporary)
    temporary.replace(path)


@dataclass(frozen=True, slots=True)
class CohortPlan:
    """What training or validation takes for the largest slide."""

    purpose: str
    slide_id: str
    plan: Plan

    def facts(self) -> dict[str, object]:
        """Plain values."""
        return {"purpose": self.purpose, "slide_id": self.slide_id, **dataclasses.asdict(self.plan)}


def plan_cohort(prepared: Prepared, config: RunConfig) -> list[CohortPlan]:
    """Plan for the slide with most tissue, in training and in validation."""
    sizes = {}
    for slide_id, path in prepared.rasters.items():
        with Raster.open(path) as raster:
            sizes[slide_id] = raster.tissue_px
    if not sizes:
        raise CohortError(prepared.cohort.name, "has no slide that can be used", "see the reasons listed")
    largest = max(sizes, key=lambda slide_id: sizes[slide_id])
    model = LocalClassifier.from_config(config.model, classes=prepared.cohort.classes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = StreamedClassifier(
        model.to(device), config.stream, mixed=mixed_dtype(config.train.precision, device)
    )
    plans = []
    with Raster.open(prepared.rasters[largest]) as raster:
        for purpose, training in (("training", True), ("validation", False)):
            plan = network.plan_for(raster, training=training)
            if plan is None:
                raise ConfigError("stream.tile_cells", "is set, so there is nothing to plan", "leave it out")
            plans.append(CohortPlan(purpose, largest, plan))
    return plans


def write_rows(rows: Sequence[dict[str, str]], path: Path) -> None:
    """A CSV of equal rows, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["slide_id"])
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)


def write_left_out(left_out: Sequence[tuple[str, str]], path: Path) -> None:
    """Every slide that is not used, with its reason."""
    write_rows([{"slide_id": slide, "reason": reason} for slide, reason in left_out], path)


def write_facts(path: Path) -> None:
    """The command, when, and on what."""
    facts = {
        "command": shlex.join(["holoslide", *sys.argv[1:]]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
    }
    path.write_text(json.dumps(facts, indent=2), encoding="utf-8")


def environment() -> dict[str, str]:
    """Versions and hardware, as a report names them."""
    names = ("holoslide", "torch", "torchvision", "timm", "numpy", "openslide-python", "tifffile")
    facts = {name: metadata.version(name) for name in names}
    facts["python"] = platform.python_version()
    facts["processors"] = str(os.cpu_count())
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    return facts
