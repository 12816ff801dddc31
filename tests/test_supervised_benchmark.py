"""The benchmark that tells a network of every patch: the patches lie where the truth says, and it learns them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.mil import PARTS, network
from benchmarks.supervised import (
    Slide,
    Slides,
    answers,
    averaged,
    of_patches,
    patches_of,
    reached,
    scores,
    slides_of,
    some_of,
    train,
    tumour_px,
)
from PIL import Image

from holoslide.geometry import Box, ceil_div
from holoslide.prepared import Prepared, prepare_cohort
from holoslide.slides.cohort import Cohort, SplitConfig
from holoslide.slides.phantom import PhantomConfig, write_phantoms
from holoslide.slides.prepare import PrepareConfig
from holoslide.slides.raster import Raster

MPP, SIDE, TRUTH_UM = 4.0, 40, 16


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Path]:
    folder = tmp_path_factory.mktemp("supervised")
    config = PhantomConfig(least_um=2000, most_um=2200, mpp=4.0, truth_um=TRUTH_UM)
    cohort = Cohort.from_csv(write_phantoms(folder, task="focus", slides=16, config=config))
    prepared = prepare_cohort(
        cohort.with_splits(SplitConfig()), folder / "rasters", PrepareConfig(mpp=MPP), labels=True
    )
    return prepared, folder / "truth"


def test_patches_are_a_grid_on_the_slide_and_tumour_where_the_truth_is(drawn: tuple[Prepared, Path]) -> None:
    prepared, truth = drawn
    shifted = lesions = 0
    for row in prepared.cohort:
        picture = np.asarray(Image.open(truth / f"{row.slide_id}.png")) > 0
        with Raster.open(prepared.rasters[row.slide_id]) as raster:
            top, left = (round(o / each) for o, each in zip(raster.origin_l0, raster.l0_per_px, strict=True))
            shifted += top % SIDE != 0
            found_px = tumour_px(picture, raster)
            for y, x in np.random.default_rng(0).integers((0, 0), raster.shape_px, (50, 2)).tolist():
                um = ((top + y + 0.5) * MPP, (left + x + 0.5) * MPP)
                assert found_px[y, x] == picture[int(um[0] // TRUTH_UM), int(um[1] // TRUTH_UM)]
            expected, of_tumour, where = [], [], []
            per = round(SIDE * MPP) // TRUTH_UM
            for y in range(ceil_div(picture.shape[0], per)):
                for x in range(ceil_div(picture.shape[1], per)):
                    box = Box.at(y * SIDE - top, x * SIDE - left, SIDE, SIDE)
                    if on_tissue(raster, box) >= 0.5:
                        expected.append(raster.read(box))
                        where.append([y, x])
                        share = picture[y * per : (y + 1) * per, x * per : (x + 1) * per].sum() / per**2
                        of_tumour.append(share >= 0.5)
            patches, places, tumour_N = patches_of(raster, picture, SIDE)
        assert np.array_equal(patches, np.stack(expected))
        assert tumour_N.tolist() == of_tumour
        assert (places - places[0]).tolist() == (np.array(where) - where[0]).tolist()
        assert tumour_N.any() == (row.label != prepared.cohort.classes[0])
        lesions += tumour_N.sum()
    assert shifted
    assert lesions


def on_tissue(raster: Raster, box: Box) -> float:
    """The share of a box that is in the mask, pixel by pixel."""
    inside = 0
    for y in range(max(0, box.top), min(box.bottom, raster.shape_px[0])):
        for x in range(max(0, box.left), min(box.right, raster.shape_px[1])):
            inside += int(raster.mask[y // raster.mask_cell_px, x // raster.mask_cell_px])
    return inside / box.area


@pytest.fixture(scope="module")
def slides(drawn: tuple[Prepared, Path]) -> Slides:
    found = slides_of(*drawn, SIDE)
    assert [len(found[part]) for part in PARTS] == [len(getattr(drawn[0].cohort, part)) for part in PARTS]
    return found


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_what_is_told_is_learned(slides: Slides, *, frozen: bool) -> None:
    """Lesions of the demo's kind are crowds of dark nuclei: random filters tell them apart, once told."""
    net = train(slides, "none", frozen=frozen, epochs=2, seed=0)
    assert of_patches(slides["test"], scores(net, slides["test"])) > 0.85
    torch.manual_seed(0)
    fresh = network("none")
    for part, stands in (("stem", True), ("parts", frozen)):
        now, before = (getattr(model, part).state_dict().values() for model in (net.model, fresh))
        assert all(map(torch.equal, now, before)) == stands


def test_all_that_is_promised_is_told(slides: Slides) -> None:
    figures = reached(slides, "none", frozen=True, epochs=1, seeds=2)
    assert set(figures) == {
        f"frozen_{name}" for name in ("auroc", "seeds", "interval", "patches_auroc", "chosen")
    }
    seeds = [float(value) for value in str(figures["frozen_seeds"]).split(", ")]
    assert len(seeds) == 2
    assert figures["frozen_auroc"] == pytest.approx(sum(seeds) / 2, abs=1e-3)


def test_a_slide_answers_by_its_strongest_patches_and_those_around_them() -> None:
    def slide(places: list[list[int]], tumour: list[bool]) -> Slide:
        return Slide(np.zeros((len(places), 1, 1, 3), np.uint8), np.array(places), np.array(tumour), 0, "p")

    slides = [slide([[0, 0], [0, 1], [2, 2], [1, 2]], [True, False, False, False]), slide([[5, 5]], [False])]
    found = [np.array([3.0, -1, 5, 0]), np.array([0.0])]
    assert answers(slides, found, 1, 1).tolist() == [5, 0]
    assert answers(slides, found, 1, 2).tolist() == [4, 0]
    assert answers(slides, found, 1, 16).tolist() == pytest.approx([7 / 4, 0])
    assert averaged(slides[0].places, found[0], 3).tolist() == pytest.approx([1, 2 / 3, 5 / 2, 4 / 3])
    assert answers(slides, found, 3, 1).tolist() == pytest.approx([5 / 2, 0])
    assert of_patches(slides, found) == pytest.approx(3 / 4)
    assert some_of(slides[0], 2).places.tolist() == [[0, 0], [0, 1], [1, 2]]
