"""What comes of a trained model: predictions, heatmaps, metrics and the report.

A run's folder then also holds: `predictions.csv` and `predictions_modules.csv` (every module's classifier),
`metrics.json`, `heatmaps/` and `report.html`.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from holoslide.config import RunConfig
from holoslide.errors import CheckpointError, CohortError, SlideError
from holoslide.evaluation.metrics import Interval, Metrics, compute_metrics
from holoslide.evaluation.metrics import by_patient as metrics_by_patient
from holoslide.evaluation.overlay import (
    Placement,
    attention_scale,
    box_on_picture,
    evidence_for,
    evidence_scale,
    overlay,
    relative_attention,
)
from holoslide.evaluation.report import write_report
from holoslide.evaluation.report_data import (
    CohortPart,
    EpochRecord,
    Prediction,
    RunReport,
    SlidePicture,
    choose_slides,
)
from holoslide.inference.heatmap import Heatmap, heatmap_paths, make_heatmap
from holoslide.inference.predict import SlideScores, score_slide
from holoslide.inference.show import prediction_html
from holoslide.models.classifier import LocalClassifier
from holoslide.models.hub import model_folder
from holoslide.models.streamed import StreamedClassifier
from holoslide.pipeline import Advance, Prepared, environment, write_json, write_rows
from holoslide.runs import FACTS, LEFT_OUT
from holoslide.slides.cluster import on_cluster
from holoslide.slides.cohort import SPLITS, Cohort, SlideRow
from holoslide.slides.facts import one_line
from holoslide.slides.prepare import PrepareConfig
from holoslide.slides.raster import Raster
from holoslide.training.parallel import mixed_dtype


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model says about one slide of a cohort, and the heatmap of each of its heads, the last the model's."""

    row: SlideRow
    raster: Path
    scores: SlideScores
    heatmaps: tuple[Heatmap, ...]

    @property
    def heatmap(self) -> Heatmap:
        """The model's own: the last head's."""
        return self.heatmaps[-1]

    @property
    def prediction(self) -> str:
        """The class that the last head finds most probable."""
        return self.heatmap.classes[int(self.scores.probabilities[-1].argmax())]

    @property
    def probabilities(self) -> dict[str, float]:
        """The model's, by class."""
        return dict(zip(self.heatmap.classes, map(float, self.scores.probabilities[-1]), strict=True))

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return prediction_html(
            self.row.slide_id, self.prediction, list(self.probabilities.items()), self.heatmap
        )


class Predictor:
    """A trained model, ready to score rasters; `source` is a run, a saved model, or a hub's `hub:owner/name`."""

    def __init__(self, source: str | Path, config: RunConfig | None = None) -> None:
        folder = model_folder(source)
        best = folder / "best" if (folder / "best").is_dir() else folder
        if not best.is_dir():
            raise CheckpointError(folder, "is not a run or a model", "give the folder that train wrote")
        self.folder = folder
        self.model = LocalClassifier.load(best)
        self.config = config or (
            RunConfig.load(folder / "config.yaml") if (folder / "config.yaml").exists() else RunConfig()
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(device)
        mixed = mixed_dtype(self.config.train.precision, device)
        self.network = StreamedClassifier(self.model, self.config.stream, mixed=mixed)

    def score(self, row: SlideRow, raster_path: Path) -> Scored:
        """Run one slide; the heatmaps come from the same pass as the prediction."""
        heads = range(len(self.network.heads))
        with Raster.open(raster_path) as raster:
            if self.model.mpp is not None and not math.isclose(raster.mpp, self.model.mpp, rel_tol=1e-6):
                raise SlideError(
                    raster_path,
                    f"is at {raster.mpp} um/px and the model at {self.model.mpp}",
                    f"prepare it with --mpp {self.model.mpp}",
                )
            self.network.follow(self.network.plan_for(raster, training=False))
            scores = score_slide(self.network, raster, explain=heads)
            maps = tuple(make_heatmap(scores.cells[k], raster, self.model.classes) for k in heads)
        return Scored(row, raster_path, scores, maps)

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
    cluster: str | None = None, progress: Advance | None = None,
) -> int:  # fmt: skip
    """Score slides into a table, and draw their heatmaps; a slide that fails is added to those left out.

    `cluster` is the address of a Dask scheduler, whose workers score: they need the same files, and the model's.
    """
    rows = list(prepared.cohort)
    table: dict[int, dict[str, str]] = {}
    heatmaps = None if heatmaps is None else heatmaps.absolute()
    work = [
        (predictor.folder.absolute(), row, prepared.rasters[row.slide_id].absolute(), heatmaps)
        for row in rows
    ]
    found: Iterator[tuple[int, Any]]
    if cluster is None:
        found = ((index, _predicted(predictor, *each[1:])) for index, each in enumerate(work))
    else:
        found = on_cluster(cluster, predict_one, work)
    for done, (index, outcome) in enumerate(found, start=1):
        if isinstance(outcome, dict):
            table[index] = outcome
        else:
            prepared.left_out.append((rows[index].slide_id, one_line(outcome)))
        if progress is not None:
            progress(done, len(rows), rows[index].slide_id)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_rows([table[index] for index in sorted(table)], out)
    return len(table)


def _predicted(
    predictor: Predictor, row: SlideRow, raster: Path, heatmaps: Path | None
) -> dict[str, str] | SlideError:
    """A slide's row of the table of predictions, or what is wrong with the slide."""
    try:
        one = predictor.score(row, raster)
        if heatmaps is not None:
            draw_heatmap(one, heatmaps)
    except SlideError as error:
        return error
    (values,) = prediction_table([one], predictor.model.classes)
    return values


_one_at_a_time = threading.Lock()  # a cluster's worker may have several threads, and has one model for all


@functools.lru_cache(maxsize=1)
def _predictor(folder: Path) -> Predictor:
    return Predictor(folder)


def predict_one(
    folder: Path, row: SlideRow, raster: Path, heatmaps: Path | None
) -> dict[str, str] | SlideError:
    """Score one slide on a cluster's worker, which keeps the model for the next."""
    with _one_at_a_time:
        return _predicted(_predictor(folder), row, raster, heatmaps)


def draw_heatmap(one: Scored, folder: Path) -> None:
    """Write a slide's raw scores, and its attention and the predicted class's evidence over the slide."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, one_map in zip(
        heatmap_paths(folder, one.row.slide_id, len(one.heatmaps)), one.heatmaps, strict=True
    ):
        one_map.save(path)
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
class Evaluation:
    """How good a model is on a part of a cohort; `modules` has the metrics of every head, the last the model's."""

    metrics: Metrics
    patients: Metrics | None
    modules: tuple[Metrics, ...]
    report: Path

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return {
            "slides": self.metrics.to_dict(),
            "patients": self.patients.to_dict() if self.patients else None,
            "modules": [m.to_dict() for m in self.modules],
        }

    def rows(self) -> list[list[str]]:
        """Name, value and interval of each measure."""
        shown = ("auroc", "auprc", "accuracy", "balanced_accuracy", "macro_f1", "log_loss")
        rows = [[name.replace("_", " "), *_shown(getattr(self.metrics, name))] for name in shown]
        return rows + [
            [f"auroc of module {k}", *_shown(m.auroc)] for k, m in enumerate(self.modules, start=1)
        ]


def evaluate_run(
    run: Path,
    prepared: Prepared,
    *,
    split: str = "test",
    out: Path | None = None,
    progress: Advance | None = None,
) -> Evaluation:
    """Score a part of a cohort once; write predictions, metrics, heatmaps and the report into `out`.

    `split` "all" takes every labelled slide. A slide that fails is added to those left out.
    """
    out = out or run
    cohort = prepared.cohort
    rows = [row for row in cohort if row.label is not None and split in (row.split, "all")]
    if not rows:
        raise CohortError(cohort.name, f"has no labelled slide in {split}", "choose another split, or all")
    predictor = Predictor(run)
    scored = _score_all(predictor, prepared, rows, out / "heatmaps", progress)
    if not scored:
        raise CohortError(cohort.name, f"no slide of {split} could be scored", "see the reasons listed")
    classes = predictor.model.classes
    evaluation = _evaluate(scored, classes, out / "report.html")
    out.mkdir(parents=True, exist_ok=True)
    write_rows(prediction_table(scored, classes), out / "predictions.csv")
    by_module = [
        {"module": str(k + 1), **row}
        for k in range(len(predictor.network.heads))
        for row in prediction_table(scored, classes, head=k)
    ]
    write_rows(by_module, out / "predictions_modules.csv")
    write_json(evaluation.to_dict(), out / "metrics.json")
    write_report(_report(run, prepared, scored, evaluation, split), out / "report.html")
    return evaluation


def _score_all(
    predictor: Predictor,
    prepared: Prepared,
    rows: Sequence[SlideRow],
    heatmaps: Path,
    progress: Advance | None,
) -> list[Scored]:
    scored = []
    for done, row in enumerate(rows, start=1):
        try:
            one = predictor.score(row, prepared.rasters[row.slide_id])
            draw_heatmap(one, heatmaps)
            scored.append(one)
        except SlideError as error:
            prepared.left_out.append((row.slide_id, str(error)))
        if progress is not None:
            progress(done, len(rows), row.slide_id)
    return scored


def _evaluate(scored: Sequence[Scored], classes: Sequence[str], report: Path) -> Evaluation:
    labels = [one.row.label or "" for one in scored]
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise CohortError(
            "labels", f"{unknown[0]} is no class of the model", f"it knows {', '.join(classes)}"
        )
    patients = [one.row.patient_id for one in scored]
    by_head = np.stack([one.scores.probabilities for one in scored], axis=1)
    modules = tuple(compute_metrics(labels, p, patients, classes) for p in by_head)
    several = len(set(patients)) < len(patients)
    consistent = len({(p, label) for p, label in zip(patients, labels, strict=True)}) == len(set(patients))
    merged = None
    if several and consistent:
        mean = metrics_by_patient(labels, by_head[-1], patients, classes)
        merged = compute_metrics(mean.labels, mean.probabilities, mean.patients, classes)
    return Evaluation(modules[-1], merged, modules, report)


def _report(
    run: Path, prepared: Prepared, scored: Sequence[Scored], evaluation: Evaluation, split: str
) -> RunReport:
    facts = json.loads((run / FACTS).read_text(encoding="utf-8")) if (run / FACTS).exists() else {}
    history = _history(run / "history.csv")
    predictions = [
        Prediction(
            one.row.slide_id,
            one.row.patient_id,
            one.row.label,
            one.heatmap.classes[int(one.scores.probabilities[-1].argmax())],
            tuple(float(p) for p in one.scores.probabilities[-1]),
        )
        for one in scored
    ]
    groups = choose_slides(predictions)
    chosen = [(one, p) for one, p in zip(scored, predictions, strict=True) if p.slide_id in groups]
    chosen.sort(key=lambda pair: list(groups).index(pair[1].slide_id))
    config = run / "config.yaml"
    return RunReport(
        title=f"{run.resolve().name}: {' against '.join(evaluation.metrics.classes)}",
        command=facts.get("command", ""),
        created=datetime.now(UTC),
        classes=evaluation.metrics.classes,
        config_yaml=config.read_text(encoding="utf-8") if config.exists() else "",
        environment=facts.get("environment", environment()),
        cohort=_parts(prepared.cohort),
        left_out=_left_out(run, prepared),
        history=history,
        best_epoch=_best_epoch(run),
        part=split,
        metrics=evaluation.metrics,
        patient_metrics=evaluation.patients,
        module_metrics=evaluation.modules,
        predictions=predictions,
        pictures=[_picture(one, p, groups[p.slide_id]) for one, p in chosen],
        timing={"training": sum(record.seconds or 0.0 for record in history)} if history else {},
    )


def _picture(one: Scored, prediction: Prediction, group: object) -> SlidePicture:
    target = one.heatmap.classes.index(prediction.prediction)
    picture = slide_picture(one)
    with Raster.open(one.raster) as raster:
        um_per_px = raster.mpp * raster.shape_px[0] / picture.pixels.shape[0]
    return SlidePicture(
        prediction.slide_id,
        prediction.label,
        prediction.prediction,
        prediction.probabilities,
        picture.pixels,
        one.heatmap.attention_HW,
        evidence_for(one.heatmap.evidence_LHW, target),
        picture.grid_px,
        evidence_class=prediction.prediction,
        group=group,  # type: ignore[arg-type]  # choose_slides names only groups
        um_per_px=um_per_px,
    )


def _parts(cohort: Cohort) -> list[CohortPart]:
    return [
        CohortPart.count(name, [(row.patient_id, row.label) for row in cohort if row.split == name])
        for name in SPLITS
        if any(row.split == name for row in cohort)
    ]


def _left_out(run: Path, prepared: Prepared) -> list[tuple[str, str]]:
    """What was left out now, and what training had left out before."""
    left_out = dict(prepared.left_out)
    path = run / LEFT_OUT
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            left_out = {row["slide_id"]: row["reason"] for row in csv.DictReader(file)} | left_out
    return sorted(left_out.items())


def _history(path: Path) -> list[EpochRecord]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{k: float(v) if v else math.nan for k, v in row.items()} for row in csv.DictReader(file)]
    return [EpochRecord.from_row(row) for row in rows]


def _best_epoch(run: Path) -> int | None:
    path = run / FACTS
    if not path.exists():
        return None
    best = json.loads(path.read_text(encoding="utf-8")).get("best_epoch")
    return int(best) if best is not None else None


def _shown(interval: Interval) -> list[str]:
    if interval.value is None:
        return ["-", interval.reason or ""]
    if interval.low is None or interval.high is None:
        return [f"{interval.value:.3f}", ""]
    return [f"{interval.value:.3f}", f"{interval.low:.3f} to {interval.high:.3f}"]
