"""The ONNX file answers as the streamed network does, for rasters of any size."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from holoslide.inference.export_onnx import export_onnx, onnx_inputs
from holoslide.inference.predict import score_slide
from holoslide.models.classifier import LocalClassifier
from holoslide.models.options import BackboneConfig, HeadConfig, InputConfig, ModelConfig, StreamConfig
from holoslide.models.streamed import StreamedClassifier
from holoslide.pixels import ArrayPixels

onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
GLASS = (243, 240, 241)
CELL_PX = 8


def model(name: str, truncate: str, *, border: str, pool: str, **heads: object) -> LocalClassifier:
    backbone = BackboneConfig(name=name, weights="none", truncate=truncate)
    config = ModelConfig(backbone=backbone, modules=2, border=border, pool=pool, heads=HeadConfig(**heads))
    inputs = InputConfig(mpp=2.0, glass=GLASS)
    generator = torch.Generator().manual_seed(0)
    made = LocalClassifier.from_config(config, classes=("a", "b", "c"), inputs=inputs, generator=generator)
    for parameter in made.parameters():  # heads begin at zero: without this all answers are alike
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return made.eval()


def slide(rows: int, columns: int, *, ragged: bool, seed: int) -> ArrayPixels:
    """Noise on two thirds of the mask's cells; ragged: the raster ends within its last cells."""
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, columns)) < 0.66
    mask[0, 0] = True
    height, width = rows * CELL_PX - (5 if ragged else 0), columns * CELL_PX - (3 if ragged else 0)
    pixels = rng.integers(0, 255, (height, width, 3)).astype(np.uint8)
    return ArrayPixels(pixels, mask, mask_cell_px=CELL_PX, glass=GLASS)


SIZES = [(9, 13, False), (20, 31, True), (37, 18, True), (4, 4, False)]


@pytest.mark.parametrize(
    ("backbone", "border", "pool", "heads", "said"),
    [
        (
            ("resnet18", "layer2"),  # whose two heads have other strides
            "glass",
            "tissue",
            {"kernel": 3, "pooling": "auto", "norm": "cohort"},
            "all cells' sum to the logits",
        ),
        (
            ("resnet18", "layer1"),  # zeros begin where the raster ends, not its mask
            "zeros",
            "tissue",
            {"kernel": 3, "pooling": "auto", "norm": "slide"},
            "all cells' sum to the logits",
        ),
        (
            ("convnext_tiny", "features.1"),  # LayerNorm and convolutions of depth 1 in place of BatchNorm
            "zeros",
            "all",
            {"kernel": 2, "pooling": "gated", "norm": "slide"},
            "a constant is missing",
        ),
    ],
)
def test_onnx_answers_as_pytorch(
    backbone: tuple[str, str],
    border: str,
    pool: str,
    heads: dict[str, object],
    said: str,
    tmp_path: Path,
) -> None:
    trained = model(*backbone, border=border, pool=pool, **heads)
    path = export_onnx(trained, tmp_path, card="# A card\n")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    network = StreamedClassifier(trained, StreamConfig())
    answers = []
    for seed, (rows, columns, ragged) in enumerate(SIZES):
        raster = slide(rows, columns, ragged=ragged, seed=seed)
        logits, probabilities, attention, evidence = session.run(
            None, onnx_inputs(raster, pool=pool, border=border)
        )
        scores = score_slide(network, raster, explain=[1])
        cells = scores.cells[1]
        y, x = cells.places.T
        np.testing.assert_allclose(logits, scores.logits_KL, atol=2e-4, rtol=1e-4)
        np.testing.assert_allclose(probabilities, scores.probabilities[-1], atol=1e-4)
        np.testing.assert_allclose(attention[y, x], cells.attention_N, atol=1e-5)
        np.testing.assert_allclose(evidence[:, y, x].T, cells.evidence_NL, atol=2e-4, rtol=1e-3)
        assert attention.sum() == pytest.approx(1, abs=1e-4)
        has_constant = np.abs(evidence.sum((1, 2)) - logits[-1]).max() > 1e-3
        assert has_constant == ("missing" in said)  # what the card says of it is so
        answers.append(logits)
    assert np.abs(answers[0] - answers[1]).max() > 1e-3  # slides do differ
    facts = {p.key: p.value for p in onnx.load(str(path)).metadata_props}
    told = json.loads(facts["holoslide"])
    assert (told["classes"], told["mpp"], told["border"]) == (["a", "b", "c"], 2.0, border)
    card = (tmp_path / "model-onnx.md").read_text()
    assert card.startswith("# A card")
    assert "| `pixels` (in) | (H, W, 3) uint8 |" in card
    assert said in card
