"""What is known of an open slide file, the same for every format: levels, microns per pixel, and how to say so."""

from __future__ import annotations

import logging
import math
import os
import threading
import weakref
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import error as StructError
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from holoslide.errors import SlideError
from holoslide.geometry import Box

GLASS = (243, 243, 243)  # what a slide is taken to show where it has no pixels: bare glass under a white lamp
CACHE_BYTES = 2**26  # decoded tiles or strips kept per open slide
PLAUSIBLE_UM = (0.05, 50.0)  # resolution tags outside are printers' and screens' (72 dpi is 353 um)
EXPORT_RGB = "holoslide reads one plane of 8-bit RGB (brightfield): export it so"
DAMAGED = "the file is damaged or cut short: copy or export it again"
# What tifffile, Pillow and their codecs raise on damaged files; the codecs' own errors are RuntimeErrors.
DAMAGE = (OSError, ValueError, RuntimeError, LookupError, ArithmeticError, TypeError, SyntaxError, StructError,
          zlib.error)  # fmt: skip

_UNITS_UM = {2: 25_400.0, 3: 10_000.0, "inch": 25_400.0, "centimeter": 10_000.0}

MppSource = Literal["user", "slide", "resolution tags", "objective power"]


@dataclass(frozen=True, slots=True)
class Mpp:
    """Micrometres per pixel of level 0, each axis for itself, and where they are from."""

    y: float
    x: float
    source: MppSource

    def __str__(self) -> str:
        """As it is read: 0.25 (from: slide), or both sides."""
        sides = f"{self.x:g}" if self.x == self.y else f"{self.x:g} wide, {self.y:g} high"
        return f"{sides} (from: {self.source})"


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution of a slide; pixel (y, x) covers level-0 rows from y * downsample_y, columns likewise."""

    height: int
    width: int
    downsample_y: float
    downsample_x: float

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width


class Backend(Protocol):
    """An open slide file."""

    vendor: str
    pixels: str  # what is stored, in words: "8-bit RGB"
    levels: tuple[Level, ...]
    mpp: Mpp | None
    objective_power: float | None
    bounds_l0: Box
    icc_profile: bytes | None
    orientation: int  # as `orientation_of`: pixels are as they are stored, whatever it is

    def in_strips(self, level: int) -> bool:
        """Whether reading a few columns costs as much as reading whole rows."""
        ...

    def read_level(self, level: int, box: Box) -> NDArray[np.uint8]:
        """RGB (h, w, 3) of a box that lies inside the level, whatever was read before; SlideError if it cannot."""
        ...

    def close(self) -> None: ...


def orientation_of(value: object) -> int:
    """How a picture is to be turned for show, as TIFF and EXIF number it from 1, upright, to 8."""
    return int(value) if isinstance(value, int) and 1 <= value <= 8 else 1


class ForkLock:
    """A lock that a forked child finds open, even where another thread of its parent held it.

    For the same reason nothing that reads slides calls OpenCV: its thread pool has such a lock too, and now and
    then a child that calls cv2.reduce or cv2.cvtColor after a fork waits for it for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        itself = weakref.ref(self)

        def renew() -> None:
            lock = itself()
            if lock is not None:
                lock._lock = threading.Lock()

        os.register_at_fork(after_in_child=renew)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def shown(path: Path) -> str:
    """A path on one line, for messages, whatever is in its name."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def over_glass(rgba: NDArray[np.uint8], *, premultiplied: bool = False) -> NDArray[np.uint8]:
    """RGBA (h, w, 4) laid over glass, as RGB (h, w, 3)."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    colour = rgba[..., :3] * (np.float32(1) if premultiplied else alpha)
    mixed = colour + (1 - alpha) * np.array(GLASS, np.float32)
    return np.rint(np.minimum(mixed, 255)).astype(np.uint8)


def make_levels(
    shapes: Sequence[tuple[int, int]], ratios: Sequence[float] | None = None
) -> tuple[Level, ...]:
    """Levels with their true downsampling, finest first.

    A level of 11499 columns under one of 45999 was made by halving twice, which drops the odd pixels: it is
    downsampled by 4, not by 45999 / 11499. Where no whole number explains both sides, it is `ratios`, or the
    ratio of the sides.
    """
    height, width = shapes[0]
    levels = []
    for level, (h, w) in enumerate(shapes):
        down_y, down_x = (ratios[level],) * 2 if ratios else (height / h, width / w)
        whole = max(1, round(math.sqrt(height / h * width / w)))
        if abs(h * whole - height) < whole and abs(w * whole - width) < whole:
            down_y = down_x = float(whole)
        levels.append(Level(h, w, down_y, down_x))
    return tuple(levels)


def number(text: object) -> float | None:
    """A finite positive number, or None."""
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def mpp_from_resolution(y: float | None, x: float | None, unit: object) -> Mpp | None:
    """Micrometres per pixel from TIFF resolution tags (pixels per unit), where they can be a slide's.

    >>> mpp_from_resolution(28.35, 28.35, "centimeter") is None  # 72 dpi, a screen
    True
    """
    unit_um = _UNITS_UM.get(unit) if isinstance(unit, int | str) else None
    if unit_um is None or not x or not y:
        return None
    low, high = PLAUSIBLE_UM
    mpp = Mpp(unit_um / y, unit_um / x, "resolution tags")
    return mpp if low <= mpp.y <= high and low <= mpp.x <= high else None


def mpp_from_properties(properties: Mapping[str, str]) -> Mpp | None:
    """Micrometres per pixel from OpenSlide's properties: its own, else the resolution tags."""
    y, x = number(properties.get("openslide.mpp-y")), number(properties.get("openslide.mpp-x"))
    if y and x:
        return Mpp(y, x, "slide")
    return mpp_from_resolution(
        number(properties.get("tiff.YResolution")),
        number(properties.get("tiff.XResolution")),
        properties.get("tiff.ResolutionUnit"),
    )


def bounds_from_properties(properties: Mapping[str, str], shape: tuple[int, int]) -> Box:
    """The part of level 0 that was scanned, where the slide says so; else all of it."""
    keys = ("y", "x", "height", "width")
    values = [properties.get(f"openslide.bounds-{key}") for key in keys]
    whole = Box(0, 0, *shape)
    if not all(value is not None and value.isdecimal() for value in values):
        return whole
    top, left, height, width = (int(value or 0) for value in values)
    scanned = Box.at(top, left, height, width).intersect(whole)
    return scanned if scanned.area else whole


def one_line(error: object) -> str:
    """Another library's message, fit to stand inside one of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)[:200]


def quiet(*libraries: str) -> None:
    """Let libraries not print what they then raise, unless the program that uses us logs by itself."""
    for name in libraries:
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())


def unreadable(path: Path, level: int, box: Box, error: Exception) -> SlideError:
    """The error for pixels that are there by the file's own account, and are not."""
    where = f"at y {box.top}-{box.bottom}, x {box.left}-{box.right} of level {level}"
    return SlideError(shown(path), f"pixels cannot be read {where} ({one_line(error)})", DAMAGED)
