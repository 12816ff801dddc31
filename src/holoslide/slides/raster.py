"""The prepared slide: one TIFF with the pixels at the target resolution, the tissue mask, and how it was made.

The file, format version 3 (`prepare.py` writes it; version 2 knew no stains, version 1 neither masks of users nor
colour profiles, and both are read as well):

- pages 0, 1, ...: the pyramid, each level half the one before; RGB as JPEG 4:4:4 in square tiles, resolution
  tags in um per pixel. Level 0 is the raster. QuPath and OpenSlide open it as a generic tiled TIFF.
- private tag `MASK_TAG` of page 0: the tissue mask, one bit per cell of `mask_cell_px` raster pixels, row by row,
  deflated. (Not a page of its own, which some programs take for a second image.)
- the description of page 0: `RasterRecord` as JSON.

Pixels outside the mask are one exact colour. A mask cell is a multiple of 8 px, so that a JPEG block is either
all tissue or all glass, and a block of one colour decodes to that very colour (from quality 75 on).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from holoslide.errors import SlideError
from holoslide.geometry import Box, ceil_div
from holoslide.pixels import one_colour
from holoslide.slides.facts import DAMAGE, ForkLock, one_line, quiet, shown
from holoslide.slides.reader import area_average
from holoslide.slides.stain import Dyes

FORMAT = "holoslide raster"
VERSION = 3
READABLE = (1, 2, 3)
TILE_PX = 256
CACHE_BYTES = 2**26  # decoded tiles kept per open raster
MASK_TAG = 65_108
HEAD_BYTES = 4096  # the record begins within them
ANEW = "delete it and run `holoslide prepare` again"

_cache_lock = (
    ForkLock()
)  # one for all: it is held for a look-up only, and each such lock costs every later fork


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides a raster's bytes: equal recipes give equal files.

    `settings` is the whole `PrepareConfig`, `algorithm` the number of the way that rasters are made;
    `slide_sha256` is of the slide's file, or of all its files,
    `mask_sha256` of the user's own tissue mask, None where the tissue was looked for.
    """

    slide_id: str
    slide_sha256: str
    slide_mpp: tuple[float, float]
    slide_mpp_source: str
    settings: dict[str, Any]
    algorithm: int
    mask_sha256: str | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        facts = json.dumps(dataclasses.asdict(self), sort_keys=True, allow_nan=False)
        return hashlib.sha256(facts.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class RasterRecord:
    """What a raster says of itself.

    `origin_l0`: level-0 pixel (y, x) of the first raster pixel; `bounds_l0`: the slide's scanned part, (top,
    left, bottom, right). `tissue_mean`, `tissue_std`: per channel, 0 to 255, of the `tissue_px` pixels that are
    in the mask and on the slide, as they were before JPEG. `icc_profile`: the colour profile that was applied.
    `stains`: the slide's own dyes, in place of which there are reference ones, see `stain.py`.
    """

    recipe: Recipe
    mpp: float
    shape_px: tuple[int, int]
    origin_l0: tuple[int, int]
    shape_l0: tuple[int, int]
    bounds_l0: tuple[int, int, int, int]
    levels: int
    mask_cell_px: int
    glass: tuple[int, int, int]
    tissue_px: int
    tissue_mean: tuple[float, float, float]
    tissue_std: tuple[float, float, float]
    icc_profile: str | None = None
    stains: Dyes | None = None

    def to_json(self) -> str:
        """One line of ASCII, the same for equal records."""
        facts = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(facts, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, path: Path) -> RasterRecord:
        """Raises `SlideError` where the text is no record, or one of another version."""
        try:
            facts = json.loads(text)
        except ValueError:
            facts = None
        if not isinstance(facts, dict) or facts.pop("format", None) != FORMAT:
            remedy = "prepare it with `holoslide prepare` first"
            raise SlideError(shown(path), "is an image, but no prepared slide", remedy)
        version = facts.pop("version", None)
        if version not in READABLE:
            what = f"is a prepared slide of format {version}, and this holoslide reads format {VERSION}"
            raise SlideError(shown(path), what, "prepare it again, or use the holoslide that made it")
        try:
            values = _tuples(facts.pop("recipe"))
            if version == 1:  # it had the package's version in place of the algorithm's
                values["algorithm"] = 1 if values.pop("software") else 0
            recipe = Recipe(**values)
            record = cls(recipe=recipe, **_tuples(facts))
            record.check()
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise SlideError(shown(path), f"has a damaged record ({one_line(error)})", ANEW) from error
        return record

    def check(self) -> None:
        """Raise ValueError for values that no raster has."""
        whole, real = (int,), (int, float)
        rules: list[tuple[str, object, int, tuple[type, ...], float, float]] = [
            ("shape_px", self.shape_px, 2, whole, 1, 2**31),
            ("shape_l0", self.shape_l0, 2, whole, 1, 2**31),
            ("origin_l0", self.origin_l0, 2, whole, 0, 2**31),
            ("bounds_l0", self.bounds_l0, 4, whole, 0, 2**31),
            ("glass", self.glass, 3, whole, 0, 255),
            ("tissue_mean", self.tissue_mean, 3, real, 0, 255),
            ("tissue_std", self.tissue_std, 3, real, 0, 255),
            ("slide_mpp", self.recipe.slide_mpp, 2, real, 1e-6, 1e6),
            ("mpp", (self.mpp,), 1, real, 1e-6, 1e6),
            ("levels", (self.levels,), 1, whole, 1, 64),
            ("mask_cell_px", (self.mask_cell_px,), 1, whole, 1, 2**31),
            ("tissue_px", (self.tissue_px,), 1, whole, 0, 2**62),
        ]
        if self.stains is not None:
            rules.append(("stains", self.stains, 8, real, -1e3, 1e3))
        for name, values, count, kinds, least, most in rules:
            fits = isinstance(values, tuple) and len(values) == count
            if not fits or not all(type(v) in kinds and least <= v <= most for v in values):  # type: ignore[attr-defined]
                message = f"{name} is {values}"
                raise ValueError(message)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


@dataclass(frozen=True, slots=True)
class _Level:
    """Where the tiles of one level are in the file, row by row."""

    shape: tuple[int, int]
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]


class Raster:
    """An open prepared slide: `Pixels`, read tile by tile. Safe between threads, after a fork, and to pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1
        self.record, self._levels, self.mask = _parse(path)
        self.shape_px, self.mpp, self.origin_l0 = self.record.shape_px, self.record.mpp, self.record.origin_l0
        self.mask_cell_px, self.tissue_px = self.record.mask_cell_px, self.record.tissue_px
        self.glass = np.array(self.record.glass, np.uint8)
        self._tiles: OrderedDict[tuple[int, int], NDArray[np.uint8]] = OrderedDict()
        self._file = os.open(path, os.O_RDONLY)

    @classmethod
    def open(cls, path: str | Path) -> Raster:
        """Open a prepared slide; `SlideError` if it is missing, none, cut short, or of another version."""
        return cls(Path(path))

    def __enter__(self) -> Raster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Raster], tuple[Path]]:
        return Raster, (self.path,)

    def close(self) -> None:
        """Let go of the file; reading is a ValueError from then on."""
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)
            self._file = -1
            self._tiles.clear()

    @property
    def l0_per_px(self) -> tuple[float, float]:
        """Level-0 pixels per raster pixel, (y, x)."""
        y, x = self.record.recipe.slide_mpp
        return self.mpp / y, self.mpp / x

    def read(self, box_px: Box) -> NDArray[np.uint8]:
        """RGB (h, w, 3) of any box: glass outside the mask and outside the raster, to the exact value.

        Only tiles with tissue under the box are decoded. Raises `SlideError` where one cannot be.
        """
        out = one_colour(box_px.shape, self.glass)
        inside = box_px.intersect(Box(0, 0, *self.shape_px))
        if not inside.area:
            return out
        across = ceil_div(self.shape_px[1], TILE_PX)
        for tile in _grid(inside):
            part = inside.intersect(tile.times(TILE_PX))
            cells = part.cover(self.mask_cell_px)
            mask = self.mask[cells.slices]
            if not mask.any():
                continue
            pixels = self._tile(0, tile.top * across + tile.left)
            pixels = pixels[part.relative_to(tile.times(TILE_PX)).slices]
            place = out[part.relative_to(box_px).slices]
            if mask.all():
                place[:] = pixels
            else:
                whole = (
                    mask.view(np.uint8).repeat(self.mask_cell_px, axis=0).repeat(self.mask_cell_px, axis=1)
                )
                tissue = whole[part.relative_to(cells.times(self.mask_cell_px)).slices]
                cv2.copyTo(pixels, tissue, place)  # in a tenth of the time that np.where takes
        return out

    def thumbnail(self, side: int) -> NDArray[np.uint8]:
        """The whole raster, RGB, its longer side at most `side` pixels; for eyes, not for networks."""
        number = max(
            (n for n, level in enumerate(self._levels) if max(level.shape) >= side or n == 0), default=0
        )
        shape = self._levels[number].shape
        shrink = min(1.0, side / max(shape))
        height, width = (max(1, math.floor(length * shrink)) for length in shape)
        edges = [np.linspace(0, full, n + 1) for full, n in zip(shape, (height, width), strict=True)]
        return area_average(lambda box: self._read_level(number, box), shape, edges[0], edges[1])

    def _read_level(self, number: int, box: Box) -> NDArray[np.uint8]:
        """The stored pixels of a box inside a level."""
        out = np.empty((*box.shape, 3), np.uint8)
        across = ceil_div(self._levels[number].shape[1], TILE_PX)
        for tile in _grid(box):
            part = box.intersect(tile.times(TILE_PX))
            pixels = self._tile(number, tile.top * across + tile.left)
            out[part.relative_to(box).slices] = pixels[part.relative_to(tile.times(TILE_PX)).slices]
        return out

    def _tile(self, number: int, index: int) -> NDArray[np.uint8]:
        """One decoded tile (TILE_PX, TILE_PX, 3), from the cache or the file."""
        if self._file < 0:
            message = f"{shown(self.path)}: read after it was closed"
            raise ValueError(message)
        key = number, index
        with _cache_lock:
            tile = self._tiles.get(key)
            if tile is not None:
                self._tiles.move_to_end(key)
                return tile
        tile = self._decode(number, index)
        with _cache_lock:
            self._tiles[key] = tile
            while len(self._tiles) * tile.nbytes > CACHE_BYTES:
                self._tiles.popitem(last=False)
        return tile

    def _decode(self, number: int, index: int) -> NDArray[np.uint8]:
        import imagecodecs

        level = self._levels[number]
        offset, count = int(level.offsets[index]), int(level.counts[index])
        try:
            data = os.pread(self._file, count, offset)
            tile: NDArray[np.uint8] = imagecodecs.jpeg8_decode(data, colorspace="YCBCR", outcolorspace="RGB")
        except DAMAGE as error:
            what = f"tile {index} of level {number} cannot be read ({one_line(error)})"
            raise SlideError(shown(self.path), what, ANEW) from error
        if len(data) != count or tile.shape != (TILE_PX, TILE_PX, 3):
            raise SlideError(shown(self.path), f"tile {index} of level {number} is damaged", ANEW)
        tile.flags.writeable = False
        return tile


def _grid(box: Box) -> list[Box]:
    """The tiles that a box touches, as boxes of one cell on the grid of tiles."""
    return list(box.cover(TILE_PX).tiles(1))


def _parse(path: Path) -> tuple[RasterRecord, tuple[_Level, ...], NDArray[np.bool_]]:
    """Record, levels and mask of a file, checked against each other and against the file's length."""
    import tifffile

    quiet("tifffile")
    try:
        size_bytes = path.stat().st_size
        if size_bytes == 0:
            raise SlideError(shown(path), "is empty (0 bytes)", ANEW)
        with tifffile.TiffFile(path) as tiff:
            pages: list[Any] = list(tiff.pages)
            record = RasterRecord.from_json(pages[0].description, path)
            levels = tuple(_level(page) for page in pages)
            last = max(int(np.max(level.offsets + level.counts)) for level in levels)
            if len(levels) != record.levels or last > size_bytes:
                raise SlideError(shown(path), "is cut short", ANEW)
            if levels[0].shape != record.shape_px:
                raise SlideError(shown(path), "has a record that does not fit its pixels", ANEW)
            mask = unpack_mask(pages[0].tags[MASK_TAG].value, record)
    except FileNotFoundError:
        raise SlideError(shown(path), "there is no such file", "run `holoslide prepare` first") from None
    except IsADirectoryError:
        raise SlideError(shown(path), "is a folder", "give a prepared slide") from None
    except PermissionError as error:
        raise SlideError(shown(path), f"cannot be opened ({error.strerror})", "check the file") from error
    except tifffile.TiffFileError as error:
        what = f"is no prepared slide, or is cut short ({one_line(error)})"
        raise SlideError(shown(path), what, ANEW) from error
    except DAMAGE as error:
        raise SlideError(shown(path), f"is damaged or cut short ({one_line(error)})", ANEW) from error
    return record, levels, mask


def pack_mask(mask: NDArray[np.bool_]) -> bytes:
    """The mask as it stands in the file; the same for equal masks."""
    return zlib.compress(np.packbits(mask).tobytes(), 9)


def unpack_mask(data: bytes, record: RasterRecord) -> NDArray[np.bool_]:
    """The mask of a raster (rows, columns of cells); ValueError where it is not of the raster's size."""
    height, width = (ceil_div(length, record.mask_cell_px) for length in record.shape_px)
    bits = np.frombuffer(zlib.decompress(data), np.uint8)
    if len(bits) != ceil_div(height * width, 8):
        message = "its mask is not of its size"
        raise ValueError(message)
    return np.unpackbits(bits, count=height * width).reshape(height, width).astype(np.bool_)


def _level(page: Any) -> _Level:
    offsets, counts = np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64)
    shape = (page.imagelength, page.imagewidth)
    expected = ceil_div(shape[0], TILE_PX) * ceil_div(shape[1], TILE_PX)
    if (page.tilelength, page.tilewidth) != (TILE_PX, TILE_PX) or not len(offsets) == len(counts) == expected:
        message = "its tiles are not those of a prepared slide"
        raise ValueError(message)
    return _Level(shape, offsets, counts)


def is_raster(path: Path) -> bool:
    """Whether a file is a prepared slide, whole or not, and not a slide; by its head, as thousands may be asked."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return False
    try:
        with path.open("rb") as file:
            return f'"format": "{FORMAT}"'.encode() in file.read(HEAD_BYTES)
    except OSError:
        return False
