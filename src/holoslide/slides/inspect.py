"""What slide files say of themselves, for a person who has just been given them; no pixel is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holoslide.errors import SlideError
from holoslide.slides.crew import Beat, Died, run_all
from holoslide.slides.facts import Mpp, shown
from holoslide.slides.reader import open_slide

STALL_S = 120.0

Facts = dict[str, Any]


def inspect_slides(
    paths: Sequence[Path], *, fallback_mpp: float | None = None, workers: int = 1
) -> list[Facts]:
    """`Reader.facts` of each, and `slide`; or `slide` and `error`, one line.

    They are opened in processes of their own, which a file may kill.
    """
    work = [(path, fallback_mpp) for path in paths]
    found: dict[int, Facts] = {}
    for index, outcome in run_all(_facts_of, work, workers=workers, limit_s=STALL_S):
        if isinstance(outcome, Died):
            what = f"the process that opened it died ({outcome.how})"
            error = SlideError(shown(paths[index]), what, "leave the slide out, and report it")
            outcome = {"slide": str(paths[index]), "error": str(error)}
        found[index] = outcome
    return [found[index] for index in range(len(paths))]


def _facts_of(work: tuple[Path, float | None], beat: Beat) -> Facts:
    path, fallback_mpp = work
    try:
        with open_slide(path, fallback_mpp=fallback_mpp) as slide:
            return {"slide": str(path), **slide.facts()}
    except SlideError as error:
        return {"slide": str(path), "error": str(error)}


def described(facts: Facts) -> list[str]:
    """The facts as lines to be read, the slide's name first."""
    name = shown(Path(facts["slide"]))
    if "error" in facts:
        return [name, f"  error: {facts['error']}"]
    mpp, bounds, power = facts["mpp"], facts["bounds"], facts["objective_power"]
    size, resolution = _size(facts), "not known: give it with --slide-mpp, or in the slide table's mpp column"
    if mpp is not None:
        size += f", {facts['width'] * mpp['x'] / 1000:.3g} x {facts['height'] * mpp['y'] / 1000:.3g} mm"
        resolution = str(Mpp(**mpp))
    lines = {
        "format": f"{facts['vendor']}, {facts['pixels']}",
        "size": size,
        "levels": ", ".join(_size(level) for level in facts["levels"]),
        "um per pixel": resolution,
        "objective": "not known" if power is None else f"{power:g}x",
        "colour profile": "yes" if facts["colour_profile"] else "no",
        "files": f"{facts['file_bytes'] / 1e6:.3g} MB",
    }
    if facts["orientation"] != 1:
        lines["orientation"] = (
            f"tag {facts['orientation']}, not followed: pixels are taken as they are stored"
        )
    if (bounds["height"], bounds["width"]) != (facts["height"], facts["width"]):
        lines["scanned"] = f"{_size(bounds)} from x {bounds['left']}, y {bounds['top']}"
    return [name, *(f"  {key}: {value}" for key, value in lines.items())]


def _size(of: Facts) -> str:
    return f"{of['width']} x {of['height']} px"
