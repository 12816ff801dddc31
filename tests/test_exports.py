"""`holoslide export`: a run's files for other programs, and its model for a hub."""

import html
import json
import shutil
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import shapely
import tifffile
import torch
import yaml
from markdown_it import MarkdownIt
from numpy.typing import NDArray

from holoslide.errors import CheckpointError
from holoslide.exports import judgement_of
from holoslide.files import write_rows
from holoslide.inference.export_onnx import onnx_inputs
from holoslide.inference.heatmap import Heatmap
from holoslide.models.classifier import LocalClassifier
from holoslide.slides.raster import Raster
from tests.command import exit_code as holoslide
from tests.command import rows_of as rows
from tests.slides.drawn import paint
from tests.slides.mrxs import SIDE_PX, write_mrxs

IDS = [f"focus-{n:03}" for n in range(1, 9)]


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


def test_the_heatmaps_of_slides_that_are_written_are_let_go(
    finished_run: Path, tmp_path: Path, alive: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--to", "csv", "-o", tmp_path, "--workers", 1)
    assert holoslide(monkeypatch, "export", finished_run, *asked) == 0
    assert len(alive) == 8
    assert max(alive) <= 1


def test_exports_new_slides(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = finished_run.parent / "slides" / "focus-002.tiff"
    options = ("--to", "h5", "-o", tmp_path / "out", "--rasters", tmp_path / "rasters", "--workers", 1)
    assert holoslide(monkeypatch, "export", finished_run, slide, *options) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["focus-002.h5"]


# --- A slide on which every frame differs: pixels that are not square, and a scan that does not begin at 0 --------

MPP, MPP_X, MODEL_MPP = 2.0, 2.5, 8.0
BOUNDS_L0 = (1 * SIDE_PX, 2 * SIDE_PX)  # of the scan, (top, left)
TISSUE_L0 = (704, 1024, 1280, 1792)  # top, left, bottom, right: whole cells of mask and heads
CELL_PX, SHIFT_PX = (
    12,
    -1.5,
)  # of ResNet-18 to layer1, 3 x 3 of its outputs: 4 px each, the first around pixel 0


@pytest.fixture(scope="module")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command line exports of that slide into the folders `whole` and `cropped`; the tissue is given."""
    folder = tmp_path_factory.mktemp("exported")
    tissue = np.zeros((6 * SIDE_PX, 8 * SIDE_PX), np.bool_)
    top, left, bottom, right = TISSUE_L0
    tissue[top:bottom, left:right] = True
    scanned = np.zeros((6, 8), np.bool_)
    scanned[1:, 2:] = True
    slide = write_mrxs(folder / "s.mrxs", paint(tissue), scanned=scanned, mpp=MPP, mpp_x=MPP_X)
    outline = shapely.geometry.mapping(shapely.box(left, top, right, bottom))
    (folder / "s.geojson").write_text(json.dumps(outline))
    given = ("--masks", folder, "--rasters", folder / "rasters", "--workers", 1)
    with pytest.MonkeyPatch.context() as patch:
        for name, *how in (("whole", "--no-crop"), ("cropped",)):
            asked = ("--to", "geojson,ome-tiff,h5", *how, "-o", folder / name)
            assert holoslide(patch, "export", finished_run, slide, *given, *asked) == 0
    return folder


def detections(path: Path) -> tuple[NDArray[np.float64], list[dict[str, float]]]:
    """Of every cell (left, top, right, bottom), (N, 4), and its measurements."""
    features = json.loads(path.read_text())["features"]
    cells = [each for each in features if each["properties"]["objectType"] == "detection"]
    boxes = [shapely.geometry.shape(each["geometry"]).bounds for each in cells]
    return np.array(boxes), [each["properties"]["measurements"] for each in cells]


def test_cells_lie_at_level_0_where_the_tissue_is(exported: Path) -> None:
    boxes, _ = detections(exported / "whole" / "s.geojson")
    top, left, bottom, right = TISSUE_L0
    per_y, per_x = MODEL_MPP / MPP, MODEL_MPP / MPP_X  # level-0 pixels in one of the raster's
    first = (left + SHIFT_PX * per_x, top + SHIFT_PX * per_y)
    first += (first[0] + CELL_PX * per_x, first[1] + CELL_PX * per_y)
    np.testing.assert_allclose(boxes[0], first)
    columns, rows = (right - left) / per_x / CELL_PX, (bottom - top) / per_y / CELL_PX
    assert (rows, columns) == (12, 20)
    np.testing.assert_allclose(boxes[-1], np.array(first) + [19 * CELL_PX * per_x, 11 * CELL_PX * per_y] * 2)
    assert len(boxes) == 12 * 20


def test_cells_are_counted_from_where_the_scan_begins_as_qupath_counts(exported: Path) -> None:
    (whole, told), (cropped, same) = (
        detections(exported / name / "s.geojson") for name in ("whole", "cropped")
    )
    top, left = BOUNDS_L0
    np.testing.assert_allclose(cropped, whole - [left, top, left, top])
    assert told == same


@pytest.mark.parametrize("name", ["whole", "cropped"])
def test_clams_coordinates_are_the_cells_corners_on_the_whole_slide(exported: Path, name: str) -> None:
    boxes, told = detections(exported / "whole" / "s.geojson")
    with h5py.File(exported / name / "s.h5") as file:
        coords, attention = file["coords"][:], file["attention_scores"][:, 0]
        assert tuple(file["coords"].attrs["level_dim"]) == (8 * SIDE_PX, 6 * SIDE_PX)
    np.testing.assert_array_equal(coords, np.rint(boxes[:, :2]))
    np.testing.assert_allclose(attention, [each["attention"] for each in told], rtol=1e-6)


@pytest.mark.parametrize(("name", "sides"), [("whole", (6, 8)), ("cropped", (5, 6))])
def test_the_heatmap_says_its_um_per_pixel_and_lies_on_the_cells(
    exported: Path, name: str, sides: tuple[int, int]
) -> None:
    with tifffile.TiffFile(exported / name / "s-heatmap.ome.tif") as tiff:
        pixels = tiff.series[0].asarray()
        image = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
    step = 16  # level-0 pixels: the largest power of two up to half a cell of 48 x 38.4
    assert (image["PhysicalSizeY"], image["PhysicalSizeX"]) == (MPP * step, MPP_X * step)
    assert (image["SizeY"], image["SizeX"]) == tuple(side * SIDE_PX // step for side in sides)
    boxes, told = detections(exported / name / "s.geojson")
    x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2 / step).astype(int).T
    evidence = [each["evidence for lesion (logits)"] for each in told]
    np.testing.assert_allclose(pixels[2, y, x], evidence, rtol=1e-5, atol=1e-7)


# --- The model ----------------------------------------------------------------------------------------------------


def test_onnx_of_a_run_gives_its_predictions_from_its_rasters(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    assert holoslide(monkeypatch, "export", finished_run, "--to", "onnx", "-o", tmp_path) == 0
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    sizes = set()
    for row in rows(finished_run / "predictions.csv")[:3]:
        with Raster.open(finished_run.parent / "rasters" / f"{row['slide_id']}.tif") as raster:
            inputs = onnx_inputs(raster)
        _, probabilities, attention, evidence = session.run(None, inputs)
        sizes.add(inputs["pixels"].shape)
        assert probabilities == pytest.approx([float(row["p_benign"]), float(row["p_lesion"])], abs=1e-4)
        heatmap = Heatmap.load(finished_run / "heatmaps" / f"{row['slide_id']}.npz")
        voting = np.isfinite(heatmap.attention_HW)
        assert attention.sum() == pytest.approx(1, abs=1e-4)
        assert np.count_nonzero(attention) == voting.sum()
        total = heatmap.evidence_LHW[:, voting].sum(1)
        np.testing.assert_allclose(evidence.sum((1, 2)), total, atol=1e-3)
    assert len(sizes) == 3  # rasters of other sizes, one file
    told = json.loads(session.get_modelmeta().custom_metadata_map["holoslide"])
    decision = json.loads((finished_run / "metrics.json").read_text())["decision"]
    assert told["classes"] == ["benign", "lesion"]
    assert (told["positive"], told["sensitivity"]) == ("lesion", 0.95)
    assert told["threshold"] == decision["threshold"]["value"]
    line = f"called lesion where its raw probability is {told['threshold']!r} or more"
    assert line in (tmp_path / "model-onnx.md").read_text()


def test_a_model_takes_the_temperature_of_its_validation_slides_along(run_copy: Path) -> None:
    path = run_copy / "metrics.json"
    measured = json.loads(path.read_text())
    measured["calibration"]["temperature"]["value"], measured["decision"] = 1.25, None
    path.write_text(json.dumps(measured))
    assert judgement_of(run_copy) == {"temperature": 1.25}
    path.unlink()
    assert judgement_of(run_copy) == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--to", "geojson,png"),
            "--to geojson,png: png is no export; choose among geojson, ome-tiff, h5, csv, onnx, model",
        ),
        (("--share", "7"), "hot regions: a share of 7.0 cannot be; give a number above 0, up to 1"),
    ],
)
def test_what_cannot_be_exported_is_one_line_before_any_slide_is_scored(
    options: tuple[str, str],
    said: str,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert holoslide(monkeypatch, "export", finished_run, *options, "-o", tmp_path) == 1
    assert capsys.readouterr().err == f"holoslide: {said}\n"
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
    assert "not been shown to be safe" in card
    assert "/" + str(finished_run).strip("/") not in card
    assert "| attention of a heatmap | how much each cell weighs in the slide's one vector |" in card
    first, second = (LocalClassifier.load(each) for each in (finished_run / "best", tmp_path / "model"))
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_names_with_marks_of_markdown_or_html_are_shown_as_they_are(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"benign": "a|b *c* _d_ <b>e</b> &lt; `f`", "lesion": r"z\| [x](y) ~~w~~ $v$"}
    run = tmp_path / "my_run_of_*all*"
    shutil.copytree(finished_run / "best", run / "best")
    for name in ("cohort.csv", "metrics.json", "config.yaml"):
        shutil.copy(finished_run / name, run / name)
    model = yaml.safe_load((run / "best" / "model.yaml").read_text())
    (run / "best" / "model.yaml").write_text(yaml.safe_dump(model | {"classes": list(names.values())}))
    table = rows(run / "cohort.csv")
    write_rows([row | {"label": names[row["label"]]} for row in table], run / "cohort.csv")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["decision"]["positive"] = names["lesion"]
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert holoslide(monkeypatch, "export", run, "--to", "model", "-o", tmp_path) == 0
    card = (tmp_path / "model" / "README.md").read_text().split("---\n", 2)[2]
    page = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(card)
    for name in names.values():
        assert f"<td>{html.escape(name, quote=False)}</td>\n<td>2</td>" in page
    both = html.escape(" against ".join(names.values()), quote=False)
    assert f"<td>classes</td>\n<td>{both}</td>" in page
    assert f"slides ({both}), trained on" in page
    assert "<h1>my_run_of_*all*</h1>" in page
    assert f"A slide is called {names['lesion']} where" in page


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
