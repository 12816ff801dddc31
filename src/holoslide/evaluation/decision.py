"""A yes or no at a sensitivity that was asked for: the threshold from validation slides, the result on others.

Slides of one patient are no independent cases, so the intervals (Wilson's) count patients. Resampling would give
no interval at all where every slide is found, which is just where one is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holoslide.evaluation.bootstrap import Values
from holoslide.evaluation.intervals import wilson
from holoslide.evaluation.metrics import Interval, Predictions


@dataclass(frozen=True, slots=True)
class Threshold:
    """Slides whose raw probability of the positive class is at least `value` are called positive.

    It is the highest that finds a share of at least `wanted` of the validation slides of that class: `found` of
    `positives`. Of the others there were `negatives`, of which `spared` are below it.
    """

    value: float
    wanted: float
    found: int
    positives: int
    negatives: int
    spared: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What a threshold comes to on the scored slides; `calls` counts slides, rows being (others, positive).

    `called` says of each slide whether it is called positive. `threshold` is None where the slides were scored by
    several networks, each with its own.
    """

    wanted: float
    threshold: Threshold | None
    positive: str
    calls: tuple[tuple[int, int], tuple[int, int]]
    sensitivity: Interval
    specificity: Interval
    ppv: Interval
    npv: Interval
    called: tuple[bool, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON, without each slide's call."""
        return {name: value for name, value in asdict(self).items() if name != "called"}


def choose_threshold(valid: Predictions, *, sensitivity: float) -> Threshold | None:
    """The threshold for a sensitivity, from validation slides; None where there is no positive among them.

    Raises `HoloslideError` for other than two classes.
    """
    is_positive, scores = valid.of_positive
    found = np.sort(scores[is_positive])[::-1]
    if not len(found):
        return None
    needed = int(np.ceil(sensitivity * len(found) - 1e-9))
    value = float(found[max(needed, 1) - 1])
    others = scores[~is_positive]
    spared = int((others < value).sum())
    return Threshold(value, sensitivity, int((found >= value).sum()), len(found), len(others), spared)


def decide(
    scored: Predictions,
    wanted: float,
    *,
    threshold: Threshold | None = None,
    value_N: Values | None = None,
) -> Decision:
    """Call the scored slides by a threshold, or by each slide's own, (N,)."""
    if threshold is not None:
        value_N = np.full(len(scored.labels), threshold.value)
    assert value_N is not None
    is_positive, scores = scored.of_positive
    called = scores >= value_N
    positive = scored.positive or ""
    shares: Mapping[str, tuple[NDArray[np.bool_], NDArray[np.bool_], str]] = {
        "sensitivity": (is_positive, called, f"no slide is of class {positive}"),
        "specificity": (~is_positive, ~called, f"every slide is of class {positive}"),
        "ppv": (called, is_positive, "no slide is called positive"),
        "npv": (~called, ~is_positive, "every slide is called positive"),
    }
    calls = [
        [int((row & column).sum()) for column in (~called, called)] for row in (~is_positive, is_positive)
    ]
    return Decision(
        wanted,
        threshold,
        positive,
        ((calls[0][0], calls[0][1]), (calls[1][0], calls[1][1])),
        **{name: _share(among, hit, scored.patients, why) for name, (among, hit, why) in shares.items()},
        called=tuple(called.tolist()),
    )


def _share(
    among: NDArray[np.bool_], hit: NDArray[np.bool_], patients: NDArray[np.str_], reason: str
) -> Interval:
    of, hits = int(among.sum()), int((among & hit).sum())
    if not of:
        return Interval(None, None, None, reason=reason)
    return Interval(hits / of, *wilson(hits / of, len(np.unique(patients[among]))))
