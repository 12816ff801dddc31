"""Tiles of a slide that has no coarse level of its own: right, and made with bounded memory."""

import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from holoslide.geometry import Box
from holoslide.serve import tiles as tiles_module
from holoslide.serve.tiles import LARGE_READS, READ_PX, SlideTiles, Source, Tile, TileStore
from holoslide.slides.reader import Reader, open_slide
from tests.slides.drawn import write_slide

SHAPE = 2600, 3100  # more than is held for one tile


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NDArray[np.uint8]]:
    """A slide of one level, and its pixels."""
    spots = np.random.default_rng(1).integers(0, 256, (65, 78, 3)).astype(np.uint8)
    pixels = np.asarray(cv2.resize(spots, SHAPE[::-1]), np.uint8)
    return write_slide(tmp_path_factory.mktemp("single") / "single.tiff", pixels, 0.5), pixels


class Watched:
    """Opens slides of which each read is noted: how many pixels it gives, and how many go on at once."""

    def __init__(self) -> None:
        self.areas: list[int] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()

    def open(self, path: Path, **more: Any) -> Reader:
        reader = open_slide(path, **more)
        read = reader.read

        def watched(box: Box, mpp: float) -> NDArray[np.uint8]:
            with self._lock:
                self.areas.append(box.area)
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
            time.sleep(0.05)
            pixels = read(box, mpp)
            with self._lock:
                self.at_once -= 1
            return pixels

        reader.read = watched  # type: ignore[method-assign, assignment]  # of this reader alone: its class is every test's
        return reader


def test_no_tile_is_read_whole_from_far_finer_pixels(slide: tuple[Path, NDArray[np.uint8]]) -> None:
    path, pixels = slide
    watched = Watched()
    with patch.object(tiles_module, "open_slide", watched.open):
        tiles = SlideTiles(path, None)
        assert tiles.levels == 5
        shown = [tiles.read(Tile(z, 0, 0)) for z in range(tiles.levels)]
    assert max(watched.areas) <= READ_PX < pixels.shape[0] * pixels.shape[1]
    for z, tile in enumerate(shown):
        rows, columns = (min(256, n // 2**z) for n in SHAPE)  # at the far edges part of a pixel is glass
        own = cv2.resize(
            pixels[: rows * 2**z, : columns * 2**z], (columns, rows), interpolation=cv2.INTER_AREA
        )
        assert np.abs(tile[:rows, :columns].astype(int) - own).max() <= 1


def test_few_such_reads_go_on_at_once(slide: tuple[Path, NDArray[np.uint8]]) -> None:
    path, _ = slide
    watched, store = Watched(), TileStore()
    with patch.object(tiles_module, "open_slide", watched.open):
        sources = [Source(path, mpp, stamp=0) for mpp in (0.5, 0.51, 0.52, 0.53, 0.54)]
        threads = [threading.Thread(target=store.jpeg, args=(each, Tile(4, 0, 0))) for each in sources]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(watched.areas) == len(sources)
    assert watched.most_at_once == LARGE_READS
