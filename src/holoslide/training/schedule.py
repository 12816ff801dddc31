"""The learning rate over a run: a pure function of the optimiser step, so that resuming needs no state of it."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal, get_args

from holoslide.errors import ConfigError

Shape = Literal["step", "cosine"]
PAPER = (25 / 55, 35 / 55, 45 / 55)
_ROUNDING = 1e-9  # of an epoch: 25 / 55 of 55 epochs is 25 epochs


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the learning rate changes over `epochs`.

    "step" multiplies it by `gamma` at each milestone: a number below 1 is a fraction of the run, from 1 on an
    epoch. The default is the paper's: 25, 35 and 45 of 55 epochs. "cosine" falls to zero along half a wave.
    Both rise from near zero over the first `warmup_epochs`. The backbone stands still for `heads_first`, counted as
    a milestone is.
    """

    epochs: int
    shape: Shape = "step"
    milestones: tuple[float, ...] = PAPER
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    heads_first: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise ConfigError("train.schedule", f"is {self.shape}", f"choose {' or '.join(get_args(Shape))}")
        passed = self._passed()  # a fraction of many epochs may come after an epoch that is a larger number
        if not all(m > 0 for m in passed) or passed != sorted(passed):
            raise ConfigError(
                "train.milestones",
                f"is {list(self.milestones)}, in epochs {', '.join(f'{m:g}' for m in passed)}",
                "give rising fractions of the run, or epochs",
            )
        if not 0 < self.gamma <= 1:
            raise ConfigError("train.gamma", f"is {self.gamma}", "give a number above 0 and at most 1")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ConfigError("train.warmup_epochs", f"is {self.warmup_epochs}", f"give 0 to {self.epochs}")
        if not 0 <= self.heads_first < self.epochs:
            raise ConfigError(
                "train.heads_first", f"is {self.heads_first}", f"give 0 or more, and less than {self.epochs}"
            )

    def factor(self, step: int, *, steps_per_epoch: int) -> float:
        """What the configured learning rate is multiplied by in optimiser step `step`, counted from 0.

        >>> paper = Schedule(epochs=55)
        >>> [round(paper.factor(epoch, steps_per_epoch=1), 6) for epoch in (24, 25, 35, 45)]
        [1.0, 0.1, 0.01, 0.001]
        """
        warmup = self.warmup_epochs * steps_per_epoch
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if self.shape == "step":
            return rise * self.gamma ** bisect_right(self._passed(), step / steps_per_epoch + _ROUNDING)
        done = max(0.0, step - warmup) / max(1.0, self.epochs * steps_per_epoch - warmup)
        return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def backbone_factor(self, step: int, *, steps_per_epoch: int) -> float:
        """What the backbone's rate is multiplied by besides: 0 while heads learn alone, then up to 1 in as long.

        It rises slowly because AdamW's first steps are of full size, whatever the gradient is worth.

        >>> rates = Schedule(epochs=8, heads_first=0.25)
        >>> [rates.backbone_factor(step, steps_per_epoch=2) for step in range(10)]
        [0.0, 0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
        """
        alone = math.ceil((self._epochs(self.heads_first) - _ROUNDING) * steps_per_epoch)
        return min(1.0, max(0, step + 1 - alone) / alone) if alone else 1.0

    def _passed(self) -> list[float]:
        """The milestones in epochs."""
        return [self._epochs(m) for m in self.milestones]

    def _epochs(self, length: float) -> float:
        """Below 1 a fraction of the run, from 1 on epochs."""
        return length * self.epochs if length < 1 else length
