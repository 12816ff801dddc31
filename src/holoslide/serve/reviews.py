"""What reviewers write: a CSV in the run's folder to which rows are only ever added.

`time,reviewer,slide_id,label,note`: of each reviewer the last row on a slide is what holds, the earlier ones are
its history. An empty label means that the table's label was not corrected. All is quoted: a note may hold any sign.

Spreadsheets take a cell that begins with = + - or @ for a formula, so names and notes that do are written with an
apostrophe before it, which is taken away when they are read.
"""

from __future__ import annotations

import csv
import io
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from holoslide.errors import SlideError
from holoslide.files import lock, write_text

FILE = "reviews.csv"
FREE = ("reviewer", "note")  # what reviewers type
_FORMULA = re.compile(r"'*[=+\-@\t\r＝＋－＠]")  # and what would be one but for its apostrophes


@dataclass(frozen=True, slots=True)
class Review:
    """One entry: when (UTC), by whom, on which slide."""

    time: str
    reviewer: str
    slide_id: str
    label: str
    note: str


COLUMNS = [field.name for field in fields(Review)]


class Reviews:
    """The reviews of a run; safe between threads, and between several viewers of one run."""

    def __init__(self, run: Path) -> None:
        self._path = run / FILE
        self._lock = threading.Lock()
        self._read()  # a file that is none is told at once, not when a reviewer has written

    def all(self) -> dict[str, list[Review]]:
        """Every slide's entries, oldest first."""
        found: dict[str, list[Review]] = defaultdict(list)
        for review in self._read():
            found[review.slide_id].append(review)
        return dict(found)

    def of(self, slide_id: str) -> list[Review]:
        """One slide's entries, oldest first."""
        return [review for review in self._read() if review.slide_id == slide_id]

    def add(self, slide_id: str, *, reviewer: str, label: str, note: str) -> Review:
        """Add an entry; it is on the disk when this returns, and what was there before is there still."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        review = Review(time, reviewer, slide_id, label, note)
        with self._lock, _alone(self._path):
            text = io.StringIO()
            writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(_cells(each) for each in [*self._read(), review])
            write_text(text.getvalue(), self._path)
        return review

    def _read(self) -> list[Review]:
        if not self._path.exists():
            return []
        remedy = "move it away: it holds what reviewers wrote, and is never written over"
        try:
            with self._path.open(newline="", encoding="utf-8-sig") as file:  # Excel begins it with a mark
                rows = csv.reader(file)
                if next(rows, None) != COLUMNS:
                    raise SlideError(self._path, f"has not the columns {','.join(COLUMNS)}", remedy)
                return [self._review(cells, rows.line_num) for cells in rows if cells]
        except (UnicodeDecodeError, csv.Error) as error:
            raise SlideError(self._path, f"cannot be read ({error})", remedy) from error

    def _review(self, cells: list[str], line: int) -> Review:
        if len(cells) != len(COLUMNS):
            what = f"has {len(cells)} cells in line {line}, not {len(COLUMNS)}"
            raise SlideError(self._path, what, "put that line right: nothing in it is thrown away")
        return Review(
            *(_read_free(cell) if name in FREE else cell for name, cell in zip(COLUMNS, cells, strict=True))
        )


def latest(written: list[Review]) -> list[Review]:
    """What holds: each reviewer's last entry on a slide, the oldest first."""
    last = {review.reviewer: number for number, review in enumerate(written)}
    return [written[number] for number in sorted(last.values())]


def _cells(review: Review) -> dict[str, str]:
    """A row of the file."""
    return {name: _write_free(cell) if name in FREE else cell for name, cell in asdict(review).items()}


def _write_free(text: str) -> str:
    return f"'{text}" if _FORMULA.match(text) else text


def _read_free(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes from writing the same file."""
    with path.with_name(f".{path.name}.lock").open("w") as file:
        lock(file, wait=True)
        yield
