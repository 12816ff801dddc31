"""Stride and receptive field of any module, found by experiment: one NaN pixel in, see where it arrives.

NaN passes through every layer that reads it, whatever the weights, so the cells it reaches are exactly the
cells that depend on the pixel. Nothing is known about any network here; a layer that lets one pixel reach the
whole map is refused by its name. A window is then held to the whole map: that refuses what reads little, but
depends on where it stands, such as coordinates or attention in fixed windows.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holoslide.errors import NotLocal
from holoslide.geometry import Box, ceil_div

_DIVISIBLE = 40_320  # a field side that every stride up to 10, and the usual larger ones, divide
_FIELD_BYTES = 2**27
# Sides, in output cells, of the first field that is tried and of the map that is verified.
_LEAST_CELLS, _VERIFIED_CELLS = 16, 32
_DROPS = ("Dropout", "Dropout2d", "StochasticDepth", "DropPath")  # PyTorch's, torchvision's, timm's
_TOLERANCE = 1e-9  # of float64 values of about 1


@dataclass(frozen=True, slots=True)
class Receptive:
    """Cell i of the output reads the input cells `stride * i + low` to `stride * i + high`, both included."""

    stride: int = 1
    low: int = 0
    high: int = 0

    def then(self, following: Receptive) -> Receptive:
        """The receptive field of this module followed by another.

        >>> conv3 = Receptive(1, -1, 1)
        >>> conv3.then(Receptive(2, -1, 1)).then(conv3)
        Receptive(stride=2, low=-4, high=4)
        """
        return Receptive(
            self.stride * following.stride,
            self.stride * following.low + self.low,
            self.stride * following.high + self.high,
        )

    def inputs(self, output_box: Box) -> Box:
        """The input cells that the cells of a box read."""
        return Box(
            output_box.top * self.stride + self.low,
            output_box.left * self.stride + self.low,
            (output_box.bottom - 1) * self.stride + self.high + 1,
            (output_box.right - 1) * self.stride + self.high + 1,
        )

    def outputs(self, input_box: Box) -> Box:
        """The output cells that read any cell of a box."""
        return Box(
            ceil_div(input_box.top - self.high, self.stride),
            ceil_div(input_box.left - self.high, self.stride),
            (input_box.bottom - 1 - self.low) // self.stride + 1,
            (input_box.right - 1 - self.low) // self.stride + 1,
        )

    def readers(self, unit: int) -> Receptive:
        """Where the outputs that read a cell lie: in pixels, for cells of `unit` pixels and outputs' footprints.

        The footprint of output i is its share of the raster, `unit * stride` pixels from `i * unit * stride` on.

        >>> Receptive(2, -3, 3).readers(6)
        Receptive(stride=6, low=-18, high=29)
        """
        return Receptive(unit, -self.high * unit, -self.low * unit + unit * self.stride - 1)

    def hull(self, other: Receptive) -> Receptive:
        """Both fields of one stride."""
        return Receptive(self.stride, min(self.low, other.low), max(self.high, other.high))

    @property
    def margin_before(self) -> int:
        """Output cells by which a window must start early, so that it starts at a multiple of the stride."""
        return max(0, ceil_div(-self.low, self.stride))

    @property
    def margin_after(self) -> int:
        """Output cells by which a window must end late."""
        return max(0, ceil_div(self.high + 1 - self.stride, self.stride))


@dataclass(frozen=True, slots=True)
class Link:
    """One of the modules that run one after another, with its receptive field and its output's channels."""

    name: str
    module: nn.Module
    field: Receptive
    out_channels: int


_known: dict[tuple[object, ...], tuple[Receptive, int]] = {}
_OF_TORCH = set(vars(nn.Module())) - {"training"}


def probe(module: nn.Module, channels: int | None = None, *, name: str = "") -> Receptive:
    """Find the receptive field of `module` in the mode (training or evaluation) that it is in.

    `channels` is the number of input channels (default: those of the first layer that has weights). Raises
    `NotLocal` with the name of the layer that sees the whole map or draws random numbers.
    """
    return functools.reduce(
        Receptive.then, (link.field for link in links(module, channels, name=name)), Receptive()
    )


def links(module: nn.Module, channels: int | None = None, *, name: str = "") -> list[Link]:
    """A chain, link by link, so that the maps to probe stay small; a module that is no chain is one link."""
    channels = channels if channels is not None else input_channels(module)
    if type(module) is nn.Sequential:
        found: list[Link] = []
        for (
            child_name,
            child,
        ) in module._modules.items():  # `named_children` leaves out what stands there twice
            seen = found[-1].out_channels if found else channels
            found += links(child, seen, name=f"{name}.{child_name}".lstrip("."))
        return found
    key = (
        tuple((n, type(m), _settings(m)) for n, m in module.named_modules()),
        tuple((n, t.shape) for n, t in itertools.chain(module.named_parameters(), module.named_buffers())),
        channels,
    )
    if key not in _known:
        field = _probe_atom(module, channels, name)
        _known[key] = field, output_shape(module, channels, (512, 512))[1]
    return [Link(name, module, *_known[key])]


def _settings(layer: nn.Module) -> tuple[tuple[str, str], ...]:
    """What a layer was made with, also where its text does not say.

    Equal layers need one probe: weights do not matter, nor does how much is dropped, as long as nothing is.
    """
    if not layer.training and type(layer).__name__ in _DROPS:
        return ()
    return tuple((name, repr(value)) for name, value in vars(layer).items() if name not in _OF_TORCH)


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


def _probe_atom(module: nn.Module, channels: int, name: str) -> Receptive:
    for layer_name, layer in module.named_modules():
        if getattr(layer, "padding_mode", None) == "circular":  # no window shows it: the map's edges do
            where = _label(layer, ".".join(filter(None, (name, layer_name))))
            raise NotLocal(where, "pads one edge of the map with the other", "give it another padding_mode")
    stride = _stride(module, channels, name)
    twin = copy.deepcopy(module).double().cpu()
    side = least = least_side(twin, channels, _LEAST_CELLS * stride)
    while 8 * channels * side * side * stride <= _FIELD_BYTES or side == least:
        low, high, reaches_edge = _reach(twin, channels, side, stride)
        if not reaches_edge:
            field = Receptive(stride, low, high)
            _refuse_random(twin, channels, side, name)
            _verify(twin, channels, max(side, _VERIFIED_CELLS * stride), field, name)
            return field
        side *= 2
    raise _not_local(twin, channels, 64 * stride, name)


def least_side(module: nn.Module, channels: int, side: int) -> int:
    """`side`, or twice it and so on: a kernel that pads nothing takes no map that is smaller than itself."""
    while side < _DIVISIBLE:  # which `_stride` has tried
        try:
            output_shape(module, channels, (side, side))
        except RuntimeError:
            side *= 2
        else:
            break
    return side


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


def output_shape(module: nn.Module, channels: int, shape: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the module's output for an input (2, channels, *shape), without computing it."""
    with torch.no_grad():
        output = shape_twin(module)(torch.empty(2, channels, *shape, device="meta", dtype=torch.float32))
    return tuple(output.shape) if isinstance(output, Tensor) else ()


def shape_twin(module: nn.Module) -> nn.Module:
    """A copy of the module that tells shapes: it runs on meta tensors in float32, and holds no values."""
    # deepcopy takes these for copies it has made already: no weight is copied
    weights = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in module.parameters()}
    twin = copy.deepcopy(module, weights | {id(b): b.to("meta") for b in module.buffers()}).float()
    for layer in twin.modules():
        # On meta tensors it is Python, and would take most of the time. A class of its own may do more than it.
        if type(layer) is nn.BatchNorm2d:
            setattr(layer, "forward", _unchanged)  # noqa: B010 - mypy refuses to assign to a method
    return twin


def _unchanged(features: Tensor) -> Tensor:
    return features


def _stride(module: nn.Module, channels: int, name: str) -> int:
    shapes = [output_shape(module, channels, (n * _DIVISIBLE, n * _DIVISIBLE)) for n in (1, 2)]
    if any(len(shape) != 4 for shape in shapes):
        raise NotLocal(
            _label(module, name),
            "does not give one feature map",
            "stream only layers before pooling, that give one",
        )
    steps = shapes[1][2] - shapes[0][2]
    if steps <= 0:
        raise _not_local(copy.deepcopy(module).double().cpu(), channels, 128, name)
    if _DIVISIBLE % steps:
        raise NotLocal(_label(module, name), "its stride is not a whole number", "choose another backbone")
    if shapes[1][3] - shapes[0][3] != steps:
        raise NotLocal(
            _label(module, name), "has another stride down than across", "give both the same, or leave it out"
        )
    return _DIVISIBLE // steps


def _trial_map(channels: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, channels, side, side, generator=generator, dtype=torch.float64) + 0.1


def _verify(module: nn.Module, channels: int, side: int, field: Receptive, name: str) -> None:
    """Hold the whole map to a window that begins one output cell further on."""
    whole = _trial_map(channels, side)
    with torch.no_grad():
        first, window = module(whole), module(whole[:, :, field.stride :, field.stride :])
    start, stop = field.margin_before, first.shape[2] - 1 - field.margin_after
    inner, expected = (
        window[:, :, start:stop, start:stop],
        first[:, :, start + 1 : stop + 1, start + 1 : stop + 1],
    )
    same_shape = inner.shape == expected.shape
    if not (same_shape and torch.allclose(inner, expected, rtol=_TOLERANCE, atol=_TOLERANCE)):
        raise NotLocal(
            _label(module, name),
            "gives a window other values than the same place of the whole map",
            "leave out what depends on the place: coordinates, or attention in fixed windows",
        )


def _refuse_random(module: nn.Module, channels: int, side: int, name: str) -> None:
    whole = _trial_map(channels, side)
    with torch.no_grad():
        if torch.equal(module(whole), module(whole)):
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
                    _label(layer, ".".join(filter(None, (name, layer_name)))) + _parent(module, layer_name)
                )

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in module.named_modules()]
    field = torch.full((2, channels, side, side), 0.5, dtype=torch.float64)
    field[:, :, side // 2, side // 2] = torch.nan
    with torch.no_grad():
        module(field)
    for handle in handles:
        handle.remove()
    where = found[0] if found else _label(module, name)
    return NotLocal(
        where, "sees the whole map", "freeze it, put it in evaluation mode or choose another backbone"
    )


def _label(module: nn.Module, name: str) -> str:
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


def _parent(module: nn.Module, layer_name: str) -> str:
    """Where the layer stands, since a pooling layer says less than the squeeze-and-excitation around it."""
    parent = layer_name.rpartition(".")[0]
    return f" in {type(module.get_submodule(parent)).__name__}" if layer_name else ""


def _partly_nan(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and not bool(value.isnan().any(dim=1).all())


def _all_nan(value: object) -> bool:
    return isinstance(value, Tensor) and bool(value.isnan().any(dim=1).all())
