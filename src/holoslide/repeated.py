"""Several runs of one cohort, and one report of all: cross-validation by patient (folds), or other seeds.

The folder holds a run in a folder of its own for each (`fold-1`, ... or `seed-0`, ...), and `predictions.csv`,
`metrics.json` and `report.html` of all together.
"""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holoslide.config import RunConfig
from holoslide.errors import CheckpointError, CohortError, ConfigError
from holoslide.evaluation.calibration import Temperature, fit_temperature
from holoslide.evaluation.decision import Threshold, choose_threshold
from holoslide.evaluation.metrics import Predictions, compute_metrics
from holoslide.evaluation.options import Positive
from holoslide.evaluation.outcome import Outcome, assess, pool
from holoslide.evaluation.report import write_report
from holoslide.evaluation.report_data import CohortPart, PredictionRow, Repeats, RunReport, RunSummary
from holoslide.files import write_json, write_rows, write_text
from holoslide.pipeline import train
from holoslide.prepared import Advance, Prepared
from holoslide.records import command_given, data_rows, environment
from holoslide.reporting import (
    Run,
    command_again,
    flow_of,
    parts_of,
    pictures_of,
    resources_of_all,
)
from holoslide.results import evaluate_run
from holoslide.runs import DATA, repeats_of
from holoslide.slides.cohort import Cohort, SlideRow
from holoslide.slides.splits import SplitConfig, draw_split
from holoslide.slides.tables import Split
from holoslide.training.checkpoint import Identity, describe, refuse_other_run
from holoslide.training.loop import LAST, decisive
from holoslide.training.parallel import launch
from holoslide.validation import judged, read_said, validation_rows

Announce = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Repeated:
    """What several runs came to, together and each for itself."""

    outcome: Outcome
    runs: tuple[RunSummary, ...]
    report: Path

    def rows(self) -> list[list[str]]:
        """Measure, mean, standard deviation and each run's value, for those that a report shows."""
        rows = []
        for name in ("auroc", "auprc", "accuracy", "balanced_accuracy"):
            values = [value for run in self.runs if (value := getattr(run.metrics, name).value) is not None]
            if values:
                deviation = f"{statistics.stdev(values):.3f}" if len(values) > 1 else ""
                each = ", ".join(f"{value:.3f}" for value in values)
                rows.append([name.replace("_", " "), f"{statistics.fmean(values):.3f}", deviation, each])
        return rows


def folds(cohort: Cohort, count: int, config: SplitConfig) -> list[Cohort]:
    """The cohort `count` times, each patient once in test; valid is drawn from the rest, by its share in `config`.

    By patient and stratified, as `Cohort.with_splits`; parts that the table names are not kept. Raises
    `ConfigError` for fewer than two folds, `CohortError` if a class has fewer patients than folds.
    """
    if count < 2:
        raise ConfigError("--folds", f"is {count}", "give 2 or more")
    rows = [row for row in cohort if row.label is not None]
    labels = _labels(rows)
    parts = {str(n): Fraction(1, count) for n in range(count)}
    fold_of = draw_split(labels, parts, seed=config.seed, where=cohort.name)  # type: ignore[arg-type]
    shares: dict[Split, Fraction] = {p: share for p, share in config.shares().items() if p != "test"}
    cohorts = []
    for n in range(count):
        rest = {patient: its for patient, its in labels.items() if fold_of[patient] != str(n)}
        drawn = draw_split(rest, shares, seed=config.seed, where=cohort.name)
        split = [dataclasses.replace(row, split=drawn.get(row.patient_id, "test")) for row in rows]
        cohorts.append(dataclasses.replace(cohort, rows=tuple(split)))
    return cohorts


def train_folds(
    prepared: Prepared, config: RunConfig, out: Path, count: int, *, resume: bool = False,
    announce: Announce, progress: Any = None, advance: Advance | None = None,
) -> Repeated | None:  # fmt: skip
    """Cross-validation: a network for each fold, tested on the patients it has not seen.

    Of several processes the first gets what came of it, the others None.
    """
    splits = f"drawn by patient, with seed {config.split.seed}"
    runs = []
    for n, cohort in enumerate(folds(prepared.cohort, count, config.split), start=1):
        own = dataclasses.replace(prepared, cohort=cohort, left_out=[*prepared.left_out])
        runs.append(_Planned(f"fold-{n}", own, config, splits))
    return _run_all(
        "folds",
        prepared,
        config,
        out,
        runs,
        resume=resume,
        announce=announce,
        progress=progress,
        advance=advance,
    )


def train_seeds(
    prepared: Prepared, config: RunConfig, out: Path, count: int, *, splits: str = "", resume: bool = False,
    announce: Announce, progress: Any = None, advance: Advance | None = None,
) -> Repeated | None:  # fmt: skip
    """The same parts, trained anew with `count` seeds from the configuration's on; judged is their mean.

    `splits` says how the parts came about, for the reports. Of several processes the first gets what came of it,
    the others None.
    """
    if count < 2:
        raise ConfigError("--seeds", f"is {count}", "give 2 or more")
    if not prepared.cohort.test:
        raise CohortError(
            prepared.cohort.name, "has no test slides to judge by", "give it some, or train once"
        )
    runs = []
    for seed in range(config.train.seed, config.train.seed + count):
        changed = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
        own = dataclasses.replace(prepared, left_out=[*prepared.left_out])
        runs.append(_Planned(f"seed-{seed}", own, changed, splits))
    return _run_all(
        "seeds",
        prepared,
        config,
        out,
        runs,
        resume=resume,
        announce=announce,
        progress=progress,
        advance=advance,
    )


@dataclass(frozen=True, slots=True)
class _Planned:
    """A run to be trained; `splits` says how its parts came about."""

    name: str
    prepared: Prepared
    config: RunConfig
    splits: str


@dataclass(frozen=True, slots=True)
class _Scores:
    """What one run says of its test slides, by head: (K, N, C); and of its validation slides."""

    rows: list[SlideRow]
    by_head_KNC: NDArray[np.float64]
    valid: Predictions | None


def _run_all(
    repeats: Repeats, prepared: Prepared, config: RunConfig, out: Path, planned: Sequence[_Planned], *,
    resume: bool, announce: Announce, progress: Any, advance: Advance | None,
) -> Repeated | None:  # fmt: skip
    Positive.of(prepared.cohort.classes, config.evaluate.positive)  # refused now, not after the first run
    _refuse_other_runs(repeats, prepared, out, planned, resume=resume)
    # All are past the refusals once they have met here; what is there is not yet changed by any.
    fabric = launch(config.train)
    if fabric.is_global_zero:
        out.mkdir(parents=True, exist_ok=True)
        write_text(config.to_yaml(), out / "config.yaml")
        prepared.cohort.to_csv(out / "cohort.csv")
    untested = _train_all(out, planned, resume=resume, announce=announce, progress=progress, advance=advance)
    if not fabric.is_global_zero:
        return None
    for one in untested:
        evaluate_run(out / one.name, one.prepared, progress=advance)
    classes = prepared.cohort.classes
    positive = Positive.of(classes, config.evaluate.positive)
    scores = [_scores(out / one.name, one.prepared.cohort, classes, positive) for one in planned]
    rows, by_head, outcome = (_pooled if repeats == "folds" else _averaged)(scores, classes, config)
    summaries = tuple(
        _summary(out / one.name, found, classes, config) for one, found in zip(planned, scores, strict=True)
    )
    predictions = _predictions(rows, by_head[-1], classes)
    write_rows([one.row(classes) for one in predictions], out / "predictions.csv")
    write_json(
        {"together": outcome.to_dict(), "runs": {run.name: run.metrics.to_dict() for run in summaries}},
        out / "metrics.json",
    )
    prepared.left_out[:] = _left_out(planned, scores)
    report = _report(repeats, prepared, out, outcome, summaries, predictions, planned)
    write_report(report, out / "report.html")
    return Repeated(outcome, summaries, out / "report.html")


def _train_all(
    out: Path, planned: Sequence[_Planned], *, resume: bool, announce: Announce, progress: Any,
    advance: Advance | None,
) -> list[_Planned]:  # fmt: skip
    """Train and test each run that is not done; gives those that are not tested yet.

    Where several processes train, these are all: the first tests them when the others need not wait for it, and
    alone, for two that test write the same files.
    """
    untested = []
    for one in planned:
        folder = out / one.name
        if resume and _is_done(folder):
            announce(f"{one.name}: done before")
            continue
        announce(f"{one.name} of {len(planned)}")
        result = train(
            one.prepared, one.config, folder,
            splits=one.splits, resume=resume and folder.exists(), progress=progress,
        )  # fmt: skip
        if result.ranks > 1:
            untested.append(one)
        else:
            evaluate_run(folder, one.prepared, progress=advance)
    return untested


def _is_done(folder: Path) -> bool:
    """Whether a run is tested, and its report, which comes last, is written."""
    return (folder / "metrics.json").exists() and (folder / "report.html").exists()


def _is_begun(folder: Path) -> bool:
    """Whether there is a run; of one that is done the checkpoint may have been deleted, which is large."""
    return (folder / LAST).exists() or _is_done(folder)


def _refuse_other_runs(
    repeats: Repeats, prepared: Prepared, out: Path, planned: Sequence[_Planned], *, resume: bool
) -> None:
    """Raise `CheckpointError` before anything is written: for runs that are there already, or, where they are to go
    on, for runs of other settings or slides, of which one that is done would be taken for one of these.
    """
    there = [folder for folder in repeats_of(out) if _is_begun(folder)]
    if (out / LAST).exists():
        raise CheckpointError(out, "holds a single run", f"train {repeats} into another folder")
    if strangers := [folder.name for folder in there if not folder.name.startswith(repeats.rstrip("s"))]:
        raise CheckpointError(out, f"holds {strangers[0]}", f"train {repeats} into another folder")
    begun = [one for one in planned if _is_begun(out / one.name)]
    if (there or begun) and not resume:
        raise CheckpointError(out, "holds a run already", "resume it, or train into another folder")
    data = {row.pop("slide_id"): row for row in data_rows(prepared)} if begun else {}
    for one in begun:
        wanted = _identity(one.prepared.cohort, one.config, data)
        refuse_other_run(out / one.name, _recorded(out / one.name), wanted)


def _identity(cohort: Cohort, config: RunConfig, data: Mapping[str, Mapping[str, str]]) -> Identity:
    """What a run is: the settings that its weights follow from, and every slide; `data` are the slides' files."""
    slides = {}
    for row in cohort:
        known = {"patient": row.patient_id, "label": row.label or "", "split": row.split or ""}
        slides[row.slide_id] = {**data.get(row.slide_id, {}), **known}
    parts = {"prepare": config.prepare, "model": config.model, "augment": config.augment}
    return describe({"train": decisive(config.train), **parts, "slides": slides})


def _recorded(folder: Path) -> Identity:
    """The same of a run that is there, by what it wrote of itself."""
    cohort = Cohort.from_csv(folder / "cohort.csv")
    with (folder / DATA).open(newline="", encoding="utf-8") as file:
        data = {row.pop("slide_id"): row for row in csv.DictReader(file)}
    return _identity(cohort, RunConfig.load(folder / "config.yaml"), data)


def _left_out(planned: Sequence[_Planned], scores: Sequence[_Scores]) -> list[tuple[str, str]]:
    """Every slide that some run could not use; of a run that was done before, its own report has the reason."""
    found = {pair for one in planned for pair in one.prepared.left_out}
    known = {slide_id for slide_id, _ in found}
    for one, its in zip(planned, scores, strict=True):
        scored = {row.slide_id for row in its.rows}
        lost = [row.slide_id for row in one.prepared.cohort.test if row.slide_id not in scored | known]
        found |= {(slide_id, f"was not scored; {one.name}/report.html says why") for slide_id in lost}
    return sorted(found)


def _report(
    repeats: Repeats, prepared: Prepared, out: Path, outcome: Outcome, summaries: Sequence[RunSummary],
    predictions: Sequence[PredictionRow], planned: Sequence[_Planned],
) -> RunReport:  # fmt: skip
    cohort, left_out = prepared.cohort, prepared.left_out
    found = [Run(out / one.name) for one in planned]
    first = found[0]
    used = dataclasses.replace(
        cohort, rows=tuple(dataclasses.replace(r, split="test") for r in cohort if r.label)
    )
    parts = parts_of(cohort)
    if repeats == "folds":
        parts = [CohortPart.count("all", [(row.patient_id, row.label) for row in used])]
    return RunReport(
        title=f"{out.resolve().name}: {' against '.join(cohort.classes)}, {len(planned)} {repeats}",
        command=command_given(),
        created=datetime.now(UTC),
        classes=cohort.classes,
        config_yaml=(out / "config.yaml").read_text(encoding="utf-8"),
        environment=environment(),
        cohort=parts,
        flow=flow_of(used if repeats == "folds" else cohort, left_out),
        left_out=left_out,
        metrics=outcome.metrics,
        patient_metrics=outcome.patients,
        module_metrics=outcome.modules,
        calibration=outcome.calibration,
        decision=outcome.decision,
        lacking=outcome.lacking,
        undecided=outcome.undecided,
        positive=outcome.positive,
        predictions=predictions,
        pictures=pictures_of(predictions, prepared.rasters, [one.folder / "heatmaps" for one in found]),
        timing=_seconds(found),
        resources=resources_of_all(found),
        files=[dataclasses.replace(one, split="") for one in first.files]
        if repeats == "folds"
        else first.files,
        directory=str(Path.cwd()),
        splits=planned[0].splits,
        again=command_again(out, f"--{repeats}", str(len(planned)), rasters=first.facts.get("rasters")),
        repeats=repeats,
        runs=summaries,
        barrier_every=first.barrier_every,
    )


def _seconds(runs: Sequence[Run]) -> dict[str, float]:
    """What training and scoring took, in all runs together."""
    training = sum(record.seconds or 0.0 for run in runs for record in run.history)
    scoring = [seconds for run in runs if (seconds := run.metrics.get("scoring_seconds")) is not None]
    taken = {f"{name}, all runs": value for name, value in runs[0].facts.get("seconds", {}).items()}
    taken["training, all runs"] = training
    return taken | ({"scoring, all runs": sum(scoring)} if len(scoring) == len(runs) else {})


# --- What the runs said -------------------------------------------------------------------------------------------


def _scores(run: Path, cohort: Cohort, classes: Sequence[str], positive: Positive | None) -> _Scores:
    found: dict[str, list[list[float]]] = {}
    with (run / "predictions_modules.csv").open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            found.setdefault(line["slide_id"], []).append([float(line[f"p_{name}"]) for name in classes])
    rows = [row for row in cohort.test if row.slide_id in found]
    by_head = np.array([found[row.slide_id] for row in rows]).swapaxes(0, 1)
    said, wanted = read_said(run), validation_rows(cohort)
    is_known = bool(wanted) and all(row.slide_id in said for row in wanted)
    name = positive.name if positive else None
    valid = judged(wanted, said, classes, positive=name) if is_known else None
    return _Scores(rows, by_head, valid)


def _pooled(
    scores: Sequence[_Scores], classes: Sequence[str], config: RunConfig
) -> tuple[list[SlideRow], NDArray[np.float64], Outcome]:
    """Every slide by the one network that has not seen its patient."""
    rows = [row for one in scores for row in one.rows]
    by_head = np.concatenate([one.by_head_KNC for one in scores], axis=1)
    of = [number for number, one in enumerate(scores) for _ in one.rows]
    outcome = pool(
        [row.label or "" for row in rows],
        by_head,
        [row.patient_id for row in rows],
        classes,
        temperatures=[_temperature(one) for one in scores if one.valid is not None],
        thresholds=[found for one in scores if (found := _threshold(one, config)) is not None],
        part_N=of,
        positive=Positive.of(classes, config.evaluate.positive),
    )
    return rows, by_head, outcome


def _averaged(
    scores: Sequence[_Scores], classes: Sequence[str], config: RunConfig
) -> tuple[list[SlideRow], NDArray[np.float64], Outcome]:
    """Every slide by the mean of the networks' probabilities."""
    known = set.intersection(*({row.slide_id for row in one.rows} for one in scores))
    rows = [row for row in scores[0].rows if row.slide_id in known]
    kept = [one.by_head_KNC[:, [row.slide_id in known for row in one.rows]] for one in scores]
    by_head = np.mean(kept, axis=0)
    outcome = assess(
        [row.label or "" for row in rows],
        by_head,
        [row.patient_id for row in rows],
        classes,
        valid=_mean_valid(scores),
        asked=config.evaluate,
    )
    return rows, by_head, outcome


def _mean_valid(scores: Sequence[_Scores]) -> Predictions | str:
    valid = [one.valid for one in scores if one.valid is not None]
    if len(valid) < len(scores):
        return "not every run had validation slides at hand"
    mean = np.mean([one.probabilities for one in valid], axis=0)
    return dataclasses.replace(valid[0], probabilities=mean)


def _summary(run: Path, found: _Scores, classes: Sequence[str], config: RunConfig) -> RunSummary:
    labels, patients = [row.label or "" for row in found.rows], [row.patient_id for row in found.rows]
    positive = Positive.of(classes, config.evaluate.positive)
    metrics = compute_metrics(
        labels, found.by_head_KNC[-1], patients, classes, positive=positive.name if positive else None
    )
    facts, threshold = Run(run), _threshold(found, config)
    temperature = _temperature(found).value if found.valid is not None else None
    value = threshold.value if threshold is not None else None
    return RunSummary(run.name, metrics, facts.history, facts.best_epoch, temperature, value)


def _temperature(found: _Scores) -> Temperature:
    assert found.valid is not None
    return fit_temperature(found.valid)


def _threshold(found: _Scores, config: RunConfig) -> Threshold | None:
    if found.valid is None or len(found.valid.classes) != 2:
        return None
    return choose_threshold(found.valid, sensitivity=config.evaluate.sensitivity)


def _predictions(
    rows: Sequence[SlideRow], probabilities_NC: NDArray[np.float64], classes: Sequence[str]
) -> list[PredictionRow]:
    return [
        PredictionRow(row.slide_id, row.patient_id, row.label, classes[int(p.argmax())], tuple(map(float, p)))
        for row, p in zip(rows, probabilities_NC, strict=True)
    ]


def _labels(rows: Sequence[SlideRow]) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row.patient_id, set()).add(row.label or "")
    return {patient: frozenset(its) for patient, its in found.items()}
