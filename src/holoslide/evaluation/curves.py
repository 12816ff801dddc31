"""ROC and precision-recall curves with bands: the same curve for every redraw of the patients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from holoslide.evaluation.bootstrap import draw_weights

Values = NDArray[np.float64]

DRAWS = 500
GRID = np.linspace(0, 1, 101)


@dataclass(frozen=True, slots=True)
class Contest:
    """One class against the rest: of each slide, whether it is of the class, its probability to be, its patient.

    There are slides of the class, and slides of none.
    """

    name: str
    truth_N: NDArray[np.bool_]
    score_N: Values
    patients_N: NDArray[np.str_]

    def roc(self, weights_N: NDArray[np.int64] | None = None) -> tuple[Values, Values]:
        """False and true positive rate, both rising."""
        x, y, _ = roc_curve(self.truth_N, self.score_N, sample_weight=weights_N, drop_intermediate=False)
        return x, y

    def precision_recall(self, weights_N: NDArray[np.int64] | None = None) -> tuple[Values, Values]:
        """Recall, rising, and the precision up to it."""
        precision, recall, _ = precision_recall_curve(self.truth_N, self.score_N, sample_weight=weights_N)
        return recall[::-1], precision[::-1]


@dataclass(frozen=True, slots=True)
class Band:
    """The interval of a curve at each x, from low to high."""

    x: Values
    low: Values
    high: Values


def bands(
    contest: Contest, rng: np.random.Generator, *, draws: int = DRAWS, level: float = 0.95
) -> tuple[Band, Band] | None:
    """Pointwise bands of the ROC and of the precision-recall curve, by redrawing patients with replacement.

    None for a single patient, which has no spread. Draws without a slide of the class, or with no other, have no
    curve; with fewer than half of them left there is no band either.
    """
    if len(np.unique(contest.patients_N)) < 2:
        return None
    sensitivities, precisions = [], []
    for weights_BN in draw_weights(contest.patients_N, draws, rng):
        for weights_N in weights_BN:
            drawn = contest.truth_N[weights_N > 0]
            if not drawn.any() or drawn.all():
                continue
            sensitivities.append(np.interp(GRID, *contest.roc(weights_N)))  # where it rises, its upper end
            recall, precision = contest.precision_recall(weights_N)
            precisions.append(precision[np.searchsorted(recall, GRID).clip(max=len(recall) - 1)])
    if len(sensitivities) < draws / 2:
        return None
    ends = [(1 - level) / 2, (1 + level) / 2]
    of_roc, of_pr = (np.quantile(curves, ends, axis=0) for curves in (sensitivities, precisions))
    return Band(GRID, *of_roc), Band(GRID, *of_pr)
