"""Simple slides for the tests of tissue and rasters: blobs of grainy stain on glass, losslessly stored."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

STAIN = (200, 120, 170)
LAMP = (244, 244, 244)


def blobs(shape: tuple[int, int], *, count: int = 3, seed: int = 0, reach: float = 0.2) -> NDArray[np.bool_]:
    """Ellipses well inside a picture; `reach` is their largest half-axis, as a share of the shorter side."""
    rng = np.random.default_rng(seed)
    mask, side = np.zeros(shape, np.uint8), min(shape)
    for _ in range(count):
        centre = tuple(int(rng.uniform(0.3, 0.7) * n) for n in reversed(shape))
        axes = tuple(int(rng.uniform(0.5, 1) * reach * side) for _ in range(2))
        cv2.ellipse(mask, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
    return mask.astype(np.bool_)


def paint(
    tissue: NDArray[np.bool_],
    *,
    stain: tuple[int, int, int] = STAIN,
    lamp: tuple[int, int, int] = LAMP,
    noise: float = 1.5,
    grain: float = 8.0,
    seed: int = 1,
) -> NDArray[np.uint8]:
    """Grainy stain where there is tissue, the lamp's colour elsewhere, sensor noise on both."""
    rng = np.random.default_rng(seed)
    texture = cv2.GaussianBlur(rng.normal(size=tissue.shape).astype(np.float32), (0, 0), 2)
    stained = np.array(stain, np.float32) + (grain / texture.std() * texture)[..., None]
    light = np.where(tissue[..., None], stained, np.array(lamp, np.float32))
    return np.clip(np.rint(light + rng.normal(0, noise, light.shape)), 0, 255).astype(np.uint8)


def write_slide(path: Path, rgb: NDArray[np.uint8], mpp: float, mpp_x: float | None = None) -> Path:
    """A tiled TIFF of one level that says its resolution; `mpp_x` where the pixels are not square."""
    tifffile.imwrite(
        path, rgb, tile=(256, 256), compression="zlib", photometric="rgb", metadata=None,
        resolution=(10_000 / (mpp_x or mpp), 10_000 / mpp), resolutionunit="CENTIMETER",
    )  # fmt: skip
    return path


def iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Intersection over union."""
    return float((a & b).sum() / max(1, (a | b).sum()))
