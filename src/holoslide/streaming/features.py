"""Feature maps of any size: tiles where the slide has tissue, one constant vector everywhere else.

Axes: B batch, C channels, H W rows and columns of cells; tiles are stored (H, W, C), so that a window is cut
by copying rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holoslide.errors import ConfigError
from holoslide.geometry import Box, ceil_div
from holoslide.streaming.host import hand_back_freed
from holoslide.streaming.receptive import Receptive
from holoslide.streaming.sources import Source, TensorSource
from holoslide.streaming.storage import Storage
from holoslide.streaming.tissue import Tissue

Tile = tuple[int, int]  # (row, column) of a tile in its grid
_STEP_CELLS = 8  # parts of tiles are cut in such steps, so that windows have few shapes


@dataclass(frozen=True, slots=True)
class Grid:
    """Tiles of at most one size (height, width in cells), the first at cell `origin`, and those that are computed.

    A tile that is wanted in part is the box of that part alone: a slide's tissue is ragged.
    """

    origin: tuple[int, int]
    size: tuple[int, int]
    index: dict[Tile, int]  # tile -> its number, in row-major order
    boxes: dict[Tile, Box]  # tile -> its cells

    def box(self, tile: Tile) -> Box:
        """The cells of a tile that is computed."""
        return self.boxes[tile]

    def place(self, tile: Tile) -> Box:
        """The cells a tile has at most."""
        return Box.at(
            self.origin[0] + tile[0] * self.size[0], self.origin[1] + tile[1] * self.size[1], *self.size
        )

    def overlapping(self, box: Box) -> Iterator[tuple[int, Box]]:
        """The computed tiles that a box touches: number and box of each."""
        (y0, x0), (h, w) = self.origin, self.size
        for row in range((box.top - y0) // h, (box.bottom - 1 - y0) // h + 1):
            for column in range((box.left - x0) // w, (box.right - 1 - x0) // w + 1):
                number = self.index.get((row, column))
                if number is not None and self.boxes[row, column].intersect(box).area:
                    yield number, self.boxes[row, column]


@dataclass(frozen=True, slots=True)
class GridSpec:
    """How a map is cut: the largest tile side, the side of the blocks no tile may split, and what is wanted.

    `everywhere` asks for the raster's whole frame instead of the cells that see tissue. `wanted` leaves out
    cells nobody reads: only those are computed that find tissue in this field of pixels around them, too.
    """

    side: int
    block: int = 1
    everywhere: bool = False
    wanted: Receptive | None = None


def make_grid(spec: GridSpec, tissue: Tissue, field: Receptive, frame: Box, *, clip: bool) -> Grid:
    """Tiles over the cells that see tissue, evened out over the extent; `clip` keeps them inside the frame.

    Of each tile the box of those cells is computed that see tissue and are wanted.
    """
    block = spec.block
    extent = tissue.extent(field)
    if spec.wanted is not None:
        extent = extent.intersect(tissue.extent(spec.wanted))
    if spec.everywhere:
        extent = Box(
            min(extent.top, frame.top),
            min(extent.left, frame.left),
            max(extent.bottom, frame.bottom),
            max(extent.right, frame.right),
        )
    if clip:
        extent = frame
    blocks = extent.cover(block)
    size = tuple(_even_side(n, max(1, spec.side // block)) * block for n in blocks.shape)
    origin = (blocks.top * block, blocks.left * block)
    grid = Grid(origin, (size[0], size[1]), {}, {})
    rows, columns = ceil_div(blocks.height * block, size[0]), ceil_div(blocks.width * block, size[1])
    for row in range(rows):
        if spec.everywhere or clip:
            parts = {column: grid.place((row, column)) for column in range(columns)}
            if clip:
                parts = {column: box.intersect(frame) for column, box in parts.items()}
        else:
            parts = _wanted_parts(spec, tissue, field, grid, row, columns)
        for column, box in parts.items():
            grid.index[row, column] = len(grid.index)
            grid.boxes[row, column] = box
    return grid


def _wanted_parts(
    spec: GridSpec, tissue: Tissue, field: Receptive, grid: Grid, row: int, columns: int
) -> dict[int, Box]:
    """Of each tile of a row the smallest part that holds its wanted cells, in steps of some; none of those without.

    A whole row at once: the map of a 40x slide has a million tiles.
    """
    height, width = grid.size
    first = grid.place((row, 0))
    band = Box.at(first.top, first.left, height, columns * width)
    cells = tissue.seen_by(band, field)
    if spec.wanted is not None:
        cells &= tissue.seen_by(band, spec.wanted)
    tiles = cells.reshape(height, columns, width)
    by_row: NDArray[np.bool_] = np.asarray(tiles.any(axis=2)).T  # (columns, height)
    by_column: NDArray[np.bool_] = np.asarray(tiles.any(axis=0))  # (columns, width)
    found = np.flatnonzero(by_row.any(axis=1))
    step = spec.block * ceil_div(_STEP_CELLS, spec.block)
    tops, bottoms = _spans(by_row[found], step)
    lefts, rights = _spans(by_column[found], step)
    places = found * width + first.left
    bounds = np.stack([tops + first.top, lefts + places, bottoms + first.top, rights + places], axis=1)
    return {column: Box(*box) for column, box in zip(found.tolist(), bounds.tolist(), strict=True)}


def _spans(wanted: NDArray[np.bool_], step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last (excluded) wanted place of each row (n, length), widened to whole steps; each has one, and may
    end within a step.
    """
    length = wanted.shape[1]
    first, last = wanted.argmax(axis=1), length - wanted[:, ::-1].argmax(axis=1)
    return first // step * step, np.minimum(-(-last // step) * step, length)


def _even_side(length: int, largest: int) -> int:
    """The side of the equal parts, none over `largest`, that waste least of a length.

    >>> _even_side(59, 14)
    12
    """
    return ceil_div(max(length, 1), ceil_div(max(length, 1), largest))


class FeatureMap:
    """The output of a module for one slide: a `Source` for the next.

    Tiles not in the grid are the constant `glass`. `kept` holds inputs and outputs, with their graphs, of the
    batches that the backward pass need not recompute.
    """

    def __init__(
        self, grid: Grid, storage: Storage, *, like: Source, field: Receptive, frame: Box, glass: Tensor
    ) -> None:
        self.grid, self.field, self.frame, self.glass = grid, field, frame, glass
        self.tissue, self.device = like.tissue, like.device
        self.channels = len(glass)
        self.tiles = storage.array(len(grid.index), (*grid.size, self.channels), glass.dtype)
        self.slow = self.tiles.in_file
        self.batches: list[Batch] = []
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.kept_bytes = 0
        self.storage = storage

    def put(self, tile: Tile, values_CHW: Tensor) -> None:
        """Store a tile's cells; a tile smaller than the others takes the first rows and columns of its place."""
        self.tiles.put(self.grid.index[tile], values_CHW.permute(1, 2, 0))

    def windows(self, boxes: Sequence[Box]) -> Tensor:
        """The cells of boxes of one shape, (B, C, H, W)."""
        height, width = boxes[0].shape
        out_BHWC = torch.empty(
            (len(boxes), height, width, self.channels), dtype=self.glass.dtype, device=self.device
        )
        for out_HWC, box in zip(out_BHWC, boxes, strict=True):
            parts = [(n, tile, tile.intersect(box)) for n, tile in self.grid.overlapping(box)]
            if sum(part.area for _, _, part in parts) < box.area:
                out_HWC[:] = self.glass
            for number, tile, part in parts:
                rows, columns = part.relative_to(tile).slices
                out_HWC[part.relative_to(box).slices].copy_(
                    self.tiles.get(number, rows)[:, columns], non_blocking=True
                )
        return out_BHWC.permute(0, 3, 1, 2)

    def whole(self) -> Tensor:
        """All cells of the raster's own frame, (C, H, W); they must fit in the device's memory."""
        return self.windows([self.frame])[0]

    def free(self) -> None:
        """Give the tiles' room back."""
        self.tiles.free()
        self.drop_graphs()
        if self.device.type == "cpu":
            hand_back_freed(self.tiles.size_bytes)

    def drop_graphs(self) -> None:
        """Give the kept graphs' room back."""
        self.kept.clear()
        self.storage.give_back("device", self.kept_bytes)
        self.kept_bytes = 0


class InputGradient(Protocol):
    """Where dL/d(cells) of a source adds up, window by window."""

    glass: Tensor  # (C,), dL/d(the one vector that all cells outside have)

    def add(self, boxes: Sequence[Box], grads_BCHW: Tensor) -> None:
        """Add the gradients of windows to the cells they were cut from."""
        ...


class TensorGradient:
    """dL/d(values) of a `TensorSource`, (C, H, W), and dL/d(glass), (C,).

    Where the source's tissue leaves cells of the map out, what they do to outputs that were not computed is
    counted to the glass.
    """

    def __init__(self, source: TensorSource) -> None:
        exact = _exact(source.values_CHW.dtype)
        self.frame = source.frame
        self.values_CHW = torch.zeros_like(source.values_CHW, dtype=exact)
        self.glass = torch.zeros_like(source.glass, dtype=exact)

    def add(self, boxes: Sequence[Box], grads_BCHW: Tensor) -> None:
        """Add the gradients of windows to the cells they were cut from."""
        for box, grad_CHW in zip(boxes, grads_BCHW.to(self.glass.dtype), strict=True):
            part, inside_C = box.intersect(self.frame), torch.zeros_like(self.glass)
            if part.area:
                values_CHW = grad_CHW[:, *part.relative_to(box).slices]
                self.values_CHW[:, *part.slices].add_(values_CHW)
                inside_C = values_CHW.sum(dim=(1, 2))
            if part != box:
                self.glass += grad_CHW.sum(dim=(1, 2)) - inside_C


class GradientMap:
    """dL/d(cells) of a feature map, summed over all windows that read it; glass has one gradient for all."""

    def __init__(self, features: FeatureMap) -> None:
        self.grid = features.grid
        self.glass = torch.zeros_like(features.glass, dtype=_exact(features.glass.dtype))
        self.tiles = features.storage.array(
            len(self.grid.index), (*self.grid.size, features.channels), features.glass.dtype, zero=True
        )

    @classmethod
    def of(cls, features: FeatureMap, grads_CHW: Tensor) -> GradientMap:
        """From the gradient of the raster's whole frame, (C, H, W)."""
        expected = (features.channels, *features.frame.shape)
        if tuple(grads_CHW.shape) != expected:
            raise ConfigError(
                "backward_tiles",
                f"was given dL/d(output) of shape {tuple(grads_CHW.shape)}",
                f"give {expected}, as the output's",
            )
        made = cls(features)
        made.add([features.frame], grads_CHW.detach()[None])
        return made

    def add(self, boxes: Sequence[Box], grads_BCHW: Tensor) -> None:
        """Add the gradients of windows to the cells they were cut from."""
        for box, grad_CHW in zip(boxes, grads_BCHW, strict=True):
            grad_HWC = grad_CHW.permute(1, 2, 0)
            stored = torch.zeros_like(self.glass)
            covered = 0
            for number, tile in self.grid.overlapping(box):
                part = tile.intersect(box)
                values = grad_HWC[part.relative_to(box).slices]
                self.tiles.add(number, *part.relative_to(tile).slices, values)
                covered += part.area
                stored += values.sum(dim=(0, 1), dtype=stored.dtype)
            if covered < box.area:
                self.glass += grad_HWC.sum(dim=(0, 1), dtype=stored.dtype) - stored

    def windows(self, tiles: Sequence[Tile], shape: tuple[int, int]) -> Tensor:
        """The gradients of tiles, (B, C, H, W), cut to their first `shape` cells."""
        height, width = shape
        grads = [self.tiles.get(self.grid.index[tile])[:height, :width] for tile in tiles]
        return torch.stack([g.to(self.glass.device) for g in grads]).permute(0, 3, 1, 2)

    def free(self) -> None:
        """Give the tiles' room back."""
        self.tiles.free()


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, slots=True)
class Batch:
    """Tiles computed together: their windows have one shape, and their cells lie at one place in it."""

    number: int
    tiles: tuple[Tile, ...]
    boxes: tuple[Box, ...]  # output cells of each tile
    windows: tuple[Box, ...]  # input cells of each tile's window
    crop: Box  # the tile's cells, counted from the first output cell of its window
