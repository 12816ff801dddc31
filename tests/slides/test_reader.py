"""Slides in: right facts from every real file, and exact averages at any resolution."""

import json
import math
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from holoslide.errors import SlideError
from holoslide.geometry import Box
from holoslide.slides import backends, facts, reader
from holoslide.slides.facts import GLASS, Mpp
from holoslide.slides.reader import area_average, open_slide
from tests.slides.reading import EXACT, averaged, expected, noise

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
