"""Whether probabilities mean what they say, and the one number that mends them: a temperature.

N slides, C classes, B bins. The temperature divides the logits (Guo et al. 2017, arXiv 1706.04599). It is fitted on
validation slides and judged on others. It changes no predicted class and, of two classes, no ranking of the
slides; of more, two slides may change places by what they say of the other classes. Log probabilities serve as
logits, since a softmax forgets what is added to all of them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar

from holoslide.evaluation.bootstrap import Values
from holoslide.evaluation.intervals import LEVEL, wilson
from holoslide.evaluation.metrics import Predictions

BINS = 10
DRAWS = 1000
_EPS = np.finfo(np.float64).eps
LEAST, MOST = 1 / 50, 50.0  # temperatures beyond these are no answer, but the lack of one


@dataclass(frozen=True, slots=True)
class Temperature:
    """What the logits are divided by. None, with the `reason`, where the validation slides do not tell.

    `slides` and `patients` are those it was fitted on.
    """

    value: float | None
    slides: int
    patients: int
    reason: str | None = None

    def apply(self, probabilities: ArrayLike) -> Values:
        """Calibrated probabilities, (..., C); unchanged where there is no temperature."""
        return tempered(probabilities, 1.0 if self.value is None else self.value)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Bin:
    """Slides of about one probability: how many, their mean probability, and the share that came true.

    `low` to `high` is Wilson's interval of that share, with patients counted: slides of one are no independent
    cases.
    """

    slides: int
    patients: int
    stated: float
    observed: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Reliability:
    """Stated probabilities against what came true.

    Of two classes those of the positive one, which is `of`; of more, those of the predicted class. `ece` is the
    mean distance over the slides, in bins of equal width; a network that states the truth would by chance alone
    come to `ece_by_chance` (low, high) on slides of so many patients, those of one going together. `brier` and
    `log_loss` are means over the slides.
    """

    of: str | None
    bins: tuple[Bin, ...]
    ece: float
    ece_by_chance: tuple[float, float]
    brier: float
    log_loss: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """The temperature, and the reliability of the scored slides before it and after (None without one)."""

    temperature: Temperature
    before: Reliability
    after: Reliability | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def tempered(probabilities: ArrayLike, temperature: float) -> Values:
    """Probabilities (..., C) after their logits are divided by a temperature.

    >>> tempered([0.8, 0.2], 2.0).round(4).tolist()
    [0.6667, 0.3333]
    """
    logits = _logs(np.asarray(probabilities, np.float64)) / temperature
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Values = shifted / shifted.sum(axis=-1, keepdims=True)
    return result


def fit_temperature(valid: Predictions) -> Temperature:
    """The temperature of least log loss on validation slides, or why there is none."""
    logs_NC, rows = _logs(valid.probabilities), np.arange(len(valid.labels))
    slides, patients = len(valid.labels), len(np.unique(valid.patients))

    def loss(log_temperature: float) -> float:
        scaled = logs_NC / math.exp(log_temperature)
        return float(np.mean(np.logaddexp.reduce(scaled, axis=1) - scaled[rows, valid.labels]))

    found = minimize_scalar(loss, bounds=(math.log(LEAST), math.log(MOST)), method="bounded")
    value = math.exp(float(found.x))
    sharpest = "and then the sharpest would look best"
    if (logs_NC.argmax(axis=1) == valid.labels).all():
        return Temperature(None, slides, patients, f"every validation slide is right, {sharpest}")
    if value < LEAST / 0.95:
        return Temperature(
            None, slides, patients, f"every validation slide is right or nearly so, {sharpest}"
        )
    # Of probabilities that are all alike, every temperature is as good as any.
    if value > 0.95 * MOST or found.fun > math.log(len(valid.classes)) - 1e-9:
        return Temperature(
            None, slides, patients, "the validation slides are answered no better than by guessing"
        )
    return Temperature(value, slides, patients)


def reliability(given: Predictions, *, seed: int = 0) -> Reliability:
    """How far the probabilities of some slides are from what came true."""
    is_binary, slides = given.positive is not None, np.arange(len(given.labels))
    if is_binary:
        came_true, stated = given.of_positive
    else:
        picked = given.probabilities.argmax(axis=1)
        came_true, stated = given.labels == picked, given.probabilities[slides, picked]
    names, patient_N = np.unique(given.patients, return_inverse=True)
    bin_N = np.minimum((stated * BINS).astype(np.intp), BINS - 1)
    rng = np.random.default_rng(seed)
    by_chance = [_ece(stated, rng.random(len(names))[patient_N] < stated, bin_N) for _ in range(DRAWS)]
    low, high = np.quantile(by_chance, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    one_hot = np.eye(len(given.classes))[given.labels]
    # Kept off 0 and 1 as in the log loss of the measures.
    own = np.clip(given.probabilities[slides, given.labels], _EPS, 1 - _EPS)
    return Reliability(
        of=given.positive,
        bins=tuple(
            _bin(stated[here], came_true[here], patient_N[here])
            for here in (bin_N == b for b in np.unique(bin_N))
        ),
        ece=_ece(stated, came_true, bin_N),
        ece_by_chance=(float(low), float(high)),
        brier=float(((given.probabilities - one_hot) ** 2).sum(axis=1).mean()) / (2 if is_binary else 1),
        log_loss=float(-np.log(own).mean()),
    )


def calibration(
    scored: Predictions, temperature: Temperature, *, calibrated: Values | None = None
) -> Calibration:
    """Judge a temperature on the scored slides.

    `calibrated` (N, C) replaces what the one temperature gives, where the slides were scored by several networks.
    """
    if temperature.value is None and calibrated is None:
        return Calibration(temperature, reliability(scored), None)
    after = temperature.apply(scored.probabilities) if calibrated is None else calibrated
    return Calibration(temperature, reliability(scored), reliability(scored.with_probabilities(after)))


def _ece(stated_N: Values, came_true_N: NDArray[np.bool_], bin_N: NDArray[np.intp]) -> float:
    gaps = np.bincount(bin_N, weights=came_true_N - stated_N, minlength=BINS)
    return float(np.abs(gaps).sum() / len(stated_N))


def _bin(stated: Values, came_true: NDArray[np.bool_], patient: NDArray[np.intp]) -> Bin:
    share, patients = float(came_true.mean()), len(np.unique(patient))
    return Bin(len(stated), patients, float(stated.mean()), share, *wilson(share, patients))


def _logs(probabilities: Values) -> Values:
    result: Values = np.log(np.maximum(probabilities, 1e-12))
    return result
