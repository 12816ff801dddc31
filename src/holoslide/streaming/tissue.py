"""Which cells of a feature map see tissue, for any map of any network, from one small mask."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from holoslide.geometry import Box
from holoslide.streaming.receptive import Receptive


class Tissue:
    """A tissue mask on a coarse pixel grid, summed so that any box can be asked for tissue in constant time.

    Dilating the mask through the layers, module by module, gives the same answer: the receptive field of a
    chain is a box, so one look-up per cell replaces all dilations, and memory follows the mask alone.
    """

    def __init__(
        self, mask: NDArray[np.bool_], cell_px: int | tuple[int, int], shape_px: tuple[int, int]
    ) -> None:
        """`mask` (h, w) has cells of `cell_px` pixels, the first at pixel (0, 0) of the raster."""
        self.cell_px = (cell_px, cell_px) if isinstance(cell_px, int) else cell_px
        self.shape_px = shape_px
        self.mask = mask
        self._sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int32)
        np.cumsum(np.cumsum(mask, axis=0, dtype=np.int32), axis=1, out=self._sums[1:, 1:])
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if len(rows) == 0:
            self.box_px = Box(0, 0, 0, 0)
        else:
            cy, cx = self.cell_px
            self.box_px = Box(
                int(rows[0]) * cy, int(columns[0]) * cx, (int(rows[-1]) + 1) * cy, (int(columns[-1]) + 1) * cx
            )

    @property
    def area_px(self) -> int:
        """Pixels of tissue, as the mask tells."""
        return int(self._sums[-1, -1]) * self.cell_px[0] * self.cell_px[1]

    @classmethod
    def everywhere(cls, shape_px: tuple[int, int]) -> Tissue:
        """Tissue on the whole raster."""
        return cls(np.ones((1, 1), np.bool_), shape_px, shape_px)

    def extent(self, field: Receptive) -> Box:
        """The smallest box of cells, with that receptive field on pixels, that holds all that see tissue."""
        return field.outputs(self.box_px) if self.box_px.area else Box(0, 0, 0, 0)

    def seen_by(self, box_cell: Box, field: Receptive) -> NDArray[np.bool_]:
        """For each cell of a box, (h, w): is there tissue in its receptive field on pixels?"""
        seen, rows, columns = self._seen(box_cell, field)
        return seen.take(rows, axis=0).take(columns, axis=1)

    def count(self, field: Receptive) -> int:
        """How many cells see tissue, of all those that have this receptive field on pixels."""
        seen, rows, columns = self._seen(self.extent(field), field)
        return int(np.bincount(rows) @ seen @ np.bincount(columns)) if seen.size else 0

    def _seen(
        self, box_cell: Box, field: Receptive
    ) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
        """What `seen_by` says for each pair of distinct rows and columns, and which each cell's are."""
        top, bottom, rows = self._span(box_cell.top, box_cell.bottom, field, axis=0)
        left, right, columns = self._span(box_cell.left, box_cell.right, field, axis=1)
        sums = self._sums[bottom] - self._sums[top]
        return np.take(sums, right, axis=1) > np.take(sums, left, axis=1), rows, columns

    def _span(
        self, start: int, stop: int, field: Receptive, *, axis: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The distinct spans of the mask that cells see, first and last (excluded), and which is each cell's.

        Cells of a fine map are many more than those of the mask, and neighbours see the same span.
        """
        first_px = np.arange(start, stop) * field.stride
        limit, cell = self.mask.shape[axis], self.cell_px[axis]
        low = np.clip((first_px + field.low) // cell, 0, limit)
        high = np.clip((first_px + field.high) // cell + 1, 0, limit)
        changes = np.ones(len(low), np.bool_)
        changes[1:] = (np.diff(low) != 0) | (np.diff(high) != 0)
        return low[changes], high[changes], np.cumsum(changes) - 1
