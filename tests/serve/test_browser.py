"""The viewer in a real browser: opens, zooms, switches layers, filters, compares, edits, reloads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serve.served import Served, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright's driver is not installed")
expect = sync_api.expect
pytestmark = pytest.mark.browser
WIDE, SMALL = {"width": 1440, "height": 900}, {"width": 390, "height": 780}


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page of 1440 x 900 that must meet no error of its own."""
    context = browser.new_context(viewport=WIDE, reduced_motion="reduce")
    context.set_default_timeout(60_000)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: faults.append(line.text) if is_fault(line) else None)
    yield page
    context.close()
    assert faults == []


def is_fault(line: Any) -> bool:
    """An error of the page; that a picture cannot be had is the server's answer, and tested by itself."""
    return line.type == "error" and not line.text.startswith("Failed to load resource")


def open_viewer(page: Any, served: Served, fragment: str = "") -> None:
    page.goto(served.url + fragment)
    ready(page)


def ready(page: Any) -> None:
    """Wait until all that is in sight is drawn."""
    page.wait_for_selector('canvas[data-ready="yes"]')


def view(page: Any, prefix: str = "") -> tuple[float, float, float]:
    """x, y and um per screen pixel, as the address says them a moment after the last movement."""
    page.wait_for_timeout(400)
    words = page.evaluate("Object.fromEntries(new URLSearchParams(location.hash.slice(1)))")
    return tuple(float(words[prefix + key]) for key in ("x", "y", "mpp"))  # type: ignore[return-value]


def pixel(page: Any, x: float, y: float) -> list[int]:
    """RGBA that the first canvas shows at a share of its width and height."""
    script = """([x, y]) => { const c = document.querySelector("canvas");
        return [...c.getContext("2d").getImageData(x * c.width, y * c.height, 1, 1).data]; }"""
    found: list[int] = page.evaluate(script, [x, y])
    return found


def drawn(page: Any) -> str:
    """All that the first canvas shows."""
    found: str = page.evaluate("document.querySelector('canvas').toDataURL()")
    return found


def shown(page: Any) -> list[str]:
    return page.locator("#slides .first b").all_text_contents()  # type: ignore[no-any-return]


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


def test_filters_and_sorts(page: Any, viewer: Served) -> None:
    open_viewer(page, viewer)
    slides = viewer.ask("/api/run").json["slides"]
    page.fill("#search", "FOCUS-003")
    assert shown(page) == ["focus-003"]
    page.fill("#search", "")
    page.select_option("#by-label", "lesion")
    assert shown(page) == [slide["id"] for slide in slides if slide["label"] == "lesion"]
    page.select_option("#by-state", "scored")
    assert len(shown(page)) == 4
    page.select_option("#by-state", "wrong")
    wrong = [s["id"] for s in slides if s["label"] == "lesion" and s["prediction"] != "lesion"]
    assert shown(page) == wrong
    assert f"{len(wrong)} of 8 slides" in page.locator("#count").text_content()
    page.select_option("#by-label", "")
    page.select_option("#by-state", "")
    page.select_option("#sort", "confidence")
    rising = [slide["id"] for slide in sorted(slides, key=lambda slide: max(slide["p"]))]
    assert shown(page) == rising
    page.click("#direction")
    assert shown(page) == rising[::-1]
    page.locator("canvas").press("j")
    at = rising[::-1].index(slides[0]["id"])
    expect(page.locator("#slide-title")).to_have_text([*rising[::-1], slides[0]["id"]][at + 1])


def test_compares_side_by_side_and_links_to_it(page: Any, viewer: Served) -> None:
    open_viewer(page, viewer)
    page.click("#compare")
    page.wait_for_selector('#stage[data-panes="2"]')
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
