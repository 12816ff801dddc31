"""What is wrong with a phantom slide, drawn onto its pixels: out-of-focus areas, bubbles, edges, hair, dust.

All lengths are in um; each flaw is drawn in place.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from holoslide.slides._ground import CELL_UM
from holoslide.slides._paint import Outline, Places, Plane


def out_of_focus(
    rgb: NDArray[np.uint8], depth_um: Plane, mpp: float, noise: float, rng: np.random.Generator
) -> Plane:
    """Blur an area of the tissue, and put the sensor's noise back on it; gives where it is, (H, W), 0 to 1."""
    inside = np.argwhere(depth_um > 0.5 * depth_um.max())
    place = (inside[rng.integers(len(inside))] + 0.5) * CELL_UM
    outline = Outline(float(rng.uniform(400, 650)), 0.25, rng)
    axes = [
        ((np.arange(side) + 0.5) * mpp - at).astype(np.float32)
        for side, at in zip(rgb.shape[:2], place, strict=True)
    ]
    y_um, x_um = np.meshgrid(*axes, indexing="ij")
    share = outline.inside(np.asarray(y_um, np.float32), np.asarray(x_um, np.float32), 40)
    sigma_px = float(rng.uniform(6, 10)) / mpp
    soft = np.asarray(cv2.GaussianBlur(rgb.astype(np.float32), (0, 0), sigma_px), np.float32)
    soft += rng.standard_normal(rgb.shape[:2], dtype=np.float32)[..., None] * np.float32(noise)
    mixed = rgb + (soft - rgb) * share[..., None]
    rgb[:] = cv2.convertScaleAbs(np.maximum(mixed, 0))
    return np.asarray(share, np.float32)


def debris(rgb: NDArray[np.uint8], mpp: float, rng: np.random.Generator) -> None:
    """The edge of a coverslip, three bubbles, a hair, and dust."""
    height, width = (side * mpp for side in rgb.shape[:2])
    at = rng.uniform(0.02, 0.08) * width
    tilt = rng.normal(0, 0.01) * height
    _line(rgb, np.array([[0.0, at], [height, at + tilt]]), float(rng.uniform(10, 18)), 0.5, mpp)
    for _ in range(3):
        radius, turn = rng.uniform(80, 350), np.linspace(0, 2 * math.pi, 100)
        centre = rng.uniform(0.05, 0.95, 2) * (height, width)
        rim = centre + radius * np.stack([np.sin(turn), np.cos(turn)], 1)
        _line(rgb, rim, float(rng.uniform(12, 22)), 0.4, mpp)
    steps = np.cumsum(rng.normal(0, 0.12, 80))
    hair = rng.uniform(0.1, 0.9, 2) * (height, width) + 12 * np.cumsum(
        np.stack([np.sin(steps), np.cos(steps)], 1), 0
    )
    _line(rgb, hair, 12.0, 0.45, mpp)
    for _ in range(40):
        centre = rng.uniform(0, 1, 2) * (height, width)
        _line(rgb, np.stack([centre, centre + rng.uniform(-12, 12, 2)]), float(rng.uniform(8, 40)), 0.35, mpp)


def _line(rgb: NDArray[np.uint8], line_um: Places, width_um: float, let_through: float, mpp: float) -> None:
    """Darken along a line, all colours alike."""
    stroke = np.zeros(rgb.shape[:2], np.uint8)
    points = np.rint(line_um[:, ::-1] / mpp * 16).astype(np.int32)
    cv2.polylines(stroke, [points], isClosed=False, color=255, thickness=max(1, round(width_um / mpp)),
                  lineType=cv2.LINE_AA, shift=4)  # fmt: skip
    soft = cv2.GaussianBlur(stroke, (0, 0), max(0.3, 3 / mpp)).astype(np.float32) * np.float32(1 / 255)
    rgb[:] = (rgb * (1 - (1 - let_through) * soft)[..., None]).astype(np.uint8)
