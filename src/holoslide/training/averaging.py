"""An average of the weights over the steps of a run: steadier than the last step's, and often better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The exponential moving average of a model's trained parameters, one update an optimiser step.

    `decay` is what is kept of the average in each step; in the first steps less, so that the weights it started
    from are soon forgotten. With a decay of 0 there is no average, and the model stands for itself.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        named = model.named_parameters() if decay else ()
        self._trained = {name: p for name, p in named if p.requires_grad}
        self._averages = {name: p.detach().clone() for name, p in self._trained.items()}

    @property
    def size_bytes(self) -> int:
        """Of the averages."""
        return sum(average.numel() * average.element_size() for average in self._averages.values())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step `step`, counted from 0."""
        keep = min(self.decay, (1 + step) / (10 + step))
        if self._averages:
            averages, trained = list(self._averages.values()), list[Tensor](self._trained.values())
            torch._foreach_lerp_(averages, trained, 1 - keep)  # one launch on a GPU, not one for each

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Meanwhile the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._trained.items():
            average = self._averages[name]
            own = parameter.clone()
            parameter.copy_(average)
            average.copy_(own)

    def state(self) -> dict[str, Tensor]:
        """The averages by the names of their parameters."""
        return self._averages

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave."""
        for name, average in self._averages.items():
            average.copy_(state[name])
