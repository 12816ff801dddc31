"""What a run, a prediction and a heatmap show of themselves in a notebook."""

import base64
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from holoslide import Heatmap, Prediction, Raster, Run, predict, score
from holoslide.errors import CohortError
from holoslide.inference.show import PICTURE_PX


def pictures(html: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(each))) for each in found]


def heatmap(classes: tuple[str, ...]) -> Heatmap:
    attention = np.array([[0.25, np.nan, 0.5], [0.25, np.nan, np.nan]], np.float32)
    evidence = np.stack([attention, -attention])
    return Heatmap(attention, evidence, np.zeros(2, np.float32), (10.0, 20.0), (64.0, 64.0), classes)


def test_a_heatmap_shows_every_layer_with_its_legend() -> None:
    html = heatmap(("a", "b"))._repr_html_()
    attention, _, first, _, second, _ = pictures(html)
    assert [picture.size for picture in (attention, first, second)] == [(3, 2)] * 3
    opaque = np.asarray(attention)[..., 3] > 0
    assert opaque.tolist() == [[True, False, True], [True, False, False]]
    assert "evidence for b" in html
    assert "first corner at y 10, x 20" in html
    assert "http" not in html


def test_names_are_shown_and_not_run() -> None:
    html = heatmap(("<script>", "b"))._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_a_prediction_shows_its_probabilities_and_its_maps_on_the_slide(
    finished_run: Path, tmp_path: Path
) -> None:
    prediction = score(finished_run, finished_run.parent / "slides" / "focus-001.tiff")
    assert isinstance(prediction, Prediction)
    html = prediction._repr_html_()
    assert f"<h4>focus-001: {prediction.prediction}</h4>" in html
    for name, p in prediction.probabilities.items():
        assert name in html
        assert f"{p:.3f}" in html
    drawn = pictures(html)[::2]
    with Raster.open(prediction.raster) as raster:
        beneath = raster.thumbnail(2 * PICTURE_PX)
    assert [picture.size for picture in drawn] == [beneath.shape[1::-1]] * 3
    rows, columns = prediction.heatmap.attention_HW.shape
    # Red goes with the grey of the tissue beneath: the cells' colours alone would be flat inside a cell.
    glass = (beneath == beneath.max(axis=(0, 1))).all(axis=2)
    tissue = np.asarray(drawn[2])[~glass].reshape(-1, 3)
    assert len(np.unique(tissue, axis=0)) > 3 * rows * columns
    gone = dataclasses.replace(prediction, raster=tmp_path / "gone.tif")
    assert [picture.size for picture in pictures(gone._repr_html_())[::2]] == [(columns, rows)] * 3


def test_a_slide_named_like_one_of_the_runs_own_does_not_take_the_place_of_its_raster(
    finished_run: Path, tmp_path: Path
) -> None:
    run, own = tmp_path / "run", tmp_path / "run" / "rasters"  # where `fit` puts them
    shutil.copytree(finished_run / "best", run / "best")
    shutil.copytree(finished_run.parent / "rasters", own)
    for name in ("config.yaml", "cohort.csv"):
        shutil.copy(finished_run / name, run / name)
    (run / "run.json").write_text(json.dumps({"rasters": str(own)}))
    before = {path.name: path.stat().st_mtime_ns for path in own.iterdir()}
    slides = finished_run.parent / "slides"
    shutil.copy(slides / "focus-002.tiff", tmp_path / "focus-001.tiff")
    assert predict(run, [tmp_path / "focus-001.tiff"], run / "new.csv") == 1
    other, kept = score(run, tmp_path / "focus-001.tiff"), score(run, slides / "focus-001.tiff")
    assert {path.name: path.stat().st_mtime_ns for path in own.iterdir()} == before
    assert other.raster == run / "scored" / "focus-001.tif"
    assert (kept.raster, kept.row.patient_id) == (own / "focus-001.tif", "patient-001")
    assert other.probabilities != kept.probabilities


def test_slides_of_one_name_from_two_folders_are_not_taken_for_each_other(
    finished_run: Path, tmp_path: Path
) -> None:
    model, slides = tmp_path / "model", finished_run.parent / "slides"
    shutil.copytree(finished_run / "best", model)
    shutil.copy(finished_run / "config.yaml", model)
    paths = [tmp_path / name / "x.tiff" for name in ("a", "b")]
    for number, path in enumerate(paths, start=1):
        path.parent.mkdir()
        shutil.copy(slides / f"focus-00{number}.tiff", path)
    first = score(model, paths[0])
    shown = first._repr_html_()
    with pytest.raises(
        CohortError, match=r"scored/x.tif: is the raster of another slide of this name, .*a/x.tiff"
    ):
        score(model, paths[1])
    second = score(model, paths[1], rasters=tmp_path / "more")
    assert second.raster == tmp_path / "more" / "x.tif"
    assert second.probabilities != first.probabilities
    assert first._repr_html_() == shown
    for path in paths:  # as the command: beside the slides
        assert predict(model, [path], tmp_path / "p.csv") == 1
        assert (path.parent / "rasters" / "x.tif").is_file()


def test_a_run_shows_its_metrics_and_what_was_left_out(finished_run: Path, tmp_path: Path) -> None:
    html = Run(finished_run, finished_run / "best", 1, (("x<1>", "cannot be read"),))._repr_html_()
    assert "x&lt;1&gt;: cannot be read" in html
    assert "balanced accuracy" in html
    assert "report.html" in html
    assert "not evaluated yet" in Run(tmp_path, tmp_path / "best", 1, ())._repr_html_()
