"""What the saved heatmaps of every module's head add up to: that head's logits."""

from pathlib import Path

import numpy as np
import pytest
import torch

from holoslide.errors import SlideError
from holoslide.inference.heatmap import Heatmap, heatmap_paths
from holoslide.predictions import Predictor, draw_heatmap
from holoslide.runs import rasters_of
from holoslide.slides.cohort import Cohort
from holoslide.slides.raster import Raster


def test_saved_evidence_of_every_module_adds_up_to_its_heads_logits(
    finished_run: Path, tmp_path: Path
) -> None:
    predictor, row = Predictor(finished_run), Cohort.from_csv(finished_run / "cohort.csv").test.rows[0]
    folder = rasters_of(finished_run)
    assert folder is not None
    draw_heatmap(predictor.score(row, folder / f"{row.slide_id}.tif"), tmp_path)
    heads = predictor.network.heads
    saved = [Heatmap.load(path) for path in heatmap_paths(tmp_path, row.slide_id, len(heads))]
    with Raster.open(folder / f"{row.slide_id}.tif") as raster, torch.no_grad():
        # As in training: the readout alone, not its explanation.
        logits = [
            head.readout(cells.cells_NC).cpu().numpy() for head, _, cells in predictor.network.read(raster)
        ]
    assert len(saved) == len(logits) == 2
    for one, expected_L in zip(saved, logits, strict=True):
        found_L = np.nansum(one.evidence_LHW, axis=(1, 2), dtype=np.float64) + one.bias_L
        assert found_L == pytest.approx(expected_L, rel=1e-4, abs=1e-6)
    assert np.abs(logits[0] - logits[1]).max() > 1e-4  # the two heads' maps cannot be taken for one another


def test_a_heatmap_cut_short_is_said_to_be_none(finished_run: Path, tmp_path: Path) -> None:
    whole = next((finished_run / "heatmaps").glob("*.npz")).read_bytes()
    for content in (b"", b"no heatmap", whole[:100], whole[: len(whole) // 2]):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(SlideError, match=r"a\.npz: is not a heatmap"):
            Heatmap.load(tmp_path / "a.npz")
