"""Train a neural network on entire pathology whole-slide images, from one label per slide.

The names below are the public interface; each is imported when it is first used, so that this is cheap.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# PyTorch reads this once, at the first tensor; see `streaming/host.py`. Set it to 0 to have small pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# PyTorch's OpenMP reads this when it is loaded. Threads that spin while they wait for the slowest of them keep it
# from a core as soon as anything else runs on the machine: a step then took several times as long (see
# `benchmarks/busy.py`).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    from holoslide.api import Run, evaluate, fit, heatmap, predict, score
    from holoslide.config import RunConfig
    from holoslide.inference.heatmap import Heatmap
    from holoslide.models.classifier import LocalClassifier
    from holoslide.predictions import Prediction
    from holoslide.results import Evaluation
    from holoslide.slides.cohort import Cohort
    from holoslide.slides.raster import Raster
    from holoslide.slides.reader import open_slide

__all__ = [
    "Cohort",
    "Evaluation",
    "Heatmap",
    "LocalClassifier",
    "Prediction",
    "Raster",
    "Run",
    "RunConfig",
    "evaluate",
    "fit",
    "heatmap",
    "open_slide",
    "predict",
    "score",
]

_HOMES = {
    "Cohort": "slides.cohort",
    "Evaluation": "results",
    "Heatmap": "inference.heatmap",
    "LocalClassifier": "models.classifier",
    "Prediction": "predictions",
    "Raster": "slides.raster",
    "Run": "api",
    "RunConfig": "config",
    "evaluate": "api",
    "fit": "api",
    "heatmap": "api",
    "open_slide": "slides.reader",
    "predict": "api",
    "score": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        message = f"module 'holoslide' has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(f"holoslide.{_HOMES[name]}"), name)
