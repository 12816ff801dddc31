"""From a byte budget to tile sides and storage, and the peak memory to expect, before anything is run.

What a segment needs is measured, not guessed (`cost.py`). Working memory that libraries take inside one operation
is not seen, nor what the heap keeps of freed blocks; `SLACK` and `HEAP_BYTES` allow for them, as
`python -m benchmarks.streaming --only plan` found them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from holoslide.errors import MemoryPlanError
from holoslide.geometry import Box
from holoslide.streaming.cost import Cost
from holoslide.streaming.features import GridSpec, make_grid
from holoslide.streaming.receptive import Receptive
from holoslide.streaming.storage import StorageConfig
from holoslide.streaming.tiled import Segment, Tiling
from holoslide.streaming.tissue import Tissue

SLACK = 1.05
HEAP_BYTES = 60 * 10**6
_SIDES = (24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# What starting on a window costs, as the side of a square of input cells that takes as long.
_START_CELLS = {"cpu": 40, "cuda": 400}
_NEAR_BEST = 1.05
_HOPELESS = 1.2  # so many times the work of the best: smaller tiles only take more


@dataclass(frozen=True, slots=True)
class Stage:
    """A segment in its place: what the plan must know of it.

    `barrier`: whether a gradient barrier follows, so that maps before it can go. `head_bytes`: what its head holds
    beside the windows. `decoder_bytes`: what its decoder takes, when no window is being worked on.
    """

    name: str
    segment: Segment
    cost: Cost
    block: int
    everywhere: bool
    wanted: Receptive | None
    trains: bool
    barrier: bool
    head_bytes: int = 0
    decoder_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StagePlan:
    """How a stage is run, and what that takes for the slide that was planned for."""

    name: str
    tiling: Tiling
    tiles: int
    map_bytes: int
    work_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Tilings and storage under a budget; `peak_bytes` is what to expect of the device, at most.

    Maps that do not fit there go to `host_bytes` of pinned host memory (a GPU's alone), then to a file.
    """

    stages: tuple[StagePlan, ...]
    storage: StorageConfig
    budget_bytes: int
    fixed_bytes: int
    peak_bytes: int
    host_bytes: int
    file_bytes: int
    seconds: float


def make_plan(
    stages: Sequence[Stage], tissue: Tissue, frame: Box, *, budget_bytes: int, fixed_bytes: int,
    host_bytes: int = 0, folder: str | None = None,
) -> Plan:  # fmt: skip
    """Tilings that fit and waste little; `host_bytes` of host memory take maps that do not fit on the device.

    A function of its arguments, up to the seconds that were measured, which are told and decide nothing. Raises
    `MemoryPlanError` that names the smallest budget that would do.
    """
    room = budget_bytes - fixed_bytes
    field, choices = Receptive(), []
    for stage in stages:
        field, frame = field.then(stage.segment.field), stage.segment.frame(frame)
        choices.append(_options(stage, tissue, field, frame, room=room))
    _refuse_too_little(choices, room=room, fixed_bytes=fixed_bytes)
    planned = [_choose(options, room) for options in choices]
    work = max(p.work_bytes for p in planned)
    pool = max(0, room - work)
    peak, maps = _peaks(stages, planned, pool)
    below = max(0, maps - pool)
    return Plan(
        tuple(planned),
        StorageConfig(device_bytes=pool, host_bytes=host_bytes, folder=folder),
        budget_bytes,
        fixed_bytes,
        peak_bytes=fixed_bytes + peak,
        host_bytes=min(below, host_bytes),
        file_bytes=max(0, below - host_bytes),
        seconds=sum(p.seconds for p in planned),
    )


@dataclass(frozen=True, slots=True)
class _Option:
    """A tile side for a stage, and how much work it makes: cells of all windows, with what starting them costs."""

    plan: StagePlan
    effort: int


def _refuse_too_little(choices: Sequence[Sequence[_Option]], *, room: int, fixed_bytes: int) -> None:
    smallest = [min((option.plan for option in options), key=lambda p: p.work_bytes) for options in choices]
    most = max(smallest, key=lambda plan: plan.work_bytes)
    if most.work_bytes > room:
        needed = (fixed_bytes + most.work_bytes) / 2**30 + 0.005  # told in hundredths, and enough
        raise MemoryPlanError(
            most.name, f"needs {needed:.2f} GiB at its smallest tiles", "give stream.memory_gib more"
        )


def _choose(options: Sequence[_Option], room: int) -> StagePlan:
    """The least memory among those that fit and take hardly more work than the best of them."""
    fitting = [option for option in options if option.plan.work_bytes <= room]
    least = min(option.effort for option in fitting)
    near_best = [option.plan for option in fitting if option.effort <= _NEAR_BEST * least]
    return min(near_best, key=lambda plan: plan.work_bytes)


def _options(stage: Stage, tissue: Tissue, field: Receptive, frame: Box, *, room: int) -> list[_Option]:
    """From large tiles to small, up to where borders make up most of the work: small ones are many to count."""
    found: list[_Option] = []
    for side in reversed(_SIDES):
        found.append(_option(stage, tissue, field, frame, side=side))
        least = min((o.effort for o in found if o.plan.work_bytes <= room), default=math.inf)
        if found[-1].effort > _HOPELESS * least:
            break
    return found


def _option(stage: Stage, tissue: Tissue, field: Receptive, frame: Box, *, side: int) -> _Option:
    segment, cost = stage.segment, stage.cost
    before, after, stride = segment.field.margin_before, segment.field.margin_after, segment.field.stride
    spec = GridSpec(max(side, stage.block), stage.block, stage.everywhere, stage.wanted)
    grid = make_grid(spec, tissue, field, frame, clip=segment.border == "zeros")
    shapes, count = Counter(box.shape for box in grid.boxes.values()), len(grid.index)
    cells = sum(
        number * math.prod((n + before + after) * stride for n in shape) for shape, number in shapes.items()
    )
    # Another slide's tiles are evened out otherwise: none over the side that is told, but one may have all of it.
    whole = max(grid.size) if count else spec.side
    area = ((whole + before + after) * stride) ** 2
    seconds = sum(count * line.fixed + line.per_cell * cells for line in (cost.forward_s, cost.backward_s))
    graph_bytes = int(cost.graph_bytes.at(area)) if stage.trains else 0
    tiling = Tiling(whole, keep=count if stage.trains else 0, graph_bytes=graph_bytes)
    tile_bytes = grid.size[0] * grid.size[1] * segment.out_channels * segment.dtype.itemsize
    # The next window is read meanwhile.
    ahead = area * segment.channels * segment.dtype.itemsize if count > 1 else 0
    work_bytes = max(int(SLACK * cost.window_bytes.at(area)) + ahead, stage.decoder_bytes) + stage.head_bytes
    plan = StagePlan(stage.name, tiling, count, count * tile_bytes, work_bytes, seconds)
    return _Option(plan, cells + count * _START_CELLS[segment.device.type] ** 2)


def _peaks(stages: Sequence[Stage], planned: Sequence[StagePlan], pool: int) -> tuple[int, int]:
    """The most bytes held on the device at any moment, and the most of maps alive at once, wherever they are.

    Alive are a module's input, its inner maps with their gradients, and its output; then what is left of the pool
    takes graphs. A segment's windows are worked on, forwards and backwards, beside its own graphs and those of the
    segments before it: those after it are not there yet, or gone.
    """
    most_bytes = most_maps = before = 0
    for group in _modules(stages, planned):
        inner, last = group[:-1], group[-1][1]
        maps = before + sum(2 * plan.map_bytes for _, plan in inner) + last.map_bytes
        kept, most = 0, 0
        for _, plan in group:
            graphs, rest = _kept_bytes(plan, max(0, pool - maps - kept))
            kept += graphs
            most = max(most, kept + rest)
        decoder = max(stage.decoder_bytes + stage.head_bytes for stage, _ in group)
        most_bytes = max(most_bytes, min(maps, pool) + max(most, kept + decoder))
        most_maps, before = max(most_maps, maps), last.map_bytes
    return most_bytes, most_maps


def _kept_bytes(plan: StagePlan, room: int) -> tuple[int, int]:
    """What the graphs take that are kept in so much room, and what a window needs beside them.

    While the graph of a window is at hand, its backward pass needs only the rest.
    """
    size = plan.tiling.graph_bytes
    count = min(plan.tiles, room // size) if size else plan.tiles
    return count * size, plan.work_bytes - (size if count == plan.tiles else 0)


def _modules(
    stages: Sequence[Stage], planned: Sequence[StagePlan]
) -> Iterator[list[tuple[Stage, StagePlan]]]:
    """Stages up to each gradient barrier."""
    group = []
    for pair in zip(stages, planned, strict=True):
        group.append(pair)
        if pair[0].barrier:
            yield group
            group = []


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
