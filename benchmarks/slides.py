"""Slides of any size for benchmarks: noise that is made window by window, so that nothing holds the whole."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from holoslide.geometry import Box, ceil_div

GLASS = (243, 243, 243)
_PERIOD_PX = 509  # prime: windows of one tiling do not repeat


class NoisePixels:
    """A square slide of `side_px`, a share of it tissue in one disc, the rest glass; a `Pixels`."""

    def __init__(self, side_px: int, *, tissue: float = 1.0, mask_cell_px: int = 32) -> None:
        self.shape_px = (side_px, side_px)
        self.mask_cell_px = mask_cell_px
        self.glass: NDArray[np.uint8] = np.array(GLASS, np.uint8)
        self.mask = _disc(ceil_div(side_px, mask_cell_px), tissue)
        self._noise = np.random.default_rng(0).integers(0, 240, (_PERIOD_PX, _PERIOD_PX, 3), np.uint8)

    def read(self, box_px: Box) -> NDArray[np.uint8]:
        """(h, w, 3) of any box; glass outside the tissue and the slide."""
        rows = np.arange(box_px.top, box_px.bottom)
        columns = np.arange(box_px.left, box_px.right)
        window = self._noise[np.ix_(rows % _PERIOD_PX, columns % _PERIOD_PX)]
        inside = [(line >= 0) & (line < self.shape_px[0]) for line in (rows, columns)]
        last = self.mask.shape[0] - 1
        cells = [np.clip(line // self.mask_cell_px, 0, last) for line in (rows, columns)]
        seen = self.mask[np.ix_(*cells)] & inside[0][:, None] & inside[1][None]
        window[~seen] = self.glass
        return window


def _disc(cells: int, tissue: float) -> NDArray[np.bool_]:
    if tissue == 1:
        return np.ones((cells, cells), np.bool_)
    offset = np.arange(cells) + 0.5 - cells / 2
    seen: NDArray[np.bool_] = np.hypot(*np.meshgrid(offset, offset)) < math.sqrt(tissue / math.pi) * cells
    return seen
