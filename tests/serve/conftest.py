"""One viewer for all tests that only look, and a table of slides for those that need one of their own."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.serve.looking import WIDE
from tests.serve.served import Served, serving


@pytest.fixture(scope="session")
def viewer(finished_run: Path) -> Iterator[Served]:
    """A viewer of the finished run; nothing is written to it."""
    with serving(finished_run) as served:
        yield served


@pytest.fixture
def nasty_run(run_copy: Path) -> Path:
    """A run whose first slide's id and label are markup, and whose last slide's file is gone."""
    path = run_copy / "cohort.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rows[0]["slide_id"] = "<img src=x onerror=window.hacked=1>"
    rows[-1]["path"] = str(run_copy / "gone.tiff")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return run_copy


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page of 1440 x 900 that must meet no error of its own."""
    context = browser.new_context(viewport=WIDE, reduced_motion="reduce")
    context.set_default_timeout(60_000)
    expect.set_options(timeout=60_000)  # the same, on a machine that does much else
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
