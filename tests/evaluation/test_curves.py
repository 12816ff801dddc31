"""Curves and their bands: what scikit-learn draws of the repeated slides, spread over redraws of the patients."""

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve, roc_curve

from holoslide.evaluation.curves import Contest, bands


def contest(patients: int, slides_each: int) -> Contest:
    rng = np.random.default_rng(2)
    truth = np.repeat(rng.random(patients) < 0.5, slides_each)
    score = np.round(np.clip(0.5 + 0.3 * (truth - 0.5) + 0.3 * rng.normal(size=len(truth)), 0, 1), 1)
    return Contest("tumour", truth, score, np.repeat([f"p{i}" for i in range(patients)], slides_each))


@pytest.mark.parametrize("seed", range(20))
def test_a_weighted_curve_is_what_scikit_learn_draws_of_the_repeated_slides(seed: int) -> None:
    one = contest(12, 2)
    weights = np.random.default_rng(seed).integers(0, 4, 24)
    truth, score = np.repeat(one.truth_N, weights), np.repeat(one.score_N, weights)
    grid = np.linspace(0.001, 1, 41)
    x, y, _ = roc_curve(truth, score, drop_intermediate=False)
    np.testing.assert_allclose(np.interp(grid, *one.roc(weights)), np.interp(grid, x, y), atol=1e-12)
    recall, precision = one.precision_recall(weights)
    expected, expected_recall, _ = precision_recall_curve(truth, score)
    at = [precision[np.searchsorted(recall, each - 1e-9)] for each in grid]
    expected_at = [expected[::-1][np.searchsorted(expected_recall[::-1], each - 1e-9)] for each in grid]
    np.testing.assert_allclose(at, expected_at, atol=1e-12)


def test_bands_hold_the_curve_and_are_wider_where_slides_share_patients() -> None:
    few, many = contest(10, 6), contest(10, 6)
    many = dataclasses.replace(many, patients_N=np.array([f"p{i}" for i in range(60)]))  # each its own
    few = dataclasses.replace(few, score_N=np.repeat(few.score_N[::6], 6))  # slides of a patient are alike
    many = dataclasses.replace(many, score_N=few.score_N)
    widths = []
    for one in (many, few):
        found = bands(one, np.random.default_rng(0), draws=300)
        assert found is not None
        for band, (x, y) in zip(found, (one.roc(), one.precision_recall()), strict=True):
            inside = np.interp(band.x, x, y)
            assert (band.low <= band.high).all()
            assert ((band.low - 1e-9 <= inside) & (inside <= band.high + 1e-9)).mean() > 0.9
        widths.append(float((found[0].high - found[0].low).mean()))
    assert widths[1] > 1.3 * widths[0] > 0.05


def test_one_patient_has_no_band() -> None:
    one = contest(10, 1)
    assert (
        bands(dataclasses.replace(one, patients_N=np.full(10, "p")), np.random.default_rng(0), draws=20)
        is None
    )
