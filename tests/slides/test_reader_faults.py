"""Damaged files end in one line; memory is bounded; readers live with threads, forks and other processes."""

import os
import pickle
import signal
import threading
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tifffile
from PIL import Image

from holoslide.errors import SlideError
from holoslide.geometry import Box
from holoslide.slides import backends, facts, reader, tiff
from holoslide.slides.reader import Reader, open_slide
from tests.slides.reading import KINDS, noise, write_ome

# --- Faults of files, and of their names.


def test_empty_and_odd_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty.svs"
    empty.touch()
    with pytest.raises(SlideError, match=r"is empty \(0 bytes\)"):
        open_slide(empty)
    with pytest.raises(SlideError, match="no such file") as caught:
        open_slide(tmp_path / "two\nlines.svs")
    assert "\n" not in str(caught.value)


def test_names_of_any_kind(tmp_path: Path) -> None:
    for name in ("a b.tif", "-x.tif", "ĝlitobjekto.tif", "new\nline.tif", "no-suffix", "wrong.svs"):
        tifffile.imwrite(tmp_path / name, noise(20, 20), photometric="rgb")
        with open_slide(tmp_path / name, mpp=1.0) as slide:
            assert np.array_equal(slide.read(Box(0, 0, 20, 20), 1.0), noise(20, 20))


@pytest.mark.parametrize("kind", ["tiled-jpeg", "striped-lzw", "raw"])
def test_a_file_cut_short_fails_in_one_line(tmp_path: Path, kind: str) -> None:
    """Its directory comes first, its last pixels are gone."""
    path = tmp_path / "short.tif"
    tifffile.imwrite(path, noise(150, 210), photometric="rgb", **KINDS[kind])
    path.write_bytes(path.read_bytes()[:-9000])
    with (
        pytest.raises(SlideError, match="damaged or cut short") as caught,
        open_slide(path, mpp=1.0) as slide,
    ):
        slide.thumbnail(1.0)
    assert "\n" not in str(caught.value)


@pytest.mark.data
def test_mutated_headers_end_in_one_line(data_dir: Path, tmp_path: Path) -> None:
    random, said = np.random.default_rng(0), list[str]()
    write_ome(tmp_path / "a.ome.tif", metadata={}, levels=2)
    tifffile.imwrite(tmp_path / "b.tif", noise(100, 90), photometric="rgb", rowsperstrip=7, compression="lzw")
    Image.fromarray(noise(100, 90)).save(tmp_path / "c.png")
    Image.fromarray(noise(100, 90)).save(tmp_path / "d.jpg")
    wsi = data_dir / "wsi"
    seeds = [*sorted(tmp_path.iterdir()), *(wsi / "openslide-python-fixtures").iterdir()]
    seeds += [wsi / "highdicom_sm_image.dcm"]
    for number in range(240):
        seed = seeds[number % len(seeds)]
        data = np.frombuffer(seed.read_bytes(), np.uint8).copy()
        edge = 600 if random.random() < 0.7 else len(data)
        places = random.integers(0, min(edge, len(data)), random.integers(1, 12))
        data[places] = random.choice([0, 1, 255, int(random.integers(256))], len(places))
        path = tmp_path / f"mutant{seed.suffix}"
        path.write_bytes(data[: len(data) // 2].tobytes() if random.random() < 0.1 else data.tobytes())
        try:
            with open_slide(path, mpp=1.0) as slide:
                slide.read(Box(0, 0, 60, 60), 2.0)
        except SlideError as error:
            said.append(str(error))
    assert len(said) > 100
    assert not [line for line in said if "\n" in line]


# --- Memory, threads, processes.


def test_memory_does_not_follow_the_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """108 MB of pixels, one level, in strips: the thumbnail costs the cache and a chunk."""
    path = tmp_path / "large.tif"
    side = 6000
    rows = (np.arange(side) // 50).astype(np.uint8)[:, None, None]
    tifffile.imwrite(
        path, np.tile(rows, (1, side, 3)), photometric="rgb", rowsperstrip=50, compression="zlib"
    )
    monkeypatch.setattr(tiff, "CACHE_BYTES", 2**22)
    with open_slide(path, mpp=0.25) as slide:
        tracemalloc.start()
        thumbnail = slide.thumbnail(8.0)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert thumbnail.shape == (188, 188, 3)
    assert peak_bytes < 48e6


def test_threads_share_a_reader(uneven: Path) -> None:
    boxes = [Box.at(top, left, 20, 30) for top in range(0, 60, 7) for left in range(0, 60, 7)]
    with open_slide(uneven) as slide, ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda box: slide.read(box, 0.7), boxes))
        assert all(
            np.array_equal(slide.read(box, 0.7), got) for box, got in zip(boxes, together, strict=True)
        )


def test_a_closed_reader_does_not_read(uneven: Path) -> None:
    slide = open_slide(uneven)
    slide.close()
    slide.close()
    with pytest.raises(ValueError, match="read after it was closed"):
        slide.read(Box(0, 0, 1, 1), 1.0)


def test_a_reader_can_be_sent_to_a_worker(uneven: Path) -> None:
    with open_slide(uneven, mpp=0.5) as slide, pickle.loads(pickle.dumps(slide)) as copy:
        assert isinstance(copy, Reader)
        assert copy.mpp == slide.mpp
        assert np.array_equal(copy.read(Box(0, 0, 9, 9), 2.0), slide.read(Box(0, 0, 9, 9), 2.0))


@pytest.mark.data
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        "CMU-1-Small-Region.svs",
        "multiframe_camelyon_challenge_image.dcm",
        "openslide-python-fixtures/boxes.tiff",
        "openslide-python-fixtures/boxes.png",
    ],
)
def test_a_reader_works_after_a_fork_from_busy_threads(data_dir: Path, name: str) -> None:
    """Whatever lock another thread holds at the time of the fork, the child reads on."""
    box, done = Box(20, 20, 60, 60), threading.Event()
    with open_slide(data_dir / "wsi" / name, mpp=0.5) as slide, ThreadPoolExecutor(2) as pool:
        here = slide.read(box, 2.0)

        def keep_reading() -> None:
            while not done.is_set():
                slide.read(box, 2.0)

        busy = [pool.submit(keep_reading) for _ in range(2)]
        try:
            outcomes = [_in_a_fork(lambda: np.array_equal(slide.read(box, 2.0), here)) for _ in range(12)]
        finally:
            done.set()
        for thread in busy:
            thread.result()
    assert outcomes == ["right"] * 12


def _in_a_fork(check: Callable[[], bool], *, patience_s: float = 30) -> str:
    """Whether a check is "right" or "wrong" in a forked child, or the child "hangs"."""
    child = os.fork()
    if child == 0:  # nothing of pytest may run on here
        code = 2
        try:
            code = 0 if check() else 1
        finally:
            os._exit(code)
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return "right" if os.waitstatus_to_exitcode(status) == 0 else "wrong"
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


@pytest.mark.parametrize("module", [facts, tiff, backends, reader])
def test_nothing_that_reads_slides_calls_opencv(module: ModuleType) -> None:
    """Its thread pool hangs in forked workers, but so seldom that the test above may miss it."""
    assert "cv2" not in vars(module)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_lock_held_at_the_fork_is_open_in_the_child() -> None:
    lock = facts.ForkLock()

    def opens() -> bool:
        with lock:
            return True

    with lock:
        assert _in_a_fork(opens, patience_s=10) == "right"
