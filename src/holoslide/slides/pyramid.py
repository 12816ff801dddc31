"""A raster's pyramid in the making: strips go in at level 0, and a TIFF of all levels comes out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import IO, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from holoslide.geometry import ceil_div
from holoslide.slides.facts import GLASS
from holoslide.slides.ordered import in_order
from holoslide.slides.raster import MASK_TAG, TILE_PX, RasterRecord, pack_mask
from holoslide.slides.tissue import Mask

MIN_QUALITY = 75  # from here on JPEG keeps a block of glass exactly: see the test
BLOCK_PX = 8  # side of a JPEG block: no block may hold both tissue and glass
SMALLEST_LEVEL_PX = 512  # the pyramid ends with the first level that is no larger
UNDEFINED, REDUCED = 7, 1  # TIFF's data type of raw bytes, and its NewSubfileType of smaller copies
_GLASS_TILE = np.full((TILE_PX, TILE_PX, 3), GLASS, np.uint8)
CLASSIC_BYTES = 2**32 - 2**24  # larger files have to be BigTIFF, with room for what stands beside the tiles


class PyramidLevel:
    """A level of the pyramid in the making: takes strips, compresses tiles to the scratch file, feeds the next.

    `threads` compress at a time; the file is the same for any number.
    """

    def __init__(self, shape: tuple[int, int], quality: int, scratch: IO[bytes], *, threads: int = 1) -> None:
        self.shape = shape
        self._quality, self._scratch, self._threads = quality, scratch, threads
        self._tiles: list[tuple[int, int]] = []  # (offset, length)
        self._waiting: list[NDArray[np.uint8]] = []
        self._rows_in = 0
        self._glass_tile: tuple[int, int] | None = None
        self._next: PyramidLevel | None = None
        if max(shape) > SMALLEST_LEVEL_PX:
            half = (ceil_div(shape[0], 2), ceil_div(shape[1], 2))
            self._next = PyramidLevel(half, quality, scratch, threads=threads)

    def add(self, rows: NDArray[np.uint8]) -> None:
        """Take the next rows (n, width, 3): a tile's height, half of it, or the level's last."""
        self._waiting.append(rows)
        self._rows_in += len(rows)
        if self._rows_in % TILE_PX and self._rows_in < self.shape[0]:
            return
        strip = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
        self._waiting.clear()
        tiles = [strip[:, left : left + TILE_PX] for left in range(0, self.shape[1], TILE_PX)]
        for tile, data in zip(tiles, in_order(self._compress, tiles, threads=self._threads), strict=True):
            self._tiles.append(self._store(tile, data))
        if self._next is not None:
            self._next.add(halve(strip))

    def levels(self) -> list[PyramidLevel]:
        """This level and all coarser ones."""
        return [self, *(self._next.levels() if self._next is not None else [])]

    def tiles(self) -> Iterator[bytes]:
        """The compressed tiles, row by row."""
        for offset, length in self._tiles:
            yield os.pread(self._scratch.fileno(), length, offset)

    @property
    def size_bytes(self) -> int:
        """What the tiles will take in the file."""
        return sum(length for _, length in self._tiles)

    def _compress(self, pixels: NDArray[np.uint8]) -> bytes | None:
        """A tile's bytes; None for one of glass, which are all the same."""
        return None if _is_glass(pixels) else self._encode(pixels)

    def _store(self, pixels: NDArray[np.uint8], data: bytes | None) -> tuple[int, int]:
        if data is not None:
            return self._write(data)
        if self._glass_tile is None:
            self._glass_tile = self._write(self._encode(pixels))
        return self._glass_tile

    def _encode(self, pixels: NDArray[np.uint8]) -> bytes:
        import imagecodecs

        missing = [(0, TILE_PX - n) for n in pixels.shape[:2]]
        is_whole = pixels.shape[:2] == (TILE_PX, TILE_PX)
        tile = np.ascontiguousarray(pixels) if is_whole else np.pad(pixels, [*missing, (0, 0)], mode="edge")
        data = imagecodecs.jpeg8_encode(
            tile, level=self._quality, subsampling="444", colorspace="RGB", outcolorspace="YCBCR"
        )
        return bytes(data)

    def _write(self, data: bytes) -> tuple[int, int]:
        place = self._scratch.seek(0, os.SEEK_END), len(data)
        self._scratch.write(data)
        self._scratch.flush()
        return place


def _is_glass(pixels: NDArray[np.uint8]) -> bool:
    return np.array_equal(pixels, _GLASS_TILE[: len(pixels), : pixels.shape[1]])


def halve(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The mean of each 2 x 2 pixels, rounded; an odd last row or column counts twice."""
    odd = [(0, n % 2) for n in pixels.shape[:2]]
    even = np.pad(pixels, [*odd, (0, 0)], mode="edge") if any(n for _, n in odd) else pixels
    size = (even.shape[1] // 2, even.shape[0] // 2)
    return np.asarray(
        cv2.resize(even, size, interpolation=cv2.INTER_AREA), np.uint8
    )  # (a + b + c + d + 2) >> 2


def write_tiff(levels: Sequence[PyramidLevel], record: RasterRecord, mask: Mask, file: IO[bytes]) -> None:
    """Put the file together: record and mask at the head, then the levels, finest first."""
    import tifffile

    packed = pack_mask(mask)
    size_bytes = sum(level.size_bytes for level in levels) + len(packed)
    head: dict[str, Any] = {
        "description": record.to_json(),
        "extratags": [(MASK_TAG, UNDEFINED, len(packed), packed, True)],
    }
    with tifffile.TiffWriter(file, bigtiff=size_bytes > CLASSIC_BYTES) as tiff:
        for number, level in enumerate(levels):
            per_cm = 10_000 / (record.mpp * 2**number)
            tiff.write(
                level.tiles(), shape=(*level.shape, 3), dtype=np.uint8, tile=(TILE_PX, TILE_PX),
                compression="jpeg", photometric="ycbcr", subsampling=(1, 1),
                subfiletype=REDUCED if number else 0, resolution=(per_cm, per_cm), resolutionunit="CENTIMETER",
                metadata=None, software=False, **({} if number else head),
            )  # fmt: skip
