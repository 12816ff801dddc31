"""Streaming any module equals running it whole: values, parameter gradients, input gradients, both borders."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from holoslide.streaming.chain import Chain
from holoslide.streaming.features import Batch, FeatureMap
from holoslide.streaming.sources import TensorSource
from holoslide.streaming.storage import Storage, StorageConfig
from holoslide.streaming.tiled import OutputGradient, Segment, Tiling
from holoslide.streaming.tissue import Tissue
from tests.streaming.oracle import pad_with_glass, randomise, relative_error

TOLERANCE = 1e-10
UNIT = 24  # the product of the largest stride and the largest block below
MARGIN = 120


class Branches(nn.Module):
    """A block with branches of different reach, joined by concatenation and addition."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.narrow = nn.Sequential(nn.Conv2d(channels, 4, 1, bias=False), nn.BatchNorm2d(4), nn.GELU())
        self.join = nn.Conv2d(channels + 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.join(torch.cat([self.wide(x), self.narrow(x)], 1))


def resnet(narrow: int = 5, wide: int = 6) -> list[nn.Module]:
    block = torchvision.models.resnet.BasicBlock
    shortcut = nn.Sequential(nn.Conv2d(narrow, wide, 1, stride=2, bias=False), nn.BatchNorm2d(wide))
    return [
        block(narrow, narrow),
        block(narrow, wide, stride=2, downsample=shortcut),
        block(wide, wide),
    ]


def branches() -> list[nn.Module]:
    return [Branches(5), nn.Sequential(nn.Conv2d(5, 6, 2, stride=2), nn.GELU()), Branches(6)]


def pools() -> list[nn.Module]:
    return [
        nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 5, 3, padding=1)),
        nn.Sequential(nn.Conv2d(5, 6, 5, stride=3, padding=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(6, 6, 3, padding=2, dilation=2)),
    ]


def repeated() -> list[nn.Module]:
    """Layers that stand in the chain twice, as an activation often does."""
    conv, relu = nn.Conv2d(5, 5, 3, padding=1), nn.ReLU()
    return [
        nn.Sequential(conv, relu, conv, relu),
        nn.Sequential(nn.Conv2d(5, 6, 3, stride=2, padding=1), relu),
        nn.Sequential(nn.Conv2d(6, 6, 1), relu),
    ]


def weigh(batch: Batch, weights_CHW: Tensor, origin: int) -> Tensor:
    """The weights of the tiles' cells, (B, C, h, w); zero where the weights end."""
    pieces = []
    for box in batch.boxes:
        piece = torch.zeros(weights_CHW.shape[0], *box.shape, dtype=torch.float64)
        for y in range(box.height):
            for x in range(box.width):
                v, u = box.top + y + origin, box.left + x + origin
                if 0 <= v < weights_CHW.shape[1] and 0 <= u < weights_CHW.shape[2]:
                    piece[:, y, x] = weights_CHW[:, v, u]
        pieces.append(piece)
    return torch.stack(pieces)


cases = {
    "make": st.sampled_from([resnet, branches, pools, repeated]),
    "height": st.integers(7, 40),
    "width": st.integers(7, 40),
    "side": st.integers(3, 17),
    "batch": st.integers(1, 4),
    "keep": st.integers(0, 3),
    "block": st.sampled_from([1, 2, 3]),
    "chained": st.booleans(),
    "in_file": st.booleans(),
    "seed": st.integers(0, 2**31),
}


def build(
    make: Callable[[], list[nn.Module]], generator: torch.Generator, border: str, storage: Storage, tiling: Tiling,
    *, chained: bool, block: int, everywhere: bool = False,
) -> tuple[nn.Sequential, Chain]:  # fmt: skip
    torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
    whole = nn.Sequential(*make())
    randomise(whole, generator)
    pieces = list(whole) if chained else [whole]
    segments = [Segment(piece, border=border) for piece in pieces]  # type: ignore[arg-type]
    return whole, Chain(segments, [tiling] * len(segments), storage, block=block, everywhere=everywhere)


@settings(max_examples=24, deadline=None, suppress_health_check=list(HealthCheck))
@given(**cases)
def test_border_of_zeros_is_plain_execution(
    make, height, width, side, batch, keep, block, chained, in_file, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    storage = Storage(StorageConfig(device_bytes=0 if in_file else 2**30), torch.device("cpu"))
    whole, chain = build(
        make, generator, "zeros", storage, Tiling(side, batch, keep), chained=chained, block=block
    )
    values = torch.randn(5, height, width, generator=generator, dtype=torch.float64)
    source = TensorSource(values, glass=torch.zeros(5, dtype=torch.float64))

    oracle = copy.deepcopy(whole)
    expected = oracle(values[None])
    weights = torch.randn(expected.shape[1:], generator=generator, dtype=torch.float64)
    (expected[0] * weights).sum().backward()

    output = chain.forward(source, training=True)
    assert output.frame.shape == expected.shape[2:]
    assert relative_error(output.windows([output.frame])[0], expected[0]) < TOLERANCE
    chain.backward(
        OutputGradient(
            lambda batch, result: [
                (result, weigh(batch, weights, 0)[:, :, : result.shape[2], : result.shape[3]])
            ]
        )
    )
    compare_gradients(whole, oracle)


@settings(max_examples=24, deadline=None, suppress_health_check=list(HealthCheck))
@given(**cases)
def test_border_of_glass_is_plain_execution_on_endless_glass(
    make, height, width, side, batch, keep, block, chained, in_file, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)
    storage = Storage(StorageConfig(device_bytes=0 if in_file else 2**30), torch.device("cpu"))
    whole, chain = build(
        make, generator, "glass", storage, Tiling(side, batch, keep), chained=chained, block=block
    )
    glass = torch.randn(5, generator=generator, dtype=torch.float64)
    mask = torch.rand(-(-height // 3), -(-width // 3), generator=generator) < 0.15
    mask[int(torch.randint(mask.shape[0], (1,), generator=generator)), 0] = True
    tissue = mask.repeat_interleave(3, 0).repeat_interleave(3, 1)[:height, :width]
    values = torch.randn(5, height, width, generator=generator, dtype=torch.float64)
    values = torch.where(tissue, values, glass[:, None, None])
    source = TensorSource(values, glass=glass, tissue=Tissue(mask.numpy(), 3, (height, width)))

    oracle = copy.deepcopy(whole)
    plain = oracle(pad_with_glass(values, glass, MARGIN, UNIT)[None])[0]
    output = chain.forward(source, training=True)
    origin = MARGIN // output.field.stride
    check_map(output, plain.detach(), origin)

    # any loss of the cells in computed tiles, as a head's, and of some outside, as reconstruction's
    weights = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    outside = torch.ones(plain.shape[1:], dtype=torch.bool)
    for box in map(output.grid.box, output.grid.index):
        outside[box.shifted(origin, origin).slices] = False
    rim = MARGIN // 2 // output.field.stride  # further out the plain map sees where its own glass ends
    weights[:, :rim], weights[:, -rim:], weights[:, :, :rim], weights[:, :, -rim:] = 0, 0, 0, 0
    (plain * weights).sum().backward()
    chain.backward(
        OutputGradient(
            lambda batch, result: [(result, weigh(batch, weights, origin))],
            (weights * outside).sum((1, 2)),
        )
    )
    compare_gradients(whole, oracle)


def check_map(output: FeatureMap, plain: Tensor, origin: int) -> None:
    """Computed tiles equal the plain map; cells that see no tissue equal glass; all that do are computed."""
    scale = float(plain.abs().max())
    stored = np.zeros(plain.shape[1:], bool)
    for box in map(output.grid.box, output.grid.index):
        rows, columns = box.shifted(origin, origin).slices
        stored[rows, columns] = True
        assert float((output.windows([box])[0] - plain[:, rows, columns]).abs().max()) < TOLERANCE * scale
    frame = output.frame.shifted(0, 0)
    reach = 6
    inner = type(frame)(frame.top - reach, frame.left - reach, frame.bottom + reach, frame.right + reach)
    rows, columns = inner.shifted(origin, origin).slices
    seen = output.tissue.seen_by(inner, output.field)
    assert stored[rows, columns][seen].all()
    blank = torch.from_numpy(~seen)
    if blank.any():
        difference = (plain[:, rows, columns] - output.glass[:, None, None])[:, blank]
        assert float(difference.abs().max()) < TOLERANCE * scale


def compare_gradients(whole: nn.Module, oracle: nn.Module) -> None:
    for (name, ours), (_, theirs) in zip(whole.named_parameters(), oracle.named_parameters(), strict=True):
        assert ours.grad is not None, name
        assert relative_error(ours.grad, theirs.grad) < TOLERANCE, name


def test_memory_is_given_back() -> None:
    generator = torch.Generator().manual_seed(0)
    storage = Storage(StorageConfig(device_bytes=10**6), torch.device("cpu"))
    _, chain = build(resnet, generator, "glass", storage, Tiling(8, 2, 1), chained=True, block=1)
    source = TensorSource(torch.randn(5, 30, 30).double(), glass=torch.zeros(5).double())
    output = chain.forward(source, training=True)
    chain.backward(OutputGradient(lambda batch, result: [(result, torch.ones_like(result))]))
    output.free()
    assert storage._left["device"] == 10**6


@pytest.mark.parametrize("mixed", [None, torch.bfloat16])
def test_kept_graphs_change_nothing(mixed: torch.dtype | None) -> None:
    grads = []
    for keep in (0, 2, 100):
        torch.manual_seed(0)
        # In float32 on one AVX2 thread oneDNN 3.13 spoils the heap at 5 channels, stride 2: see docs/log.md.
        module = randomise(nn.Sequential(*resnet(8, 16)), torch.Generator().manual_seed(1)).float()
        storage = Storage(StorageConfig(), torch.device("cpu"))
        segment = Segment(module, mixed=mixed)
        chain = Chain([segment], [Tiling(8, 2, keep)], storage)
        source = TensorSource(torch.linspace(-1, 1, 8 * 33 * 31).reshape(8, 33, 31), glass=torch.zeros(8))
        chain.forward(source, training=True)
        chain.backward(OutputGradient(lambda batch, result: [(result, torch.ones_like(result))]))
        grads.append([p.grad for p in module.parameters()])
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            assert relative_error(a, b) < 1e-5
