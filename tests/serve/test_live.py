"""A run that is evaluated again, or another at the same address, while a browser holds what it was shown before."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import expect

from holoslide.errors import SlideError
from holoslide.inference.heatmap import Heatmap
from holoslide.runs import rasters_of
from holoslide.serve.run import RunView
from tests.serve.looking import open_viewer
from tests.serve.served import Served, serving
from tests.serve.several import read_rows, write_table

LAYER = "/api/slides/focus-001/layers/evidence-2-1.f32"


def add_evidence(run: Path, much: float) -> None:
    """As another network would have it."""
    path = run / "heatmaps" / "focus-001.npz"
    own = Heatmap.load(path)
    own.evidence_LHW[1] += much
    own.save(path)


def predict(run: Path, p: float) -> None:
    rows = read_rows(run / "predictions.csv")
    answer = {"p_benign": f"{1 - p:.6f}", "p_lesion": f"{p:.6f}"}
    write_table(run / "predictions.csv", [row | answer for row in rows])


def mean(served: Served) -> float:
    return float(np.nanmean(np.frombuffer(served.ask(LAYER).body, "<f4")))


@pytest.mark.parametrize(
    "path",
    [LAYER, LAYER.replace(".f32", ".png"), "/api/slides/focus-001/tiles/0/0/0.jpg",
     "/api/slides/focus-001/thumbnail.jpg", "/api/slides/focus-001/outline",
     "/api/slides/focus-001/legends/evidence-2-1.png"],
)  # fmt: skip
def test_what_a_browser_keeps_it_asks_about_and_is_not_sent_again(viewer: Served, path: str) -> None:
    first = viewer.ask(path)
    assert first.headers["cache-control"] == "private, no-cache"
    again = viewer.ask(path, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", first.headers["etag"])


def test_a_slide_that_was_prepared_anew_since_shows_no_outline(run_copy: Path, tmp_path: Path) -> None:
    """With other settings, or for another table: it is not the tissue that the network saw."""
    rasters = tmp_path / "rasters"
    shutil.copytree(rasters_of(run_copy) or "", rasters)
    view = RunView(run_copy, rasters)
    assert view.outline("focus-001")
    shutil.copy(rasters / "focus-002.tif", rasters / "focus-001.tif")
    with pytest.raises(
        SlideError, match=r"focus-001\.tif: was prepared anew since, .*; evaluate the run again"
    ):
        view.outline("focus-001")


def test_a_run_that_is_evaluated_again_is_shown_as_it_is_then(run_copy: Path) -> None:
    with serving(run_copy) as served:
        before, tag, run = mean(served), served.ask(LAYER).headers["etag"], served.ask("/api/run").json
        assert served.ask(f"/api/slides/focus-001?run={run['state']}").status == 200
        add_evidence(run_copy, 3.0)
        predict(run_copy, 0.75)
        assert served.ask(LAYER, headers={"If-None-Match": tag}).status == 200
        assert mean(served) == pytest.approx(before + 3.0, abs=1e-3)
        now = served.ask("/api/run").json
        assert [slide["p"] for slide in now["slides"]] == [[0.25, 0.75]] * 8
        assert (now["key"], now["state"] == run["state"]) == (run["key"], False)
        late = served.ask(f"/api/slides/focus-001?run={run['state']}")
        assert late.status == 409
        assert late.json["error"] == "the run has changed since this page was opened: reload the page"


def test_a_slide_that_is_replaced_is_shown_as_it_is_then(run_copy: Path, tmp_path: Path) -> None:
    rows = read_rows(run_copy / "cohort.csv")
    own = tmp_path / "own.tiff"
    shutil.copy(rows[0]["path"], own)
    write_table(run_copy / "cohort.csv", [rows[0] | {"path": str(own)}, *rows[1:]])
    with serving(run_copy) as served:
        before = served.ask("/api/slides/focus-001/thumbnail.jpg")
        own.unlink()
        assert served.ask("/api/slides/focus-001/thumbnail.jpg").status == 404
        shutil.copy(rows[1]["path"], own)
        after = served.ask(
            "/api/slides/focus-001/thumbnail.jpg", headers={"If-None-Match": before.headers["etag"]}
        )
    assert after.status == 200
    assert after.body != before.body


@pytest.mark.browser
def test_another_run_at_the_same_address_is_not_mixed_with_the_first(
    page: Any, run_copy: Path, tmp_path: Path
) -> None:
    second = tmp_path / "second"
    shutil.copytree(run_copy, second)
    add_evidence(second, 5.0)
    values = (
        f"fetch('{LAYER}').then((a) => a.arrayBuffer()).then((b) => [...new Float32Array(b)].map(String))"
    )
    with serving(run_copy) as served:
        open_viewer(page, served, "#slide=focus-001&layer=evidence-2-1")
        page.wait_for_selector('canvas[data-layer="evidence-2-1"]')
        before = page.evaluate(values)
    with serving(second, port=served.port) as served:
        page.fill("#reviewer", "A")
        page.fill("#note", "of the first run")
        page.locator("#review button").click()  # the page still shows the first run
        expect(page.locator("#saved")).to_contain_text("not saved: the run has changed since")
        page.locator("#slides button", has_text="focus-002").click()
        expect(page.locator(".pane-message")).to_contain_text("the run has changed since")
        expect(page.locator("#slide-title")).to_have_text("focus-001")
        assert not (second / "reviews.csv").exists()
        assert page.evaluate(values) != before  # not from the browser's store
        page.reload()
        expect(page.locator("#run-name")).to_have_text("second")
        page.wait_for_selector('canvas[data-layer="evidence-2-1"]')
        expect(page.locator("#note")).to_have_value("")
