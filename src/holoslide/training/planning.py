"""The memory plan of a run: made once, for its largest slides, written down, and obeyed to the end.

Other tiles give the same gradients only up to rounding. So a run that is resumed goes on with the plan it began
with, whatever memory is free by then, unless it is given another budget.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pydantic
from lightning_fabric import Fabric

from holoslide.files import write_json
from holoslide.models.memory import plan_for
from holoslide.models.options import StreamConfig
from holoslide.models.streamed import StreamedClassifier
from holoslide.pixels import Pixels
from holoslide.runs import PLAN
from holoslide.streaming.plan import Plan, parameter_bytes
from holoslide.training.parallel import together
from holoslide.training.samples import Slides


@dataclass(frozen=True, slots=True)
class RunPlan:
    """How training and validation are run, and the settings that were planned for; None where tiles were given."""

    stream: StreamConfig
    train: Plan | None
    valid: Plan | None

    @property
    def peak_bytes(self) -> int:
        """The most that either takes on its device, beside the process's own; 0 where tiles were given."""
        return max((plan.peak_bytes for plan in (self.train, self.valid) if plan is not None), default=0)


def plan_run(
    network: StreamedClassifier, slides: Slides, fabric: Fabric, out: Path, *, nodes: int = 1,
    held_bytes: int = 0, begun: bool = False,
) -> RunPlan:  # fmt: skip
    """A new plan, which is written to `out`; for a run that has `begun` the one there, if its budget is the same.

    `held_bytes` are what the run holds beside the model and its optimiser. Every rank gets rank 0's.
    Raises `MemoryPlanError`.
    """
    plan: RunPlan | None = None
    if fabric.is_global_zero:
        plan = _read(out / PLAN) if begun else None
        if plan is None or plan.stream != network.config:
            processes = max(1, fabric.world_size // nodes)  # on this machine
            plan = _make(network, slides, processes=processes, held_bytes=held_bytes)
            _write(plan, out / PLAN)
    with together(fabric):
        plan = fabric.broadcast(plan)
    assert plan is not None
    return plan


def _make(network: StreamedClassifier, slides: Slides, *, processes: int, held_bytes: int) -> RunPlan:
    with slides.open_largest("train") as pixels:
        train = plan_part(network, pixels, training=True, processes=processes, held_bytes=held_bytes)
    with slides.open_largest("valid") as pixels:
        valid = plan_part(network, pixels, training=False, processes=processes, held_bytes=held_bytes)
    return RunPlan(network.config, train, valid)


def plan_part(
    network: StreamedClassifier, slide: Pixels, *, training: bool, processes: int = 1, held_bytes: int = 0
) -> Plan | None:
    """The plan of a run's training, or of its validation, for a slide; `held_bytes` as in `plan_run`."""
    if not training:
        held_bytes += 2 * parameter_bytes(network.model)  # AdamW's moments outlast the epoch
    return plan_for(network, slide, training=training, processes=processes, held_bytes=held_bytes)


def _write(plan: RunPlan, path: Path) -> None:
    write_json(dataclasses.asdict(plan), path)


def _read(path: Path) -> RunPlan | None:
    """None where there is none, or none that this version can read: then it is made anew."""
    try:
        return pydantic.TypeAdapter(RunPlan).validate_json(path.read_bytes())
    except (OSError, pydantic.ValidationError):
        return None
