"""Heads: from a feature map to class logits, in two parts.

The *stem* is a convolution whose kernel is its stride: local to a tile. The *readout* sees the stem's whole,
small map, as the list of those of its cells that vote. Axes: N cells, C channels, L classes, B H W a map's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from holoslide.errors import ConfigError
from holoslide.models.cells import CellConv2d
from holoslide.models.options import HeadConfig
from holoslide.models.pooling import ATTENTIONS
from holoslide.models.readout import CellReadout, Readout, VectorReadout

# arXiv 2207.08267: hidden widths of the auxiliary classifiers and of H, the last.
_AUXILIARY_HIDDEN = 128
_FINAL_HIDDEN = 512
_FINAL_ATTENTION = 128
_MOST_WEIGHTS = 2**30  # of one stem: 4 GiB, fifty times a ResNet-34, and as much again three times to train


def kernel_for(depth: int) -> int:
    """Kernel and stride of a head's stem on a map `depth` times coarser than the backbone's stem.

    On ResNet-34 the paper's: 9 for layer1 and layer2, 7 for layer3, 5 for layer4.

    >>> [kernel_for(depth) for depth in (1, 2, 4, 8)]
    [9, 9, 7, 5]
    """
    if depth <= 2:
        return 9
    return 7 if depth <= 4 else 5


class StandardConv(CellConv2d):
    """A convolution of its input less its mean, by its standard deviation: channels' values over a cohort.

    Without this, features behind a ReLU, whose means are far from 0, hardly train a convolution that no norm
    follows: each step moves all cells alike.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, in_channels: int, out_channels: int, side: int) -> None:
        super().__init__(in_channels, out_channels, side)
        self.register_buffer("mean", torch.zeros(in_channels, 1, 1))
        self.register_buffer("scale", torch.ones(in_channels, 1, 1))

    @property
    def is_measured(self) -> bool:
        """Whether it has the statistics of a cohort."""
        return bool(self.mean.any() or (self.scale != 1).any())

    def measure(self, features_BCHW: Tensor) -> None:
        """Take mean and standard deviation from features of the cohort."""
        variance_C, mean_C = torch.var_mean(features_BCHW, dim=(0, 2, 3))
        self.mean.copy_(mean_C[:, None, None])
        self.scale.copy_(torch.rsqrt(variance_C + 1e-5)[:, None, None])

    def forward(self, features_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', h, w)."""
        return super().forward((features_BCHW - self.mean) * self.scale)


class Head(nn.Module):
    """Auxiliary classifier of one module, or, if `final`, the classifier whose answer is the prediction."""

    def __init__(
        self, channels: int, classes: int, config: HeadConfig, *, depth: int, last_depth: int | None = None
    ) -> None:
        """A head of a map `depth` times coarser than the backbone's stem; the last map is so `last_depth` times,
        and where none is given, this is the last.
        """
        super().__init__()
        kernel = config.kernel * ((last_depth or depth) // depth) if config.kernel else kernel_for(depth)
        final = last_depth is None
        width = min(channels, config.max_channels)
        if (weights := channels * width * kernel**2) > _MOST_WEIGHTS:
            what = f"makes a head of {weights:.2g} weights, whose cells have {kernel} cells of the map a side"
            raise ConfigError("model.heads.kernel", what, "give less")
        stem = StandardConv if config.norm == "cohort" else CellConv2d
        self.stem = stem(channels, width, kernel)
        self.readout = _readout(width, classes, config, final=final)

    def forward(self, features_BCHW: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Logits (L,) of one whole map (B = 1), every cell of it voting; at least one kernel a side."""
        cells_BCHW = self.stem(features_BCHW)
        logits_L: Tensor = self.readout(cells_BCHW[0].flatten(1).T, generator=generator)
        return logits_L


def _readout(width: int, classes: int, config: HeadConfig, *, final: bool) -> Readout:
    hidden = _FINAL_HIDDEN if final else _AUXILIARY_HIDDEN
    if config.pooling == "auto":
        return CellReadout(width, classes, norm=config.norm, hidden=hidden, rate=config.dropout)
    attention = ATTENTIONS[config.pooling](width, _FINAL_ATTENTION if final else max(1, width // 2))
    return VectorReadout(width, classes, attention, norm=config.norm, hidden=hidden, rate=config.dropout)
