"""Colours, ticks and numbers of heatmaps: strong cells stand out, weak ones are seen, and all can read them."""

import matplotlib
import numpy as np
import pytest
from numpy.typing import NDArray

from holoslide.evaluation.scales import (
    DIVERGING,
    SEQUENTIAL,
    attention_scale,
    attention_sums,
    evidence_for,
    evidence_scale,
    evidence_sums,
    relative_attention,
)

# A slide of the demo: one cell makes the answer, crowds speak against it in vain, most cells say next to nothing.
CONTESTED = np.r_[7.65, 0.4, np.full(12, -0.04), np.full(800, 0.0001), np.nan].reshape(5, 163)


def test_relative_attention_has_mean_one_over_the_cells_that_vote() -> None:
    attention = np.array([[1e-7, np.nan], [3e-7, 2e-7]], np.float32)
    relative = relative_attention(attention / np.nansum(attention))
    np.testing.assert_allclose(relative, [[0.5, np.nan], [1.5, 1.0]], rtol=1e-6)
    assert np.isnan(relative_attention(np.full((2, 2), np.nan))).all()


def test_evidence_is_against_the_other_classes_so_that_a_common_shift_says_nothing() -> None:
    rng = np.random.default_rng(0)
    two, three = rng.normal(size=(2, 4, 5)), rng.normal(size=(3, 4, 5))
    np.testing.assert_allclose(evidence_for(two, 1), two[1] - two[0])
    np.testing.assert_allclose(evidence_for(three, 0), three[0] - (three[1] + three[2]) / 2)
    np.testing.assert_allclose(evidence_for(three + rng.normal(size=(4, 5)), 2), evidence_for(three, 2))
    np.testing.assert_allclose(sum(evidence_for(three, c) for c in range(3)), 0, atol=1e-12)


def test_a_strong_cell_stands_out_from_crowds_that_it_outweighs_and_weak_cells_are_still_seen() -> None:
    scale = evidence_scale(CONTESTED, "tumour")
    assert (scale.low, scale.high) == (-7.65, 7.65)
    strongest, second, crowd, nothing, zero = np.abs(
        2 * scale.position(np.array([7.65, 0.4, -0.04, 0.0001, 0])) - 1
    )
    assert strongest == 1
    assert 0.15 < crowd < second - 0.2 < strongest - 0.4
    assert zero == pytest.approx(0)
    assert nothing < 0.01
    colours = scale.colour(np.array([7.65, -0.04, 0.0]))
    assert np.abs(colours[0] - colours[2]).sum() > 3 * np.abs(colours[1] - colours[2]).sum() > 60


def test_no_two_strengths_of_evidence_look_alike_because_the_colours_ran_out() -> None:
    scale = evidence_scale(CONTESTED, "tumour")
    sizes = np.geomspace(0.01, 7.65, 12)
    assert (np.diff(scale.position(sizes)) > 0.03).all()
    np.testing.assert_allclose(scale.position(-sizes), 1 - scale.position(sizes))
    np.testing.assert_allclose(scale.values(scale.position(sizes)), sizes)


def test_the_legend_of_evidence_names_the_true_ends_and_whose_scale_it_is() -> None:
    scale = evidence_scale(CONTESTED, "tumour")
    places, labels = zip(*scale.tick_places(), strict=True)
    assert labels == ("−7.65", "−0.1", "0", "+0.1", "+7.65")
    assert places[0::2] == pytest.approx((0, 0.5, 1))
    assert places[1] == pytest.approx(1 - places[3])
    assert scale.unit == "evidence for tumour above the others, in logits per cell; this slide's own scale"
    assert evidence_scale(np.zeros((2, 2)), "x").high == 1.0
    assert evidence_scale(np.full((2, 2), np.nan), "x").high == 1.0


@pytest.mark.parametrize("size", [3e-5, 0.00112, 0.0699, 7.65, 1234.5])
@pytest.mark.parametrize("ratio", [1, 3, 20, 1e3, 1e6])
def test_labels_of_ticks_do_not_overlap(size: float, ratio: float) -> None:
    values = np.r_[size, np.full(int(min(ratio, 2000)), size / ratio)]
    for scale in (evidence_scale(values, "x"), attention_scale([relative_attention(values)])):
        ticks = scale.tick_places()
        assert [ticks[0][0], ticks[-1][0]] == pytest.approx([0, 1])
        centres = [place for place, _ in ticks]
        widths = [len(label) / 40 for _, label in ticks]  # a legend is about forty characters wide
        centres[0], centres[-1] = widths[0] / 2, 1 - widths[-1] / 2
        for left, right in zip(range(len(ticks)), range(1, len(ticks)), strict=False):
            assert centres[left] + widths[left] / 2 <= centres[right] - widths[right] / 2


def test_a_line_says_how_evidence_adds_up() -> None:
    assert evidence_sums(CONTESTED) == (
        "814 cells add up to +7.65: +8.13 for, −0.48 against. "
        "The strongest adds +7.65; 2 hold 90 % of what is said."
    )
    assert evidence_sums(-CONTESTED).startswith("814 cells add up to −7.65: +0.48 for, −8.13 against.")
    assert evidence_sums(np.full((2, 2), np.nan)) == evidence_sums(np.zeros((2, 2))) == ""


def test_a_line_says_how_attention_adds_up() -> None:
    relative = relative_attention(np.array([[0.5, 0.3, 0.15, 0.05, np.nan]]))
    assert attention_sums(relative) == "The strongest of 4 cells holds 50 % of all attention; 3 hold 90 %."
    assert attention_sums(np.full((2, 2), np.nan)) == ""


def test_attention_runs_from_the_weakest_cell_to_the_strongest() -> None:
    scale = attention_scale([np.array([[0.05, 1.0, 393.0, np.nan]])])
    assert (scale.low, scale.high) == (0.05, 393.0)
    assert [label for _, label in scale.tick_places()] == ["0.05 ×", "1 ×", "10 ×", "393 ×"]
    assert scale.position(np.array([0.05, 1.0, 393.0])).tolist() == pytest.approx([0, 0.334, 1], abs=1e-3)
    assert scale.unit == "times the average cell's attention; this slide's own scale"


def test_several_slides_share_one_scale_of_attention_and_it_says_so() -> None:
    scale = attention_scale([np.array([[0.1, 1.0, 11.0]]), np.array([[np.nan, 30.0]])])
    assert (scale.low, scale.high) == (0.1, 30.0)
    assert scale.unit == "times the average cell's attention; one scale for all slides here"


def test_attention_that_is_all_alike_is_not_stretched_and_faint_cells_do_not_take_the_colours() -> None:
    for even in (attention_scale([]), attention_scale([np.array([[0.99, 1.01]])])):
        assert (even.low, even.high) == (0.5, 2.0)
    faint = attention_scale([np.array([[0.0, 1e-30, 1.0, 20.0]])])
    assert (faint.low, faint.tick_places()[0][1]) == (0.001, "≤ 0.001 ×")


# --- Colours -----------------------------------------------------------------------------------------------------

# Machado, Oliveira and Fernandes (2009), severity 1: what the eye without one kind of cone sees, in linear RGB.
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
RGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def lab(name: str, points: int, seen_by: str = "none") -> NDArray[np.float64]:
    """CIELAB (D65) of a map from low to high, (points, 3)."""
    rgb = matplotlib.colormaps[name](np.linspace(0, 1, points))[:, :3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ BLINDNESS[seen_by].T, 0, 1) @ RGB_TO_XYZ.T / RGB_TO_XYZ.sum(axis=1)
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (xyz * 24389 / 27 + 16) / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def test_the_maps_can_be_read_by_lightness_alone() -> None:
    rising = np.diff(lab(SEQUENTIAL, 65)[:, 0])
    assert (rising > 0).all()
    assert rising.max() < 2.5 * rising.mean()
    diverging = lab(DIVERGING, 65)[:, 0]
    assert diverging.argmax() == 32
    assert (np.diff(diverging[:33]) > 0).all()
    assert (np.diff(diverging[32:]) < 0).all()


def unevenness(name: str) -> float:
    """How far the smallest or the largest of 32 steps of colour is from their mean, as a factor."""
    steps = np.linalg.norm(np.diff(lab(name, 33), axis=0), axis=1)
    return float(max(steps.max() / steps.mean(), steps.mean() / steps.min()))


def test_equal_steps_of_a_scale_look_about_equally_large() -> None:
    assert unevenness(SEQUENTIAL) < 1.75
    assert unevenness(DIVERGING) < 1.9
    assert unevenness("jet") > 2.2  # what the bounds are there to refuse


@pytest.mark.parametrize("seen_by", BLINDNESS)
@pytest.mark.parametrize("name", [SEQUENTIAL, DIVERGING])
def test_for_and_against_strong_and_weak_look_different_to_the_colour_blind(name: str, seen_by: str) -> None:
    low, quarter, middle, upper, high = lab(name, 5, seen_by)
    for one, other in ((low, high), (quarter, upper), (low, middle), (middle, high)):
        assert np.linalg.norm(one - other) > 40  # 2 can just be told apart
    if name == DIVERGING:  # red against green, of the same form and lightness, would not do
        red_green = lab("RdYlGn", 5, seen_by)
        assert seen_by == "none" or np.linalg.norm(red_green[0] - red_green[4]) < 40
