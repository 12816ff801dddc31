"""A slide's pixels as all that follows sees them: windows of RGB, a tissue mask, and one colour for the rest."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from holoslide.errors import SlideError
from holoslide.geometry import Box, ceil_div


class Pixels(Protocol):
    """RGB pixels of a slide; outside the tissue mask, and outside the raster, there is glass."""

    @property
    def shape_px(self) -> tuple[int, int]:
        """(height, width)."""
        ...

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Where tissue is, one value per square of `mask_cell_px`, the first at pixel (0, 0)."""
        ...

    @property
    def mask_cell_px(self) -> int:
        """Side of a mask cell; the last row and column of cells may reach beyond the raster."""
        ...

    @property
    def glass(self) -> NDArray[np.uint8]:
        """The one colour of all that is not tissue, (3,)."""
        ...

    def read(self, box_px: Box) -> NDArray[np.uint8]:
        """(h, w, 3) of any box, which may reach outside the raster; several threads may ask at a time."""
        ...


def one_colour(shape_px: tuple[int, int], rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(h, w, 3) of nothing else; whole rows copy fifty times as fast as pixels."""
    window = np.empty((*shape_px, 3), np.uint8)
    window[:] = np.tile(rgb, (shape_px[1], 1))
    return window


class ArrayPixels:
    """Pixels in memory; what the mask leaves out is painted glass, on a copy."""

    def __init__(
        self,
        array: NDArray[np.uint8],
        mask: NDArray[np.bool_] | None = None,
        mask_cell_px: int = 1,
        glass: tuple[int, int, int] = (255, 255, 255),
    ) -> None:
        """`array` (H, W, 3); `mask` (ceil(H / cell), ceil(W / cell)), everything if None. Raises `SlideError`."""
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
            what = f"{array.dtype} values of shape {array.shape} are no RGB pixels"
            raise SlideError("pixels", what, "give uint8 of shape (height, width, 3)")
        height, width = array.shape[:2]
        cells = ceil_div(height, mask_cell_px), ceil_div(width, mask_cell_px)
        mask = np.ones(cells, np.bool_) if mask is None else mask
        if mask.shape != cells:
            what = f"a mask of {mask.shape} cells of {mask_cell_px} px does not cover {height} x {width} px"
            raise SlideError("pixels", what, f"give a mask of {cells}")
        tissue = mask.repeat(mask_cell_px, axis=0).repeat(mask_cell_px, axis=1)[:height, :width]
        self.shape_px = (height, width)
        self.mask, self.mask_cell_px, self.glass = mask, mask_cell_px, np.array(glass, np.uint8)
        self._array = np.where(tissue[..., None], array, self.glass)

    def read(self, box_px: Box) -> NDArray[np.uint8]:
        """(h, w, 3) of any box; glass outside the array."""
        window = one_colour(box_px.shape, self.glass)
        part = box_px.intersect(Box(0, 0, *self.shape_px))
        if part.area:
            window[part.relative_to(box_px).slices] = self._array[part.slices]
        return window
