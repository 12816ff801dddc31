"""Heads: from a feature map to class logits, in two parts.

The *stem* is a convolution whose kernel is its stride: local to a tile. The *readout* sees the stem's whole,
small map, as the list of those of its cells that vote. Axes: N cells, C channels, L classes, B H W a map's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from holoslide.errors import ConfigError
from holoslide.models.pooling import ATTENTIONS, Pooling
from holoslide.models.readout import CellReadout, Norm, Readout, VectorReadout

# arXiv 2207.08267: hidden widths of the auxiliary classifiers and of H, the last.
_AUXILIARY_HIDDEN = 128
_FINAL_HIDDEN = 512
_FINAL_ATTENTION = 128


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """All heads of a model."""

    pooling: Pooling = "gated"
    """How cells become one answer. `gated` (the paper's) and `attention`: the cells are pooled to one vector by
    learned weights, which is classified; `mean`: by equal weights. `auto`: each cell is classified, and each
    class's logits are pooled by a softmax over them; a small lesion teaches from the first step."""
    norm: Norm = "slide"
    """`slide` is the paper's GroupNorm over all cells of a slide. It lets each cell know of all others, so
    that evidence may stand beside what it is about. With `cohort` the stem's input is normalised by
    statistics measured once on the training slides, and a cell speaks for what it sees alone."""
    kernel: int | None = None
    """Side of the last head's stem, in cells of the last map. The earlier heads' are larger by as much as their
    maps are finer, so that the cells of all heads are the same squares of tissue. null takes the paper's for
    each map's depth: 9, 9, 7, 5 in layer1 to layer4 of a ResNet."""
    max_channels: int = 512
    """A head keeps its map's channels, but at most so many: the paper's networks end in 512, and a 5 x 5
    convolution from 2,048 channels to as many would alone outweigh the backbone."""
    dropout: float = 0.2
    """Falls on the attention weights, in training only."""

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise ConfigError(
                "model.heads.pooling", f"is {self.pooling}", f"choose {', '.join(get_args(Pooling))}"
            )
        if self.norm not in get_args(Norm):
            raise ConfigError("model.heads.norm", f"is {self.norm}", f"choose {', '.join(get_args(Norm))}")
        if self.kernel is not None and self.kernel < 1:
            raise ConfigError("model.heads.kernel", f"is {self.kernel}", "give 1 or more, or null")
        if self.max_channels < 2:
            raise ConfigError("model.heads.max_channels", f"is {self.max_channels}", "give 2 or more")
        if not 0 <= self.dropout < 1:
            raise ConfigError("model.heads.dropout", f"is {self.dropout}", "give a number from 0 to below 1")


def kernel_for(depth: int) -> int:
    """Kernel and stride of a head's stem on a map `depth` times coarser than the backbone's stem.

    On ResNet-34 the paper's: 9 for layer1 and layer2, 7 for layer3, 5 for layer4.

    >>> [kernel_for(depth) for depth in (1, 2, 4, 8)]
    [9, 9, 7, 5]
    """
    if depth <= 2:
        return 9
    return 7 if depth <= 4 else 5


class StandardConv(nn.Conv2d):
    """A convolution of its input less its mean, by its standard deviation: channels' values over a cohort.

    Without this, features behind a ReLU, whose means are far from 0, hardly train a convolution that no norm
    follows: each step moves all cells alike.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, in_channels: int, *args: Any, **options: Any) -> None:
        super().__init__(in_channels, *args, **options)
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
        stem = StandardConv if config.norm == "cohort" else nn.Conv2d
        self.stem = stem(channels, width, kernel, stride=kernel, bias=False)
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
