"""A convolution whose weight gradient is taken strip by strip, for processors without AVX-512.

There oneDNN's kernel for the weight gradient in channels_last reaches a tenth to a third of what its forward pass
does, the less the larger the map, and takes two thirds of a training step. In NCHW it is as fast as the rest; so
strips of rows that fit the cache are copied to that layout, and their gradients are summed
(`python -m benchmarks.convolution`). Axes: B batch, C channels, H W rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

_SCHEMA = (
    "(Tensor features, Tensor grad, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor"
)
STRIP_VALUES = 2**18  # numbers of one strip's input: 1 MB, a processor's second cache


@final
class StripConv2d(nn.Conv2d):
    """`nn.Conv2d` with zero padding and one group: the same values, and the same gradients up to rounding."""

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        if not (torch.is_grad_enabled() and self.weight.requires_grad and _pays(features_BCHW)):
            return super().forward(features_BCHW)
        result: Tensor = _Strips.apply(
            features_BCHW, self.weight, self.bias, self.stride, self.padding, self.dilation
        )
        return result


def with_strips(module: nn.Module) -> nn.Module:
    """The module with such convolutions in place of its plain ones, parameters shared; changed in place."""
    for name, conv in list(module.named_modules()):
        if type(conv) is not nn.Conv2d or not _suits(conv):
            continue
        strips = StripConv2d(  # torch types what a convolution holds as tuples of any length, and asks for pairs
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,  # type: ignore[arg-type]
            bias=conv.bias is not None, device="meta",
        )  # fmt: skip
        strips.weight, strips.bias = conv.weight, conv.bias
        strips.train(conv.training)
        if not name:
            return strips
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, strips)
    return module


def _suits(conv: nn.Conv2d) -> bool:
    # A kernel of one cell is a matrix product, which has no such trouble.
    plain = conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    hooked = conv._forward_hooks or conv._forward_pre_hooks  # they may make its weight of others
    return plain and not hooked and max(conv.kernel_size) > 1


def _pays(features_BCHW: Tensor) -> bool:
    return (
        features_BCHW.device.type == "cpu"
        and features_BCHW.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
    )


class _Strips(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features_BCHW: Tensor, weight: Tensor, bias: Tensor | None, *where: Sequence[int]
    ) -> Tensor:
        ctx.save_for_backward(features_BCHW, weight)
        ctx.where = stride, padding, dilation = where
        return F.conv2d(features_BCHW, weight, bias, stride, padding, dilation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BCHW: Tensor) -> tuple[Tensor | None, ...]:
        features_BCHW, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.where
        features_grad = None
        if ctx.needs_input_grad[0]:
            features_grad = conv2d_input(features_BCHW.shape, weight, grad_BCHW, stride, padding, dilation)
        kernel = weight.shape[2:]
        weight_grad = strip_weight_grad(features_BCHW, grad_BCHW, kernel, stride, padding, dilation)
        bias_grad = grad_BCHW.sum(dim=(0, 2, 3)) if ctx.needs_input_grad[2] else None
        return features_grad, weight_grad, bias_grad, None, None, None


@torch.library.custom_op("holoslide::strip_weight_grad", mutates_args=(), schema=_SCHEMA)
def strip_weight_grad(
    features_BCHW: Tensor, grad_BCHW: Tensor, kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """dL/d(weight), (C', C, h, w), from the input and dL/d(output) of a convolution with zero padding.

    One operation to all who count operations (`cost.py`), whatever the number of strips.
    """
    (B, C, H, W), (top, left), rows = features_BCHW.shape, padding, grad_BCHW.shape[2]
    reach = dilation[0] * (kernel[0] - 1) + 1  # input rows of one output row
    height = max(1, STRIP_VALUES // (C * (W + 2 * left) * stride[0]))
    shape = (grad_BCHW.shape[1], C, *kernel)
    total = features_BCHW.new_zeros(shape)
    for i in range(B):
        for first in range(0, rows, height):
            last = min(rows, first + height)
            start, stop = first * stride[0] - top, (last - 1) * stride[0] + reach - top
            inside = slice(max(0, start), min(H, stop))
            seen = features_BCHW.new_zeros((1, C, stop - start, W + 2 * left))
            seen[0, :, inside.start - start : inside.stop - start, left : left + W] = features_BCHW[
                i, :, inside
            ]
            part = grad_BCHW[i : i + 1, :, first:last].contiguous()
            total += conv2d_weight(seen, shape, part, stride, dilation=dilation)
    return total
