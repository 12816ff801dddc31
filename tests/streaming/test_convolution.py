"""The strips' weight gradient against autograd's own, and that it is what runs where it pays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from holoslide.streaming import convolution
from holoslide.streaming.convolution import StripConv2d, strip_weight_grad, with_strips
from holoslide.streaming.cost import PeakBytes

PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(), kernel=PAIRS, stride=PAIRS, dilation=PAIRS, batch=st.integers(1, 2), values=st.integers(1, 400)
)  # fmt: skip
def test_strips_give_the_gradient_of_the_whole(
    data: st.DataObject,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    batch: int,
    values: int,
) -> None:
    padding = tuple(data.draw(st.integers(0, k - 1)) for k in kernel)
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    sides = [data.draw(st.integers(max(1, r - 2 * p), 23)) for r, p in zip(reach, padding, strict=True)]
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 3, *sides, generator=generator, dtype=torch.float64)
    weight = torch.rand(4, 3, *kernel, generator=generator, dtype=torch.float64).requires_grad_()
    y = F.conv2d(x, weight, None, stride, padding, dilation)
    grad = torch.rand(y.shape, generator=generator, dtype=torch.float64)
    y.backward(grad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convolution, "STRIP_VALUES", values)
        ours = strip_weight_grad(x, grad, weight.shape[2:], stride=stride, padding=padding, dilation=dilation)
    torch.testing.assert_close(ours, weight.grad, rtol=1e-12, atol=1e-12)


def test_a_network_of_them_has_the_same_values_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(convolution, "STRIP_VALUES", 512)
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, bias=False), nn.Conv2d(8, 4, 1)
    )
    x = torch.rand(1, 3, 31, 22, requires_grad=True)
    plain(x).square().sum().backward()
    expected = [x.grad, *(p.grad for p in plain.parameters())]
    x.grad = None
    plain.zero_grad()
    ours = with_strips(plain)
    assert [type(m) for m in ours] == [StripConv2d, nn.ReLU, StripConv2d, nn.Conv2d]
    ours(x).square().sum().backward()
    for found, wanted in zip([x.grad, *(p.grad for p in ours.parameters())], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_windows_of_all_sizes_take_the_same_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan compares two trials moment by moment: one window is a single strip here, the other many."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(convolution, "STRIP_VALUES", 512)
    conv, moments = with_strips(nn.Conv2d(3, 4, 3, padding=1)), []
    for side in (8, 64):
        with PeakBytes() as counted:
            conv(torch.rand(1, 3, side, side)).sum().backward()
        moments.append(len(counted.moments))
    assert moments[0] == moments[1] > 0


def test_elsewhere_it_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = with_strips(nn.Conv2d(3, 4, 3))
    assert isinstance(conv, StripConv2d)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(convolution, "strip_weight_grad", refuse)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    conv(torch.rand(1, 3, 9, 9)).sum().backward()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    conv.double()(torch.rand(1, 3, 9, 9, dtype=torch.float64)).sum().backward()
    with pytest.raises(AssertionError):
        conv.float()(torch.rand(1, 3, 9, 9)).sum().backward()


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 1),
        weight_norm(nn.Conv2d(4, 4, 3)),
    ],
)
def test_others_stay_as_they_are(conv: nn.Conv2d) -> None:
    assert with_strips(conv) is conv
