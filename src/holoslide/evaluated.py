"""What an evaluation is of, and where it goes.

A run's own folder is for what its test part came to, and nothing else: another part, and another cohort, go to a
folder of their own, `<run>/<part>` unless told otherwise. Such a folder also says what it is of, as a run's does:
`cohort.csv` (the scored part), `left_out.csv`, `data.csv` and `run.json`, so that `serve` can show it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from holoslide.errors import CohortError, ConfigError
from holoslide.files import lock, write_json, write_rows
from holoslide.prepared import Prepared
from holoslide.records import data_rows, run_facts, write_left_out
from holoslide.runs import DATA, FACTS, LEFT_OUT, read_json
from holoslide.slides.cohort import SlideRow

LOCK = ".evaluate.lock"  # in the folder; it stays there, and counts while a process holds it


def place_of(run: Path, split: str, out: Path | None, *, table: str | None) -> Path:
    """The folder for what a part comes to; `table` names another cohort than the run's own.

    ConfigError where another cohort has no folder, or where the folder holds a run or a table of its own.
    """
    if out is None and table is not None:
        remedy = f"give a folder for what {table} comes to: {run} holds the run's own"
        raise ConfigError("--out", "is missing", remedy)
    place = out or (run if split == "test" else run / split)
    if place.resolve() == run.resolve() and split == "test" and table is None:
        return run
    if (place / "cohort.csv").exists() and "evaluates" not in read_json(place / FACTS):
        what = f"{place} holds a run, or a table of its own, which this would replace"
        raise ConfigError("--out", what, "give another folder")
    return place


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The part of a cohort that a run is measured on, and the folder for what comes of it.

    `rows` are the part's labelled slides; `table` names a cohort that is not the run's own, and is None of its own.
    """

    run: Path
    out: Path
    prepared: Prepared
    rows: tuple[SlideRow, ...]
    split: str
    table: str | None

    @classmethod
    def of(
        cls, run: Path, prepared: Prepared, *, split: str, out: Path | None, table: str | None
    ) -> Evaluated:
        """ConfigError as in `place_of`; CohortError where the part has no labelled slide."""
        rows = tuple(row for row in prepared.cohort if row.label is not None and split in (row.split, "all"))
        if not rows:
            where = prepared.cohort.name
            raise CohortError(
                where, f"has no labelled slide in {split} that can be used", "choose another split, or all"
            )
        return cls(run, place_of(run, split, out, table=table), prepared, rows, split, table)

    @property
    def part(self) -> Prepared:
        """The part by itself, without the slides that were left out by now."""
        gone = {slide_id for slide_id, _ in self.prepared.left_out}
        rows = tuple(row for row in self.rows if row.slide_id not in gone)
        return dataclasses.replace(self.prepared, cohort=dataclasses.replace(self.prepared.cohort, rows=rows))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other commands from the folder meanwhile, which is made: its files belong together.

        ConfigError where there is one.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / LOCK).open("wb") as file:
            if not lock(file):
                remedy = "wait until it is done, or give another folder (--out)"
                raise ConfigError(self.out, "is being evaluated into by another command", remedy)
            yield

    def facts(self) -> dict[str, object]:
        """What was measured, for `metrics.json` and `run.json`."""
        return {"split": self.split, "table": self.table}

    def write_records(self) -> None:
        """Say what a folder of its own is of; in the run's folder training has said it."""
        if self.out == self.run:
            return
        part = self.part
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(
            {**run_facts(part), "evaluates": str(self.run.resolve()), **self.facts()}, self.out / FACTS
        )
        part.cohort.to_csv(self.out / "cohort.csv")
        write_left_out(part.left_out, self.out / LEFT_OUT)
        write_rows(data_rows(part), self.out / DATA)
