"""Frozen BatchNorm folded into the convolution before it: the same function, with far less memory traffic.

With its statistics frozen, BatchNorm is `y * scale + shift` per channel, and so is
`conv(x, W) * scale + shift = conv(x, W * scale) + shift`. A tile pass runs the folded twin of a module; the
twin's parameter gradients add up over the tiles and are pulled back once, at the end, to the module's own
weights, BatchNorm scale and shift. Nothing is approximated.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from holoslide.geometry import ceil_div
from holoslide.streaming.convolution import with_strips
from holoslide.streaming.probe import Known, found_once
from holoslide.streaming.trials import copy_of, input_channels, least_side, shape_twin, varied

_TOLERANCE = 1e-9
_TRIAL_SIDE = 16  # of a map, in cells: what is folded is the same in every cell


@dataclass(frozen=True, slots=True)
class Pair:
    """Names of a convolution and of the BatchNorm that alone reads it."""

    conv: str
    norm: str


_known: Known[tuple[list[Pair], bool]] = {}


class Folded(nn.Module):
    """A module in evaluation mode and its folded twin, which share nothing but values.

    Call `refresh` when the module's parameters have changed, run windows through `forward`, and call
    `pull_back` once after the last backward pass: it adds to the module's own `.grad`.
    """

    def __init__(self, module: nn.Module, channels: int | None = None, *, stride: int = 1) -> None:
        """`channels` and `stride` are the module's, as `holoslide.streaming.probe` tells them."""
        super().__init__()
        self.module = module
        channels = input_channels(module) if channels is None else channels

        def find() -> tuple[list[Pair], bool]:
            pairs = find_pairs(module, channels, stride=stride)
            return pairs, _works_in_place(_sample(module, channels, stride), copy_of(module))

        self._pairs, self.in_place = found_once(_known, module, channels, find)
        """`in_place`: whether it writes into what it is given; then autograd takes no leaf."""
        self.twin = _make_twin(module, self._pairs)
        self._values: list[tuple[nn.Parameter, Tensor]] = []
        self._fresh = False

    def refresh(self) -> None:
        """Give the twin the module's present values."""
        values = _folded_values(self.module, self.twin, self._pairs)
        buffers = dict(self.module.named_buffers(remove_duplicate=False))
        with torch.no_grad():
            for name, buffer in self.twin.named_buffers():  # of norms that are not folded
                buffer.copy_(buffers[name])
            for parameter, value in values:
                parameter.copy_(value)
                parameter.requires_grad_(value.requires_grad)
                parameter.grad = None
        self._fresh = torch.is_grad_enabled()
        self._values = values if self._fresh else []  # else a copy of the weights, kept for nothing

    def check_fresh(self) -> None:
        """Raise `RuntimeError` where `pull_back` would have nothing to pull back to."""
        if not self._fresh:
            message = (
                "backward_tiles: no forward pass with gradients since the last backward pass; call forward_tiles "
                "once before each, and not under torch.no_grad()"
            )
            raise RuntimeError(message)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """The module's output, (B, C', H', W')."""
        result: Tensor = self.twin(features_BCHW)
        return result

    def pull_back(self) -> None:
        """Add the twin's accumulated gradients to the module's own parameters; once for each `refresh`."""
        roots = [(value, parameter.grad) for parameter, value in self._values if parameter.grad is not None]
        if roots:
            torch.autograd.backward([v for v, _ in roots], [g for _, g in roots])
        for parameter, _ in self._values:
            parameter.grad = None
        self._values, self._fresh = [], False


def fold(conv: nn.Conv2d, norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Weight (O, I/groups, h, w) and bias (O,) of the convolution equal to `norm(conv(x))`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = norm.weight * scale
    shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias = shift * scale if norm.bias is None else torch.addcmul(norm.bias, shift, scale)
    return conv.weight * scale[:, None, None, None], bias


def find_pairs(module: nn.Module, channels: int | None = None, *, stride: int = 1) -> list[Pair]:
    """Convolutions whose output goes straight into a frozen BatchNorm, found in a run, checked by value."""
    trial = varied(copy_of(module).cpu().double())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (
            t for m in trial.modules() if isinstance(m, _BatchNorm) for t in m.state_dict().values()
        ):
            if tensor.is_floating_point():  # fresh statistics of 0 and 1 would hide a wrong pair
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
        sample = _sample(module, channels, stride)
        found, expected = _watch_pairs(trial, sample)
        pairs = [pair for pair in found if _frozen(module, pair.norm)]
        twin = _make_twin(trial, pairs)
        for parameter, value in _folded_values(trial, twin, pairs):
            parameter.copy_(value)
        same = torch.allclose(twin(sample), expected, rtol=_TOLERANCE, atol=_TOLERANCE)
    return pairs if same else []


def _sample(module: nn.Module, channels: int | None, stride: int) -> Tensor:
    """A map that the module can be tried on, (1, C, H, W), of values from 0 to 1."""
    channels = input_channels(module) if channels is None else channels
    side = least_side(shape_twin(module), channels, ceil_div(_TRIAL_SIDE, stride) * stride)
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, channels, side, side, dtype=torch.float64, generator=generator)


def _works_in_place(sample: Tensor, module: nn.Module) -> bool:
    tensors = itertools.chain(module.parameters(), module.buffers())
    sample = sample.to(next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0)))
    before = sample._version
    with torch.no_grad():
        module(sample)
    return sample._version != before


def _watch_pairs(module: nn.Module, sample: Tensor) -> tuple[list[Pair], Tensor]:
    """Pairs that a run shows, and its result."""
    calls: Counter[str] = Counter()
    made_by: dict[int, tuple[str, Tensor]] = {}  # holds the tensors: ids are only unique among living ones
    pairs: list[Pair] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] += 1
            if isinstance(layer, nn.Conv2d) and isinstance(layer.weight, nn.Parameter):  # not made of others
                made_by[id(output)] = (name, output)
            elif isinstance(layer, _BatchNorm) and id(inputs[0]) in made_by:
                pairs.append(Pair(made_by[id(inputs[0])][0], name))

        return hook

    layers = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.Conv2d | _BatchNorm)]
    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers]
    result = module(sample.clone())  # a first layer may work in place
    for handle in handles:
        handle.remove()
    return [pair for pair in pairs if calls[pair.conv] == 1 and calls[pair.norm] == 1], result


def _folded_values(
    module: nn.Module, twin: nn.Module, pairs: list[Pair]
) -> list[tuple[nn.Parameter, Tensor]]:
    """Each parameter of the twin with the value it stands for, as a function of the module's parameters."""
    values: list[tuple[nn.Parameter, Tensor]] = []
    for pair in pairs:
        conv, norm, folded = (module.get_submodule(pair.conv), module.get_submodule(pair.norm),
                              twin.get_submodule(pair.conv))  # fmt: skip
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, _BatchNorm)
        assert isinstance(folded, nn.Conv2d)
        assert isinstance(folded.weight, nn.Parameter)
        assert isinstance(folded.bias, nn.Parameter)
        weight, bias = fold(conv, norm)
        values += [(folded.weight, weight), (folded.bias, bias)]
    # What layers share is found by each of its names: the first may be that of a norm which is folded.
    own = dict(module.named_parameters(remove_duplicate=False))
    made = {id(parameter) for parameter, _ in values}
    values += [(p, own[name]) for name, p in twin.named_parameters() if id(p) not in made]
    return values


def _frozen(module: nn.Module, name: str) -> bool:
    norm = module.get_submodule(name)
    return isinstance(norm, _BatchNorm) and not norm.training and norm.running_mean is not None


def _make_twin(module: nn.Module, pairs: list[Pair]) -> nn.Module:
    twin = copy_of(module)
    for pair in pairs:
        conv = twin.get_submodule(pair.conv)
        assert isinstance(conv, nn.Conv2d)
        if conv.bias is None:
            conv.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))
        parent, _, leaf = pair.norm.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, nn.Identity())
    for tensor in itertools.chain(twin.parameters(), twin.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return with_strips(twin)
