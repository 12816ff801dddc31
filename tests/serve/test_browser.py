"""The viewer in a real browser: opens, zooms, switches layers, filters, compares, edits, reloads."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import expect

from tests.serve.looking import SMALL, drawn, open_viewer, pixel, ready, shown, view
from tests.serve.served import Served, serving
from tests.serve.several import keep_slides, make_folds, read_rows, write_table

pytestmark = pytest.mark.browser


def test_opens_and_zooms(page: Any, viewer: Served) -> None:
    open_viewer(page, viewer)
    assert len(shown(page)) == 8
    assert page.locator("#slide-title").text_content() == "focus-001"
    assert sum(pixel(page, 0.5, 0.5)[:3]) > 0
    before = view(page)
    page.mouse.move(700, 500)
    page.mouse.wheel(0, -400)
    ready(page)
    after = view(page)
    assert after[2] < before[2] / 2
    assert "px" in page.locator(".readout").text_content()
    page.locator("canvas").focus()
    page.keyboard.press("ArrowRight")
    assert view(page)[0] == pytest.approx(
        after[0] + 120 * after[2] / 2.0, rel=0.01
    )  # slides have 2 um per pixel
    page.get_by_role("button", name="Whole slide").click()
    assert view(page) == pytest.approx(before)
    page.mouse.move(700, 500)
    page.mouse.down()
    page.mouse.move(600, 500, steps=4)
    page.mouse.up()
    assert view(page)[0] == pytest.approx(before[0] + 100 * before[2] / 2.0, rel=0.01)


def test_the_scale_bar_is_as_long_as_it_says(page: Any, viewer: Served) -> None:
    open_viewer(page, viewer)
    for _ in range(3):
        um_per_px = view(page)[2]
        number, unit = page.locator(".scalebar span").text_content().split()
        um = float(number) * (1000 if unit == "mm" else 1)
        assert page.locator(".scalebar i").bounding_box()["width"] == pytest.approx(um / um_per_px, abs=1)
        power = float(page.locator(".scalebar small").text_content().removesuffix("×"))
        assert power == pytest.approx(10 / um_per_px, rel=0.06)  # 40x is 0.25 um per pixel
        page.locator("canvas").press("+")


def test_layers_switch_and_fade(page: Any, viewer: Served) -> None:
    open_viewer(page, viewer)
    canvas = page.locator("canvas")
    assert canvas.get_attribute("data-layer") == "evidence-2-0"
    page.locator("canvas").press("0")
    page.wait_for_selector('canvas[data-layer=""]')
    bare = drawn(page)
    for key, layer in [("1", "attention-2"), ("3", "evidence-2-1"), ("4", "attention-1")]:
        page.keyboard.press(key)
        page.wait_for_selector(f'canvas[data-layer="{layer}"]')
        assert page.locator(f'#layers button[data-layer="{layer}"]').get_attribute("aria-pressed") == "true"
        assert drawn(page) != bare
    assert "average" in page.locator("#legend-unit").text_content()
    page.locator("#fade").fill("0")
    page.wait_for_timeout(200)
    assert drawn(page) == bare
    page.locator('#layers button[data-layer="evidence-1-0"]').click()
    page.wait_for_selector('canvas[data-layer="evidence-1-0"]')
    assert "benign" in page.locator("#legend-unit").text_content()
    assert "cells add up to" in page.locator("#legend-sums").text_content()
    page.get_by_label("Tissue outline").check()
    page.wait_for_timeout(500)
    assert drawn(page) != bare


def test_a_layer_lies_where_its_cells_are(page: Any, viewer: Served) -> None:
    """The corners of the layer's box, in level-0 pixels, are coloured on their inner side only."""
    layer = viewer.ask("/api/slides/focus-001").json["layers"][0]
    top, left, bottom, _ = layer["box_l0"]
    cell = (bottom - top) / layer["rows"]
    row, column = first_cell(viewer, layer)
    y, x = top + row * cell, left + column * cell
    open_viewer(page, viewer, f"#slide=focus-001&x={x}&y={y}&mpp=1&layer={layer['name']}&fade=100")
    page.wait_for_selector(f'canvas[data-layer="{layer["name"]}"]')
    page.wait_for_timeout(300)
    box = page.locator("canvas").bounding_box()
    dx, dy = 6 / box["width"], 6 / box["height"]
    inside, above = pixel(page, 0.5 + dx, 0.5 + dy), pixel(page, 0.5 + dx, 0.5 - dy)
    page.keyboard.press("h")
    page.wait_for_selector('canvas[data-layer=""]')
    assert pixel(page, 0.5 + dx, 0.5 + dy) != inside
    assert pixel(page, 0.5 + dx, 0.5 - dy) == above


def first_cell(viewer: Served, layer: dict[str, Any]) -> tuple[int, int]:
    """The first cell of the first row that has one: nothing lies above it."""
    raw = viewer.ask(f"/api/slides/focus-001/layers/{layer['name']}.f32").body
    voting = np.isfinite(np.frombuffer(raw, "<f4").reshape(layer["rows"], layer["columns"]))
    row = int(np.argmax(voting.any(axis=1)))
    return row, int(np.argmax(voting[row]))


def test_filters(page: Any, viewer: Served) -> None:
    open_viewer(page, viewer)
    slides = viewer.ask("/api/run").json["slides"]
    page.fill("#search", "FOCUS-003")
    assert shown(page) == ["focus-003"]
    page.fill("#search", "")
    for chosen, key in [("#by-label", "label"), ("#by-prediction", "prediction"), ("#by-split", "split")]:
        values = page.locator(f"{chosen} option").evaluate_all("each => each.map((one) => one.value)")
        assert values == ["", *sorted({slide[key] for slide in slides})]
        for value in values[1:]:
            page.select_option(chosen, value)
            assert shown(page) == [slide["id"] for slide in slides if slide[key] == value]
        page.select_option(chosen, "")
    wrong = [slide["id"] for slide in slides if slide["label"] != slide["prediction"]]
    page.select_option("#by-state", "wrong")
    assert shown(page) == wrong
    assert f"{len(wrong)} of 8 slides" in page.locator("#count").text_content()
    page.select_option("#by-state", "right")
    assert shown(page) == [slide["id"] for slide in slides if slide["id"] not in wrong]
    page.select_option("#by-state", "open")
    assert len(shown(page)) == 8
    page.select_option("#by-label", "lesion")  # both at once
    page.select_option("#by-state", "wrong")
    assert shown(page) == [
        slide["id"] for slide in slides if slide["label"] == "lesion" and slide["id"] in wrong
    ]


def test_sorts_and_turns_round_with_what_is_not_scored_last(page: Any, run_copy: Path) -> None:
    keep_slides(run_copy, {f"focus-00{n}" for n in (2, 3, 5, 6, 8)})
    with serving(run_copy) as served:
        slides = served.ask("/api/run").json["slides"]
        open_viewer(page, served)
        for key, value in SORTS.items():
            page.select_option("#sort", key)
            known = [slide for slide in slides if value(slide) is not None]
            unknown = [slide["id"] for slide in slides if value(slide) is None]
            assert len(unknown) == (3 if key in ("prediction", "confidence") else 0)
            rising = [slide["id"] for slide in sorted(known, key=value)]
            assert shown(page) == [*rising, *unknown]
            page.click("#direction")
            assert shown(page) == [*rising[::-1], *unknown[::-1]]
            page.click("#direction")
        page.select_option("#sort", "confidence")
        order = shown(page)
        page.locator("#slides button", has_text=order[1]).click()
        expect(page.locator("#slide-title")).to_have_text(order[1])
        page.locator("canvas").press("j")  # the next of the list as it is shown
        expect(page.locator("#slide-title")).to_have_text(order[2])


SORTS: dict[str, Any] = {
    "table": lambda slide: slide["id"],
    "id": lambda slide: slide["id"],
    "label": lambda slide: slide["label"],
    "prediction": lambda slide: slide["prediction"],
    "confidence": lambda slide: max(slide["p"]) if slide["p"] else None,
}


def test_no_probability_is_shown_as_one_or_nought(page: Any, run_copy: Path) -> None:
    for name in ("predictions.csv", "predictions_modules.csv"):
        rows = read_rows(run_copy / name)
        sure = {"p_benign": "0.999640", "p_lesion": "0.000360", "prediction": "benign"}
        write_table(run_copy / name, [row | sure for row in rows])
    with serving(run_copy) as served:
        open_viewer(page, served)
        own = page.locator("#probabilities .own .number").all_text_contents()
        assert own == ["> 0.999", "< 0.001"]
        assert page.locator("#slides .confidence").first.text_content() == "> 99 %"


def test_folds_are_shown_each_slide_by_its_own(page: Any, run_copy: Path, tmp_path: Path) -> None:
    with serving(make_folds(run_copy, tmp_path / "folds")) as served:
        open_viewer(page, served)
        assert "2 folds" in page.locator("#run-facts").text_content()
        for slide, fold in [("focus-003", "fold-1"), ("focus-004", "fold-2")]:
            page.locator("#slides button", has_text=slide).click()
            expect(page.locator("#slide-source")).to_contain_text(f"Tested by {fold}")
            expect(page.locator(".pane-title")).to_contain_text(f"{slide} · {fold} · Evidence")
            assert page.locator("#layers button").count() == 7
        page.get_by_label("Tissue outline").check()
        page.select_option("#by-split", "fold-2")
        assert shown(page) == ["focus-002", "focus-004", "focus-006", "focus-008"]


def test_the_pointer_is_told_where_it_is_and_the_value_there(page: Any, viewer: Served) -> None:
    facts = viewer.ask("/api/slides/focus-001").json
    layer = next(one for one in facts["layers"] if one["name"] == "evidence-2-1")
    row, column = first_cell(viewer, layer)
    top, left, bottom, right = layer["box_l0"]
    side_y, side_x = (bottom - top) / layer["rows"], (right - left) / layer["columns"]
    y, x = top + (row + 0.5) * side_y, left + (column + 0.5) * side_x
    raw = viewer.ask("/api/slides/focus-001/layers/evidence-2-1.f32").body
    value = np.frombuffer(raw, "<f4").reshape(layer["rows"], layer["columns"])[row, column]
    # The cell's middle is 60 screen pixels of 4 um right of the canvas's and 40 above; slides have 2 um per pixel.
    at = f"x={x - 120}&y={y + 80}&mpp=4"
    open_viewer(page, viewer, f"#slide=focus-001&{at}&layer=evidence-2-1&fade=50")
    page.wait_for_selector('canvas[data-layer="evidence-2-1"]')
    box = page.locator("canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 + 60, box["y"] + box["height"] / 2 - 40)
    words = page.locator(".readout").text_content().replace("(", "").replace(")", "").replace(",", "").split()
    assert (words[0], words[2], words[4], words[7]) == ("x", "y", "px", "mm")
    assert (float(words[1]), float(words[3])) == pytest.approx((x, y), abs=1.5)
    assert (float(words[5]), float(words[6])) == pytest.approx((x * 0.002, y * 0.002), abs=0.003)
    assert words[8:13] == ["evidence", "for", "lesion", "above", "others"]
    assert float(words[13].replace("−", "-")) == pytest.approx(float(value), rel=0.01)
    page.keyboard.press("1")
    page.wait_for_selector('canvas[data-layer="attention-2"]')
    page.mouse.move(box["x"] + box["width"] / 2 + 61, box["y"] + box["height"] / 2 - 40)
    expect(page.locator(".readout")).to_contain_text(re.compile(r"\) +attention [\d.]+ × average$"))


def test_compares_side_by_side_and_links_to_it(page: Any, viewer: Served) -> None:
    open_viewer(page, viewer, "#slide=focus-001&x=300&y=350&mpp=2&layer=evidence-2-0")
    page.click("#compare")
    page.wait_for_selector('#stage[data-panes="2"]')
    assert view(page) == view(page, "b.") == (300, 350, 2)  # it begins where the reviewer is
    page.locator("canvas").nth(1).click()
    page.keyboard.press("1")
    page.wait_for_selector('canvas[data-layer="attention-2"]')
    page.mouse.move(500, 400)
    page.mouse.wheel(0, -300)
    first, second = view(page), view(page, "b.")
    assert first == pytest.approx(second)
    address = page.url
    page.goto("about:blank")
    page.goto(address)
    page.wait_for_selector('#stage[data-panes="2"]')
    page.wait_for_selector('canvas[data-layer="attention-2"]')
    assert view(page) == pytest.approx(first)
    assert [page.locator("canvas").nth(n).get_attribute("data-layer") for n in (0, 1)] == [
        "evidence-2-0",
        "attention-2",
    ]


def test_compares_two_slides(page: Any, viewer: Served) -> None:
    open_viewer(page, viewer, "#slide=focus-001&x=300&y=350&mpp=2&layer=evidence-2-0")
    page.click("#compare")
    page.wait_for_selector('#stage[data-panes="2"]')
    page.locator("canvas").nth(1).click()
    alone = view(page)
    page.locator("#slides button", has_text="focus-004").click()
    expect(page.locator("#slide-title")).to_have_text("focus-004")
    assert view(page) == alone
    assert page.locator(".pane-title").nth(0).text_content().startswith("focus-001")
    assert page.locator(".pane-title").nth(1).text_content().startswith("focus-004")
    before = view(page), view(page, "b.")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("+")
    after = view(page), view(page, "b.")
    assert after[0][2] == after[1][2] == pytest.approx(before[1][2] / 1.5, rel=1e-3)
    moved = [after[n][0] - before[n][0] for n in (0, 1)]  # by as much, from where each was
    assert moved[0] == pytest.approx(moved[1], abs=0.2)
    page.get_by_label("Move both").uncheck()
    page.keyboard.press("ArrowRight")
    assert view(page)[0] == after[0][0]
    assert view(page, "b.")[0] > after[1][0]
    address = page.url
    page.goto("about:blank")
    page.goto(address)
    expect(page.locator(".pane-title").nth(1)).to_contain_text("focus-004")
    assert page.locator(".pane-title").nth(0).text_content().startswith("focus-001")


def test_the_copied_link_shows_the_same(page: Any, viewer: Served) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_viewer(page, viewer, "#slide=focus-003&x=300&y=350&mpp=3&layer=evidence-1-1&fade=30")
    page.get_by_role("button", name="Copy link").click()
    expect(page.locator("#link")).to_have_text("Copied")
    link = page.evaluate("navigator.clipboard.readText()")
    expect(page.locator("#link")).to_have_text("Copy link")
    page.goto("about:blank")
    page.goto(link)
    page.wait_for_selector('canvas[data-layer="evidence-1-1"]')
    assert page.locator("#slide-title").text_content() == "focus-003"
    assert page.locator("#fade").input_value() == "30"
    assert view(page) == pytest.approx((300, 350, 3))


def test_a_review_is_kept_over_a_reload(page: Any, run_copy: Path) -> None:
    with serving(run_copy) as served:
        open_viewer(page, served)
        page.fill("#reviewer", "Dr. A")
        page.select_option("#corrected", "lesion")
        page.fill("#note", "two foci")
        page.reload()  # before it is saved: what was typed is still there
        ready(page)
        expect(page.locator("#note")).to_have_value("two foci")
        expect(page.locator("#saved")).to_have_text("not saved yet")
        page.locator("#review button").click()
        expect(page.locator("#saved")).to_contain_text("saved ")
        page.reload()
        ready(page)
        page.wait_for_selector("#history li")
        assert page.locator("#corrected").input_value() == "lesion"
        assert "Dr. A" in page.locator("#history").text_content()
        page.select_option("#by-state", "reviewed")
        assert shown(page) == ["focus-001"]
    text = (run_copy / "reviews.csv").read_text(encoding="utf-8")
    assert ',"Dr. A","focus-001","lesion","two foci"' in text


def test_no_reviewer_is_given_another_ones_words(page: Any, run_copy: Path) -> None:
    with serving(run_copy) as served:
        assert served.write("focus-001", {"reviewer": "A", "label": "lesion", "note": "of A"}).status == 201
        open_viewer(page, served)
        expect(page.locator("#history")).to_contain_text("of A")
        assert form(page) == ("", "", "")
        page.fill("#reviewer", "A")
        page.locator("#note").focus()
        assert form(page) == ("A", "lesion", "of A")
        page.fill("#reviewer", "B")
        page.locator("#note").focus()
        assert form(page) == ("B", "", "")
        page.locator("#note").fill("of B")
        page.locator("#slides button", has_text="focus-002").click()
        expect(page.locator("#slide-title")).to_have_text("focus-002")
        page.fill("#reviewer", "A")  # while B's draft of the other slide waits
        page.locator("#slides button", has_text="focus-001").click()
        expect(page.locator("#slide-title")).to_have_text("focus-001")
        assert form(page) == ("A", "lesion", "of A")
        page.fill("#reviewer", "B")
        page.locator("#note").focus()
        assert form(page) == ("B", "", "of B")
        page.locator("#review button").click()
        expect(page.locator("#saved")).to_contain_text("saved ")
    assert [(row["reviewer"], row["label"], row["note"]) for row in read_rows(run_copy / "reviews.csv")] == [
        ("A", "lesion", "of A"),
        ("B", "", "of B"),
    ]


def test_what_was_just_typed_stays_when_the_name_is_put_right(page: Any, viewer: Served) -> None:
    open_viewer(page, viewer)
    page.fill("#note", "typed before the name")
    page.fill("#reviewer", "Dr A")
    page.locator("#note").focus()
    page.fill("#reviewer", "Dr. A")
    page.locator("#note").focus()
    page.reload()
    ready(page)
    assert form(page) == ("Dr. A", "", "typed before the name")


def test_drafts_of_another_run_of_that_name_are_not_shown(page: Any, run_copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / run_copy.name
    shutil.copytree(run_copy, other)
    with serving(run_copy) as served:
        open_viewer(page, served)
        page.fill("#note", "of the first study")
    with serving(other, port=served.port) as again:
        open_viewer(page, again)
        expect(page.locator("#run-name")).to_have_text(run_copy.name)
        assert form(page) == ("", "", "")
    with serving(run_copy, port=served.port) as again:
        open_viewer(page, again)
        assert form(page) == ("", "", "of the first study")


def form(page: Any) -> tuple[str, str, str]:
    """Reviewer, corrected label and note."""
    return tuple(page.locator(f"#{name}").input_value() for name in ("reviewer", "corrected", "note"))  # type: ignore[return-value]


def test_no_script_in_names_or_notes_runs(page: Any, nasty_run: Path) -> None:
    evil = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>"
    with serving(nasty_run) as served:
        assert served.write("focus-002", {"reviewer": evil[:80], "label": "", "note": evil}).status == 201
        open_viewer(page, served)
        assert shown(page)[0].startswith("<img")
        page.locator("#slides button").first.click()
        expect(page.locator("#slide-title")).to_have_text("<img src=x onerror=window.hacked=1>")
        page.locator("#slides button", has_text="focus-002").click()
        page.wait_for_selector("#history li")
        assert evil in page.locator("#history").text_content()
        assert page.evaluate("window.hacked") is None


def test_a_slide_whose_file_is_gone_says_so(page: Any, nasty_run: Path) -> None:
    with serving(nasty_run) as served:
        open_viewer(page, served)
        page.locator("#slides button", has_text="focus-008").click()
        expect(page.locator(".pane-message")).to_contain_text("focus-008: its file is not where it was")


def test_no_class_has_too_long_a_name(page: Any, run_copy: Path) -> None:
    """The filters grew as wide as the longest, and the page with them."""
    for name in ("cohort.csv", "predictions.csv", "predictions_modules.csv", "metrics.json"):
        text = (run_copy / name).read_text(encoding="utf-8")
        (run_copy / name).write_text(text.replace("lesion", "class_" * 40), encoding="utf-8")
    with serving(run_copy) as served:
        open_viewer(page, served)
        assert "class_class_" in page.locator("#list").text_content()
        for place in ("html", "#list", "#side"):
            wide = page.locator(place).evaluate("e => e.scrollWidth - e.clientWidth")
            assert (place, wide) == (place, 0)


def test_fits_a_small_screen(page: Any, viewer: Served) -> None:
    page.set_viewport_size(SMALL)
    open_viewer(page, viewer)
    assert page.evaluate("document.documentElement.scrollWidth") <= SMALL["width"]
    assert not page.locator("#list").is_visible()
    page.click("#show-list")
    page.locator("#slides button", has_text="focus-003").click()
    expect(page.locator("#slide-title")).to_have_text("focus-003")
    assert not page.locator("#list").is_visible()
    page.click("#show-side")
    assert page.locator("#layers").is_visible()
    page.click("#show-side")
    for name in ("Compare", "Copy link", "Keys"):
        button = page.get_by_role("button", name=name).bounding_box()
        assert 0 <= button["x"] <= button["x"] + button["width"] <= SMALL["width"]
    page.get_by_role("button", name="Keys").click()
    assert page.locator("#keys").is_visible()
