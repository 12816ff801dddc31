"""Intervals by formula, with patients counted: what so many patients cannot rule out, whatever was drawn.

Both ask which true values would give what was seen, so they are wide where nothing was wrong, and narrow as
patients are added.
"""

from __future__ import annotations

import math

from scipy.optimize import brentq
from scipy.special import ndtri

LEVEL = 0.95
_Z = float(ndtri((1 + LEVEL) / 2))


def wilson(share: float, cases: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of so many independent cases (1927).

    >>> [round(x, 3) for x in wilson(1.0, 12)]
    [0.758, 1.0]
    """
    z2 = _Z**2
    centre = (share + z2 / (2 * cases)) / (1 + z2 / cases)
    half = _Z * math.sqrt(max(0.0, share * (1 - share)) / cases + z2 / (4 * cases**2)) / (1 + z2 / cases)
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def auroc_interval(auroc: float, positives: int, negatives: int) -> tuple[float, float]:
    """The 95 % score interval of an AUROC of so many cases of either kind (Newcombe 2006, method 5).

    Its ends are the true values from which the AUROC seen is 1.96 standard deviations away, by Hanley's and
    McNeil's variance.

    >>> [round(x, 3) for x in auroc_interval(1.0, 8, 8)]
    [0.756, 1.0]
    """
    number = (positives + negatives) / 2 - 1

    def excess(true: float) -> float:
        more = number * ((1 - true) / (2 - true) + true / (1 + true))
        variance = true * (1 - true) * (1 + more) / (positives * negatives)
        return (auroc - true) ** 2 - _Z**2 * variance

    inside = min(max(auroc, 1e-9), 1 - 1e-9)  # where the excess is below zero, also of what is perfect
    low = brentq(excess, 0.0, inside) if auroc > 0 else 0.0
    high = brentq(excess, inside, 1.0) if auroc < 1 else 1.0
    return float(low), float(high)
