"""Takes the pictures of the report and the viewer that these pages show, in Chromium, of the demo's run.

python docs/screenshots.py demo/run
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from playwright.sync_api import Page, sync_playwright

PICTURES = Path(__file__).resolve().parent / "pictures"
SECTIONS = ("cohort", "results", "decision", "calibration", "depth", "learning")


def report(page: Page, path: Path) -> None:
    """The top of the page, every section that docs/report.md explains, and two slides: least sure and surest."""
    page.set_viewport_size({"width": 826, "height": 1420})
    page.goto(path.resolve().as_uri())
    page.screenshot(path=PICTURES / "report.png")
    page.set_viewport_size({"width": 1136, "height": 900})
    page.locator("header").first.screenshot(path=PICTURES / "report-top.png")
    for name in SECTIONS:
        page.locator(f"section#{name}").screenshot(path=PICTURES / f"report-{name}.png")
    page.locator("section#run table").first.screenshot(path=PICTURES / "report-used.png")
    slides = page.locator("article.slide")
    slides.first.screenshot(path=PICTURES / "report-unsure.jpg", quality=85)
    slides.last.screenshot(path=PICTURES / "report-sure.jpg", quality=85)


def viewer(page: Page, url: str, slide: str) -> None:
    """The surest slide of the second class with its evidence, and the same twice, beside its attention."""
    page.set_viewport_size({"width": 1360, "height": 820})
    page.goto(f"{url}#slide={slide}")
    _drawn(page)
    page.locator("#by-state").select_option(label="scored")
    page.keyboard.press("3")  # after attention and the first class
    _drawn(page)
    page.screenshot(path=PICTURES / "viewer.jpg", quality=85)
    page.keyboard.press("c")
    _drawn(page)
    page.locator("canvas").last.click()
    page.keyboard.press("1")
    _drawn(page)
    page.screenshot(path=PICTURES / "viewer-compare.jpg", quality=85)


def phone(page: Page, url: str, slide: str) -> None:
    """The same slide and evidence on a phone."""
    page.set_viewport_size({"width": 390, "height": 780})
    page.goto("about:blank")  # else only the address's end would change
    page.goto(f"{url}#slide={slide}")
    _drawn(page)
    page.keyboard.press("3")
    _drawn(page)
    page.screenshot(path=PICTURES / "viewer-phone.jpg", quality=85)


def evidence(heatmaps: Path, slides: tuple[str, ...] = ("focus-017", "focus-051", "focus-061")) -> None:
    """The evidence maps of three slides, side by side."""
    beside = list[np.ndarray]()
    for slide in slides:
        picture = cv2.imread(str(heatmaps / f"{slide}-evidence.png"))
        assert picture is not None, slide
        width = round(picture.shape[1] * 560 / picture.shape[0])
        beside.append(cv2.resize(picture, (width, 560), interpolation=cv2.INTER_AREA))
    cv2.imwrite(str(PICTURES / "demo-evidence.jpg"), cv2.hconcat(beside), [cv2.IMWRITE_JPEG_QUALITY, 85])


def _drawn(page: Page) -> None:
    page.wait_for_timeout(600)
    page.wait_for_selector('canvas[data-ready="yes"]')


def surest(run: Path) -> str:
    """The test slide with the highest probability of the last class."""
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    chance = [name for name in rows[0] if name.startswith("p_")][-1]
    return max(rows, key=lambda row: float(row[chance]))["slide_id"]


@contextmanager
def serving(run: Path) -> Iterator[str]:
    """The address of a viewer of the run."""
    command = [Path(sys.executable).with_name("holoslide"), "serve", str(run), "--port", "8766"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as viewer:
        assert viewer.stdout is not None
        try:
            yield next(word for line in viewer.stdout for word in line.split() if word.startswith("http"))
        finally:
            viewer.terminate()


def main() -> None:
    """Take them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    run = parser.parse_args().run
    with sync_playwright() as playwright, serving(run) as url:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(reduced_motion="reduce")
        report(page, run / "report.html")
        viewer(page, url, surest(run))
        phone(page, url, surest(run))
        evidence(run / "heatmaps")
        browser.close()


if __name__ == "__main__":
    main()
