"""Heads against a plain one made of torch's own layers; evidence that adds up to the logits."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from holoslide.errors import ConfigError, SlideError
from holoslide.models import readout as readouts
from holoslide.models.heads import Head, kernel_for
from holoslide.models.options import HeadConfig
from holoslide.models.pooling import dropout
from holoslide.models.readout import Readout
from holoslide.streaming.cost import PeakBytes

PAPER = {"pooling": "gated", "norm": "slide", "kernel": None}


def randomised(module: nn.Module) -> nn.Module:
    """In float64, with no parameter at its first value."""
    generator = torch.Generator().manual_seed(3)
    module = module.double()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 3
    return module


def readout_of(channels: int, classes: int, *, final: bool = False, **config: object) -> Readout:
    return Head(channels, classes, HeadConfig(**config), depth=1, last_depth=None if final else 8).readout


def plain_logits(head: Head, features_BCHW: Tensor) -> Tensor:
    """The method's head, part by part, with nn.GroupNorm on the map."""
    readout, pooling = head.readout, head.readout.attention
    cells_BCHW = F.conv2d(features_BCHW, head.stem.weight, stride=head.stem.kernel_size)
    norm = nn.GroupNorm(cells_BCHW.shape[1], cells_BCHW.shape[1]).double()
    norm.weight, norm.bias = readout.norm.weight, readout.norm.bias
    cells_NC = F.relu(norm(cells_BCHW)).flatten(2)[0].T
    gated = torch.tanh(pooling.value(cells_NC)) * torch.sigmoid(pooling.gate(cells_NC))
    weights_N1 = torch.softmax(pooling.score(gated), dim=0)
    pooled_C = (weights_N1 * cells_NC).sum(0)
    return nn.Sequential(readout.hidden, nn.ReLU(), readout.output)(pooled_C)


@pytest.mark.parametrize("final", [False, True])
def test_a_head_is_the_methods(*, final: bool) -> None:
    head = randomised(Head(6, 3, HeadConfig(**PAPER), depth=4, last_depth=None if final else 8))
    features = torch.rand(1, 6, 37, 51, dtype=torch.float64, requires_grad=True)
    ours, plain = head(features), plain_logits(head, features)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours[1], [features, *head.parameters()]),
        torch.autograd.grad(plain[1], [features, *head.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_kernels_and_widths_are_the_papers_on_resnet34() -> None:
    for depth, channels, kernel in ((1, 64, 9), (2, 128, 9), (4, 256, 7), (8, 512, 5)):
        head = Head(channels, 2, HeadConfig(**PAPER), depth=depth, last_depth=None if depth == 8 else 8)
        assert head.stem.kernel_size == head.stem.stride == (kernel, kernel)
        assert head.stem.bias is None
        assert head.stem.out_channels == channels
        assert head.readout.hidden.out_features == (512 if depth == 8 else 128)
        assert head.readout.attention.value.out_features == (128 if depth == 8 else channels // 2)


def test_all_heads_of_a_model_read_the_same_squares() -> None:
    kernels = [Head(8, 2, HeadConfig(kernel=3), depth=d, last_depth=8).stem.kernel_size for d in (1, 2, 4)]
    assert kernels == [(24, 24), (12, 12), (6, 6)]


def test_a_kernel_that_no_memory_holds_is_refused() -> None:
    """PyTorch said that the storage size overflows, or that it cannot allocate, in a traceback."""
    for kernel in (2**31 - 1, 100_000):
        with pytest.raises(
            ConfigError, match=r"model\.heads\.kernel: makes a head of .* weights.*; give less"
        ):
            Head(64, 2, HeadConfig(kernel=kernel), depth=8)
    assert Head(4, 2, HeadConfig(kernel=300), depth=8).stem.kernel_size == (300, 300)


def test_options_change_the_head() -> None:
    head = Head(2048, 2, HeadConfig(kernel=3), depth=8)
    assert head.stem.kernel_size == (3, 3)
    assert head.stem.out_channels == 512
    assert kernel_for(16) == 5
    with pytest.raises(ConfigError, match=r"model.heads.dropout: is 1.0; give a number from 0"):
        HeadConfig(dropout=1.0)
    with pytest.raises(
        ConfigError, match=r"model.heads.pooling: is max; choose auto, gated, attention, mean"
    ):
        HeadConfig(pooling="max")


@pytest.mark.parametrize("pooling", ["auto", "gated", "attention", "mean"])
@pytest.mark.parametrize("cells", [1, 2, 57])
def test_evidence_adds_up_to_the_logits(pooling: str, cells: int) -> None:
    readout = randomised(readout_of(8, 3, pooling=pooling, final=True))
    cells_NC = torch.randn(cells, 8, dtype=torch.float64)
    explained = readout.explain(cells_NC)
    torch.testing.assert_close(explained.logits_L, readout(cells_NC), rtol=0, atol=0)
    torch.testing.assert_close(
        explained.evidence_NL.sum(0) + explained.bias_L, explained.logits_L, rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(explained.attention_N.sum(), torch.tensor(1.0, dtype=torch.float64))
    if pooling == "mean":
        assert torch.equal(explained.attention_N, torch.full((cells,), 1 / cells, dtype=torch.float64))


def test_one_cell_is_enough_and_has_gradients() -> None:
    readout = readout_of(4, 2)
    cell = torch.rand(1, 4, requires_grad=True)
    readout(cell).sum().backward()
    assert cell.grad is not None
    assert cell.grad.isfinite().all()
    with pytest.raises(SlideError, match="head: was given no cell to read"):
        readout(cell[:0])


def test_a_small_lesion_is_not_drowned() -> None:
    """Of 10,000 cells one speaks for a class: auto-pool hears it, where a mean would not."""
    readout = readout_of(2, 2, pooling="auto", norm="cohort", final=True)
    with torch.no_grad():
        readout.hidden.weight.zero_()
        readout.hidden.bias.zero_()
        readout.hidden.weight[0, 0] = 1
        readout.output.weight.zero_()
        readout.output.bias.zero_()
        readout.output.weight[1, 0] = 1
    cells_NC = torch.zeros(10_000, 2)
    cells_NC[77, 0] = 8
    explained = readout.explain(cells_NC)
    assert 7 < float(explained.logits_L[1]) < 8
    assert int(explained.evidence_NL[:, 1].argmax()) == 77
    assert explained.bias_L.tolist() == [0, 0]


def plain_without_norm(readout: Readout, cells_NC: Tensor) -> Tensor:
    values_NC = F.relu(cells_NC * readout.norm.weight + readout.norm.bias)
    pooled_C = torch.softmax(readout.attention(values_NC), 0) @ values_NC
    return readout.output(F.relu(readout.hidden(pooled_C)))


def test_with_the_norm_of_a_cohort_a_cell_speaks_for_itself() -> None:
    readout = randomised(readout_of(6, 3, norm="cohort", pooling="gated"))
    cells_NC = torch.randn(40, 6, dtype=torch.float64)
    torch.testing.assert_close(
        readout(cells_NC), plain_without_norm(readout, cells_NC), rtol=1e-12, atol=1e-12
    )
    leaf_NC = cells_NC.clone().requires_grad_()
    (plain_NC,) = torch.autograd.grad(plain_without_norm(readout, leaf_NC)[0], leaf_NC)
    (ours_NC,) = torch.autograd.grad(readout(leaf_NC)[0], leaf_NC)
    torch.testing.assert_close(ours_NC, plain_NC, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("pooling", ["auto", "gated", "attention", "mean"])
@pytest.mark.parametrize("chunk_cells", [1, 7, 40, 1000])
def test_chunks_change_nothing(pooling: str, chunk_cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    readout = randomised(readout_of(6, 3, pooling=pooling))
    cells_NC = torch.randn(40, 6, dtype=torch.float64) * 4 + 9

    def run(values: int) -> list[Tensor]:
        monkeypatch.setitem(readouts.CHUNK_VALUES, "cpu", values)
        leaf_NC = cells_NC.clone().requires_grad_()
        logits = readout(leaf_NC, generator=torch.Generator().manual_seed(0))
        readout.zero_grad()
        logits.logsumexp(0).backward()
        explained = readout.explain(cells_NC)
        grads = [p.grad for p in readout.parameters() if p.grad is not None]
        return [logits, leaf_NC.grad, *grads, explained.evidence_NL, explained.bias_L]

    whole, chunked = run(2**20), run(6 * chunk_cells)
    assert len(whole) == len(chunked) >= 9
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)


def test_a_cell_costs_its_gradient_and_a_few_numbers() -> None:
    readout = readout_of(32, 2)

    def peak(cells: int) -> int:
        leaf_NC = torch.rand(cells, 32, requires_grad=True)
        with PeakBytes() as counted:
            readout(leaf_NC).sum().backward()
        return counted.peak

    numbers = (peak(200_000) - peak(50_000)) / 150_000 / 4
    assert numbers <= 2 * 32 + 8  # autograd keeps a copy of the gradient


def test_the_readout_is_exact_under_autocast() -> None:
    readout = readout_of(16, 2, final=True)
    cells = torch.rand(50, 16)
    plain = readout(cells)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert readout(cells).dtype == torch.float32
        assert torch.equal(readout(cells), plain)
        assert torch.equal(readout.explain(cells).logits_L, plain)
    assert readout(cells.bfloat16()).dtype == torch.float32
    assert randomised(readout)(cells.double()).dtype == torch.float64


def test_dropout_comes_from_its_generator_alone() -> None:
    readout = readout_of(16, 2, dropout=0.5)
    cells = torch.rand(50, 16)

    def draw(seed: int) -> Tensor:
        return readout(cells, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(readout(cells), readout(cells))
    assert torch.equal(torch.get_rng_state(), state)
    kept = dropout(torch.ones(10_000), 0.2, torch.Generator().manual_seed(0))
    assert set(kept.unique().tolist()) == {0.0, 1.25}
    assert abs(float(kept.mean()) - 1) < 0.02
