"""The benchmark of heatmaps counts what it says: cells the lesion touches, what the pictures show, every module."""

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.common import Options
from benchmarks.heatmaps import Judged, judge, lesion_cells, measure
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from holoslide.inference.heatmap import Heatmap, heatmap_paths
from holoslide.slides.cohort import Cohort


def empty(shape: tuple[int, int], origin_l0: tuple[float, float], cell_l0: tuple[float, float]) -> Heatmap:
    """A grid of cells that say nothing, for or against."""
    return Heatmap(
        np.full(shape, 0.5, np.float32), np.zeros((2, *shape), np.float32), np.zeros(2, np.float32),
        origin_l0, cell_l0, ("benign", "lesion"),
    )  # fmt: skip


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    origin=st.tuples(st.integers(-200, 400), st.integers(-200, 400)),
    cell=st.sampled_from(
        [(64.0, 64.0), (40.0, 24.0), (10.0, 14.0)]
    ),  # larger and smaller than the truth's pixels
)
def test_a_cell_is_of_the_lesion_if_the_lesion_touches_it(
    seed: int, origin: tuple[int, int], cell: tuple[float, float]
) -> None:
    """Against a look at each cell and each pixel of the truth, which are 16 x 32 level-0 pixels large."""
    shape_l0 = (480, 640)
    truth = np.random.default_rng(seed).random((30, 20)) < 0.05
    grid = empty((7, 5), origin, cell)
    expected = np.zeros((7, 5), bool)
    for y, x in np.ndindex(7, 5):
        top, left = origin[0] + y * cell[0], origin[1] + x * cell[1]
        for row, column in np.argwhere(truth):
            over_y = min(top + cell[0], (row + 1) * 16) - max(top, row * 16)
            over_x = min(left + cell[1], (column + 1) * 32) - max(left, column * 32)
            expected[y, x] |= over_y > 0 and over_x > 0
    np.testing.assert_array_equal(lesion_cells(grid, truth, shape_l0), expected)


def test_pointing_asks_for_the_strongest_cell_precision_for_the_order_and_share_for_the_sum() -> None:
    lesion = np.array([[True, False, True], [False, False, True]])
    scores = np.array([[3.0, 4.0, 2.0], [1.0, 0.0, np.nan]])
    found = judge(scores, lesion)
    assert found.pointing == 0
    assert found.auprc == pytest.approx(
        (1 / 2 + 2 / 3) / 2
    )  # second and third of five; the sixth has no vote
    assert found.share == pytest.approx((3 + 2) / (3 + 4 + 2 + 1))
    assert judge(np.where(lesion, scores, -scores), lesion) == Judged(
        1, 1, 1
    )  # what speaks against has no share
    assert judge(-np.ones((2, 3)), lesion).share == 0


def test_what_the_pictures_show_is_judged_for_every_module(run_copy: Path, tmp_path: Path) -> None:
    """The lesion's cells say no more for "lesion" than others do, but others say as much for "benign"."""
    truths, ill = tmp_path / "truth", 0
    truths.mkdir()
    for row in Cohort.from_csv(run_copy / "cohort.csv").test:
        truth = np.zeros((32, 32), np.uint8)
        truth[0, 0] = 255 if row.label == "lesion" else 0  # within the first cell
        ill += row.label == "lesion"
        Image.fromarray(truth).save(truths / f"{row.slide_id}.png")
        first, own = heatmap_paths(run_copy / "heatmaps", row.slide_id, 2)
        grid = empty((3, 3), (0.0, 0.0), (50.0, 50.0))
        grid.evidence_LHW[1] = np.arange(9).reshape(3, 3)
        grid.save(first)  # points at the last cell
        grid.evidence_LHW[0] = 3 * grid.evidence_LHW[1]
        grid.save(own)  # points at the first, where the lesion is, once the other class is taken off
    values = {"run": run_copy, "truth": truths, "name": "x"}
    figures = measure(Options(quick=True, device=torch.device("cpu"), values=values)).figures
    assert figures["slides"] == ill > 0
    assert (figures["pointing_evidence"], figures["pointing_evidence_module1"]) == (1, 0)
    assert figures["auprc_evidence"] == 1
    last = 1 / 9  # the lesion's is the last of nine cells; attention, all alike, tells no cell from another
    assert figures["auprc_evidence_module1"] == figures["auprc_attention"] == pytest.approx(last, abs=1e-3)
    assert figures["auprc_chance"] == pytest.approx(last, abs=1e-3)
