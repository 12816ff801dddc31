"""Heatmaps over pictures of slides: every pixel shows the cells that lie under it, with a legend that can be read.

Pixels are counted continuously, in (y, x): pixel i covers [i, i + 1). What is drawn is a display of the scores;
the scores themselves stay in the arrays they came in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from numpy.typing import NDArray

BoxPx = tuple[float, float, float, float]  # top, left, bottom, right, in fractions of pixels

# Both run evenly in lightness and are told apart in every common kind of colour blindness.
SEQUENTIAL, DIVERGING = "viridis", "PuOr_r"
OPACITY = 0.62
# What tells a colour apart is hue; what tells tissue apart is lightness: so the picture beneath goes grey.
_LUMA = np.array([0.2126, 0.7152, 0.0722])
_FADE = 0.7  # contrast of that grey: tissue without cells must not outweigh cells that say little
_TISSUE_GREY = 205.0  # the grey that H&E tissue comes to, beneath the colours of a legend
_STEPS = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


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


@dataclass(frozen=True, slots=True)
class Scale:
    """How values become colours: linear or logarithmic from `low` to `high`, beyond which the colour stays.

    `ticks` are (value, label) for the legend, `unit` says in words what is measured.
    """

    low: float
    high: float
    colours: str
    unit: str
    ticks: tuple[tuple[float, str], ...]
    logarithmic: bool = False

    def position(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """0 at `low`, 1 at `high`, clipped; NaN stays NaN."""
        low, high = self.low, self.high
        if self.logarithmic:
            values = np.log(np.maximum(values, low))
            low, high = math.log(low), math.log(high)
        result: NDArray[np.float64] = np.clip((values - low) / (high - low), 0.0, 1.0)
        return result

    def colour(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """RGB of each value, 0 to 255; that of NaN means nothing."""
        table = matplotlib.colormaps[self.colours](np.linspace(0, 1, 256))[:, :3] * 255
        place = np.nan_to_num(self.position(values)) * 255
        result: NDArray[np.float64] = table[np.rint(place).astype(np.intp)]
        return result

    def strip(self, length: int = 256) -> NDArray[np.uint8]:
        """The legend's colours from low to high, (1, length, 3), as they look over tissue."""
        place = np.linspace(0, 1, length)[None]
        if self.logarithmic:
            values = np.exp(math.log(self.low) + place * math.log(self.high / self.low))
        else:
            values = self.low + place * (self.high - self.low)
        return _to_uint8(_blend(self.colour(values), np.full((1, length, 1), _TISSUE_GREY), OPACITY))

    def tick_places(self) -> tuple[tuple[float, str], ...]:
        """(position from 0 to 1, label) of each tick."""
        values = np.array([value for value, _ in self.ticks])
        return tuple(zip(self.position(values).tolist(), (label for _, label in self.ticks), strict=True))


def relative_attention(attention_HW: NDArray[np.floating]) -> NDArray[np.float64]:
    """Attention times the number of voting cells: 1 is what a cell gets on average; NaN where none votes."""
    values = attention_HW.astype(np.float64)
    voting = values[np.isfinite(values)]
    total = float(voting.sum())
    return values * (len(voting) / total) if total > 0 else values


def evidence_for(evidence_LHW: NDArray[np.floating], target: int) -> NDArray[np.float64]:
    """What each cell adds to the logit of class `target` above the mean of the other classes' logits.

    A softmax does not see what is added to all its logits alike, so evidence counts only against the others.
    With two classes this is the evidence for the log-odds.
    """
    values = evidence_LHW.astype(np.float64)
    others = np.delete(values, target, axis=0)
    result: NDArray[np.float64] = values[target] - (others.mean(axis=0) if len(others) else 0.0)
    return result


def attention_scale(relative: Sequence[NDArray[np.float64]]) -> Scale:
    """One logarithmic scale for all slides, as far below the average as above it, up to the strongest cell."""
    peak = max((float(np.nanmax(values)) for values in relative if np.isfinite(values).any()), default=1.0)
    limit = max(2.0, _round_up(min(peak, 1000.0)))
    ticks = ((1 / limit, f"≤ 1/{limit:g} ×"), (1.0, "1 ×"), (limit, f"≥ {limit:g} ×"))
    unit = "the average cell's attention"
    return Scale(1 / limit, limit, SEQUENTIAL, unit, ticks, logarithmic=True)


def evidence_scale(evidence_HW: NDArray[np.floating], target: str) -> Scale:
    """A slide's own linear scale, symmetric around zero; the strongest 0.5 % of cells may lie beyond its ends."""
    size = np.abs(evidence_HW[np.isfinite(evidence_HW)]).astype(np.float64)
    top = float(np.quantile(size, 0.995)) if len(size) else 0.0
    limit = _round_up(top) if top > 0 else 1.0
    ticks = ((-limit, f"≤ −{limit:g}"), (0.0, "0"), (limit, f"≥ +{limit:g}"))
    return Scale(-limit, limit, DIVERGING, f"evidence for {target}, in logits per cell", ticks)


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


def _round_up(value: float) -> float:
    """The next number of one or two digits.

    >>> _round_up(0.034), _round_up(11.0), _round_up(2.0)
    (0.04, 15.0, 2.0)
    """
    power = 10.0 ** math.floor(math.log10(value))
    step = next(step for step in _STEPS if value <= step * power * (1 + 1e-9))
    return float(f"{step * power:.6g}")
