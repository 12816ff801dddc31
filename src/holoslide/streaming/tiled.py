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
from itertools import chain

import torch
from torch import Tensor, nn

from holoslide.errors import ConfigError
from holoslide.geometry import Border, Box, ceil_div
from holoslide.streaming.edges import refuse_at_edges
from holoslide.streaming.features import (
    Batch,
    FeatureMap,
    GradientMap,
    Grid,
    GridSpec,
    InputGradient,
    make_grid,
)
from holoslide.streaming.folding import Folded
from holoslide.streaming.probe import field_of, links, settings
from holoslide.streaming.sources import Source
from holoslide.streaming.storage import Storage, StorageConfig
from holoslide.streaming.trials import input_channels, output_shape, shape_twin

Pull = Callable[[Batch, Tensor], list[tuple[Tensor, Tensor]]]
"""From a batch of tiles and its output (B, C, H, W) with its graph: the tensors to pull back, and dL/d each."""


@dataclass(frozen=True, slots=True)
class OutputGradient:
    """dL/d(output) of a loss that is made tile by tile.

    `pull` is asked for each batch of computed tiles. All other cells have one vector, the output's glass: `glass_C`
    is the sum of their gradients, None where the loss reads none of them.
    """

    pull: Pull
    glass_C: Tensor | None = None


Gradients = Tensor | GradientMap | OutputGradient
"""dL/d(output): a tensor (C, H, W) of the whole frame; a map, where that would not fit; or tile by tile."""


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

    def __post_init__(self) -> None:
        for name, least in (("side", 1), ("batch", 1), ("keep", 0), ("graph_bytes", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"tiling.{name}", f"is {getattr(self, name)}", f"give {least} or more")


class Segment:
    """A module that is streamed at a time: its folded twin, its receptive field, its precision.

    `module` maps (B, C, H, W) to (B, C', H', W') and is on its device and in evaluation mode already. `border`:
    what lies around the map, `glass` (one vector, for ever) or `zeros` (each layer pads as it would on the whole
    map). `mixed` is the dtype of autocast, None for the parameters' own. Raises `NotLocal`, with the layer's
    name, if the module is not a local function of its input, or keeps what went through it in a buffer. Hooks and
    autograd functions that change gradients see those of a tile at a time: exact if they are linear.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        border: Border = "glass",
        mixed: torch.dtype | None = None,
        channels: int | None = None,
    ) -> None:
        """`channels` of the input are those of the first layer that says (default)."""
        self.module, self.border, self.mixed = module, border, mixed
        self.channels = input_channels(module) if channels is None else channels
        self._examine()

    @torch.inference_mode(mode=False)  # else the twin could not be trained later
    def _examine(self) -> None:
        module, self._state = self.module, _state(self.module)
        self._links = links(module, self.channels)
        self.field = field_of(self._links)
        self.out_channels = self._links[-1].out_channels if self._links else self.channels
        if self.border == "zeros":
            refuse_at_edges(module, self.channels, self._links)
        self._shapes = shape_twin(module)
        self.folded = Folded(module, self.channels, stride=self.field.stride)
        tensors = chain(module.parameters(), module.buffers())
        tensor = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
        self._has_tensors = tensor is not None
        self.device = torch.device("cpu") if tensor is None else tensor.device
        self.dtype = self.mixed or (torch.float32 if tensor is None else tensor.dtype)

    def adopt(self, source: Source) -> None:
        """Follow the module, where it was moved or given another mode, precision, layer, setting or hook meanwhile.

        Where it has no device and precision of its own, as pooling, for one, it takes the source's.
        """
        if self._state != _state(self.module):
            self._examine()
        if not self._has_tensors:
            self.device, self.dtype = source.device, self.mixed or source.glass.dtype

    def autocast(self, *, enabled: bool = True) -> AbstractContextManager[object]:
        """Mixed precision as configured; casts of the weights are remembered while the outermost lasts."""
        return torch.autocast(self.device.type, dtype=self.mixed, enabled=enabled and self.mixed is not None)

    def __call__(self, windows_BCHW: Tensor) -> Tensor:
        if self.folded.in_place and windows_BCHW.requires_grad:
            windows_BCHW = windows_BCHW.clone()
        output: Tensor = self.folded(windows_BCHW)
        return output.to(self.dtype)

    def glass(self, glass_C: Tensor) -> Tensor:
        """What the module makes of a field of one constant vector, (C',).

        Link by link: each makes one vector of one, and needs to see no more for it than its own window.
        """
        for link in self._links:
            before, after = link.field.margin_before, link.field.margin_after
            side = (before + 1 + after) * link.field.stride
            # Copied, as a layer may work in place.
            field = glass_C[None, :, None, None].expand(1, -1, side, side).clone()
            glass_C = self.folded.twin.get_submodule(link.name)(field)[0, :, before, before]
        return glass_C.to(self.dtype)

    def frame(self, frame: Box) -> Box:
        """The raster's cells in the output, from its cells in the input."""
        if self.border == "glass":
            return Box(0, 0, *(ceil_div(n, self.field.stride) for n in frame.shape))
        return Box(0, 0, *output_shape(self._shapes, self.channels, frame.shape)[2:])


def _state(module: nn.Module) -> list[object]:
    """What a twin takes over once and for all; values it is given anew for each slide."""
    tensors = chain(module.parameters(), module.buffers())
    layers = [(layer, layer.training, settings(layer), _hooks(layer)) for layer in module.modules()]
    return [*layers, *((t.dtype, t.device) for t in tensors)]


def _hooks(layer: nn.Module) -> list[int]:
    kinds = layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks
    return list(chain.from_iterable(kinds))


def forward_tiles(
    segment: Segment,
    source: Source,
    *,
    tiling: Tiling | None = None,
    spec: GridSpec | None = None,
    storage: Storage | None = None,
    input_grad: bool = False,
) -> FeatureMap:
    """The segment's output map for a slide, computed where it sees tissue.

    The graphs of some batches are kept for `backward_tiles`, as `tiling` allows; with `input_grad` they reach
    back to the windows. `spec` says which cells are wanted (default: all that see tissue), `storage` where they
    are kept (default: up to 2 GiB in memory, then a file). Equal to running the module on the whole map, up to
    rounding. Call `free` on the map to have its room back at once.
    """
    tiling = tiling or Tiling()
    segment.adopt(source)
    segment.folded.refresh()
    with torch.no_grad(), segment.autocast():
        glass = segment.glass(source.glass.to(segment.dtype))
    field, frame = source.field.then(segment.field), segment.frame(source.frame)
    clip = segment.border == "zeros"
    grid = make_grid(spec or GridSpec(tiling.side), source.tissue, field, frame, clip=clip)
    storage = storage or Storage(StorageConfig(), segment.device)
    output = FeatureMap(grid, storage, like=source, field=field, frame=frame, glass=glass)
    output.batches = list(_batches(grid, segment, source.frame, tiling.batch))
    kept = storage.afford(tiling.graph_bytes, min(tiling.keep, len(output.batches)))
    output.kept_bytes = kept * tiling.graph_bytes
    numbers = range(len(output.batches))
    # autocast remembers casts made without a graph, so the two must not mix
    _run(segment, source, output, numbers[:kept], keep=True, input_grad=input_grad)
    _run(segment, source, output, numbers[kept:], keep=False)
    return output


def _run(
    segment: Segment,
    source: Source,
    output: FeatureMap,
    numbers: Sequence[int],
    *,
    keep: bool,
    input_grad: bool = False,
) -> None:
    """Compute and store some batches of `output`, with or without keeping their graphs."""
    with segment.autocast(), torch.set_grad_enabled(keep):
        for number, windows in _read_ahead(source, output.batches, numbers):
            batch = output.batches[number]
            result = _crop(segment(windows.requires_grad_(input_grad)), batch.crop)
            for tile, values_CHW in zip(batch.tiles, result.detach(), strict=True):
                output.put(tile, values_CHW)
            if keep:
                output.kept[number] = (windows, result)


def backward_tiles(
    segment: Segment,
    source: Source,
    output: FeatureMap,
    *grads: Gradients,
    into: InputGradient | None = None,
) -> None:
    """Add dL/d(parameters) to the module's `.grad`, and dL/d(input) to `into` where it is given.

    `grads` are dL/d(output), and add up. Each `forward_tiles` has one `backward_tiles`; raises `RuntimeError` for a
    second.
    """
    segment.folded.check_fresh()
    whole = [GradientMap.of(output, g) for g in grads if isinstance(g, Tensor)]
    parts = [_by_tile(g) for g in (*whole, *grads) if not isinstance(g, Tensor)]
    glass = [part.glass_C for part in parts if part.glass_C is not None]
    if glass and segment.border == "glass":
        glass_C = backward_glass(segment, source.glass.to(segment.dtype), torch.stack(glass).sum(0))
        if into is not None:
            into.glass += glass_C

    def pull(batch: Batch, result_BCHW: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [root for part in parts for root in part.pull(batch, result_BCHW)]

    _backward_batches(segment, source, output, pull, into)
    segment.folded.pull_back()
    for gradient in whole:
        gradient.free()


def _backward_batches(
    segment: Segment, source: Source, output: FeatureMap, pull: Pull, into: InputGradient | None
) -> None:
    """First the batches whose graphs were kept, then the rest, run again."""
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


def backward_readers(segment: Segment, output: FeatureMap, gradient: OutputGradient) -> None:
    """Add dL/d(parameters) of what reads `output`, tile by tile, and of nothing below it."""
    for batch in output.batches:
        with segment.autocast():
            roots = gradient.pull(batch, output.windows(batch.boxes))
        _backward(segment, roots)


def backward_glass(segment: Segment, glass_C: Tensor, grad_C: Tensor) -> Tensor:
    """Pull dL/d(output glass) back through the constant field that made it; gives dL/d(input glass), (C,).

    To be called before `backward_tiles`, which passes the parameters' gradients on.
    """
    leaf = glass_C.detach().clone().requires_grad_()
    with segment.autocast():
        output = segment.glass(leaf)
    if output.requires_grad:
        torch.autograd.backward([output], [grad_C.to(output.dtype)])
    grad_in = leaf.grad  # None behind what lets no gradient pass
    return torch.zeros_like(leaf) if grad_in is None else grad_in


def _pull_back(
    segment: Segment, batch: Batch, windows: Tensor, result: Tensor, pull: Pull, into: InputGradient | None
) -> None:
    if into is not None and not windows.requires_grad:
        message = "backward_tiles: kept graphs end before the input; call forward_tiles with input_grad=True"
        raise RuntimeError(message)
    _backward(segment, pull(batch, result))
    if into is not None and windows.grad is not None:
        into.add(batch.windows, windows.grad)
        windows.grad = None


def _backward(segment: Segment, roots: Sequence[tuple[Tensor, Tensor]]) -> None:
    """From the roots that anything trained is behind; outside autocast, which would reach into it on a CPU."""
    trained = [(tensor, grad) for tensor, grad in roots if tensor.requires_grad]
    if trained:
        with segment.autocast(enabled=False):
            torch.autograd.backward([tensor for tensor, _ in trained], [grad for _, grad in trained])


def _by_tile(grads: GradientMap | OutputGradient) -> OutputGradient:
    if isinstance(grads, OutputGradient):
        return grads

    def pull(batch: Batch, result_BCHW: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(result_BCHW, grads.windows(batch.tiles, batch.boxes[0].shape))]

    return OutputGradient(pull, grads.glass)


def _crop(output_BCHW: Tensor, crop: Box) -> Tensor:
    rows, columns = crop.slices
    return output_BCHW[:, :, rows, columns]


def _batches(grid: Grid, segment: Segment, inputs: Box, size: int) -> Iterator[Batch]:
    """Group tiles, in order, whose windows have the same shape and crop."""
    groups: dict[tuple[tuple[int, int], Box], list[tuple[tuple[int, int], Box, Box]]] = {}
    clip = segment.border == "zeros"
    for tile in grid.index:
        box = grid.box(tile)
        rows = segment.field.window(box.top, box.bottom, inputs.height if clip else None)
        columns = segment.field.window(box.left, box.right, inputs.width if clip else None)
        window = Box(rows[0], columns[0], rows[1], columns[1])
        crop = Box.at(rows[2], columns[2], *box.shape)
        groups.setdefault((window.shape, crop), []).append((tile, box, window))
    number = 0
    for (_, crop), members in groups.items():
        for start in range(0, len(members), size):
            tiles, boxes, windows = zip(*members[start : start + size], strict=True)
            yield Batch(number, tiles, boxes, windows, crop)
            number += 1


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
