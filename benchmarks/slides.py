"""Slides of any size for benchmarks: noise that is made window by window, so that nothing holds the whole."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from holoslide.geometry import Box, ceil_div

GLASS = (243, 243, 243)
_PERIOD_PX = 509  # prime: windows of one tiling do not repeat
_PIECE_PX = 1024  # copied at once


class NoisePixels:
    """A square slide of `side_px`, a share of it tissue in one disc, the rest glass; a `Pixels`."""

    def __init__(self, side_px: int, *, tissue: float = 1.0, mask_cell_px: int = 32) -> None:
        self.shape_px = (side_px, side_px)
        self.mask_cell_px = mask_cell_px
        self.glass: NDArray[np.uint8] = np.array(GLASS, np.uint8)
        self.mask = _disc(ceil_div(side_px, mask_cell_px), tissue)
        noise = np.random.default_rng(0).integers(0, 240, (_PERIOD_PX, _PERIOD_PX, 3), np.uint8)
        self._noise = np.pad(noise, ((0, _PIECE_PX), (0, _PIECE_PX), (0, 0)), mode="wrap")

    def read(self, box_px: Box) -> NDArray[np.uint8]:
        """(h, w, 3) of any box; glass outside the tissue and the slide."""
        window = np.empty((*box_px.shape, 3), np.uint8)
        for top, rows in _steps(box_px.top, box_px.height):
            for left, columns in _steps(box_px.left, box_px.width):
                height, width = rows.stop - rows.start, columns.stop - columns.start
                window[rows, columns] = self._noise[top : top + height, left : left + width]
        self._paint_glass(window, box_px)
        return window

    def _paint_glass(self, window: NDArray[np.uint8], box_px: Box) -> None:
        """Run by run of mask cells: most windows have few of them, or none."""
        cell_px, limit_px = self.mask_cell_px, self.shape_px[0]
        lines = [
            np.arange(first // cell_px, ceil_div(last, cell_px))
            for first, last in ((box_px.top, box_px.bottom), (box_px.left, box_px.right))
        ]
        known = [(line >= 0) & (line < len(self.mask)) for line in lines]
        glass = np.ones((len(lines[0]), len(lines[1])), np.bool_)
        glass[np.ix_(*known)] = ~self.mask[np.ix_(*(line[k] for line, k in zip(lines, known, strict=True)))]
        for row in np.flatnonzero(glass.any(axis=1)):
            edges = np.flatnonzero(np.diff(glass[row], prepend=False, append=False)).reshape(-1, 2)
            top = lines[0][row] * cell_px - box_px.top
            for start, stop in edges:
                left, right = ((lines[1][0] + n) * cell_px - box_px.left for n in (start, stop))
                window[max(0, top) : top + cell_px, max(0, left) : right] = self.glass
        window[max(0, limit_px - box_px.top) :] = self.glass  # a mask cell may reach over the edge
        window[:, max(0, limit_px - box_px.left) :] = self.glass


def _steps(first_px: int, length: int) -> Iterator[tuple[int, slice]]:
    """Pieces of a line: where each starts in the noise, and its place in the line."""
    for start in range(0, length, _PIECE_PX):
        yield (first_px + start) % _PERIOD_PX, slice(start, min(start + _PIECE_PX, length))


def _disc(cells: int, tissue: float) -> NDArray[np.bool_]:
    if tissue == 1:
        return np.ones((cells, cells), np.bool_)
    offset = np.arange(cells) + 0.5 - cells / 2
    seen: NDArray[np.bool_] = np.hypot(*np.meshgrid(offset, offset)) < math.sqrt(tissue / math.pi) * cells
    return seen
