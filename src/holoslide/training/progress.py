"""What a run tells while it goes on. Nothing is printed here: the command line draws the bars."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from holoslide.training.checkpoint import Position
from holoslide.training.samples import Slides

Phase = Literal["train", "valid"]
_VALID_WORK = 0.25  # of training's, per pixel: a forward pass, of forward, forward again and backward


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What was chosen when a run starts; `epoch` epochs were done before, if it resumes.

    `peak_bytes` is the most that the plan takes on the device (0: no plan was made). `idle` devices are left alone,
    as a step has too few slides.
    """

    device: str
    precision: str
    ranks: int
    epoch: int
    epochs: int
    modules: int
    peak_bytes: int
    idle: int


@dataclass(frozen=True, slots=True)
class SlideDone:
    """One slide: `done` of `total` in this phase of this epoch; losses of the K modules; `eta_s` of the run.

    `epoch` counts from 1.
    `reconstruction` is empty in validation.
    """

    phase: Phase
    epoch: int
    done: int
    total: int
    slide_id: str
    classification: tuple[float, ...]
    reconstruction: tuple[float, ...]
    eta_s: float


class Progress(Protocol):
    """Called in rank 0 alone, from the thread that trains."""

    def started(self, facts: RunFacts) -> None: ...

    def slide_done(self, slide: SlideDone) -> None: ...

    def epoch_done(self, row: dict[str, float], *, is_best: bool) -> None: ...


class Silent:
    """Says nothing."""

    def started(self, facts: RunFacts) -> None:
        """As `Progress`."""

    def slide_done(self, slide: SlideDone) -> None:
        """As `Progress`."""

    def epoch_done(self, row: dict[str, float], *, is_best: bool) -> None:
        """As `Progress`."""


class Reporter:
    """Counts slides and tissue, so that `Progress` hears where the run is and how long it will take."""

    def __init__(self, progress: Progress, slides: Slides, position: Position, *, facts: RunFacts) -> None:
        self._progress, self._slides = progress, slides
        self._epoch = position.epoch
        self._done: dict[Phase, int] = {"train": len(position.losses), "valid": 0}
        per_epoch = sum(slides.train_px) + _VALID_WORK * sum(slides.valid_px)
        so_far = len(position.losses) / len(slides.train) * sum(slides.train_px)
        self._work_left = (facts.epochs - position.epoch) * per_epoch - so_far
        self._work_done = 0.0
        self._started = time.monotonic()
        progress.started(facts)

    def train(self, index: int, losses: tuple[float, ...], reconstruction: tuple[float, ...]) -> None:
        """This rank has trained on a slide."""
        self._count("train", index)
        self._tell("train", self._slides.train[index].slide_id, losses, reconstruction)

    def valid(self, index: int, losses: tuple[float, ...]) -> None:
        """This rank has validated a slide."""
        self._count("valid", index)
        self._tell("valid", self._slides.valid[index].slide_id, losses, ())

    def others(self, phase: Phase, indices: Iterable[int]) -> None:
        """Other ranks are done with these."""
        for index in indices:
            self._count(phase, index)

    def epoch_done(self, row: dict[str, float], *, is_best: bool) -> None:
        """The next epoch begins."""
        self._epoch += 1
        self._done = {"train": 0, "valid": 0}
        self._progress.epoch_done(row, is_best=is_best)

    def _count(self, phase: Phase, index: int) -> None:
        train = phase == "train"
        work = self._slides.train_px[index] if train else _VALID_WORK * self._slides.valid_px[index]
        self._work_done += work
        self._work_left -= work
        self._done[phase] += 1

    def _tell(
        self, phase: Phase, slide_id: str, losses: tuple[float, ...], reconstruction: tuple[float, ...]
    ) -> None:
        elapsed = time.monotonic() - self._started
        self._progress.slide_done(
            SlideDone(
                phase=phase,
                epoch=self._epoch + 1,
                done=self._done[phase],
                total=len(self._slides.train if phase == "train" else self._slides.valid),
                slide_id=slide_id,
                classification=losses,
                reconstruction=reconstruction,
                eta_s=max(0.0, self._work_left) * elapsed / self._work_done,
            )
        )
