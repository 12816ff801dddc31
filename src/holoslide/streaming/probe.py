"""Stride and receptive field of any module, found by experiment: one NaN pixel in, see where it arrives.

NaN passes through every layer that reads it, whatever the weights, so the cells it reaches are exactly the
cells that depend on the pixel. Nothing is known about any network here; a layer that lets one pixel reach the
whole map is refused by its name. Windows are then held to the whole map: that refuses what reads little, but
depends on where it stands, such as coordinates or attention in fixed windows, or on what runs beside it.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from holoslide.errors import NotLocal
from holoslide.geometry import Box
from holoslide.streaming.receptive import Receptive
from holoslide.streaming.trials import (
    LARGE,
    copy_of,
    input_channels,
    least_side,
    output_shape,
    shape_twin,
    tiles_hold,
    trial_map,
    varied,
)

_FIELD_BYTES = 2**27
# Sides, in output cells, of the first field that is tried, of the map that is verified, and of a tile of it.
_LEAST_CELLS, _VERIFIED_CELLS, _VERIFIED_TILE = 16, 32, 8
_DROPS = ("Dropout", "Dropout2d", "StochasticDepth", "DropPath")  # PyTorch's, torchvision's, timm's
# Operations that read where their input says: no reach that is found today holds after the next step.
_STEERED = ("aten::grid_sampler_2d", "aten::grid_sampler_3d", "torchvision::deform_conv2d")
_CANNOT_RUN = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)


@dataclass(frozen=True, slots=True)
class Link:
    """One of the modules that run one after another, with its receptive field and its output's channels."""

    name: str
    module: nn.Module
    field: Receptive
    out_channels: int


T = TypeVar("T")
Known = dict[tuple[object, ...], T]

_known: Known[tuple[Receptive, int]] = {}
_OF_TORCH = set(vars(nn.Module())) - {"training"}


def probe(module: nn.Module, channels: int | None = None, *, name: str = "") -> Receptive:
    """Find the receptive field of `module` in the mode (training or evaluation) that it is in.

    `channels` is the number of input channels (default: those of the first layer that has weights). Raises
    `NotLocal` with the name of the layer that sees the whole map or draws random numbers.
    """
    return field_of(links(module, channels, name=name))


def field_of(chain: Sequence[Link]) -> Receptive:
    """What the last link of a chain sees of what goes into the first."""
    return functools.reduce(Receptive.then, (link.field for link in chain), Receptive())


def links(module: nn.Module, channels: int | None = None, *, name: str = "") -> list[Link]:
    """A chain, link by link, so that the maps to probe stay small; a module that is no chain is one link."""
    channels = channels if channels is not None else input_channels(module)
    if type(module) is nn.Sequential and not _hooked(module):
        found: list[Link] = []
        for child_name, child in module._modules.items():  # `named_children` leaves out what is there twice
            seen = found[-1].out_channels if found else channels
            found += links(child, seen, name=f"{name}.{child_name}".lstrip("."))
        return found

    field, out_channels = found_once(_known, module, channels, lambda: _probe_atom(module, channels, name))
    return [Link(name, module, field, out_channels)]


def found_once(
    known: Known[T], module: nn.Module, channels: int, find: Callable[[], T], *, also: object = None
) -> T:
    """What `find` finds out about a module by trying it, once for all of one structure; `known` keeps it.

    `also` is what else it follows from.
    """
    key = structure(module, channels)
    if key is None:
        return find()
    if (key, also) not in known:
        known[key, also] = find()
    return known[key, also]


def structure(module: nn.Module, channels: int) -> tuple[object, ...] | None:
    """What modules have in common that need one trial; None where nothing tells whether they do.

    Weights do not matter, nor does how much is dropped, as long as nothing is. An address does not tell: what is
    made next may get it. What stands in a module twice is named twice and numbered once, to differ from what stands
    there once, and from two that are alike.
    """
    numbers: dict[int, int] = {}
    layers = [
        (n, numbers.setdefault(id(m), len(numbers)), type(m), settings(m))
        for n, m in module.named_modules(remove_duplicate=False)
    ]
    tensors = itertools.chain(
        module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    )
    hooked = any(_hooked(layer) for layer in module.modules())
    if hooked or any(" at 0x" in text for *_, made_with in layers for _, text in made_with):
        return None
    return (*layers, *((n, t.shape) for n, t in tensors), channels)


def settings(layer: nn.Module) -> tuple[tuple[str, str], ...]:
    """What a layer was made with, also where its text does not say: its own attributes, by name, as text."""
    if not layer.training and type(layer).__name__ in _DROPS:
        return ()
    return tuple((name, _text(value)) for name, value in vars(layer).items() if name not in _OF_TORCH)


def _text(value: object) -> str:
    # The text of a long tensor is cut short.
    return f"{tuple(value.shape)} {value!r}" if isinstance(value, Tensor) else repr(value)


def _hooked(layer: nn.Module) -> bool:
    """Whether more than its `forward` is run."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _probe_atom(module: nn.Module, channels: int, name: str) -> tuple[Receptive, int]:
    _refuse_by_kind(module, name)
    try:
        return _try_atom(module, channels, name)
    except _CANNOT_RUN as error:
        line = str(error).partition("\n")[0].rstrip(" .")
        raise NotLocal(
            label(module, name),
            f"cannot be tried on maps of {channels} channels and of several sizes ({line})",
            "say how many channels it takes (Segment's `channels`), or leave it out",
        ) from error


def _try_atom(module: nn.Module, channels: int, name: str) -> tuple[Receptive, int]:
    """Its receptive field and its output's channels."""
    shapes = shape_twin(module)
    stride, out_channels = _stride(module, shapes, channels, name)
    twin = varied(copy_of(module).double().cpu())
    side = least = least_side(shapes, channels, _LEAST_CELLS * stride)
    while 8 * channels * side * side * stride <= _FIELD_BYTES or side == least:
        low, high, reaches_edge = _reach(twin, channels, side, stride)
        if not reaches_edge:
            field = Receptive(stride, low, high)
            _refuse_growing(module, twin, name)
            _refuse_random(twin, channels, side, name)
            _verify(twin, channels, max(side, _VERIFIED_CELLS * stride), field, name)
            return field, out_channels
        side *= 2
    raise _not_local(twin, channels, 64 * stride, name)


def _refuse_by_kind(module: nn.Module, name: str) -> None:
    """What no window shows."""
    for layer_name, layer in module.named_modules():
        where = label(layer, ".".join(filter(None, (name, layer_name))))
        if isinstance(layer, torch.jit.ScriptModule):
            raise NotLocal(where, "is TorchScript, which cannot be looked into", "give what it was made of")
        if getattr(layer, "padding_mode", None) == "circular":  # the map's edges would show it
            raise NotLocal(where, "pads one edge of the map with the other", "give it another padding_mode")
        if isinstance(layer, nn.InstanceNorm2d) and layer.track_running_stats and not layer.training:
            # torch 2.15 on a CPU: wrong gradients where those of the output come in channels_last.
            raise NotLocal(
                where, "is what BatchNorm is in evaluation mode, but slower", "make it a BatchNorm2d"
            )
        if any(
            isinstance(value, Tensor) and value.is_leaf and value.requires_grad
            for value in vars(layer).values()
        ):
            raise NotLocal(
                where,
                "trains a tensor that is no parameter, and would lose its gradient",
                "make it an nn.Parameter",
            )


def _reach(module: nn.Module, channels: int, side: int, stride: int) -> tuple[int, int, bool]:
    """(low, high, whether the NaN reached the field's edge), from one NaN at `stride` neighbouring places.

    A strided layer may skip a place altogether, down or across: then a NaN all along the row, and all along the
    column, goes the other way.
    """
    middle = side // 2
    offsets: list[int] = []
    at_edge = False
    for lines in ((False, True), (True, False)) if stride > 1 else ((False, False),):
        field = torch.full((stride, channels, side, side), 0.5, dtype=torch.float64)
        for i in range(stride):
            rows, columns = (slice(None) if all_along else middle + i for all_along in lines)
            field[i, :, rows, columns] = torch.nan
        with torch.no_grad():
            reached = module(field).isnan().any(dim=1)
        for i, (axis, all_along) in itertools.product(range(stride), enumerate(lines)):
            hit = reached[i].any(dim=1 - axis).nonzero().flatten()
            if all_along or len(hit) == 0:
                continue
            offsets += [middle + i - stride * int(hit[0]), middle + i - stride * int(hit[-1])]
            at_edge = at_edge or int(hit[0]) == 0 or int(hit[-1]) == reached.shape[1 + axis] - 1
    return (min(offsets), max(offsets), at_edge) if offsets else (0, 0, False)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class hook has no types
    """Collects the names of all operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's constructor has no types
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def _stride(module: nn.Module, twin: nn.Module, channels: int, name: str) -> tuple[int, int]:
    """Its stride and its output's channels, by its `shape_twin`."""
    with _Watch() as watch:
        shapes = [output_shape(twin, channels, (n * LARGE, n * LARGE)) for n in (1, 2)]
    if not watch.names.isdisjoint(_STEERED):
        raise NotLocal(
            label(module, name), "reads where its input says, however far that is", "use another layer"
        )
    if any(len(shape) != 4 for shape in shapes):
        raise NotLocal(
            label(module, name),
            "does not give one feature map",
            "stream only layers before pooling, that give one",
        )
    steps = shapes[1][2] - shapes[0][2]
    if steps <= 0:
        raise _not_local(copy.deepcopy(module).double().cpu(), channels, 128, name)
    if LARGE % steps:
        raise NotLocal(label(module, name), "its stride is not a whole number", "choose another backbone")
    if shapes[1][3] - shapes[0][3] != steps:
        raise NotLocal(
            label(module, name), "has another stride down than across", "give both the same, or leave it out"
        )
    return LARGE // steps, shapes[0][1]


def _verify(module: nn.Module, channels: int, side: int, field: Receptive, name: str) -> None:
    """Hold the whole map to windows: a tile's, and those of a tile one cell further down, and one cell across."""
    first, size = field.margin_before + 1, _VERIFIED_TILE
    side = max(side, (first + size + 1 + field.margin_after) * field.stride)
    whole = trial_map(channels, side, side)
    places = (first, first), (first + 1, first), (first, first + 1)
    with torch.no_grad():
        made = module(whole.clone())  # a first layer may work in place
    if not tiles_hold(module, (whole, made), [Box.at(*place, size, size) for place in places], field):
        raise NotLocal(
            label(module, name),
            "gives a window other values than the same place of the whole map",
            "leave out what depends on the batch or on the place: coordinates, or attention in fixed windows",
        )


def _refuse_growing(module: nn.Module, twin: nn.Module, name: str) -> None:
    """`twin`, a copy, has run."""
    here, there = (
        {key for key, _ in itertools.chain(each.named_parameters(), each.named_buffers())}
        for each in (module, twin)
    )
    if there > here:
        what = f"makes its {min(there - here)} when it first runs"
        raise NotLocal(label(module, name), what, "run it once, on any map, before it is streamed")


def _refuse_random(module: nn.Module, channels: int, side: int, name: str) -> None:
    whole = trial_map(channels, side, side)
    before = {key: buffer.clone() for key, buffer in module.named_buffers()}
    with torch.no_grad():
        same = torch.equal(module(whole.clone()), module(whole.clone()))  # a first layer may work in place
    for key, buffer in module.named_buffers():
        if not torch.equal(buffer, before[key]):
            raise NotLocal(
                label(module, name),
                f"writes into its buffer {key}, which each tile would do by itself",
                "put it in evaluation mode, or leave the buffer alone",
            )
    if same:
        return
    layers = [n for n, m in module.named_modules() if m.training and "drop" in type(m).__name__.lower()]
    raise NotLocal(
        ".".join(filter(None, (name, *layers[:1]))) or type(module).__name__,
        "draws random numbers of its own, which a recomputed tile cannot repeat",
        "put it in evaluation mode",
    )


def _not_local(module: nn.Module, channels: int, side: int, name: str) -> NotLocal:
    """Name the first layer, innermost first, that spreads a NaN from a part of the map to all of it."""
    found: list[str] = []

    def watch(layer_name: str) -> Callable[[nn.Module, tuple[object, ...], object], None]:
        def hook(layer: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            if inputs and _partly_nan(inputs[0]) and _all_nan(output) and not found:
                found.append(
                    label(layer, ".".join(filter(None, (name, layer_name)))) + _parent(module, layer_name)
                )

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in module.named_modules()]
    field = torch.full((2, channels, side, side), 0.5, dtype=torch.float64)
    field[:, :, side // 2, side // 2] = torch.nan
    with torch.no_grad():
        module(field)
    for handle in handles:
        handle.remove()
    where = found[0] if found else label(module, name)
    return NotLocal(
        where, "sees the whole map", "freeze it, put it in evaluation mode or choose another backbone"
    )


def label(module: nn.Module, name: str) -> str:
    """How a layer is called in messages."""
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


def _parent(module: nn.Module, layer_name: str) -> str:
    """Where the layer stands, since a pooling layer says less than the squeeze-and-excitation around it."""
    parent = layer_name.rpartition(".")[0]
    return f" in {type(module.get_submodule(parent)).__name__}" if layer_name else ""


def _partly_nan(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and not bool(value.isnan().any(dim=1).all())


def _all_nan(value: object) -> bool:
    return isinstance(value, Tensor) and bool(value.isnan().any(dim=1).all())
