"""Phantoms: the label is where it is said to be and nowhere else, and the files are what users' tools read."""

import hashlib
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import openslide
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from holoslide.errors import ConfigError
from holoslide.slides import _ground as ground
from holoslide.slides.phantom import (
    ARRANGEMENT,
    FOCUS,
    LABELS,
    Difficulty,
    Phantom,
    PhantomConfig,
    Task,
    draw_phantom,
    plan,
    write_phantoms,
)

DIALS: tuple[Difficulty, ...] = ("easy", "medium", "hard")
QUICK = PhantomConfig(mpp=2.0, pen=0.0)
COARSE = PhantomConfig(mpp=4.0, pen=0.0)
USUAL = PhantomConfig(mpp=2.0, pen=0.0, stain_spread=0.0)


def both(task: Task, seed: int, difficulty: Difficulty, config: PhantomConfig = QUICK) -> list[Phantom]:
    return [
        draw_phantom(task, label, seed=(seed,), difficulty=difficulty, config=config)
        for label in LABELS[task]
    ]


def distance_to_sites_um(phantom: Phantom, mpp: float) -> NDArray[np.float64]:
    """Of every pixel, to the nearest site."""
    y, x = ((np.arange(side) + 0.5) * mpp for side in phantom.pixels.shape[:2])
    squares = [(y[:, None] - site[0]) ** 2 + (x[None, :] - site[1]) ** 2 for site in phantom.sites_um]
    return np.sqrt(np.min(squares, axis=0))


def test_the_same_seed_gives_the_same_slide() -> None:
    first, second = (draw_phantom("focus", "lesion", seed=(5, 1), config=COARSE) for _ in range(2))
    np.testing.assert_array_equal(first.pixels, second.pixels)
    np.testing.assert_array_equal(first.truth, second.truth)
    other = draw_phantom("focus", "lesion", seed=(5, 2), config=COARSE)
    assert other.pixels.shape != first.pixels.shape or (other.pixels != first.pixels).any()


@pytest.mark.parametrize("difficulty", DIALS)
def test_a_lesion_takes_the_place_of_a_crowd_of_its_colour(difficulty: Difficulty) -> None:
    """One seed, both labels: equal outside the lesion, and of one mean colour inside and as a whole."""
    benign, lesion = both("focus", 3, difficulty, USUAL)
    assert (benign.kinds[0], lesion.kinds[0]) == ("crowd", "lesion")
    assert benign.kinds[1:] == lesion.kinds[1:] == ("crowd",) * FOCUS[difficulty].crowds
    assert not benign.truth.any()
    assert lesion.truth.any()
    cells = round(USUAL.truth_um / USUAL.mpp)
    marked = (lesion.truth == 255).repeat(cells, 0).repeat(cells, 1)
    near = cv2.dilate(marked.astype(np.uint8), np.ones((41, 41))) > 0  # 40 um: nuclei and soft borders
    assert (benign.pixels != lesion.pixels)[marked].mean() > 0.5
    np.testing.assert_array_equal(benign.pixels[~near], lesion.pixels[~near])
    inside, whole = (
        np.abs(benign.pixels[where].mean(0) - lesion.pixels[where].mean(0))
        for where in (near, np.ones_like(near))
    )
    assert inside[:2].max() < 0.5  # red and green are fitted, of 255 levels
    assert inside[2] < 5  # blue follows, as two stains can
    assert whole.max() < 0.2


@pytest.mark.parametrize("difficulty", DIALS)
def test_an_arrangement_changes_only_what_stands_where(difficulty: Difficulty) -> None:
    mixed, segregated = both("arrangement", 4, difficulty, USUAL)
    dial = ARRANGEMENT[difficulty]
    assert Counter(mixed.kinds) == Counter(segregated.kinds) == {"nest": dial.pairs, "follicle": dial.pairs}
    np.testing.assert_array_equal(mixed.sites_um, segregated.sites_um)
    away = distance_to_sites_um(mixed, USUAL.mpp) > dial.radius_um + 8
    np.testing.assert_array_equal(mixed.pixels[away], segregated.pixels[away])
    colours = [slide.pixels.mean((0, 1)) for slide in (mixed, segregated)]
    assert np.abs(colours[0] - colours[1]).max() < 0.3
    areas = [Counter(slide.truth.ravel().tolist()) for slide in (mixed, segregated)]
    assert {128, 255} <= areas[0].keys()
    assert all(abs(areas[0][kind] - areas[1][kind]) < 0.03 * areas[0][kind] for kind in (128, 255))


@pytest.mark.parametrize("difficulty", DIALS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_patch_sees_at_most_one_structure_but_neighbours_tell_the_class(
    difficulty: Difficulty, seed: int
) -> None:
    """What makes a bag of patches blind: no square with a diagonal shorter than the gap touches two of them."""
    dial = ARRANGEMENT[difficulty]
    for label, slide in zip(LABELS["arrangement"], both("arrangement", seed, difficulty), strict=True):
        between = np.linalg.norm(slide.sites_um[:, None] - slide.sites_um[None], axis=-1)
        np.fill_diagonal(between, np.inf)
        assert between.min() >= 2 * dial.radius_um + dial.gap_um - 1e-6
        nearest = between.argmin(1)
        others = np.sort(between, axis=1)[:, 1]
        assert others.min() >= 2 * dial.radius_um + dial.far_um - 1e-6
        alike = {slide.kinds[i] == slide.kinds[j] for i, j in enumerate(nearest)}
        assert alike == {label == "segregated"}
        side = int(dial.gap_um / np.sqrt(2) / QUICK.truth_um)
        count, parts = cv2.connectedComponents((slide.truth > 0).astype(np.uint8))
        assert count == 2 * dial.pairs + 1
        seen = sum(
            cv2.dilate((parts == part).astype(np.uint8), np.ones((side, side))) for part in range(1, count)
        )
        assert seen.max() == 1


def test_mean_colour_does_not_give_the_label_away() -> None:
    config = PhantomConfig(mpp=4.0, pen=0.0, least_um=1500, most_um=1700)  # the lesion is a larger part of it
    colours = {
        label: np.array(
            [
                slide.pixels[slide.tissue.repeat(4, 0).repeat(4, 1)].mean(0)
                for seed in range(12)
                for slide in [draw_phantom("focus", label, seed=(seed, index), config=config)]
            ]
        )
        for index, label in enumerate(LABELS["focus"])
    }
    benign, lesion = colours.values()
    area = (lesion[:, None] > benign[None]).mean((0, 1))  # AUROC of each channel
    assert (np.abs(area - 0.5) < 0.25).all()  # 12 of each: two standard errors are 0.24
    assert np.concatenate([benign, lesion]).std(0).min() > 2  # and stain does vary


@pytest.mark.parametrize("task", LABELS)
def test_tissue_is_where_the_truth_says(task: Task) -> None:
    slide = draw_phantom(task, LABELS[task][1], seed=(8,), config=QUICK)
    cells = round(QUICK.truth_um / QUICK.mpp)
    assert slide.tissue.shape == slide.truth.shape == tuple(s // cells for s in slide.pixels.shape[:2])
    assert 0.2 < slide.tissue.mean() < 0.8
    assert slide.tissue[slide.truth > 0].mean() > 0.97
    blocks = slide.pixels.reshape(*(v for s in slide.tissue.shape for v in (s, cells)), 3).mean((1, 3))
    inner = cv2.erode(slide.tissue.astype(np.uint8), np.ones((5, 5))) > 0
    outer = cv2.dilate(slide.tissue.astype(np.uint8), np.ones((5, 5))) == 0
    saturation = np.ptp(blocks, axis=2)
    assert (saturation[outer] < 15).mean() > 0.998  # the rest is specks, smaller than a cell
    assert (saturation[inner] > 20).mean() > 0.7  # the rest is fat, lumens and clefts
    edges = [slide.pixels[0], slide.pixels[-1], slide.pixels[:, 0], slide.pixels[:, -1]]
    assert all(np.ptp(edge.mean(0)) < 15 for edge in edges)  # glass all around


def test_pen_marks_are_drawn_and_known() -> None:
    for seed in range(3):
        without, marked = (
            draw_phantom("focus", "benign", seed=(seed,), config=PhantomConfig(mpp=4.0, pen=pen))
            for pen in (0.0, 1.0)
        )
        assert not without.ink.any()
        assert marked.ink.any()
        np.testing.assert_array_equal(without.tissue, marked.tissue)
        change = (without.pixels.astype(int) - marked.pixels).max(2) > 40
        cells = change.reshape(*(v for s in marked.ink.shape for v in (s, 4))).mean((1, 3)) > 0.5
        assert (cells & marked.ink).sum() / (cells | marked.ink).sum() > 0.8


def test_a_slide_is_the_same_scene_at_any_resolution() -> None:
    fine, coarse = (
        draw_phantom("focus", "lesion", seed=(2,), config=PhantomConfig(mpp=mpp, pen=0.0))
        for mpp in (1.0, 2.0)
    )
    np.testing.assert_array_equal(fine.sites_um, coarse.sites_um)
    np.testing.assert_array_equal(fine.truth, coarse.truth)
    assert (fine.tissue != coarse.tissue).mean() < 0.03


def test_there_is_room_for_what_is_promised() -> None:
    """At the default size, whatever the seed: a lesion and all crowds, or all pairs."""
    for seed in range(30):
        streams = ground.Streams((seed, 77))
        height, width = (float(side) for side in streams("size").uniform(3000, 4000, 2) // 16 * 16)
        for focus in FOCUS.values():
            room_um = 1.1 * focus.radius_um
            depth_um = ground.pieces((height, width), streams("outline"), most=3, room_um=room_um)
            free, rng = depth_um > 40, streams("places")
            places = [ground.take(free, room_um, rng, gap_um=60) for _ in range(focus.crowds + 1)]
            assert all(place is not None for place in places)
        free = ground.pieces((height, width), streams("outline"), most=1, room_um=0) > 40
        for dial in ARRANGEMENT.values():
            assert ground.pair_up(free, dial, streams("places")) is not None


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_cohort_on_disk(tmp_path: Path) -> None:
    """The same bytes however many processes draw; OpenSlide reads the slides; the table holds together."""
    config, told = PhantomConfig(mpp=2.0, least_um=1500, most_um=1600), list[tuple[int, int]]()
    path = write_phantoms(
        tmp_path / "one", task="focus", slides=8, seed=3, config=config, progress=lambda *n: told.append(n)
    )
    write_phantoms(tmp_path / "two", task="focus", slides=8, seed=3, config=config, workers=2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert told == [(done, 8) for done in range(1, 9)]
    table = pd.read_csv(path, dtype=str)
    assert path == tmp_path / "one" / "slides.csv"
    assert list(table) == ["slide_id", "patient_id", "label", "split", "path"]
    assert Counter(table.label) == {"benign": 4, "lesion": 4}
    assert table.slide_id.is_unique
    scale = pd.read_csv(tmp_path / "one" / "truth" / "truth.csv", dtype={"slide_id": str})
    assert list(scale.slide_id) == list(table.slide_id)
    assert set(scale.um_per_px) == {16.0}
    for row in table.itertuples():
        with openslide.OpenSlide(path.parent / row.path) as slide:
            assert float(slide.properties[openslide.PROPERTY_NAME_MPP_X]) == pytest.approx(2.0, rel=1e-6)
            assert float(slide.properties[openslide.PROPERTY_NAME_MPP_Y]) == pytest.approx(2.0, rel=1e-6)
            assert [round(f) for f in slide.level_downsamples] == [1, 2]
            width, height = slide.dimensions
            glass = np.asarray(slide.read_region((0, 0), 0, (8, 8)).convert("RGB"))
        for folder in ("truth", "tissue"):
            plane = cv2.imread(str(path.parent / folder / f"{row.slide_id}.png"), cv2.IMREAD_UNCHANGED)
            assert plane.shape == (height * 2 / 16, width * 2 / 16)
            assert plane.any() == (folder == "tissue" or row.label == "lesion")
        assert np.ptp(glass.mean((0, 1))) < 12


def test_files_hold_the_drawn_pixels(tmp_path: Path) -> None:
    config = PhantomConfig(mpp=4.0, jpeg_quality=95)
    path = write_phantoms(tmp_path, task="arrangement", slides=8, config=config)
    table = pd.read_csv(path, dtype=str)
    with openslide.OpenSlide(tmp_path / table.path[0]) as slide:
        levels = [
            np.asarray(slide.read_region((0, 0), level, size).convert("RGB")).astype(float)
            for level, size in enumerate(slide.level_dimensions)
        ]
    truth = cv2.imread(str(tmp_path / "truth" / f"{table.slide_id[0]}.png"), cv2.IMREAD_UNCHANGED)
    cells = cv2.resize(levels[0], truth.shape[::-1], interpolation=cv2.INTER_AREA)
    assert cells[truth == 255].mean(0)[0] < cells[truth == 0].mean(0)[0] - 40  # follicles take red away
    half = cv2.resize(levels[0], levels[1].shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs((half - levels[1]).mean((0, 1))).max() < 0.5
    assert np.corrcoef(half.ravel(), levels[1].ravel())[0, 1] > 0.98


@settings(deadline=None)
@given(slides=st.integers(8, 300), seed=st.integers(0, 999), task=st.sampled_from(sorted(LABELS)))
def test_splits_are_by_patient_and_stratified(slides: int, seed: int, task: str) -> None:
    table = pd.DataFrame(plan(task, slides, seed))
    assert len(table) == slides
    assert table.slide_id.is_unique
    by_patient = table.groupby("patient_id")
    assert (by_patient.split.nunique() == 1).all()
    assert (by_patient.label.nunique() == 1).all()
    assert by_patient.size().max() <= 2
    assert (by_patient.size() == 2).any() or slides < 14
    counts = table.groupby(["label", "split"]).size().unstack()
    assert (counts > 0).all(axis=None)
    for label, of_label in counts.iterrows():
        assert abs(of_label.sum() - slides / 2) <= 0.5, label
        for split, share in (("train", 0.6), ("valid", 0.15), ("test", 0.25)):
            assert abs(of_label[split] - share * of_label.sum()) <= 2, (label, split)
    assert table.equals(pd.DataFrame(plan(task, slides, seed)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mpp": 0.1}, "phantom.mpp: 0.1 um per pixel cannot be drawn; give 0.25 to 4"),
        ({"least_um": 5000.0}, "phantom.least_um: no side is between 5000.0 and 4000.0 um"),
        ({"pen": 1.5}, "phantom.pen: 1.5 is no share"),
        ({"truth_um": 10.0}, "phantom.truth_um: 10.0 um is no such scale"),
        ({"jpeg_quality": 0}, "phantom.jpeg_quality: 0 is out of range"),
        ({"stain_spread": float("nan")}, "phantom.stain_spread: nan is out of range"),
    ],
)
def test_settings_that_cannot_be_drawn_are_refused(change: dict[str, float], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        PhantomConfig(**change)  # type: ignore[arg-type]


def test_unknown_names_and_slides_too_small_are_refused(tmp_path: Path) -> None:
    small = PhantomConfig(mpp=4.0, least_um=1200, most_um=1300)
    with pytest.raises(ConfigError, match="have no room for 4 pairs of structures; give larger sides"):
        draw_phantom("arrangement", "mixed", seed=(0,), config=small)
    with pytest.raises(ConfigError, match="focus has no label 'mixed'; give benign or lesion"):
        draw_phantom("focus", "mixed", seed=(0,))
    with pytest.raises(ConfigError, match="there is no task 'find'"):
        draw_phantom("find", "mixed", seed=(0,))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="there is no 'harsh'; give easy, medium, hard"):
        write_phantoms(tmp_path, task="focus", difficulty="harsh")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="4 are too few for three splits; give at least 8"):
        write_phantoms(tmp_path, task="focus", slides=4)
    assert not any(tmp_path.iterdir())
