"""One viewer for all tests that only look, and a table of slides for those that need one of their own."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest

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
