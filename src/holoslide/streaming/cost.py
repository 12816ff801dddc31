"""What a segment costs: bytes and seconds of one window of any size, from runs on two small ones.

Every tensor made is counted. What is alive at one moment of a run grows with the window's area on a straight line.
The peak is the highest of these lines: in a small window, where weights are most of it, another moment than in a
large one.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from holoslide.streaming.tiled import Segment

_TRIAL_SIDES = (8, 24)


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class hook has no types
    """Counts the bytes of all tensors made while it is active: `now` alive, and that at all `moments` so far."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's constructor has no types
        self.now = 0
        self.moments: list[int] = []
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        self.moments.append(self.now)
        return result

    @property
    def peak(self) -> int:
        """The most that was alive."""
        return max(self.moments, default=0)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            self.now -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, value, trace)  # type: ignore[no-untyped-call]  # torch's exit has no types
        self._alive.clear()


@dataclass(frozen=True, slots=True)
class Linear:
    """A quantity as a function of a window's area in input cells."""

    fixed: float
    per_cell: float

    def at(self, area: int) -> float:
        """Its value for a window of `area` cells."""
        return self.fixed + self.per_cell * area

    @classmethod
    def through(cls, areas: Sequence[int], values: Sequence[float]) -> Linear:
        """The line through two points, never falling."""
        slope = max(0.0, (values[1] - values[0]) / (areas[1] - areas[0]))
        return cls(max(0.0, values[0] - slope * areas[0]), slope)


@dataclass(frozen=True, slots=True)
class Peak:
    """The most of several quantities, each a line, as a function of a window's area in input cells."""

    lines: tuple[Linear, ...]

    def at(self, area: int) -> float:
        """Its value for a window of `area` cells."""
        return max(line.at(area) for line in self.lines)

    @classmethod
    def through(cls, areas: Sequence[int], runs: Sequence[PeakBytes]) -> Peak:
        """From runs on two sizes: line by line where both did the same, else through their peaks."""
        moments = [run.moments for run in runs]
        if len(moments[0]) != len(moments[1]):
            moments = [[run.peak] for run in runs]
        return cls(tuple({Linear.through(areas, pair) for pair in zip(*moments, strict=True)}))


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes and seconds of one window: the most alive in all its passes, its graph, and each pass's time.

    What is not trained has a forward pass alone; what is trained may go forwards again before it goes backwards:
    `backward_s` holds both.
    """

    window_bytes: Peak
    graph_bytes: Linear
    forward_s: Linear
    backward_s: Linear


@dataclass(frozen=True, slots=True)
class _Trial:
    """One run on one window: what was alive, the bytes of its graph, and the time until there and in all."""

    counted: PeakBytes
    graph_bytes: int
    forward_s: float
    seconds: float


def measure(segment: Segment, *, trains: bool = True, input_grad: bool = False) -> Cost:
    """Run a segment on two small windows, and see what it takes. Its gradients are left as they were."""
    field = segment.field
    segment.folded.refresh()
    sides = [(n + field.margin_before + field.margin_after) * field.stride for n in _TRIAL_SIDES]
    areas = [side * side for side in sides]

    def trial(side: int) -> _Trial:
        return _trial(segment, side, backward=trains, input_grad=input_grad)

    # What is there from the second step on: the gradients, and what libraries set up; on a GPU that is by size.
    for side in sides if segment.device.type == "cuda" else sides[:1]:
        trial(side)
    trials = [trial(side) for side in sides]
    for parameter in segment.folded.twin.parameters():
        parameter.grad = None
    return Cost(
        window_bytes=Peak.through(areas, [trial.counted for trial in trials]),
        graph_bytes=Linear.through(areas, [trial.graph_bytes for trial in trials]),
        forward_s=Linear.through(areas, [trial.forward_s for trial in trials]),
        backward_s=Linear.through(areas, [trial.seconds for trial in trials]) if trains else Linear(0, 0),
    )


def _trial(segment: Segment, side: int, *, backward: bool, input_grad: bool) -> _Trial:
    with PeakBytes() as counted:
        started = _now(segment.device)
        windows = torch.full(
            (1, segment.channels, side, side), 0.5, device=segment.device, dtype=segment.dtype
        )
        windows.requires_grad_(input_grad)
        with segment.autocast(), torch.set_grad_enabled(backward):
            result = segment(windows)
        graph_bytes, forward_s = counted.now, _now(segment.device) - started
        if backward and result.requires_grad:  # not where all is frozen
            torch.autograd.backward([result], [torch.ones_like(result)])
        seconds = _now(segment.device) - started
    return _Trial(counted, graph_bytes, forward_s, seconds)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
