"""Copies of a module to try it on, and maps to try it with, whatever its device, precision and weights.

What is found out about a module here is found by running it: its shapes on meta tensors, its values in float64
on the CPU.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from holoslide.geometry import Box
from holoslide.streaming.receptive import Receptive

LARGE = 40_320  # a side that every stride up to 10, and the usual larger ones, divide
_TOLERANCE = 1e-9  # of the largest value, in float64


def input_channels(module: nn.Module) -> int:
    """Input channels of the first layer that says; 1 if none does (such layers take any number)."""
    for layer in module.modules():
        for attribute in ("in_channels", "num_features", "num_channels", "in_features"):
            value = getattr(layer, attribute, None)
            if isinstance(value, int):
                return value
        shape = getattr(layer, "normalized_shape", None)
        if shape:
            return int(shape[0])
    return 1


def copy_of(module: nn.Module) -> nn.Module:
    """A copy, also where a hook makes a weight of others before each run: `deepcopy` refuses its last result."""
    return copy.deepcopy(module, {id(t): t.detach().clone() for t in _bare(module) if not t.is_leaf})


def _bare(module: nn.Module) -> list[Tensor]:
    """Tensors that are neither parameters nor buffers."""
    values = itertools.chain.from_iterable(vars(layer).values() for layer in module.modules())
    return [value for value in values if isinstance(value, Tensor)]


def varied(module: nn.Module) -> nn.Module:
    """The module itself, now with no constant parameter: a 0 hides what it multiplies, until it is trained."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.numel() and parameter.min() == parameter.max():
                noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.1 * noise.to(parameter))
    return module


def least_side(shapes: nn.Module, channels: int, side: int) -> int:
    """`side`, or twice it and so on: a kernel that pads nothing takes no map that is smaller than itself.

    `shapes` is the module's `shape_twin`, here and in `output_shape`.
    """
    while side < LARGE:  # which is tried first
        try:
            output_shape(shapes, channels, (side, side))
        except RuntimeError:
            side *= 2
        else:
            break
    return side


def output_shape(shapes: nn.Module, channels: int, shape: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the module's output for an input (2, channels, *shape), without computing it."""
    with torch.no_grad():
        output = shapes(torch.empty(2, channels, *shape, device="meta", dtype=torch.float32))
    return tuple(output.shape) if isinstance(output, Tensor) else ()


def shape_twin(module: nn.Module) -> nn.Module:
    """A copy of the module that tells shapes: it runs on meta tensors in float32, and holds no values."""
    # deepcopy takes these for copies it has made already: no weight is copied
    empty = {id(t): t.detach().to("meta") for t in (*module.buffers(), *_bare(module))}
    empty = {key: t.float() if t.is_floating_point() else t for key, t in empty.items()}
    weights = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in module.parameters()}
    twin = copy.deepcopy(module, weights | empty).float()
    for layer in twin.modules():
        # On meta tensors it is Python, and would take most of the time. A class of its own may do more than it.
        if type(layer) is nn.BatchNorm2d:
            setattr(layer, "forward", _unchanged)  # noqa: B010 - mypy refuses to assign to a method
    return twin


def _unchanged(features: Tensor) -> Tensor:
    return features


def trial_map(channels: int, height: int, width: int) -> Tensor:
    """Float64 values from 0.1 to 1, a tenth of them ten times that, (1, C, H, W), the same each time.

    The large ones open what lets only those pass; none is negative, as a module may take logarithms.
    """
    generator = torch.Generator().manual_seed(0)
    values = 0.1 + 0.9 * torch.rand(1, channels, height, width, generator=generator, dtype=torch.float64)
    return values.where(values < 0.91, 10 * values)


def tiles_hold(
    module: nn.Module,
    run: tuple[Tensor, Tensor],
    tiles: Sequence[Box],
    field: Receptive,
    *,
    clip: bool = False,
) -> bool:
    """Whether tiles of one shape, from their windows of a map (1, C, H, W), are what its run gave there.

    The windows are run together; `clip` cuts them off at the map's edges.
    """
    whole, made = run
    height, width = whole.shape[2:] if clip else (None, None)
    spans = [(field.window(t.top, t.bottom, height), field.window(t.left, t.right, width)) for t in tiles]
    windows = [whole[:, :, y[0] : y[1], x[0] : x[1]] for y, x in spans]
    crop = Box.at(spans[0][0][2], spans[0][1][2], *tiles[0].shape)
    with torch.no_grad():
        # In the layout that windows of a slide have.
        found = module(torch.cat(windows).contiguous(memory_format=torch.channels_last))[:, :, *crop.slices]
    expected = torch.cat([made[:, :, *tile.slices] for tile in tiles])
    allowed = _TOLERANCE * float(made.abs().max())
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=allowed)
