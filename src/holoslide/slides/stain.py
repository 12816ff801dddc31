"""Stain as light sees it: a slide's own two dyes found and turned into reference ones, and dyes varied in training.

In optical density, -ln((I + 1) / I0), amounts of dye add up (Beer and Lambert): a matrix (3, 3) on it changes the
colours or the amounts of the dyes, and leaves what has no density, bare glass, as it is. The dyes of a slide are
found after Macenko et al. (ISBI 2009) by torchstain, on pixels of tissue alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from holoslide.errors import ConfigError, SlideError
from holoslide.geometry import Box
from holoslide.slides.facts import shown
from holoslide.slides.morphology import Mask

LIGHT = 240.0  # I0 where dyes are found: the value of bare glass, as in Macenko's own programs
WINDOWS, WINDOW_PX = 32, 128  # how much of a slide is looked at
LEAST_PX = 1000  # of stained tissue, from which dyes can be told
LEAST_DENSITY = 0.15  # in each channel; below is glass
LEAST_ANGLE = math.radians(5)  # between the two dyes; there is but one below

# The usual reference: directions of haematoxylin and eosin in density (R, G, B), and the 99th percentile of each.
HAEMATOXYLIN, EOSIN = (0.5626, 0.7201, 0.4062), (0.2159, 0.8012, 0.5581)
MOST = (1.9705, 1.0308)

Dyes = tuple[float, float, float, float, float, float, float, float]
RGB = NDArray[np.uint8]
Matrix = NDArray[np.float64]


def through_density(rgb: RGB, matrix: Matrix, light: float) -> RGB:
    """RGB (h, w, 3) with a matrix (3, 3) applied to its optical density."""
    table = -np.log((np.arange(256, dtype=np.float32) + 1) / np.float32(light + 1))
    density = cv2.transform(np.take(table, rgb), matrix.astype(np.float32))
    values = cv2.exp(-density) * np.float32(light + 1) - 1
    return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)


def dye_change(haematoxylin: float, eosin: float) -> Matrix:
    """The matrix that multiplies the amounts of the reference dyes; what is neither stays."""
    basis = np.array([HAEMATOXYLIN, EOSIN, np.cross(HAEMATOXYLIN, EOSIN)]).T
    return np.asarray(basis @ np.diag([haematoxylin, eosin, 1.0]) @ np.linalg.inv(basis))


@dataclass(frozen=True, slots=True)
class Stains:
    """A slide's two dyes: their directions in density and the 99th percentiles of their amounts.

    `dyes` is haematoxylin (R, G, B), eosin (R, G, B), and the two amounts: rounded, so that all machines agree.
    """

    dyes: Dyes

    def __call__(self, rgb: RGB) -> RGB:
        """RGB (h, w, 3) of tissue, as it would be in the reference's dyes and amounts; what is neither is lost."""
        own = np.array(self.dyes[:6]).reshape(2, 3).T
        share = np.diag(np.array(MOST) / np.array(self.dyes[6:]))
        matrix = np.array([HAEMATOXYLIN, EOSIN]).T @ share @ np.linalg.pinv(own)
        return through_density(rgb, matrix, LIGHT - 1)


def find_stains(path: Path, read: Callable[[Box], RGB], mask: Mask, cell_px: int) -> Stains:
    """The dyes of a slide, from windows of its tissue; `read` gives pixels of the raster that the mask is of.

    SlideError where there is too little stain, or but one. ConfigError without torchstain.
    """
    try:
        from torchstain.numpy.normalizers import NumpyMacenkoNormalizer
    except ImportError as error:
        remedy = "pip install 'holoslide[stain]'"
        raise ConfigError("prepare.stain", f"macenko needs torchstain ({error})", remedy) from error
    pixels = _tissue(read, mask, cell_px)
    density = -np.log((pixels.astype(np.float64) + 1) / LIGHT)
    stained = int((density >= LEAST_DENSITY).all(axis=1).sum())
    if stained < LEAST_PX:
        raise _no_stains(path, f"only {stained} pixels of what was looked at are stained")
    finder = NumpyMacenkoNormalizer()
    finder.fit(pixels, Io=LIGHT, beta=LEAST_DENSITY)
    found = np.concatenate([finder.HERef.T.ravel(), finder.maxCRef])
    angle = math.acos(min(1.0, abs(float(finder.HERef[:, 0] @ finder.HERef[:, 1]))))
    if not np.isfinite(found).all() or angle < LEAST_ANGLE or found[6:].min() < LEAST_DENSITY:
        raise _no_stains(path, "its colours are those of one dye")
    return Stains(tuple(round(float(value), 4) for value in found))  # type: ignore[arg-type]


def _tissue(read: Callable[[Box], RGB], mask: Mask, cell_px: int) -> RGB:
    """Pixels (n, 3) of tissue from windows that are spread evenly over it."""
    cells = np.argwhere(mask)
    chosen = cells[np.unique(np.linspace(0, len(cells) - 1, WINDOWS).astype(np.int64))]
    side = max(1, WINDOW_PX // cell_px)  # in cells
    found = []
    for y, x in chosen.tolist():
        box = Box.at(y, x, side, side).intersect(Box(0, 0, *mask.shape))
        inside = mask[box.slices].repeat(cell_px, axis=0).repeat(cell_px, axis=1)
        found.append(read(box.times(cell_px))[inside])
    return np.concatenate(found)


def _no_stains(path: Path, why: str) -> SlideError:
    what = f"its two stains cannot be told apart: {why}"
    return SlideError(
        shown(path), what, "leave it out, or prepare with prepare.stain=none, for a model trained so"
    )
