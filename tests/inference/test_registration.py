"""From a slide's file to its heatmap and its pictures: what changes on the slide is seen where it is."""

import base64
import io
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from holoslide.evaluation.overlay import Placement, overlay
from holoslide.evaluation.report import PredictionRow, RunReport, render
from holoslide.evaluation.scales import evidence_scale
from holoslide.geometry import Box
from holoslide.inference.heatmap import Heatmap, make_heatmap
from holoslide.inference.predict import SlideScores, score_slide
from holoslide.models.classifier import LocalClassifier
from holoslide.models.options import BackboneConfig, HeadConfig, InputConfig, ModelConfig, StreamConfig
from holoslide.models.streamed import StreamedClassifier
from holoslide.predictions import Prediction, draw_heatmap
from holoslide.reporting import pictures_of, raster_picture
from holoslide.slides import prepare as prepare_module
from holoslide.slides.cohort import SlideRow
from holoslide.slides.prepare import PrepareConfig, PrepareJob, prepare_slide
from holoslide.slides.raster import Raster
from holoslide.slides.reader import Reader, open_slide
from tests.slides.drawn import blobs, paint, write_slide

SHAPE_L0, LESION_L0, RADIUS_L0 = (900, 1100), (507.0, 611.0), 26.0
LESION = (40, 30, 110)
# Cells that speak for themselves: with the norm over the slide one cell's change moves all others' evidence.
CELLS: Any = {"pooling": "auto", "norm": "cohort", "kernel": 3}


def network() -> StreamedClassifier:
    """Two modules of nothing but chance: what they answer means nothing, but depends on what they see."""
    backbone = BackboneConfig(name="resnet18", weights="none", truncate="layer2")
    config = ModelConfig(backbone=backbone, modules=2, heads=HeadConfig(**CELLS))
    generator = torch.Generator().manual_seed(0)
    model = LocalClassifier.from_config(
        config, classes=("a", "b"), inputs=InputConfig(mpp=2.0), generator=generator
    )
    with torch.no_grad():  # heads begin at zero; so little added leaves all cells with much the same weight
        for parameter in model.parameters():
            parameter.add_(0.005 * torch.randn(parameter.shape, generator=generator))
    return StreamedClassifier(model.eval(), StreamConfig(tile_cells=16))


def raster_of(slide: NDArray[np.uint8], folder: Path, bounds: Box | None) -> Path:
    """A slide by the way that every slide goes; `bounds` is the part that the scanner scanned."""

    def bounded(path: Path, **more: Any) -> Reader:
        reader = open_slide(path, **more)
        reader.bounds_l0 = bounds or reader.bounds_l0
        return reader

    (folder / "rasters").mkdir(parents=True)
    with patch.object(prepare_module, "open_slide", bounded):
        job = PrepareJob("one", write_slide(folder / "one.tif", slide, 1.0))
        made = prepare_slide(job, folder / "rasters", PrepareConfig(mpp=2.0))
    assert made.path is not None, made.reason
    with Raster.open(
        made.path
    ) as raster:  # neither the tissue nor the scanned part begins at the slide's corner
        assert min(raster.origin_l0) > 100
    return made.path


def heatmaps(path: Path, network: StreamedClassifier) -> list[Heatmap]:
    """Those of all heads."""
    with Raster.open(path) as raster:
        scores = score_slide(network, raster, explain=range(2))
        return [make_heatmap(scores.cells[k], raster, ("a", "b")) for k in range(2)]


def healthy_and_ill() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A slide without and with a round dark lesion."""
    healthy = paint(blobs(SHAPE_L0, seed=3, reach=0.3), grain=2)
    y, x = np.mgrid[: SHAPE_L0[0], : SHAPE_L0[1]] + 0.5
    ill = healthy.copy()
    ill[np.hypot(y - LESION_L0[0], x - LESION_L0[1]) < RADIUS_L0] = LESION
    return healthy, ill


BOUNDS = [None, Box(213, 305, 711, 822)]


@pytest.mark.parametrize("bounds", BOUNDS)
def test_a_lesion_is_found_where_it_is_within_a_cell(bounds: Box | None, tmp_path: Path) -> None:
    healthy, ill = healthy_and_ill()
    untrained = network()
    before = heatmaps(raster_of(healthy, tmp_path / "healthy", bounds), untrained)
    after = heatmaps(raster_of(ill, tmp_path / "ill", bounds), untrained)
    for one, other in zip(before, after, strict=True):
        assert one.evidence_LHW.shape == other.evidence_LHW.shape
        change_HW = np.nan_to_num(np.abs(other.evidence_LHW - one.evidence_LHW).max(axis=0)) ** 2
        share_HW = change_HW / change_HW.sum()
        middle = ((np.indices(change_HW.shape) + 0.5) * share_HW).sum(axis=(1, 2))
        found_l0 = np.array(one.origin_l0) + middle * one.cell_l0
        assert (np.abs(found_l0 - LESION_L0) <= one.cell_l0).all()


# --- The pictures that people see ------------------------------------------------------------------------------


def hot_on_lesion(
    cells: tuple[int, int] = (12, 9), hot: tuple[int, int] = (7, 5), side: float = 44
) -> Heatmap:
    """Cells that say nothing, but for one, in the middle of the lesion, with nearly all attention and evidence."""
    attention = np.full(cells, 1e-6, np.float32)
    attention[hot] = 1
    evidence = np.zeros((2, *cells), np.float32)
    evidence[1][hot] = 5
    origin = (LESION_L0[0] - (hot[0] + 0.5) * side, LESION_L0[1] - (hot[1] + 0.5) * side)
    return Heatmap(attention, evidence, np.zeros(2, np.float32), origin, (side, side), ("a", "b"))


def middle_and_size(mask: NDArray[np.bool_]) -> tuple[NDArray[np.float64], float]:
    """The middle (y, x) of what is set, and the side of a square as large."""
    assert mask.any()
    return np.argwhere(mask).mean(axis=0) + 0.5, float(np.sqrt(mask.sum()))


def assert_on_lesion(photo: NDArray[np.uint8], drawn: NDArray[np.uint8], cell_px: float) -> None:
    """The hot cell of a drawn map lies on the lesion that the photo shows, to a pixel, and has a cell's size."""
    lesion, across = middle_and_size(np.abs(photo.astype(int) - LESION).sum(axis=2) < 60)
    assert across == pytest.approx(np.sqrt(np.pi) * RADIUS_L0 * cell_px / 44, abs=1.5)
    colours = drawn[: photo.shape[0], : photo.shape[1]].astype(int)
    warmth = colours[..., 0] - colours[..., 2]  # both maps end in yellow or brown
    hot, side = middle_and_size(warmth > warmth.max() / 2)
    assert side == pytest.approx(cell_px, abs=1.5)  # pixels that a strong cell shares are coloured, too
    assert np.abs(hot - lesion).max() <= 1


def embedded(page: str, alt: str) -> NDArray[np.uint8]:
    """A picture of a report, by its description."""
    found = re.search(rf'<img src="data:image/\w+;base64,([^"]+)"[^>]*alt="{re.escape(alt)}"', page)
    assert found is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(found[1]))).convert("RGB"))


@pytest.mark.parametrize("bounds", BOUNDS)
def test_the_pictures_show_the_lesions_cell_on_the_lesion(bounds: Box | None, tmp_path: Path) -> None:
    path, heatmap = raster_of(healthy_and_ill()[1], tmp_path, bounds), hot_on_lesion()
    with Raster.open(path) as raster:
        photo = raster.thumbnail(900)
    scores = SlideScores(np.array([[0.0, 5.0]]), {})
    draw_heatmap(
        Prediction(SlideRow("one", "p"), path, heatmap.classes, scores, (heatmap,)), tmp_path / "maps"
    )
    for name in ("attention", "evidence"):
        drawn = np.asarray(Image.open(tmp_path / "maps" / f"one-{name}.png"))
        assert_on_lesion(photo, drawn, 22)
        assert drawn.shape[0] > photo.shape[0]  # the legend

    said = PredictionRow("one", "p", "b", "b", (0.01, 0.99))
    pictures = pictures_of([said], {"one": path}, [tmp_path / "maps"])
    page = render(RunReport("A run", "", datetime(2026, 1, 1, tzinfo=UTC), ("a", "b"), pictures=pictures))
    for name in ("Attention", "Evidence for b"):
        assert_on_lesion(embedded(page, "slide one"), embedded(page, f"{name} over slide one"), 22)


def test_a_smaller_picture_of_a_raster_keeps_cells_in_place(tmp_path: Path) -> None:
    path, heatmap = raster_of(healthy_and_ill()[1], tmp_path, BOUNDS[1]), hot_on_lesion()
    with Raster.open(path) as raster:
        full = max(raster.shape_px)
        photo, box_px = raster_picture(raster, heatmap, side=full // 2)
    assert max(photo.shape) == full // 2
    drawn = overlay(
        photo,
        heatmap.evidence_LHW[1],
        Placement.in_box(box_px, heatmap.attention_HW.shape),
        evidence_scale(heatmap.evidence_LHW[1], "b"),
    )
    assert_on_lesion(photo, drawn, 11)


def test_the_scale_bar_of_a_strip_of_tissue_is_as_long_as_it_says(tmp_path: Path) -> None:
    """Its picture is so low that whole pixels alone would make a bar of its height 1 % too long or too short."""
    tissue = np.zeros((460, 2800), np.bool_)
    tissue[170:273, 150:2650] = True
    path, heatmap = raster_of(paint(tissue), tmp_path, None), hot_on_lesion()
    draw_heatmap(
        Prediction(
            SlideRow("one", "p"), path, heatmap.classes, SlideScores(np.array([[0.0, 5.0]]), {}), (heatmap,)
        ),
        tmp_path / "maps",
    )
    said = PredictionRow("one", "p", "b", "b", (0.01, 0.99))
    (picture,) = pictures_of([said], {"one": path}, [tmp_path / "maps"])
    with Raster.open(path) as raster:
        width_um = raster.shape_px[1] * raster.mpp
    assert picture.um_per_px is not None
    assert picture.thumbnail_HW3.shape[1] * picture.um_per_px == pytest.approx(width_um)
