"""ROC and precision-recall curves with bands: the same curve for every redraw of the patients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from holoslide.evaluation.bootstrap import Values, Weights, draw_weights

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

    def roc(self, weights_N: Weights | None = None) -> tuple[Values, Values]:
        """False and true positive rate, both rising, with a point for each distinct score.

        A weight is how often a slide counts; there must be weight on both sides.
        """
        hits_G, misses_G = self._called(weights_N)
        return misses_G / misses_G[-1], hits_G / hits_G[-1]

    def precision_recall(self, weights_N: Weights | None = None) -> tuple[Values, Values]:
        """Recall, rising from 0, and the precision there; 1 where nothing is called positive yet."""
        hits_G, misses_G = self._called(weights_N)
        called_G = hits_G + misses_G
        return hits_G / hits_G[-1], np.divide(
            hits_G, called_G, out=np.ones(len(called_G)), where=called_G > 0
        )

    def _called(self, weights_N: Weights | None) -> tuple[Values, Values]:
        """Slides of the class, and others, that score at least each distinct score, highest first after none."""
        weights_N = np.ones(len(self.truth_N), np.int64) if weights_N is None else weights_N
        order = np.argsort(-self.score_N, kind="stable")
        sorted_N = self.score_N[order]
        last_G = np.flatnonzero(np.concatenate([sorted_N[1:] != sorted_N[:-1], [True]]))
        hits_N, all_N = np.cumsum(weights_N[order] * self.truth_N[order]), np.cumsum(weights_N[order])
        hits_G = np.concatenate([[0.0], hits_N[last_G]])
        return hits_G, np.concatenate([[0.0], all_N[last_G]]) - hits_G


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
