"""The whole way from a slide table to a trained model, as the command line walks it.

Each step finds what the one before left.

A run's folder holds: `config.yaml`, `cohort.csv`, `left_out.csv`, `data.csv` (each slide's hash and resolution),
`run.json` (command, versions, machine), `plan.json`, `best/` (the model), `last.ckpt`, `history.csv`,
`tensorboard/`, and, once evaluated, `predictions.csv`, `predictions_modules.csv`, `metrics.json`,
`validation.json`, `heatmaps/` and `report.html`: all of its test part, see `evaluated.py` for others.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from holoslide.config import RunConfig
from holoslide.errors import CheckpointError, CohortError, ConfigError
from holoslide.evaluation.options import Positive
from holoslide.files import write_json, write_rows, write_text
from holoslide.geometry import Box
from holoslide.models.calibration import calibrate, needs_statistics
from holoslide.models.classifier import LocalClassifier
from holoslide.models.options import InputConfig
from holoslide.models.precision import mixed_dtype
from holoslide.models.streamed import StreamedClassifier
from holoslide.prepared import Prepared, refuse_copies
from holoslide.records import begun, data_rows, run_facts, write_left_out
from holoslide.runs import DATA, FACTS, LEFT_OUT, repeats_of
from holoslide.slides.cohort import Cohort
from holoslide.slides.prepare import PrepareConfig
from holoslide.slides.raster import Raster
from holoslide.streaming.plan import Plan
from holoslide.training.averaging import Average
from holoslide.training.checkpoint import describe, refuse_other_run
from holoslide.training.loop import LAST, FitResult, Progress, Sample, fit
from holoslide.training.parallel import processes
from holoslide.training.planning import plan_part
from holoslide.training.samples import NO_SLIDE, OpenPixels


def refuse_other_preparation(out: Path, config: PrepareConfig) -> None:
    """Raise `CheckpointError` where a run that is there, or one of several, had its slides prepared otherwise.

    This is for before they are prepared: refused after that, the run would have lost its rasters to others.
    """
    for folder in [out, *repeats_of(out)]:
        # A checkpoint may have been deleted, to save room.
        is_begun = (folder / LAST).exists() or (folder / "report.html").exists()
        if is_begun and (folder / "config.yaml").exists():
            then = RunConfig.load(folder / "config.yaml").prepare
            refuse_other_run(folder, describe({"prepare": then}), describe({"prepare": config}))


def refuse_unfit(
    cohort: Cohort, config: RunConfig, out: Path, *, model: LocalClassifier | None = None
) -> None:
    """Raise, before slides are prepared, what `train` and its successors would raise hours later.

    `ConfigError` or `ModelError` for a network that is not to be had or cut so, a device that is not there, a class
    that is none, and a `stream.folder` that may not be needed before a large slide comes; `CheckpointError` as
    `refuse_other_preparation`.
    """
    refuse_other_preparation(out, config.prepare)
    folder = config.stream.folder
    if folder is not None and not (Path(folder).is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        what = f"{folder} is no folder that can be written into"
        raise ConfigError("stream.folder", what, "make it, or name another")
    Positive.of(cohort.classes, config.evaluate.positive)
    processes(config.train)
    if model is None:
        LocalClassifier.from_config(config.model, classes=cohort.classes, generator=torch.Generator())


def refuse_lost_test(cohort: Cohort, prepared: Prepared) -> None:
    """Raise `CohortError` where a cohort has a test part of which no slide can be used: not only after training."""
    if cohort.test and not prepared.cohort.test:
        raise CohortError("test", "holds no slide that can be used", NO_SLIDE)


def train(
    prepared: Prepared, config: RunConfig, out: Path, *, model: LocalClassifier | None = None,
    splits: str = "", resume: bool = False, progress: Progress | None = None,
) -> FitResult:  # fmt: skip
    """Train on the train part, choose on the valid part; the test part is not looked at.

    `model` is trained in place (default: built from the configuration); heads of norm "cohort" are measured on the
    training slides if they never were. `splits` says how the parts came about, for the report.
    """
    cohort = prepared.cohort
    if several := repeats_of(out):
        raise CheckpointError(out, f"holds {several[0].name}", "train into another folder")
    Positive.of(cohort.classes, config.evaluate.positive)  # refused now, not after the training
    refuse_copies(prepared)
    parts = {
        "train": samples(cohort.train, prepared),
        "valid": samples(cohort.valid, prepared),
    }
    rasters = [sample.raster for sample in parts["train"]]
    inputs, fresh = normalisation(rasters, config), model is None
    if model is None:
        generator = torch.Generator().manual_seed(config.train.seed)
        model = LocalClassifier.from_config(
            config.model, classes=cohort.classes, inputs=inputs, generator=generator
        )
    if model.classes != cohort.classes:
        there, here = ", ".join(model.classes), ", ".join(cohort.classes)
        raise ConfigError("model", f"has the classes {there}, the table {here}", "make it with the table's")
    model.set_input(inputs)
    if needs_statistics(model, fresh=fresh):
        calibrate(model, _windows(model, rasters, seed=config.train.seed), fresh=fresh)
    facts = run_facts(prepared) | {"splits": splits, "given_model": not fresh}
    facts |= begun(out / FACTS) if resume else {}
    result = fit(
        model,
        parts["train"],
        parts["valid"],
        config=config.train,
        stream=config.stream,
        augment=config.augment,
        out=out,
        resume=resume,
        progress=progress,
        open_pixels=_unchanged(prepared),
        on_start=partial(_write_records, prepared, config, facts, out),
    )
    if result.rank == 0:
        write_json({**facts, "best_epoch": result.best_epoch}, out / FACTS)
    return result


def _write_records(prepared: Prepared, config: RunConfig, facts: dict[str, object], out: Path) -> None:
    """What a run is, before it trains."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(config.to_yaml(), out / "config.yaml")
    prepared.cohort.to_csv(out / "cohort.csv")
    write_left_out(prepared.left_out, out / LEFT_OUT)
    write_rows(data_rows(prepared), out / DATA)
    write_json(facts, out / FACTS)


def _unchanged(prepared: Prepared) -> OpenPixels:
    """Opens rasters that are as they were prepared: another command may prepare them anew meanwhile."""
    made = {path: prepared.recipes[slide_id] for slide_id, path in prepared.rasters.items()}

    @contextmanager
    def opened(path: Path) -> Iterator[Raster]:
        with Raster.open(path) as raster:
            if raster.record.recipe != made[path]:
                message = "it was prepared anew with other settings; give each setting its own --rasters"
                raise ValueError(message)
            yield raster

    return opened


def _windows(model: LocalClassifier, rasters: Sequence[Path], *, seed: int) -> torch.Tensor:
    """Windows around random places of tissue of the training slides, normalised, (B, 3, H, W)."""
    rng = np.random.default_rng(seed)
    side, windows = 256, []
    mean, std = model.mean.cpu(), model.std.cpu()
    for path in [rasters[int(i)] for i in rng.integers(len(rasters), size=24)]:
        with Raster.open(path) as raster:
            cells = np.argwhere(raster.mask)
            y, x = cells[rng.integers(len(cells))] * raster.mask_cell_px - side // 2
            pixels = torch.from_numpy(raster.read(Box.at(int(y), int(x), side, side)))
            windows.append(((pixels / 255 - mean) / std).permute(2, 0, 1))
    return torch.stack(windows).to(model.mean.device)


def samples(part: Cohort, prepared: Prepared) -> list[Sample]:
    """The slides of a part as training takes them."""
    return [
        Sample(
            row.slide_id,
            row.patient_id,
            part.classes.index(row.label),
            prepared.rasters[row.slide_id],
            prepared.recipes[row.slide_id].digest,
        )
        for row in part
        if row.label is not None
    ]


def normalisation(rasters: Sequence[Path], config: RunConfig) -> InputConfig:
    """How pixels are scaled: as the weights are used to, or (`model.backbone.scale`) by mean and deviation
    of all tissue pixels of the training rasters; background has no part in it.
    """
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
        raise CohortError("train", "holds no slide that can be used", NO_SLIDE)
    if not config.model.backbone.by_cohort:  # learned on ImageNet: its scale is InputConfig's own
        return InputConfig(mpp=config.prepare.mpp, glass=glass)
    mean = first / total
    std = np.sqrt(np.maximum(second / total - mean**2, 1e-6))
    return InputConfig(
        mpp=config.prepare.mpp,
        mean=(float(mean[0]), float(mean[1]), float(mean[2])),
        std=(float(std[0]), float(std[1]), float(std[2])),
        glass=glass,
    )


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
    average_bytes = Average(model, config.train.average).size_bytes
    plans = []
    with Raster.open(prepared.rasters[largest]) as raster:
        for purpose, training in (("training", True), ("validation", False)):
            plan = plan_part(network, raster, training=training, held_bytes=average_bytes)
            if plan is None:
                raise ConfigError("stream.tile_cells", "is set, so there is nothing to plan", "leave it out")
            plans.append(CohortPlan(purpose, largest, plan))
    return plans
