"""Steps that several benchmarks time side by side: the streamed one by a plan, the plain one well made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from benchmarks.plain import plain_step, whole
from holoslide.models.classifier import LocalClassifier
from holoslide.models.memory import plan_for
from holoslide.models.streamed import StreamedClassifier
from holoslide.pixels import Pixels
from holoslide.streaming.plan import Plan
from holoslide.training.local import LocalStep

Step = Callable[[], float]
"""One step of one slide, from gradients of None; gives the sum of all losses."""


def draws() -> torch.Generator:
    """The dropout's and the patches', the same each time."""
    return torch.Generator().manual_seed(0)


def follow_plan(network: StreamedClassifier, slide: Pixels, *, kept: bool = True) -> Plan:
    """Plan training for the slide and follow that; unless `kept`, every graph is made anew in the backward pass."""
    plan = plan_for(network, slide, training=True)
    assert plan is not None, "the configuration gives tiles, so there is nothing to plan"
    network.follow(plan if kept else without_graphs(plan))
    return plan


def streamed(network: StreamedClassifier, slide: Pixels, *, label: int = 1) -> Step:
    """The streamed step, by the plan that the network follows."""
    step = LocalStep(network)

    def run() -> float:
        network.model.zero_grad()
        result = step(slide, label, generator=draws())
        return sum(result.classification) + sum(result.reconstruction)

    return run


def without_graphs(plan: Plan) -> Plan:
    """The same tiles, but no graph is kept for the backward pass."""
    stages = [
        dataclasses.replace(stage, tiling=dataclasses.replace(stage.tiling, keep=0)) for stage in plan.stages
    ]
    return dataclasses.replace(plan, stages=tuple(stages))


def plain(model: LocalClassifier, slide: Pixels, *, mixed: torch.dtype | None, label: int = 1) -> Step:
    """The plain step on all of the raster, which is read and on the device before it is timed."""
    pixels_1CHW = whole(slide, next(model.parameters()).device)

    def run() -> float:
        model.zero_grad()
        result = plain_step(model, pixels_1CHW, label, slide=slide, mixed=mixed, generator=draws())
        return sum(result.classification) + sum(result.reconstruction)

    return run
