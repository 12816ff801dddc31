"""Slides in: right facts from every real file, exact averages at any resolution, one clear line for every fault."""

import json
import math
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
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from holoslide.errors import SlideError
from holoslide.geometry import Box
from holoslide.slides import backends, facts, reader, tiff
from holoslide.slides.facts import GLASS, Mpp
from holoslide.slides.reader import Reader, area_average, open_slide

EXACT = 0.52  # half a grey level of rounding, and the 0.02 that the docstring of area_average allows


# --- An oracle anyone can check by reading: float64, dense weights, straight from the pixels of one level.


def overlap(edges: NDArray[np.floating], length: int) -> NDArray[np.float64]:
    """How much of each of `length` pixels lies between neighbouring edges, (n, length)."""
    pixel = np.arange(length)
    inside = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return np.maximum(inside, 0.0)


def averaged(
    image: NDArray[np.uint8], y: NDArray[np.floating], x: NDArray[np.floating]
) -> NDArray[np.float64]:
    """The mean colour between edges of an image that lies on glass, not rounded."""
    rows, columns = overlap(y, image.shape[0]), overlap(x, image.shape[1])
    sums = np.einsum("iy,yxc,jx->ijc", rows, image.astype(np.float64), columns, optimize=True)
    area = np.outer(np.diff(y), np.diff(x))
    outside = area - np.outer(rows.sum(1), columns.sum(1))
    return (sums + outside[..., None] * np.array(GLASS)) / area[..., None]


def expected(
    image: NDArray[np.uint8],
    box: Box,
    factor: tuple[float, float],
    origin: tuple[int, int],
    down: float = 1.0,
) -> NDArray[np.float64]:
    """What `Reader.read` should give, before rounding, from the pixels of a level downsampled by `down`."""
    y = (origin[0] + np.arange(box.top, box.bottom + 1) * factor[0]) / down
    x = (origin[1] + np.arange(box.left, box.right + 1) * factor[1]) / down
    return averaged(image, y, x)


# --- Slides to read.


def noise(height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(height * 10_007 + width).integers(
        0, 256, (height, width, channels), np.uint8
    )


def per_cm(um: float) -> float:
    return 10_000 / um


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """97 x 131 px of noise in small tiles, 0.5 um/px downwards and 0.25 across."""
    path = tmp_path_factory.mktemp("slides") / "uneven.tif"
    resolution = (per_cm(0.25), per_cm(0.5))
    tifffile.imwrite(
        path,
        noise(97, 131),
        photometric="rgb",
        tile=(16, 16),
        resolution=resolution,
        resolutionunit="CENTIMETER",
    )
    return path


KINDS: dict[str, dict[str, Any]] = {
    "tiled-jpeg": {"tile": (64, 64), "compression": "jpeg"},
    "tiled-deflate": {"tile": (32, 48), "compression": "deflate", "predictor": True},
    "striped-lzw": {"rowsperstrip": 7, "compression": "lzw"},
    "one-strip": {"compression": "deflate"},
    "raw": {},
    "bigtiff": {"bigtiff": True, "tile": (64, 64), "compression": "zstd"},
    "big-endian": {"byteorder": ">", "rowsperstrip": 16},
    "planar": {"planarconfig": "separate", "rowsperstrip": 9, "compression": "deflate"},
    "planar-tiled": {"planarconfig": "separate", "tile": (32, 32), "compression": "deflate"},
    "planar-raw": {"planarconfig": "separate"},
}


def write_ome(path: Path, *, metadata: dict[str, Any], levels: int = 3) -> NDArray[np.uint8]:
    image = noise(300, 420)
    with tifffile.TiffWriter(path, ome=True) as writer:
        options: dict[str, Any] = {"photometric": "rgb", "tile": (64, 64), "compression": "deflate"}
        writer.write(image, subifds=levels - 1, metadata={"axes": "YXS", **metadata}, **options)
        for level in range(1, levels):
            writer.write(image[:: 2**level, :: 2**level], subfiletype=1, **options)
    return image


# --- The real files.


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "vendor", "shapes", "mpp"),
    [
        ("CMU-1-Small-Region.svs", "aperio", [(2967, 2220)], Mpp(0.499, 0.499, "slide")),
        ("TCGA-CR-7395-01A-01-TS1.svs", "aperio", [(3567, 4443), (1783, 2221)], None),
        ("highdicom_sm_image.dcm", "dicom", [(50, 50)], Mpp(0.499, 0.499, "slide")),
        ("multiframe_camelyon_challenge_image.dcm", "dicom", [(700, 1152)], Mpp(28.968, 28.969, "slide")),
        (
            "openslide-python-fixtures/boxes.tiff", "generic-tiff",
            [(250, 300), (125, 150), (62, 75), (31, 37)], None,  # its tags say 72 dpi
        ),
        ("openslide-python-fixtures/boxes_0.dcm", "dicom", [(16, 16)], Mpp(0.499, 0.499, "slide")),
        ("openslide-python-fixtures/boxes_1.dcm", "dicom", [(16, 16)], Mpp(0.499, 0.499, "slide")),
        ("openslide-python-fixtures/boxes.png", "png", [(250, 300)], None),
    ],
)  # fmt: skip
def test_real_slides_give_the_right_facts_and_pixels(
    data_dir: Path, name: str, vendor: str, shapes: list[tuple[int, int]], mpp: Mpp | None
) -> None:
    path = data_dir / "wsi" / name
    with open_slide(path) as slide:
        assert slide.vendor == vendor
        assert [level.shape for level in slide.levels] == shapes
        assert slide.mpp == mpp
        assert slide.bounds_l0 == Box(0, 0, *shapes[0])
        told = json.loads(json.dumps(slide.facts()))
        assert (told["height"], told["width"]) == shapes[0]
        files = path.parent.glob("boxes_*.dcm") if "boxes_" in name else [path]  # all of a DICOM series
        assert told["file_bytes"] == sum(file.stat().st_size for file in files)
        if mpp is None:
            with pytest.raises(SlideError, match=r"no microns per pixel.*--slide-mpp.*`mpp` column"):
                slide.require_mpp()
    with open_slide(path, mpp=0.5) as slide:
        assert slide.mpp == Mpp(0.5, 0.5, "user")
        assert slide.thumbnail(4.0).shape == (*slide.shape_px(4.0), 3)
        with openslide.open_slide(path) as theirs:
            region = np.asarray(theirs.read_region((0, 0), 0, theirs.dimensions))
        assert np.array_equal(slide.read(Box(0, 0, *shapes[0]), 0.5), region[..., :3])


@pytest.mark.data
@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs"])
def test_aperio_pixels_are_those_of_openslide(data_dir: Path, name: str) -> None:
    path = data_dir / "wsi" / name
    backend = backends.OpenSlideBackend(path)
    assert backend._pages, "the fast path is not taken"
    theirs = openslide.OpenSlide(path)
    for level, (width, height) in enumerate(theirs.level_dimensions):
        region = np.asarray(theirs.read_region((0, 0), level, (width, height)))
        assert region[..., 3].min() == 255
        assert np.array_equal(backend.read_level(level, Box(0, 0, height, width)), region[..., :3])
    theirs.close()
    backend.close()


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "user", "target", "level", "box"),
    [
        ("CMU-1-Small-Region.svs", None, 2.0, 0, Box(200, 300, 300, 420)),
        ("TCGA-CR-7395-01A-01-TS1.svs", 0.5, 2.0, 1, Box(700, 900, 895, 1115)),
        ("TCGA-CR-7395-01A-01-TS1.svs", 0.5, 0.9, 0, Box(1900, 100, 2000, 180)),
        ("multiframe_camelyon_challenge_image.dcm", None, 100.0, 0, Box(-3, 40, 60, 400)),
        ("openslide-python-fixtures/boxes.tiff", 0.25, 1.1, 2, Box(0, 0, 57, 69)),
    ],
)
def test_real_slides_are_averaged_exactly(
    data_dir: Path, name: str, user: float | None, target: float, level: int, box: Box
) -> None:
    path, origin = data_dir / "wsi" / name, (7, 12)
    theirs = openslide.OpenSlide(path)
    image = np.asarray(theirs.read_region((0, 0), level, theirs.level_dimensions[level]))[..., :3]
    theirs.close()
    with open_slide(path, mpp=user) as slide:
        own = slide.require_mpp()
        factor = (target / own.y, target / own.x)
        down = slide.levels[level].downsample_y
        got = slide.read(box, target, origin)
    assert np.abs(got - expected(image, box, factor, origin, down)).max() <= EXACT


@pytest.mark.data
def test_a_level_between_whole_factors_is_the_same_in_any_box(data_dir: Path) -> None:
    """Where OpenSlide must interpolate, it does so on a fixed grid: pixels do not depend on the box."""
    backend = backends.OpenSlideBackend(data_dir / "wsi" / "openslide-python-fixtures" / "boxes.tiff")
    backend._cell = 16
    assert not float(backend._ratios[2]).is_integer()
    height, width = backend.levels[2].shape
    whole = backend.read_level(2, Box(0, 0, height, width))
    for box in (Box(3, 5, 40, 70), Box(17, 33, 18, 34), Box(height - 9, width - 20, height, width)):
        assert np.array_equal(backend.read_level(2, box), whole[box.slices])
    backend.close()


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken.svs", r"not a slide in any known format; give"),
        ("multi-channel-z-series.ome.tif", r"3 channels x 5 z-planes: fluorescence.*8-bit RGB"),
        ("openslide-python-fixtures", r"is a folder; .*\.dcm files of one"),
        ("nowhere.svs", r"no such file; check the path"),
    ],
)
def test_what_is_no_slide_is_refused_in_one_line(data_dir: Path, name: str, message: str) -> None:
    with pytest.raises(SlideError, match=message) as caught:
        open_slide(data_dir / "wsi" / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.data
@pytest.mark.parametrize("by_openslide", [False, True])
def test_unreadable_pixels_fail_when_read(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, *, by_openslide: bool
) -> None:
    if by_openslide:
        monkeypatch.setattr(backends, "aperio_pages", lambda path, shapes: [])
    with open_slide(data_dir / "wsi" / "openslide-python-fixtures" / "unreadable.svs") as slide:
        assert slide.require_mpp().x == 0.499
        with pytest.raises(
            SlideError, match=r"unreadable\.svs: pixels cannot be read at y 0-16.*damaged"
        ) as caught:
            slide.read(Box(0, 0, 4, 4), 2.0)
        assert "\n" not in str(caught.value)


# --- Averages.


@settings(deadline=None, max_examples=80)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), rows=st.integers(1, 12), columns=st.integers(1, 12),
    step_y=st.floats(0.2, 9), step_x=st.floats(0.2, 9), start_y=st.floats(-9, 40), start_x=st.floats(-9, 40),
)  # fmt: skip
def test_area_average_equals_the_oracle(
    height: int, width: int, rows: int, columns: int,
    step_y: float, step_x: float, start_y: float, start_x: float,
) -> None:  # fmt: skip
    image = noise(height, width)
    y, x = start_y + np.arange(rows + 1) * step_y, start_x + np.arange(columns + 1) * step_x
    got = area_average(lambda box: image[box.slices], image.shape[:2], y, x)
    assert np.abs(got - averaged(image, y, x)).max() <= EXACT


@pytest.mark.parametrize(
    ("step_y", "step_x"), [(2, 2), (3, 3), (4, 4), (8, 8), (16, 16), (5, 4), (1, 3), (256, 2)]
)
def test_whole_steps_take_a_shorter_way_to_the_very_same_bytes(
    monkeypatch: pytest.MonkeyPatch, step_y: int, step_x: int
) -> None:
    """Else neighbouring boxes, of which one lies over the slide's edge, would differ."""
    rng = np.random.default_rng(step_y)
    for spread in (256, 2):  # of two values that differ by one, half of the means lie between two bytes
        image = (rng.integers(0, spread, (31 * step_y, 23 * step_x, 3)) + 100 * (spread == 2)).astype(
            np.uint8
        )
        y, x = np.arange(32.0) * step_y, np.arange(24.0) * step_x
        short = area_average(lambda box, image=image: image[box.slices], image.shape[:2], y, x)
        with monkeypatch.context() as patch:
            patch.setattr(reader, "_whole_step", lambda *_: 0)
            longer = area_average(lambda box, image=image: image[box.slices], image.shape[:2], y, x)
        assert (short == longer).all()


@settings(deadline=None, max_examples=60)
@given(
    mpp=st.one_of(st.floats(0.2, 6.0), st.sampled_from([0.25, 0.5, 1.0, 2.0])),
    origin=st.tuples(st.integers(-20, 60), st.integers(-20, 60)),
    corner=st.tuples(st.integers(-6, 30), st.integers(-6, 30)),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    cut=st.tuples(st.integers(1, 59), st.integers(1, 59)),
    chunk=st.sampled_from([1, 300, 2**20]),
)
def test_read_equals_the_oracle_however_it_is_cut(
    uneven: Path, mpp: float, origin: tuple[int, int], corner: tuple[int, int], size: tuple[int, int],
    cut: tuple[int, int], chunk: int,
) -> None:  # fmt: skip
    box = Box.at(*corner, *size)
    with pytest.MonkeyPatch.context() as patch, open_slide(uneven) as slide:
        whole = slide.read(box, mpp, origin)
        patch.setattr(reader, "CHUNK_PX", chunk)
        pieces = np.zeros_like(whole)
        middle = (box.top + min(cut[0], box.height), box.left + min(cut[1], box.width))
        for top, bottom in ((box.top, middle[0]), (middle[0], box.bottom)):
            for left, right in ((box.left, middle[1]), (middle[1], box.right)):
                piece = Box(top, left, bottom, right)
                pieces[piece.relative_to(box).slices] = slide.read(piece, mpp, origin)
    assert np.array_equal(whole, pieces)
    factor = (mpp / 0.5, mpp / 0.25)
    assert np.abs(whole - expected(noise(97, 131), box, factor, origin)).max() <= EXACT


def test_the_nearest_finer_level_is_used(tmp_path: Path) -> None:
    path = tmp_path / "pyramid.tif"
    with tifffile.TiffWriter(path) as writer:
        for level in range(4):
            flat = np.full((800 >> level, 640 >> level, 3), 10 * level, np.uint8)
            writer.write(flat, photometric="rgb", tile=(64, 64), subfiletype=int(level > 0))
    with open_slide(path, mpp=0.25) as slide:
        assert [level.downsample_y for level in slide.levels] == [1, 2, 4, 8]
        for target, value in (
            (0.1, 0),
            (0.25, 0),
            (0.49, 0),
            (0.498, 10),
            (0.5, 10),
            (1.9, 20),
            (2.0, 30),
            (9, 30),
        ):
            assert (slide.read(Box(0, 0, 2, 2), target) == value).all(), target


def test_odd_sides_do_not_shift_a_level() -> None:
    levels = facts.make_levels([(45_999, 30_001), (11_499, 7_500), (2_874, 1_875)])
    assert [(level.downsample_y, level.downsample_x) for level in levels] == [(1, 1), (4, 4), (16, 16)]
    odd = facts.make_levels([(1000, 1000), (370, 370)])[1]
    assert math.isclose(odd.downsample_y, 1000 / 370)


def test_beyond_the_slide_is_glass(uneven: Path) -> None:
    with open_slide(uneven) as slide:
        assert (slide.read(Box(1000, 1000, 1003, 1004), 2.0) == GLASS).all()
        assert (slide.read(Box(0, 0, 3, 4), 2.0, (-1000, 0)) == GLASS).all()
        assert slide.read(Box(5, 5, 5, 9), 2.0).shape == (0, 4, 3)


def test_extreme_resolutions_are_refused(uneven: Path) -> None:
    with open_slide(uneven) as slide:
        with pytest.raises(SlideError, match=r"more than 1024 x 1024.*at most 256 um"):
            slide.read(Box(0, 0, 1, 1), 600.0)
        for bad in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(SlideError, match="ask for a positive number"):
                slide.read(Box(0, 0, 1, 1), bad)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(SlideError, match="give a positive number"):
            open_slide(uneven, mpp=bad)


# --- TIFF of all kinds.


@pytest.mark.parametrize("kind", KINDS)
def test_any_plain_tiff_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    path = tmp_path / f"{kind}.tif"
    tifffile.imwrite(path, _as_stored(noise(150, 210), kind), photometric="rgb", metadata=None, **KINDS[kind])
    image = _as_shown(tifffile.imread(path), kind)
    monkeypatch.setattr(tiff, "ROWS_BYTES", 4000)
    with open_slide(path, mpp=0.25) as slide:
        assert slide.shape_l0 == (150, 210)
        assert np.array_equal(slide.read(Box(0, 0, 150, 210), 0.25), image)
        box = Box(3, 5, 20, 24)
        assert np.abs(slide.read(box, 1.7) - expected(image, box, (6.8, 6.8), (0, 0))).max() <= EXACT


def _as_stored(image: NDArray[np.uint8], kind: str) -> NDArray[np.uint8]:
    return np.moveaxis(image, 2, 0) if kind.startswith("planar") else image


def _as_shown(image: NDArray[np.uint8], kind: str) -> NDArray[np.uint8]:
    return np.moveaxis(image, 0, 2) if kind.startswith("planar") else image


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_grey_tiff_is_shown_as_rgb(tmp_path: Path, photometric: str) -> None:
    path, grey = tmp_path / "grey.tif", noise(40, 50, 1)[..., 0]
    tifffile.imwrite(path, grey, photometric=photometric, rowsperstrip=8)
    with open_slide(path, mpp=1.0) as slide:
        assert slide.facts()["pixels"] == "8-bit grey, shown as RGB"
        shown = 255 - grey if photometric == "miniswhite" else grey
        assert np.array_equal(slide.read(Box(0, 0, 40, 50), 1.0), np.stack([shown] * 3, axis=2))


def test_transparent_tiff_lies_on_glass(tmp_path: Path) -> None:
    path, image = tmp_path / "alpha.tif", noise(40, 50, 4)
    image[:20, :, 3], image[20:, :, 3] = 0, 255
    tifffile.imwrite(path, image, photometric="rgb", extrasamples=["unassalpha"], tile=(16, 16))
    with open_slide(path, mpp=1.0) as slide:
        got = slide.read(Box(0, 0, 40, 50), 1.0)
    assert (got[:20] == GLASS).all()
    assert np.array_equal(got[20:], image[20:, :, :3])


def test_missing_tiles_are_glass(tmp_path: Path) -> None:
    path, image = tmp_path / "sparse.tif", noise(64, 64)
    tiles = [image[:32, :32].tobytes(), b"", b"", image[32:, 32:].tobytes()]
    options: dict[str, Any] = {
        "shape": (64, 64, 3),
        "dtype": np.uint8,
        "photometric": "rgb",
        "metadata": None,
    }
    tifffile.imwrite(path, iter(tiles), tile=(32, 32), compression=None, **options)
    with open_slide(path, mpp=1.0) as slide:
        got = slide.read(Box(0, 0, 64, 64), 1.0)
    assert np.array_equal(got[:32, :32], image[:32, :32])
    assert np.array_equal(got[32:, 32:], image[32:, 32:])
    assert (got[:32, 32:] == GLASS).all()


def test_ome_tiff_with_its_pyramid(tmp_path: Path) -> None:
    path = tmp_path / "slide.ome.tif"
    sizes = {"PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}
    image = write_ome(path, metadata=sizes)
    with open_slide(path) as slide:
        assert slide.vendor == "ome-tiff"
        assert [level.shape for level in slide.levels] == [(300, 420), (150, 210), (75, 105)]
        assert slide.mpp == Mpp(0.5, 0.25, "slide")
        box = Box(2, 3, 30, 40)
        got = slide.read(box, 1.5)  # 3 pixels down and 6 across: level 1 serves
        assert np.abs(got - expected(image[::2, ::2], box, (3, 6), (0, 0), 2)).max() <= EXACT


def test_ome_tiff_with_a_label_beside_the_slide(tmp_path: Path) -> None:
    path = tmp_path / "labelled.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        writer.write(noise(20, 30), photometric="rgb", metadata={"axes": "YXS", "Name": "Label image"})
        writer.write(noise(80, 90), photometric="rgb", metadata={"axes": "YXS", "Name": "scan"})
    with open_slide(path, mpp=1.0) as slide:
        assert np.array_equal(slide.read(Box(0, 0, 80, 90), 1.0), noise(80, 90))


def _two_series(path: Path) -> None:
    with tifffile.TiffWriter(path, ome=True) as writer:
        for name in ("one", "two"):
            writer.write(noise(64, 64), photometric="rgb", metadata={"axes": "YXS", "Name": name})


def _two_pages(path: Path) -> None:
    with tifffile.TiffWriter(path) as writer:
        writer.write(noise(64, 64), photometric="rgb", metadata=None)
        writer.write(noise(64, 80), photometric="rgb", metadata=None)


def _writes(image: NDArray[Any], **options: Any) -> Callable[[Path], None]:
    return lambda path: tifffile.imwrite(path, image, **options)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "channels.ome.tif": (
        _writes(noise(64, 64), photometric="minisblack", metadata={"axes": "CYX"}), "64 channels: fluorescence",
    ),
    "stack.ome.tif": (
        _writes(noise(32, 64)[..., 0].reshape(2, 16, 64), photometric="minisblack", metadata={"axes": "ZYX"}),
        "2 z-planes: fluorescence, multi-channel or a stack",
    ),
    "one-channel.ome.tif": (
        _writes(noise(64, 64)[..., 0], photometric="minisblack", metadata={"axes": "YX"}), "one grey channel",
    ),
    "series.ome.tif": (_two_series, r"holds 2 images \(one, two\)"),
    "stack.tif": (_writes(noise(32, 64).reshape(2, 16, 64, 3), photometric="rgb"), "holds 2 "),
    "pages.tif": (_two_pages, r"several images \(80 x 64 and 64 x 64 px\)"),
    "deep-grey.tif": (_writes(noise(64, 64)[..., 0].astype(np.uint16)), "16-bit unsigned samples.*8-bit RGB"),
    "deep-rgb.tif": (_writes(noise(64, 64).astype(np.uint16), photometric="rgb"), "16-bit unsigned samples"),
    "float.tif": (_writes(noise(64, 64)[..., 0].astype(np.float32)), "32-bit floating-point samples"),
    "cmyk.tif": (_writes(noise(64, 64, 4), photometric="separated"), "pixels of kind SEPARATED"),
    "five.tif": (
        _writes(noise(64, 64, 5), photometric="rgb", planarconfig="contig", extrasamples=[0, 0]), "5 channels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_one_plane_of_8_bit_rgb_is_refused(tmp_path: Path, name: str) -> None:
    write, message = REFUSED[name]
    write(tmp_path / name)
    with pytest.raises(SlideError, match=message) as caught:
        open_slide(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_giant_strip_is_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "one-strip.tif"
    tifffile.imwrite(path, noise(150, 210), photometric="rgb", compression="lzw")
    monkeypatch.setattr(tiff, "MAX_SEGMENT_BYTES", 50_000)
    with pytest.raises(SlideError, match=r"210 x 150 px, too large to decode; save it as a tiled TIFF"):
        open_slide(path)


@pytest.mark.parametrize(
    ("options", "mpp"),
    [
        ({"resolution": (per_cm(0.2525), per_cm(0.26)), "resolutionunit": "CENTIMETER"}, (0.26, 0.2525)),
        ({"resolution": (50_800, 50_800), "resolutionunit": "INCH"}, (0.5, 0.5)),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),
        ({"resolution": (300, 300), "resolutionunit": "INCH"}, None),
        ({"resolution": (1, 1), "resolutionunit": "CENTIMETER"}, None),
        ({"resolution": (per_cm(0.5), per_cm(0.5)), "resolutionunit": "NONE"}, None),
        ({}, None),
    ],
)
def test_resolution_tags_count_where_they_can_be_a_slides(
    tmp_path: Path, options: dict[str, Any], mpp: tuple[float, float] | None
) -> None:
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, noise(32, 32), photometric="rgb", metadata=None, **options)
    with open_slide(path) as slide:
        if mpp is None:
            assert slide.mpp is None
        else:
            assert slide.mpp is not None
            assert slide.mpp.source == "resolution tags"
            assert (slide.mpp.y, slide.mpp.x) == pytest.approx(mpp, rel=1e-6)
    with open_slide(path, mpp=0.3) as slide:
        assert slide.mpp == Mpp(0.3, 0.3, "user")


def test_mpp_from_the_slide_goes_before_tags_and_those_before_the_objective(tmp_path: Path) -> None:
    tags = {"tiff.XResolution": "20000", "tiff.YResolution": "20000", "tiff.ResolutionUnit": "centimeter"}
    own = {"openslide.mpp-x": "0.2525", "openslide.mpp-y": "0.26"}
    assert facts.mpp_from_properties({**tags, **own}) == Mpp(0.26, 0.2525, "slide")
    assert facts.mpp_from_properties({**tags, "openslide.mpp-x": "0", "openslide.mpp-y": "nan"}) == Mpp(
        0.5, 0.5, "resolution tags"
    )
    path = tmp_path / "slide.tif"
    tifffile.imwrite(path, noise(32, 32), photometric="rgb")
    with pytest.MonkeyPatch.context() as patch, open_slide(path) as slide:
        assert slide.mpp is None
        patch.setattr(slide, "objective_power", 40.0)
        assert slide._find_mpp() == Mpp(0.25, 0.25, "objective power")


# --- PNG and JPEG.


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("RGBA", 4), ("L", 1), ("LA", 2)])
def test_png_as_a_slide(tmp_path: Path, mode: str, channels: int) -> None:
    path, image = tmp_path / "slide.png", noise(60, 70, channels)
    if channels in (2, 4):
        image[:30, :, -1], image[30:, :, -1] = 0, 255
    Image.fromarray(image[..., 0] if channels == 1 else image, mode=None).save(path)
    colour = image[..., :3] if channels > 2 else np.repeat(image[..., :1], 3, axis=2)
    if channels in (2, 4):
        colour = colour.copy()
        colour[:30] = GLASS
    with open_slide(path, mpp=0.5) as slide:
        assert np.array_equal(slide.read(Box(0, 0, 60, 70), 0.5), colour)


def test_jpeg_as_a_slide(tmp_path: Path) -> None:
    path = tmp_path / "slide.jpg"
    Image.fromarray(noise(60, 70)).save(path, quality=90)
    with open_slide(path) as slide, Image.open(path) as image:
        assert (slide.vendor, slide.mpp) == ("jpeg", None)
        decoded = np.asarray(image)
    with open_slide(path, mpp=0.5) as slide:
        box = Box(1, 1, 20, 20)
        assert np.abs(slide.read(box, 1.4) - expected(decoded, box, (2.8, 2.8), (0, 0))).max() <= EXACT


def test_images_that_cannot_serve_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep, large, cmyk = tmp_path / "deep.png", tmp_path / "large.png", tmp_path / "cmyk.jpg"
    Image.fromarray(noise(20, 20, 1)[..., 0].astype(np.uint16)).save(deep)
    Image.fromarray(noise(20, 21)).save(large)
    Image.fromarray(noise(20, 20)).convert("CMYK").save(cmyk)
    monkeypatch.setattr(backends, "MAX_IMAGE_PX", 400)
    for path, message in (
        (deep, "16-bit samples"),
        (large, "21 x 20 px, too large for PNG"),
        (cmyk, "kind CMYK"),
    ):
        with pytest.raises(SlideError, match=message):
            open_slide(path)


# --- OpenSlide's own ways.


def test_transparent_pixels_of_openslide_lie_on_glass(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MRXS has them where nothing was scanned: alpha 0 over black."""
    backend = backends.OpenSlideBackend(data_dir / "wsi" / "highdicom_sm_image.dcm")
    rgba = np.zeros((8, 10, 4), np.uint8)
    rgba[4:] = (200, 100, 50, 255)
    rgba[4, 0] = (200, 100, 50, 51)
    monkeypatch.setattr(openslide.OpenSlide, "read_region", lambda *_: Image.fromarray(rgba))
    got = backend.read_level(0, Box(0, 0, 8, 10))
    assert (got[:4] == GLASS).all()
    assert (got[5:] == (200, 100, 50)).all()
    assert np.array_equal(got[4, 0], np.rint(np.array([200, 100, 50]) / 5 + np.array(GLASS) * 4 / 5))
    backend.close()


def test_bounds_are_the_scanned_part() -> None:
    keys = ("x", "y", "width", "height")
    told = {
        f"openslide.bounds-{key}": value for key, value in zip(keys, ("20", "10", "300", "40"), strict=True)
    }
    assert facts.bounds_from_properties(told, (400, 400)) == Box(10, 20, 50, 320)
    assert facts.bounds_from_properties(told, (400, 100)) == Box(10, 20, 50, 100)
    assert facts.bounds_from_properties({}, (400, 300)) == Box(0, 0, 400, 300)
    assert facts.bounds_from_properties({**told, "openslide.bounds-x": "junk"}, (9, 9)) == Box(0, 0, 9, 9)


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
