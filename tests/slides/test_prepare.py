"""Making rasters: where they lie on the slide, when they are made again, and what no fault may do to them."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import math
import os
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from holoslide.errors import ConfigError, SlideError
from holoslide.geometry import Box
from holoslide.slides import claim, pyramid
from holoslide.slides import prepare as prepare_module
from holoslide.slides.facts import GLASS
from holoslide.slides.prepare import (
    PrepareConfig,
    PrepareJob,
    PrepareResult,
    _pool,
    prepare,
    prepare_slide,
)
from holoslide.slides.pyramid import halve
from holoslide.slides.raster import Raster
from holoslide.slides.reader import Reader, open_slide
from holoslide.slides.tiff import TiffPixels
from holoslide.slides.tissue import TissueConfig
from tests.slides.drawn import blobs, paint, write_slide

MARK = (30, 40, 120)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """900 x 1100 px at 1 um/px."""
    path = tmp_path_factory.mktemp("slides") / "one.tif"
    return write_slide(path, paint(blobs((900, 1100))), 1.0)


def made(slide: Path, folder: Path, *, jpeg_quality: int = 90) -> PrepareResult:
    return prepare_slide(PrepareJob("one", slide), folder, PrepareConfig(jpeg_quality=jpeg_quality))


def digest(path: Path | None) -> str:
    assert path is not None
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- Where it lies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("slide_mpp", [0.499, 1.0, 1.37])
@pytest.mark.parametrize("mpp", [2.0, 3.1])
def test_a_place_on_the_raster_is_the_same_place_on_the_slide(
    tmp_path: Path, slide_mpp: float, mpp: float
) -> None:
    """A small mark on the tissue is found, by origin and scale, within a raster pixel."""
    rgb = paint(blobs((1500, 1700), seed=3, reach=0.3), grain=2)
    centre_l0 = np.array((741.0, 893.0))
    y, x = np.mgrid[:1500, :1700] - (centre_l0 - 0.5)[:, None, None]
    rgb[np.hypot(y, x) < 14] = MARK
    path = write_slide(tmp_path / "s.tif", rgb, slide_mpp)
    result = prepare_slide(PrepareJob("one", path, slide_mpp), tmp_path, PrepareConfig(mpp=mpp))
    assert result.path is not None
    with Raster.open(result.path) as raster:
        pixels = raster.read(Box(0, 0, *raster.shape_px)).astype(float)
        dark = np.clip(90 - pixels[..., 0], 0, None)
        rows, columns = np.indices(dark.shape)
        found_px = np.array(((rows + 0.5) * dark, (columns + 0.5) * dark)).sum((1, 2)) / dark.sum()
        found_l0 = np.array(raster.origin_l0) + found_px * raster.l0_per_px
        assert raster.l0_per_px == pytest.approx((mpp / slide_mpp,) * 2)
    assert np.abs(found_l0 - centre_l0).max() < mpp / slide_mpp


def test_pixels_that_are_not_square_keep_their_place(tmp_path: Path) -> None:
    tissue = np.zeros((1000, 1000), np.bool_)
    tissue[320:640, 480:800] = True  # at 1 um/px down and 1.6 across: whole thumbnail pixels
    path = write_slide(tmp_path / "s.tif", paint(tissue), 1.0, 1.6)
    result = made(path, tmp_path)
    assert result.path is not None
    with Raster.open(result.path) as raster, open_slide(path) as reader:
        assert (reader.require_mpp().y, reader.require_mpp().x) == pytest.approx((1.0, 1.6))
        assert raster.l0_per_px == pytest.approx((2.0, 1.25))
        ends = [
            o + n * p for o, n, p in zip(raster.origin_l0, raster.shape_px, raster.l0_per_px, strict=True)
        ]
        np.testing.assert_allclose((*raster.origin_l0, *ends), (320, 480, 640, 800), atol=17)


def test_pixels_are_the_readers(slide: Path, tmp_path: Path) -> None:
    result = made(slide, tmp_path, jpeg_quality=100)
    assert result.path is not None
    with Raster.open(result.path) as raster, open_slide(slide) as reader:
        everything = Box(0, 0, *raster.shape_px)
        expected = reader.read(everything, 2.0, raster.origin_l0).astype(int)
        tissue = raster.mask.repeat(8, 0).repeat(8, 1)[: raster.shape_px[0], : raster.shape_px[1]]
        got = raster.read(everything)
        assert np.abs(got.astype(int) - expected)[tissue].mean() < 1
        assert (got[~tissue] == GLASS).all()


def test_the_raster_is_cut_to_the_tissue(tmp_path: Path) -> None:
    tissue = np.zeros((1000, 1200), np.bool_)
    tissue[303:611, 405:817] = True
    path = write_slide(tmp_path / "s.tif", paint(tissue), 1.0)
    result = made(path, tmp_path)
    assert result.path is not None
    with Raster.open(result.path) as raster:
        box = (
            *raster.origin_l0,
            *(o + 2 * n for o, n in zip(raster.origin_l0, raster.shape_px, strict=True)),
        )
        for got, true, low, high in zip(
            box, (303, 405, 611, 817), (24, 24, 0, 0), (0, 0, 32, 32), strict=True
        ):
            assert true - low <= got <= true + high
        assert raster.mask[0].any()
        assert raster.mask[-1].any()
        assert raster.mask[:, 0].any()
        assert raster.mask[:, -1].any()


def test_blank_margin_changes_only_the_origin(tmp_path: Path) -> None:
    """Where the margin is whole thumbnail pixels, the raster is the same to the last pixel."""
    rgb = paint(blobs((600, 700)), noise=0)
    wide = np.full((600 + 160, 700 + 240, 3), 244, np.uint8)
    wide[80:-80, 120:-120] = rgb
    rasters = []
    (tmp_path / "out").mkdir()
    for name, pixels in (("narrow", rgb), ("wide", wide)):
        path = write_slide(tmp_path / f"{name}.tif", pixels, 1.0)
        result = prepare_slide(PrepareJob(name, path), tmp_path / "out", PrepareConfig())
        assert result.path is not None
        rasters.append(Raster.open(result.path))
    a, b = rasters
    assert a.shape_px == b.shape_px
    assert (b.origin_l0[0] - a.origin_l0[0], b.origin_l0[1] - a.origin_l0[1]) == (80, 120)
    np.testing.assert_array_equal(a.mask, b.mask)
    np.testing.assert_array_equal(a.read(Box(0, 0, *a.shape_px)), b.read(Box(0, 0, *b.shape_px)))


def test_the_scanned_part_bounds_the_raster(slide: Path, tmp_path: Path) -> None:
    """As MRXS has it: the raster keeps to the bounds, and its origin counts from level 0's own corner."""
    bounds = Box(250, 300, 700, 800)

    def bounded(path: Path, **more: Any) -> Reader:
        reader = open_slide(path, **more)
        reader.bounds_l0 = bounds
        return reader

    with patch.object(prepare_module, "open_slide", bounded):
        result = made(slide, tmp_path)
    assert result.path is not None
    with Raster.open(result.path) as raster, open_slide(slide) as reader:
        top, left = raster.origin_l0
        assert bounds.top <= top
        assert bounds.left <= left
        assert top + 2 * raster.shape_px[0] <= bounds.bottom + 1
        assert left + 2 * raster.shape_px[1] <= bounds.right + 1
        assert raster.record.bounds_l0 == (250, 300, 700, 800)
        box = Box(0, 0, *raster.shape_px)
        tissue = raster.mask.repeat(8, 0).repeat(8, 1)[: box.bottom, : box.right]
        difference = raster.read(box).astype(int) - reader.read(box, 2.0, (top, left))
        assert np.abs(difference)[tissue].mean() < 6


def test_a_slide_of_nothing_but_tissue_is_taken_whole(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "s.tif", paint(np.ones((501, 603), np.bool_)), 1.0)
    result = made(path, tmp_path)
    assert result.path is not None
    with Raster.open(result.path) as raster:
        assert raster.origin_l0 == (0, 0)
        assert raster.shape_px == (math.ceil(501 / 2), math.ceil(603 / 2))
        assert raster.mask.all()
        assert raster.mask.shape == (32, 38)
        assert raster.tissue_px == 251 * 302


edges = st.lists(st.floats(0.3, 4), min_size=1, max_size=8).map(lambda steps: np.cumsum([0.0, *steps]))


@given(st.data(), edges, edges)
def test_a_cell_is_tissue_if_any_thumbnail_pixel_under_it_is(
    data: st.DataObject, y: NDArray[np.float64], x: NDArray[np.float64]
) -> None:
    height, width = max(1, math.floor(y[-1])), max(1, math.floor(x[-1]))
    bits = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(bits, np.bool_).reshape(height, width)
    pooled = _pool(mask, y, x)
    for row in range(len(y) - 1):
        for column in range(len(x) - 1):
            top, left = (min(math.floor(e + 1e-6), n - 1) for e, n in ((y[row], height), (x[column], width)))
            bottom, right = math.ceil(y[row + 1] - 1e-6), math.ceil(x[column + 1] - 1e-6)
            assert pooled[row, column] == mask[top:bottom, left:right].any()


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_halving_is_the_rounded_mean_of_four(height: int, width: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    half = halve(pixels)
    assert half.shape == (-(-height // 2), -(-width // 2), 3)
    for row, column in np.ndindex(half.shape[:2]):
        rows = [min(2 * row + n, height - 1) for n in (0, 1)]
        columns = [min(2 * column + n, width - 1) for n in (0, 1)]
        mean = pixels[np.ix_(rows, columns)].astype(float).mean(axis=(0, 1))
        assert (half[row, column] == np.floor(mean + 0.5)).all()


@settings(deadline=None, max_examples=25)
@given(mpp=st.floats(0.1, 30), cell_um=st.floats(1, 200))
def test_a_mask_cell_is_whole_jpeg_blocks(mpp: float, cell_um: float) -> None:
    cell_px = PrepareConfig(mpp=mpp, mask_cell_um=cell_um).mask_cell_px
    assert cell_px % 8 == 0
    assert cell_px >= 8
    assert cell_px == 8 or abs(cell_px * mpp - cell_um) <= 4 * mpp + 1e-6


# --- What is refused --------------------------------------------------------------------------------


def test_what_is_advised_holds_where_a_model_is_given_too(slide: Path, tmp_path: Path) -> None:
    """`predict` has neither --mpp nor --set: its slides are prepared as the model's were."""
    with pytest.raises(
        SlideError, match=r"prepare with --mpp 1 or more, for a model trained so, or leave it"
    ):
        prepare_slide(PrepareJob("one", slide), tmp_path, PrepareConfig(mpp=0.5))
    glass = write_slide(tmp_path / "glass.tif", paint(np.zeros((600, 600), np.bool_)), 1.0)
    with pytest.raises(SlideError, match=r"draw its tissue \(--masks\), or before training lower prepare\."):
        made(glass, tmp_path)


def test_what_cannot_be_prepared_says_why_and_what_to_do(slide: Path, tmp_path: Path) -> None:
    glass = write_slide(tmp_path / "glass.tif", paint(np.zeros((600, 600), np.bool_)), 1.0)
    with pytest.raises(SlideError, match=r"glass\.tif: no tissue found; .*least_contrast.*or leave it out"):
        made(glass, tmp_path)
    with pytest.raises(
        SlideError, match=r"has 1 um per pixel, too coarse for a raster at 0\.5; prepare with --mpp 1"
    ):
        prepare_slide(PrepareJob("one", slide), tmp_path, PrepareConfig(mpp=0.5))
    with pytest.raises(SlideError, match=r"'a/b': is a slide id that cannot name a file"):
        prepare_slide(PrepareJob("a/b", slide), tmp_path, PrepareConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["glass.tif"]


def test_a_slide_a_little_coarser_than_the_raster_serves(slide: Path, tmp_path: Path) -> None:
    assert prepare_slide(PrepareJob("one", slide), tmp_path, PrepareConfig(mpp=0.95)).status == "made"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mpp": 0.0}, "prepare.mpp: 0.0 um cannot be"),
        ({"mask_cell_um": math.inf}, "prepare.mask_cell_um: inf um cannot be"),
        ({"jpeg_quality": 74}, "prepare.jpeg_quality: 74 is out of range: below 75 glass would change"),
    ],
)
def test_settings_are_checked(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrepareConfig(**settings)  # type: ignore[arg-type]


def test_settings_come_from_plain_values() -> None:
    adapter = pydantic.TypeAdapter(PrepareConfig)
    config = adapter.validate_python({"mpp": 4, "tissue": {"speck_um2": 10}})
    assert config == PrepareConfig(mpp=4.0, tissue=TissueConfig(speck_um2=10.0))
    assert adapter.validate_python(adapter.dump_python(config)) == config


# --- Made again, or not --------------------------------------------------------------------------------


def test_a_raster_is_reused_only_if_its_recipe_is_the_same(slide: Path, tmp_path: Path) -> None:
    copy = tmp_path / "slide.tif"
    copy.write_bytes(slide.read_bytes())
    job, config = PrepareJob("one", copy), PrepareConfig()
    first = prepare_slide(job, tmp_path, config)
    assert first.status == "made"
    before = first.path.stat().st_mtime_ns  # type: ignore[union-attr]
    assert prepare_slide(job, tmp_path, config).status == "reused"
    assert first.path.stat().st_mtime_ns == before  # type: ignore[union-attr]

    moved = tmp_path / "moved.tif"
    copy.rename(moved)
    job = dataclasses.replace(job, path=moved)
    assert prepare_slide(job, tmp_path, config).status == "reused"  # it is the content that counts

    for changed in (
        PrepareConfig(mpp=2.5),
        PrepareConfig(jpeg_quality=91),
        PrepareConfig(mask_cell_um=32),
        PrepareConfig(tissue=TissueConfig(speck_um2=1.0)),
    ):
        assert prepare_slide(job, tmp_path, changed).status == "made"
        assert prepare_slide(job, tmp_path, changed).status == "reused"
    assert prepare_slide(job, tmp_path, config).status == "made"
    given = dataclasses.replace(job, mpp=1.0)
    assert prepare_slide(given, tmp_path, config).status == "made"  # the same mpp, from another source
    moved.write_bytes(moved.read_bytes() + b"\0")
    assert prepare_slide(given, tmp_path, config).status == "made"
    with patch.object(prepare_module, "ALGORITHM", 99):
        assert prepare_slide(given, tmp_path, config).status == "made"


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_raster_is_made_again(slide: Path, tmp_path: Path, damage: str) -> None:
    path = made(slide, tmp_path).path
    assert path is not None
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "other": b"something else"}[damage])
    assert made(slide, tmp_path).status == "made"
    assert path.read_bytes() == whole


def test_the_bytes_depend_on_the_recipe_alone(slide: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = made(slide, tmp_path / "a")
    time.sleep(1.1)  # TIFF counts time in seconds
    job = PrepareJob("one", slide)
    (second,) = prepare([job], tmp_path / "b", PrepareConfig(mpp=2))
    assert digest(first.path) == digest(second.path)


# --- Faults --------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_leaves_nothing(slide: Path, tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        patch.object(claim.os, "fsync", side_effect=full),
        pytest.raises(
            SlideError, match=r"one\.tif: cannot be written \(No space left on device\); make room"
        ),
    ):
        made(slide, tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- Size --------------------------------------------------------------------------------------------------


def test_glass_is_never_read_and_strips_are_narrow(tmp_path: Path) -> None:
    tissue = np.zeros((1600, 6000), np.bool_)
    tissue[100:500, 100:500] = tissue[1000:1400, 5400:5800] = True
    path = write_slide(tmp_path / "s.tif", paint(tissue), 1.0)
    boxes: list[Box] = []

    def spy(self: Reader, box: Box, mpp: float, *rest: Any, **more: Any) -> NDArray[np.uint8]:
        if mpp == 1.0:
            boxes.append(box)
        return read(self, box, mpp, *rest, **more)

    read = Reader.read
    with patch.object(Reader, "read", spy):
        prepare_slide(PrepareJob("one", path), tmp_path, PrepareConfig(mpp=1.0))
    assert max(box.height for box in boxes) <= 256
    assert sum(box.area for box in boxes) < 0.25 * 1300 * 5700


def test_threads_change_nothing(slide: Path, tmp_path: Path) -> None:
    """Nor do more workers than slides, which become threads; each part of a box is read by one of them."""
    contents = {made(slide, tmp_path).path.read_bytes()}  # type: ignore[union-attr]
    readers: set[int] = set()

    def spy(self: TiffPixels, box: Box) -> NDArray[np.uint8]:
        readers.add(threading.get_ident())
        return read(self, box)

    read = TiffPixels.read
    with patch.object(TiffPixels, "read", spy):
        for threads in (2, 5):
            folder = tmp_path / str(threads)
            folder.mkdir()
            result = prepare_slide(PrepareJob("one", slide), folder, PrepareConfig(), threads=threads)
            assert result.path is not None
            contents.add(result.path.read_bytes())
    assert len(readers) > 2
    (result,) = prepare([PrepareJob("one", slide)], tmp_path / "many", PrepareConfig(), workers=4)
    assert result.path is not None
    contents.add(result.path.read_bytes())
    assert len(contents) == 1


def test_bigtiff_only_where_it_is_needed(slide: Path, tmp_path: Path) -> None:
    def magic(path: Path | None) -> bytes:
        assert path is not None
        return path.read_bytes()[:4]

    assert magic(made(slide, tmp_path).path) == b"II*\0"
    (tmp_path / "big").mkdir()
    with patch.object(pyramid, "CLASSIC_BYTES", 1000):
        big = made(slide, tmp_path / "big")
    assert magic(big.path) == b"II+\0"
    with Raster.open(big.path) as a, Raster.open(tmp_path / "one.tif") as b:  # type: ignore[arg-type]
        np.testing.assert_array_equal(a.read(Box(0, 0, *a.shape_px)), b.read(Box(0, 0, *b.shape_px)))


# --- Real slides ---------------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "mpp", "target"),
    [
        ("CMU-1-Small-Region.svs", None, 2.0),
        ("TCGA-CR-7395-01A-01-TS1.svs", 0.5, 2.0),
        ("multiframe_camelyon_challenge_image.dcm", None, 29.0),
    ],
)
def test_real_slides(data_dir: Path, tmp_path: Path, name: str, mpp: float | None, target: float) -> None:
    path = data_dir / "wsi" / name
    result = prepare_slide(PrepareJob("one", path, mpp), tmp_path, PrepareConfig(mpp=target))
    assert result.path is not None
    with Raster.open(result.path) as raster, open_slide(path, mpp=mpp) as slide:
        box = Box(0, 0, *raster.shape_px)
        cell = raster.mask_cell_px
        tissue = raster.mask.repeat(cell, 0).repeat(cell, 1)[: box.bottom, : box.right]
        got, expected = raster.read(box), slide.read(box, target, raster.origin_l0)
        assert np.abs(got.astype(int) - expected)[tissue].mean() < 5
        assert (got[~tissue] == GLASS).all()
        # what was left out looks like glass: bright and grey
        left_out = expected[~tissue].astype(int)
        assert np.median(np.ptp(left_out, axis=1)) < 12
        assert (left_out.min(axis=1) < 150).mean() < 0.01
    assert prepare_slide(PrepareJob("one", path, mpp), tmp_path, PrepareConfig(mpp=target)).status == "reused"


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("TCGA-CR-7395-01A-01-TS1.svs", "no microns per pixel"),
        ("multiframe_camelyon_challenge_image.dcm", "has 28.97 um per pixel, too coarse for a raster at 2"),
        ("highdicom_sm_image.dcm", "no tissue found"),
        ("broken.svs", "is not a slide"),
        ("multi-channel-z-series.ome.tif", "fluorescence"),
        ("openslide-python-fixtures/unreadable.svs", "pixels cannot be read"),
    ],
)
def test_real_files_that_cannot_be_prepared_are_one_line(
    data_dir: Path, tmp_path: Path, name: str, reason: str
) -> None:
    with pytest.raises(SlideError, match=reason) as caught:
        prepare_slide(PrepareJob("one", data_dir / "wsi" / name), tmp_path, PrepareConfig())
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
