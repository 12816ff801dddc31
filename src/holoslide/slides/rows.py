"""One slide of a study: what it is, from a row of a table or from a file, and what is wrong with the row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from holoslide.errors import CohortError
from holoslide.slides.facts import shown
from holoslide.slides.findings import Finding, some
from holoslide.slides.locate import SlideFiles
from holoslide.slides.tables import (
    UNKNOWN,
    Record,
    Role,
    Split,
    Table,
    clini_labels,
    file_id,
    file_name,
    read_table,
    slide_name,
)


@dataclass(frozen=True, slots=True)
class SlideRow:
    """One slide. None: not known, or not in any part; `fault` says why a file that was looked for is not there.

    `mpp` is the table's (um per pixel of level 0), `fallback_mpp` counts where neither the table nor the file says.
    `path` is absolute, `row` is the table's row. `mask` is the user's own tissue mask, `site` where the slide was
    made; few tables have them. Raises `CohortError` for what no table could hold.
    """

    slide_id: str
    patient_id: str
    label: str | None = None
    split: Split | None = None
    mpp: float | None = None
    path: Path | None = None
    mask: Path | None = None
    site: str | None = None
    row: int | None = field(default=None, compare=False)
    fault: Finding | None = field(default=None, compare=False)
    fallback_mpp: float | None = None

    def __post_init__(self) -> None:
        """Raise `CohortError` for texts that a table could not hold, and ids that cannot name a file."""
        for text in (self.slide_id, self.patient_id, self.label):
            if text is not None and (text != text.strip() or text.casefold() in UNKNOWN):
                what = f"{text!r} is no value in a slide table"
                raise CohortError(
                    ascii(self.slide_id), what, "give text, or None for a label that is not known"
                )
            if text is not None and not text.isprintable():
                what = f"{text!a} holds a character that cannot be seen"
                raise CohortError(ascii(self.slide_id), what, "type the value anew")
        if set("/\\") & set(self.slide_id) or self.slide_id.startswith("."):
            raise CohortError(self.slide_id, "cannot be a file's name", "give the slide another id")


def row_without_file(row: SlideRow) -> Finding | None:
    """Why a slide has no file, or None if it has one."""
    if row.path is not None:
        return None
    what, remedy = "no folder of slides was given", "give one, or a path column in the table"
    return row.fault or Finding.of_slide("error", "missing file", row.slide_id, what, remedy, row.row)


def row_without_label(row: SlideRow) -> Finding | None:
    """That a slide has no label, or None if it has one."""
    if row.label is not None:
        return None
    return Finding.of_slide(
        "warning", "no label", row.slide_id, "has no label", "add it, or use the slide to predict", row.row
    )


def row_of_file(files: SlideFiles, path: str, *, label: str | None = None) -> SlideRow:
    """A file taken as a slide of a patient of its own; its `fault` where it is not there."""
    slide_id = file_id(path)
    found = files.find(slide_id, name=None, path=path)
    there, fault = (found, None) if isinstance(found, Path) else (None, found)
    return SlideRow(slide_id, slide_id, label, path=there, fault=fault)


def row_of_record(table: Table, record: Record, columns: Mapping[Role, int], files: SlideFiles) -> SlideRow:
    """A row of a table; CohortError, which says where, for values that cannot be."""
    value = partial(table.value, record)
    column = columns["slide"]
    text = value(column)
    if not text:
        raise CohortError(table.where(record.number), "has no slide id", "fill it in, or take the row out")
    slide_id = slide_name(text, features=table.header[column].casefold() == "filename")
    path = value(columns.get("path")) or None
    found = files.find(slide_id, name=file_name(text), path=path, row=record.number)
    patient, label = value(columns.get("patient")) or slide_id, value(columns.get("label")) or None
    split, mpp = table.split(record, columns.get("split")), table.mpp(record, columns.get("mpp"))
    try:
        return SlideRow(
            slide_id,
            patient,
            label,
            split,
            mpp,
            found if isinstance(found, Path) else None,
            files.beside(value(columns.get("mask"))),
            value(columns.get("site")) or None,
            record.number,
            found if isinstance(found, Finding) else None,
        )
    except CohortError as error:
        raise CohortError(f"{table.where(record.number)}, {error.where}", error.what, error.remedy) from None


def without_slides(table: Table, columns: Mapping[Role, int]) -> CohortError:
    """The error that a table is which has no column of slides."""
    if "patient" in columns:
        what = "has patients, and no column of slides"
        remedy = "give a slide table (PATIENT,FILENAME), and this one as its clini table"
        return CohortError(shown(table.path), what, remedy)
    what = f"has no column of slide ids, only {some(list(table.header), 12)}"
    return CohortError(shown(table.path), what, "name one slide_id")


def own_patients(table: Table, columns: Mapping[Role, int], rows: list[SlideRow]) -> list[Finding]:
    """A warning where patients are not known: their slides might come to lie in two splits."""
    column = columns.get("patient")
    number = {record.number for record in table.records if not table.value(record, column)}
    alone = [row.slide_id for row in rows if row.row in number]
    if not alone:
        return []
    count = "1 slide has" if len(alone) == 1 else f"{len(alone)} slides have"
    what = f"{count} no patient ({some(alone)}): each is taken for a patient of its own"
    remedy = "add patient_id, unless no patient has two slides"
    return [Finding("warning", "no patient", shown(table.path), what, remedy)]


def with_clini(
    table: Table, columns: Mapping[Role, int], rows: list[SlideRow], path: Path, label: str | None
) -> tuple[list[SlideRow], list[Finding]]:
    """The rows with the labels of STAMP's clini table, and its patients that have no slide."""
    if "patient" not in columns:
        what = "has no column of patients, by which its slides could find their label"
        raise CohortError(shown(table.path), what, "add PATIENT")
    if "label" in columns:
        what = "has labels, and the clini table too"
        raise CohortError(shown(table.path), what, "take the label column out, or give no clini table")
    labels = clini_labels(read_table(path), label=label)
    rows = [replace(row, label=labels.get(row.patient_id)) for row in rows]
    strange = sorted(set(labels) - {row.patient_id for row in rows})
    if not strange:
        return rows, []
    what = f"{len(strange)} of its patients have no slide in {shown(table.path)} ({some(strange)})"
    remedy = "add their slides, if they should count"
    return rows, [Finding("warning", "label without a slide", shown(path), what, remedy)]
