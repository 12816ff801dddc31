"""What the page does when something is not there, or two disagree: it says so, and goes on."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from playwright.sync_api import expect

from tests.serve.looking import open_viewer, ready, shown, view
from tests.serve.served import Served, serving
from tests.serve.several import read_rows, write_table
from tests.slides.drawn import write_slide

pytestmark = pytest.mark.browser


def test_a_link_to_a_slide_that_is_not_there_opens_no_other(page: Any, viewer: Served) -> None:
    page.goto(f"{viewer.url}#slide=elsewhere&x=1&y=2&mpp=3")
    message = page.locator(".pane-message")
    expect(message).to_have_text("This run has no slide elsewhere. Choose one from the list.")
    page.wait_for_timeout(500)
    expect(page.locator("#slide-title")).to_have_text("No slide")
    expect(page.locator(".scalebar")).to_be_hidden()
    assert page.url.endswith("#slide=elsewhere&x=1&y=2&mpp=3")
    page.locator("#slides button", has_text="focus-002").click()
    expect(page.locator("#slide-title")).to_have_text("focus-002")
    expect(message).to_have_text("")
    assert "slide=focus-002" in page.evaluate("new Promise((r) => setTimeout(() => r(location.hash), 400))")


# The browser tells of an address when the page would have written its own.
LATE = """addEventListener("hashchange", (event) => {
    if (!event.isTrusted) return;
    event.stopImmediatePropagation();
    setTimeout(() => dispatchEvent(new HashChangeEvent("hashchange")), 400);
});"""
ENTERED = """([key, hash]) => {
    document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    location.hash = hash;
}"""


@pytest.mark.parametrize("key", ["]", "c"])
def test_an_address_entered_while_the_page_writes_its_own_is_followed(
    page: Any, viewer: Served, key: str
) -> None:
    page.add_init_script(LATE)
    open_viewer(page, viewer, "#slide=focus-004")
    view(page)
    page.evaluate(ENTERED, [key, "slide=focus-005&fade=50"])
    expect(page.locator("#slide-title")).to_have_text("focus-005")
    expect(page.locator("#fade")).to_have_value("50")
    view(page)
    assert "slide=focus-005" in page.url
    expect(page.locator(".pane")).to_have_count(1)


def test_a_second_picture_closed_before_it_came_is_gone(page: Any, viewer: Served) -> None:
    open_viewer(page, viewer, "#slide=focus-004")
    for _ in range(2):
        page.evaluate(
            "document.body.dispatchEvent(new KeyboardEvent('keydown', { key: 'c', bubbles: true }))"
        )
    view(page)
    expect(page.locator(".pane")).to_have_count(1)
    expect(page.locator("#compare")).to_have_attribute("aria-pressed", "false")
    expect(page.locator("#together-row")).to_be_hidden()
    assert "b.slide" not in page.url


def test_of_two_addresses_entered_at_once_the_later_is_shown(page: Any, viewer: Served) -> None:
    """Though what the earlier asks for comes later."""
    open_viewer(page, viewer, "#slide=focus-004")
    held: list[Any] = []
    page.route("**/layers/evidence-2-1.*", lambda route: held.append(route))
    earlier = "slide=focus-004&layer=evidence-2-1&fade=20&outline=1&x=10&y=10&mpp=8"
    with page.expect_request("**/layers/evidence-2-1.*"):
        page.evaluate(f"location.hash = '{earlier}'")
    page.evaluate("location.hash = 'slide=focus-004&layer=evidence-2-0&fade=50&x=300&y=350&mpp=2'")
    expect(page.locator("canvas")).to_have_attribute("data-layer", "evidence-2-0")
    assert held
    for route in held:
        route.continue_()
    assert view(page) == (300, 350, 2)
    expect(page.locator("#fade")).to_have_value("50")
    assert "outline" not in page.url


def test_an_address_of_the_slide_in_sight_stops_another_on_its_way(page: Any, viewer: Served) -> None:
    open_viewer(page, viewer, "#slide=focus-004")
    view(page)
    held: list[Any] = []
    page.route("**/api/slides/focus-005?*", lambda route: held.append(route))
    with page.expect_request("**/api/slides/focus-005?*"):
        page.evaluate("location.hash = 'slide=focus-005'")
    page.evaluate("location.hash = 'slide=focus-004&fade=50'")
    expect(page.locator("#fade")).to_have_value("50")
    assert held
    for route in held:
        route.continue_()
    page.wait_for_timeout(300)
    view(page)
    expect(page.locator(".pane-title")).to_have_text("focus-004")
    assert "slide=focus-004" in page.url


def test_the_second_picture_is_of_the_slide_that_is_on_its_way(page: Any, viewer: Served) -> None:
    open_viewer(page, viewer, "#slide=focus-001")
    view(page)
    held: list[Any] = []
    page.route("**/api/slides/focus-002?*", lambda route: held.append(route))
    page.locator("canvas").first.focus()
    for key in "jc":
        with page.expect_request("**/api/slides/focus-002?*"):
            page.keyboard.press(key)
    while len(held) < 2:  # a request is told of before it is handed to its route
        page.wait_for_timeout(10)
    first, second = held
    second.continue_()
    expect(page.locator(".pane-title").nth(1)).to_have_text("focus-002")
    first.continue_()
    expect(page.locator(".pane-title")).to_contain_text(["focus-002", "focus-002"])
    ready(page)
    assert view(page) == view(page, "b.")


def test_slides_left_out_are_listed_and_not_opened(page: Any, run_copy: Path) -> None:
    (run_copy / "left_out.csv").write_text("slide_id,reason\nblurred,no tissue was found; look at it\n")
    with serving(run_copy) as served:
        open_viewer(page, served)
        gone = page.locator("#slides .left-out")
        expect(gone).to_have_text("blurredleft out: no tissue was found; look at it")
        assert gone.locator("button").count() == 0
        assert page.locator("#count").text_content() == "8 slides, 1 left out"
        page.select_option("#by-state", "scored")
        expect(gone).to_have_count(0)
        page.select_option("#by-state", "left-out")
        expect(gone).to_have_count(1)
        assert shown(page) == []
        page.goto(f"{served.url}#slide=blurred")
        expect(page.locator(".pane-message")).to_contain_text(
            "This run has no slide blurred: it was left out (no tissue was found; look at it)."
        )


def test_tiles_that_fail_are_asked_for_again_and_the_message_goes(page: Any, viewer: Served) -> None:
    """Even if the answer is not the viewer's own: a server that is too busy answers in plain text."""
    failing = True

    def answer(route: Any) -> None:
        if failing:
            route.fulfill(status=503, content_type="text/plain", body="Service Unavailable")
        else:
            route.continue_()

    page.route("**/tiles/**", answer)
    page.goto(viewer.url)
    expect(page.locator(".pane-message")).to_have_text("the viewer is busy")
    failing = False
    expect(page.locator(".pane-message")).to_have_text("")
    ready(page)
    assert page.evaluate(
        "[...document.querySelector('canvas').getContext('2d').getImageData(300, 300, 9, 9).data].some(Boolean)"
    )


def test_a_thumbnail_that_fails_is_asked_for_again(page: Any, viewer: Served) -> None:
    failing = True
    page.route("**/thumbnail.jpg*", lambda route: route.fulfill(status=503) if failing else route.continue_())
    page.goto(viewer.url)
    first = page.locator("#slides img").first
    expect(first).to_have_class("thumb missing")
    failing = False
    expect(first).to_have_class("thumb")
    assert first.evaluate("picture => picture.naturalWidth > 0")


def test_a_slide_with_a_damaged_heatmap_is_shown(page: Any, run_copy: Path) -> None:
    for path in (run_copy / "heatmaps").glob("focus-001*.npz"):
        path.write_bytes(b"no heatmap")
    with serving(run_copy) as served:
        open_viewer(page, served)
        expect(page.locator("#slide-title")).to_have_text("focus-001")
        expect(page.locator(".pane-message")).to_have_text("")
        expect(page.locator("#layers")).to_contain_text("focus-001.npz: is not a heatmap")


def test_reviewers_that_disagree_are_said_to(page: Any, run_copy: Path) -> None:
    table = {row["slide_id"]: row["label"] for row in read_rows(run_copy / "cohort.csv")}
    other = {"benign": "lesion", "lesion": "benign"}[table["focus-002"]]
    with serving(run_copy) as served:
        for slide, reviewer, label in [
            ("focus-002", "A", other), ("focus-002", "B", ""),  # a note takes no correction back
            ("focus-003", "A", "benign"), ("focus-003", "B", "lesion"),
            ("focus-004", "A", table["focus-004"]),
        ]:  # fmt: skip
            assert served.write(slide, {"reviewer": reviewer, "label": label, "note": "n"}).status == 201
        open_viewer(page, served)
        marks = page.locator("#slides .mark").all_text_contents()
        assert marks[:4] == ["", f"✎ {other}", "≠ benign / lesion", "✎"]
        page.select_option("#by-state", "corrected")
        assert shown(page) == ["focus-002"]
        page.select_option("#by-state", "disputed")
        assert shown(page) == ["focus-003"]
        page.locator("#slides button").click()
        expect(page.locator("#agreement")).to_have_text("Reviewers disagree: benign or lesion.")
        page.fill("#reviewer", "A")
        page.select_option("#corrected", "lesion")
        page.locator("#review button").click()
        expect(page.locator("#agreement")).to_have_text("")
        expect(page.locator("#slides .mark")).to_have_count(0)  # it is no longer among the disputed
    assert [row["label"] for row in read_rows(run_copy / "reviews.csv")][-1] == "lesion"


@pytest.fixture
def oblong_run(run_copy: Path, tmp_path: Path) -> Path:
    """A run whose second slide has pixels twice as high as they are wide."""
    spots = np.random.default_rng(1).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    path = write_slide(tmp_path / "oblong.tiff", np.asarray(cv2.resize(spots, (900, 450))), 4.0, 2.0)
    rows = read_rows(run_copy / "cohort.csv")
    write_table(run_copy / "cohort.csv", [rows[0], rows[1] | {"path": str(path)}, *rows[2:]])
    return run_copy


def test_pictures_of_other_pixels_go_along_by_um(page: Any, oblong_run: Path) -> None:
    with serving(oblong_run) as served:
        open_viewer(
            page, served, "#slide=focus-001&x=300&y=300&mpp=2&b.slide=focus-002&b.x=300&b.y=200&b.mpp=2"
        )
        page.wait_for_selector('#stage[data-panes="2"]')
        ready(page)
        before = view(page), view(page, "b.")
        page.locator("canvas").first.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowUp")
        after = view(page), view(page, "b.")
        (x, y), (other_x, other_y) = (
            [(b - a) * um for a, b, um in zip(old[:2], new[:2], mpp, strict=True)]
            for old, new, mpp in zip(before, after, [(2.0, 2.0), (2.0, 4.0)], strict=True)
        )
        assert (abs(x), abs(y)) == pytest.approx((240, 240), abs=1)  # 120 screen pixels of 2 um
        assert (other_x, other_y) == pytest.approx((x, y), abs=1)


@pytest.fixture
def shared(finished_run: Path) -> Iterator[Served]:
    """A viewer that other machines reach, and so needs its token; here by this machine's own address."""
    with serving(finished_run, host="0.0.0.0") as served:
        query = served.url.partition("?")[2]
        yield dataclasses.replace(served, url=f"http://127.0.0.1:{served.port}/?{query}")


def test_links_in_a_mail_open_the_viewer_that_was_entered(page: Any, shared: Served) -> None:
    """Both the address with the token, and a copied link later, followed from a page of another site."""
    address = shared.url.partition("?")[0]

    def mail(route: Any) -> None:
        links = f'<a id="first" href="{shared.url}">a</a><a id="later" href="{address}#slide=focus-003">b</a>'
        route.fulfill(content_type="text/html", body=links)

    page.route("http://mail.example/**", mail)
    page.goto("http://mail.example/")
    page.click("#later")
    expect(page.locator("p")).to_contain_text("This viewer asks for a token")
    page.goto("http://mail.example/")
    page.click("#first")
    expect(page.locator("#slide-title")).to_have_text("focus-001")
    page.goto("http://mail.example/")
    page.click("#later")
    expect(page.locator("#slide-title")).to_have_text("focus-003")
