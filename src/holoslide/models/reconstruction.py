"""Random feature reconstruction (RFR): a module must be able to give back its input at random places.

It keeps early modules from throwing away what later ones need (arXiv 2207.08267). Axes: B patches, C channels,
H W cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from holoslide.errors import ConfigError, SlideError
from holoslide.geometry import Box

_FIRST_SIDE = 128  # cells, in maps as fine as the backbone's stem's


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """The second local loss: a module's input, made again from its output (RFR)."""

    alpha: float = 1.0
    """Weighs the loss, a mean absolute difference; 0: none, and no decoders."""
    patches: int = 10
    """How many are drawn of each slide in each module."""
    side: int | None = None
    """Of a patch, in cells of the module's output; null takes the paper's for the map's depth: 128 in layer1,
    64 in layer2, 32 in layer3."""

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise ConfigError("model.reconstruction.alpha", f"is {self.alpha}", "give 0 or more")
        if self.patches < 2:  # of a map of one cell, a single patch has no variance to normalise by
            raise ConfigError("model.reconstruction.patches", f"is {self.patches}", "give 2 or more")
        if self.side is not None and self.side < 1:
            raise ConfigError("model.reconstruction.side", f"is {self.side}", "give 1 or more, or null")


def side_for(depth: int) -> int:
    """Patch side, in cells, in a map `depth` times coarser than the backbone's stem's.

    >>> [side_for(depth) for depth in (1, 2, 4, 8)]
    [128, 64, 32, 16]
    """
    return max(1, _FIRST_SIDE // depth)


class Decoder(nn.Module):
    """Patches of a module's output -> the same places of its input.

    Conv 3x3 -> BatchNorm -> ReLU -> conv 3x3, both to the input's channels. BatchNorm normalises by the
    patches of one slide, in evaluation too: it keeps no running statistics. `side` is the patches'.
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
        fine_BCHW = F.interpolate(patches_BCHW, scale_factor=scale, mode="bilinear", align_corners=True)
        rebuilt_BCHW: Tensor = self.layers(fine_BCHW)
        return rebuilt_BCHW

    def loss(self, patches_BCHW: Tensor, target_BCHW: Tensor, *, scale: int) -> Tensor:
        """The mean absolute difference between what `forward` gives and what was there."""
        rebuilt_BCHW = self(patches_BCHW, scale=scale)
        return F.l1_loss(rebuilt_BCHW, target_BCHW.to(rebuilt_BCHW.dtype))


def draw_patches(
    mask: NDArray[np.bool_],
    *,
    mask_cell_px: int,
    cell_px: int,
    map_cells: tuple[int, int],
    side: int,
    count: int,
    generator: torch.Generator,
) -> list[Box]:
    """Boxes of `side` cells of a feature map, around random points of the tissue, and inside the map.

    `mask` (h, w) tells which squares of `mask_cell_px` raster pixels hold tissue, the first at pixel (0, 0);
    a cell of the map stands for `cell_px` pixels a side. A map smaller than a patch makes the patch smaller,
    on that axis alone (the paper's code crashes there). All boxes have one shape.
    """
    tissue = torch.from_numpy(np.argwhere(mask))
    if len(tissue) == 0:
        raise SlideError("reconstruction", "the tissue mask is empty", "take the slide out of the table")
    device = generator.device
    chosen = torch.randint(len(tissue), (count,), generator=generator, device=device).cpu()
    within_px = torch.randint(mask_cell_px, (count, 2), generator=generator, device=device).cpu()
    centres_cell = (tissue[chosen] * mask_cell_px + within_px) // cell_px
    limits = torch.tensor(map_cells).clamp(min=1)
    sides = limits.clamp(max=side)
    firsts = torch.minimum((centres_cell - sides // 2).clamp(min=0), limits - sides)
    height, width = (int(n) for n in sides)
    return [Box.at(int(top), int(left), height, width) for top, left in firsts]
