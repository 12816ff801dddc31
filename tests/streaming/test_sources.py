"""The pixels of a slide as the first map: the same whoever reads them, by as many at a time as were asked for."""

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from holoslide.geometry import Box
from holoslide.pixels import ArrayPixels, Pixels
from holoslide.streaming.sources import PixelSource

SIDE = 1100


def source(pixels: Pixels, *, readers: int | None = None) -> PixelSource:
    return PixelSource(
        pixels,
        mean=torch.tensor([0.5, 0.4, 0.6]),
        std=torch.tensor([0.2, 0.3, 0.1]),
        device=torch.device("cpu"),
        dtype=torch.float64,
        readers=readers,
    )


@dataclass
class Watched:
    """A slide that knows who has read it; each read may wait until `together` are at it."""

    slide: ArrayPixels
    together: int = 1
    readers: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.shape_px, self.mask = self.slide.shape_px, self.slide.mask
        self.mask_cell_px, self.glass = self.slide.mask_cell_px, self.slide.glass
        self._meeting = threading.Barrier(self.together)

    def read(self, box_px: Box) -> NDArray[np.uint8]:
        self._meeting.wait(timeout=20)
        self.readers.add(threading.get_ident())
        if box_px.bottom > 10 * SIDE:
            raise OSError("no such place")
        return self.slide.read(box_px)


@pytest.fixture(scope="module")
def slide() -> ArrayPixels:
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    return ArrayPixels(array, rng.random((35, 35)) < 0.7, 32, (240, 241, 242))


def plainly(slide: ArrayPixels, box: Box) -> Tensor:
    """A window as it is defined, (3, H, W)."""
    values_HW3 = torch.from_numpy(slide.read(box)).double() / 255
    return ((values_HW3 - torch.tensor([0.5, 0.4, 0.6])) / torch.tensor([0.2, 0.3, 0.1])).permute(2, 0, 1)


@settings(max_examples=25, deadline=None)
@given(
    readers=st.integers(1, 7),
    shape=st.tuples(st.integers(1, 1300), st.integers(1, 300)),
    corners=st.lists(st.tuples(st.integers(-200, SIDE), st.integers(-200, SIDE)), min_size=1, max_size=4),
)
def test_windows_are_the_slides_pixels_whoever_reads_them(
    slide: ArrayPixels, readers: int, shape: tuple[int, int], corners: list[tuple[int, int]]
) -> None:
    boxes = [Box.at(*corner, *shape) for corner in corners]
    windows = source(slide, readers=readers).windows(boxes)
    assert torch.equal(windows, source(slide, readers=1).windows(boxes))
    for window, box in zip(windows, boxes, strict=True):
        torch.testing.assert_close(window, plainly(slide, box), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("boxes", "together"), [(1, 4), (2, 4), (4, 4), (3, 3)])
def test_many_readers_read_at_once(slide: ArrayPixels, boxes: int, together: int) -> None:
    """One window of 1,024 rows in four strips, or as many windows each by itself."""
    watched = Watched(slide, together)
    source(watched, readers=4).windows([Box.at(0, 8 * n, 1024, 64) for n in range(boxes)])
    assert len(watched.readers) >= together
    assert threading.get_ident() not in watched.readers


def test_where_the_processor_computes_one_reads(slide: ArrayPixels) -> None:
    watched = Watched(slide)
    source(watched).windows([Box.at(0, 0, 1024, 64), Box.at(0, 64, 1024, 64)])
    assert watched.readers == {threading.get_ident()}


def test_what_fails_in_a_reader_is_raised(slide: ArrayPixels) -> None:
    failing = source(Watched(slide), readers=3)
    with pytest.raises(OSError, match="no such place"):
        failing.windows([Box.at(0, 0, 64, 64), Box.at(20 * SIDE, 0, 64, 64)])
