"""What a model needs for a slide: its stages for the plan, what heads and decoders hold, what weights take."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch

from holoslide.geometry import ceil_div
from holoslide.models.readout import chunk_values
from holoslide.models.streamed import StreamedClassifier, head_stride
from holoslide.pixels import Pixels
from holoslide.streaming.cost import Cost, Peak, PeakBytes, measure
from holoslide.streaming.host import free_bytes
from holoslide.streaming.plan import HEAP_BYTES, SLACK, Plan, Stage, make_plan, parameter_bytes
from holoslide.streaming.receptive import Receptive
from holoslide.streaming.sources import PixelSource
from holoslide.streaming.tiled import Segment

_TRIAL_SIDES = (4, 12)  # of patches
_TAKEN = 0.7  # of free memory, where no budget is given


def plan_for(
    network: StreamedClassifier, slide: Pixels, *, training: bool, processes: int = 1, held_bytes: int = 0
) -> Plan | None:
    """Tiles and storage for a slide, and for all that have less tissue; None if the tiles were given.

    `processes` share the machine's memory, each with a GPU of its own if there are any; `held_bytes` is what the
    budget has to hold beside weights, gradients and the optimiser's moments. Raises `MemoryPlanError` if that is
    too little.
    """
    if network.config.tile_cells is not None:
        return None
    source, given = network.source(slide), network.config.memory_gib
    host_bytes = int(_TAKEN * free_bytes(torch.device("cpu"))) // processes
    on_host = network.device.type == "cpu"
    free = host_bytes if on_host else int(_TAKEN * free_bytes(network.device))
    return make_plan(
        _Needs(network, source, training=training).stages(),
        source.tissue,
        source.frame,
        budget_bytes=int(given * 2**30) if given else free,
        fixed_bytes=HEAP_BYTES + held_bytes + _weight_bytes(network, training=training),
        host_bytes=0 if on_host else host_bytes,
        folder=network.config.folder,
    )


def _weight_bytes(network: StreamedClassifier, *, training: bool) -> int:
    """What weights take: the model's, those of the folded twins, and in training what belongs to them."""
    weights, parts = parameter_bytes(network.model), [parameter_bytes(part) for part in network.model.parts]
    twins = parameter_bytes(network.model.stem) + sum(parts)
    if not training:
        return weights + twins
    # Gradients and AdamW's two moments; from a group's forward pass to the end of its backward pass its folded
    # weights with their graph, and the twins' gradients.
    return 4 * weights + twins + 2 * max(sum(parts[k] for k in group) for group in network.groups)


class _Needs:
    """What the parts of a network need for one slide; the stem is part -1."""

    def __init__(self, network: StreamedClassifier, source: PixelSource, *, training: bool) -> None:
        self.network, self.source, self.training = network, source, training

    def stages(self) -> list[Stage]:
        """Every segment in the order they run."""
        return [stage for k in range(-1, len(self.network.parts)) for stage in self._stages(k)]

    def _stages(self, k: int) -> Iterator[Stage]:
        network, trains = self.network, self.training and k >= 0
        chain = network.parts[k] if k >= 0 else network.stem
        wanted, group = network.wanted(k, training=self.training), network.group(k)
        # What the heads hold lasts until the backward pass of all parts up to the barrier.
        held = sum(self._head_bytes(j) for j in (group if trains else [k]))
        last = len(chain.segments) - 1
        for i, segment in enumerate(chain.segments):
            crossed = i > 0 or k > group[0]
            yield Stage(
                name=f"module {k + 1}" if k >= 0 else "stem",
                segment=segment,
                cost=self._cost(segment, trains=trains, input_grad=trains and crossed),
                block=head_stride(network.heads[k]) if k >= 0 and i == last else 1,
                everywhere=network.pool == "all" and k >= 0 and i == last,
                wanted=wanted[i] if wanted else None,
                trains=trains,
                barrier=not self.training or (i == last and k == group[-1]),
                head_bytes=held if trains or i == last else 0,
                decoder_bytes=self._decoder_bytes(k) if trains and i == last else 0,
            )

    def _cost(self, segment: Segment, *, trains: bool, input_grad: bool) -> Cost:
        costs, key = self.network.costs, (id(segment), trains, input_grad)
        if key not in costs:
            costs[key] = measure(segment, trains=trains, input_grad=input_grad)
        return costs[key]

    def _head_bytes(self, k: int) -> int:
        """What head k holds while windows are worked on: its cells, and dL/d(output) of the patches."""
        if k < 0:
            return 0
        network, training = self.network, self.training
        head, exact = network.heads[k], torch.promote_types(network.dtype, torch.float32).itemsize
        cells, output = self._voting_cells(k), network.parts[k].segments[-1]
        stored = output.dtype.itemsize
        held = cells * head.stem.out_channels
        chunk = min(held, chunk_values(network.device))
        values = held * (2 * stored + exact if training else stored) + 10 * exact * (chunk + cells)
        if training and k < len(network.decoders):
            patch_cells = network.model.config.reconstruction.patches * self._patch_side(k) ** 2
            values += patch_cells * output.out_channels * stored
        return values

    def _decoder_bytes(self, k: int) -> int:
        """What reconstructing module k's input takes, measured on small patches: it grows with their area."""
        network = self.network
        if k >= len(network.decoders):
            return 0
        decoder = copy.deepcopy(network.decoders[k])  # a trial leaves no gradients
        stride = network.model.strides[k]
        first, last = network.parts[k].segments[0], network.parts[k].segments[-1]
        count, areas, runs = network.model.config.reconstruction.patches, [], []
        for side in _TRIAL_SIDES:
            with PeakBytes() as counted, network.autocast():
                seen = torch.rand(
                    count, last.out_channels, side, side, device=network.device, dtype=last.dtype
                )
                fine = side * stride
                target = torch.rand(
                    count, first.channels, fine, fine, device=network.device, dtype=first.dtype
                )
                decoder.pull_back(seen, target, scale=stride, weight=0.0)
            areas.append(side * side)
            runs.append(counted)
        return int(SLACK * Peak.through(areas, runs).at(self._patch_side(k) ** 2))

    def _patch_side(self, k: int) -> int:
        cells = self.source.tissue.area_px / self._unit_px(k) ** 2
        return self.network.model.config.reconstruction.side_in(cells, largest=self.network.decoders[k].side)

    def _voting_cells(self, k: int) -> int:
        """How many cells of head k vote, at most."""
        side_px = self._unit_px(k) * head_stride(self.network.heads[k])
        if self.network.pool == "all":
            return math.prod(ceil_div(n, side_px) for n in self.source.frame.shape)
        return self.source.tissue.count(Receptive(side_px, 0, side_px - 1))

    def _unit_px(self, k: int) -> int:
        """The side of a cell of part k's map in pixels of the raster."""
        chains = (self.network.stem, *self.network.parts[: k + 1])
        return math.prod(segment.field.stride for chain in chains for segment in chain.segments)
