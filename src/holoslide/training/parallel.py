"""Several devices: data parallel over slides. Fabric starts the processes; what they exchange is here.

A step has many backward passes (one per tile), so wrapping modules to average gradients in each would send the
same bytes again and again. Gradients are summed over ranks once per optimiser step instead.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch import Tensor, nn

from holoslide.errors import ConfigError, HoloslideError
from holoslide.slides.facts import one_line
from holoslide.training.options import TrainConfig


def launch(config: TrainConfig) -> Fabric:
    """Start one process per device (or join those that torchrun or Slurm started); `ConfigError` as `processes`."""
    fabric = processes(config)
    fabric.launch()
    return fabric


def processes(config: TrainConfig) -> Fabric:
    """What is to be started, and is not yet: as many as asked for; of `auto` no more than a step has slides.

    Raises `ConfigError`: there are not so many devices, torchrun has started more processes, or there are fewer
    slides in a step than processes.
    """
    # Else it advises every user of a GPU, in five lines, to round float32, which nobody asked for.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = _fabric(config, config.devices)
    by_torchrun = TorchElasticEnvironment.detect()
    started = TorchElasticEnvironment().world_size() if by_torchrun else 1
    if started > fabric.world_size:  # else each would train the whole by itself
        what, remedy = f"{_asked(config)} is one process", "give --set train.devices="
        raise ConfigError("train.devices", f"{what}, and torchrun started {started}", f"{remedy}{started}")
    if fabric.world_size <= config.accumulate:
        return fabric
    if config.devices == "auto" and config.nodes == 1 and not (by_torchrun or SLURMEnvironment.detect()):
        return _fabric(config, config.accumulate)
    # Some would look on, at a price.
    what = f"is {config.accumulate}, too few slides in a step for {fabric.world_size} processes"
    raise ConfigError("train.accumulate", what, f"give {fabric.world_size} or more, or fewer devices")


def _fabric(config: TrainConfig, devices: int | str) -> Fabric:
    try:
        return Fabric(accelerator=config.accelerator, devices=devices, num_nodes=config.nodes)
    except (RuntimeError, ValueError) as error:
        raise ConfigError("train.devices", f"{_asked(config)}: {error}", "give what there is") from error


def _asked(config: TrainConfig) -> str:
    return f"{config.devices} on {config.accelerator}"


def idle(fabric: Fabric, config: TrainConfig) -> int:
    """How many GPUs of this machine `auto` leaves alone, as a step has too few slides."""
    if config.devices != "auto" or fabric.device.type != "cuda" or fabric.world_size < config.accumulate:
        return 0
    return max(0, torch.cuda.device_count() - fabric.world_size)


def share(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Which items each rank takes, in their order: the largest that is left goes to the rank with least.

    No rank gets more than 4/3 of the least possible (Graham 1969). The same in every process.

    >>> share([5, 9, 4, 4], 2)
    [[1, 3], [0, 2]]
    """
    loads, shares = [0] * ranks, [list[int]() for _ in range(ranks)]
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # stable: equals keep their order
        rank = loads.index(min(loads))
        loads[rank] += sizes[item]
        shares[rank].append(item)
    return [sorted(items) for items in shares]


def others(shares: Sequence[Sequence[int]], rank: int) -> list[int]:
    """The items that other ranks take."""
    return [item for i, items in enumerate(shares) if i != rank for item in items]


@contextmanager
def together(fabric: Fabric) -> Iterator[None]:
    """For what takes all ranks: HoloslideError where one of them has failed, and so ended, before it."""
    try:
        yield
    except RuntimeError as error:  # torch's, for all that can go wrong between processes
        what = f"lost touch with the others ({one_line(error)})"
        remedy = "one of them has ended: see what it said"
        raise HoloslideError(f"process {fabric.global_rank}", what, remedy) from error


def sum_over_ranks(fabric: Fabric, values: Tensor) -> Tensor:
    """The sum of every rank's tensor, in every rank."""
    if fabric.world_size == 1:
        return values
    mine = values.to(fabric.device)
    with together(fabric):
        summed = fabric.all_reduce(mine, reduce_op="sum")
    assert isinstance(summed, Tensor)
    return summed.to(values.device)


def sum_gradients(fabric: Fabric, parameters: Iterable[nn.Parameter]) -> None:
    """Sum `.grad` over ranks in one message. A parameter that no slide reached gets zeros.

    Then every optimiser step moves the same parameters, whichever rank had which slide.
    """
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if fabric.world_size == 1:
        return
    flat = sum_over_ranks(fabric, torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    for parameter, grad in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
        parameter.grad = grad.view_as(parameter).clone()


def same_start(fabric: Fabric, model: nn.Module) -> None:
    """Give every rank the weights of rank 0."""
    if fabric.world_size > 1:
        mine = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        with together(fabric):
            first = fabric.broadcast(mine)
        model.load_state_dict(first)
