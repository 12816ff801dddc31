"""Kinds of slides beyond plain TIFF: DICOM folders, MRXS, OME-Zarr, colour profiles, and whose mpp counts."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from numpy.typing import NDArray
from PIL import Image, ImageCms

from holoslide.errors import SlideError
from holoslide.geometry import Box
from holoslide.slides.cohort import Cohort
from holoslide.slides.facts import GLASS, Mpp
from holoslide.slides.prepare import PrepareConfig, PrepareJob, prepare_slide
from holoslide.slides.raster import Raster
from holoslide.slides.reader import open_slide
from holoslide.slides.source import slide_sha256, stamp_of
from tests.slides.drawn import blobs, paint
from tests.slides.mrxs import SIDE_PX, write_mrxs


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- DICOM ----------------------------------------------------------------------------------------------------


@pytest.mark.data
def test_a_folder_of_dicom_files_is_a_slide(data_dir: Path, tmp_path: Path) -> None:
    fixtures, folder = data_dir / "wsi" / "openslide-python-fixtures", tmp_path / "slide"
    folder.mkdir()
    for name in ("boxes_0.dcm", "boxes_1.dcm"):
        shutil.copy(fixtures / name, folder)
    (folder / "DICOMDIR").touch()
    (folder / ".DS_Store").touch()
    assert [row.path for row in Cohort.from_files([folder])] == [folder / "boxes_0.dcm"]
    with open_slide(folder) as slide, open_slide(fixtures / "boxes_0.dcm") as one:
        assert slide.facts()["levels"] == one.facts()["levels"]
        assert slide.mpp == one.mpp
        assert np.array_equal(slide.thumbnail(0.499), one.thumbnail(0.499))
    shutil.copy(data_dir / "wsi" / "highdicom_sm_image.dcm", folder)
    (row,) = Cohort.from_files([folder])
    with pytest.raises(SlideError, match="slide: holds 2 DICOM series; give one file of the series"):
        open_slide(row.path or "")


@pytest.fixture
def rle(data_dir: Path, tmp_path: Path) -> Path:
    """The uncompressed DICOM slide, run-length encoded, which OpenSlide does not read."""
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(data_dir / "wsi" / "highdicom_sm_image.dcm")
    dataset.compress(pydicom.uid.RLELossless)
    dataset.save_as(tmp_path / "rle.dcm")
    return tmp_path / "rle.dcm"


@pytest.mark.data
def test_dicom_that_openslide_refuses_is_read_by_wsidicom(data_dir: Path, rle: Path) -> None:
    with open_slide(rle) as slide, open_slide(data_dir / "wsi" / "highdicom_sm_image.dcm") as plain:
        assert (slide.vendor, slide.shape_l0, slide.mpp) == ("dicom", plain.shape_l0, plain.mpp)
        assert slide.objective_power == plain.objective_power
        box = Box(3, 7, 41, 50)
        assert np.array_equal(slide.read(box, 0.499), plain.read(box, 0.499))
        assert np.ptp(slide.read(box, 0.499)) > 0


@pytest.mark.data
def test_without_wsidicom_it_is_named(rle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wsidicom", None)
    with pytest.raises(SlideError, match=r"Unsupported transfer syntax.*pip install 'holoslide\[dicom\]'"):
        open_slide(rle)


def test_dicom_that_nobody_reads_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.dcm").write_bytes(bytes(128) + b"DICM" + bytes(300))
    with pytest.raises(SlideError, match=r"x\.dcm: cannot be opened \(OpenSlide: .*; wsidicom: ") as caught:
        open_slide(tmp_path / "x.dcm")
    assert "\n" not in str(caught.value)


# --- MRXS, VSI ------------------------------------------------------------------------------------------------


@pytest.fixture
def mrxs(tmp_path: Path) -> Path:
    """A written slide of 3 x 4 tiles, tissue in the middle, of which the outer columns were not scanned."""
    scanned = np.zeros((3, 4), np.bool_)
    scanned[:, 1:3] = True
    rgb = paint(blobs((3 * SIDE_PX, 4 * SIDE_PX), reach=0.3))
    return write_mrxs(tmp_path / "s.mrxs", rgb, scanned=scanned, mpp=0.5)


def test_mrxs_is_read_by_its_folder_and_not_as_the_picture_that_its_file_is(
    mrxs: Path, tmp_path: Path
) -> None:
    with open_slide(mrxs) as slide:
        assert (slide.vendor, slide.shape_l0, slide.objective_power) == ("mirax", (768, 1024), 20)
        assert slide.mpp == Mpp(0.5, 0.5, "slide")
        pixels = slide.thumbnail(0.5)
    assert (pixels[:, :SIDE_PX] == GLASS).all(), "transparent is glass, not black"
    assert (pixels[:, 3 * SIDE_PX :] == GLASS).all()
    assert pixels.min() > 50
    result = prepare_slide(PrepareJob("s", mrxs), tmp_path, PrepareConfig(mpp=1.0))
    with Raster.open(tmp_path / "s.tif") as raster:
        assert result.status == "made"
        left = raster.origin_l0[1]
        assert left >= SIDE_PX
        assert left + 2 * raster.shape_px[1] <= 3 * SIDE_PX + 2 * raster.mask_cell_px


@pytest.mark.parametrize("lost", ["Slidedat.ini", "Index.dat", "Data0000.dat", "."])
def test_mrxs_without_a_part_of_it_says_which(mrxs: Path, lost: str) -> None:
    folder = mrxs.with_suffix("")
    shutil.rmtree(folder) if lost == "." else (folder / lost).unlink()
    lacking = "the folder s" if lost == "." else f"s/{lost}"
    with pytest.raises(
        SlideError, match=f"s.mrxs: lacks {lacking}, which belongs to it; copy the slide again"
    ):
        open_slide(mrxs)


def test_mrxs_whose_pixels_are_cut_short_is_one_line(mrxs: Path) -> None:
    data = mrxs.with_suffix("") / "Data0000.dat"
    os.truncate(data, data.stat().st_size // 2)
    with pytest.raises(SlideError, match="the file is damaged or cut short") as caught:
        open_slide(mrxs).thumbnail(0.5)
    assert "\n" not in str(caught.value)


def test_vsi_is_not_taken_for_the_overview_that_its_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "s.vsi"
    tifffile.imwrite(path, noise(64, 64), photometric="rgb")
    with pytest.raises(SlideError, match=r"s\.vsi: lacks the folder _s_, which belongs to it"):
        open_slide(path)
    (tmp_path / "_s_").mkdir()
    with pytest.raises(
        SlideError, match="is VSI of a kind that OpenSlide does not read; export it as OME-TIFF"
    ):
        open_slide(path)


# --- OME-Zarr -------------------------------------------------------------------------------------------------


def write_zarr(
    folder: Path, levels: list[NDArray[Any]], *, axes: str = "cyx", version: int = 2, **more: Any
) -> Path:
    """An OME-Zarr as its specification has it: 0.4 on Zarr version 2, 0.5 on 3. Axes t and z have length 1."""
    group = zarr.open_group(folder, mode="w", zarr_format=version)  # type: ignore[arg-type]
    datasets = []
    for number, rgb in enumerate(levels):
        values = rgb if axes == "yxc" else np.moveaxis(rgb, -1, 0)
        sizes = dict(zip("yxc", rgb.shape, strict=True))
        shape = tuple(sizes.get(axis, 1) for axis in axes)
        chunks = tuple(min(64, side) for side in shape)
        array = group.create_array(str(number), shape=shape, chunks=chunks, dtype=rgb.dtype)
        array[...] = values.reshape(shape)
        scale = [{"y": 0.25, "x": 0.3}.get(axis, 1.0) * (2**number if axis in "yx" else 1) for axis in axes]
        transformations = [{"type": "scale", "scale": scale}]
        datasets.append({"path": str(number), "coordinateTransformations": transformations})
    units = {"y": "micrometer", "x": "micrometer"}
    described = [
        {"name": axis, "type": "space", **({"unit": units[axis]} if axis in units else {})} for axis in axes
    ]
    facts = {"multiscales": [{"axes": described, "datasets": datasets}], **more}
    group.attrs.update(facts if version == 2 else {"ome": {"version": "0.5", **facts}})
    return folder


@pytest.mark.parametrize(("version", "axes"), [(2, "cyx"), (2, "tczyx"), (3, "tczyx"), (3, "yxc")])
def test_ome_zarr_is_read_as_rgb(tmp_path: Path, version: int, axes: str) -> None:
    rgb = noise(150, 210)
    path = write_zarr(tmp_path / "s.zarr", [rgb, rgb[::2, ::2]], axes=axes, version=version)
    with open_slide(path) as slide:
        assert (slide.vendor, slide.shape_l0) == ("ome-zarr", (150, 210))
        assert [level.downsample_y for level in slide.levels] == [1, 2]
        assert slide.mpp is not None
        assert (slide.mpp.y, slide.mpp.x, slide.mpp.source) == (0.25, 0.3, "slide")
        assert slide.facts()["file_bytes"] > 0
        box = Box(30, 60, 140, 200)
        assert np.array_equal(slide._backend.read_level(0, box), rgb[box.slices])
        assert np.array_equal(slide._backend.read_level(1, Box(0, 0, 75, 105)), rgb[::2, ::2])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two channels": ({"levels": [noise(64, 64)[..., :2]]}, "has 2 channels: fluorescence"),
    "16 bits": ({"levels": [noise(64, 64).astype(np.uint16)]}, "has uint16 samples"),
    "two images": ({"levels": [noise(64, 64)], "multiscales": [{}, {}]}, "holds several images"),
    "a plate": ({"levels": [noise(64, 64)], "multiscales": [], "bioformats2raw.layout": 3}, "holds several images"),
    "nothing": ({"levels": [noise(64, 64)], "multiscales": []}, "holds no images"),
    "dyes": (
        {"levels": [noise(64, 64)], "omero": {"channels": [{"color": c} for c in ("0000FF", "00FF00", "FF00FF")]}},
        "has channels of the colours 0000FF, 00FF00, FF00FF, as fluorescence does",
    ),
    "no axes": ({"levels": [noise(64, 64)], "multiscales": [{"datasets": []}]}, "is not a readable OME-Zarr"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_ome_zarr_that_is_no_rgb_slide_is_refused(tmp_path: Path, name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(SlideError, match=message) as caught:
        open_slide(write_zarr(tmp_path / "s.zarr", **options))
    assert "\n" not in str(caught.value)


def test_ome_zarr_is_prepared_and_its_damage_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_zarr(tmp_path / "s.zarr", [paint(blobs((700, 800), reach=0.4))])
    out = tmp_path / "out"
    out.mkdir()
    job = PrepareJob("s", path)
    assert prepare_slide(job, out, PrepareConfig(mpp=0.5)).status == "made"
    assert prepare_slide(job, out, PrepareConfig(mpp=0.5)).status == "reused"
    for chunk in (path / "0").rglob("*"):
        if chunk.is_file() and chunk.name[:1] != ".":
            chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(SlideError, match=r"s\.zarr: pixels cannot be read at y 0-"):
        prepare_slide(job, out, PrepareConfig(mpp=0.5))
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(SlideError, match=r"which needs zarr .*pip install 'holoslide\[zarr\]'"):
        open_slide(path)


def test_every_picture_of_a_vms_counts_in_its_hash(tmp_path: Path) -> None:
    """Its own file is but a text that names them."""
    pixels, names = noise(256, 256), ("s-0.jpg", "s-1.jpg", "s_map.jpg")
    for name in names:
        Image.fromarray(pixels).save(tmp_path / name, quality=95, subsampling=0, restart_marker_rows=1)
    listing = (
        "NoLayers=1 NoJpegColumns=2 NoJpegRows=1 ImageFile=s-0.jpg ImageFile(1,0)=s-1.jpg MapFile=s_map.jpg"
    )
    listing += " SourceLens=20 PhysicalWidth=256000 PhysicalHeight=128000"
    path = tmp_path / "s.vms"
    path.write_text("\r\n".join(["[Virtual Microscope Specimen]", *listing.split()]))
    with open_slide(path) as slide:
        assert (slide.vendor, slide.shape_l0) == ("hamamatsu", (256, 512))
        read = slide.read(Box.at(0, 256, 256, 256), mpp=0.5)
    assert np.abs(read.astype(int) - pixels).mean() < 8
    before, stamp = slide_sha256(path), stamp_of(path)
    hashes = {before}
    for name in names:
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data + b"!")
        hashes.add(slide_sha256(path))
        assert stamp_of(path) != stamp
        (tmp_path / name).write_bytes(data)
    assert len(hashes) == 4


@pytest.mark.parametrize("version", [2, 3])
def test_every_chunk_of_an_ome_zarr_counts_in_its_hash(tmp_path: Path, version: int) -> None:
    """Chunks of different levels have the same names."""
    rgb = noise(128, 128)
    path = write_zarr(tmp_path / "s.zarr", [rgb, rgb[::2, ::2]], version=version)
    before, stamp = slide_sha256(path), stamp_of(path)
    hashes = {before}
    chunks = [each for each in path.rglob("*") if each.is_file() and each.name[:1] in "0123456789"]
    for chunk in chunks:
        data = chunk.read_bytes()
        chunk.write_bytes(data + b"!")
        hashes.add(slide_sha256(path))
        assert stamp_of(path) != stamp
        chunk.write_bytes(data)
    assert len(chunks) > 4
    assert len(hashes) == 1 + len(chunks)
    assert slide_sha256(path) == before


def test_a_folder_that_is_no_slide_says_which_are(tmp_path: Path) -> None:
    (tmp_path / "a.svs").touch()
    with pytest.raises(
        SlideError, match=r"is a folder; give a file, or a folder that is one slide: OME-Zarr"
    ):
        open_slide(tmp_path)


def test_without_openslide_the_way_to_get_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PNG and JPEG need it not."""
    tifffile.imwrite(tmp_path / "s.tif", noise(64, 64), photometric="rgb")
    Image.fromarray(noise(64, 64)).save(tmp_path / "s.png")
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(SlideError, match=r"needs OpenSlide .*; pip install openslide-python openslide-bin"):
        open_slide(tmp_path / "s.tif")
    with open_slide(tmp_path / "s.png", mpp=1.0) as slide:
        assert np.array_equal(slide.thumbnail(1.0), noise(64, 64))


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(SlideError, match=r"cannot be opened \(Permission denied\); check the folder"):
        open_slide(tmp_path)


# --- Colour profiles ------------------------------------------------------------------------------------------


def swapped_profile() -> bytes:
    """A profile whose red is sRGB's blue, and whose blue is sRGB's red."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    rows = {
        bytes(data[at : at + 4]): at for at in range(132, 132 + 12 * int.from_bytes(data[128:132], "big"), 12)
    }
    red, blue = rows[b"rXYZ"], rows[b"bXYZ"]
    data[red : red + 4], data[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(data)


def write_coloured(path: Path, rgb: NDArray[np.uint8], profile: bytes) -> Path:
    tifffile.imwrite(path, rgb, tile=(256, 256), photometric="rgb", metadata=None, iccprofile=profile,
                     resolution=(10_000, 10_000), resolutionunit="CENTIMETER")  # fmt: skip
    return path


def test_a_colour_profile_is_applied_on_request_alone(tmp_path: Path) -> None:
    rgb = np.full((300, 280, 3), (200, 120, 40), np.uint8)
    path = write_coloured(tmp_path / "s.tif", rgb, swapped_profile())
    box = Box(0, 0, 300, 300)
    with open_slide(path) as stored, open_slide(path, icc=True) as meant:
        assert stored.facts()["colour_profile"] is True
        assert stored.icc_profile is None
        assert meant.icc_profile is not None
        assert "sha256" in meant.icc_profile
        assert (stored.read(box, 1.0)[:, :280] == (200, 120, 40)).all()
        pixels = meant.read(box, 1.0)
        np.testing.assert_allclose(pixels[:, :280].reshape(-1, 3).mean(0), (40, 120, 200), atol=2)
        assert (pixels[:, 280:] == 243).all()  # beyond the slide is glass as ever
        again = pickle.loads(pickle.dumps(meant))
        assert np.array_equal(again.read(box, 1.0), pixels)


def test_png_and_jpeg_have_profiles_too(tmp_path: Path) -> None:
    image = Image.fromarray(np.full((40, 40, 3), (200, 120, 40), np.uint8))
    for name in ("s.png", "s.jpg"):
        image.save(tmp_path / name, icc_profile=swapped_profile())
        with open_slide(tmp_path / name, mpp=1.0, icc=True) as slide:
            np.testing.assert_allclose(slide.thumbnail(1.0).reshape(-1, 3).mean(0), (40, 120, 200), atol=3)


def test_a_raster_records_the_profile(tmp_path: Path) -> None:
    path = write_coloured(tmp_path / "s.tif", paint(blobs((700, 800), reach=0.4)), swapped_profile())
    means = []
    for icc in (False, True):
        result = prepare_slide(PrepareJob("raster", path), tmp_path, PrepareConfig(icc=icc))
        assert result.status == "made"
        with Raster.open(tmp_path / "raster.tif") as raster:
            assert (raster.record.icc_profile is not None) == icc
            means.append(np.array(raster.record.tissue_mean))
    assert means[0][0] > means[0][2] + 20
    np.testing.assert_allclose(means[0], means[1][::-1], atol=4)


@pytest.mark.parametrize("profile", [b"no profile", b"\0" * 200])
def test_a_profile_of_no_use_matters_only_to_who_asks(tmp_path: Path, profile: bytes) -> None:
    path = write_coloured(tmp_path / "s.tif", noise(64, 64), profile)
    with open_slide(path) as slide:
        assert np.array_equal(slide.thumbnail(1.0), noise(64, 64))
    with pytest.raises(
        SlideError, match=r"colour profile that cannot be used .*; prepare it without prepare\.icc"
    ):
        open_slide(path, icc=True)


def test_a_profile_that_is_not_of_rgb_is_refused(tmp_path: Path) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    path = write_coloured(tmp_path / "s.tif", noise(64, 64), lab)
    with pytest.raises(SlideError, match=r"has a colour profile of kind L[Aa][Bb], not RGB"):
        open_slide(path, icc=True)


@pytest.mark.data
def test_a_scanners_own_profile(data_dir: Path) -> None:
    """The real file has sRGB's: its colours stay as they are."""
    path = data_dir / "wsi" / "TCGA-CR-7395-01A-01-TS1.svs"
    with open_slide(path, mpp=0.5) as stored, open_slide(path, mpp=0.5, icc=True) as meant:
        assert meant.icc_profile is not None
        assert meant.icc_profile.startswith("sRGB IEC61966-2.1 (sha256 3f6d674174f3804e")
        box = Box(500, 500, 600, 600)
        assert np.abs(stored.read(box, 1.0).astype(int) - meant.read(box, 1.0)).max() <= 3


@pytest.mark.data
def test_a_scanners_own_profile_that_is_damaged(data_dir: Path, tmp_path: Path) -> None:
    """OpenSlide opens such a slide; its profile is refused by who asks for it, and only by who asks."""
    data = (data_dir / "wsi" / "TCGA-CR-7395-01A-01-TS1.svs").read_bytes()
    assert data.count(b"acsp") == 1
    path = tmp_path / "damaged.svs"
    path.write_bytes(data.replace(b"acsp", b"spca"))
    with open_slide(path, mpp=0.5) as slide:
        assert slide.read(Box(500, 500, 600, 600), 1.0).shape == (100, 100, 3)
    with pytest.raises(SlideError, match=r"colour profile that cannot be used .*; prepare it without"):
        open_slide(path, mpp=0.5, icc=True)


# --- Whose microns per pixel count -----------------------------------------------------------------------------


def test_the_fallback_counts_only_where_the_file_says_nothing(tmp_path: Path) -> None:
    told, untold = tmp_path / "told.tif", tmp_path / "untold.tif"
    write_coloured(told, noise(64, 64), b"")
    tifffile.imwrite(untold, noise(64, 64), photometric="rgb", metadata=None)
    for path, mpp, fallback, expected in [
        (told, None, 0.25, (1.0, "resolution tags")),
        (told, 0.5, 0.25, (0.5, "user")),
        (untold, None, 0.25, (0.25, "user")),
        (untold, 0.5, 0.25, (0.5, "user")),
    ]:
        with open_slide(path, mpp=mpp, fallback_mpp=fallback) as slide:
            assert slide.mpp is not None
            assert (slide.mpp.y, slide.mpp.source) == expected
    with pytest.raises(SlideError, match=r"-1 um per pixel cannot be"):
        open_slide(told, fallback_mpp=-1)


def test_objective_power_goes_before_the_fallback(tmp_path: Path) -> None:
    path = tmp_path / "s.ome.tif"
    tifffile.imwrite(path, noise(64, 64), photometric="rgb", metadata={"axes": "YXS"}, ome=True)
    with tifffile.TiffFile(path) as tiff:
        text = tiff.ome_metadata or ""
    power = (
        '<Instrument ID="Instrument:0"><Objective ID="Objective:0" NominalMagnification="20"/></Instrument>'
    )
    settings = '<ObjectiveSettings ID="Objective:0"/><Pixels'
    told = text.replace("<Image", power + "<Image", 1).replace("<Pixels", settings, 1)
    tifffile.tiffcomment(path, told.encode())
    with open_slide(path, fallback_mpp=0.25) as slide:
        assert slide.mpp is not None
        assert (slide.mpp.y, slide.mpp.source) == (0.5, "objective power")
    assert json.dumps(slide.facts()["mpp"]) == '{"y": 0.5, "x": 0.5, "source": "objective power"}'
