"""What a run's folder tells its report: cohort, history, plan against measured, hashes of the data, commands."""

from __future__ import annotations

import csv
import dataclasses
import math
import shlex
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from holoslide.evaluated import Evaluated
from holoslide.evaluation.outcome import Outcome
from holoslide.evaluation.overlay import BoxPx, box_on_picture
from holoslide.evaluation.report_data import (
    CohortFlow,
    CohortPart,
    EpochRecord,
    PredictionRow,
    Resource,
    RunReport,
    SlideFile,
    SlidePicture,
    choose_slides,
)
from holoslide.evaluation.scales import evidence_for
from holoslide.inference.heatmap import Heatmap
from holoslide.models.classifier import read_card
from holoslide.records import command_given, environment
from holoslide.runs import DATA, FACTS, LEFT_OUT, PLAN, read_json
from holoslide.slides.cohort import SPLITS, Cohort
from holoslide.slides.raster import Raster


@dataclass(frozen=True, slots=True)
class Run:
    """A run's folder, as it was left: missing files are missing facts, never errors."""

    folder: Path

    @property
    def facts(self) -> dict[str, Any]:
        """`run.json`."""
        return read_json(self.folder / FACTS)

    @property
    def config_yaml(self) -> str:
        """The whole configuration."""
        path = self.folder / "config.yaml"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    @property
    def history(self) -> list[EpochRecord]:
        """An entry for each epoch."""
        rows = _rows(self.folder / "history.csv")
        return [
            EpochRecord.from_row({key: float(v) if v else math.nan for key, v in row.items()}) for row in rows
        ]

    @property
    def best_epoch(self) -> int | None:
        """The epoch that was chosen, counted from 1."""
        best = self.facts.get("best_epoch")
        return int(best) if best is not None else None

    @property
    def barrier_every(self) -> int:
        """A gradient barrier follows every so many modules of its model; 1 where that is not known."""
        best = self.folder / "best"
        return int(read_card(best)["model"]["barrier_every"]) if best.is_dir() else 1

    @property
    def metrics(self) -> dict[str, Any]:
        """`metrics.json`."""
        return read_json(self.folder / "metrics.json")

    @property
    def left_out(self) -> dict[str, str]:
        """The slides that training left out, with the reason."""
        return {row["slide_id"]: row["reason"] for row in _rows(self.folder / LEFT_OUT)}

    @property
    def files(self) -> list[SlideFile]:
        """What the slides were that it was trained on."""
        return files_of(self.folder)


def files_of(folder: Path) -> list[SlideFile]:
    """What the slides were that a folder's `data.csv` names."""
    return [
        SlideFile(
            row["slide_id"],
            row["slide_sha256"],
            float(row["slide_mpp"]),
            row["slide_mpp_source"],
            int(row["tissue_px"]),
            row["split"],
        )
        for row in _rows(folder / DATA)
    ]


def report_of(
    evaluated: Evaluated, outcome: Outcome, *, predictions: Sequence[PredictionRow],
    pictures: Sequence[SlidePicture], timing: Mapping[str, float], calibrated: bool = False,
) -> RunReport:  # fmt: skip
    """The report of one run on one part of its cohort, or on another cohort."""
    found = Run(evaluated.run)
    facts, history = found.facts, found.history
    trained = {"training": sum(record.seconds or 0.0 for record in history)} if history else {}
    report = RunReport(
        title=f"{evaluated.run.resolve().name}: {' against '.join(outcome.metrics.classes)}",
        command=facts.get("command", ""),
        created=datetime.now(UTC),
        classes=outcome.metrics.classes,
        config_yaml=found.config_yaml,
        environment=facts.get("environment") or environment(),
        history=history,
        best_epoch=found.best_epoch,
        part=evaluated.split,
        metrics=outcome.metrics,
        patient_metrics=outcome.patients,
        module_metrics=outcome.modules,
        calibration=outcome.calibration,
        decision=outcome.decision,
        lacking=outcome.lacking,
        undecided=outcome.undecided,
        positive=outcome.positive,
        predictions=predictions,
        pictures=pictures,
        timing=facts.get("seconds", {}) | trained | dict(timing),
        resources=resources_of(found),
        directory=facts.get("directory", ""),
        again="" if facts.get("given_model") else command_again(evaluated.run),
        given_model=bool(facts.get("given_model")),
        calibrated=calibrated,
        barrier_every=found.barrier_every,
    )
    return dataclasses.replace(report, **_command(facts), **_data(evaluated, found))


def _command(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The command that makes the report, where it is not the one that trained."""
    given = command_given()
    return {} if given == facts.get("command") else {"evaluation": given, "evaluated_in": str(Path.cwd())}


def _data(evaluated: Evaluated, trained: Run) -> dict[str, Any]:
    """What the report is of: the cohort that the run was trained on, or another by itself."""
    cohort, left_out = evaluated.prepared.cohort, evaluated.prepared.left_out
    if evaluated.table is None:
        gone = sorted((trained.left_out | dict(left_out)).items())
        return {
            "cohort": parts_of(cohort),
            "flow": flow_of(cohort, gone),
            "left_out": gone,
            "files": trained.files,
            "splits": trained.facts.get("splits", ""),
        }
    files, learnt = files_of(evaluated.out), {one.sha256 for one in trained.files if one.split != "test"}
    rows = [(row.patient_id, row.label) for row in evaluated.part.cohort]
    return {
        "table": evaluated.table,
        "cohort": [CohortPart.count(evaluated.split, rows)],
        "flow": flow_of(cohort, left_out, used={row.slide_id for row in evaluated.rows}),
        "left_out": sorted(left_out),
        "files": files,
        "learnt_from": sum(one.sha256 in learnt for one in files),
        "environment": environment(),
    }


def command_again(run: Path, *arguments: str, rasters: str | None = None) -> str:
    """The command that trains the same run anew, from what the run's folder holds.

    `rasters` is the folder of the prepared slides, where the run's facts do not name it.
    """
    if not (run / "cohort.csv").exists():
        return ""
    rasters = rasters or Run(run).facts.get("rasters")
    where = ["--rasters", rasters] if rasters else []
    made = [
        "holoslide",
        "train",
        str(run.resolve() / "cohort.csv"),
        "--config",
        str(run.resolve() / "config.yaml"),
    ]
    return shlex.join([*made, *where, *arguments, "--out", "again"])


# --- The cohort -------------------------------------------------------------------------------------------------


def parts_of(cohort: Cohort) -> list[CohortPart]:
    """Slides and patients of each part that has any."""
    return [
        CohortPart.count(name, [(row.patient_id, row.label) for row in cohort if row.split == name])
        for name in SPLITS
        if any(row.split == name for row in cohort)
    ]


def flow_of(
    cohort: Cohort, left_out: Sequence[tuple[str, str]], *, used: Container[str] | None = None
) -> CohortFlow:
    """How the slides that were found became those in use: the ids in `used`, or all that are in a part."""
    gone = {slide_id: reason for slide_id, reason in left_out if slide_id}
    taken, reasons = [], Counter[str]()
    for slide_id, reason in gone.items():
        reasons[reason.removeprefix(f"{slide_id}: ").partition(";")[0]] += 1
    for row in cohort:
        if row.slide_id in gone:
            continue
        if row.slide_id in used if used is not None else row.split is not None:
            taken.append(row)
        else:
            reasons["in another part" if row.split else "in no part"] += 1
    everyone = {row.slide_id for row in cohort} | set(gone)
    patients = len({row.patient_id for row in taken})
    return CohortFlow(len(everyone), len(taken), patients, dict(sorted(reasons.items(), key=_commonest)))


def _commonest(reason: tuple[str, int]) -> tuple[int, str]:
    return -reason[1], reason[0]


# --- Slides to look at ------------------------------------------------------------------------------------------


def pictures_of(
    predictions: Sequence[PredictionRow], rasters: Mapping[str, Path], folders: Sequence[Path]
) -> list[SlidePicture]:
    """Pictures of the slides worth looking at, in the groups' order.

    A slide's heatmap is that of the first of the `folders` that has one.
    """
    by_id = {one.slide_id: one for one in predictions}
    shown = []
    for slide_id, group in choose_slides(predictions).items():
        one = by_id[slide_id]
        paths = (folder / f"{slide_id}.npz" for folder in folders)
        heatmap = Heatmap.load(next(path for path in paths if path.exists()))
        with Raster.open(rasters[slide_id]) as raster:
            pixels, box_px = raster_picture(raster, heatmap)
            um_per_px = raster.mpp * raster.shape_px[1] / pixels.shape[1]  # a bar lies along the width
        target = heatmap.classes.index(one.prediction)
        constant = float(evidence_for(heatmap.bias_L, target))
        shown.append(
            SlidePicture(
                slide_id,
                one.label,
                one.prediction,
                one.probabilities,
                pixels,
                heatmap.attention_HW,
                evidence_for(heatmap.evidence_LHW, target),
                box_px,
                evidence_class=one.prediction,
                group=group,
                um_per_px=um_per_px,
                constant=constant,
            )
        )
    return shown


def raster_picture(raster: Raster, heatmap: Heatmap, *, side: int = 900) -> tuple[Any, BoxPx]:
    """A raster at most about `side` pixels large, (H, W, 3), and where the heatmap's grid lies on it."""
    pixels = raster.thumbnail(side)
    (top, left), (height, width), (per_y, per_x) = raster.origin_l0, raster.shape_px, raster.l0_per_px
    whole = (top, left, top + height * per_y, left + width * per_x)
    return pixels, box_on_picture(heatmap.box_l0, whole, pixels.shape[:2])


# --- Plan against measured --------------------------------------------------------------------------------------


def resources_of(run: Run) -> list[Resource]:
    """What was planned and what was measured; what is not known of a run is left out."""
    history, plan, facts = run.history, read_json(run.folder / PLAN), run.facts
    if not history:
        return []
    peak_rss = max(record.peak_rss_bytes for record in history)
    on_device = max(record.peak_device_bytes for record in history)
    before = int(facts.get("rss_before_bytes", 0))
    planned = max((part["peak_bytes"] for part in _plans(plan).values()), default=None)
    rows = []
    if on_device:
        rows.append(Resource("Memory of the device", "bytes", planned, on_device))
    elif before:
        rows.append(
            Resource("Memory for slides, beside the process's own", "bytes", planned, peak_rss - before)
        )
    rows.append(Resource("Memory of the whole process", "bytes", None, peak_rss))
    seconds = [record.seconds for record in history if record.seconds]
    rows.append(
        Resource(
            "One epoch with its validation",
            "seconds",
            _epoch_seconds(run, plan),
            sum(seconds) / max(1, len(seconds)),
        )
    )
    return rows


def resources_of_all(runs: Sequence[Run]) -> list[Resource]:
    """The same of several runs: the most memory that any took, and the mean time of an epoch."""
    found: dict[str, list[Resource]] = {}
    for run in runs:
        for one in resources_of(run):
            found.setdefault(one.name, []).append(one)
    rows = []
    for name, each in found.items():
        planned = [one.planned for one in each if one.planned is not None]
        measured = [one.measured for one in each]
        if each[0].unit == "bytes":
            rows.append(
                Resource(f"{name}, of any run at most", "bytes", max(planned, default=None), max(measured))
            )
        else:
            expected = sum(planned) / len(planned) if planned else None
            rows.append(
                Resource(f"{name}, mean of the runs", "seconds", expected, sum(measured) / len(measured))
            )
    return rows


def _plans(plan: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {part: plan[part] for part in ("train", "valid") if plan.get(part)}


def _epoch_seconds(run: Run, plan: Mapping[str, Any]) -> float | None:
    """The plan is for the largest slide; the others take as much less as they have less tissue."""
    total = 0.0
    plans = _plans(plan)
    for part in ("train", "valid"):
        sizes = [one.tissue_px for one in run.files if one.split == part]
        if not sizes or part not in plans:
            return None
        total += float(plans[part]["seconds"]) * sum(sizes) / max(sizes)
    return total


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
