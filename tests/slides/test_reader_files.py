"""TIFF of all kinds, PNG and JPEG as slides: read as they are stored, or refused with a remedy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from holoslide.errors import SlideError
from holoslide.geometry import Box
from holoslide.slides import backends, facts, tiff
from holoslide.slides.audit import audit_slides
from holoslide.slides.cohort import Cohort
from holoslide.slides.facts import GLASS, Mpp
from holoslide.slides.inspect import described
from holoslide.slides.reader import open_slide
from tests.slides.reading import EXACT, KINDS, expected, noise, per_cm, write_ome

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


@pytest.mark.parametrize("name", ["s.tif", "s.jpg", "s.png"])
def test_an_orientation_tag_is_not_followed_and_not_passed_over_in_silence(tmp_path: Path, name: str) -> None:
    """As by OpenSlide and tifffile: places on the slide are places in the file, whatever shows it turned."""
    path, rgb = tmp_path / name, noise(150, 210)
    if name == "s.tif":
        tags = [(274, "H", 1, 6, False)]
        tifffile.imwrite(path, rgb, photometric="rgb", metadata=None, extratags=tags)
    else:
        exif = Image.Exif()
        exif[274] = 6
        Image.fromarray(rgb).save(path, exif=exif)
    with open_slide(path, mpp=0.25) as slide:
        assert slide.shape_l0 == (150, 210)
        assert slide.orientation == slide.facts()["orientation"] == 6
    cohort = Cohort.from_files([path], mpp=0.25)
    (told,) = [each for each in audit_slides(cohort)[0] if each.kind == "turned"]
    assert (told.severity, told.where) == ("warning", "s")
    assert "s has orientation tag 6, which is not followed" in told.what.replace(name, "s")
    assert "  orientation: tag 6, not followed: pixels are taken as they are stored" in described(
        {"slide": str(path), **slide.facts()}
    )


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0MM", b"nothing of the kind"])
def test_a_picture_whose_exif_cannot_be_read_is_upright(exif: bytes) -> None:
    assert backends._exif_orientation(exif) == 1
    assert [facts.orientation_of(value) for value in (None, 0, 9, (6, 6), 8)] == [1, 1, 1, 1, 8]


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


@pytest.mark.parametrize("others", [[], ["label image", "Macro_1"]])
def test_an_ome_tiff_may_be_named_like_a_label_or_a_macro(tmp_path: Path, others: list[str]) -> None:
    path = tmp_path / "named.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as writer:
        for name in ["macrophages, labelled" if others else "label", *others]:
            pixels = noise(20, 30) if name in others else noise(80, 90)
            writer.write(pixels, photometric="rgb", metadata={"axes": "YXS", "Name": name})
    with open_slide(path, mpp=1.0) as slide:
        assert np.array_equal(slide.read(Box(0, 0, 80, 90), 1.0), noise(80, 90))


@pytest.mark.parametrize("least", [255, 254])
def test_a_channel_that_is_not_said_to_be_transparency_is_none(tmp_path: Path, least: int) -> None:
    path, image = tmp_path / "more.tif", noise(64, 64, 4)
    image[..., 3] = 255
    image[40, 50, 3] = least
    tifffile.imwrite(
        path, image, photometric="rgb", tile=(32, 32), extrasamples=["unspecified"], metadata=None
    )
    with open_slide(path, mpp=1.0) as slide:
        if least == 255:
            assert np.array_equal(slide.read(Box(0, 0, 64, 64), 1.0), image[..., :3])
            return
        with pytest.raises(
            SlideError, match=r"more.tif: has a channel beside its colours, .*; save it without"
        ):
            slide.read(Box(0, 0, 64, 64), 1.0)


def _two_series(path: Path) -> None:
    with tifffile.TiffWriter(path, ome=True) as writer:
        for name in ("one", "two"):
            writer.write(noise(64, 64), photometric="rgb", metadata={"axes": "YXS", "Name": name})


def _two_pages(path: Path) -> None:
    with tifffile.TiffWriter(path) as writer:
        writer.write(noise(64, 64), photometric="rgb", metadata=None)
        writer.write(noise(64, 80), photometric="rgb", metadata=None)


def _two_of_one_form(path: Path) -> None:
    with tifffile.TiffWriter(path) as writer:
        writer.write(noise(64, 64), photometric="rgb", metadata=None)
        writer.write(noise(32, 32), photometric="rgb", metadata=None)


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
    "squares.tif": (_two_of_one_form, r"several images \(64 x 64 and 32 x 32 px\), not marked as smaller"),
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
            # Older tifffile, 2026.1.14 still, writes a number as a coarser fraction.
            assert (slide.mpp.y, slide.mpp.x) == pytest.approx(mpp, rel=2e-6)
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
