"""All that is measured of one set of predictions: metrics, every module's, calibration, and a decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from holoslide.evaluation.calibration import Calibration, Temperature, calibration, fit_temperature
from holoslide.evaluation.decision import Decision, Threshold, choose_threshold, decide
from holoslide.evaluation.metrics import Metrics, Predictions, measure
from holoslide.evaluation.options import EvaluateConfig, Positive


@dataclass(frozen=True, slots=True)
class Outcome:
    """How good a model is on some slides.

    `patients` is None where each has one slide, or labels of its slides differ; `modules` has the metrics of every
    head. Calibration is None where no validation slides are at hand, with the reason in `lacking`; a decision is
    None for that reason or another, which is in `undecided`. Of more than two classes none is positive.
    """

    metrics: Metrics
    patients: Metrics | None
    modules: tuple[Metrics, ...]
    calibration: Calibration | None = None
    decision: Decision | None = None
    lacking: str = ""
    undecided: str = ""
    positive: Positive | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "positive": self.positive.to_dict() if self.positive else None,
            "slides": self.metrics.to_dict(),
            "patients": self.patients.to_dict() if self.patients else None,
            "modules": [module.to_dict() for module in self.modules],
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "decision": self.decision.to_dict() if self.decision else None,
            "undecided": self.undecided or None,
        }


def assess(
    labels: Sequence[str], by_head_KNC: ArrayLike, patients: Sequence[str], classes: Sequence[str], *,
    valid: Predictions | str, asked: EvaluateConfig, calibrated: bool = False,
) -> Outcome:  # fmt: skip
    """Measure the probabilities of K heads, the last being the prediction's.

    Temperature and threshold come from `valid`, which is a reason where there are no such slides. With
    `calibrated`, the metrics are of the calibrated probabilities, not of the raw ones. Raises `ConfigError` where
    the positive class that was asked for is none.
    """
    positive = Positive.of(classes, asked.positive)
    heads = _heads(labels, by_head_KNC, patients, classes, positive)
    modules, raw = tuple(measure(head) for head in heads), heads[-1]
    if isinstance(valid, str):
        patients_own = patient_metrics(raw)
        return Outcome(modules[-1], patients_own, modules, None, None, valid, valid, positive)
    temperature = fit_temperature(valid)
    metrics, used = modules[-1], raw
    if calibrated:
        used = raw.with_probabilities(temperature.apply(raw.probabilities))
        metrics = measure(used)
    decision, why = None, _undecided(raw)
    if not why:
        valid = replace(valid, positive=raw.positive)
        threshold = choose_threshold(valid, sensitivity=asked.sensitivity)
        why = f"no validation slide is {raw.positive}" if threshold is None else ""
        decision = decide(raw, asked.sensitivity, threshold=threshold) if threshold else None
    judged = calibration(raw, temperature)
    return Outcome(metrics, patient_metrics(used), modules, judged, decision, "", why, positive)


def pool(
    labels: Sequence[str], by_head_KNC: ArrayLike, patients: Sequence[str], classes: Sequence[str], *,
    temperatures: Sequence[Temperature], thresholds: Sequence[Threshold], part_N: Sequence[int],
    positive: Positive | None = None,
) -> Outcome:  # fmt: skip
    """Measure slides of which each was scored by one of several networks, number `part_N`.

    Every slide keeps temperature and threshold of its own network, which come from slides it has not learnt from.
    Where a network lacks one, there is no calibration, or no decision, of the whole.
    """
    heads = _heads(labels, by_head_KNC, patients, classes, positive)
    modules, raw = tuple(measure(head) for head in heads), heads[-1]
    networks = len(set(part_N))
    judged, decision, lacking = None, None, "not every run had validation slides at hand"
    if len(temperatures) == networks:
        rows = [temperatures[i].apply(p) for i, p in zip(part_N, raw.probabilities, strict=True)]
        fitted_on = (sum(one.slides for one in temperatures), len(np.unique(raw.patients)))
        is_any = any(one.value is not None for one in temperatures)
        reason = "every run has its own" if is_any else "no run's validation slides tell a temperature"
        several = Temperature(None, *fitted_on, reason=reason)
        judged, lacking = calibration(raw, several, calibrated=np.stack(rows) if is_any else None), ""
    why = lacking or _undecided(raw)
    if not why and len(thresholds) == networks:
        value_N = np.array([thresholds[i].value for i in part_N])
        decision = decide(raw, thresholds[0].wanted, value_N=value_N)
    elif not why:
        why = f"not every run had a {raw.positive} slide among its validation slides"
    return Outcome(modules[-1], patient_metrics(raw), modules, judged, decision, lacking, why, positive)


def _heads(
    labels: Sequence[str], by_head_KNC: ArrayLike, patients: Sequence[str], classes: Sequence[str],
    positive: Positive | None,
) -> list[Predictions]:  # fmt: skip
    name = positive.name if positive else None
    by_head = np.asarray(by_head_KNC, np.float64)
    return [Predictions.checked(labels, p, patients, classes, positive=name) for p in by_head]


def _undecided(given: Predictions) -> str:
    if given.positive is not None:
        return ""
    return f"a threshold tells two classes apart, and there are {len(given.classes)}"


def patient_metrics(given: Predictions) -> Metrics | None:
    """Metrics of patients, where some have several slides and all of a patient's slides have one label."""
    patients = len(np.unique(given.patients))
    pairs = set(zip(given.patients.tolist(), given.labels.tolist(), strict=True))
    if patients == len(given.patients) or len(pairs) > patients:
        return None
    return measure(given.by_patient())
