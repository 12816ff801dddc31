"""Augmentation: any window equals that window of the augmented whole, and the whole is what plain numpy makes."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from holoslide.errors import ConfigError, SlideError
from holoslide.geometry import Box
from holoslide.pixels import ArrayPixels
from holoslide.slides.augment import AugmentConfig, Augmented, Draw, draw

GLASS = (243, 240, 244)
STRONG = AugmentConfig(crop=0.8, crop_least_small=0.3, brightness=0.4, contrast=0.4, saturation=0.6, hue=0.1)


def slide(rng: np.random.Generator, *, cell_px: int, tissue: float = 0.6) -> ArrayPixels:
    height, width = rng.integers(1, 70, 2)
    mask = rng.random((math.ceil(height / cell_px), math.ceil(width / cell_px))) < tissue
    mask[rng.integers(mask.shape[0]), rng.integers(mask.shape[1])] = True
    return ArrayPixels(rng.integers(0, 240, (height, width, 3), dtype=np.uint8), mask, cell_px, GLASS)


def whole(pixels: ArrayPixels | Augmented) -> NDArray[np.uint8]:
    return pixels.read(Box(0, 0, *pixels.shape_px))


def oracle(pixels: ArrayPixels, how: Draw) -> NDArray[np.float64]:
    """The augmented slide on all its mask cells, by indexing and a plain matrix product; nothing rounded."""
    cell = pixels.mask_cell_px
    rows, columns = pixels.mask.shape
    full = pixels.read(Box(0, 0, rows * cell, columns * cell))
    high, wide = max(1, round(how.size[0] * rows)), max(1, round(how.size[1] * columns))
    top, left = round(how.place[0] * (rows - high)), round(how.place[1] * (columns - wide))
    if not pixels.mask[top : top + high, left : left + wide].any():
        top, left, high, wide = 0, 0, rows, columns
    part = full[top * cell : (top + high) * cell, left * cell : (left + wide) * cell].astype(np.float64)
    part = part.transpose(1, 0, 2) if how.transpose else part
    part = np.flip(part, [axis for axis in (0, 1) if how.reverse[axis]])
    if how.colour is None:
        return part
    matrix = np.array(how.colour)
    return np.clip(part @ matrix[:, :3].T + matrix[:, 3], 0, 255)


@settings(deadline=None, max_examples=120)
@given(seed=st.integers(0, 2**32 - 1), cell_px=st.integers(1, 9))
def test_any_window_is_that_window_of_the_augmented_whole(seed: int, cell_px: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = slide(rng, cell_px=cell_px)
    augmented = Augmented(pixels, draw(STRONG, pixels.shape_px, rng))
    height, width = augmented.shape_px
    around = np.full((height + 80, width + 80, 3), augmented.glass)
    around[40 : 40 + height, 40 : 40 + width] = whole(augmented)
    for _ in range(8):
        top, left = rng.integers(-40, [height, width])
        box = Box.at(int(top), int(left), *(int(side) for side in rng.integers(0, 40, 2)))
        np.testing.assert_array_equal(augmented.read(box), around[box.shifted(40, 40).slices])


@settings(deadline=None, max_examples=120)
@given(seed=st.integers(0, 2**32 - 1), cell_px=st.integers(1, 9))
def test_the_augmented_whole_is_what_plain_numpy_makes(seed: int, cell_px: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = slide(rng, cell_px=cell_px, tissue=0.1)
    how = draw(STRONG, pixels.shape_px, rng)
    augmented = Augmented(pixels, how)
    expected = oracle(pixels, how)
    padded = augmented.read(Box(0, 0, *expected.shape[:2]))  # glass where ragged cells were left ragged
    assert np.abs(padded - expected).max() < 1.5  # cv2 rounds its coefficients
    assert all(0 <= e - s < cell_px for e, s in zip(expected.shape[:2], augmented.shape_px, strict=True))


@settings(deadline=None, max_examples=120)
@given(seed=st.integers(0, 2**32 - 1), cell_px=st.integers(1, 9))
def test_the_mask_is_exact(seed: int, cell_px: int) -> None:
    """A pixel is tissue if and only if its cell of the mask says so, but for what lies beyond the raster."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 70, 2)
    mask = rng.random((math.ceil(height / cell_px), math.ceil(width / cell_px))) < 0.5
    mask[rng.integers(mask.shape[0]), rng.integers(mask.shape[1])] = True
    black = np.zeros((height, width, 3), np.uint8)
    how = dataclasses.replace(draw(STRONG, (height, width), rng), colour=None)
    augmented = Augmented(ArrayPixels(black, mask, cell_px, GLASS), how)
    rows, columns = (side * cell_px for side in augmented.mask.shape)
    tissue = (augmented.read(Box(0, 0, rows, columns)) != GLASS).any(2)
    if augmented.mask.shape == mask.shape[:: -1 if how.transpose else 1]:
        how = dataclasses.replace(how, size=(1.0, 1.0))  # nothing was cropped, or the crop held no tissue
    everywhere = Augmented(ArrayPixels(black, None, cell_px, GLASS), how)
    raster = (everywhere.read(Box(0, 0, rows, columns)) != GLASS).any(2)
    cells = augmented.mask.repeat(cell_px, 0).repeat(cell_px, 1)
    np.testing.assert_array_equal(tissue, cells & raster)


def test_without_augmentation_nothing_changes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        pixels = slide(rng, cell_px=7)
        how = draw(AugmentConfig.none(), pixels.shape_px, rng)
        augmented = Augmented(pixels, how)
        assert how == Draw()
        assert augmented.shape_px == pixels.shape_px
        np.testing.assert_array_equal(whole(augmented), whole(pixels))
        np.testing.assert_array_equal(augmented.mask, pixels.mask)
        np.testing.assert_array_equal(augmented.glass, pixels.glass)


def test_draws_are_the_papers() -> None:
    rng = np.random.default_rng(1)
    draws = [draw(AugmentConfig(), (2999, 3000), rng) for _ in range(4000)]
    cropped = [each for each in draws if each.size != (1.0, 1.0)]
    assert len(cropped) / len(draws) == pytest.approx(0.6, abs=0.03)
    heights, widths = np.array([each.size for each in cropped]).T
    assert 0.9 <= heights.min() < 0.902
    assert 0.5 <= widths.min() < 0.51
    assert max(heights.max(), widths.max()) <= 1
    assert heights.mean() == pytest.approx(0.95, abs=0.005)
    assert widths.mean() == pytest.approx(0.75, abs=0.02)
    places = np.array([each.place for each in cropped])
    assert places.mean(0) == pytest.approx([0.5, 0.5], abs=0.03)
    turns = Counter((each.transpose, each.reverse) for each in draws)
    assert len(turns) == 8
    assert max(turns.values()) / len(draws) == pytest.approx(1 / 8, abs=0.02)
    assert min(turns.values()) / len(draws) == pytest.approx(1 / 8, abs=0.02)


@pytest.mark.parametrize("axis", [(), (0,), (1,), (0, 1)])
def test_flips_have_their_share(axis: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    draws = [draw(AugmentConfig(turn=False), (50, 50), rng) for _ in range(2000)]
    reverse = (0 in axis, 1 in axis)
    assert not any(each.transpose for each in draws)
    assert np.mean([each.reverse == reverse for each in draws]) == pytest.approx(0.25, abs=0.04)


def test_turns_are_quarter_turns() -> None:
    """Each draw without flips is one of numpy's four rotations, and all four occur."""
    rng = np.random.default_rng(3)
    pixels = ArrayPixels(rng.integers(0, 255, (5, 8, 3), dtype=np.uint8))
    rotations = [np.rot90(whole(pixels), turns) for turns in range(4)]
    config = AugmentConfig(crop=0, flip=0, brightness=0, contrast=0, saturation=0, hue=0)
    seen = set()
    for _ in range(40):
        result = whole(Augmented(pixels, draw(config, pixels.shape_px, rng)))
        seen.add(next(turns for turns, each in enumerate(rotations) if np.array_equal(each, result)))
    assert seen == {0, 1, 2, 3}


def test_colour_is_within_its_bounds() -> None:
    """Greys stay grey under saturation and hue; brightness and contrast move them as far as they may."""
    rng = np.random.default_rng(4)
    grey = np.full(4, 120.0)
    grey[3] = 1
    config = AugmentConfig(brightness=0, contrast=0, saturation=0.5, hue=0.2)
    for _ in range(50):
        matrix = np.array(draw(config, (9, 9), rng).colour)
        np.testing.assert_allclose(matrix @ grey, grey[:3], atol=1e-9)
    factors = []
    for _ in range(500):
        matrix = np.array(draw(AugmentConfig(contrast=0), (9, 9), rng).colour)
        factors.append((matrix @ grey)[0] / 120)
    assert min(factors) == pytest.approx(0.9, abs=0.01)
    assert max(factors) == pytest.approx(1.1, abs=0.01)
    pivot = np.array([200.0, 200, 200, 1])
    matrix = np.array(draw(AugmentConfig(brightness=0, contrast=0.5, pivot=200), (9, 9), rng).colour)
    np.testing.assert_allclose(matrix @ pivot, pivot[:3], atol=1e-9)


def test_a_draw_follows_its_generator() -> None:
    first, second = (draw(AugmentConfig(), (4000, 4000), np.random.default_rng([7, 3])) for _ in range(2))
    assert first == second
    assert first != draw(AugmentConfig(), (4000, 4000), np.random.default_rng([7, 4]))


def test_a_crop_without_tissue_is_not_made() -> None:
    mask = np.zeros((10, 10), np.bool_)
    mask[9, 9] = True
    pixels = ArrayPixels(np.zeros((40, 40, 3), np.uint8), mask, 4, GLASS)
    assert Augmented(pixels, Draw(size=(0.5, 0.5), place=(0.0, 0.0))).shape_px == (40, 40)
    cut = Augmented(pixels, Draw(size=(0.5, 0.5), place=(1.0, 1.0)))
    assert cut.shape_px == (20, 20)
    assert cut.mask.sum() == 1


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"crop": 1.5}, "augment.crop: 1.5 is out of range; give 0 to 1"),
        ({"hue": float("nan")}, "augment.hue: nan is out of range; give 0 to 0.5"),
        ({"crop_least": 0.0}, "augment.crop_least: a crop to 0 of a side leaves nothing"),
        ({"pivot": -1.0}, "augment.pivot: -1.0 is out of range; give 0 to 255"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        AugmentConfig(**settings)  # type: ignore[arg-type]


def test_pixels_that_cannot_be_are_refused() -> None:
    with pytest.raises(SlideError, match="float64 values of shape"):
        ArrayPixels(np.zeros((4, 4, 3)))  # type: ignore[arg-type]
    with pytest.raises(SlideError, match=r"does not cover 9 x 9 px; give a mask of \(3, 3\)"):
        ArrayPixels(np.zeros((9, 9, 3), np.uint8), np.ones((2, 2), np.bool_), 4)
