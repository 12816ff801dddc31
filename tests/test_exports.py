"""`holoslide export`: a run's files for other programs, and its model for a hub."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from holoslide import cli
from holoslide.errors import CheckpointError
from holoslide.inference.heatmap import Heatmap
from holoslide.models.classifier import LocalClassifier

IDS = [f"focus-{n:03}" for n in range(1, 9)]


def holoslide(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["holoslide", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_exports_every_slide_of_a_run(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert holoslide(monkeypatch, "export", finished_run, "-o", tmp_path, "--workers", 1) == 0
    suffixes = (".geojson", ".h5", "-heatmap.ome.tif")
    wanted = {f"{name}{suffix}" for name in IDS for suffix in suffixes}
    assert {path.name for path in tmp_path.iterdir()} == wanted | {"predictions.csv", "predictions-clam.csv"}
    assert rows(tmp_path / "predictions.csv") == rows(finished_run / "predictions.csv")
    classes = ["benign", "lesion"]
    for ours, clams in zip(
        rows(tmp_path / "predictions.csv"), rows(tmp_path / "predictions-clam.csv"), strict=True
    ):
        assert list(clams) == ["slide_id", "Y", "Y_hat", "p_0", "p_1"]
        assert classes[int(clams["Y"])] == ours["label"]
        assert classes[int(clams["Y_hat"])] == ours["prediction"]
        assert (clams["p_0"], clams["p_1"]) == (ours["p_benign"], ours["p_lesion"])
    heatmap = Heatmap.load(finished_run / "heatmaps" / "focus-001.npz")
    features = json.loads((tmp_path / "focus-001.geojson").read_text())["features"]
    cells = [feature for feature in features if feature["properties"]["objectType"] == "detection"]
    assert len(cells) == np.isfinite(heatmap.attention_HW).sum()


def test_exports_new_slides(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = finished_run.parent / "slides" / "focus-002.tiff"
    options = ("--to", "h5", "-o", tmp_path / "out", "--rasters", tmp_path / "rasters", "--workers", 1)
    assert holoslide(monkeypatch, "export", finished_run, slide, *options) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["focus-002.h5"]


def test_another_kind_is_one_line(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert holoslide(monkeypatch, "export", finished_run, "--to", "geojson,png", "-o", tmp_path) == 1
    line = "holoslide: --to geojson,png: png is no export; choose among geojson, ome-tiff, h5, csv, onnx, model\n"
    assert capsys.readouterr().err == line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("library", ["onnx", "onnxscript"])
def test_onnx_without_its_libraries_says_what_to_install(
    library: str,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    assert holoslide(monkeypatch, "export", finished_run, "--to", "onnx", "-o", tmp_path / "out") == 1
    line = f"holoslide: onnx: needs {library}; pip install 'holoslide[onnx]'\n"
    assert capsys.readouterr().err == line


def test_serving_what_is_no_run_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert holoslide(monkeypatch, "serve", tmp_path) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_model_for_a_hub_has_a_card(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert holoslide(monkeypatch, "export", finished_run, "--to", "model", "-o", tmp_path) == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: holoslide\n")
    assert "| train | benign | 2 |" in card
    assert "Of 8 slides" in card
    assert "not been shown to be safe" in card
    assert "/" + str(finished_run).strip("/") not in card
    assert "| attention of a heatmap | how much each cell weighs in the slide's one vector |" in card
    first, second = (LocalClassifier.load(each) for each in (finished_run / "best", tmp_path / "model"))
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.fixture
def hub(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache as the hub library keeps it, with one model, on a machine without network."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="the extra `hub` is not installed")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model = tmp_path / "hub" / "models--lab--slides"
    snapshot = model / "snapshots" / ("a" * 40)
    LocalClassifier.load(finished_run / "best").save(snapshot)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("a" * 40)
    return snapshot


def test_a_model_loads_from_a_hub_by_name(finished_run: Path, hub: Path) -> None:
    first, second = LocalClassifier.load(finished_run / "best"), LocalClassifier.load("hub:lab/slides")
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("name", ["hub:lab/none", "hub:../../etc", "hub:lab/slides@v9"])
def test_a_model_that_the_hub_has_not_is_one_error(hub: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be fetched"):
        LocalClassifier.load(name)


def test_without_the_hubs_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"holoslide\[hub\]"):
        LocalClassifier.load("hub:lab/slides")
