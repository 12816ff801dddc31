"""What must not matter does not: glass beside the tissue, tile sides, how many tiles run together."""

import numpy as np
import pytest
import torch

from holoslide.inference.predict import score_slide
from holoslide.models.classifier import LocalClassifier
from holoslide.models.options import BackboneConfig, HeadConfig, InputConfig, ModelConfig, StreamConfig
from holoslide.models.streamed import StreamedClassifier
from holoslide.pixels import ArrayPixels

GLASS = (243, 243, 243)
CELL_PX = 8


@pytest.fixture(scope="module")
def model() -> LocalClassifier:
    backbone = BackboneConfig(name="resnet18", weights="none", truncate="layer3")
    config = ModelConfig(backbone=backbone, modules=3, heads=HeadConfig(kernel=3))
    generator = torch.Generator().manual_seed(0)
    inputs = InputConfig(glass=GLASS)
    model = LocalClassifier.from_config(config, classes=("a", "b"), inputs=inputs, generator=generator)
    return model.double().eval()


def _slide(*, below: int = 0, right: int = 0, seed: int = 0) -> ArrayPixels:
    """Two pieces of tissue in glass, with as many more mask cells of glass below and on the right."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((30 + below, 37 + right), np.bool_)
    mask[:12, :15] = mask[17:30, 22:37] = True
    mask[3:5, 4:6] = False
    pixels = np.full((*(n * CELL_PX for n in mask.shape), 3), GLASS, np.uint8)
    tissue = np.kron(mask[:30, :37], np.ones((CELL_PX, CELL_PX), np.bool_))
    pixels[: tissue.shape[0], : tissue.shape[1]][tissue] = rng.integers(0, 240, (int(tissue.sum()), 3))
    return ArrayPixels(pixels, mask, mask_cell_px=CELL_PX, glass=GLASS)


def _scores(model: LocalClassifier, slide: ArrayPixels, **stream: object):
    return score_slide(StreamedClassifier(model, StreamConfig(**stream)), slide, explain=[0, 1, 2])


def _assert_equal(one, other):
    np.testing.assert_allclose(one.logits_KL, other.logits_KL, rtol=0, atol=1e-6)
    for k, cells in one.cells.items():
        np.testing.assert_array_equal(cells.places, other.cells[k].places)
        np.testing.assert_allclose(cells.evidence_NL, other.cells[k].evidence_NL, atol=1e-6)


@pytest.mark.parametrize(("below", "right"), [(1, 0), (0, 1), (5, 11), (40, 40)])
def test_more_glass_below_and_on_the_right_changes_nothing(model, below, right):
    _assert_equal(_scores(model, _slide()), _scores(model, _slide(below=below, right=right)))


@pytest.mark.parametrize("stream", [{"tile_cells": 9}, {"tile_cells": 21, "batch": 3}, {"segment_units": 1}])
def test_tiles_change_nothing(model, stream):
    _assert_equal(_scores(model, _slide()), _scores(model, _slide(), **stream))


def test_tissue_does_matter(model):
    one, other = _scores(model, _slide()), _scores(model, _slide(seed=1))
    assert np.abs(one.logits_KL - other.logits_KL).max() > 1e-4
