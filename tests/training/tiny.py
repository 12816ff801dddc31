"""A network, slides and settings so small that a run takes a second."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from holoslide.geometry import Box
from holoslide.models.classifier import LocalClassifier
from holoslide.models.options import (
    BackboneConfig,
    HeadConfig,
    ModelConfig,
    ReconstructionConfig,
    StreamConfig,
)
from holoslide.slides.augment import AugmentConfig
from holoslide.training.loop import FitResult, Sample, fit
from holoslide.training.options import TrainConfig

MASK_CELL_PX = 16
GLASS = np.array([240, 240, 240], np.uint8)


@dataclass
class ArrayPixels:
    """A slide in memory."""

    rgb: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    mask_cell_px: int = MASK_CELL_PX
    glass: NDArray[np.uint8] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.glass = GLASS

    @property
    def shape_px(self) -> tuple[int, int]:
        return self.rgb.shape[0], self.rgb.shape[1]

    def read(self, box_px: Box) -> NDArray[np.uint8]:
        out = np.broadcast_to(GLASS, (*box_px.shape, 3)).copy()
        part = box_px.intersect(Box(0, 0, *self.shape_px))
        if part.area:
            out[part.relative_to(box_px).slices] = self.rgb[part.slices]
        return out


@contextmanager
def open_npz(path: Path) -> Iterator[ArrayPixels]:
    with np.load(path) as data:
        yield ArrayPixels(data["rgb"], data["mask"])


def write_slide(path: Path, target: int, *, seed: int) -> None:
    """Noise with tissue in part of it; the class is in the colour."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(4, 7, size=2)
    mask = rng.random(cells) < 0.7
    mask[0, 0] = True
    rgb = rng.integers(0, 200, size=(*(cells * MASK_CELL_PX), 3)).astype(np.uint8)
    rgb[..., target] += 55
    tissue = np.kron(mask, np.ones((MASK_CELL_PX, MASK_CELL_PX), np.bool_))
    rgb[~tissue] = GLASS
    np.savez(path, rgb=rgb, mask=mask)


def cohort(folder: Path, *, train: int = 5, valid: int = 4) -> tuple[list[Sample], list[Sample]]:
    """Slides of two classes in turn, on disk."""
    samples = []
    for i in range(train + valid):
        path = folder / f"slide{i}.npz"
        if not path.exists():
            write_slide(path, i % 2, seed=i)
        samples.append(Sample(f"slide{i}", f"patient{i}", i % 2, path))
    return samples[:train], samples[train:]


def model(*, modules: int = 2, dtype: torch.dtype = torch.float32, **more: Any) -> LocalClassifier:
    """Two blocks of a ResNet-18, with weights that are the same each time."""
    return copy.deepcopy(_model(modules, **more)).to(dtype)


@cache
def _model(modules: int, **more: Any) -> LocalClassifier:
    settings = ModelConfig(
        backbone=BackboneConfig(name="resnet18", weights="none", truncate="layer1"),
        modules=modules,
        heads=HeadConfig(kernel=3),
        reconstruction=ReconstructionConfig(patches=2, side=4),
        **more,
    )
    generator = torch.Generator().manual_seed(1)
    return LocalClassifier.from_config(settings, classes=("red", "green"), generator=generator)


def config(**changes: Any) -> TrainConfig:
    """All parts from the first step, at rates that a few steps show."""
    plain = {"schedule": "step", "average": 0.0, "precision": "32", "accelerator": "cpu"}
    few = {"epochs": 2, "lr": 1e-3, "backbone_lr_ratio": 0.5, "heads_first": 0.0, "accumulate": 2}
    return TrainConfig(**(few | plain | changes))


def run(
    out: Path,
    slides: tuple[Sequence[Sample], Sequence[Sample]],
    *,
    trained: LocalClassifier | None = None,
    **more: Any,
) -> FitResult:
    """`fit` with all that tests do not care about filled in."""
    defaults = {
        "config": config(),
        "stream": StreamConfig(),
        "augment": AugmentConfig(),
        "open_pixels": open_npz,
    }
    return fit(model() if trained is None else trained, *slides, out=out, **(defaults | more))
