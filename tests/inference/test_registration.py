"""From a slide's file to its heatmap: what changes on the slide changes the cells that lie there, at level 0."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from holoslide.geometry import Box
from holoslide.inference.heatmap import Heatmap, make_heatmap
from holoslide.inference.predict import score_slide
from holoslide.models.backbone import BackboneConfig
from holoslide.models.classifier import InputConfig, LocalClassifier, ModelConfig
from holoslide.models.heads import HeadConfig
from holoslide.models.streamed import StreamConfig, StreamedClassifier
from holoslide.slides import prepare as prepare_module
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


def heatmaps(
    slide: NDArray[np.uint8], folder: Path, network: StreamedClassifier, bounds: Box | None
) -> list[Heatmap]:
    """Those of all heads, by the way that every slide goes; `bounds` is the part that the scanner scanned."""

    def bounded(path: Path, **more: Any) -> Reader:
        reader = open_slide(path, **more)
        reader.bounds_l0 = bounds or reader.bounds_l0
        return reader

    (folder / "rasters").mkdir(parents=True)
    with patch.object(prepare_module, "open_slide", bounded):
        job = PrepareJob("one", write_slide(folder / "one.tif", slide, 1.0))
        made = prepare_slide(job, folder / "rasters", PrepareConfig(mpp=2.0))
    assert made.path is not None, made.reason
    with Raster.open(made.path) as raster:
        assert (
            min(raster.origin_l0) > 0
        )  # neither the tissue nor the scanned part begins at the slide's corner
        scores = score_slide(network, raster, explain=range(2))
        return [make_heatmap(scores.cells[k], raster, ("a", "b")) for k in range(2)]


@pytest.mark.parametrize("bounds", [None, Box(213, 305, 711, 822)])
def test_a_lesion_is_found_where_it_is_within_a_cell(bounds: Box | None, tmp_path: Path) -> None:
    healthy = paint(blobs(SHAPE_L0, seed=3, reach=0.3), grain=2)
    y, x = np.mgrid[: SHAPE_L0[0], : SHAPE_L0[1]] + 0.5
    ill = healthy.copy()
    ill[np.hypot(y - LESION_L0[0], x - LESION_L0[1]) < RADIUS_L0] = LESION
    untrained = network()
    before = heatmaps(healthy, tmp_path / "healthy", untrained, bounds)
    after = heatmaps(ill, tmp_path / "ill", untrained, bounds)
    for one, other in zip(before, after, strict=True):
        assert one.evidence_LHW.shape == other.evidence_LHW.shape
        change_HW = np.nan_to_num(np.abs(other.evidence_LHW - one.evidence_LHW).max(axis=0)) ** 2
        middle = np.average(np.indices(change_HW.shape) + 0.5, axis=(1, 2), weights=change_HW)
        found_l0 = np.array(one.origin_l0) + middle * one.cell_l0
        assert (np.abs(found_l0 - LESION_L0) <= one.cell_l0).all()
