"""Every key does what the help says, wherever the focus is but in a field that needs it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from importlib import resources
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.conftest import REPO
from tests.serve.looking import open_viewer
from tests.serve.served import Served

pytestmark = pytest.mark.browser
START = "#slide=focus-004&x=300&y=350&mpp=2&layer=evidence-2-0&fade=50"
State = dict[str, Any]
Effect = Callable[[State, State], bool]


def state(page: Any) -> State:
    """All that a key may change."""
    found: State = page.evaluate("""() => {
        const words = new URLSearchParams(location.hash.slice(1));
        const numbers = ["x", "y", "mpp", "fade"].map((key) => [key, Number(words.get(key))]);
        return {
            ...Object.fromEntries(numbers),
            slide: words.get("slide"),
            shown: document.querySelector("canvas").dataset.layer,
            layer: words.get("layer"),
            outline: words.get("outline"),
            panes: document.querySelectorAll(".pane").length,
            focus: document.activeElement.id,
            help: document.querySelector("#keys").open,
            told: !words.has("at"), // by the page, as its own
            link: document.querySelector("#link").textContent,
        };
    }""")
    return found


def changes(name: str, to: Any) -> Effect:
    """That one thing becomes a value, or does what a function of before and after says, and nothing else does."""

    def seen(before: State, after: State) -> bool:
        becomes = to(before[name], after[name]) if callable(to) else after[name] == to
        focus = {"focus"} if name == "help" else set()  # a dialog takes it
        others = (
            before.keys() - {name, "link"} - ({"layer", "shown"} if name in ("layer", "shown") else set())
        )
        return becomes and all(before[each] == after[each] for each in others - focus)

    return seen


def by(factor: float) -> Callable[[float, float], bool]:
    return lambda before, after: abs(after / before - factor) < 1e-3


PAN = 120 * 2.0 / 2.0  # level-0 pixels: 120 on the screen, of 2 um each, and so has the slide
EFFECTS: dict[str, Effect] = {
    "ArrowLeft": changes("x", lambda a, b: abs(b - a + PAN) < 1),
    "ArrowRight": changes("x", lambda a, b: abs(b - a - PAN) < 1),
    "ArrowUp": changes("y", lambda a, b: abs(b - a + PAN) < 1),
    "ArrowDown": changes("y", lambda a, b: abs(b - a - PAN) < 1),
    "+": changes("mpp", by(1 / 1.5)),
    "=": changes("mpp", by(1 / 1.5)),
    "-": changes("mpp", by(1.5)),
    "f": lambda before, after: after["mpp"] != before["mpp"] and after["shown"] == before["shown"],
    "j": lambda before, after: (after["slide"], after["shown"]) == ("focus-005", before["shown"]),
    "k": lambda before, after: (after["slide"], after["shown"]) == ("focus-003", before["shown"]),
    "1": changes("layer", "attention-2"),
    "2": changes("layer", "evidence-2-0"),
    "3": changes("layer", "evidence-2-1"),
    "4": changes("layer", "attention-1"),
    "6": changes("layer", "evidence-1-1"),
    "9": lambda before, after: before == after,  # there are six
    "0": changes("layer", None),
    "h": changes("shown", ""),
    "[": changes("fade", 40),
    "]": changes("fade", 60),
    "t": changes("outline", "1"),
    "c": changes("panes", 2),
    "l": changes("link", "Copied"),
    "/": changes("focus", "search"),
    "n": changes("focus", "note"),
    "?": changes("help", to=True),
}  # fmt: skip


def settles(page: Any, wanted: Callable[[State], bool]) -> bool:
    """Whether the page comes to a state in five seconds: the address follows a movement after 150 ms."""
    for _ in range(50):
        if wanted(state(page)):
            return True
        page.wait_for_timeout(100)
    return False


def begin(page: Any, focus: str) -> State:
    """Back to the start, from wherever the last key led."""
    if page.locator("#keys").is_visible():
        page.keyboard.press("Escape")
    page.evaluate("hash => (location.hash = `${hash}&at=${performance.now()}`)", START)  # always another
    told: State = {"slide": "focus-004", "layer": "evidence-2-0", "shown": "evidence-2-0", "outline": None}
    told |= {"x": 300, "y": 350, "mpp": 2, "fade": 50, "panes": 1, "help": False, "told": True}
    assert settles(page, lambda now: now.items() >= told.items())
    page.locator(focus).focus()
    return state(page)


@pytest.mark.parametrize("focus", ["canvas", "#fade", "#outline"])
def test_every_key_does_what_the_help_says(page: Any, viewer: Served, focus: str) -> None:
    """Also after the strength's slider was used, which needs the arrows alone."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_viewer(page, viewer, START)
    wrong = []
    for key, effect in EFFECTS.items():
        if focus != "canvas" and key not in "+h3jt/":
            continue  # some are enough
        before = begin(page, focus)
        page.keyboard.press(key)
        if not settles(page, functools.partial(effect, before)):
            wrong.append((key, before, state(page)))
    assert wrong == []


def test_the_slider_keeps_the_keys_that_move_it(page: Any, viewer: Served) -> None:
    open_viewer(page, viewer, START)
    before = begin(page, "#fade")
    for key, value in [("ArrowLeft", 49), ("ArrowUp", 50), ("PageUp", 60), ("Home", 0), ("End", 100)]:
        page.keyboard.press(key)
        assert settles(page, functools.partial(changes("fade", value), before)), key


def test_a_field_that_is_written_in_keeps_its_keys(page: Any, viewer: Served) -> None:
    open_viewer(page, viewer, START)
    before = begin(page, "#note")
    for field in ("#note", "#reviewer"):
        page.locator(field).press_sequentially("hjtc?/1+")
        assert page.locator(field).input_value() == "hjtc?/1+"
    page.wait_for_timeout(300)
    assert state(page) | {"focus": ""} == before | {"focus": ""}
    page.locator("#reviewer").press("Escape")
    page.keyboard.press("j")
    expect(page.locator("#slide-title")).to_have_text("focus-005")


def test_the_help_and_the_manual_name_every_key() -> None:
    static = resources.files("holoslide.serve").joinpath("static")
    page = static.joinpath("index.html").read_text(encoding="utf-8")
    script = static.joinpath("app.js").read_text(encoding="utf-8")
    named = set(" ".join(re.findall(r"<dt>(.*?)</dt>", page)).replace(",", " ").split())
    manual = (REPO / "docs" / "viewer.md").read_text(encoding="utf-8")
    in_manual = set(re.findall(r"`(\S)`", manual[manual.index("| key |") : manual.index("## Fast")]))
    block = script[script.index("const KEYS") : script.index("\n};\n", script.index("const KEYS"))]
    bound = {key.strip('"') for key in re.findall(r'^  ("?\S+?"?): \(', block, re.MULTILINE)}
    assert bound <= EFFECTS.keys()
    plain = {key for key in bound if len(key) == 1} - {"=", "-"}  # = is + without shift
    assert plain <= named | {"?"}
    assert plain | {"-", "0", "1", "9"} <= in_manual
