"""The report in a real browser: on a narrow screen, and printed."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.evaluation.reports import full, several

from holoslide.evaluation.report import write_report

pytestmark = pytest.mark.browser
PAPER_PX = 687  # between the margins of A4


@pytest.fixture(params=[full, several])
def page(browser: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A whole report, of one run and of several, opened from its file."""
    write_report(request.param(), tmp_path / "report.html")
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto((tmp_path / "report.html").as_uri())
    yield page
    page.close()


def cut_off(page: Any) -> int:
    """How many tables are wider than their place, and scroll."""
    scrolls = "[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    found: int = page.evaluate(scrolls)
    return found


def overhang_px(page: Any) -> int:
    """How far the page is wider than what shows it."""
    found: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return found


@pytest.mark.parametrize("width", [320, 420, 900])
def test_no_screen_is_too_narrow(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert overhang_px(page) == 0
    small = page.evaluate("Math.min(...[...document.querySelectorAll('.map img')].map(i => i.clientWidth))")
    assert small > 85


@pytest.mark.parametrize("width", [320, 1200])
def test_no_class_has_too_long_a_name(browser: Any, tmp_path: Path, width: int) -> None:
    """Slides' heads and captions ran off the page; a wide table scrolls by itself."""
    report = full()
    write_report(report, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    (tmp_path / "long.html").write_text(text.replace(report.classes[0], "class_" * 40), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto((tmp_path / "long.html").as_uri())
    assert overhang_px(page) == 0
    page.close()


@pytest.mark.parametrize("width", [1000, 1400])
def test_on_a_wide_screen_no_table_is_cut_off(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert cut_off(page) == 0


def test_on_paper_nothing_is_folded_or_cut_off(page: Any) -> None:
    page.set_viewport_size({"width": PAPER_PX, "height": 1000})
    page.emulate_media(media="print")
    assert overhang_px(page) == 0
    assert page.locator("nav").is_hidden()
    for folded in page.locator("details > :not(summary)").all():
        assert folded.bounding_box()["height"] > 10
    assert cut_off(page) == 0
    assert page.pdf(format="A4").startswith(b"%PDF")


def test_on_paper_a_legend_is_no_wider_than_its_picture(page: Any) -> None:
    page.set_viewport_size({"width": PAPER_PX, "height": 1000})
    page.emulate_media(media="print")
    legends = page.locator(".legend").all()
    assert legends
    for legend in legends:
        picture = legend.locator("xpath=..").locator(".frame img").bounding_box()["width"]
        assert legend.bounding_box()["width"] <= max(picture, 30 / 25.4 * 96) + 1


def test_on_paper_sections_are_not_kept_whole_at_the_price_of_empty_pages(page: Any) -> None:
    page.emulate_media(media="print")
    breaks = "[...document.querySelectorAll('section')].map(e => getComputedStyle(e).breakInside)"
    assert "avoid" not in page.evaluate(breaks)
    pages = re.findall(rb"/Type\s*/Page\b", page.pdf(format="A4"))
    assert 4 <= len(pages) <= 8  # of several runs one more
