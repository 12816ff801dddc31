"""How a run scales its pixels."""

from pathlib import Path

import numpy as np
import pytest

from holoslide.config import PRESETS, RunConfig
from holoslide.geometry import Box
from holoslide.models.classifier import InputConfig
from holoslide.pipeline import normalisation
from holoslide.slides.raster import Raster


@pytest.fixture
def rasters(finished_run: Path) -> list[Path]:
    return sorted((finished_run.parent / "rasters").glob("*.tif"))


def config_of(**backbone: object) -> RunConfig:
    return RunConfig.from_dict({"model": {"backbone": backbone}}, where="test")


def test_pretrained_weights_get_pixels_as_they_learned_them(rasters: list[Path]) -> None:
    found = normalisation(rasters, config_of(scale="weights"))
    assert (found.mean, found.std) == (InputConfig().mean, InputConfig().std)


@pytest.mark.parametrize("backbone", [{}, {"scale": "weights", "weights": "none"}])
def test_else_pixels_are_scaled_by_the_tissue_of_the_cohort(
    rasters: list[Path], backbone: dict[str, object]
) -> None:
    found = normalisation(rasters, config_of(**backbone))
    tissue = []
    for path in rasters:
        with Raster.open(path) as raster:
            inside = raster.mask.repeat(raster.mask_cell_px, 0).repeat(raster.mask_cell_px, 1)
            height, width = raster.shape_px
            tissue.append(raster.read(Box(0, 0, height, width))[inside[:height, :width]] / 255)
    pixels = np.concatenate(tissue)
    np.testing.assert_allclose(found.mean, pixels.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(found.std, pixels.std(axis=0), atol=0.01)


def test_the_papers_preset_scales_by_the_cohort() -> None:
    assert RunConfig.from_dict(PRESETS["paper"], where="test").model.backbone.by_cohort
