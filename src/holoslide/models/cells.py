"""A convolution whose kernel is its stride: a linear map of squares of cells that do not overlap.

So its gradients are two matrix products. Libraries take them for those of any convolution with a stride, which they
are slow at. Axes: B batch, C channels, H W rows and columns; n squares, K numbers of a square, O output channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

STRIP_VALUES = {"cpu": 2**20, "gpu": 2**24}  # of the squares that are laid out at a time, whole rows of them


class CellConv2d(nn.Conv2d):
    """`nn.Conv2d` without bias and padding, its kernel `side` cells a side and as far apart."""

    def __init__(self, in_channels: int, out_channels: int, side: int) -> None:
        super().__init__(in_channels, out_channels, side, stride=side, bias=False)

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, O, H // side, W // side)."""
        if not torch.is_grad_enabled():
            return super().forward(features_BCHW)
        result: Tensor = _Squares.apply(features_BCHW, self.weight)
        return result


class _Squares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features_BCHW: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(features_BCHW, weight)
        return F.conv2d(features_BCHW, weight, stride=weight.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BOhw: Tensor) -> tuple[Tensor | None, Tensor | None]:
        features_BCHW, weight = ctx.saved_tensors
        wants_features, wants_weight = ctx.needs_input_grad
        out, channels, side, _ = weight.shape
        flat_OK = weight.permute(0, 2, 3, 1).reshape(out, -1).to(grad_BOhw.dtype)
        flat_grad_OK = torch.zeros_like(flat_OK, dtype=weight.dtype)
        features_grad = torch.zeros_like(features_BCHW) if wants_features else None
        for cells, covered in _strips(grad_BOhw, flat_OK.shape[1], side):
            grad_nO = grad_BOhw[cells].permute(0, 2, 3, 1).reshape(-1, out)
            if wants_weight:
                flat_grad_OK += grad_nO.T @ _flat(features_BCHW[covered], side).to(grad_nO.dtype)
            if features_grad is not None:
                part = features_grad[covered]
                part.copy_(_square(grad_nO @ flat_OK, part.shape, side))
        weight_grad = flat_grad_OK.view(out, side, side, channels).permute(0, 3, 1, 2)
        return features_grad, weight_grad if wants_weight else None


Place = tuple[slice, slice, slice, slice]


def _strips(grad_BOhw: Tensor, values: int, side: int) -> list[tuple[Place, Place]]:
    """Some rows of squares at a time: their place in the output, and that of what they cover of the input."""
    batch, _, height, width = grad_BOhw.shape
    most = STRIP_VALUES["cpu" if grad_BOhw.device.type == "cpu" else "gpu"]
    rows = max(1, most // max(1, batch * width * values))
    every = slice(None)
    return [
        (
            (every, every, slice(first, first + rows), every),
            (every, every, slice(first * side, min(first + rows, height) * side), slice(width * side)),
        )
        for first in range(0, height, rows)
    ]


def _flat(features_BCHW: Tensor, side: int) -> Tensor:
    """Each square as a row, (n, K)."""
    batch, channels, height, width = features_BCHW.shape
    squares = features_BCHW.permute(0, 2, 3, 1).reshape(
        batch, height // side, side, width // side, side, channels
    )
    return squares.transpose(2, 3).reshape(-1, side * side * channels)


def _square(rows_nK: Tensor, shape: torch.Size, side: int) -> Tensor:
    """What `_flat` made rows of, (B, C, H, W)."""
    batch, channels, height, width = shape
    squares = rows_nK.reshape(batch, height // side, width // side, side, side, channels)
    return squares.transpose(2, 3).reshape(batch, height, width, channels).permute(0, 3, 1, 2)
