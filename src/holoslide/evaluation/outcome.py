"""All that is measured of one set of predictions: metrics, every module's, calibration, and a decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from holoslide.evaluation.calibration import Calibration, Temperature, calibration, fit_temperature
from holoslide.evaluation.decision import Decision, Threshold, choose_threshold, decide
from holoslide.evaluation.metrics import Metrics, Predictions, compute_metrics


@dataclass(frozen=True, slots=True)
class Outcome:
    """How good a model is on some slides.

    `patients` is None where each has one slide, or labels of its slides differ; `modules` has the metrics of every
    head. Calibration and decision are None where no validation slides are at hand, with the reason in `lacking`.
    """

    metrics: Metrics
    patients: Metrics | None
    modules: tuple[Metrics, ...]
    calibration: Calibration | None = None
    decision: Decision | None = None
    lacking: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "slides": self.metrics.to_dict(),
            "patients": self.patients.to_dict() if self.patients else None,
            "modules": [module.to_dict() for module in self.modules],
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "decision": self.decision.to_dict() if self.decision else None,
        }


def assess(
    labels: Sequence[str], by_head_KNC: ArrayLike, patients: Sequence[str], classes: Sequence[str], *,
    valid: Predictions | str, sensitivity: float, calibrated: bool = False,
) -> Outcome:  # fmt: skip
    """Measure the probabilities of K heads, the last being the prediction's.

    Temperature and threshold come from `valid`, which is a reason where there are no such slides. With
    `calibrated`, the metrics are of the calibrated probabilities, not of the raw ones.
    """
    by_head = np.asarray(by_head_KNC, np.float64)
    modules = tuple(compute_metrics(labels, p, patients, classes) for p in by_head)
    raw = Predictions.checked(labels, by_head[-1], patients, classes)
    if isinstance(valid, str):
        return Outcome(modules[-1], patient_metrics(raw), modules, lacking=valid)
    temperature = fit_temperature(valid)
    metrics, used = modules[-1], raw
    if calibrated:
        used = Predictions(raw.labels, temperature.apply(raw.probabilities), raw.patients, raw.classes)
        metrics = compute_metrics(labels, used.probabilities, patients, classes)
    decision = None
    if len(raw.classes) == 2 and (threshold := choose_threshold(valid, sensitivity=sensitivity)):
        decision = decide(raw, sensitivity, threshold=threshold)
    return Outcome(metrics, patient_metrics(used), modules, calibration(raw, temperature), decision)


def pool(
    labels: Sequence[str], by_head_KNC: ArrayLike, patients: Sequence[str], classes: Sequence[str], *,
    temperatures: Sequence[Temperature], thresholds: Sequence[Threshold], part_N: Sequence[int],
) -> Outcome:  # fmt: skip
    """Measure slides of which each was scored by one of several networks, number `part_N`.

    Every slide keeps temperature and threshold of its own network, which come from slides it has not learnt from.
    Where a network lacks one, there is no calibration, or no decision, of the whole.
    """
    by_head = np.asarray(by_head_KNC, np.float64)
    modules = tuple(compute_metrics(labels, p, patients, classes) for p in by_head)
    raw = Predictions.checked(labels, by_head[-1], patients, classes)
    networks = len(set(part_N))
    judged, decision, lacking = None, None, "not every run had validation slides at hand"
    if len(temperatures) == networks:
        rows = [temperatures[i].apply(p) for i, p in zip(part_N, raw.probabilities, strict=True)]
        fitted_on = (sum(one.slides for one in temperatures), len(np.unique(raw.patients)))
        several = Temperature(None, *fitted_on, reason="every run has its own")
        judged, lacking = calibration(raw, several, calibrated=np.stack(rows)), ""
    if len(thresholds) == networks and len(raw.classes) == 2:
        value_N = np.array([thresholds[i].value for i in part_N])
        decision = decide(raw, thresholds[0].wanted, value_N=value_N)
    return Outcome(modules[-1], patient_metrics(raw), modules, judged, decision, lacking)


def patient_metrics(given: Predictions) -> Metrics | None:
    """Metrics of patients, where some have several slides and all of a patient's slides have one label."""
    patients = len(np.unique(given.patients))
    pairs = set(zip(given.patients.tolist(), given.labels.tolist(), strict=True))
    if patients == len(given.patients) or len(pairs) > patients:
        return None
    mean = given.by_patient()
    return compute_metrics(mean.labels, mean.probabilities, mean.patients, mean.classes)
