"""A heatmap as a pyramidal OME-TIFF that lies on its slide by itself.

Pixel (i, j) is the square of `step` x `step` level-0 pixels from (i, j) * step on, counted from the corner of the
slide's frame, so that the image and what a viewer shows of the slide begin at one corner, and only their um per
pixel differ: all that viewers need to lay one over the other.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holoslide.evaluation.overlay import Placement, on_pixels
from holoslide.evaluation.scales import relative_attention
from holoslide.files import write_atomically
from holoslide.geometry import ceil_div
from holoslide.inference.export import Exported

TILE_PX, SMALLEST_PX = 256, 256
_COVERED = 0.5  # a pixel shows a score where cells cover at least this share of it


def step_for(cell_l0: tuple[float, float]) -> int:
    """Level-0 pixels per pixel: the largest power of two that is at most half a cell.

    >>> step_for((144.0, 144.0)), step_for((1.5, 3.0))
    (64, 1)
    """
    step = 1
    while step * 4 <= min(cell_l0):
        step *= 2
    return step


def write_ome_tiff(path: Path, slide: Exported) -> None:
    """Raw scores as float32, NaN where no cell votes: relative attention, then the evidence of each class."""
    import tifffile

    heatmap, step = slide.heatmap, step_for(slide.heatmap.cell_l0)
    shape = ceil_div(slide.frame_l0.height, step), ceil_div(slide.frame_l0.width, step)
    names = ["attention, times the average", *(f"evidence for {name} (logits)" for name in heatmap.classes)]
    grids = [relative_attention(heatmap.attention_HW), *heatmap.evidence_LHW]
    levels = [np.stack([_on_slide(grid, slide, step, shape) for grid in grids])]
    while max(levels[-1].shape[1:]) > SMALLEST_PX:
        levels.append(_halve(levels[-1]))
    facts: dict[str, Any] = {
        "axes": "CYX",
        "Name": f"{slide.slide_id}: heatmap for {slide.prediction}",
        "PhysicalSizeY": slide.mpp[0] * step,
        "PhysicalSizeYUnit": "µm",
        "PhysicalSizeX": slide.mpp[1] * step,
        "PhysicalSizeXUnit": "µm",
        "Channel": {"Name": names},
    }
    common: dict[str, Any] = {"tile": (TILE_PX, TILE_PX), "compression": "zlib", "photometric": "minisblack"}

    def write(file: Any) -> None:
        with tifffile.TiffWriter(file, ome=True) as tiff:
            for number, level in enumerate(levels):
                um = [mpp * step * 2**number for mpp in (slide.mpp[1], slide.mpp[0])]
                extra = {"subfiletype": 1} if number else {"subifds": len(levels) - 1, "metadata": facts}
                tiff.write(
                    level,
                    resolution=(10_000 / um[0], 10_000 / um[1]),
                    resolutionunit="CENTIMETER",
                    **common,
                    **extra,
                )

    write_atomically(path, write)


def _on_slide(
    grid_HW: NDArray[np.floating], slide: Exported, step: int, shape: tuple[int, int]
) -> NDArray[np.float32]:
    (top, left), (side_y, side_x) = slide.origin_l0, slide.heatmap.cell_l0
    placement = Placement((top / step, left / step), (side_y / step, side_x / step))
    mean, share = on_pixels(grid_HW, placement, shape)
    return np.where(share >= _COVERED, mean, np.nan).astype(np.float32)


def _halve(level_CHW: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean of each 2 x 2 pixels that hold a score."""
    odd = [(0, 0), *((0, n % 2) for n in level_CHW.shape[1:])]
    even = np.pad(level_CHW, odd, constant_values=np.nan)
    blocks = np.stack([even[:, y::2, x::2] for y in (0, 1) for x in (0, 1)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of blocks without a score, which stay so
        result: NDArray[np.float32] = np.nanmean(blocks, axis=0)
    return result
