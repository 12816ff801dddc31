"""The whole way from a slide table to a trained model, as the command line walks it.

Each step finds what the one before left.

A run's folder holds: `config.yaml`, `cohort.csv`, `left_out.csv`, `data.csv` (each slide's hash and resolution),
`run.json` (command, versions, machine), `plan.json`, `best/` (the model), `last.ckpt`, `history.csv`,
`tensorboard/`, and, once evaluated, `predictions.csv`, `predictions_modules.csv`, `metrics.json`,
`validation.json`, `heatmaps/` and `report.html`: all of its test part, see `evaluated.py` for others.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from holoslide.config import RunConfig
from holoslide.errors import CheckpointError, CohortError, ConfigError
from holoslide.evaluation.options import Positive
from holoslide.files import write_atomically
from holoslide.geometry import Box
from holoslide.models.calibration import calibrate, needs_statistics
from holoslide.models.classifier import InputConfig, LocalClassifier
from holoslide.models.streamed import StreamedClassifier
from holoslide.runs import DATA, FACTS, LEFT_OUT, read_json, repeats_of
from holoslide.slides.cluster import prepare_on_cluster
from holoslide.slides.cohort import Cohort, SlideRow
from holoslide.slides.facts import Mpp
from holoslide.slides.prepare import STALL_S, PrepareConfig, PrepareJob, PrepareResult, prepare
from holoslide.slides.raster import Raster
from holoslide.streaming.plan import Plan
from holoslide.training.averaging import Average
from holoslide.training.history import resident_bytes
from holoslide.training.loop import FitResult, Progress, Sample, fit
from holoslide.training.parallel import mixed_dtype
from holoslide.training.planning import plan_part
from holoslide.training.samples import OpenPixels

TABLES = {".csv", ".tsv", ".txt"}
Advance = Callable[[int, int, str], None]  # (done, total, what was done last)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Prepared:
    """The slides of a cohort that can be used, with their rasters, and those that cannot, with the reason."""

    cohort: Cohort
    rasters: dict[str, Path]
    left_out: list[tuple[str, str]]
    results: list[PrepareResult]

    def outcomes(self) -> list[dict[str, str | None]]:
        """What became of every slide, ready for JSON; those that had no file to prepare are failed, too."""
        tried = {r.slide_id for r in self.results}
        found: list[dict[str, str | None]] = [
            {
                "slide_id": r.slide_id,
                "status": r.status,
                "raster": None if r.path is None else str(r.path),
                "reason": r.reason,
            }
            for r in self.results
        ]
        return found + [
            {"slide_id": slide_id, "status": "failed", "raster": None, "reason": reason}
            for slide_id, reason in self.left_out
            if slide_id not in tried
        ]


def default_rasters(table: Path) -> Path:
    """Where the prepared slides of a table go unless told otherwise."""
    return table.parent / "rasters"


def prepare_cohort(
    cohort: Cohort, rasters: Path, config: PrepareConfig, *, labels: bool = False, workers: int = 0,
    stall_s: float = STALL_S, cluster: str | None = None, progress: Advance | None = None,
) -> Prepared:  # fmt: skip
    """Prepare what is not prepared; a slide that fails is left out with its reason, the rest go on.

    With `labels`, slides without one are left out, too. `cluster` is the address of a Dask scheduler, whose
    workers prepare in place of `workers` processes here.
    """
    usable, findings = cohort.usable(labels=labels)
    jobs = [
        PrepareJob(row.slide_id, row.path, row.mpp, row.mask, row.fallback_mpp)
        for row in usable
        if row.path is not None
    ]
    if cluster is not None:
        results = prepare_on_cluster(jobs, rasters, config, cluster, stall_s=stall_s, progress=progress)
    else:
        count = workers or os.cpu_count() or 1
        results = prepare(jobs, rasters, config, workers=count, stall_s=stall_s, progress=progress)
    left_out = [(finding.where, f"{finding.what}; {finding.remedy}") for finding in findings]
    left_out += [(r.slide_id, r.reason or "failed") for r in results if r.status == "failed"]
    paths = {r.slide_id: r.path for r in results if r.path is not None and r.status != "failed"}
    used = {r.slide_id: r.mpp for r in results}
    rows = tuple(_with_mpp(row, used[row.slide_id]) for row in usable if row.slide_id in paths)
    kept = dataclasses.replace(usable, rows=rows)
    return Prepared(kept, paths, left_out, results)


def _with_mpp(row: SlideRow, used: Mpp | None) -> SlideRow:
    """The row with the user's microns per pixel, if they were needed, so that a run's own table has them."""
    if row.mpp is not None or used is None or used.source != "user":
        return row
    return dataclasses.replace(row, mpp=used.y)


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
    parts = {
        "train": samples(cohort.train, prepared.rasters),
        "valid": samples(cohort.valid, prepared.rasters),
    }
    rasters = [sample.raster for sample in parts["train"]]
    inputs, fresh = normalisation(rasters, config), model is None
    if model is None:
        generator = torch.Generator().manual_seed(config.train.seed)
        model = LocalClassifier.from_config(
            config.model, classes=cohort.classes, inputs=inputs, generator=generator
        )
    model.set_input(inputs)
    if needs_statistics(model, fresh=fresh):
        calibrate(model, _windows(model, rasters, seed=config.train.seed), fresh=fresh)
    facts = run_facts(prepared) | {"splits": splits, "given_model": not fresh}
    facts |= _begun(out / FACTS) if resume else {}
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
        open_pixels=_unchanged({s.raster: s.made for part in parts.values() for s in part}),
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


def _unchanged(made: dict[Path, str]) -> OpenPixels:
    """Opens rasters that are as they were when training began: another command may prepare them anew meanwhile."""

    @contextmanager
    def opened(path: Path) -> Iterator[Raster]:
        with Raster.open(path) as raster:
            if raster.record.recipe.digest != made[path]:
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


def cohort_of(sources: Sequence[Path], *, slides: Path | None = None, mpp: float | None = None) -> Cohort:
    """A slide table, or slide files taken as a cohort without labels; `mpp` is theirs, where they do not say.

    A patient may be in two splits: what is done slide by slide asks for none.
    """
    if len(sources) == 1 and sources[0].suffix.lower() in TABLES:
        cohort = Cohort.from_csv(sources[0], slides=slides, require_splits=False)
    else:
        cohort = Cohort.from_files(sources)
    return cohort if mpp is None else cohort.with_mpp(mpp)


def samples(cohort: Cohort, rasters: dict[str, Path]) -> list[Sample]:
    """The slides of a part as training takes them."""
    return [
        Sample(row.slide_id, row.patient_id, cohort.classes.index(row.label), path, _made(path))
        for row in cohort
        if row.label is not None
        for path in [rasters[row.slide_id]]
    ]


def _made(path: Path) -> str:
    with Raster.open(path) as raster:
        return raster.record.recipe.digest


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
        raise CohortError("train", "holds no slide", "give the table a split, or let one be drawn")
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


def write_rows(rows: Sequence[dict[str, str]], path: Path) -> None:
    """A CSV of equal rows, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["slide_id"])
    writer.writeheader()
    writer.writerows(rows)
    write_text(text.getvalue(), path)


def write_left_out(left_out: Sequence[tuple[str, str]], path: Path) -> None:
    """Every slide that is not used, with its reason."""
    write_rows([{"slide_id": slide, "reason": reason} for slide, reason in left_out], path)


def data_rows(prepared: Prepared) -> list[dict[str, str]]:
    """What each slide is that is used: its part, the hash of its file, its resolution, its tissue."""
    rows = []
    for row in prepared.cohort:
        with Raster.open(prepared.rasters[row.slide_id]) as raster:
            recipe = raster.record.recipe
            rows.append(
                {
                    "slide_id": row.slide_id,
                    "split": row.split or "",
                    "slide_sha256": recipe.slide_sha256,
                    "slide_mpp": repr(recipe.slide_mpp[0]),
                    "slide_mpp_source": recipe.slide_mpp_source,
                    "tissue_px": str(raster.tissue_px),
                }
            )
    return rows


def run_facts(prepared: Prepared) -> dict[str, object]:
    """The command, where and when it was given, on what machine, and what had been used before training."""
    made = sum(result.seconds for result in prepared.results if result.status == "made")
    rasters = next(iter(prepared.rasters.values())).parent
    return {
        "command": command_given(),
        "directory": str(Path.cwd()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "rss_before_bytes": resident_bytes(),
        "seconds": {"preparing": round(made, 1)} if made else {},
        "rasters": str(rasters.resolve()),
    }


def command_given() -> str:
    """What was typed: the command, or the script that calls the library."""
    program = Path(sys.argv[0])
    if program.stem in {"holoslide", "cli"} or program.parts[-2:] == ("holoslide", "__main__.py"):
        return shlex.join(["holoslide", *sys.argv[1:]])
    return shlex.join(["python", *sys.argv])


def _begun(path: Path) -> dict[str, object]:
    """Of a run that is resumed, the facts that stay those of its beginning."""
    if not path.exists():
        return {}
    before = read_json(path)
    kept = ("command", "directory", "started", "seconds")
    return {key: before[key] for key in kept if key in before} | {
        "resumed": [*before.get("resumed", []), datetime.now(UTC).isoformat(timespec="seconds")]
    }


def write_text(text: str, path: Path) -> None:
    """A text, whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(values: object, path: Path) -> None:
    """Plain values as JSON, whole or not at all."""
    write_text(json.dumps(values, indent=2), path)


def environment() -> dict[str, str]:
    """Versions and hardware, as a report names them."""
    names = (
        "holoslide", "torch", "torchvision", "timm", "lightning-fabric", "numpy", "scipy", "scikit-learn",
        "opencv-python-headless", "openslide-python", "openslide-bin", "tifffile", "imagecodecs",
    )  # fmt: skip
    facts = {}
    for name in names:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a machine that only trains may do without some
            facts[name] = "not installed"
    if (commit := _commit()) is not None:
        facts["holoslide commit"] = commit
    facts["python"] = platform.python_version()
    facts["system"] = platform.platform(terse=True)
    facts["processors"] = f"{os.cpu_count()} × {_processor()} ({platform.machine()})"
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    return facts


def _commit() -> str | None:
    """The commit that a source checkout stands at, and whether files differ from it; None of a plain install."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not (root / "pyproject.toml").exists():
        return None  # else a repository of the user's, around the environment, would pass for ours
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return None
    return found.stdout.strip().replace("-dirty", ", with changes") or None


def _processor() -> str:
    """The processor's model, as the system names it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        names = [
            line.partition(":")[2] for line in path.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0].strip()
    return platform.processor() or "processor"
