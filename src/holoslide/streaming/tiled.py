"""Run a module over a map of any size tile by tile, forwards and backwards, exactly.

A tile of the output needs a window of the input; the module runs on the window and the tile is cropped from
its output. Parameter gradients add up over the tiles: since the tiles partition the cells, the sum *is* the
gradient. At the raster's edge the border is either `glass` (the slide goes on for ever in one colour, and the
module maps it to one vector) or `zeros` (every layer pads with zeros at the raster's edge, as plain execution
does: windows are then cut off at the edge, so that the layers' own padding acts there).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from holoslide.geometry import Box, ceil_div
from holoslide.streaming.features import Batch, FeatureMap, GradientMap, Grid, GridSpec, Source, make_grid
from holoslide.streaming.folding import Folded
from holoslide.streaming.receptive import Receptive, input_channels, output_shape, probe
from holoslide.streaming.storage import Storage

Border = Literal["glass", "zeros"]
Pull = Callable[[Batch, Tensor], list[tuple[Tensor, Tensor]]]
"""From a batch of tiles and its output (B, C, H, W) with its graph: the tensors to pull back, and dL/d each."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a segment is run.

    `side`: largest tile side in output cells. `batch`: tiles run together. `keep`: at most so many batches'
    graphs are kept for the backward pass, each of `graph_bytes`, as far as the storage's budget goes.
    """

    side: int = 128
    batch: int = 1
    keep: int = 0
    graph_bytes: int = 0


class Segment:
    """A module that is streamed at a time: its folded twin, its receptive field, its precision.

    `mixed` is the dtype of autocast, None for the parameters' own. Raises `NotLocal` if the module is not a
    local function of its input.
    """

    def __init__(
        self, module: nn.Module, *, border: Border = "glass", mixed: torch.dtype | None = None
    ) -> None:
        self.module = module
        self.channels = input_channels(module)
        self.field = probe(module, self.channels)
        self.out_channels = output_shape(module, self.channels, (512, 512))[1]
        self.folded = Folded(module)
        self.border: Border = border
        self.mixed = mixed
        parameter = next(module.parameters())
        self.device = parameter.device
        self.dtype = mixed or parameter.dtype

    def autocast(self, *, enabled: bool = True) -> AbstractContextManager[object]:
        """Mixed precision as configured; casts of the weights are remembered while the outermost lasts."""
        return torch.autocast(self.device.type, dtype=self.mixed, enabled=enabled and self.mixed is not None)

    def __call__(self, windows_BCHW: Tensor) -> Tensor:
        output: Tensor = self.folded(windows_BCHW)
        return output.to(self.dtype)

    def glass(self, glass_C: Tensor) -> Tensor:
        """What the module makes of a field of one constant vector, (C',)."""
        before, after = self.field.margin_before, self.field.margin_after
        side = (before + 1 + after) * self.field.stride
        output = self(glass_C[None, :, None, None].expand(1, -1, side, side))
        return output[0, :, before, before]

    def frame(self, frame: Box) -> Box:
        """The raster's cells in the output, from its cells in the input."""
        if self.border == "glass":
            return Box(0, 0, *(ceil_div(n, self.field.stride) for n in frame.shape))
        return Box(0, 0, *output_shape(self.module, self.channels, frame.shape)[2:])


def forward_tiles(
    segment: Segment,
    source: Source,
    spec: GridSpec,
    storage: Storage,
    *,
    tiling: Tiling,
    input_grad: bool = False,
) -> FeatureMap:
    """The segment's output map for a slide, computed where it sees tissue.

    The graphs of some batches are kept for `backward_tiles`, as `tiling` allows; with `input_grad` they reach
    back to the windows. Equal to running the module on the whole map, up to rounding.
    """
    segment.folded.refresh()
    with torch.no_grad(), segment.autocast():
        glass = segment.glass(source.glass.to(segment.dtype))
    field, frame = source.field.then(segment.field), segment.frame(source.frame)
    grid = make_grid(spec, source.tissue, field, frame, clip=segment.border == "zeros")
    output = FeatureMap(grid, storage, like=source, field=field, frame=frame, glass=glass)
    output.batches = list(_batches(grid, segment, source.frame, frame, tiling.batch))
    kept = storage.afford(tiling.graph_bytes, min(tiling.keep, len(output.batches)))
    output.kept_bytes = kept * tiling.graph_bytes
    for keep in (True, False):  # autocast remembers casts made without a graph, so the two must not mix
        numbers = [n for n in range(len(output.batches)) if (n < kept) == keep]
        with segment.autocast(), torch.set_grad_enabled(keep):
            for number, windows in _read_ahead(source, output.batches, numbers):
                batch = output.batches[number]
                result = _crop(segment(windows.requires_grad_(keep and input_grad)), batch.crop)
                for tile, values_CHW in zip(batch.tiles, result.detach(), strict=True):
                    output.put(tile, values_CHW)
                if keep:
                    output.kept[number] = (windows, result)
    return output


def backward_tiles(
    segment: Segment, source: Source, output: FeatureMap, pull: Pull, *, into: GradientMap | None = None
) -> None:
    """Add dL/d(parameters) to the module's `.grad`, and dL/d(input cells) to `into` where it is given.

    `pull` says what to pull back from each batch of tiles.
    """
    with segment.autocast():
        kept = list(output.kept)
        for number in kept:
            windows, result = output.kept.pop(number)
            _pull_back(segment, output.batches[number], windows, result, pull, into)
        output.drop_graphs()
        rest = [n for n in range(len(output.batches)) if n not in set(kept)]
        for number, windows in _read_ahead(source, output.batches, rest):
            windows.requires_grad_(into is not None)
            result = _crop(segment(windows), output.batches[number].crop)
            _pull_back(segment, output.batches[number], windows, result, pull, into)
    segment.folded.pull_back()


def backward_readers(segment: Segment, output: FeatureMap, pull: Pull) -> None:
    """Add dL/d(parameters) of what reads `output`, tile by tile, and of nothing below it."""
    for batch in output.batches:
        with segment.autocast():
            roots = pull(batch, output.windows(batch.boxes))
        trained = [(tensor, grad) for tensor, grad in roots if tensor.requires_grad]
        if trained:
            torch.autograd.backward([tensor for tensor, _ in trained], [grad for _, grad in trained])


def backward_glass(segment: Segment, glass_C: Tensor, grad_C: Tensor) -> Tensor:
    """Pull dL/d(output glass) back through the constant field that made it; gives dL/d(input glass), (C,).

    To be called before `backward_tiles`, which passes the parameters' gradients on.
    """
    leaf = glass_C.detach().clone().requires_grad_()
    with segment.autocast():
        output = segment.glass(leaf)
    torch.autograd.backward([output], [grad_C.to(output.dtype)])
    assert leaf.grad is not None
    return leaf.grad


def _pull_back(
    segment: Segment, batch: Batch, windows: Tensor, result: Tensor, pull: Pull, into: GradientMap | None
) -> None:
    roots = pull(batch, result)
    with segment.autocast(enabled=False):
        torch.autograd.backward([tensor for tensor, _ in roots], [grad for _, grad in roots])
    if into is not None and windows.grad is not None:
        into.add(batch.windows, windows.grad)
        windows.grad = None


def _crop(output_BCHW: Tensor, crop: Box) -> Tensor:
    rows, columns = crop.slices
    return output_BCHW[:, :, rows, columns]


def _batches(grid: Grid, segment: Segment, inputs: Box, outputs: Box, size: int) -> Iterator[Batch]:
    """Group tiles, in order, whose windows have the same shape and crop."""
    groups: dict[tuple[tuple[int, int], Box], list[tuple[tuple[int, int], Box, Box]]] = {}
    clip = segment.border == "zeros"
    for tile in grid.index:
        box = grid.box(tile).intersect(outputs) if clip else grid.box(tile)
        rows = _window(box.top, box.bottom, inputs.height, segment.field, clip=clip)
        columns = _window(box.left, box.right, inputs.width, segment.field, clip=clip)
        window = Box(rows[0], columns[0], rows[1], columns[1])
        crop = Box.at(rows[2], columns[2], *box.shape)
        groups.setdefault((window.shape, crop), []).append((tile, box, window))
    number = 0
    for (_, crop), members in groups.items():
        for start in range(0, len(members), size):
            tiles, boxes, windows = zip(*members[start : start + size], strict=True)
            yield Batch(number, tiles, boxes, windows, crop)
            number += 1


def _window(start: int, stop: int, length: int, field: Receptive, *, clip: bool) -> tuple[int, int, int]:
    """First and last + 1 input cell of the window of output cells [start, stop), and the crop's start."""
    first, last = start - field.margin_before, stop + field.margin_after
    if clip:
        first = max(first, 0)
        return first * field.stride, min(last * field.stride, length), start - first
    return first * field.stride, last * field.stride, start - first


def _read_ahead(
    source: Source, batches: Sequence[Batch], numbers: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """The windows of batches in turn; a slow source reads the next while the present are computed."""
    if not source.slow:
        for number in numbers:
            yield number, source.windows(batches[number].windows)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="holoslide-read") as reader:
        pending = [(n, reader.submit(source.windows, batches[n].windows)) for n in numbers[:1]]
        for position in range(len(numbers)):
            number, future = pending.pop()
            windows = future.result()
            if position + 1 < len(numbers):
                following = numbers[position + 1]
                pending.append((following, reader.submit(source.windows, batches[following].windows)))
            yield number, windows
