"""The report of a run as one HTML file: plain data in, a page that opens offline and prints well out.

The page holds no script and fetches nothing: figures and pictures are part of it, and its own content policy
forbids the rest. Whatever comes from the user (names of slides, classes, paths) is escaped.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from holoslide.evaluation import _report_judged as judged
from holoslide.evaluation import _report_view as view
from holoslide.evaluation.report_data import (
    CohortPart,
    EpochRecord,
    Group,
    PredictionRow,
    RunReport,
    SlidePicture,
    choose_slides,
)
from holoslide.files import write_atomically

FOLD_ROWS = 40  # longer tables are folded


def write_report(report: RunReport, path: Path) -> None:
    """Write the page, UTF-8, whole or not at all: `path` is the old file or the new one."""
    data = render(report).encode("utf-8", errors="replace")  # file names may hold bytes that are no text
    write_atomically(path, lambda file: file.write(data))


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": view.number,
        "duration": view.duration,
        "bytes": view.bytes_,
        "share": view.share,
    }
    text = files("holoslide.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text)


def render(report: RunReport) -> str:
    """The page as text."""
    return _template().render(
        report=report,
        summary=view.summary(report),
        flow=view.flow(report),
        scored_slides=view.scored_slides(report),
        composition=judged.composition(report),
        folds=judged.folds(report),
        flattery=view.flattery(report),
        slides_left_out=view.slides_left_out(report),
        classes=view.classes(report),
        totals=view.totals(report),
        learning=view.learning(report),
        scores=view.scores(report),
        curves=view.curves(report),
        depth=view.depth(report),
        taught=judged.taught(report),
        repeated=judged.repeated(report),
        calibrated=judged.calibrated(report),
        decided=judged.decided(report),
        called=judged.called(report),
        likelier=view.likelier(report),
        used=judged.used(report),
        files=judged.files(report),
        digest=judged.digest(report),
        pictures=view.pictures(report),
        groups=view.GROUPS,
        fold_rows=FOLD_ROWS,
    )


__all__ = [
    "CohortPart",
    "EpochRecord",
    "Group",
    "PredictionRow",
    "RunReport",
    "SlidePicture",
    "choose_slides",
    "render",
    "write_report",
]
