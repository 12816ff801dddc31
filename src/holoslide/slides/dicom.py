"""DICOM whole-slide images: folders of them, and, by the optional wsidicom, kinds that OpenSlide refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holoslide.errors import SlideError
from holoslide.geometry import Box
from holoslide.slides.facts import (
    DAMAGE,
    DAMAGED,
    EXPORT_RGB,
    ForkLock,
    Mpp,
    make_levels,
    number,
    one_line,
    quiet,
    shown,
    unreadable,
)
from holoslide.slides.source import dicom_series, slide_files


def file_of_folder(folder: Path) -> Path | None:
    """One file of the slide that a folder of DICOM files is; None where it is none.

    SlideError where it holds several slides.
    """
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name[:1] != "." and p.name != "DICOMDIR")
    series = [dicom_series(each) for each in files]
    if not files or None in series:
        return None
    if len(set(series)) > 1:
        what = f"holds {len(set(series))} DICOM series"
        raise SlideError(shown(folder), what, "give one file of the series that is the slide")
    return files[0]


class WsidicomBackend:
    """A DICOM slide by wsidicom, which decodes some kinds of pixels that OpenSlide does not.

    Raises `SlideError`: wsidicom is not installed, or refuses the files too. `refusal` is what OpenSlide said.
    """

    vendor = "dicom"
    pixels = "8-bit RGB"
    orientation = 1

    def __init__(self, path: Path, refusal: str) -> None:
        self._path, self._refusal, self._lock = path, refusal, ForkLock()
        self._slide = self._open()
        base = self._slide.levels[0]
        facts = base.datasets[0]
        if (facts.samples_per_pixel, facts.bits) != (3, 8):
            what = f"has {facts.samples_per_pixel} channels of {facts.bits} bits"
            raise SlideError(shown(path), what, EXPORT_RGB)
        self.levels = make_levels([(level.size.height, level.size.width) for level in self._slide.levels])
        spacing = base.pixel_spacing
        y, x = (number(spacing.height * 1000), number(spacing.width * 1000)) if spacing else (None, None)
        self.mpp = Mpp(y, x, "slide") if y and x else None
        self.objective_power = _power(facts.as_dataset())
        self.bounds_l0 = Box(0, 0, *self.levels[0].shape)
        self.icc_profile = _profile(facts.as_dataset())

    def in_strips(self, level: int) -> bool:
        """No: they are tiled."""
        return False

    def read_level(self, level: int, box: Box) -> NDArray[np.uint8]:
        """See `Backend`."""
        try:
            with self._lock, warnings.catch_warnings(action="ignore"):
                image = self._slide.read_region(
                    (box.left, box.top), self._slide.levels[level].level, (box.width, box.height), threads=1
                )
        except self._errors() as error:
            raise unreadable(self._path, level, box, error) from error
        return np.asarray(image.convert("RGB"))

    def close(self) -> None:
        """Let go of the files."""
        self._slide.close()

    def _open(self) -> Any:
        quiet("wsidicom", "pydicom")
        try:
            from wsidicom import WsiDicom
        except ImportError as error:
            what = f"is DICOM of a kind that OpenSlide does not read ({self._refusal})"
            remedy = "try it with wsidicom: pip install 'holoslide[dicom]'"
            raise SlideError(shown(self._path), what, remedy) from error
        try:
            with warnings.catch_warnings(action="ignore"):  # of values that are longer than they should be
                return WsiDicom.open(slide_files(self._path))
        except self._errors() as error:
            what = f"cannot be opened (OpenSlide: {self._refusal}; wsidicom: {one_line(error)})"
            raise SlideError(shown(self._path), what, DAMAGED) from error

    @staticmethod
    def _errors() -> tuple[type[Exception], ...]:
        from wsidicom import errors

        # WsiDicomError is not the parent of all; AttributeError is pydicom's for what a file lacks.
        own = tuple(e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception))
        return (*DAMAGE, *own, AttributeError)


def _power(dataset: Any) -> float | None:
    powers = (number(path.get("ObjectiveLensPower")) for path in dataset.get("OpticalPathSequence") or ())
    return next((power for power in powers if power is not None), None)


def _profile(dataset: Any) -> bytes | None:
    profiles = (path.get("ICCProfile") for path in dataset.get("OpticalPathSequence") or ())
    return next((bytes(profile) for profile in profiles if profile), None)
