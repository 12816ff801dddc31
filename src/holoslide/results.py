"""A trained model measured on labelled slides: predictions, heatmaps, metrics and the report.

A run's folder then also holds: `predictions.csv` and `predictions_modules.csv` (every module's classifier),
`metrics.json` (with the temperature and the threshold), `validation.json` (what the model says of the slides that
those come from), `heatmaps/` and `report.html`. All but `validation.json` are of its test part alone; another part
and another cohort have a folder of their own, see `evaluated.py`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from holoslide.errors import CohortError, SlideError
from holoslide.evaluated import Evaluated
from holoslide.evaluation.metrics import Interval, Metrics, Predictions
from holoslide.evaluation.options import EvaluateConfig, Positive
from holoslide.evaluation.outcome import Outcome, assess
from holoslide.evaluation.report import write_report
from holoslide.evaluation.report_data import PredictionRow
from holoslide.files import write_json, write_rows
from holoslide.predictions import Prediction, Predictor, draw_heatmap, predictions_of
from holoslide.prepared import Advance, Prepared
from holoslide.reporting import pictures_of, report_of
from holoslide.slides.cohort import Cohort, SlideRow
from holoslide.slides.raster import Recipe
from holoslide.validation import Said, judged, read_said, validation_rows, write_said


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured of a model on a part of a cohort, and the report of it."""

    outcome: Outcome
    report: Path

    @property
    def metrics(self) -> Metrics:
        """Those of the slides."""
        return self.outcome.metrics

    @property
    def patients(self) -> Metrics | None:
        """Those of the patients, where they differ from the slides'."""
        return self.outcome.patients

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return self.outcome.to_dict()

    def rows(self) -> list[list[str]]:
        """Name, value and interval of each measure."""
        shown = ("auroc", "auprc", "accuracy", "balanced_accuracy", "macro_f1", "log_loss")
        outcome = self.outcome
        rows = [[name.replace("_", " "), *_shown(getattr(outcome.metrics, name))] for name in shown]
        rows += [[f"auroc of module {k}", *_shown(m.auroc)] for k, m in enumerate(outcome.modules, start=1)]
        if outcome.calibration is not None:
            found = outcome.calibration
            rows.append(["expected calibration error", f"{found.before.ece:.3f}", ""])
            if found.after is not None and found.temperature.value is not None:
                name = f"the same at temperature {found.temperature.value:.2f}"
                rows.append([name, f"{found.after.ece:.3f}", ""])
        if outcome.positive is not None:
            rows.insert(0, ["positive class", outcome.positive.name, outcome.positive.how])
        if outcome.decision is not None:
            of = f"at a validation sensitivity of {outcome.decision.wanted:g}"
            rows += [[f"{name} {of}", *_shown(getattr(outcome.decision, name))] for name in _CALLED]
        return rows


_CALLED = ("sensitivity", "specificity")


def evaluate_run(
    run: Path,
    prepared: Prepared,
    *,
    split: str = "test",
    table: str | None = None,
    out: Path | None = None,
    calibrated: bool = False,
    asked: EvaluateConfig | None = None,
    progress: Advance | None = None,
) -> Evaluation:
    """Score a part of a cohort once; write predictions, metrics, heatmaps and the report.

    They go into `out`; by default the run's folder for its test part, and `<run>/<split>` for another. `table`
    names another cohort than the run's own, which needs an `out`. `split` "all" takes every labelled slide. A slide
    that fails is added to those left out. `calibrated` writes probabilities after the temperature, not raw ones;
    `asked` replaces what the run's configuration asks for.
    """
    started = time.monotonic()
    evaluated = Evaluated.of(run, prepared, split=split, out=out, table=table)
    rows, out = evaluated.rows, evaluated.out
    predictor = Predictor(run)
    asked = asked or predictor.config.evaluate
    Positive.of(predictor.model.classes, asked.positive)  # refused before the slides are scored, not after
    _refuse_unknown_labels(rows, predictor.model.classes)
    with evaluated.alone():
        scored = _score_all(predictor, prepared, rows, out / "heatmaps", progress)
        if not scored:
            where = prepared.cohort.name
            raise CohortError(where, f"no slide of {split} could be scored", "see the reasons listed")
        seconds = time.monotonic() - started
        # Slides of another cohort may bear the names of the run's own.
        own = prepared if table is None else dataclasses.replace(prepared, rasters={}, recipes={})
        valid = validation_slides(run, predictor, own, progress=progress)
        outcome = _assess(scored, predictor.model.classes, valid, asked=asked, calibrated=calibrated)
        temperature = outcome.calibration.temperature if calibrated and outcome.calibration else None
        calibrated = temperature is not None and temperature.value is not None
        predictions = predictions_of(scored, temperature=temperature)
        evaluated.write_records()
        facts = {**evaluated.facts(), "calibrated": calibrated, "scoring_seconds": round(seconds, 3)}
        _write_tables(out, scored, predictions, outcome.to_dict() | facts)
        report = report_of(
            evaluated,
            outcome,
            predictions=predictions,
            pictures=pictures_of(predictions, prepared.rasters, [out / "heatmaps"]),
            timing={"scoring": seconds},
            calibrated=calibrated,
        )
        write_report(report, out / "report.html")
        return Evaluation(outcome, out / "report.html")


def _write_tables(
    out: Path, scored: Sequence[Prediction], predictions: Sequence[PredictionRow], metrics: dict[str, Any]
) -> None:
    """`predictions.csv`, the same of every module, and `metrics.json`."""
    out.mkdir(parents=True, exist_ok=True)
    classes = scored[0].classes
    write_rows([one.row(classes) for one in predictions], out / "predictions.csv")
    by_module = [
        {"module": str(k + 1), **one.row(classes)}
        for k in range(len(scored[0].scores.logits_KL))
        for one in predictions_of(scored, head=k)
    ]
    write_rows(by_module, out / "predictions_modules.csv")
    write_json(metrics, out / "metrics.json")


def _score_all(
    predictor: Predictor,
    prepared: Prepared,
    rows: Sequence[SlideRow],
    heatmaps: Path | None,
    progress: Advance | None,
) -> list[Prediction]:
    scored = []
    for done, row in enumerate(rows, start=1):
        try:
            one = predictor.score(row, prepared.rasters[row.slide_id], prepared.recipes.get(row.slide_id))
            if heatmaps is not None:
                draw_heatmap(one, heatmaps)
            scored.append(one.without_maps())
        except (SlideError, OSError) as error:
            prepared.left_out.append((row.slide_id, str(error)))
        if progress is not None:
            progress(done, len(rows), row.slide_id)
    return scored


def _assess(
    scored: Sequence[Prediction], classes: Sequence[str], valid: Predictions | str, *, asked: EvaluateConfig,
    calibrated: bool,
) -> Outcome:  # fmt: skip
    labels = [one.row.label or "" for one in scored]
    by_head = np.stack([one.scores.probabilities for one in scored], axis=1)
    patients = [one.row.patient_id for one in scored]
    return assess(labels, by_head, patients, classes, valid=valid, asked=asked, calibrated=calibrated)


def _refuse_unknown_labels(rows: Sequence[SlideRow], classes: Sequence[str]) -> None:
    unknown = [row for row in rows if row.label not in classes]
    if unknown:
        raise CohortError(
            unknown[0].slide_id,
            f"{unknown[0].label} is no class of the model",
            f"it knows {', '.join(classes)}",
        )


# --- The slides that temperature and threshold come from ----------------------------------------------------------


def validation_slides(
    run: Path, predictor: Predictor, prepared: Prepared, *, progress: Advance | None = None
) -> Predictions | str:
    """What the run's model says of the validation slides of the run's table, or why that is not known.

    Each is scored once for a model and a raster, and kept in `validation.json`. Those of another cohort are never
    taken: they may be among the slides the model has learnt from, or are left for a test.
    """
    path, model = run / "cohort.csv", predictor.weights_sha256()
    if not path.exists():
        return "the run's folder names no validation slides"
    rows = validation_rows(Cohort.from_csv(path))
    if not rows:
        return "the run has no validation slides"
    said = read_said(run, model_sha256=model)
    new = [row for row in rows if not _is_said(said.get(row.slide_id), prepared.recipes.get(row.slide_id))]
    if missing := [row.slide_id for row in new if row.slide_id not in prepared.rasters]:
        return (
            f"{len(missing)} of the run's {len(rows)} validation slides are not at hand ({missing[0]} first): "
            "evaluate the run on its own cohort once"
        )
    scored = _score_all(predictor, prepared, new, None, progress)
    if len(scored) < len(new):
        return "not all of the run's validation slides could be scored"
    said |= {one.row.slide_id: _said(one, prepared.recipes[one.row.slide_id]) for one in scored}
    if scored:
        write_said(run, [said[row.slide_id] for row in rows], model_sha256=model)
    return judged(rows, said, predictor.model.classes)


def _is_said(one: Said | None, made: Recipe | None) -> bool:
    """Whether it is known of a slide, and of its very raster where that is at hand."""
    return one is not None and (made is None or one.get("raster") == made.digest)


def _said(one: Prediction, made: Recipe) -> Said:
    probabilities = [float(p) for p in one.scores.probabilities[-1]]
    return {"slide_id": one.row.slide_id, "raster": made.digest, "probabilities": probabilities}


def _shown(interval: Interval) -> list[str]:
    if interval.value is None:
        return ["-", interval.reason or ""]
    if interval.low is None or interval.high is None:
        return [f"{interval.value:.3f}", ""]
    return [f"{interval.value:.3f}", f"{interval.low:.3f} to {interval.high:.3f}"]
