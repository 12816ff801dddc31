"""What happened in each epoch: one flat row of numbers, and what follows from the rows."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from holoslide.training.options import Monitor

Row = dict[str, float]


def numbered(prefix: str, values: Sequence[float]) -> Row:
    """One entry per module, counted from 1 as the paper does.

    >>> numbered("train/loss", [0.5, 0.25])
    {'train/loss_1': 0.5, 'train/loss_2': 0.25}
    """
    return {f"{prefix}_{k}": float(value) for k, value in enumerate(values, start=1)}


def module_auroc(targets_N: NDArray[np.int64], probabilities_NL: NDArray[np.float64]) -> float:
    """Area under the ROC curve, for three classes and more the mean over each against the rest.

    NaN if only one class is there. It gets probabilities, not logits.
    """
    from sklearn.metrics import roc_auc_score  # slow to import, and only needed here

    present = np.unique(targets_N)
    if len(present) < 2:
        return math.nan
    areas = [roc_auc_score(targets_N == label, probabilities_NL[:, label]) for label in present]
    return float(areas[-1] if probabilities_NL.shape[1] == 2 else np.mean(areas))


def best_row(history: Sequence[Row], *, monitor: Monitor, modules: int) -> int:
    """The row whose last module was best on the validation slides; the first of equals.

    Few slides make AUROC a coarse measure: the lower loss decides between equal ones.
    """
    auroc, loss = f"valid/auroc_{modules}", f"valid/loss_{modules}"

    def score(i: int) -> tuple[float, float]:
        lower = _finite(-history[i][loss])
        return (_finite(history[i][auroc]), lower) if monitor == "auroc" else (lower, 0.0)

    return max(range(len(history)), key=score)  # max gives the first of equals


def _finite(value: float) -> float:
    return -math.inf if math.isnan(value) else value


def peaks(device: torch.device) -> Row:
    """The most memory this process has held: resident set, and on the device."""
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {
        "peak_rss_bytes": rss * (1 if sys.platform == "darwin" else 1024),
        "peak_device_bytes": on_device,
    }


def resident_bytes() -> int:
    """What this process holds now; 0 where the system does not tell."""
    path = Path("/proc/self/statm")
    if not path.exists():
        return 0
    return int(path.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
