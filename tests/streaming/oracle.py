"""Plain PyTorch to hold the streamed engine against: no tiles, no windows, nothing skipped.

A slide on endless glass is a raster padded with enough of it: the padding is a multiple of `unit` (every stride
times every head stride divides it), so cells stay aligned, and wide enough that zero padding at its edge reaches
no cell that is compared.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pad_with_glass(values_CHW: Tensor, glass_C: Tensor, margin: int, unit: int) -> Tensor:
    """`margin` cells of glass on each side, and as many more as make the sides multiples of `unit`."""
    assert margin % unit == 0
    height, width = values_CHW.shape[1:]
    bottom, right = (margin + -n % unit for n in (height, width))
    padded = glass_C[:, None, None].expand(-1, margin + height + bottom, margin + width + right).clone()
    padded[:, margin : margin + height, margin : margin + width] = values_CHW
    return padded


def dilate(seen_HW: Tensor, *, stride: int, low: int, high: int) -> Tensor:
    """Which output cells read a seen input cell, one by one through max pooling."""
    seen = F.pad(seen_HW[None, None].double(), (-low, high, -low, high))
    return F.max_pool2d(seen, kernel_size=high - low + 1, stride=stride)[0, 0] > 0


def randomise(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Float64, evaluation mode, and BatchNorms that differ from the identity."""
    module = module.double().eval()
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                for tensor, low, high in (
                    (layer.weight, 0.3, 0.9), (layer.bias, -0.3, 0.3),
                    (layer.running_mean, -0.3, 0.3), (layer.running_var, 0.5, 2.0),
                ):  # fmt: skip
                    if tensor is None:  # a BatchNorm that keeps no statistics
                        continue
                    tensor.copy_(
                        torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * (high - low)
                        + low
                    )
    return module


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
