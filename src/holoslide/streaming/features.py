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

from holoslide.geometry import Box, ceil_div
from holoslide.streaming.receptive import Receptive
from holoslide.streaming.storage import Storage, hand_back_freed
from holoslide.streaming.tissue import Tissue

Tile = tuple[int, int]  # (row, column) of a tile in its grid


class Source(Protocol):
    """What windows are cut from: a feature map, or the pixels of a slide."""

    channels: int
    field: Receptive  # from raster pixels to this map's cells
    tissue: Tissue
    frame: Box  # the raster's own cells; what lies outside is glass, or nothing where the border is zeros
    glass: Tensor  # (C,)
    device: torch.device
    slow: bool  # whether reading is worth doing ahead of time

    def windows(self, boxes: Sequence[Box]) -> Tensor:
        """The cells of boxes of one shape, (B, C, H, W) in channels_last; glass where nothing is stored."""
        ...


class Pixels(Protocol):
    """A slide as the network is fed from it: RGB pixels, glass outside the tissue mask."""

    @property
    def shape_px(self) -> tuple[int, int]: ...

    @property
    def mask(self) -> NDArray[np.bool_]: ...

    @property
    def mask_cell_px(self) -> int: ...

    @property
    def glass(self) -> NDArray[np.uint8]: ...

    def read(self, box_px: Box) -> NDArray[np.uint8]: ...


class PixelSource:
    """Normalised pixels of a slide as the first map: (pixel / 255 - mean) / std, per channel."""

    slow = True
    channels = 3
    field = Receptive()

    def __init__(
        self, pixels: Pixels, *, mean: Tensor, std: Tensor, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.pixels = pixels
        self.device = device
        self.tissue = Tissue(np.asarray(pixels.mask), pixels.mask_cell_px, pixels.shape_px)
        self.frame = Box(0, 0, *pixels.shape_px)
        self._scale = (1 / (255 * std)).to(device, dtype)
        self._shift = (-mean / std).to(device, dtype)
        self.glass = self._normalise(torch.from_numpy(np.array(pixels.glass)).to(device))

    def windows(self, boxes: Sequence[Box]) -> Tensor:
        """(B, 3, H, W) in the dtype of this source."""
        raw = torch.from_numpy(np.stack([self.pixels.read(box) for box in boxes]))
        return self._normalise(raw.to(self.device, non_blocking=True)).permute(0, 3, 1, 2)

    def _normalise(self, values: Tensor) -> Tensor:
        return torch.addcmul(self._shift, values.to(self._scale.dtype), self._scale)


class TensorSource:
    """A map that is already in memory, (C, H, W), as the first map; `glass` (C,) is what surrounds it."""

    slow = False
    field = Receptive()

    def __init__(self, values_CHW: Tensor, *, glass: Tensor, tissue: Tissue | None = None) -> None:
        self.values_CHW, self.glass = values_CHW, glass
        self.channels, height, width = values_CHW.shape
        self.device = values_CHW.device
        self.frame = Box(0, 0, height, width)
        self.tissue = tissue or Tissue.everywhere((height, width))

    def windows(self, boxes: Sequence[Box]) -> Tensor:
        """(B, C, H, W)."""
        out_BHWC = self.glass.expand(len(boxes), *boxes[0].shape, -1).clone()
        for out_HWC, box in zip(out_BHWC, boxes, strict=True):
            part = box.intersect(self.frame)
            if part.area:
                rows, columns = part.slices
                out_HWC[part.relative_to(box).slices] = self.values_CHW[:, rows, columns].permute(1, 2, 0)
        return out_BHWC.permute(0, 3, 1, 2)


@dataclass(frozen=True, slots=True)
class Grid:
    """Tiles of one size (height, width in cells), the first at cell `origin`, and those that are computed."""

    origin: tuple[int, int]
    size: tuple[int, int]
    index: dict[Tile, int]  # tile -> its number, in row-major order

    def box(self, tile: Tile) -> Box:
        """The cells of a tile."""
        return Box.at(
            self.origin[0] + tile[0] * self.size[0], self.origin[1] + tile[1] * self.size[1], *self.size
        )

    def overlapping(self, box: Box) -> Iterator[tuple[int, Box]]:
        """The computed tiles that a box touches: number and box of each."""
        (y0, x0), (h, w) = self.origin, self.size
        for row in range((box.top - y0) // h, (box.bottom - 1 - y0) // h + 1):
            for column in range((box.left - x0) // w, (box.right - 1 - x0) // w + 1):
                number = self.index.get((row, column))
                if number is not None:
                    yield number, self.box((row, column))


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

    A tile is computed if any of its cells sees tissue and is wanted.
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
    grid = Grid(origin, (size[0], size[1]), {})
    rows, columns = ceil_div(blocks.height * block, size[0]), ceil_div(blocks.width * block, size[1])
    for row in range(rows):
        for column in range(columns):
            box = grid.box((row, column))
            if spec.everywhere or clip or _is_wanted(spec, tissue, field, box):
                grid.index[row, column] = len(grid.index)
    return grid


def _is_wanted(spec: GridSpec, tissue: Tissue, field: Receptive, box: Box) -> bool:
    cells = tissue.seen_by(box, field)
    if spec.wanted is not None:
        cells &= tissue.seen_by(box, spec.wanted)
    return bool(cells.any())


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
        self._storage = storage

    def put(self, tile: Tile, values_CHW: Tensor) -> None:
        """Store a tile, or the first rows and columns of one that the frame cuts short."""
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

    def free(self) -> None:
        """Give the tiles' room back."""
        self.tiles.free()
        self.drop_graphs()
        if self.device.type == "cpu":
            hand_back_freed(self.tiles.size_bytes)

    def drop_graphs(self) -> None:
        """Give the kept graphs' room back."""
        self.kept.clear()
        self._storage.give_back("device", self.kept_bytes)
        self.kept_bytes = 0


class GradientMap:
    """dL/d(cells) of a feature map, summed over all windows that read it; glass has one gradient for all."""

    def __init__(self, features: FeatureMap, storage: Storage) -> None:
        self.grid = features.grid
        self.glass = torch.zeros_like(features.glass, dtype=_exact(features.glass.dtype))
        self.tiles = storage.array(
            len(self.grid.index), (*self.grid.size, features.channels), features.glass.dtype, zero=True
        )

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
