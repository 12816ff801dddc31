"""Attention: what weight each cell of a slide gets.

Each of these scores every cell; a softmax over the scores makes weights that sum to one (Ilse et al. 2018,
arXiv 1802.04712). Axes: N cells, C channels.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor, nn

Attending = Literal["gated", "attention", "mean"]


@final
class GatedAttention(nn.Module):
    """score = w . (tanh(V h) * sigmoid(U h)): the paper's."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.value = nn.Linear(channels, hidden)
        self.gate = nn.Linear(channels, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, cells_NC: Tensor) -> Tensor:
        """Scores (N,)."""
        scores_N1: Tensor = self.score(torch.tanh(self.value(cells_NC)) * torch.sigmoid(self.gate(cells_NC)))
        return scores_N1[:, 0]


@final
class Attention(nn.Module):
    """score = w . tanh(V h)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.value = nn.Linear(channels, hidden)
        self.score = nn.Linear(hidden, 1)

    def forward(self, cells_NC: Tensor) -> Tensor:
        """Scores (N,)."""
        scores_N1: Tensor = self.score(torch.tanh(self.value(cells_NC)))
        return scores_N1[:, 0]


@final
class Mean(nn.Module):
    """The same score for every cell."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()

    def forward(self, cells_NC: Tensor) -> Tensor:
        """Scores (N,), all zero."""
        return cells_NC.new_zeros(len(cells_NC))


ATTENTIONS: dict[Attending, type[GatedAttention] | type[Attention] | type[Mean]] = {
    "gated": GatedAttention,
    "attention": Attention,
    "mean": Mean,
}


def dropout(weights_N: Tensor, rate: float, generator: torch.Generator | None) -> Tensor:
    """Drop each weight with probability `rate` and scale up the rest; no generator, no dropout.

    The draw is made where the generator lives, so that it is the same whatever device the weights are on.
    """
    if generator is None or rate == 0:
        return weights_N
    kept_N = torch.rand(len(weights_N), generator=generator, device=generator.device) >= rate
    return weights_N * kept_N.to(weights_N.device, weights_N.dtype, non_blocking=True) / (1 - rate)
