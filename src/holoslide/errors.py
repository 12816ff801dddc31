"""Everything that can be wrong with what a user gave, as one tree of exceptions.

Each error is one line: where it is, what is wrong, and what to do about it.
"""


class HoloslideError(Exception):
    """The user's input is at fault: `where: what; remedy`."""

    def __init__(self, where: object, what: str, remedy: str) -> None:
        super().__init__(where, what, remedy)  # all three as args, so that errors survive pickling
        self.where = str(where)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.remedy}"


class SlideError(HoloslideError):
    """A slide or a raster cannot be read, or lacks something that is needed."""


class CohortError(HoloslideError):
    """The slide table contradicts itself or the slides."""


class ConfigError(HoloslideError):
    """A setting is unknown, of the wrong kind, or out of range."""


class ModelError(HoloslideError):
    """A backbone cannot be cut into modules, or its weights do not fit."""


class NotLocal(HoloslideError):  # noqa: N818 - a fact about a layer, named as the method names it
    """A layer sees the whole map, so it cannot be streamed exactly."""


class MemoryPlanError(HoloslideError):
    """The byte budget is too small for the work."""


class CheckpointError(HoloslideError):
    """A checkpoint is missing, damaged, or of another run."""
