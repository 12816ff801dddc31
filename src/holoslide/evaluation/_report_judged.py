"""What the report shows beside the measures: several runs, calibration, decision, plan against measured, data."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from holoslide.evaluation import figures
from holoslide.evaluation.calibration import Reliability
from holoslide.evaluation.metrics import Metrics
from holoslide.evaluation.report_data import RunReport, RunSummary

MEASURES = (
    ("AUROC", "auroc"),
    ("AUPRC", "auprc"),
    ("Balanced accuracy", "balanced_accuracy"),
    ("Accuracy", "accuracy"),
    ("F1", "macro_f1"),
)


def repeated(report: RunReport) -> dict[str, Any] | None:
    """The runs of several folds or seeds beside each other, and their spread."""
    runs = report.runs
    if not runs:
        return None
    series = [(name, [_value(run.metrics, key) for run in runs]) for name, key in MEASURES]
    return {
        "measures": [name for name, _ in series],
        "spread": [(name, *_mean_and_deviation(values)) for name, values in series],
        "rows": [(run, [_value(run.metrics, key) for _, key in MEASURES]) for run in runs],
        "figure": figures.spread(series),
        "panels": _learning(runs),
        "colours": [figures.CLASS_COLOURS[i % len(figures.CLASS_COLOURS)] for i in range(len(runs))],
        "maps": _MAPS[report.repeats or "folds"].format(runs=len(runs), first=runs[0].name),
        "words": _REPEATS[report.repeats or "folds"],
        "one": "Fold" if report.repeats == "folds" else "Seed",
    }


def composition(report: RunReport) -> str:
    """How the parts came about, and that they share no patient."""
    if report.table:
        return ""
    if report.repeats == "folds":
        return "The folds share no patient" + (f": {report.splits}." if report.splits else ".")
    if len(report.cohort) < 2:
        return ""
    return "No patient is in two parts" + (f"; the parts were {report.splits}." if report.splits else ".")


def folds(report: RunReport) -> list[tuple[str, dict[str, int], int, int]]:
    """What each fold tests: its name, slides by class, all slides, patients."""
    if report.repeats != "folds":
        return []
    return [
        (run.name, {one.name: one.slides for one in m.per_class}, m.slides, m.patients)
        for run in report.runs
        for m in (run.metrics,)
    ]


_REPEATS = {
    "folds": (
        "Every patient is in the test part of one fold, and the network of that fold has learnt neither from the "
        "patient's slides nor on them when to stop. The other results of this report are of all patients together, "
        "each scored by that one network: AUROC and AUPRC there rank scores of different networks in one list, "
        "which costs something where the networks' scales differ. The spread is of the folds' own results, each on "
        "its own patients."
    ),
    "seeds": (
        "The same slides in the same parts, trained anew with another seed: other first weights, another order, "
        "other augmentations. The other results of this report are of the mean of the networks' "
        "probabilities; the spread is of the networks' own results, and says how much of a result is luck."
    ),
}


_MAPS = {
    "folds": "Each slide's maps are of the network that tested it, as its probabilities are.",
    "seeds": (
        "The probabilities here are the mean of {runs} networks, the maps are those of the first ({first}) alone: "
        "the evidence does not add up to these probabilities, but to those of {first}."
    ),
}


def _learning(runs: Sequence[RunSummary]) -> list[tuple[str, figures.Picture]]:
    """Loss and AUROC of the last module on the validation slides, a line a run."""
    if not all(run.history for run in runs):
        return []
    panels = []
    for name, key, is_share in (
        ("Validation loss of the last module", "valid_losses", False),
        ("Validation AUROC of the last module", "valid_aurocs", True),
    ):
        if not all(getattr(record, key) for run in runs for record in run.history):
            continue
        lines = [
            (
                run.name,
                [r.epoch for r in run.history],
                [getattr(r, key)[-1] for r in run.history],
                run.best_epoch,
            )
            for run in runs
        ]
        panels.append((name, figures.by_run(lines, alt=f"{name} of each run by epoch", is_share=is_share)))
    return panels


def taught(report: RunReport) -> str:
    """Which classifiers each module learnt from."""
    modules, every = len(report.module_metrics), report.barrier_every
    if modules == 1:
        return (
            "The network is one module, trained from end to end: its classifier's answer is the prediction."
        )
    if every == 1:
        how = ", trained without a word from the modules behind it"
    elif every >= modules:
        how = "; no gradient barrier is between them, so it learnt from those of all modules behind it, too"
    else:
        how = (
            f"; it learnt from those behind it, too, up to the next gradient barrier, one after every {every}"
        )
    return f"Each module has a classifier of its own{how}. The last one's answer is the prediction."


def _value(metrics: Metrics, key: str) -> float:
    value = getattr(metrics, key).value
    return math.nan if value is None else float(value)


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Mean, standard deviation, least and most of the values that there are."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return math.nan, math.nan, math.nan, math.nan
    mean = sum(known) / len(known)
    squares = sum((value - mean) ** 2 for value in known)
    deviation = math.sqrt(squares / (len(known) - 1)) if len(known) > 1 else math.nan
    return mean, deviation, min(known), max(known)


def calibrated(report: RunReport) -> dict[str, Any] | None:
    """The reliability curve before and after the temperature, and what it comes to."""
    found = report.calibration
    if found is None:
        return None
    series = [("as predicted", found.before.bins)]
    if found.after is not None:
        series.append(("calibrated", found.after.bins))
    of = found.before.of
    x, y = (
        ("stated probability", f"share that is {of}") if of else ("stated confidence", "share that is right")
    )
    return {
        "figure": figures.reliability(series, x=x, y=y),
        "of": of,
        "lines": [
            (name, getattr(found.before, key), getattr(found.after, key) if found.after else None, words)
            for name, key, words in (
                ("Calibration error (ECE)", "ece", "Mean distance of stated from true, in ten bins."),
                ("Brier score", "brier", "Mean squared distance of probabilities from labels."),
                ("Log loss", "log_loss", "How far probabilities are from the labels; sure errors cost most."),
            )
        ],
        "how": _how_calibrated(report),
        "verdict": _calibration_verdict(report, found.before, found.after),
    }


def _calibration_verdict(report: RunReport, before: Reliability, after: Reliability | None) -> str:
    low, high = before.ece_by_chance
    by_chance = f"the {low:.3f} to {high:.3f} that chance alone gives a network that states the truth"
    if before.ece < low:
        first = (
            f"An error of {before.ece:.3f} is less than {by_chance}, on so few slides: nothing here speaks "
            "against the probabilities."
        )
    elif before.ece <= high:
        first = f"An error of {before.ece:.3f} is within {by_chance}, on so many slides."
    else:
        first = (
            f"An error of {before.ece:.3f} is more than {by_chance}: its probabilities are not to be taken as they "
            "are."
        )
    if after is None:
        return first
    if len(report.runs) > 1 and report.repeats == "folds":
        whose, yes, no = "the runs' temperatures", "help", "do not help"
    else:
        whose, yes, no = "the temperature", "helps", "does not help"
    helps = yes if after.log_loss < before.log_loss else no
    return f"{first} On these slides{_FITTED.get(_own_part(report), '')} {whose} {helps}."


_FITTED = {
    "valid": ", the very ones that it was fitted on,",
    "all": ", among which are those that it was fitted on,",
}


def _own_part(report: RunReport) -> str:
    """The part that was scored of the cohort that the network comes from; none of another cohort's."""
    is_all, names = report.part == "all", {part.name for part in report.cohort}
    return "" if report.table or (is_all and "valid" not in names) else report.part


def _how_calibrated(report: RunReport) -> str:
    """Where the calibrated probabilities come from, and what they change."""
    found, shown = report.calibration, "probabilities as predicted"
    assert found is not None
    if found.after is None:
        return f"Not calibrated: {found.temperature.reason}."
    if report.calibrated:
        shown = "calibrated probabilities, but for decision and modules, which take them as predicted"
    value = found.temperature.value
    if value is None:
        each = ", ".join(
            "none" if run.temperature is None else f"{run.temperature:.2f}" for run in report.runs
        )
        how = (
            f"each run's logits divided by a temperature of its own ({each}), fitted on its validation slides"
        )
        kept = "no ranking within a run"
    else:
        on = f"the {found.temperature.slides} validation slides of {found.temperature.patients} patients"
        how, kept = f"logits divided by a temperature of {value:.2f}, fitted on {on}", "no ranking"
    if len(report.classes) == 2:
        changes = f"{kept} and no predicted class"
    else:
        changes = "no predicted class, but may change how slides rank by the probability of one class"
    return f"Calibrated: {how}. It changes {changes}; the other results of this page are of the {shown}."


NAMED = 12  # slides that are named in a sentence; the table of predictions marks all


def decided(report: RunReport) -> dict[str, Any] | None:
    """The decision at the sensitivity that was asked for."""
    found = report.decision
    if found is None:
        return None
    (spared, alarms), (missed, hits) = found.calls
    other = next((name for name in report.classes if name != found.positive), "other")
    share = (missed + hits) / (spared + alarms + missed + hits)
    here = f"at this cohort's {100 * share:.0f}\u00a0% {found.positive}"
    predictive = (
        ("Positive predictive value", found.ppv, hits, hits + alarms, f"Of those called, {found.positive}"),
        ("Negative predictive value", found.npv, spared, spared + missed, f"Of those not called, {other}"),
    )
    return {
        "found": found,
        "other": other,
        "lines": [
            (
                "Sensitivity",
                found.sensitivity,
                hits,
                hits + missed,
                f"Of the {found.positive} slides, found.",
            ),
            (
                "Specificity",
                found.specificity,
                spared,
                spared + alarms,
                f"Of the {other} slides, left alone.",
            ),
            *((name, value, hit, of, f"{words}, {here}.") for name, value, hit, of, words in predictive),
        ],
        "missed": missed,
        "missed_slides": _missed(report),
        "alarms": alarms,
        "thresholds": [run.threshold for run in report.runs],
        "fixed": _fixed(report),
    }


def _fixed(report: RunReport) -> str:
    """What the scored slides had to do with the threshold; nobody knows how often one was chosen."""
    if report.learnt_from:
        return ""
    return {
        "train": "It was fixed on other slides, but the network was trained on these.",
        "valid": "These are the very slides that it was fixed on, which flatters what it comes to here.",
        "all": "Those are among the slides here, which flatters what it comes to.",
    }.get(_own_part(report), "The threshold comes from those alone, never from the slides here.")


def called(report: RunReport) -> list[bool | None]:
    """Of each slide of the predictions, whether the decision calls it positive; None without a decision."""
    found = report.decision.called if report.decision is not None else ()
    return [*found] if len(found) == len(report.predictions) else [None] * len(report.predictions)


def _missed(report: RunReport) -> str:
    """The slides of the positive class that the decision does not call."""
    positive = report.decision.positive if report.decision is not None else None
    names = [
        one.slide_id
        for one, is_called in zip(report.predictions, called(report), strict=True)
        if is_called is False and one.label == positive
    ]
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


MUCH = 1.1  # of the plan: more than this is worth a word


def used(report: RunReport) -> dict[str, Any] | None:
    """What was planned and measured, with measured as a share of planned; and a word on what was more than that."""
    if not report.resources:
        return None
    rows = [(one, one.measured / one.planned if one.planned else None) for one in report.resources]
    over = [
        f"{one.name.lower()} by {100 * (part - 1):.0f}\u00a0%" for one, part in rows if part and part > MUCH
    ]
    return {"rows": rows, "over": " and ".join(over), "much": MUCH}


def files(report: RunReport) -> list[list[Any]]:
    """The slides' files in two halves, which stand beside each other."""
    half = (len(report.files) + 1) // 2
    return [part for part in (list(report.files[:half]), list(report.files[half:])) if part]


def digest(report: RunReport) -> str:
    """One SHA-256 for all the slides, in the order of their ids: the same data, the same digest."""
    lines = "".join(
        f"{one.sha256}  {one.slide_id}\n" for one in sorted(report.files, key=lambda f: f.slide_id)
    )
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest() if report.files else ""
