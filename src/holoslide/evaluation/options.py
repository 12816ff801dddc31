"""What an evaluation is asked for, beside the measures that it always gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from holoslide.errors import ConfigError

_WHERE = "evaluate.positive"


@dataclass(frozen=True, slots=True)
class EvaluateConfig:
    """What an evaluation is asked for, beside the measures that it always gives."""

    sensitivity: float = 0.95
    """Share of the slides of the positive class that a decision must find (two classes only)."""
    positive: str | int | None = None
    """The class that a decision finds, and that AUROC, AUPRC and calibration are of (two classes only), such as
    tumour; left out, the last by name."""

    def __post_init__(self) -> None:
        if not 0 < self.sensitivity <= 1:
            raise ConfigError(
                "evaluate.sensitivity", f"is {self.sensitivity}", "give more than 0 and at most 1"
            )
        if self.positive is not None:  # YAML takes the class 1 for a number
            object.__setattr__(self, "positive", str(self.positive))


@dataclass(frozen=True, slots=True)
class Positive:
    """The positive one of two classes, and whether it was asked for or is the last by name."""

    name: str
    is_chosen: bool

    @classmethod
    def of(cls, classes: Sequence[str], asked: str | int | None) -> Positive | None:
        """None of other than two classes; `ConfigError` if one was asked for all the same, or is no class."""
        if asked is None:
            return cls(classes[-1], is_chosen=False) if len(classes) == 2 else None
        if str(asked) not in classes:
            raise ConfigError(_WHERE, f"{str(asked)!r} is no class", f"choose one of {', '.join(classes)}")
        if len(classes) != 2:
            what = f"is {str(asked)!r}, but there are {len(classes)} classes ({', '.join(classes)})"
            raise ConfigError(_WHERE, what, "leave it out: each class is measured against the rest")
        return cls(str(asked), is_chosen=True)

    @property
    def how(self) -> str:
        """How it came to be the positive one."""
        return "chosen by evaluate.positive" if self.is_chosen else "the last by name"

    def to_dict(self) -> dict[str, str]:
        """Plain values, ready for JSON."""
        return {"class": self.name, "how": self.how}
