"""Rasters as they are read: against the whole file decoded by tifffile, through OpenSlide, and when damaged."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from holoslide.errors import SlideError
from holoslide.geometry import Box
from holoslide.slides import raster as raster_module
from holoslide.slides.facts import GLASS
from holoslide.slides.prepare import PrepareConfig, PrepareJob, prepare_slide
from holoslide.slides.pyramid import MIN_QUALITY
from holoslide.slides.raster import TILE_PX, VERSION, Raster, RasterRecord
from holoslide.slides.reader import open_slide
from tests.slides.drawn import blobs, paint, write_slide

GOLDEN = Path(__file__).parent / "golden" / "raster-v1.tif"
MPP = 1.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raster of two far pieces of tissue: several tiles, ragged, with tiles of nothing but glass."""
    folder = tmp_path_factory.mktemp("made")
    tissue = np.zeros((1500, 1300), np.bool_)
    tissue[130:437, 90:401] = True
    tissue[900:1403, 701:1210] = blobs((503, 509), reach=0.4)
    slide = write_slide(folder / "slide.tif", paint(tissue), MPP)
    result = prepare_slide(PrepareJob("made", slide), folder, PrepareConfig(mpp=MPP))
    assert result.path is not None
    return result.path


@pytest.fixture
def raster(made: Path) -> Iterator[Raster]:
    with Raster.open(made) as opened:
        yield opened


def whole(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """All of level 0 by tifffile, glass painted by the mask; and the mask in pixels."""
    with tifffile.TiffFile(path) as tiff:
        pixels = tiff.pages[0].asarray()
        packed = np.frombuffer(zlib.decompress(tiff.pages[0].tags[65108].value), np.uint8)
        cell = json.loads(tiff.pages[0].description)["mask_cell_px"]
    rows, columns = (-(-n // cell) for n in pixels.shape[:2])
    mask = np.unpackbits(packed)[: rows * columns].reshape(rows, columns).astype(np.bool_)
    tissue = mask.repeat(cell, 0).repeat(cell, 1)[: pixels.shape[0], : pixels.shape[1]]
    return np.where(tissue[..., None], pixels, np.array(GLASS, np.uint8)), tissue


# --- Reading --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    top=st.integers(-300, 1600),
    left=st.integers(-300, 1500),
    height=st.integers(0, 700),
    width=st.integers(0, 700),
)
def test_any_box_equals_the_whole_decoded_at_once(
    made: Path, top: int, left: int, height: int, width: int
) -> None:
    pixels, _ = whole(made)
    padded = np.full((4000, 4000, 3), GLASS, np.uint8)
    padded[1000 : 1000 + pixels.shape[0], 1000 : 1000 + pixels.shape[1]] = pixels
    with Raster.open(made) as raster:
        box = Box.at(top, left, height, width)
        np.testing.assert_array_equal(raster.read(box), padded[box.shifted(1000, 1000).slices])


def test_only_tiles_with_tissue_under_the_box_are_decoded(raster: Raster) -> None:
    decoded = []
    with patch.object(Raster, "_decode", autospec=True, side_effect=Raster._decode) as spy:
        raster.read(Box(0, 0, *raster.shape_px))
        decoded = [call.args[2] for call in spy.call_args_list]
        across = -(-raster.shape_px[1] // TILE_PX)
        per_tile = TILE_PX // raster.mask_cell_px
        for index in range(across * -(-raster.shape_px[0] // TILE_PX)):
            row, column = divmod(index, across)
            cells = raster.mask[
                row * per_tile : (row + 1) * per_tile, column * per_tile : (column + 1) * per_tile
            ]
            assert (index in decoded) == cells.any()
        assert 0 < len(decoded) < across * -(-raster.shape_px[0] // TILE_PX)
        raster.read(Box(0, 0, *raster.shape_px))
        assert spy.call_count == len(decoded)  # all in the cache


def test_glass_is_glass_whatever_the_tiles_hold(raster: Raster) -> None:
    """The promise is not JPEG's to keep."""
    _, tissue = whole(raster.path)
    noise = np.full((TILE_PX, TILE_PX, 3), 17, np.uint8)
    with patch.object(Raster, "_decode", return_value=noise):
        read = raster.read(Box(0, 0, *raster.shape_px))
    assert (read[~tissue] == GLASS).all()
    assert (read[tissue] == 17).all()


def test_the_cache_is_bounded(raster: Raster) -> None:
    tile_bytes = 3 * TILE_PX**2
    with patch.object(raster_module, "CACHE_BYTES", 2 * tile_bytes):
        raster.read(Box(0, 0, *raster.shape_px))
        assert len(raster._tiles) == 2


def test_threads_share_a_raster(made: Path) -> None:
    pixels, _ = whole(made)
    boxes = [Box.at(y, x, 300, 260) for y in range(0, 900, 90) for x in range(0, 800, 90)]
    with (
        patch.object(raster_module, "CACHE_BYTES", 3 * 3 * TILE_PX**2),
        Raster.open(made) as raster,
        ThreadPoolExecutor(8) as pool,
    ):
        for box, read in zip(boxes, pool.map(raster.read, boxes), strict=True):
            np.testing.assert_array_equal(read, pixels[box.slices])


def test_a_raster_can_be_pickled(raster: Raster) -> None:
    box = Box(0, 0, 200, 200)
    with pickle.loads(pickle.dumps(raster)) as other:
        np.testing.assert_array_equal(other.read(box), raster.read(box))


def _send(raster: Raster, box: Box, connection: multiprocessing.connection.Connection) -> None:
    connection.send(raster.read(box))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 warns of forks with threads about
def test_a_raster_can_be_read_after_a_fork(raster: Raster) -> None:
    box = Box(0, 0, 300, 300)
    expected = raster.read(box)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_send, args=(raster, box, theirs))
    process.start()
    np.testing.assert_array_equal(ours.recv(), expected)
    process.join()
    np.testing.assert_array_equal(raster.read(box), expected)


def test_reading_a_closed_raster_is_an_error(made: Path) -> None:
    raster = Raster.open(made)
    raster.close()
    raster.close()
    with pytest.raises(ValueError, match="read after it was closed"):
        raster.read(Box(0, 0, 300, 300))


def test_thumbnails_are_as_large_as_asked_for(raster: Raster) -> None:
    for side in (900, 300, 77, 1):
        picture = raster.thumbnail(side)
        assert max(picture.shape) == max(side, 3)
    whole_picture = raster.thumbnail(10_000)
    assert whole_picture.shape == (*raster.shape_px, 3)
    small = raster.thumbnail(300).astype(int)
    near = open_slide(raster.path).thumbnail(MPP * max(raster.shape_px) / 300).astype(int)
    rows, columns = (min(a, b) for a, b in zip(small.shape[:2], near.shape[:2], strict=True))
    assert np.abs(small[:rows, :columns] - near[:rows, :columns]).mean() < 6


# --- The file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("glass", [GLASS, (240, 240, 240), (243, 243, 243), (255, 255, 255)])
@pytest.mark.parametrize("quality", [MIN_QUALITY, 80, 85, 90, 95, 100])
def test_jpeg_keeps_glass_to_the_exact_value(glass: tuple[int, int, int], quality: int) -> None:
    """Beside noisy tissue that ends at a block's edge, too."""
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    tile[:, 24:] = glass
    data = imagecodecs.jpeg8_encode(
        tile, level=quality, subsampling="444", colorspace="RGB", outcolorspace="YCBCR"
    )
    decoded = imagecodecs.jpeg8_decode(data)
    assert (decoded[:, 24:] == glass).all()


def test_glass_is_exact_through_openslide_and_tifffile(made: Path) -> None:
    painted, tissue = whole(made)
    with tifffile.TiffFile(made) as tiff:
        by_tifffile = tiff.pages[0].asarray()
    with openslide.OpenSlide(made) as slide:
        by_openslide = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))[..., :3]
    assert (by_tifffile[~tissue] == GLASS).all()
    assert (by_openslide[~tissue] == GLASS).all()
    assert (painted[~tissue] == GLASS).all()
    np.testing.assert_array_equal(by_tifffile, by_openslide)


def test_other_programs_see_a_pyramid_with_its_resolution(made: Path, raster: Raster) -> None:
    height, width = raster.shape_px
    with openslide.OpenSlide(made) as slide:
        assert slide.dimensions == (width, height)
        assert [size[1] for size in slide.level_dimensions] == [height, -(-height // 2), -(-height // 4)]
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(MPP)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(MPP)
    with tifffile.TiffFile(made) as tiff:
        assert not tiff.is_bigtiff
        assert [page.subfiletype for page in tiff.pages] == [0, 1, 1]
        assert "DateTime" not in tiff.pages[0].tags
        assert "Software" not in tiff.pages[0].tags
    with open_slide(made) as slide:
        assert slide.shape_l0 == raster.shape_px
        assert slide.require_mpp().y == pytest.approx(MPP)


def test_levels_are_means_of_four(made: Path) -> None:
    with tifffile.TiffFile(made) as tiff:
        fine, half = (tiff.pages[n].asarray().astype(float) for n in (0, 1))
    rows, columns = (n // 2 * 2 for n in fine.shape[:2])
    mean = fine[:rows, :columns].reshape(rows // 2, 2, columns // 2, 2, 3).mean(axis=(1, 3))
    assert np.abs(half[: rows // 2, : columns // 2] - mean).mean() < 1.0  # two rounds of JPEG


def test_the_record_says_what_the_pixels_are(raster: Raster) -> None:
    pixels, tissue = whole(raster.path)
    record = raster.record
    assert raster.tissue_px == tissue.sum()
    np.testing.assert_allclose(record.tissue_mean, pixels[tissue].mean(axis=0), atol=0.5)
    np.testing.assert_allclose(record.tissue_std, pixels[tissue].std(axis=0), atol=1.0)
    assert raster.mask_cell_px % 8 == 0
    assert raster.mask.shape == tuple(-(-n // raster.mask_cell_px) for n in raster.shape_px)
    assert tuple(raster.glass) == record.glass == GLASS
    assert raster.l0_per_px == (1.0, 1.0)
    assert raster.mpp == MPP


def test_a_record_survives_json(raster: Raster) -> None:
    text = raster.record.to_json()
    assert text.isascii()
    assert RasterRecord.from_json(text, raster.path) == raster.record


# --- What is not a raster ----------------------------------------------------------------------------


def test_what_cannot_be_opened_is_one_clear_line(made: Path, tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="there is no such file; run `holoslide prepare` first"):
        Raster.open(tmp_path / "none.tif")
    with pytest.raises(SlideError, match="is a folder; give a prepared slide"):
        Raster.open(tmp_path)
    (tmp_path / "empty.tif").touch()
    with pytest.raises(SlideError, match=r"is empty \(0 bytes\)"):
        Raster.open(tmp_path / "empty.tif")
    (tmp_path / "text.tif").write_text("not a picture")
    with pytest.raises(SlideError, match="is no prepared slide"):
        Raster.open(tmp_path / "text.tif")
    tifffile.imwrite(tmp_path / "image.tif", np.zeros((20, 20, 3), np.uint8), photometric="rgb")
    with pytest.raises(SlideError, match="is an image, but no prepared slide; prepare it with"):
        Raster.open(tmp_path / "image.tif")
    with pytest.raises(SlideError, match="is an image, but no prepared slide"):
        Raster.open(made.parent / "slide.tif")


def test_another_version_is_refused_by_number(made: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.tif"
    text = made.read_bytes().replace(f'"version": {VERSION}'.encode(), b'"version": 7')
    other.write_bytes(text)
    with pytest.raises(SlideError, match=f"of format 7, and this holoslide reads format {VERSION}"):
        Raster.open(other)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"mask_cell_px": 16', b'"mask_cell_px": 24'),
        (b'"tissue_px"', b'"tissue_py"'),
        (b'"glass": [243,', b'"glass": [943,'),
        (b'"levels": 3', b'"levels": 0'),
        (b'"mpp": 1.0,', b'"mpp": NaN,'),
    ],
    ids=["does not fit", "unknown key", "no colour", "no level", "no number"],
)
def test_a_damaged_record_is_refused(made: Path, tmp_path: Path, old: bytes, new: bytes) -> None:
    data = made.read_bytes()
    assert old in data
    other = tmp_path / "other.tif"
    other.write_bytes(data.replace(old, new))
    with pytest.raises(SlideError, match=r"its mask is not of its size|a damaged record"):
        Raster.open(other)


def test_a_file_cut_between_two_levels_is_refused(made: Path, tmp_path: Path) -> None:
    with tifffile.TiffFile(made) as tiff:
        ends = [
            max(p.dataoffsets[n] + p.databytecounts[n] for n in range(len(p.dataoffsets))) for p in tiff.pages
        ]
    for end in ends[:-1]:
        cut = tmp_path / "cut.tif"
        cut.write_bytes(made.read_bytes()[:end])
        with pytest.raises(SlideError, match="is cut short"):
            Raster.open(cut)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999])
def test_a_truncated_file_is_refused_when_it_is_opened(made: Path, tmp_path: Path, share: float) -> None:
    cut = tmp_path / "cut.tif"
    data = made.read_bytes()
    cut.write_bytes(data[: int(share * len(data))])
    with pytest.raises(SlideError, match="cut short"):
        Raster.open(cut)


def test_a_damaged_tile_is_named_when_it_is_read(made: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.tif"
    shutil.copy(made, broken)
    with tifffile.TiffFile(made) as tiff:
        offset = tiff.pages[0].dataoffsets[0]
    with broken.open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * 600)
    with Raster.open(broken) as raster, pytest.raises(SlideError, match="tile 0 of level 0"):
        raster.read(Box(0, 0, 300, 300))


def test_a_file_that_shrinks_while_it_is_open_is_an_error(made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.tif"
    shutil.copy(made, copy)
    with Raster.open(copy) as raster:
        os.truncate(copy, 3000)
        with pytest.raises(SlideError, match="delete it and run `holoslide prepare` again"):
            raster.read(Box(0, 0, *raster.shape_px))


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_no_damage_to_the_header_gives_a_traceback(made: Path, data: st.DataObject) -> None:
    """Bytes outside the tiles, changed at random: opened and read, or a SlideError."""
    content = bytearray(GOLDEN.read_bytes())
    with tifffile.TiffFile(GOLDEN) as tiff:
        tiles = [
            (offset, offset + count)
            for page in tiff.pages
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
        ]
    outside = [n for n in range(len(content)) if not any(low <= n < high for low, high in tiles)]
    for position in data.draw(st.lists(st.sampled_from(outside), min_size=1, max_size=6)):
        content[position] = data.draw(st.integers(0, 255))
    broken = made.parent / "fuzzed.tif"
    broken.write_bytes(content)
    with contextlib.suppress(SlideError), Raster.open(broken) as raster:
        raster.read(Box(0, 0, 64, 64))
        raster.thumbnail(50)


# --- The old format -------------------------------------------------------------------------------------


def test_the_golden_file_of_format_1_reads_as_ever() -> None:
    """Made by the first holoslide that wrote rasters; never to be made again, only read."""
    with Raster.open(GOLDEN) as raster:
        record = raster.record
        pixels = raster.read(Box(-8, -8, raster.shape_px[0] + 8, raster.shape_px[1] + 8))
        assert record.recipe.slide_id == "golden"
        assert record.recipe.slide_mpp == (1.0, 1.0)
        assert record.recipe.slide_mpp_source == "resolution tags"
        assert (record.recipe.algorithm, record.icc_profile) == (1, None)
        assert record.recipe.settings["jpeg_quality"] == 75
        assert (record.mpp, record.mask_cell_px, record.glass) == (2.0, 8, (243, 243, 243))
        assert (record.origin_l0, record.shape_px) == ((112, 72), (104, 120))
        assert record.bounds_l0 == (0, 0, 400, 360)
        assert raster.mask.shape == (13, 15)
        assert int(raster.mask.sum()) * 64 == raster.tissue_px == 8960
        tissue = raster.mask.repeat(8, 0).repeat(8, 1)
        np.testing.assert_allclose(pixels[8:-8, 8:-8][tissue].mean(0), record.tissue_mean, atol=1.0)
        assert (pixels[8:-8, 8:-8][~tissue] == record.glass).all()
        assert (pixels[:8] == record.glass).all()
    assert GOLDEN.stat().st_size < 30_000


def test_the_golden_file_of_format_2_reads_as_ever() -> None:
    """Of the time before stains; never to be made again, only read."""
    with Raster.open(GOLDEN.with_name("raster-v2.tif")) as raster:
        record = raster.record
        assert (record.recipe.algorithm, record.icc_profile, record.stains) == (2, None, None)
        assert (record.origin_l0, record.shape_px, record.mpp) == ((32, 136), (136, 104), 2.0)
        assert int(raster.mask.sum()) * 64 == raster.tissue_px == 11264
        pixels, tissue = raster.read(Box(0, 0, 136, 104)), raster.mask.repeat(8, 0).repeat(8, 1)
        np.testing.assert_allclose(pixels[tissue].mean(0), record.tissue_mean, atol=1.0)
        assert (pixels[~tissue] == record.glass).all()
