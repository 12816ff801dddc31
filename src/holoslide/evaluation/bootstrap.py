"""Resampling patients with replacement, all draws at once: a draw is a whole-number weight for each slide.

B draws, N slides, C classes. What is undefined in a draw (no slide of a class) is NaN here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.int64]
Values = NDArray[np.float64]

CHUNK = 2**21  # weights held at a time


def draw_weights(patients_N: NDArray[np.str_], draws: int, rng: np.random.Generator) -> Iterator[Weights]:
    """How often each slide is drawn, (B, N), in some chunks that make `draws` together.

    As many patients are drawn as there are, with all their slides; the order of the slides plays no part.
    """
    names, patient_N = np.unique(patients_N, return_inverse=True)
    equal = np.full(len(names), 1 / len(names))
    step = max(1, CHUNK // len(patients_N))
    for start in range(0, draws, step):
        times_BP = rng.multinomial(len(names), equal, size=min(step, draws - start))
        yield times_BP[:, patient_N].astype(np.int64)


def weighted_auroc(weights_BN: Weights, is_positive_N: NDArray[np.bool_], scores_N: Values) -> Values:
    """The chance that a positive scores higher than a negative, ties counting half; NaN without either. (B,)"""
    positive_BG, negative_BG = _tied(weights_BN, is_positive_N, scores_N)
    below_BG = np.cumsum(negative_BG, axis=1) - negative_BG
    twice_won_B = (positive_BG * (2 * below_BG + negative_BG)).sum(axis=1)
    return _ratio(twice_won_B, 2 * positive_BG.sum(axis=1) * negative_BG.sum(axis=1))


def weighted_auprc(weights_BN: Weights, is_positive_N: NDArray[np.bool_], scores_N: Values) -> Values:
    """Average precision, as scikit-learn defines it: sum of precision times gain in recall. (B,)

    NaN without a positive.
    """
    positive_BG, negative_BG = (part[:, ::-1] for part in _tied(weights_BN, is_positive_N, scores_N))
    hits_BG, misses_BG = np.cumsum(positive_BG, axis=1), np.cumsum(negative_BG, axis=1)
    precision_BG = hits_BG / np.maximum(hits_BG + misses_BG, 1)  # nothing drawn so far is no gain either
    return _ratio((positive_BG * precision_BG).sum(axis=1), positive_BG.sum(axis=1))


def weighted_confusion(
    weights_BN: Weights, labels_N: NDArray[np.int64], predicted_N: NDArray[np.int64], classes: int
) -> Weights:
    """Slides by label and prediction, (B, C, C)."""
    cell_N = labels_N * classes + predicted_N
    one_hot_NX = np.eye(classes * classes)[cell_N]
    counts_BX: Weights = np.rint(weights_BN @ one_hot_NX).astype(np.int64)
    return counts_BX.reshape(len(weights_BN), classes, classes)


def statistics(
    weights_BN: Weights, labels_N: NDArray[np.int64], probabilities_NC: Values, losses_N: Values
) -> dict[str, Values]:
    """Every measure of `metrics.py` in each draw, (B,); by class as "auroc 0", "auroc 1" and so on."""
    classes = probabilities_NC.shape[1]
    confusion_BCC = weighted_confusion(weights_BN, labels_N, probabilities_NC.argmax(axis=1), classes)
    hits_BC = np.diagonal(confusion_BCC, axis1=1, axis2=2)
    of_class_BC, as_class_BC = confusion_BCC.sum(axis=2), confusion_BCC.sum(axis=1)
    slides_B = weights_BN.sum(axis=1)
    by_class: dict[str, list[Values]] = {"auroc": [], "auprc": [], "f1": []}
    for c in range(classes):
        is_c, scores = labels_N == c, probabilities_NC[:, c]
        by_class["auroc"].append(weighted_auroc(weights_BN, is_c, scores))
        by_class["auprc"].append(weighted_auprc(weights_BN, is_c, scores))
        by_class["f1"].append(_ratio(2 * hits_BC[:, c], of_class_BC[:, c] + as_class_BC[:, c]))
    found = {f"{name} {c}": values for name, each in by_class.items() for c, values in enumerate(each)}
    found |= {f"macro {name}": np.mean(each, axis=0) for name, each in by_class.items()}
    found["accuracy"] = _ratio(hits_BC.sum(axis=1), slides_B)
    found["balanced accuracy"] = _ratio(hits_BC, of_class_BC).mean(axis=1)
    found["log loss"] = _ratio(weights_BN @ losses_N, slides_B)
    return found


def _tied(weights_BN: Weights, is_positive_N: NDArray[np.bool_], scores_N: Values) -> tuple[Weights, Weights]:
    """Positives and negatives of each distinct score, lowest first, (B, G) each."""
    order_N = np.argsort(scores_N, kind="stable")
    sorted_N = scores_N[order_N]
    starts_G = np.flatnonzero(np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]]))
    sorted_BN, positive_N = weights_BN[:, order_N], is_positive_N[order_N]
    positive_BG = np.add.reduceat(sorted_BN * positive_N, starts_G, axis=1)
    return positive_BG, np.add.reduceat(sorted_BN * ~positive_N, starts_G, axis=1)


def _ratio(above: NDArray[np.generic], below: NDArray[np.generic]) -> Values:
    """above / below, NaN where below is 0."""
    result = np.full(np.shape(below), np.nan)
    np.divide(above, below, out=result, where=np.asarray(below) != 0)
    return result
