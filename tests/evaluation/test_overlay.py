"""Heatmaps over pictures: they lie where the cells lie, and have the colours of their legend."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from holoslide.evaluation.overlay import Placement, box_on_picture, legend_strip, on_pixels, overlay
from holoslide.evaluation.scales import SEQUENTIAL, Scale, attention_scale, evidence_scale

LINEAR = Scale(0.0, 1.0, SEQUENTIAL, "made up", ((0.0, "0"), (1.0, "1")), linear_width=1e6)


def supersampled(
    values: NDArray[np.float64], placement: Placement, shape: tuple[int, int], *, fine: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The oracle: look at fine x fine points of every pixel, one by one."""
    mean, share = np.full(shape, np.nan), np.zeros(shape)
    for y, x in np.ndindex(shape):
        seen = []
        for i, j in np.ndindex(fine, fine):
            row = math.floor((y + (i + 0.5) / fine - placement.origin_px[0]) / placement.cell_px[0])
            column = math.floor((x + (j + 0.5) / fine - placement.origin_px[1]) / placement.cell_px[1])
            if 0 <= row < values.shape[0] and 0 <= column < values.shape[1]:
                seen.append(values[row, column])
        voting = [value for value in seen if not math.isnan(value)]
        share[y, x] = len(voting) / fine**2
        if voting:
            mean[y, x] = np.mean(voting)
    return mean, share


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1), cell=st.sampled_from([(0.25, 0.5), (1.0, 1.5), (2.25, 3.0), (5.0, 0.75)])
)
def test_a_pixel_shows_the_mean_of_the_cells_it_lies_on(seed: int, cell: tuple[float, float]) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=tuple(rng.integers(1, 9, 2)))
    values[rng.random(values.shape) < 0.3] = np.nan
    origin = (
        rng.integers(-16, 16, 2) / 4
    )  # edges fall on quarters of pixels, where four points a side see them
    placement = Placement((float(origin[0]), float(origin[1])), cell)
    mean, share = on_pixels(values, placement, (9, 7))
    expected_mean, expected_share = supersampled(values, placement, (9, 7), fine=4)
    np.testing.assert_allclose(share, expected_share, atol=1e-12)
    np.testing.assert_allclose(mean, expected_mean, atol=1e-9)


@settings(deadline=None, max_examples=80)
@given(
    where=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    cell_l0=st.tuples(st.floats(30, 1200), st.floats(30, 1200)),
    shown_l0=st.tuples(st.floats(0, 4000), st.floats(0, 4000)),
    l0_per_px=st.floats(8, 30),  # a cell is a pixel or more, so half a pixel is within half a cell
    cell=st.tuples(st.integers(0, 11), st.integers(0, 6)),
)
def test_a_cell_at_level_0_lands_on_its_pixel_wherever_tissue_and_picture_begin(
    where: tuple[float, float],
    cell_l0: tuple[float, float],
    shown_l0: tuple[float, float],
    l0_per_px: float,
    cell: tuple[int, int],
) -> None:
    shape_px, shape_cell = (160, 210), (12, 7)
    # A cell somewhere in the picture, wholly; the rest of its grid may reach past any of the picture's sides.
    first_l0 = [shown_l0[i] + where[i] * (shape_px[i] * l0_per_px - cell_l0[i]) for i in range(2)]
    origin_l0 = [first_l0[i] - cell[i] * cell_l0[i] for i in range(2)]
    far_l0 = [origin_l0[i] + shape_cell[i] * cell_l0[i] for i in range(2)]
    picture_l0 = (*shown_l0, shown_l0[0] + shape_px[0] * l0_per_px, shown_l0[1] + shape_px[1] * l0_per_px)
    values = np.zeros(shape_cell)
    values[cell] = 1.0
    box_l0 = (origin_l0[0], origin_l0[1], far_l0[0], far_l0[1])
    placement = Placement.in_box(box_on_picture(box_l0, picture_l0, shape_px), values.shape)
    # Straight from level 0, without the functions under test.
    centre = [(first_l0[i] + cell_l0[i] / 2 - shown_l0[i]) / l0_per_px for i in range(2)]
    assert placement.centre_px(*cell) == pytest.approx(tuple(centre), abs=1e-6)
    mean, share = on_pixels(values, placement, shape_px)
    weight = np.nan_to_num(mean) * share
    for i in range(2):
        middles = np.arange(shape_px[i]) + 0.5
        found = float((weight.sum(axis=1 - i) * middles).sum() / weight.sum())
        side = cell_l0[i] / l0_per_px
        assert abs(found - centre[i]) <= min(0.5, side / 2) + 1e-6
        brightest = np.unravel_index(np.argmax(weight), shape_px)[i] + 0.5
        assert abs(brightest - centre[i]) <= side / 2 + 0.5


def test_the_drawn_colour_of_a_lesion_is_where_the_lesion_is() -> None:
    picture = np.full((80, 60, 3), 230, np.uint8)
    values = np.zeros((10, 6))
    values[7, 2] = 1.0
    drawn = overlay(picture, values, Placement((12.0, 9.0), (6.0, 7.0)), LINEAR).astype(int)
    low, high = (drawn[13, 10], drawn[57, 26])  # pixel of the first cell, and of the lesion's middle
    assert np.abs(high - low).sum() > 100
    is_lesion = (drawn == high).all(axis=2)
    rows, columns = np.nonzero(is_lesion)
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (54, 60, 23, 30)
    assert is_lesion.sum() == 6 * 7


def test_where_there_is_no_cell_the_slide_shows_through_in_grey() -> None:
    rng = np.random.default_rng(5)
    picture = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    values = np.full((5, 6), np.nan)
    values[0, 0] = 0.5
    drawn = overlay(picture, values, Placement((0.0, 0.0), (4.0, 4.0)), LINEAR)
    assert drawn.shape == picture.shape
    assert drawn.dtype == np.uint8
    outside = np.ones((20, 24), bool)
    outside[:4, :4] = False
    assert (np.ptp(drawn[outside].astype(int), axis=1) == 0).all()
    assert np.ptp(drawn[:4, :4].astype(int), axis=2).max() > 20
    brightness = picture @ np.array([0.2126, 0.7152, 0.0722])
    assert np.corrcoef(drawn[outside][:, 0], brightness[outside])[0, 1] > 0.999


def test_opacity_zero_is_the_grey_picture_and_one_is_the_map() -> None:
    picture = np.full((4, 4, 3), 200, np.uint8)
    place = Placement((0.0, 0.0), (4.0, 4.0))
    pure = overlay(picture, np.array([[1.0]]), place, LINEAR, opacity=1.0)
    np.testing.assert_array_equal(pure, np.broadcast_to(np.rint(LINEAR.colour(np.array([1.0]))), pure.shape))
    assert np.ptp(overlay(picture, np.array([[1.0]]), place, LINEAR, opacity=0.0)) == 0


@pytest.mark.parametrize(
    "scale", [LINEAR, attention_scale([np.array([[9.0]])]), evidence_scale(np.ones((1, 1)), "x")]
)
def test_the_legend_shows_the_colours_that_are_drawn(scale: Scale) -> None:
    strip = legend_strip(scale, 3)
    assert strip.shape == (1, 3, 3)
    middle = (scale.low + scale.high) / 2 if scale.linear_width else math.sqrt(scale.low * scale.high)
    grey = np.full((3, 3, 3), round(255 - (255 - 205.0) / 0.7), np.uint8)  # what the overlay turns into 205
    values = np.tile([scale.low, middle, scale.high], (3, 1))
    drawn = overlay(grey, values, Placement((0.0, 0.0), (1.0, 1.0)), scale)
    assert np.abs(drawn[0].astype(int) - strip[0].astype(int)).max() <= 1


def test_what_cannot_be_drawn_is_refused() -> None:
    picture, place = np.zeros((4, 4, 3), np.uint8), Placement((0.0, 0.0), (1.0, 1.0))
    with pytest.raises(ValueError, match=r"a picture is \(H, W, 3\) of uint8, not \(4, 4\)"):
        overlay(picture[..., 0], np.zeros((2, 2)), place, LINEAR)
    with pytest.raises(ValueError, match="of float64"):
        overlay(picture.astype(np.float64), np.zeros((2, 2)), place, LINEAR)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a heatmap is \(H, W\)"):
        overlay(picture, np.zeros((2, 2, 2)), place, LINEAR)
    with pytest.raises(ValueError, match="infinite"):
        overlay(picture, np.array([[np.inf]]), place, LINEAR)
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="cells larger than nothing"):
            Placement((0.0, 0.0), (1.0, wrong))
