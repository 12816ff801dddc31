"""Stains: found as torchstain finds them, turned into reference ones in the tissue alone, varied in training."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from holoslide.errors import ConfigError, SlideError
from holoslide.geometry import Box
from holoslide.slides.augment import ArrayPixels, AugmentConfig, Augmented, Draw, draw
from holoslide.slides.prepare import PrepareConfig, PrepareJob, prepare_slide
from holoslide.slides.raster import Raster
from holoslide.slides.stain import EOSIN, HAEMATOXYLIN, MOST, dye_change, find_stains, through_density
from tests.slides.drawn import LAMP, blobs, write_slide

MACENKO = PrepareConfig(mpp=1.0, mask_cell_um=8.0, jpeg_quality=95, stain="macenko")
VIOLET = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11))  # Ruifrok and Johnston's dyes
PINK = ((0.50, 0.76, 0.42), (0.27, 0.71, 0.65))


def stained(
    dyes: tuple[tuple[float, ...], ...], amount: float, *, shape: tuple[int, int] = (240, 300), seed: int = 0
) -> NDArray[np.uint8]:
    """Tissue of two dyes in amounts of which each is nearly pure somewhere, before a lamp of 240."""
    rng = np.random.default_rng(seed)
    shares = rng.beta(0.3, 0.3, shape)
    amounts = amount * rng.uniform(0.5, 1.0, shape)[..., None] * np.stack([shares, 1 - shares], axis=-1)
    vectors = np.array([np.array(dye) / np.linalg.norm(dye) for dye in dyes])
    return np.clip(np.rint(240 * np.exp(-amounts @ vectors) - 1), 0, 255).astype(np.uint8)


def slide_of(path: Path, rgb: NDArray[np.uint8], tissue: NDArray[np.bool_]) -> Path:
    return write_slide(path, np.where(tissue[..., None], rgb, np.array(LAMP)).astype(np.uint8), 1.0)


def test_the_dyes_are_those_that_were_painted() -> None:
    rgb = stained(VIOLET, 1.6)
    found = find_stains(Path("s.tif"), lambda box: rgb[box.slices], np.ones((30, 37), bool), 8)
    for at, dye in enumerate(VIOLET):
        direction = np.array(found.dyes[3 * at : 3 * at + 3])
        cosine = direction @ np.array(dye) / np.linalg.norm(dye) / np.linalg.norm(direction)
        assert np.degrees(np.arccos(min(1.0, cosine))) < 4
    np.testing.assert_allclose(found.dyes[6:], 1.55, atol=0.15)


def test_the_result_is_torchstains() -> None:
    """With all pixels looked at; torchstain forgets the one that it added before the logarithm."""
    from torchstain.numpy.normalizers import NumpyMacenkoNormalizer

    rgb = stained(PINK, 1.2, shape=(128, 128))
    ours = find_stains(Path("s.tif"), lambda box: rgb[box.slices], np.ones((1, 1), bool), 128)
    theirs, _, _ = NumpyMacenkoNormalizer().normalize(rgb, stains=False)
    difference = np.abs(ours(rgb).astype(int) - theirs)
    assert difference.max() <= 2


def test_slides_of_two_laboratories_come_to_look_alike(tmp_path: Path) -> None:
    tissue = blobs((512, 640), reach=0.4)
    means: dict[str, list[NDArray[np.float64]]] = {"none": [], "macenko": []}
    for name, dyes, amount in (("violet", VIOLET, 1.9), ("pink", PINK, 1.1)):
        path = slide_of(tmp_path / f"{name}.tif", stained(dyes, amount, shape=(512, 640)), tissue)
        for stain in ("none", "macenko"):
            (tmp_path / stain).mkdir(exist_ok=True)
            config = PrepareConfig(mpp=1.0, mask_cell_um=8.0, jpeg_quality=95, stain=stain)  # type: ignore[arg-type]
            job = PrepareJob(name, path)
            result = prepare_slide(job, tmp_path / stain, config)
            assert result.path is not None
            with Raster.open(result.path) as raster:
                means[stain].append(np.array(raster.record.tissue_mean))
                assert (raster.record.stains is not None) == (stain == "macenko")
                assert raster.record.recipe.settings["stain"] == stain
                pixels = raster.read(Box(0, 0, *raster.shape_px))
                outside = ~raster.mask.repeat(8, 0).repeat(8, 1)[: pixels.shape[0], : pixels.shape[1]]
                assert (pixels[outside] == raster.glass).all()
            assert prepare_slide(job, tmp_path / stain, config).status == "reused"
    apart = {stain: np.abs(two[0] - two[1]).max() for stain, two in means.items()}
    assert apart["none"] > 25
    assert apart["macenko"] < 0.25 * apart["none"]


def test_a_slide_without_two_stains_is_refused(tmp_path: Path) -> None:
    tissue = blobs((300, 300), reach=0.4)
    rng = np.random.default_rng(3)
    amount = rng.uniform(0.3, 1.0, (300, 300, 1))
    one_dye = np.clip(240 * np.exp(-amount * np.array(HAEMATOXYLIN)), 0, 255).astype(np.uint8)
    pale = np.full((300, 300, 3), (235, 205, 225), np.uint8) + rng.integers(0, 6, (300, 300, 3), np.uint8)
    for name, rgb, why in (
        ("one", one_dye, "its colours are those of one dye"),
        ("pale", pale, "only 0 pixels of what was looked at are stained"),
    ):
        path = slide_of(tmp_path / f"{name}.tif", rgb, tissue)
        (tmp_path / "out").mkdir(exist_ok=True)
        with pytest.raises(
            SlideError, match=rf"{name}\.tif: its two stains cannot be told apart: {why}"
        ) as caught:
            prepare_slide(PrepareJob(name, path), tmp_path / "out", MACENKO)
        assert "; leave it out, or prepare with prepare.stain=none" in str(caught.value)
        assert list((tmp_path / "out").iterdir()) == []


def test_without_torchstain_the_way_to_get_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchstain.numpy.normalizers", None)
    with pytest.raises(
        ConfigError, match=r"prepare\.stain: macenko needs torchstain .*pip install 'holoslide\[stain\]'"
    ):
        find_stains(Path("s.tif"), lambda box: stained(PINK, 1.0)[box.slices], np.ones((4, 4), bool), 8)
    with pytest.raises(ConfigError, match=r"prepare\.stain: there is no 'reinhard'; give none or macenko"):
        PrepareConfig(stain="reinhard")  # type: ignore[arg-type]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "mpp"), [("CMU-1-Small-Region.svs", None), ("TCGA-CR-7395-01A-01-TS1.svs", 0.5)]
)
def test_a_real_slide_comes_to_have_the_references_dyes(
    data_dir: Path, tmp_path: Path, name: str, mpp: float | None
) -> None:
    """Looked for once more, in what was made, the dyes are the reference's in direction and amount."""
    job = PrepareJob("real", data_dir / "wsi" / name, mpp)
    config = PrepareConfig(mpp=4.0, mask_cell_um=32.0, jpeg_quality=95, stain="macenko")
    result = prepare_slide(job, tmp_path, config)
    assert result.path is not None
    with Raster.open(result.path) as raster:
        assert raster.record.stains is not None
        again = np.array(find_stains(result.path, raster.read, raster.mask, raster.mask_cell_px).dyes)
    for at, dye in ((0, HAEMATOXYLIN), (3, EOSIN)):
        cosines = [
            np.array(found[at : at + 3]) @ dye / np.linalg.norm(dye)
            for found in (again, np.array(raster.record.stains))
        ]
        now, before = np.degrees(np.arccos(np.minimum(1.0, cosines)))
        assert now < 4
        assert now < before
    np.testing.assert_allclose(again[6:], MOST, rtol=0.2)


# --- In training ------------------------------------------------------------------------------------------------


def test_amounts_of_dyes_are_multiplied_and_glass_stays() -> None:
    amounts = np.array([(1.0, 0.0), (0.0, 1.0), (0.6, 0.9), (0.0, 0.0)])

    def coloured(each: NDArray[np.float64]) -> NDArray[np.uint8]:
        return np.rint(244 * np.exp(-each @ np.array([HAEMATOXYLIN, EOSIN])) - 1).astype(np.uint8)

    changed = through_density(coloured(amounts)[None], dye_change(1.3, 0.7), 243.0)[0]
    assert np.abs(changed.astype(int) - coloured(amounts * (1.3, 0.7))).max() <= 2
    assert (changed[3] == 243).all()


def test_stain_in_training_is_one_draw_for_all_windows_and_leaves_the_other_draws_alone() -> None:
    mask = np.zeros((16, 20), bool)
    mask[2:12, 3:15] = True
    rgb = np.where(mask.repeat(8, 0).repeat(8, 1)[..., None], stained(PINK, 1.5, shape=(128, 160)), 243)
    pixels = ArrayPixels(rgb.astype(np.uint8), mask, 8, (243, 243, 243))
    plain = draw(AugmentConfig(), (128, 160), np.random.default_rng(8))
    varied = draw(AugmentConfig(stain=0.3), (128, 160), np.random.default_rng(8))
    assert varied.stain is not None
    assert all(0.7 <= factor <= 1.3 for factor in varied.stain)
    assert (plain.size, plain.place, plain.colour) == (varied.size, varied.place, varied.colour)
    slide = Augmented(pixels, Draw(stain=varied.stain))
    whole = slide.read(Box(0, 0, *slide.shape_px))
    for box in (Box(5, 9, 77, 130), Box(-4, -4, 20, 200)):
        part = box.intersect(Box(0, 0, *slide.shape_px))
        assert (slide.read(box)[part.relative_to(box).slices] == whole[part.slices]).all()
    outside = ~mask.repeat(8, 0).repeat(8, 1)
    assert (whole[outside] == 243).all()
    assert (slide.glass == 243).all()
    assert np.abs(whole[~outside].astype(int) - rgb[~outside]).mean() > 3
    with pytest.raises(ConfigError, match=r"augment\.stain: 1\.5 is out of range; give 0 to 1"):
        AugmentConfig(stain=1.5)


def test_the_reference_is_torchstains() -> None:
    from torchstain.numpy.normalizers import NumpyMacenkoNormalizer

    reference = NumpyMacenkoNormalizer()
    assert reference.HERef.T.tolist() == [list(HAEMATOXYLIN), list(EOSIN)]
    assert reference.maxCRef.tolist() == list(MOST)
