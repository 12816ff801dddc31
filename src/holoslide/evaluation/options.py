"""What an evaluation is asked for, beside the measures that it always gives."""

from __future__ import annotations

from dataclasses import dataclass

from holoslide.errors import ConfigError


@dataclass(frozen=True, slots=True)
class EvaluateConfig:
    """What an evaluation is asked for, beside the measures that it always gives."""

    sensitivity: float = 0.95
    """Share of the slides of the positive class that a decision must find (two classes only)."""

    def __post_init__(self) -> None:
        if not 0 < self.sensitivity <= 1:
            raise ConfigError(
                "evaluate.sensitivity", f"is {self.sensitivity}", "give more than 0 and at most 1"
            )
