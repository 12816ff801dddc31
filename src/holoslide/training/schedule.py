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
    Both rise from near zero over the first `warmup_epochs`.
    """

    epochs: int
    shape: Shape = "step"
    milestones: tuple[float, ...] = PAPER
    gamma: float = 0.1
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise ConfigError("train.schedule", f"is {self.shape}", f"choose {' or '.join(get_args(Shape))}")
        if any(m <= 0 for m in self.milestones) or list(self.milestones) != sorted(self.milestones):
            raise ConfigError(
                "train.milestones",
                f"is {list(self.milestones)}",
                "give rising fractions of the run, or epochs",
            )
        if not 0 < self.gamma <= 1:
            raise ConfigError("train.gamma", f"is {self.gamma}", "give a number above 0 and at most 1")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise ConfigError("train.warmup_epochs", f"is {self.warmup_epochs}", f"give 0 to {self.epochs}")

    def factor(self, step: int, *, steps_per_epoch: int) -> float:
        """What the configured learning rate is multiplied by in optimiser step `step`, counted from 0.

        >>> paper = Schedule(epochs=55)
        >>> [round(paper.factor(epoch, steps_per_epoch=1), 6) for epoch in (24, 25, 35, 45)]
        [1.0, 0.1, 0.01, 0.001]
        """
        warmup = self.warmup_epochs * steps_per_epoch
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if self.shape == "step":
            passed = [m * self.epochs if m < 1 else m for m in self.milestones]
            return rise * self.gamma ** bisect_right(passed, step / steps_per_epoch + _ROUNDING)
        done = max(0.0, step - warmup) / max(1.0, self.epochs * steps_per_epoch - warmup)
        return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
