"""Random feature reconstruction (RFR): a module must be able to give back its input at random places.

It keeps early modules from throwing away what later ones need (arXiv 2207.08267). Axes: B patches, C channels,
H W cells.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from holoslide.errors import SlideError
from holoslide.geometry import Box
from holoslide.models.options import ReconstructionConfig

_FIRST_SIDE = 128  # cells, in maps as fine as the backbone's stem's


def side_for(depth: int) -> int:
    """Patch side, in cells, in a map `depth` times coarser than the backbone's stem's.

    >>> [side_for(depth) for depth in (1, 2, 4, 8)]
    [128, 64, 32, 16]
    """
    return max(1, _FIRST_SIDE // depth)


class Decoder(nn.Module):
    """Patches of a module's output -> the same places of its input.

    Conv 3x3 -> BatchNorm -> ReLU -> conv 3x3, both to the input's channels. BatchNorm normalises by the
    patches of one slide, in evaluation too: it keeps no running statistics. `side` is the patches' at most.
    """

    def __init__(self, channels: int, input_channels: int, *, side: int) -> None:
        super().__init__()
        self.side = side
        self.layers = nn.Sequential(
            nn.Conv2d(channels, input_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(input_channels, track_running_stats=False),
            nn.ReLU(),
            nn.Conv2d(input_channels, input_channels, 3, padding=1),
        )

    def forward(self, patches_BCHW: Tensor, *, scale: int) -> Tensor:
        """(B, C_k, h, w) -> (B, C_{k-1}, h * scale, w * scale); `scale` is the module's stride."""
        rebuilt_BCHW: Tensor = self.layers(_fine(patches_BCHW, scale))
        return rebuilt_BCHW

    def loss(self, patches_BCHW: Tensor, target_BCHW: Tensor, *, scale: int) -> Tensor:
        """The mean absolute difference between what `forward` gives and what was there."""
        return _difference(self(patches_BCHW, scale=scale), target_BCHW)

    def pull_back(
        self, patches_BCHW: Tensor, target_BCHW: Tensor, *, scale: int, weight: float
    ) -> tuple[Tensor, Tensor]:
        """`loss`, and the gradients of `weight` times it: the patches', (B, C_k, h, w); `.grad` gets the layers'.

        The same as a backward pass through all patches at once. On a CPU in a fraction of its memory: only
        BatchNorm needs them together, the convolutions before and after it take one at a time. On a GPU they
        take all, for many small launches would cost more than their memory.
        """
        first, norm, relu, last = self.layers
        size = 1 if patches_BCHW.device.type == "cpu" else len(patches_BCHW)
        parts = [slice(start, start + size) for start in range(0, len(patches_BCHW), size)]
        hidden_BCHW = torch.cat([first(_fine(patches_BCHW[part], scale)).detach() for part in parts])
        normed_BCHW = norm(hidden_BCHW.requires_grad_())
        grad_BCHW = normed_BCHW.detach()  # takes the values' place, which BatchNorm does not keep
        losses = []
        for part in parts:
            leaf = normed_BCHW[part].detach().requires_grad_()
            loss = _difference(last(relu(leaf)), target_BCHW[part]) * (len(leaf) / len(patches_BCHW))
            _backward(loss * weight, None)
            assert leaf.grad is not None
            grad_BCHW[part] = leaf.grad
            losses.append(loss.detach().double())
        _backward(normed_BCHW, grad_BCHW)
        hidden_grad_BCHW = hidden_BCHW.grad
        assert hidden_grad_BCHW is not None
        del normed_BCHW, grad_BCHW, hidden_BCHW
        grads = torch.empty_like(patches_BCHW)
        for part in parts:
            leaf = patches_BCHW[part].detach().requires_grad_()
            _backward(first(_fine(leaf, scale)), hidden_grad_BCHW[part])
            assert leaf.grad is not None
            grads[part] = leaf.grad
        return torch.stack(losses).sum(), grads


def _fine(patches_BCHW: Tensor, scale: int) -> Tensor:
    return F.interpolate(patches_BCHW, scale_factor=scale, mode="bilinear", align_corners=True)


def _difference(rebuilt_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    return F.l1_loss(rebuilt_BCHW, target_BCHW.to(rebuilt_BCHW.dtype))


def _backward(root: Tensor, grad: Tensor | None) -> None:
    """Outside autocast, which on a CPU would reach into the backward pass."""
    with torch.autocast(root.device.type, enabled=False):
        torch.autograd.backward([root], [grad])


def draw_patches(
    mask: NDArray[np.bool_],
    config: ReconstructionConfig,
    *,
    mask_cell_px: int,
    cell_px: int,
    map_cells: tuple[int, int],
    side: int,
    generator: torch.Generator,
) -> list[Box]:
    """Boxes of at most `side` cells of a feature map, around random points of the tissue, and inside the map.

    `mask` (h, w) tells which squares of `mask_cell_px` raster pixels hold tissue, the first at pixel (0, 0);
    a cell of the map stands for `cell_px` pixels a side. A map smaller than a patch makes the patch smaller,
    on that axis alone (the paper's code crashes there). All boxes have one shape.
    """
    tissue = torch.from_numpy(np.argwhere(mask))
    if len(tissue) == 0:
        raise SlideError("reconstruction", "the tissue mask is empty", "take the slide out of the table")
    count, device = config.patches, generator.device
    chosen = torch.randint(len(tissue), (count,), generator=generator, device=device).cpu()
    within_px = torch.randint(mask_cell_px, (count, 2), generator=generator, device=device).cpu()
    centres_cell = (tissue[chosen] * mask_cell_px + within_px) // cell_px
    limits = torch.tensor(map_cells).clamp(min=1)
    sides = limits.clamp(max=config.side_in(len(tissue) * (mask_cell_px / cell_px) ** 2, largest=side))
    firsts = torch.minimum((centres_cell - sides // 2).clamp(min=0), limits - sides)
    height, width = (int(n) for n in sides)
    return [Box.at(int(top), int(left), height, width) for top, left in firsts]
