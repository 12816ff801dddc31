"""Heatmaps over pictures of slides: every pixel shows the cells that lie under it, with a legend that can be read.

Pixels are counted continuously, in (y, x): pixel i covers [i, i + 1).
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from holoslide.evaluation.scales import Scale

BoxPx = tuple[float, float, float, float]  # top, left, bottom, right, in fractions of pixels

OPACITY = 0.62
# What tells a colour apart is hue; what tells tissue apart is lightness: so the picture beneath goes grey.
_LUMA = np.array([0.2126, 0.7152, 0.0722])
_FADE = 0.7  # contrast of that grey: tissue without cells must not outweigh cells that say little
_TISSUE_GREY = 205.0  # the grey that H&E tissue comes to, beneath the colours of a legend


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a grid of cells lies on a picture.

    Cell (y, x) covers the rows from origin_px[0] + y * cell_px[0] on for cell_px[0], and columns likewise.
    """

    origin_px: tuple[float, float]
    cell_px: tuple[float, float]

    def __post_init__(self) -> None:
        values = (*self.origin_px, *self.cell_px)
        if not all(map(math.isfinite, values)) or min(self.cell_px) <= 0:
            message = f"a grid needs a finite origin and cells larger than nothing, not {self}"
            raise ValueError(message)

    @classmethod
    def in_box(cls, box_px: BoxPx, shape_cell: tuple[int, int]) -> Placement:
        """The grid of `shape_cell` (rows, columns) that fills a box.

        >>> Placement.in_box((10.0, 0.0, 30.0, 20.0), (4, 2))
        Placement(origin_px=(10.0, 0.0), cell_px=(5.0, 10.0))
        """
        top, left, bottom, right = box_px
        return cls((top, left), ((bottom - top) / shape_cell[0], (right - left) / shape_cell[1]))

    def centre_px(self, y_cell: float, x_cell: float) -> tuple[float, float]:
        """The middle of a cell, (y, x)."""
        return (
            self.origin_px[0] + (y_cell + 0.5) * self.cell_px[0],
            self.origin_px[1] + (x_cell + 0.5) * self.cell_px[1],
        )


def box_on_picture(box_l0: BoxPx, picture_l0: BoxPx, shape_px: tuple[int, int]) -> BoxPx:
    """A box at level 0 in the pixels of a picture that shows the part `picture_l0` of the slide.

    >>> box_on_picture((400, 0, 800, 200), (200, 0, 1000, 600), (80, 60))
    (20.0, 0.0, 60.0, 20.0)
    """
    top, left, bottom, right = picture_l0
    per_y, per_x = shape_px[0] / (bottom - top), shape_px[1] / (right - left)
    return (
        (box_l0[0] - top) * per_y,
        (box_l0[1] - left) * per_x,
        (box_l0[2] - top) * per_y,
        (box_l0[3] - left) * per_x,
    )


def legend_strip(scale: Scale, length: int = 256) -> NDArray[np.uint8]:
    """A scale's colours from low to high, (1, length, 3), as they look over tissue."""
    return _to_uint8(_blend(scale.strip(length), np.full((1, length, 1), _TISSUE_GREY), OPACITY))


def on_pixels(
    values_HW: NDArray[np.floating], placement: Placement, shape_px: tuple[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A grid of cells on a picture's pixels: the mean of the cells each pixel lies on, and the share they cover.

    Exact for cells of any size, larger or smaller than a pixel, and for grids that reach past the picture. Cells
    that are NaN cover nothing; pixels with no cell are NaN.
    """
    if np.isinf(values_HW).any():
        message = "a heatmap holds infinite scores"
        raise ValueError(message)
    rows = _cover(placement.origin_px[0], placement.cell_px[0], values_HW.shape[0], shape_px[0])
    columns = _cover(placement.origin_px[1], placement.cell_px[1], values_HW.shape[1], shape_px[1])
    there = np.isfinite(values_HW)
    share = rows @ there.astype(np.float64) @ columns.T
    total = rows @ np.where(there, values_HW, 0.0).astype(np.float64) @ columns.T
    seen = share > 1e-9
    mean = np.full(shape_px, np.nan)
    mean[seen] = total[seen] / share[seen]
    return mean, np.clip(share, 0.0, 1.0)


def overlay(
    picture_HW3: NDArray[np.uint8],
    values_HW: NDArray[np.floating],
    placement: Placement,
    scale: Scale,
    *,
    opacity: float = OPACITY,
) -> NDArray[np.uint8]:
    """A picture of a slide in grey with the cells' colours over it, (H, W, 3) uint8.

    `values_HW` has its own grid of cells, NaN where there is none: there the grey picture shows through.
    """
    _refuse_odd(picture_HW3, values_HW)
    grey = 255 - _FADE * (255 - (picture_HW3 @ _LUMA)[..., None])
    values, share = on_pixels(values_HW, placement, picture_HW3.shape[:2])
    return _to_uint8(_blend(scale.colour(values), grey, opacity * share[..., None]))


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """RGB or RGBA pixels, (H, W, 3 or 4), as a PNG file.

    Level 3 makes heatmaps no larger than zlib's usual 6, in less than half of its time.
    """
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "png", compress_level=3)
    return buffer.getvalue()


def _refuse_odd(picture_HW3: NDArray[np.uint8], values_HW: NDArray[np.floating]) -> None:
    if picture_HW3.dtype != np.uint8 or picture_HW3.ndim != 3 or picture_HW3.shape[2] != 3:
        message = f"a picture is (H, W, 3) of uint8, not {picture_HW3.shape} of {picture_HW3.dtype}"
        raise ValueError(message)
    if values_HW.ndim != 2 or not values_HW.size:
        message = f"a heatmap is (H, W) with at least one cell, not {values_HW.shape}"
        raise ValueError(message)


def _cover(origin: float, cell: float, cells: int, pixels: int) -> NDArray[np.float64]:
    """How much of each pixel each cell covers, (pixels, cells)."""
    edges = origin + cell * np.arange(cells + 1)
    first = np.arange(pixels)[:, None]
    overlap = np.minimum(edges[1:], first + 1) - np.maximum(edges[:-1], first)
    result: NDArray[np.float64] = np.maximum(overlap, 0.0)
    return result


def _blend(
    colour: NDArray[np.float64], grey: NDArray[np.float64], opacity: float | NDArray[np.float64]
) -> NDArray[np.float64]:
    return colour * opacity + grey * (1 - opacity)


def _to_uint8(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.rint(values).clip(0, 255).astype(np.uint8)
