"""What the tests in a browser look at: the view, the pictures on the canvas, the list."""

from __future__ import annotations

from typing import Any

from tests.serve.served import Served

WIDE, SMALL = {"width": 1440, "height": 900}, {"width": 390, "height": 780}


def open_viewer(page: Any, served: Served, fragment: str = "") -> None:
    page.goto(served.url + fragment)
    ready(page)


def ready(page: Any) -> None:
    """Wait until all that is in sight is drawn."""
    page.wait_for_selector('canvas[data-ready="yes"]')


SETTLED = """async () => {
    let told, since, frames;
    for (;;) {
        await new Promise(requestAnimationFrame);
        if (location.hash !== told) [told, since, frames] = [location.hash, performance.now(), 0];
        else if (++frames > 20 && performance.now() - since > 400) return;
    } }"""


def view(page: Any, prefix: str = "") -> tuple[float, float, float]:
    """x, y and um per screen pixel, as the address says them when it has stood still a while.

    The while is counted in the page: on a busy machine its clock runs, but it draws and tells nothing.
    """
    page.evaluate(SETTLED)
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
