"""Slide tables as people and tools write them: any separator, any of the known column names, all values as text.

| tool | columns |
| --- | --- |
| holoslide | `slide_id,patient_id,label[,split][,mpp][,path][,mask][,site]` |
| the paper's code | `slide_id,label,type`: file names with extension, type is the split |
| CLAM | `case_id,slide_id,label` |
| STAMP | a slide table `PATIENT,FILENAME`, and a clini table `PATIENT` + label column |
| Slideflow | `patient,slide[,dataset]` + label column; `dataset` (train, eval) is the split |
| TRIDENT | `wsi[,mpp]` |
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from holoslide.errors import CohortError
from holoslide.slides.facts import shown
from holoslide.slides.findings import Finding, some

Role = Literal["slide", "patient", "label", "split", "mpp", "path", "mask", "site"]
Split = Literal["train", "valid", "test"]

SPLITS: tuple[Split, ...] = ("train", "valid", "test")
# The names of each column; `type` (the paper's split) and `dataset` count only where their values are splits.
NAMES: dict[Role, tuple[str, ...]] = {
    "slide": ("slide_id", "slide", "filename", "wsi"),
    "patient": ("patient_id", "case_id", "patient"),
    "label": ("label",),
    "split": ("split", "type", "dataset"),
    "mpp": ("mpp",),
    "path": ("path",),
    "mask": ("mask", "mask_path"),
    "site": ("site", "center", "centre", "hospital", "institution"),
}
KNOWN = {name for names in NAMES.values() for name in names}
SPLIT_WORDS: dict[str, Split] = {
    "train": "train", "training": "train", "val": "valid", "valid": "valid", "validation": "valid",
    "test": "test", "testing": "test", "eval": "test",
}  # fmt: skip
UNKNOWN = {"", "na", "n/a", "#n/a", "nan", "<na>", "null"}  # how tools write that a value is not known

EXTENSIONS = (
    "bif", "btf", "czi", "dcm", "jpeg", "jpg", "mrxs", "ndpi", "png", "qptiff", "scn", "svs", "svslide", "tf2",
    "tf8", "tif", "tiff", "vms", "vmu", "vsi", "zarr",
)  # fmt: skip
_EXTENSION = re.compile(rf"(?<=.)(\.ome)?\.({'|'.join(EXTENSIONS)})$", re.IGNORECASE)
# STAMP's slide table may name the features' files.
_FEATURES = re.compile(r"(?<=.)(\.ome)?\.h5$", re.IGNORECASE)
_END = "holoslide: end of table"  # fed to the parser last: an open quotation mark swallows it


@dataclass(frozen=True, slots=True)
class Record:
    """One row that holds something; `number` counts as a spreadsheet does: the header is 1, blank rows count."""

    number: int
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A table as text, stripped; every record has as many values as the header."""

    path: Path
    header: tuple[str, ...]
    records: tuple[Record, ...]
    decimal_comma: bool

    def where(self, number: int) -> str:
        """A row, for messages."""
        return f"{shown(self.path)}, row {number}"

    def value(self, record: Record, column: int | None) -> str:
        """What a row says in a column, "" where it is not known."""
        text = "" if column is None else record.values[column]
        if text.casefold() in UNKNOWN:
            return ""
        if not text.isprintable():
            what = f"{text!a} holds a character that cannot be seen"
            raise CohortError(self.where(record.number), what, "type the value anew")
        return text

    def split(self, record: Record, column: int | None) -> Split | None:
        """The split a row names, by any of its names."""
        text = self.value(record, column)
        if text and text.casefold() not in SPLIT_WORDS:
            raise CohortError(
                self.where(record.number), f"there is no split {text!r}", "write train, valid or test"
            )
        return SPLIT_WORDS[text.casefold()] if text else None

    def mpp(self, record: Record, column: int | None) -> float | None:
        """Micrometres per pixel, exactly as written."""
        text = self.value(record, column)
        if not text:
            return None
        try:
            mpp = float(text.replace(",", ".") if self.decimal_comma else text)
        except ValueError:
            mpp = math.nan
        if not (math.isfinite(mpp) and mpp > 0):
            what = f"{text!r} cannot be microns per pixel"
            raise CohortError(self.where(record.number), what, "give a positive number, such as 0.25")
        return mpp


def read_table(path: Path) -> Table:
    """A CSV file, comma, semicolon or tab separated. CohortError, with the row, for what cannot be told apart."""
    lines = list(io.StringIO(_text(path), newline=""))
    skipped = 0
    stated = re.fullmatch(r"sep=([,;\t])\s*", lines[0], re.IGNORECASE) if lines else None
    if stated:  # Excel's own line
        lines, skipped = lines[1:], 1
    separator = stated[1] if stated else _separator(lines)
    rows = [(number, row) for number, row in _parse(path, lines, separator, skipped) if any(row)]
    if not rows:
        raise CohortError(shown(path), "is empty", "give a table with a header and a row for each slide")
    header = tuple(rows[0][1])
    records = tuple(Record(number, _fit(path, number, row, len(header))) for number, row in rows[1:])
    return Table(path, header, records, separator != ",")


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CohortError(shown(path), f"cannot be read ({error.strerror})", "check the path") from error
    if data.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise CohortError(shown(path), "is a spreadsheet file, not text", "save it as CSV (UTF-8)")
    is_wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b"\n") + 1
        raise CohortError(f"{shown(path)}, row {row}", "is not UTF-8", "save it as CSV (UTF-8)") from error
    if "\0" in text:
        raise CohortError(shown(path), "is not text", "give a CSV file")
    return text if text.endswith(("\n", "\r")) else text + "\n"


def _separator(lines: list[str]) -> str:
    """The one that finds most known names in the header, then most columns."""
    header = next((line for line in lines if line.strip()), "")

    def found(separator: str) -> tuple[int, int]:
        names = next(csv.reader([header[:100_000]], delimiter=separator, skipinitialspace=True), [])
        return sum(_key(name) in KNOWN for name in names), len(names)

    return max(",;\t", key=found)


def _parse(path: Path, lines: list[str], separator: str, skipped: int) -> list[tuple[int, list[str]]]:
    parser = csv.reader([*lines, _END], delimiter=separator, skipinitialspace=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        for number, row in enumerate(parser, start=skipped + 1):
            rows.append((number, [value.strip() for value in row]))
    except csv.Error as error:
        where = f"{shown(path)}, row {skipped + len(rows) + 1}"
        raise CohortError(where, f"is not CSV ({error})", "mend the row") from error
    number, last = rows.pop()
    if last != [_END]:
        where = f"{shown(path)}, row {number}"
        raise CohortError(where, "opens a quotation mark that is never closed", "close it, or take it out")
    return rows


def _fit(path: Path, number: int, row: list[str], columns: int) -> tuple[str, ...]:
    if len(row) < columns or any(row[columns:]):
        what = f"has {len(row)} values, the header has {columns}"
        remedy = "quote a value that holds the separator; leave an unknown value empty between separators"
        raise CohortError(f"{shown(path)}, row {number}", what, remedy)
    return tuple(row[:columns])


def _key(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().casefold())


def find_columns(table: Table, *, label: str | None = None) -> dict[Role, int]:
    """Which column plays which role; `label` names the label's, where it is not called `label`.

    A table with `patient` and without `slide_id` is STAMP's or Slideflow's, whose label column has any name: it
    is the one column that is not otherwise known. CohortError, with the columns' names, where two could be meant.
    """
    keys = [_key(name) for name in table.header]
    columns: dict[Role, int] = {}
    if label is not None:
        columns["label"] = _named(table, label)
    for role, names in NAMES.items():
        fitting = [i for i, key in enumerate(keys) if key in names and i not in columns.values()]
        if role == "split":
            fitting = [i for i in fitting if keys[i] == "split" or _holds_splits(table, i)]
        if role == "label" and label is not None:
            continue
        if len(fitting) > 1:
            both = some([table.header[i] for i in fitting])
            remedy = "rename or remove all but one"
            raise CohortError(shown(table.path), f"columns {both} all give the {role}", remedy)
        if fitting:
            columns[role] = fitting[0]
    if "label" not in columns and "patient" in keys and not {"slide_id", "filename", "wsi"} & set(keys):
        columns |= _only_other(table, keys, set(columns.values()))
    return columns


def _named(table: Table, name: str) -> int:
    exact = [i for i, column in enumerate(table.header) if column == name]
    fitting = exact or [i for i, column in enumerate(table.header) if _key(column) == _key(name)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        both = some([table.header[i] for i in fitting])
        raise CohortError(shown(table.path), f"columns {both} are all called {name}", "rename all but one")
    close = difflib.get_close_matches(name, table.header, n=1)
    remedy = f"did you mean {close[0]}?" if close else f"it has {some(list(table.header), 12)}"
    raise CohortError(shown(table.path), f"has no column {name}", remedy)


def _holds_splits(table: Table, column: int) -> bool:
    return any(record.values[column].casefold() in SPLIT_WORDS for record in table.records)


def _only_other(table: Table, keys: list[str], taken: set[int]) -> dict[Role, int]:
    others = [
        i
        for i, key in enumerate(keys)
        if i not in taken and (key not in KNOWN or key in ("type", "dataset")) and not _is_index(key)
    ]
    if len(others) > 1:
        which = some([table.header[i] for i in others], 12)
        what = f"any of the columns {which} could be the label"
        raise CohortError(shown(table.path), what, "name it as the label")
    return {"label": others[0]} if others else {}


def _is_index(key: str) -> bool:
    """Whether pandas wrote the column, for its row numbers."""
    return not key or key.startswith("unnamed:")


def unread_columns(table: Table, columns: dict[Role, int]) -> list[Finding]:
    """A warning for each column that is not used and whose name is nearly a known one."""
    findings = []
    for i, name in enumerate(table.header):
        close = difflib.get_close_matches(_key(name), sorted(KNOWN - {_key(name)}), n=1, cutoff=0.8)
        if i not in columns.values() and _key(name) not in KNOWN and close:
            what = f"column {name} is not used"
            findings.append(
                Finding("warning", "unread column", shown(table.path), what, f"did you mean {close[0]}?")
            )
    return findings


def slide_name(text: str, *, features: bool = False) -> str:
    """The slide's id from its file's name or path; an id stays as it is. `features`: the file may be an H5.

    >>> slide_name("a/TCGA-05.0A1B.svs"), slide_name("TCGA-05.0A1B"), slide_name("007.ome.tif")
    ('TCGA-05.0A1B', 'TCGA-05.0A1B', '007')
    """
    name = text.replace("\\", "/").rsplit("/", 1)[-1]
    stem = _EXTENSION.sub("", name)
    stem = _FEATURES.sub("", stem) if features else stem
    return text if stem == name else stem


def file_id(path: str) -> str:
    """A file's name as an id, whatever characters are in it.

    >>> file_id("a/7.svs"), file_id("a\\nb.svs"), file_id(".x.tif")
    ('7', 'a_b', '_x')
    """
    name = slide_name(Path(path).name)
    text = "".join(c if c.isprintable() and c not in "/\\" else "_" for c in name).strip()
    if text.startswith("."):
        text = "_" + text[1:]
    return "_" + text if text.casefold() in UNKNOWN else text


def file_name(text: str) -> str | None:
    """The name or path of a slide's file, if it is one: an id has no such extension."""
    return text.replace("\\", "/") if _EXTENSION.search(text) else None


def is_picture(name: str) -> bool:
    """Whether the file may be a thumbnail that lies beside its slide."""
    return name.lower().endswith((".png", ".jpg", ".jpeg"))


# --- Tables of other shapes ---------------------------------------------------------------------------------------


def clini_labels(table: Table, *, label: str | None = None) -> dict[str, str]:
    """The label of each patient in STAMP's clini table, without those whose label is not known."""
    columns = find_columns(table, label=label)
    roles: tuple[Role, ...] = ("patient", "label")
    for role in roles:
        if role not in columns:
            what = f"has no column of {role}s, only {some(list(table.header), 12)}"
            raise CohortError(shown(table.path), what, f"name the {role} column")
    labels: dict[str, tuple[str, int]] = {}
    for record in table.records:
        patient, text = table.value(record, columns["patient"]), table.value(record, columns["label"])
        if not patient:
            raise CohortError(table.where(record.number), "has no patient", "fill it in, or take the row out")
        if not text:
            continue
        before, row = labels.setdefault(patient, (text, record.number))
        if before != text:
            what = f"patient {patient} has label {text}, and {before} in row {row}"
            raise CohortError(table.where(record.number), what, "keep one of them")
    return {patient: text for patient, (text, _) in labels.items()}
