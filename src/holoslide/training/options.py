"""The settings of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from holoslide.errors import ConfigError
from holoslide.models.options import Precision
from holoslide.training.schedule import PAPER, Schedule, Shape

Monitor = Literal["auroc", "loss"]
Accelerator = Literal["auto", "cpu", "cuda"]
ClassWeights = Literal["none", "balanced"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a run goes; the defaults were chosen on real tissue, the paper's are the preset `paper`."""

    epochs: int = 12
    """How often each training slide is seen."""
    lr: float = 2e-4
    """Learning rate of the heads and decoders."""
    backbone_lr_ratio: float = 0.1
    """The backbone's learning rate is this share of `lr`."""
    heads_first: float = 0.25
    """So long heads and decoders learn alone, and over as long again the backbone's rate rises; below 1 a
    fraction of the run, from 1 on epochs. A head that knows nothing yet sends noise down, and AdamW makes full
    steps of it: a pretrained backbone is worn down before any head can use it (Kumar et al. 2022, arXiv
    2202.10054). An epoch of heads alone costs half."""
    weight_decay: float = 1e-2
    """Of AdamW."""
    schedule: Shape = "cosine"
    """`step` multiplies the rate by `gamma` at each milestone, `cosine` lets it fall to zero along half a
    wave."""
    milestones: tuple[float, ...] = PAPER
    """Of `step`: a number below 1 is a fraction of the run, from 1 on an epoch. The default is the paper's,
    25, 35 and 45 of 55 epochs."""
    gamma: float = 0.1
    """Of `step`: what a milestone multiplies the rate by."""
    warmup_epochs: float = 0.0
    """Over these first epochs the rate rises from near zero."""
    accumulate: int = 1
    """So many slides make one optimiser step. Several devices share them, so there are at least as many."""
    average: float = 0.98
    """Above 0, a moving average of the weights is validated and kept instead of the last step's; so much of it is
    left in each step, as 0.98."""
    class_weights: ClassWeights = "none"
    """`balanced` weighs a slide's loss by how rare its class is."""
    seed: int = 0
    """Of weights, order, augmentation and dropout."""
    precision: Precision = "auto"
    """`auto` computes in bf16 where the device has it."""
    patience: int = 0
    """Stop after so many epochs without a better one; 0: never."""
    monitor: Monitor = "auroc"
    """What of the validation part makes an epoch the better one."""
    accelerator: Accelerator = "auto"
    """`auto` takes a CUDA device if there is one."""
    devices: int | Literal["auto"] = "auto"
    """How many of a machine's devices to use, each on slides of its own; `auto` is all, or as many as a step has
    slides (`accumulate`) if those are fewer."""
    nodes: int = 1
    """How many machines work together."""
    log_every: int = 1
    """Optimiser steps between two lines of the log."""
    checkpoint_minutes: float = 10.0
    """A checkpoint is written after each epoch and, within long ones, so often; 0: after every step."""

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
        if self.seed >= 2**63:
            raise ConfigError("train.seed", f"is {self.seed}", "give a number below 2**63")
        self.rates()  # checks its own part

    def rates(self) -> Schedule:
        """The learning rate over the run."""
        return Schedule(
            epochs=self.epochs,
            shape=self.schedule,
            milestones=self.milestones,
            gamma=self.gamma,
            warmup_epochs=self.warmup_epochs,
            heads_first=self.heads_first,
        )


_LEAST = {
    "epochs": 1, "weight_decay": 0, "accumulate": 1, "seed": 0, "patience": 0, "devices": 1, "nodes": 1,
    "log_every": 1, "checkpoint_minutes": 0,
}  # fmt: skip
_CHOICES = {
    "schedule": Shape, "class_weights": ClassWeights, "precision": Precision, "monitor": Monitor,
    "accelerator": Accelerator,
}  # fmt: skip
