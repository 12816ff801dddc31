"""A convolution whose kernel is its stride gives what PyTorch's gives, and the same gradients."""

import pytest
import torch
from torch import Tensor, nn

from holoslide.models import cells
from holoslide.models.cells import CellConv2d


def _gradients(conv: nn.Conv2d, features_BCHW: Tensor, grad_BOhw: Tensor) -> list[Tensor]:
    leaf_BCHW = features_BCHW.clone().requires_grad_()
    conv.zero_grad()
    result = conv(leaf_BCHW)
    result.backward(grad_BOhw)
    assert leaf_BCHW.grad is not None
    assert conv.weight.grad is not None
    return [result.detach(), leaf_BCHW.grad, conv.weight.grad]


@pytest.mark.parametrize("size", [(9, 9), (11, 14), (27, 20), (3, 40)])
@pytest.mark.parametrize("side", [1, 3])
@pytest.mark.parametrize("strip_values", [1, 150, 2**20])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_those_of_any_convolution(size, side, strip_values, layout, monkeypatch):
    monkeypatch.setitem(cells.STRIP_VALUES, "cpu", strip_values)
    torch.manual_seed(0)
    ours = CellConv2d(5, 4, side).double()
    plain = nn.Conv2d(5, 4, side, stride=side, bias=False).double()
    plain.load_state_dict(ours.state_dict())
    features_BCHW = torch.randn(2, 5, *size, dtype=torch.float64).contiguous(memory_format=layout)
    grad_BOhw = torch.randn(2, 4, *(n // side for n in size), dtype=torch.float64)
    for one, other in zip(
        _gradients(ours, features_BCHW, grad_BOhw), _gradients(plain, features_BCHW, grad_BOhw), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["features", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_other_its_own(frozen):
    conv, features_BCHW = CellConv2d(5, 4, 3).double(), torch.randn(1, 5, 9, 9, dtype=torch.float64)
    conv.weight.requires_grad_(frozen != "weight")
    features_BCHW.requires_grad_(frozen != "features")
    trained = features_BCHW if frozen == "weight" else conv.weight
    other = conv.weight if frozen == "weight" else features_BCHW
    (wanted,) = torch.autograd.grad(nn.functional.conv2d(features_BCHW, conv.weight, stride=3).sum(), trained)
    conv(features_BCHW).sum().backward()
    torch.testing.assert_close(trained.grad, wanted, rtol=1e-12, atol=1e-12)
    assert other.grad is None


def test_in_bf16_gradients_are_as_near_as_a_convolutions():
    torch.manual_seed(0)
    ours, plain = CellConv2d(16, 8, 3), nn.Conv2d(16, 8, 3, stride=3, bias=False)
    plain.load_state_dict(ours.state_dict())
    features_BCHW = torch.randn(1, 16, 60, 60).to(torch.bfloat16)
    grad_BOhw = torch.randn(1, 8, 20, 20).to(torch.bfloat16)
    exact = _gradients(plain, features_BCHW.float(), grad_BOhw.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _gradients(ours, features_BCHW, grad_BOhw)
        usual = _gradients(plain, features_BCHW, grad_BOhw)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in usual]
    for one, other, true in zip(found, usual, exact, strict=True):
        assert (one.float() - true).norm() <= 2 * (other.float() - true).norm() + 1e-3 * true.norm()
