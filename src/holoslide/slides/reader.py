"""Slides as rasters: the pixels of any box at any resolution, from any file that `backends.py` can open.

Formats, and which were tried on real files: see `backends.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holoslide.errors import SlideError
from holoslide.geometry import Box
from holoslide.slides.backends import open_backend
from holoslide.slides.colour import ToSrgb
from holoslide.slides.facts import GLASS, Level, Mpp, shown
from holoslide.slides.ordered import in_order
from holoslide.slides.source import stamp_of

__all__ = ["GLASS", "Level", "Mpp", "Reader", "area_average", "open_slide"]

CHUNK_PX = 2**20  # slide pixels (or raster pixels, if those are more) that are held at a time
MAX_FACTOR = 1024  # slide pixels per raster pixel, each way; more would not be held in a chunk
EXACT_STEP = 256  # sides of a block whose rows add up in 16 bits, and whose sum float32 holds exactly
LEVEL_TOLERANCE = 1.01  # a level this much too coarse still serves: 4.00 for 3.98


def open_slide(
    path: str | Path,
    *,
    mpp: float | None = None,
    fallback_mpp: float | None = None,
    icc: bool = False,
    threads: int = 1,
) -> Reader:
    """Open a slide of any known format.

    `mpp` (um per pixel of level 0) goes before what the file says, `fallback_mpp` counts where it says nothing.
    `icc`: colours as the slide's own profile means them, in sRGB, if it has one; else as they are stored.
    `threads` read a box at a time, whose pixels are the same for any number. SlideError, in one line, for what is
    missing, no slide, damaged, or not one plane of 8-bit RGB.
    """
    return Reader(Path(path), mpp, fallback_mpp=fallback_mpp, icc=icc, threads=threads)


class Reader:
    """An open slide. Safe to share between threads, to send to worker processes, and to use after a fork.

    `levels` are finest first; `mpp` is None where nobody knows, `stated_mpp` what the file itself says of it;
    `bounds_l0` is the part that was scanned. `orientation` is TIFF's or EXIF's, which pixels and places do not
    follow, as they do not in OpenSlide and tifffile.
    `icc_profile` names the colour profile that is applied. `on_part` is called with each part that was read,
    in the thread that asked for it.
    """

    def __init__(
        self,
        path: Path,
        mpp: float | None = None,
        *,
        fallback_mpp: float | None = None,
        icc: bool = False,
        threads: int = 1,
    ) -> None:
        for value in (mpp, fallback_mpp):
            if value is not None and not (math.isfinite(value) and value > 0):
                what = f"{value} um per pixel cannot be"
                raise SlideError(shown(path), what, "give a positive number, such as 0.25")
        self.path, self._closed = path, False
        self._user_mpp, self._fallback_mpp, self._icc = mpp, fallback_mpp, icc
        self.threads = threads
        self.on_part: Callable[[], None] = lambda: None
        self._backend = open_backend(path)
        self.vendor = self._backend.vendor
        self.levels = self._backend.levels
        self.shape_l0 = self.levels[0].shape
        self.bounds_l0 = self._backend.bounds_l0
        self.objective_power = self._backend.objective_power
        self.stated_mpp = self._backend.mpp
        self.orientation = self._backend.orientation
        self.mpp = self._find_mpp()
        profile = self._backend.icc_profile
        self._to_srgb = ToSrgb(path, profile) if icc and profile is not None else None
        self.icc_profile = None if self._to_srgb is None else self._to_srgb.name

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        more = {
            "mpp": self._user_mpp,
            "fallback_mpp": self._fallback_mpp,
            "icc": self._icc,
            "threads": self.threads,
        }
        return partial(open_slide, **more), (self.path,)  # type: ignore[arg-type]

    def close(self) -> None:
        """Let go of the file; reading is a ValueError from then on, as it is of any closed file."""
        self._closed = True
        self._backend.close()

    def require_mpp(self) -> Mpp:
        """The slide's microns per pixel, or SlideError with the ways to give it."""
        if self.mpp is None:
            what = "no microns per pixel: the file does not tell its resolution"
            raise SlideError(
                shown(self.path), what, "give it with --slide-mpp, or in the slide table's `mpp` column"
            )
        return self.mpp

    def shape_px(self, mpp: float) -> tuple[int, int]:
        """(height, width) of the raster that covers the whole slide at `mpp`."""
        factor_y, factor_x = self._factors(mpp)
        height, width = self.shape_l0
        return max(1, math.ceil(height / factor_y - 1e-6)), max(1, math.ceil(width / factor_x - 1e-6))

    def read(
        self, box_px: Box, mpp: float, origin_l0: tuple[int, int] = (0, 0), *, threads: int | None = None
    ) -> NDArray[np.uint8]:
        """RGB (h, w, 3) of a box of the raster that has `mpp` um per pixel and begins at pixel `origin_l0`.

        Each pixel is the average over its area, fractions of slide pixels counted as such, from the nearest
        finer level; it is the same whatever box it is read with. Beyond the slide is glass. Besides the
        result, memory is bounded, for each of `threads` (default: the reader's). SlideError where the slide's mpp
        is unknown or pixels cannot be read.
        """
        if self._closed:
            message = f"{shown(self.path)}: read after it was closed"
            raise ValueError(message)
        factors = self._factors(mpp)
        number = self._level_for(factors)
        level = self.levels[number]
        fetch = partial(self._fetch, number)
        steps = (factors[0] / level.downsample_y, factors[1] / level.downsample_x)
        out = np.empty((*box_px.shape, 3), np.uint8)

        def average(part: Box) -> None:
            rows, columns = np.arange(part.top, part.bottom + 1), np.arange(part.left, part.right + 1)
            y = (origin_l0[0] + rows * factors[0]) / level.downsample_y
            x = (origin_l0[1] + columns * factors[1]) / level.downsample_x
            out[part.relative_to(box_px).slices] = area_average(fetch, level.shape, y, x)

        parts = _parts(box_px, steps, in_strips=self._backend.in_strips(number))
        for _ in in_order(average, parts, threads=threads or self.threads):
            self.on_part()
        return out

    def thumbnail(self, mpp: float) -> NDArray[np.uint8]:
        """The whole slide at `mpp`, RGB (h, w, 3)."""
        return self.read(Box.at(0, 0, *self.shape_px(mpp)), mpp)

    def facts(self) -> dict[str, Any]:
        """What is known of the slide, ready for JSON; sides in level-0 pixels unless a level is named."""
        bounds = self.bounds_l0
        mpp = self.mpp and {"y": self.mpp.y, "x": self.mpp.x, "source": self.mpp.source}
        return {
            "path": str(self.path),
            "vendor": self.vendor,
            "pixels": self._backend.pixels,
            "height": self.shape_l0[0],
            "width": self.shape_l0[1],
            "levels": [
                {"height": v.height, "width": v.width, "downsample": [v.downsample_y, v.downsample_x]}
                for v in self.levels
            ],
            "mpp": mpp,
            "objective_power": self.objective_power,
            "colour_profile": self._backend.icc_profile is not None,
            "orientation": self.orientation,
            "bounds": {
                "top": bounds.top,
                "left": bounds.left,
                "height": bounds.height,
                "width": bounds.width,
            },
            "file_bytes": sum(size for _, size, _ in stamp_of(self.path).files),
        }

    def _find_mpp(self) -> Mpp | None:
        if self._user_mpp is not None:
            return Mpp(self._user_mpp, self._user_mpp, "user")
        if self._backend.mpp is None and self.objective_power is not None:
            return Mpp(10 / self.objective_power, 10 / self.objective_power, "objective power")
        if self._backend.mpp is None and self._fallback_mpp is not None:
            return Mpp(self._fallback_mpp, self._fallback_mpp, "user")
        return self._backend.mpp

    def _fetch(self, level: int, box: Box) -> NDArray[np.uint8]:
        pixels = self._backend.read_level(level, box)
        return pixels if self._to_srgb is None else self._to_srgb(pixels)

    def _factors(self, mpp: float) -> tuple[float, float]:
        """Level-0 pixels per raster pixel, (y, x)."""
        own = self.require_mpp()
        if not (math.isfinite(mpp) and mpp > 0):
            raise SlideError(
                shown(self.path), f"cannot be read at {mpp} um per pixel", "ask for a positive number"
            )
        return mpp / own.y, mpp / own.x

    def _level_for(self, factors: tuple[float, float]) -> int:
        """The coarsest level that is no coarser than the raster."""
        fitting = [0]
        for number, level in enumerate(self.levels):
            if (
                level.downsample_y <= factors[0] * LEVEL_TOLERANCE
                and level.downsample_x <= factors[1] * LEVEL_TOLERANCE
            ):
                fitting.append(number)
        number = max(fitting, key=lambda n: self.levels[n].downsample_y * self.levels[n].downsample_x)
        level = self.levels[number]
        if max(factors[0] / level.downsample_y, factors[1] / level.downsample_x) > MAX_FACTOR:
            finest = self.require_mpp()
            most = MAX_FACTOR * min(level.downsample_y * finest.y, level.downsample_x * finest.x)
            what = f"one pixel would average more than {MAX_FACTOR} x {MAX_FACTOR} of the slide's"
            raise SlideError(shown(self.path), what, f"ask for at most {most:.0f} um per pixel")
        return number


def _parts(box: Box, steps: tuple[float, float], *, in_strips: bool) -> Iterator[Box]:
    """Cut a raster box so that the slide pixels under a part are few, and tiles or strips are read in turn.

    `steps` are slide pixels per raster pixel. Strips are read in whole rows; tiles in blocks, down first, so
    that two neighbours share few tiles.
    """
    step_y, step_x = (max(step, 1.0) for step in steps)
    if in_strips:
        width = max(1, min(box.width, int(8 * CHUNK_PX / (step_y * step_x))))
    else:
        width = max(1, 2 * math.isqrt(CHUNK_PX) // math.ceil(step_x))
    height = max(1, int(CHUNK_PX / (width * step_y * step_x)))
    for left in range(box.left, box.right, width):
        for top in range(box.top, box.bottom, height):
            yield Box(top, left, min(top + height, box.bottom), min(left + width, box.right))


def area_average(
    fetch: Callable[[Box], NDArray[np.uint8]],
    shape: tuple[int, int],
    y_edges: NDArray[np.floating],
    x_edges: NDArray[np.floating],
) -> NDArray[np.uint8]:
    """The mean colour between neighbouring edges, RGB (n, m, 3), of an image of `shape` that lies on glass.

    The n + 1 and m + 1 edges are in pixels of the image, of which `fetch` gives boxes. Within 0.02 grey levels
    of the exact mean before rounding; a pixel's value depends on its own four edges only, to the last bit.
    """
    y, x = np.clip(y_edges, 0, shape[0]), np.clip(x_edges, 0, shape[1])
    source = Box(math.floor(y[0]), math.floor(x[0]), math.ceil(y[-1]), math.ceil(x[-1]))
    if not source.area:
        return np.full((len(y) - 1, len(x) - 1, 3), GLASS, np.uint8)
    pixels = fetch(source)
    if pixels.shape[:2] == (len(y) - 1, len(x) - 1) and _is_whole(y_edges) and _is_whole(x_edges):
        return pixels
    step_y, step_x = _whole_step(y_edges, source.height), _whole_step(x_edges, source.width)
    if 0 < step_y <= EXACT_STEP and 0 < step_x <= EXACT_STEP:
        sums = _sum_blocks(pixels, step_y, step_x)
    else:
        rows = _sum_rows(pixels.reshape(source.height, -1), y - source.top)
        sums = _sum_columns(rows, x - source.left)
    area = _areas(y_edges, x_edges)
    covered = _areas(y, x)
    if not np.array_equal(area, covered):
        sums += (area - covered) * np.tile(np.array(GLASS, np.float32), len(x) - 1)
    sums /= area
    return np.rint(sums, out=sums).astype(np.uint8).reshape(len(y) - 1, -1, 3)


def _is_whole(edges: NDArray[np.floating]) -> bool:
    return bool((np.diff(edges) == 1).all()) and float(edges[0]).is_integer()


def _whole_step(edges: NDArray[np.floating], length: int) -> int:
    """The distance of edges that are whole numbers, all as far apart, over exactly `length` pixels; else 0."""
    step = length // (len(edges) - 1)
    fits = step * (len(edges) - 1) == length and float(edges[0]).is_integer()
    return step if fits and bool((np.diff(edges) == step).all()) else 0


def _sum_blocks(pixels: NDArray[np.uint8], step_y: int, step_x: int) -> NDArray[np.float32]:
    """The sums (n, m * 3) of blocks of whole pixels: the same as by rows and columns, in whole numbers."""
    rows = pixels[0::step_y].astype(np.uint16)
    for first in range(1, step_y):
        rows += pixels[first::step_y]
    flat = rows.reshape(len(rows), -1)
    fits = step_y * step_x * 255 < 2**16
    sums = np.zeros((len(rows), flat.shape[1] // step_x), np.uint16 if fits else np.uint32)
    for channel in range(3):  # by channel, as numpy is slow where only three values lie together
        of_channel = sums[:, channel::3]
        for first in range(channel, 3 * step_x, 3):
            of_channel += flat[:, first :: 3 * step_x]
    return sums.astype(np.float32)


def _sum_rows(pixels: NDArray[np.uint8], edges: NDArray[np.floating]) -> NDArray[np.float32]:
    """Sums (n, N) of the rows (H, N) between neighbouring edges, rows that an edge cuts by their share."""
    out = np.empty((len(edges) - 1, pixels.shape[1]), np.float32)
    near = np.empty((math.ceil(np.diff(edges).max()) + 1, pixels.shape[1]), np.float32)
    for total, low, high in zip(out, edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        top, bottom = math.floor(low), math.ceil(high)
        block = near[: bottom - top]
        block[:] = pixels[top:bottom]
        if bottom - top == 1:
            block *= np.float32(high - low)
        elif bottom > top:
            block[0] *= np.float32(top + 1 - low)
            block[-1] *= np.float32(high - bottom + 1)
        np.add.reduce(block, axis=0, out=total)
    return out


def _sum_columns(rows: NDArray[np.float32], edges: NDArray[np.floating]) -> NDArray[np.float32]:
    """Sums (h, m * 3) of the columns (h, W * 3), of three channels, between neighbouring edges, by their share."""
    low, high = np.repeat(edges[:-1], 3), np.repeat(edges[1:], 3)
    channel = np.tile(np.arange(3), len(edges) - 1)
    first = np.floor(low).astype(np.intp)
    out = np.zeros((len(rows), len(low)), np.float32)
    taken = np.empty_like(out)
    for step in range(int((np.ceil(high) - first).max())):
        column = first + step
        share = np.maximum(np.minimum(high, column + 1) - np.maximum(low, column), 0).astype(np.float32)
        np.take(
            rows, 3 * column + channel, axis=1, out=taken, mode="clip"
        )  # past the last column the share is 0
        taken *= share
        out += taken
    return out


def _areas(y_edges: NDArray[np.floating], x_edges: NDArray[np.floating]) -> NDArray[np.float32]:
    """The area between neighbouring edges, (n, m * 3), the same for the three channels."""
    return np.outer(np.diff(y_edges), np.repeat(np.diff(x_edges), 3)).astype(np.float32)
