"""Modules of many kinds, streamed by cells and by tiles, against running them whole: values and all gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from holoslide.geometry import Border
from holoslide.streaming import Chain, Segment, Storage, StorageConfig, TensorGradient, TensorSource, Tiling
from holoslide.streaming.trials import copy_of
from tests.streaming.oracle import pad_with_glass, randomise, relative_error

TOLERANCE = 1e-10
UNIT, MARGIN = 12, 36
Sequence, Conv = nn.Sequential, nn.Conv2d


class Shared(nn.Module):
    """Two norms of one scale and shift, of which one can be folded; a convolution known by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.folded, self.left = Conv(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.left.weight, self.left.bias, self.alias = self.folded.weight, self.folded.bias, self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.left(F.gelu(self.folded(self.alias(x))))


class Gained(Conv):
    """A convolution with a gain of its own, 1 at first."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(4, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.gain, self.bias, padding=1)


class Residual(nn.Module):
    """Scaled by 0 until it is trained, which hides that its norm is not all that reads the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = Conv(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        seen = self.conv(x)
        return x + self.scale * F.gelu(self.norm(seen) + seen)


class Writing(nn.Module):
    """Works in place on what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.conv = nn.SiLU(inplace=True), Conv(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.act(x)) + x


class Reversed(nn.Module):
    """Its first layer is not the one that runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = Conv(6, 3, 3, padding=1), Conv(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.first(x)))


class Bare(nn.Module):
    """Weights of no layer: one of five axes, and one that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.blur = nn.Parameter(torch.randn(1, 1, 4, 1, 1)), torch.rand(4, 1, 3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x * self.scale[0], self.blur, padding=1, groups=4)


class Signs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)


def hooked() -> nn.Module:
    """A chain whose result is changed after it has run."""
    chain = Sequence(Conv(4, 4, 3, padding=1), nn.GELU())
    chain.register_forward_hook(lambda module, given, made: 2 * made + 1)
    return Sequence(chain, Conv(4, 4, 1))


def pruned() -> nn.Module:
    """Weights made of others by a hook, as `torch.nn.utils.weight_norm` makes them, too."""
    chain = Sequence(Conv(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    prune.l1_unstructured(chain[0], "weight", 0.5)
    return chain


KINDS: dict[str, Callable[[], nn.Module]] = {
    "more padding than kernel": lambda: Sequence(Conv(4, 4, 1, padding=2), nn.SiLU(), Conv(4, 5, 3, padding=3)),
    "more one way": lambda: Sequence(Conv(4, 4, (1, 7), padding=(3, 0)), nn.GELU()),
    "even": lambda: Sequence(Conv(4, 4, 4, padding=1), nn.GELU(), Conv(4, 4, 2, padding=1)),
    "skipping": lambda: Sequence(Conv(4, 4, 1, stride=2, padding=1), nn.Tanh(), Conv(4, 4, 2, stride=3)),
    "edges repeated": lambda: Conv(4, 4, 1, padding=2, padding_mode="replicate"),
    "mirrored": lambda: Sequence(nn.ReflectionPad2d(3), Conv(4, 4, 7), nn.ZeroPad2d((0, 1, 2, 0))),
    "rounded up": lambda: Sequence(Conv(4, 4, 3, padding=1), nn.MaxPool2d(3, 2, ceil_mode=True)),
    "mean of what is there": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "transposed": lambda: Sequence(nn.ConvTranspose2d(4, 4, 3, padding=1), nn.GELU()),
    "in place": lambda: Sequence(nn.LeakyReLU(0.1, inplace=True), Conv(4, 4, 3, padding=1)),
    "shuffled": lambda: Sequence(nn.PixelUnshuffle(2), nn.ChannelShuffle(4), Conv(16, 4, 1)),
    "in threes": lambda: Sequence(Conv(4, 4, 3, padding=1), nn.PixelUnshuffle(3), Conv(36, 4, 1)),
    "lets no gradient pass": lambda: Sequence(Signs(), Conv(4, 4, 3, padding=1)),
    "nothing": nn.Identity,
    **{kind.__name__.lower(): kind for kind in (Shared, Residual, Writing, Reversed, Bare)},
    "gained": lambda: Sequence(Gained(), nn.BatchNorm2d(4)),
    "hooked": hooked,
    "pruned": pruned,
}  # fmt: skip


@pytest.mark.parametrize("border", ["zeros", "glass"])
@pytest.mark.parametrize("kind", KINDS)
def test_modules_of_any_kind_are_exact(kind: str, border: Border) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    module = randomise(KINDS[kind](), generator)
    plain = copy_of(module)
    values_CHW = torch.randn(4, 6, 9 if kind == "in threes" else 8, generator=generator, dtype=torch.float64)
    glass_C = torch.randn(4, generator=generator, dtype=torch.float64)
    leaf_CHW = values_CHW.clone().requires_grad_()
    leaf_CHW.grad = torch.zeros_like(leaf_CHW)
    whole_CHW = whole(plain, leaf_CHW, glass_C if border == "glass" else None)
    grads_CHW = torch.randn(whole_CHW.shape, generator=generator, dtype=torch.float64)
    whole_CHW.backward(grads_CHW)

    source = TensorSource(values_CHW, glass=glass_C)
    segment = Segment(module, border=border, channels=4)
    largest = max((float(p.grad.abs().max()) for p in plain.parameters()), default=0.0)
    for side, keep in ((1, 0), (3, 2)):
        module.zero_grad()
        pixels, storage = TensorGradient(source), Storage(StorageConfig(), torch.device("cpu"))
        chain = Chain([segment], [Tiling(side, 3, keep)], storage)
        output = chain.forward(source, training=True, input_grad=True)
        assert relative_error(output.whole(), whole_CHW) < TOLERANCE
        chain.backward(grads_CHW, into=pixels)
        assert relative_error(pixels.values_CHW, leaf_CHW.grad) < TOLERANCE
        for (name, ours), (_, theirs) in zip(
            module.named_parameters(), plain.named_parameters(), strict=True
        ):
            assert ours.grad is not None, name
            scale = max(float(theirs.grad.abs().max()), 1e-2 * largest)
            assert float((ours.grad - theirs.grad).abs().max()) < TOLERANCE * scale, name


def whole(module: nn.Module, values_CHW: Tensor, glass_C: Tensor | None) -> Tensor:
    """The module's own map; of one on endless glass the cells of the frame."""
    if glass_C is None:
        return module(values_CHW[None].clone())[0]
    made_CHW = module(pad_with_glass(values_CHW, glass_C, MARGIN, UNIT)[None])[0]
    stride = round((values_CHW.shape[1] + 2 * MARGIN) / made_CHW.shape[1])
    rows, columns = (slice(MARGIN // stride, -(-(MARGIN + n) // stride)) for n in values_CHW.shape[1:])
    return made_CHW[:, rows, columns]
