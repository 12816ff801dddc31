"""The slides of a run: looked at before it starts, opened by name, augmented by seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from holoslide.errors import CohortError, HoloslideError, MemoryPlanError, SlideError
from holoslide.geometry import Box
from holoslide.pixels import Pixels
from holoslide.slides.augment import AugmentConfig, Augmented, draw

OpenPixels = Callable[[Path], AbstractContextManager[Pixels]]

NO_SLIDE = "mend what was left out, or give the table another split"

# What a draw is for: the last word of its seed, so that no two streams are one.
_AUGMENT, _STEP, _ORDER = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Sample:
    """A slide with its label, as the number of its class, and its raster.

    `made` is a digest of how the raster was made, and of what; a run goes on with the same alone. Empty: not known.
    """

    slide_id: str
    patient_id: str
    target: int
    raster: Path
    made: str = ""


class Slides:
    """Training and validation slides, and all that is random about them: functions of (seed, epoch, slide)."""

    def __init__(
        self,
        train: Sequence[Sample],
        valid: Sequence[Sample],
        *,
        open_pixels: OpenPixels,
        augment: AugmentConfig,
        seed: int,
    ) -> None:
        _refuse_split(train, valid)
        self.train, self.valid, self.seed, self.augment = train, valid, seed, augment
        self._open_pixels = open_pixels
        self.train_px = [self._tissue_px(sample) for sample in train]
        self.valid_px = [self._tissue_px(sample) for sample in valid]

    def order(self, epoch: int, size: int) -> list[list[int]]:
        """The training slides of an epoch in random order, in groups of `size`; the last takes what is left."""
        rng = np.random.default_rng([self.seed, epoch, 0, _ORDER])
        order = [int(i) for i in rng.permutation(len(self.train))]
        return [order[i : i + size] for i in range(0, len(order), size)]

    def generator(self, epoch: int, index: int) -> torch.Generator:
        """For dropout and patches in the step of one slide."""
        seed = np.random.SeedSequence([self.seed, epoch, index, _STEP]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed))

    @contextmanager
    def open_train(self, epoch: int, index: int) -> Iterator[Pixels]:
        """A training slide as this epoch sees it."""
        rng = np.random.default_rng([self.seed, epoch, index, _AUGMENT])
        with self._open(self.train[index]) as pixels:
            yield Augmented(pixels, draw(self.augment, pixels.shape_px, rng))

    @contextmanager
    def open_valid(self, index: int) -> Iterator[Pixels]:
        """A validation slide as it is."""
        with self._open(self.valid[index]) as pixels:
            yield pixels

    @contextmanager
    def open_largest(self, part: Literal["train", "valid"]) -> Iterator[Pixels]:
        """The slide of a part that has most tissue, as it is."""
        samples, sizes = (self.train, self.train_px) if part == "train" else (self.valid, self.valid_px)
        with self._open(samples[sizes.index(max(sizes))]) as pixels:
            yield pixels

    @contextmanager
    def _open(self, sample: Sample) -> Iterator[Pixels]:
        """A slide: what fails in reading it is its own fault, and whatever fails in running it gets its name."""
        try:
            with ExitStack() as stack:
                with _blaming(sample):
                    pixels = stack.enter_context(self._open_pixels(sample.raster))
                yield _Blamed(pixels, sample)
        except HoloslideError:
            raise
        except Exception as error:  # whatever it is: it goes on as it came, and says which slide it was
            if _is_out_of_memory(error):
                raise MemoryPlanError(
                    sample.slide_id,
                    "does not fit into the memory that is free",
                    "give a smaller memory budget",
                ) from error
            error.add_note(f"holoslide: slide {sample.slide_id} was being run")
            raise

    def _tissue_px(self, sample: Sample) -> int:
        with self._open(sample) as pixels:
            cells = int(np.count_nonzero(pixels.mask))
            if cells == 0:
                raise SlideError(
                    sample.slide_id, "has no tissue", "prepare it anew, or take the slide out of the table"
                )
            return cells * pixels.mask_cell_px**2


class _Blamed:
    """A slide's pixels; where reading fails, a `SlideError` says so."""

    def __init__(self, pixels: Pixels, sample: Sample) -> None:
        self._pixels, self._sample = pixels, sample

    @property
    def shape_px(self) -> tuple[int, int]:
        """As the slide's."""
        return self._pixels.shape_px

    @property
    def mask(self) -> NDArray[np.bool_]:
        """As the slide's."""
        return self._pixels.mask

    @property
    def mask_cell_px(self) -> int:
        """As the slide's."""
        return self._pixels.mask_cell_px

    @property
    def glass(self) -> NDArray[np.uint8]:
        """As the slide's."""
        return self._pixels.glass

    def read(self, box_px: Box) -> NDArray[np.uint8]:
        """As the slide's."""
        with _blaming(self._sample):
            return self._pixels.read(box_px)


@contextmanager
def _blaming(sample: Sample) -> Iterator[None]:
    """Whatever fails inside is the slide's."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise SlideError(
            sample.slide_id,
            f"failed ({line})",
            f"check {sample.raster}, or take the slide out of the table",
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    """A GPU has an error of its own for it; on a CPU only the words tell."""
    said = "can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and said
    )


def _refuse_split(train: Sequence[Sample], valid: Sequence[Sample]) -> None:
    for name, samples in (("train", train), ("valid", valid)):
        if not samples:
            raise CohortError(name, "holds no slide that can be used", NO_SLIDE)
    shared = {s.patient_id for s in train} & {s.patient_id for s in valid}
    if shared:
        raise CohortError(
            min(shared), "is a patient of both train and valid", "put all of a patient in one split"
        )
