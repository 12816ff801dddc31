"""The settings of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from holoslide.errors import ConfigError
from holoslide.training.history import Monitor
from holoslide.training.parallel import Accelerator, Precision
from holoslide.training.schedule import PAPER, Schedule, Shape

ClassWeights = Literal["none", "balanced"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run goes; the defaults are the paper's.

    All slides are seen `epochs` times, in an order that `seed` draws with all else that is random. `lr` is the
    heads' and decoders', the backbone's is `backbone_lr_ratio` of it; `schedule` ("step" or "cosine"),
    `milestones`, `gamma` and `warmup_epochs` say how it changes, see `Schedule`. `weight_decay` is AdamW's.
    `accumulate` slides make one optimiser step. `average` above 0 validates and keeps a moving average of the
    weights, of which each step leaves that much (say 0.98), instead of the last step's. `class_weights` "balanced"
    makes rare classes count as much as common ones. `precision` "auto" computes in bf16 where the device has it.

    Training stops after `patience` epochs without a better one by `monitor` (0: never). Every `log_every` steps go
    to the log, and a checkpoint is written after each epoch and, within long ones, every `checkpoint_minutes` (0:
    after every step). A run takes `devices` of the kind `accelerator` on each of `nodes` machines.
    """

    epochs: int = 55
    lr: float = 2e-5
    backbone_lr_ratio: float = 0.5
    weight_decay: float = 1e-2
    schedule: Shape = "step"
    milestones: tuple[float, ...] = PAPER
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    accumulate: int = 8
    average: float = 0.0
    class_weights: ClassWeights = "none"
    seed: int = 0
    precision: Precision = "auto"
    patience: int = 0
    monitor: Monitor = "auroc"
    accelerator: Accelerator = "auto"
    devices: int | Literal["auto"] = "auto"
    nodes: int = 1
    log_every: int = 1
    checkpoint_minutes: float = 10.0

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not (value == "auto" and name == "devices") and not value >= least:
                raise ConfigError(f"train.{name}", f"is {value}", f"give {least} or more")
        for name in ("lr", "backbone_lr_ratio"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ConfigError(f"train.{name}", f"is {getattr(self, name)}", "give a number above 0")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(
                    f"train.{name}", f"is {getattr(self, name)}", f"choose {', '.join(get_args(choices))}"
                )
        if not 0 <= self.average < 1:
            raise ConfigError("train.average", f"is {self.average}", "give 0 or more, and less than 1")
        self.rates()  # checks its own part

    def rates(self) -> Schedule:
        """The learning rate over the run."""
        return Schedule(
            epochs=self.epochs,
            shape=self.schedule,
            milestones=self.milestones,
            gamma=self.gamma,
            warmup_epochs=self.warmup_epochs,
        )


_LEAST = {
    "epochs": 1, "weight_decay": 0, "accumulate": 1, "seed": 0, "patience": 0, "devices": 1, "nodes": 1,
    "log_every": 1, "checkpoint_minutes": 0,
}  # fmt: skip
_CHOICES = {
    "schedule": Shape, "class_weights": ClassWeights, "precision": Precision, "monitor": Monitor,
    "accelerator": Accelerator,
}  # fmt: skip
