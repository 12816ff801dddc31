"""Tissue masks: against simple pictures whose tissue is known, against phantoms, and on real slides."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from holoslide.errors import ConfigError
from holoslide.slides.morphology import close, drop_specks, fill_holes, grow, shrink
from holoslide.slides.phantom import LABELS, PhantomConfig, draw_phantom
from holoslide.slides.reader import open_slide
from holoslide.slides.tissue import (
    WHITE_RGB,
    TissueConfig,
    find_tissue,
    glass_colour,
    threshold,
)
from tests.slides.drawn import LAMP, blobs, iou, paint

UM = 8.0
SHAPE = (400, 500)


def find(rgb: NDArray[np.uint8], um: float = UM, **settings: float) -> NDArray[np.bool_]:
    return find_tissue(rgb, um, TissueConfig(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("noise", [1.0, 3.0, 6.0])
@pytest.mark.parametrize(
    ("stain", "lamp", "grain"),
    [
        ((200, 120, 170), (245, 245, 245), 8),
        ((150, 90, 130), (180, 180, 182), 8),
        ((140, 110, 130), (160, 160, 160), 8),
        ((236, 226, 236), (244, 244, 244), 2),
        ((205, 150, 150), (240, 236, 222), 8),
        ((170, 130, 100), (240, 240, 240), 8),
        ((210, 150, 190), (235, 225, 232), 8),
    ],
    ids=["clean", "grey", "dark grey", "faint", "yellow lamp", "brown stain", "pink lamp"],
)
def test_it_finds_tissue_on_any_glass(
    stain: tuple[int, int, int], lamp: tuple[int, int, int], grain: float, noise: float
) -> None:
    tissue = blobs(SHAPE)
    found = find(paint(tissue, stain=stain, lamp=lamp, grain=grain, noise=noise))
    assert iou(found, tissue) >= 0.95


def test_uneven_light_is_no_tissue() -> None:
    tissue = blobs(SHAPE)
    y, x = np.mgrid[-1:1:400j, -1:1:500j]
    shaded = paint(tissue, lamp=(235, 235, 235)) * (1 - 0.09 * (y**2 + x**2))[..., None]
    assert iou(find(shaded.astype(np.uint8)), tissue) >= 0.95


def fat(tissue: NDArray[np.bool_], membrane: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Cells as white as glass in a net of pale membranes."""
    height, width = tissue.shape
    rng = np.random.default_rng(0)
    net = cv2.Subdiv2D((0, 0, width, height))
    for y, x in rng.uniform(0, 1, (3000, 2)) * (height, width):
        net.insert((float(x), float(y)))
    picture = np.full((height, width, 3), LAMP[0], np.uint8)
    for cell in net.getVoronoiFacetList([])[0]:
        cv2.polylines(picture, [cell.astype(np.int32)], True, membrane, 1, cv2.LINE_AA)  # noqa: FBT003
    noisy = np.where(tissue[..., None], picture, LAMP[0]) + rng.normal(0, 1.5, (height, width, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("membrane", [(226, 205, 220), (215, 215, 215)], ids=["pink", "colourless"])
def test_fat_is_tissue_though_most_of_it_is_as_white_as_glass(membrane: tuple[int, int, int]) -> None:
    tissue = blobs(SHAPE, count=4, seed=3)
    assert iou(find(fat(tissue, membrane)), tissue) >= 0.92


@pytest.mark.parametrize("lamp", [245, 200, 170])
@pytest.mark.parametrize("noise", [0.0, 1.0, 3.0, 6.0])
def test_bare_glass_has_no_tissue(lamp: int, noise: float) -> None:
    nothing = np.zeros((300, 300), np.bool_)
    assert not find(paint(nothing, lamp=(lamp, lamp, lamp), noise=noise)).any()


@pytest.mark.parametrize("stain", [(200, 120, 170), (215, 200, 215), (120, 70, 140)])
def test_a_slide_of_nothing_but_tissue_is_all_tissue(stain: tuple[int, int, int]) -> None:
    everywhere = np.ones((200, 200), np.bool_)
    assert find(paint(everywhere, stain=stain)).all()


@pytest.mark.parametrize(
    "ink",
    [
        (40, 150, 80),
        (150, 215, 170),
        (40, 60, 190),
        (120, 140, 230),
        (25, 25, 28),
        (80, 80, 84),
        (195, 60, 70),
    ],
    ids=["green", "light green", "blue", "light blue", "black", "grey", "red"],
)
def test_pen_is_no_tissue(ink: tuple[int, int, int]) -> None:
    tissue = blobs(SHAPE)
    rgb = paint(tissue)
    line = np.zeros(SHAPE, np.uint8)
    cv2.line(line, (20, 20), (480, 60), 1, 12)
    pen = line.astype(np.bool_) & ~tissue
    rgb[pen] = ink
    found = find(rgb)
    assert not found[pen].any()
    assert iou(found, tissue) >= 0.95


def test_pen_can_be_taken_for_what_it_covers() -> None:
    tissue = blobs(SHAPE)
    rgb = paint(tissue)
    rgb[20:40, 20:300] = (40, 150, 80)
    config = TissueConfig(skip_pen=False)
    assert find_tissue(rgb, UM, config)[25:35, 25:295].all()


def test_the_fill_beside_the_scan_is_not_taken_for_the_glass() -> None:
    """A stitcher's pure white around a scan on tinted glass must not make tissue of that glass."""
    tissue = blobs(SHAPE)
    rgb = paint(tissue, lamp=(238, 228, 234))
    rgb[:, 330:] = 255
    rgb[:120] = 255
    assert (rgb == 255).all(axis=2).mean() > 0.5
    np.testing.assert_allclose(glass_colour(rgb), (238, 228, 234), atol=1.5)
    assert iou(find(rgb), tissue & (rgb != 255).any(axis=2)) >= 0.95


def test_glass_is_white_where_there_is_none() -> None:
    tissue = paint(np.ones((100, 100), np.bool_))
    assert tuple(glass_colour(tissue)) == WHITE_RGB


def test_the_dark_beyond_a_scan_is_no_tissue() -> None:
    tissue = blobs(SHAPE)
    rgb = paint(tissue)
    rgb[:, :50] = 0
    found = find(rgb)
    assert not found[:, :50].any()
    assert iou(found, tissue) >= 0.95


def test_lengths_are_in_micrometres() -> None:
    """The same slide, seen at half the resolution, gives the same mask."""
    tissue = blobs((800, 1000))
    fine = find(paint(tissue), 4.0)
    coarse = find(cv2.resize(paint(tissue), (500, 400), interpolation=cv2.INTER_AREA), 8.0)
    assert iou(fine, coarse.repeat(2, axis=0).repeat(2, axis=1)) >= 0.96


def test_specks_and_holes_go_by_their_area() -> None:
    tissue = np.zeros((200, 200), np.bool_)
    tissue[40:160, 40:160] = True
    tissue[60:80, 60:80] = False  # 25,600 um2 at 8 um/px
    tissue[100:140, 100:140] = False  # 102,400 um2
    tissue[5:15, 5:15] = True  # 6,400 um2
    tissue[5:30, 170:195] = True  # 40,000 um2
    found = find(paint(tissue))
    assert found[70, 70]
    assert not found[120, 120]
    assert not found[10, 10]
    assert found[17, 182]
    assert find(paint(tissue), speck_um2=0)[10, 10]
    assert not find(paint(tissue), hole_um2=0)[70, 70]


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 1), (9, 9)])
def test_the_smallest_pictures_work(shape: tuple[int, int]) -> None:
    assert find(np.full((*shape, 3), 244, np.uint8)).shape == shape
    stained = np.full((*shape, 3), STAINED, np.uint8)
    assert find(stained).all()


STAINED = (190, 90, 150)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"smooth_um": -1.0}, "prepare.tissue.smooth_um: -1.0 is not a number of at least 0"),
        ({"hole_um2": float("nan")}, "prepare.tissue.hole_um2: nan is not"),
        ({"thumbnail_mpp": 0.0}, "0 um per pixel is no picture"),
        ({"least_contrast": 9.0}, "9.0 is above most_contrast; give at most 8.0"),
    ],
)
def test_settings_are_checked(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TissueConfig(**settings)  # type: ignore[arg-type]


masks = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(
    lambda shape: st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]).map(
        lambda bits: np.array(bits, np.bool_).reshape(shape)
    )
)


@given(masks, st.integers(0, 6))
def test_the_steps_change_a_mask_one_way_only(mask: NDArray[np.bool_], size: int) -> None:
    for larger in (close(mask, size), grow(mask, size), fill_holes(mask, size)):
        assert larger.shape == mask.shape
        assert (larger | mask == larger).all()
    for smaller in (drop_specks(mask, size), shrink(mask, size)):
        assert (smaller & mask == smaller).all()
    assert (drop_specks(mask, 0) == mask).all()
    assert (fill_holes(mask, 0) == mask).all()


def test_the_threshold_stays_within_its_bounds() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 1, 1000).astype(np.float32)
    assert threshold(low, 4, 8) == 4
    assert 5 < threshold(np.concatenate([low + 4.5, low + 6.5]), 4, 8) < 7
    assert threshold(np.concatenate([low + 10, low + 30]), 4, 8) == 8
    assert threshold(low[:0], 4, 8) == 8


@pytest.mark.parametrize(("task", "seed"), [("focus", 1), ("arrangement", 2)])
def test_phantoms(task: str, seed: int) -> None:
    phantom = draw_phantom(task, LABELS[task][0], seed=(seed, 3), config=PhantomConfig(mpp=2.0, pen=0.0))  # type: ignore[arg-type]
    size = (phantom.pixels.shape[1] // 4, phantom.pixels.shape[0] // 4)
    thumbnail = cv2.resize(phantom.pixels, size, interpolation=cv2.INTER_AREA)
    truth = cv2.resize(phantom.tissue.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    assert iou(find(thumbnail), truth) >= 0.95


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "mpp", "share", "inside", "outside"),
    [
        # places in um, (y, x): cartilage and dermis; the fragment on the left; glass
        ("CMU-1-Small-Region.svs", None, (0.35, 0.5), [(1200, 480), (530, 240)], [(150, 100), (1000, 150)]),
        ("TCGA-CR-7395-01A-01-TS1.svs", 0.5, (0.6, 0.72), [(900, 300), (850, 1300)], [(40, 300), (1700, 300)]),
    ],
)  # fmt: skip
def test_real_slides(
    data_dir: Path,
    name: str,
    mpp: float | None,
    share: tuple[float, float],
    inside: list[tuple[int, int]],
    outside: list[tuple[int, int]],
) -> None:
    """Places and shares were read off the pictures by eye."""
    with open_slide(data_dir / "wsi" / name, mpp=mpp) as slide:
        found = find(slide.thumbnail(UM))
    assert share[0] <= found.mean() <= share[1]
    assert all(found[round(y / UM), round(x / UM)] for y, x in inside)
    assert not any(found[round(y / UM), round(x / UM)] for y, x in outside)
