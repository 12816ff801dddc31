"""What `holoslide.streaming` offers for any module, and the documentation's example, held to plain PyTorch."""

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from holoslide import streaming
from holoslide.errors import ConfigError, NotLocal
from holoslide.streaming import (
    Chain,
    Segment,
    Storage,
    StorageConfig,
    TensorGradient,
    TensorSource,
    Tiling,
    Tissue,
    backward_tiles,
    forward_tiles,
)
from tests.streaming.oracle import pad_with_glass, randomise, relative_error

TOLERANCE = 1e-10
PAGE = Path(__file__).resolve().parents[2] / "docs" / "streaming.md"


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 4, 5, stride=2, padding=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, padding=1),
    )
    return randomise(nn.Sequential(*layers), torch.Generator().manual_seed(1))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same_gradients(ours: nn.Module, plain: nn.Module) -> None:
    for (name, mine), (_, other) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert mine.grad is not None, name
        assert relative_error(mine.grad, other.grad) < TOLERANCE, name


def test_the_pages_example_gives_the_gradients_of_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr("builtins.print", lambda *values: None)
    try:
        exec(compile(code[1], str(PAGE), "exec"), names := {})
    finally:
        torch.set_default_dtype(default)
    plain, image_CHW = copy.deepcopy(names["module"]), names["image_CHW"].clone().requires_grad_()
    plain.zero_grad()
    whole_CHW = plain(image_CHW[None])[0]
    whole_CHW.square().mean().backward()
    assert relative_error(names["values_CHW"], whole_CHW) < TOLERANCE
    assert_same_gradients(names["module"], plain)
    assert relative_error(names["pixels"].values_CHW, image_CHW.grad) < TOLERANCE


@pytest.mark.parametrize("keep", [0, 3])
@pytest.mark.parametrize("sparse", [False, True])
def test_any_gradient_of_the_frame_on_endless_glass(module: nn.Module, *, sparse: bool, keep: int) -> None:
    """Cells that were not computed pass theirs on, too: through the glass, to weights and to the glass's colour."""
    margin, size = 24, (33, 47)
    glass_C = normal(3, seed=2)
    mask = torch.ones(3, 4, dtype=torch.bool)
    if sparse:
        mask[:, 1:] = False
    seen = mask.repeat_interleave(12, 0).repeat_interleave(12, 1)[: size[0], : size[1]]
    values_CHW = torch.where(seen, normal(3, *size, seed=3), glass_C[:, None, None])
    grads_CHW = normal(5, 17, 24, seed=4)

    source = TensorSource(values_CHW, glass=glass_C, tissue=Tissue(mask.numpy(), 12, size))
    segment, pixels = Segment(module), TensorGradient(source)
    output = forward_tiles(segment, source, tiling=Tiling(side=6, keep=keep), input_grad=True)
    backward_tiles(segment, source, output, grads_CHW, into=pixels)

    plain = copy.deepcopy(module)
    plain.zero_grad()
    leaf_CHW, leaf_C = values_CHW.clone().requires_grad_(), glass_C.clone().requires_grad_()
    own_CHW = torch.where(seen, leaf_CHW, leaf_C[:, None, None])
    whole_CHW = plain(pad_with_glass(own_CHW, leaf_C, margin, 2)[None])[0]
    first = margin // 2
    framed_CHW = whole_CHW[:, first : first + 17, first : first + 24]
    framed_CHW.backward(grads_CHW)
    assert relative_error(output.whole(), framed_CHW) < TOLERANCE
    assert_same_gradients(module, plain)
    assert relative_error(pixels.values_CHW[:, seen], leaf_CHW.grad[:, seen]) < TOLERANCE
    outside_C = pixels.glass + pixels.values_CHW[:, ~seen].sum(dim=1)
    assert relative_error(outside_C, leaf_C.grad) < TOLERANCE


def test_a_chain_takes_the_gradient_of_the_frame(module: nn.Module) -> None:
    values_CHW, grads_CHW = normal(3, 30, 41, seed=5), normal(5, 15, 21, seed=6)
    plain = copy.deepcopy(module)
    plain(values_CHW[None])[0].backward(grads_CHW)
    storage = Storage(StorageConfig(device_bytes=0), torch.device("cpu"))
    segments = [Segment(part, border="zeros") for part in (module[:3], module[3:])]
    chain = Chain(segments, [Tiling(side=5)] * 2, storage)
    with pytest.raises(RuntimeError, match="call forward with training=True"):
        chain.backward(grads_CHW)
    chain.forward(TensorSource(values_CHW), training=True)
    chain.backward(grads_CHW)
    assert_same_gradients(module, plain)


@pytest.mark.parametrize(
    "module",
    [
        nn.MaxPool2d(3, stride=2, padding=1),  # without weights, so without a precision of its own
        nn.Sequential(
            nn.Conv2d(3, 2, 61), nn.BatchNorm2d(2)
        ).eval(),  # sees further than most, and pads nothing
    ],
    ids=["pooling", "large"],
)
def test_modules_of_another_kind_are_exact_too(module: nn.Module) -> None:
    module, values_CHW = module.double(), normal(3, 96, 90, seed=9)
    output = forward_tiles(Segment(module, border="zeros"), TensorSource(values_CHW), tiling=Tiling(side=7))
    expected_CHW = module(values_CHW[None])[0]
    assert output.whole().dtype == torch.float64
    assert relative_error(output.whole(), expected_CHW) < TOLERANCE


def test_frozen_layers_get_no_gradient_and_the_input_still_does(module: nn.Module) -> None:
    module.requires_grad_(requires_grad=False)
    values_CHW = normal(3, 20, 20, seed=7)
    source, segment = TensorSource(values_CHW), Segment(module, border="zeros")
    output, pixels = forward_tiles(segment, source, tiling=Tiling(side=4)), TensorGradient(source)
    backward_tiles(segment, source, output, torch.ones(5, 10, 10), into=pixels)
    leaf_CHW = values_CHW.clone().requires_grad_()
    module(leaf_CHW[None]).sum().backward()
    assert relative_error(pixels.values_CHW, leaf_CHW.grad) < TOLERANCE
    assert all(p.grad is None for p in module.parameters())


def test_what_would_give_wrong_gradients_in_silence_is_refused(module: nn.Module) -> None:
    source, segment = TensorSource(normal(3, 20, 20, seed=8)), Segment(module, border="zeros")
    grads_CHW = torch.ones(5, 10, 10)
    with torch.no_grad():
        output = forward_tiles(segment, source)
    with pytest.raises(RuntimeError, match=r"not under torch\.no_grad"):
        backward_tiles(segment, source, output, grads_CHW)
    output = forward_tiles(segment, source, tiling=Tiling(keep=1))
    with pytest.raises(RuntimeError, match="input_grad=True"):
        backward_tiles(segment, source, output, grads_CHW, into=TensorGradient(source))
    output = forward_tiles(segment, source)
    with pytest.raises(ConfigError, match=r"shape \(5, 9, 10\); give \(5, 10, 10\)"):
        backward_tiles(segment, source, output, grads_CHW[:, 1:])
    backward_tiles(segment, source, output, grads_CHW)
    with pytest.raises(RuntimeError, match="call forward_tiles once before each"):
        backward_tiles(segment, source, output, grads_CHW)


def test_a_segment_follows_its_module_to_another_precision_and_mode(module: nn.Module) -> None:
    values_CHW = normal(3, 20, 20, seed=10)
    with torch.inference_mode():  # in which nothing that is to be trained may be made
        segment = Segment(module.float(), border="zeros")
    module.double()
    plain, source = copy.deepcopy(module), TensorSource(values_CHW)
    plain(values_CHW[None]).sum().backward()
    output = forward_tiles(segment, source)
    backward_tiles(segment, source, output, torch.ones(5, 10, 10))
    assert output.whole().dtype == torch.float64
    assert_same_gradients(module, plain)
    module.train()
    with pytest.raises(NotLocal, match=r"1 \(BatchNorm2d\): sees the whole map"):
        forward_tiles(segment, source)


class Tempered(nn.Module):
    """Two numbers that no optimiser trains, and that are changed as training goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.temperature = nn.Conv2d(3, 4, 3, padding=1), 1.0
        self.gain = torch.ones(4, 1, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.conv(x) / self.temperature) * self.gain


CHANGES: dict[str, Callable[[Tempered], object]] = {
    "a number": lambda module: setattr(module, "temperature", 3.0),
    "a tensor": lambda module: module.gain.mul_(2),
    "a layer's setting": lambda module: setattr(module.conv, "dilation", (2, 2)),
    "a hook": lambda module: module.conv.register_forward_hook(lambda layer, given, made: 2 * made),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_segment_follows_its_module_to_other_settings(change: str) -> None:
    module, source = Tempered().double().eval(), TensorSource(normal(3, 20, 20, seed=11))
    segment = Segment(module, border="zeros")
    backward_tiles(segment, source, forward_tiles(segment, source), torch.ones(4, 20, 20))
    CHANGES[change](module)
    module.zero_grad()
    output = forward_tiles(segment, source, tiling=Tiling(side=7))
    backward_tiles(segment, source, output, torch.ones_like(output.whole()))
    plain = copy.deepcopy(module)
    plain.zero_grad()
    whole_CHW = plain(source.values_CHW[None])[0]
    whole_CHW.sum().backward()
    assert relative_error(output.whole(), whole_CHW) < TOLERANCE
    assert_same_gradients(module, plain)


class Remembering(nn.Module):
    """Keeps what it was given last, for a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3, padding=1), torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach()
        return self.conv(x)


def test_a_segment_leaves_its_module_as_it_is() -> None:
    module, source = Remembering().double().eval(), TensorSource(normal(3, 20, 20, seed=12))
    forward_tiles(Segment(module, border="zeros"), source)
    assert not module.last.numel()


def test_inputs_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"give \(C, H, W\)"):
        TensorSource(torch.zeros(1, 3, 5, 5))
    with pytest.raises(ConfigError, match="one value for each of the 3 channels"):
        TensorSource(torch.zeros(3, 5, 5), glass=torch.zeros(1))
    with pytest.raises(ConfigError, match=r"tiling\.side: is 0; give 1 or more"):
        Tiling(side=0)


def test_every_public_name_is_there_and_costs_nothing_before_it_is_used() -> None:
    assert all(getattr(streaming, name).__doc__ for name in streaming.__all__)
    with pytest.raises(AttributeError, match=r"holoslide\.streaming"):
        _ = streaming.forward_tile  # type: ignore[attr-defined]
    code = "import sys, holoslide.streaming; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"False\n"
