"""What the viewer answers: the run's slides, their tiles, the layers in register, the tissue."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import quote

import numpy as np
import openslide
import pytest
from PIL import Image

from holoslide.errors import CheckpointError, SlideError
from holoslide.geometry import Box
from holoslide.inference.heatmap import Heatmap, make_heatmap
from holoslide.inference.predict import CellScores
from holoslide.runs import rasters_of
from holoslide.serve import tiles as tiles_module
from holoslide.serve.run import RunView
from holoslide.serve.server import make_viewer
from holoslide.slides import prepare as prepare_module
from holoslide.slides.prepare import PrepareConfig, PrepareJob, prepare_slide
from holoslide.slides.raster import Raster
from holoslide.slides.reader import Reader, open_slide
from tests.serve.served import Served, serving


def picture(body: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(body)))


def test_the_list_has_every_slide_with_what_was_predicted(viewer: Served, finished_run: Path) -> None:
    run = viewer.ask("/api/run").json
    with (finished_run / "predictions.csv").open(newline="") as file:
        predicted = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert [slide["id"] for slide in run["slides"]] == sorted(predicted)
    assert (run["classes"], run["modules"]) == (["benign", "lesion"], 2)
    for slide in run["slides"]:
        row = predicted[slide["id"]]
        assert slide["prediction"] == row["prediction"]
        assert slide["label"] == row["label"]
        assert slide["p"] == [float(row["p_benign"]), float(row["p_lesion"])]
        assert slide["reviews"] == []


def test_every_part_of_the_page_is_there(viewer: Served) -> None:
    page = viewer.ask("/").body.decode()
    assert "<script>" not in page
    for name in (
        "app.js",
        "ask.js",
        "deepzoom.js",
        "pane.js",
        "list.js",
        "review.js",
        "style.css",
        "icon.svg",
    ):
        part = viewer.ask(f"/static/{name}")
        assert (part.status, bool(part.body)) == (200, True)
        assert b"http://" not in part.body.replace(b"http://www.w3.org/2000/svg", b"")
        assert b"https://" not in part.body


def test_tiles_are_the_slide(viewer: Served, finished_run: Path) -> None:
    """Put together, the tiles of a level are what the reader gives, to what JPEG loses."""
    facts = viewer.ask("/api/slides/focus-001").json["picture"]
    assert facts["levels"] >= 2
    with open_slide(finished_run.parent / "slides" / "focus-001.tiff") as reader:
        assert (facts["height_l0"], facts["width_l0"]) == reader.shape_l0
        height, width = reader.shape_l0
        whole = reader.read(Box(0, 0, height, width), facts["mpp"])
    rows = []
    for y in range(-(-height // 256)):
        tiles = [viewer.ask(f"/api/slides/focus-001/tiles/0/{y}/{x}.jpg") for x in range(-(-width // 256))]
        assert {tile.headers["content-type"] for tile in tiles} == {"image/jpeg"}
        rows.append(np.hstack([picture(tile.body) for tile in tiles]))
    shown = np.vstack(rows)
    assert shown.shape == whole.shape
    assert np.abs(shown.astype(int) - whole).mean() < 3
    top = picture(viewer.ask(f"/api/slides/focus-001/tiles/{facts['levels'] - 1}/0/0.jpg").body)
    small = np.asarray(Image.fromarray(whole).resize(top.shape[1::-1], Image.Resampling.BOX))
    assert np.abs(top.astype(int) - small).mean() < 4


@pytest.mark.parametrize("tile", ["0/99/0", "0/0/99", "99/0/0", "-1/0/0", "0/-1/0", "1000000000000/0/0"])
def test_tiles_that_do_not_exist_are_not_found(viewer: Served, tile: str) -> None:
    assert viewer.ask(f"/api/slides/focus-001/tiles/{tile}.jpg").status == 404


def test_layers_are_the_heatmaps_in_register(viewer: Served, finished_run: Path) -> None:
    facts = viewer.ask("/api/slides/focus-002").json
    names = {layer["name"] for layer in facts["layers"]}
    assert names == {
        kind.format(k) for k in (1, 2) for kind in ("attention-{}", "evidence-{}-0", "evidence-{}-1")
    }
    own = Heatmap.load(finished_run / "heatmaps" / "focus-002.npz")
    (layer,) = [layer for layer in facts["layers"] if layer["name"] == "evidence-2-1"]
    np.testing.assert_allclose(layer["box_l0"], own.box_l0)
    raw = viewer.ask("/api/slides/focus-002/layers/evidence-2-1.f32").body
    values = np.frombuffer(raw, "<f4").reshape(layer["rows"], layer["columns"])
    np.testing.assert_allclose(values, own.evidence_LHW[1] - own.evidence_LHW[0], rtol=1e-5)
    shown = picture(viewer.ask("/api/slides/focus-002/layers/evidence-2-1.png").body)
    assert shown.shape == (*values.shape, 4)
    np.testing.assert_array_equal(shown[..., 3] > 0, np.isfinite(values))
    legend = picture(viewer.ask("/api/slides/focus-002/legends/evidence-2-1.png").body)
    assert legend.shape == (1, 256, 3)


def test_the_outline_is_the_tissue(viewer: Served, finished_run: Path) -> None:
    pieces = viewer.ask("/api/slides/focus-001/outline").json
    rasters = rasters_of(finished_run)
    assert rasters is not None
    with Raster.open(rasters / "focus-001.tif") as raster:
        rows, columns = np.nonzero(raster.mask)
        side_y, side_x = (raster.mask_cell_px * each for each in raster.l0_per_px)
        top, left = raster.origin_l0
    xs, ys = zip(*[point for piece in pieces for point in piece[0]], strict=True)
    assert min(ys) == pytest.approx(top + rows.min() * side_y, abs=0.1)
    assert max(ys) == pytest.approx(top + (rows.max() + 1) * side_y, abs=0.1)
    assert min(xs) == pytest.approx(left + columns.min() * side_x, abs=0.1)
    assert max(xs) == pytest.approx(left + (columns.max() + 1) * side_x, abs=0.1)


def test_odd_names_and_missing_files_are_shown_as_what_they_are(nasty_run: Path) -> None:
    with serving(nasty_run) as served:
        slides = served.ask("/api/run").json["slides"]
        odd, gone = slides[0]["id"], slides[-1]["id"]
        assert odd.startswith("<img")
        assert served.ask(f"/api/slides/{quote(odd, safe='')}").json["picture"]["levels"] >= 1
        lost = served.ask(f"/api/slides/{gone}").json
        assert lost["picture"] is None
        assert gone in lost["error"]
        assert served.ask(f"/api/slides/{gone}/tiles/0/0/0.jpg").status == 404


def test_a_damaged_heatmap_hides_itself_alone(run_copy: Path) -> None:
    (run_copy / "heatmaps" / "module-1" / "focus-001.npz").write_bytes(b"PK not a heatmap")
    with serving(run_copy) as served:
        facts = served.ask("/api/slides/focus-001")
        assert facts.status == 200
        assert facts.json["picture"]["levels"] >= 1
        assert {layer["module"] for layer in facts.json["layers"]} == {2}
        (fault,) = facts.json["faults"]
        assert fault.startswith("module-1/focus-001.npz: is not a heatmap (")
        assert served.ask("/api/slides/focus-001/layers/attention-2.png").status == 200
        assert served.ask("/api/slides/focus-001/layers/attention-1.png").status == 404


def test_slides_that_training_left_out_are_listed_with_the_reason(run_copy: Path) -> None:
    (run_copy / "left_out.csv").write_text(
        "slide_id,reason\nlost,its file is missing; mend its path\n,no slide of a row\nfocus-001,used after all\n"
    )
    with serving(run_copy) as served:
        run = served.ask("/api/run").json
        assert run["left_out"] == [{"id": "lost", "reason": "its file is missing; mend its path"}]
        assert len(run["slides"]) == 8
        assert served.ask("/api/slides/lost").status == 404


BOUNDS = Box(
    613, 402, 2531, 1999
)  # level-0 pixels of a real slide: what its scanner would say that it scanned


@pytest.fixture
def bounded_run(data_dir: Path, run_copy: Path) -> Iterator[Path]:
    """A run of one real slide, of which a part was scanned; the model says of each cell how dark it is."""
    slide, facts = data_dir / "wsi" / "CMU-1-Small-Region.svs", run_copy / "run.json"
    (run_copy / "cohort.csv").write_text(
        f"slide_id,patient_id,label,split,mpp,path\ncmu,p,benign,test,,{slide}\n"
    )
    (run_copy / "rasters").mkdir()
    facts.write_text(json.dumps({"rasters": str(run_copy / "rasters")}))

    def bounded(path: Path, **more: Any) -> Reader:
        reader = open_slide(path, **more)
        reader.bounds_l0 = BOUNDS
        return reader

    with (
        patch.object(prepare_module, "open_slide", bounded),
        patch.object(tiles_module, "open_slide", bounded),
    ):
        made = prepare_slide(PrepareJob("cmu", slide), run_copy / "rasters", PrepareConfig(mpp=4.0))
        assert made.path is not None, made.reason
        with Raster.open(made.path) as raster:
            make_heatmap(darkness(raster, side_px=8), raster, ("benign", "lesion")).save(
                run_copy / "heatmaps" / "cmu.npz"
            )
        yield run_copy


def darkness(raster: Raster, side_px: int) -> CellScores:
    height, width = (n // side_px for n in raster.shape_px)
    grey = raster.read(Box(0, 0, height * side_px, width * side_px)).mean(axis=2)
    dark_HW = 255 - grey.reshape(height, side_px, width, side_px).mean(axis=(1, 3))
    places = np.argwhere(dark_HW > -1)
    evidence_NL = np.stack([np.zeros(len(places)), dark_HW.ravel()], axis=1).astype(np.float32)
    even_N = np.full(len(places), 1 / len(places), np.float32)
    return CellScores(places, even_N, evidence_NL, np.zeros(2, np.float32), side_px, shift_px=0)


def test_a_real_slide_with_bounds_its_tiles_and_layer_lie_where_they_must(
    bounded_run: Path, data_dir: Path
) -> None:
    with serving(bounded_run) as served:
        facts = served.ask("/api/slides/cmu").json
        tile = picture(served.ask("/api/slides/cmu/tiles/1/2/2.jpg").body).astype(float)
        layer = next(one for one in facts["layers"] if one["name"] == "evidence-2-1")
        raw = served.ask("/api/slides/cmu/layers/evidence-2-1.f32").body
        points = np.array(
            [p for piece in served.ask("/api/slides/cmu/outline").json for ring in piece for p in ring]
        )
    with openslide.OpenSlide(data_dir / "wsi" / "CMU-1-Small-Region.svs") as slide:
        assert (facts["picture"]["width_l0"], facts["picture"]["height_l0"]) == slide.dimensions
        assert facts["picture"]["mpp"] == pytest.approx(0.499)
        whole = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")).astype(float)
    # A tile of level 1 counts from the slide's corner, not from that of its scanned part.
    own = whole[1024:1536, 1024:1536].reshape(64, 8, 64, 8, 3).mean(axis=(1, 3, 4))
    assert np.abs(tile.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3, 4)) - own).mean() < 1.5
    # The layer's cells are as dark as the slide is there, and not as it is half a cell further.
    top, left, bottom, right = layer["box_l0"]
    assert (top, left) == pytest.approx((BOUNDS.top, BOUNDS.left), abs=400)
    assert BOUNDS.top <= points[:, 1].min() < points[:, 1].max() <= BOUNDS.bottom + 8
    assert BOUNDS.left <= points[:, 0].min() < points[:, 0].max() <= BOUNDS.right + 8
    values = np.frombuffer(raw, "<f4").reshape(layer["rows"], layer["columns"])
    cell = (bottom - top) / layer["rows"]
    seen = {
        (dy, dx): np.corrcoef(
            values.ravel(),
            [
                -whole[round(y) : round(y + cell), round(x) : round(x + cell)].mean()
                for y in top + (np.arange(layer["rows"]) + dy) * cell
                for x in left + (np.arange(layer["columns"]) + dx) * (right - left) / layer["columns"]
            ],
        )[0, 1]
        for dy, dx in [(0, 0), (0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5)]
    }
    assert seen[0, 0] > 0.97
    assert max(seen, key=seen.__getitem__) == (0, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda text: text.replace(",", ";"),
            "predictions.csv: has no column slide_id; evaluate the run again",
        ),
        (lambda text: text.rsplit(",", 1)[0], "predictions.csv: is damaged"),
        (lambda text: text.replace("0.", "0,"), "predictions.csv: is damaged"),
    ],
)
def test_a_table_that_a_spreadsheet_has_saved_in_its_own_way_is_one_line(
    run_copy: Path, change: Callable[[str], str], said: str
) -> None:
    table = run_copy / "predictions.csv"
    text = table.read_text(encoding="utf-8")
    table.write_text("\ufeff" + text, encoding="utf-8")
    assert len(RunView(run_copy).trainings[0].predictions) == 8
    table.write_text(change(text), encoding="utf-8")
    with pytest.raises(SlideError, match=said):
        RunView(run_copy)


def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run"):
        make_viewer(tmp_path)
