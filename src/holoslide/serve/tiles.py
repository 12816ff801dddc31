"""Tiles of slides for the browser: cut from the reader, kept as JPEG, each made once however many ask for it.

The viewer's picture of a slide has square pixels of `base_mpp` um; its level z is 2^z times coarser, and its tile
(z, y, x) shows the TILE_PX x TILE_PX pixels of that level from (y, x) * TILE_PX on, less at the slide's far edges.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from holoslide.errors import SlideError
from holoslide.geometry import Box, ceil_div
from holoslide.serve.stamps import stamp_of
from holoslide.slides.reader import Reader, open_slide

TILE_PX = 256
JPEG_QUALITY = 85
CACHE_BYTES = 256 * 2**20
OPEN_SLIDES = 12
READ_PX = 2**22  # of the file, that are held for one tile
LARGE_READS = 2  # at once, of tiles that need more: each goes over much of its slide
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Source:
    """A slide's file as it is now: another one of that name is another source."""

    path: Path
    mpp: float | None
    stamp: Hashable

    @classmethod
    def of(cls, path: Path, mpp: float | None) -> Source | None:
        """Of several files, the stamp is that of the one which names the slide. None where it is gone."""
        stamp = stamp_of(path)
        return None if stamp is None else cls(path, mpp, stamp)


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile's address: level z, row y, column x."""

    z: int
    y: int
    x: int


class SlideTiles:
    """One open slide as a pyramid of tiles."""

    def __init__(self, path: Path, mpp: float | None) -> None:
        self._reader: Reader = open_slide(path, mpp=mpp)
        own = self._reader.require_mpp()
        self.mpp_yx = own.y, own.x
        self.base_mpp = min(own.y, own.x)
        self.shape_l0 = self._reader.shape_l0
        self.shape = self._reader.shape_px(self.base_mpp)
        self.levels = 1 + max(0, math.ceil(math.log2(max(self.shape) / TILE_PX)))

    def box(self, tile: Tile) -> Box:
        """The tile's pixels in its level; empty where there is no such tile."""
        if not 0 <= tile.z < self.levels:
            return Box(0, 0, 0, 0)
        height, width = (ceil_div(n, 2**tile.z) for n in self.shape)
        whole = Box(0, 0, height, width)
        return Box.at(tile.y * TILE_PX, tile.x * TILE_PX, TILE_PX, TILE_PX).intersect(whole)

    def read(self, tile: Tile) -> NDArray[np.uint8]:
        """RGB of a tile, from the nearest finer level of the file, by area; memory is bounded.

        What is small is read as it is stored and shrunk here, which is faster; the reader shrinks the rest part by
        part.
        """
        box, mpp = self.box(tile), self.base_mpp * 2**tile.z
        if self._factor(tile) < 1.05 or self.is_large(tile):
            return self._reader.read(box, mpp)
        pixels = self._reader.read(self._stored(tile), self._native(mpp))
        return np.asarray(cv2.resize(pixels, (box.width, box.height), interpolation=cv2.INTER_AREA), np.uint8)

    def is_large(self, tile: Tile) -> bool:
        """Whether a tile covers more of its file than is held at once: no level of it is nearly as coarse."""
        return self._stored(tile).area > READ_PX

    def _stored(self, tile: Tile) -> Box:
        """The tile's pixels in the level that it is read from."""
        box, factor = self.box(tile), self._factor(tile)
        edges = (round(edge * factor) for edge in (box.top, box.left, box.bottom, box.right))
        return Box(*edges)

    def _factor(self, tile: Tile) -> float:
        """Pixels of the level that is read to one of the tile's."""
        mpp: float = self.base_mpp * 2**tile.z
        return mpp / self._native(mpp)

    def _native(self, mpp: float) -> float:
        """The um per pixel of the coarsest level that is no coarser: its pixels are read as they are stored."""
        own = (self.base_mpp * max(v.downsample_y, v.downsample_x) for v in self._reader.levels)
        return max((value for value in own if value <= mpp * 1.001), default=self.base_mpp)


class TileStore:
    """The tiles of slides, from memory or from their files; safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._large = threading.BoundedSemaphore(LARGE_READS)
        self._open: OrderedDict[Source, SlideTiles] = OrderedDict()
        self._tiles: OrderedDict[tuple[Source, Tile], bytes] = OrderedDict()
        self._held_bytes = 0
        self._making: dict[object, threading.Lock] = {}

    def slide(self, source: Source) -> SlideTiles:
        """An open slide; SlideError for one that cannot be read."""
        with self._lock:
            known = self._open.get(source)
            if known is not None:
                self._open.move_to_end(source)
                return known
        return self._once(source, lambda: self._opened(source))

    def jpeg(self, source: Source, tile: Tile) -> bytes:
        """A tile as JPEG; SlideError where there is none, or it cannot be read."""
        key = source, tile
        with self._lock:
            known = self._tiles.get(key)
            if known is not None:
                self._tiles.move_to_end(key)
                return known
        return self._once(key, lambda: self._made(source, tile))

    def _opened(self, source: Source) -> SlideTiles:
        with self._lock:
            if source in self._open:
                return self._open[source]
        opened = SlideTiles(source.path, source.mpp)
        with self._lock:
            self._open[source] = opened
            while len(self._open) > OPEN_SLIDES:  # closed when the last thread lets go of it
                self._open.popitem(last=False)
        return opened

    def _made(self, source: Source, tile: Tile) -> bytes:
        with self._lock:
            if (source, tile) in self._tiles:
                return self._tiles[source, tile]
        slide = self.slide(source)
        if not slide.box(tile).area:
            what = f"has no tile {tile.z}/{tile.y}/{tile.x}"
            raise SlideError(source.path.name, what, "ask for one that it has")
        with self._large if slide.is_large(tile) else nullcontext():
            data = encode_jpeg(slide.read(tile))
        with self._lock:
            self._tiles[source, tile] = data
            self._held_bytes += len(data)
            while self._held_bytes > CACHE_BYTES and len(self._tiles) > 1:
                _, old = self._tiles.popitem(last=False)
                self._held_bytes -= len(old)
        return data

    def _once(self, key: object, make: Callable[[], _T]) -> _T:
        """Let one thread make what several ask for; the others wait, and then find it made."""
        with self._lock:
            lock = self._making.setdefault(key, threading.Lock())
        try:
            with lock:
                return make()
        finally:
            with self._lock:
                self._making.pop(key, None)


def encode_jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """RGB as JPEG."""
    bgr = np.ascontiguousarray(pixels[..., ::-1])
    done, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not done:
        message = "a tile could not be encoded"
        raise RuntimeError(message)
    return data.tobytes()
