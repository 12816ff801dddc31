"""Heads: from a feature map to class logits, in two parts.

The *stem* is a convolution whose kernel is its stride: local to a tile. The *readout* sees the stem's whole,
small map, as the list of those of its cells that vote. Axes: N cells, C channels, L classes, B H W a map's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from holoslide.errors import ConfigError, SlideError
from holoslide.models.pooling import POOLINGS, Pooling, dropout

# arXiv 2207.08267: hidden widths of the auxiliary classifiers and of H, the last.
_AUXILIARY_HIDDEN = 128
_FINAL_HIDDEN = 512
_FINAL_ATTENTION = 128


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """All heads of a model.

    `kernel` is the side of the stem's convolution, in cells; None takes the paper's for the map's depth (see
    `kernel_for`). A head keeps its map's channels, but at most `max_channels`: the paper's networks end in 512,
    and a 5 x 5 convolution from 2,048 channels to as many would alone outweigh the backbone. `dropout` falls on
    the attention weights, in training only.
    """

    pooling: Pooling = "gated"
    kernel: int | None = None
    max_channels: int = 512
    dropout: float = 0.2

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise ConfigError(
                "model.heads.pooling", f"is {self.pooling}", f"choose {', '.join(get_args(Pooling))}"
            )
        if self.kernel is not None and self.kernel < 1:
            raise ConfigError("model.heads.kernel", f"is {self.kernel}", "give 1 or more, or null")
        if self.max_channels < 2:
            raise ConfigError("model.heads.max_channels", f"is {self.max_channels}", "give 2 or more")
        if not 0 <= self.dropout < 1:
            raise ConfigError("model.heads.dropout", f"is {self.dropout}", "give a number from 0 to below 1")


@dataclass(frozen=True, slots=True)
class Explanation:
    """A readout's logits, and what each cell contributed: `evidence_NL.sum(0) + bias_L == logits_L`."""

    logits_L: Tensor
    attention_N: Tensor
    evidence_NL: Tensor
    bias_L: Tensor


def kernel_for(depth: int) -> int:
    """Kernel and stride of a head's stem on a map `depth` times coarser than the backbone's stem.

    On ResNet-34 the paper's: 9 for layer1 and layer2, 7 for layer3, 5 for layer4.

    >>> [kernel_for(depth) for depth in (1, 2, 4, 8)]
    [9, 9, 7, 5]
    """
    if depth <= 2:
        return 9
    return 7 if depth <= 4 else 5


class CellNorm(nn.Module):
    """GroupNorm with as many groups as channels over a map of N cells; defined for one cell, too."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, cells_NC: Tensor) -> Tensor:
        """(N, C) -> (N, C)."""
        variance_C, mean_C = torch.var_mean(cells_NC, dim=0, correction=0)
        return (cells_NC - mean_C) * (torch.rsqrt(variance_C + self.eps) * self.weight) + self.bias


class Readout(nn.Module):
    """Normalise the voting cells, pool them, classify; in the parameters' own precision, also under autocast."""

    def __init__(self, channels: int, classes: int, config: HeadConfig, *, final: bool) -> None:
        super().__init__()
        hidden = _FINAL_HIDDEN if final else _AUXILIARY_HIDDEN
        attention = _FINAL_ATTENTION if final else max(1, channels // 2)
        self.norm = CellNorm(channels)
        self.pooling = POOLINGS[config.pooling](channels, attention)
        self.hidden = nn.Linear(channels, hidden)
        self.output = nn.Linear(hidden, classes)
        self.rate = config.dropout

    def forward(self, cells_NC: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Logits (L,). `generator` draws the dropout; without one there is none."""
        with torch.autocast(cells_NC.device.type, enabled=False):
            values_NC, attention_N = self._attend(cells_NC)
            pooled_C = dropout(attention_N, self.rate, generator) @ values_NC
            logits_L: Tensor = self.output(F.relu(self.hidden(pooled_C)))
            return logits_L

    def explain(self, cells_NC: Tensor) -> Explanation:
        """The logits, the attention, and each cell's exact share of each logit.

        With the pattern of the ReLU before the last layer held fixed, the logits are linear in the pooled
        vector, which is a weighted sum over cells. So the logits are a sum over cells, plus a constant.
        """
        with torch.autocast(cells_NC.device.type, enabled=False):
            values_NC, attention_N = self._attend(cells_NC)
            before_H = self.hidden(attention_N @ values_NC)
            open_LH = self.output.weight * (before_H > 0)
            return Explanation(
                logits_L=self.output(F.relu(before_H)),
                attention_N=attention_N,
                evidence_NL=attention_N[:, None] * (values_NC @ (open_LH @ self.hidden.weight).T),
                bias_L=open_LH @ self.hidden.bias + self.output.bias,
            )

    def _attend(self, cells_NC: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised cells (N, C) and their attention (N,)."""
        if len(cells_NC) == 0:
            raise SlideError("head", "was given no cell to read", "check that the slide has tissue")
        values_NC = F.relu(self.norm(cells_NC.to(self.output.weight.dtype)))
        return values_NC, torch.softmax(self.pooling(values_NC), dim=0)


class Head(nn.Module):
    """Auxiliary classifier of one module, or, if `final`, the classifier whose answer is the prediction."""

    def __init__(
        self, channels: int, classes: int, config: HeadConfig, *, depth: int, final: bool = False
    ) -> None:
        super().__init__()
        kernel = config.kernel or kernel_for(depth)
        width = min(channels, config.max_channels)
        self.stem = nn.Conv2d(channels, width, kernel, stride=kernel, bias=False)
        self.readout = Readout(width, classes, config, final=final)

    def forward(self, features_BCHW: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Logits (L,) of one whole map (B = 1), every cell of it voting; at least one kernel a side."""
        cells_BCHW = self.stem(features_BCHW)
        logits_L: Tensor = self.readout(cells_BCHW[0].flatten(1).T, generator=generator)
        return logits_L
