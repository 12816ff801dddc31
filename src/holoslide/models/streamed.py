"""A `LocalClassifier` made ready for streaming: its stem and parts as chains, its heads over tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from holoslide.geometry import Box
from holoslide.models.classifier import LocalClassifier
from holoslide.models.heads import Head
from holoslide.models.options import Pool, StreamConfig
from holoslide.models.reconstruction import Decoder
from holoslide.pixels import Pixels
from holoslide.streaming.chain import Chain
from holoslide.streaming.cost import Cost
from holoslide.streaming.features import Batch, FeatureMap, GradientMap
from holoslide.streaming.host import hand_back_at_once, hand_back_freed
from holoslide.streaming.plan import Plan
from holoslide.streaming.receptive import Receptive
from holoslide.streaming.sources import PixelSource
from holoslide.streaming.storage import Storage, StorageConfig
from holoslide.streaming.tiled import OutputGradient, Segment, Tiling, backward_readers


class StreamedClassifier:
    """Runs a model over slides of any size; holds no parameters of its own.

    `mixed` is the dtype of autocast, None for the parameters' own precision.
    """

    def __init__(
        self, model: LocalClassifier, config: StreamConfig, *, mixed: torch.dtype | None = None
    ) -> None:
        self.model, self.config = model, config
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.storage = Storage(StorageConfig(folder=config.folder), self.device)

        self.border, self.pool = model.config.border, model.config.pool
        self.heads = cast("list[Head]", list(model.heads))
        self.decoders = cast("list[Decoder]", list(model.decoders))
        parts = cast("list[nn.Sequential]", list(model.parts))
        self.mixed = mixed
        self.costs: dict[tuple[int, bool, bool], Cost] = {}  # what `memory.py` has measured
        self.stem = self._chain([model.stem], PixelSource.channels)
        self.parts: list[Chain] = []
        for part, head in zip(parts, self.heads, strict=True):
            before = self.parts[-1] if self.parts else self.stem
            seen, pieces = before.segments[-1].out_channels, _segments(part, config.segment_units)
            self.parts.append(self._chain(pieces, seen, block=head_stride(head), last=True))
        every = model.config.barrier_every
        self.groups = [range(len(parts))[k : k + every] for k in range(0, len(parts), every)]
        """Parts with no gradient barrier between them; one follows each group."""

    def _chain(
        self, modules: Sequence[nn.Module], channels: int, *, block: int = 1, last: bool = False
    ) -> Chain:
        segments: list[Segment] = []
        for module in modules:
            segments.append(Segment(module, border=self.border, mixed=self.mixed, channels=channels))
            channels = segments[-1].out_channels
        everywhere = last and self.pool == "all"
        tilings = [self._tiling()] * len(segments)
        return Chain(segments, tilings, self.storage, block=block, everywhere=everywhere)

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision as configured."""
        return torch.autocast(self.device.type, dtype=self.mixed, enabled=self.mixed is not None)

    def source(self, pixels: Pixels) -> PixelSource:
        """A slide's pixels, normalised as the model wants them."""
        return PixelSource(
            pixels, mean=self.model.mean, std=self.model.std, device=self.device, dtype=self.dtype
        )

    def stem_map(self, pixels: Pixels, *, training: bool = False) -> FeatureMap:
        """x_0: the frozen stem's output, where later maps read it."""
        return self.stem.forward(self.source(pixels), wanted=self.wanted(-1, training=training))

    def part_map(
        self, k: int, features: FeatureMap, *, training: bool = False, backward: bool | None = None
    ) -> FeatureMap:
        """Part k's output, where its head and later maps read it; `backward` (as `training`) says whether one
        follows."""
        wanted = self.wanted(k, training=training)
        follows = training if backward is None else backward
        crossed = k > self.group(k)[0]
        return self.parts[k].forward(features, training=follows, input_grad=crossed, wanted=wanted)

    def backward(
        self,
        group: range,
        maps: Sequence[FeatureMap],
        gradients: Sequence[OutputGradient],
        *,
        heads_alone: bool = False,
    ) -> None:
        """Add a group's gradients to `.grad`: to each part those of its own loss and of the parts after it.

        `maps` are what the group reads and each part's output, `gradients` the dL/d(output) of each part's own
        loss. With `heads_alone` only what reads the outputs gets any.
        """
        following: tuple[GradientMap, ...] = ()
        for n in reversed(range(len(group))):
            part = self.parts[group[n]]
            if heads_alone:
                backward_readers(part.segments[-1], maps[n + 1], gradients[n])
                continue
            into = GradientMap(maps[n]) if n > 0 else None
            part.backward(gradients[n], *following, into=into)
            for gradient in following:
                gradient.free()
            following = (into,) if into is not None else ()

    def group(self, k: int) -> range:
        """The parts that no gradient barrier parts from part k."""
        return next((group for group in self.groups if k in group), range(k, k + 1))

    def wanted(self, k: int, *, training: bool) -> list[Receptive | None]:
        """For each segment of part k (the stem is part -1): the pixels around a cell whose heads read it.

        Reconstruction reads a map, in training, wherever a patch may fall: then all of it is wanted.
        """
        reconstructs = training and len(self.decoders) > 0
        if self.pool == "all" or (reconstructs and k < len(self.parts) - 1):
            return []
        chain = self.stem if k < 0 else self.parts[k]
        return [self._readers(k, i) for i in range(len(chain.segments))]

    def _readers(self, k: int, i: int) -> Receptive:
        """The pixels, around a cell of the map after segment i of part k, of the head cells that read it."""
        chains = [self.stem, *self.parts]
        before = [s.field for chain in chains[: k + 1] for s in chain.segments]
        unit = math.prod(f.stride for f in (*before, *(s.field for s in chains[k + 1].segments[: i + 1])))
        path, readers = Receptive(), Receptive(unit)
        for j, chain in enumerate(chains[k + 1 :], start=k):
            for segment in chain.segments[i + 1 if j == k else 0 :]:
                path = path.then(segment.field)
            if j >= 0:
                stride = head_stride(self.heads[j])
                readers = readers.hull(path.then(Receptive(stride, 0, stride - 1)).readers(unit))
        return readers

    def head_cells(self, head: Head, output: FeatureMap) -> HeadCells:
        """The cells of a head's map that vote, without gradients."""
        return head_cells(head, output, pool=self.pool, clipped=self.border == "zeros")

    def read(self, pixels: Pixels) -> Iterator[tuple[Head, FeatureMap, HeadCells]]:
        """A slide, module by module: each head with the map that it reads, there until the next, and its cells.

        To be gone through without gradients.
        """
        features = self.stem_map(pixels)
        for k, head in enumerate(self.heads):
            output = self.part_map(k, features)
            features.free()
            with self.autocast():
                cells = self.head_cells(head, output)
            yield head, output, cells
            features = output
        features.free()
        hand_back_freed()

    def _tiling(self) -> Tiling:
        return Tiling(side=self.config.tile_cells or 128, batch=self.config.batch, keep=self.config.keep)

    def follow(self, plan: Plan | None) -> None:
        """Run slides by a plan from now on; None leaves the tiles that were given."""
        if plan is None:
            return
        if self.device.type == "cpu":
            hand_back_at_once()  # the plan counts what tensors take, not what the heap would keep of them
        self.storage = Storage(plan.storage, self.device)
        planned = iter(plan.stages)
        for chain in (self.stem, *self.parts):
            chain.storage = self.storage
            chain.tilings = [next(planned).tiling for _ in chain.segments]


def _segments(part: nn.Sequential, units: int) -> list[nn.Module]:
    children = list(part)
    size = units or len(children)
    return [nn.Sequential(*children[i : i + size]) for i in range(0, len(children), size)]


def head_stride(head: Head) -> int:
    """Side, in cells of the map it reads, of one cell of a head."""
    return int(head.stem.stride[0])


@dataclass(frozen=True, slots=True)
class HeadCells:
    """The cells of a head's map that vote, in row-major order whatever the tiles.

    `cells_NC` are their values, `places` their (y, x) on the head's grid, `rows[b]` where each voting cell of
    batch b stands in that order, `voting[b]` which cells of the batch's head map (B, h, w) vote, counted through.
    Both are numbers and no masks: on a GPU a mask has to be counted first, and all waits for that.
    """

    cells_NC: Tensor
    places: NDArray[np.int64]
    rows: list[Tensor]
    voting: list[Tensor]


def head_cells(head: Head, output: FeatureMap, *, pool: Pool, clipped: bool) -> HeadCells:
    """Run a head's stem over a map's tiles, without gradients, and gather the cells that vote.

    Their places come first, so that each batch's values are written where they belong: all cells are held once.
    """
    stride = head_stride(head)
    voting, counts, places = [], [], [np.empty((0, 2), np.int64)]
    for batch in output.batches:
        votes = np.stack([_votes(box, output, stride, pool=pool, clipped=clipped) for box in batch.boxes])
        voting.append(torch.from_numpy(np.flatnonzero(votes)).to(output.device, non_blocking=True))
        counts.append(len(voting[-1]))
        for box, vote in zip(batch.boxes, votes, strict=True):
            places.append(np.argwhere(vote) + np.array([box.top // stride, box.left // stride]))
    all_places = np.concatenate(places)
    order = np.lexsort((all_places[:, 1], all_places[:, 0]))
    rank = torch.empty(len(order), dtype=torch.long)
    rank[torch.from_numpy(order)] = torch.arange(len(order))
    rows = list(torch.split(rank.to(output.device, non_blocking=True), counts))
    cells_NC = output.glass.new_empty(0, head.stem.out_channels)
    for batch, which, row in zip(output.batches, voting, rows, strict=True):
        with torch.no_grad():
            cells_nC = voting_cells(head, output.windows(batch.boxes), which)
        if len(cells_NC) == 0:  # the first batch tells the dtype
            cells_NC = cells_nC.new_empty(len(order), head.stem.out_channels)
        cells_NC[row] = cells_nC
    return HeadCells(cells_NC, all_places[order], rows, voting)


def voting_cells(head: Head, tile_BCHW: Tensor, which: Tensor) -> Tensor:
    """Those of a head's cells of a tile that vote, (n, C'); `which` as in `HeadCells.voting`."""
    return head_map(head, tile_BCHW).permute(0, 2, 3, 1).flatten(0, 2).index_select(0, which)


def head_map(head: Head, tile_BCHW: Tensor) -> Tensor:
    """The head's cells of a tile, (B, C', h, w); a map smaller than one cell is filled up with zeros."""
    stride = head_stride(head)
    short = [max(0, stride - n) for n in tile_BCHW.shape[2:]]
    if any(short):
        tile_BCHW = F.pad(tile_BCHW, (0, short[1], 0, short[0]))
    cells: Tensor = head.stem(tile_BCHW)
    return cells


def _votes(box: Box, output: FeatureMap, stride: int, *, pool: Pool, clipped: bool) -> NDArray[np.bool_]:
    """Which head cells of a tile vote, (h, w)."""
    height, width = (max(1, n // stride) for n in box.shape)
    cells = Box.at(box.top // stride, box.left // stride, height, width)
    votes = np.ones(cells.shape, np.bool_)
    if pool == "tissue":
        side_px = stride * output.field.stride
        votes = output.tissue.seen_by(cells, Receptive(side_px, 0, side_px - 1))
    if clipped or pool == "all":
        # Where the raster ends, a strided convolution drops what does not fill a cell, but keeps one at least.
        whole = Box(0, 0, *(max(1, n // stride) for n in output.frame.shape))
        inside = cells.intersect(whole if clipped else output.frame.cover(stride)).relative_to(cells)
        kept = np.zeros_like(votes)
        if inside.area:
            kept[inside.slices] = True
        votes &= kept
    return votes


__all__ = [
    "Batch",
    "HeadCells",
    "StreamedClassifier",
    "head_cells",
    "head_map",
    "head_stride",
    "voting_cells",
]
