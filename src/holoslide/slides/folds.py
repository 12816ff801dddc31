"""Splits as other tools write them, laid on a cohort.

| tool | file |
| --- | --- |
| CLAM | `splits_{i}.csv` (ids below train, val, test), `splits_{i}_bool.csv` (ids, then True or False below each) |
| TRIDENT's Patho-Bench | a table with `case_id`, `slide_id` and `fold_0`, `fold_1` ... of train, val and test |
| STAMP | `splits.json`: `{"splits": [{"train_patients": [...], "test_patients": [...]}]}` |
| Slideflow | `splits.json`: a list of plans, each with `strategy`, and below `tfrecords` the slides of `training` and `validation` (`fixed`) or of each `k-fold-{k}`, which is the one to validate on |

`fold` counts the folds of a file from 0; Slideflow's through all plans and their k.
"""  # noqa: E501

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from holoslide.errors import CohortError
from holoslide.slides.cohort import Cohort
from holoslide.slides.facts import one_line, shown
from holoslide.slides.findings import Finding, some
from holoslide.slides.splits import SplitConfig, draw_split
from holoslide.slides.tables import SPLIT_WORDS, SPLITS, Split, Table, find_columns, read_table, slide_name

_FOLD = re.compile(r"fold_(\d+)")
_RECORDS = re.compile(r"(?<=.)\.tfrecords?$")


@dataclass(frozen=True, slots=True)
class _Fold:
    """The part of each id; the ids are patients' where `by_patient`."""

    parts: dict[str, Split]
    by_patient: bool = False


def with_split_file(
    cohort: Cohort, path: str | Path, *, fold: int = 0, config: SplitConfig | None = None
) -> Cohort:
    """The parts that a file of another tool names, in place of those there were.

    Slides that the file does not name are in no part; where it names no test part, those that were in it stay.
    Where it names no valid part, one is drawn from the patients of its train part, with the shares of `config`.
    CohortError if it puts a slide or a patient into two parts, or names a part of which the cohort has no slide.
    """
    path = Path(path)
    found = _json_fold(path, fold) if path.suffix.lower() == ".json" else _table_fold(path, fold)
    own = {row.slide_id: row.patient_id if found.by_patient else row.slide_id for row in cohort}
    _refuse_strangers(cohort, found, set(own.values()), path)
    is_tested = "test" in found.parts.values()
    rows = [
        replace(row, split=found.parts.get(own[row.slide_id]) or (None if is_tested else _kept(row.split)))
        for row in cohort
    ]
    result = replace(cohort, rows=tuple(rows), notes=(*cohort.notes, *_strangers(cohort, found, own, path)))
    result.refuse_split_patients()
    return result if "valid" in found.parts.values() else _with_valid(result, path, config or SplitConfig())


def _kept(split: Split | None) -> Split | None:
    return split if split == "test" else None


def _refuse_strangers(cohort: Cohort, found: _Fold, ids: set[str], path: Path) -> None:
    for split in SPLITS:
        named = [each for each, part in found.parts.items() if part == split]
        if named and not ids & set(named):
            kind = "patients" if found.by_patient else "slides"
            what = f"none of its {len(named)} {split} {kind} ({some(named, 2)}) is in {cohort.name}"
            raise CohortError(shown(path), what, "write ids as text, the same in both")


def _strangers(cohort: Cohort, found: _Fold, own: dict[str, str], path: Path) -> list[Finding]:
    strange = sorted(set(found.parts) - set(own.values()))
    if not strange:
        return []
    kind = "patients" if found.by_patient else "slides"
    what = f"{len(strange)} of its {kind} are not in {cohort.name} ({some(strange)})"
    remedy = "add them to the slide table, if they should count"
    return [Finding("warning", "split without a slide", shown(path), what, remedy)]


def _with_valid(cohort: Cohort, path: Path, config: SplitConfig) -> Cohort:
    """Some patients of the train part moved to a valid part."""
    labels: dict[str, set[str]] = {}
    for row in cohort:
        if row.split == "train" and row.label is not None:
            labels.setdefault(row.patient_id, set()).add(row.label)
    shares: dict[Split, Fraction] = {p: share for p, share in config.shares().items() if p != "test"}
    frozen = {patient: frozenset(each) for patient, each in labels.items()}
    drawn = draw_split(frozen, shares, seed=config.seed, where=shown(path))
    rows = [
        replace(row, split=drawn.get(row.patient_id, row.split)) if row.split == "train" else row
        for row in cohort
    ]
    count = sum(part == "valid" for part in drawn.values())
    what = f"names no valid part; {count} of the {len(drawn)} patients of its train part were drawn for it"
    note = Finding("warning", "split drawn", shown(path), what, "name the valid part to decide it")
    return replace(cohort, rows=tuple(rows), notes=(*cohort.notes, note))


# --- Tables -------------------------------------------------------------------------------------------------------


def _table_fold(path: Path, fold: int) -> _Fold:
    table = read_table(path)
    columns = {int(found[1]): i for i, name in enumerate(table.header) if (found := _FOLD.fullmatch(name))}
    if not columns:
        return _Fold(_clam_parts(table))
    if fold not in columns:
        raise _no_fold(path, fold, len(columns))
    ids = find_columns(replace(table, header=tuple(_FOLD.sub("", name) for name in table.header)), label=None)
    if "slide" not in ids:
        raise CohortError(shown(path), "has folds, and no column of slides", "name one slide_id")
    pairs = []
    for record in table.records:
        split = table.split(record, columns[fold])
        if split is not None:
            pairs.append((slide_name(table.value(record, ids["slide"])), split, table.where(record.number)))
    return _Fold(_parts(pairs))


def _no_fold(path: Path, fold: int, count: int) -> CohortError:
    return CohortError(shown(path), f"has no fold {fold}", f"count from 0: it has {count}")


def _parts(pairs: Iterable[tuple[str, Split, str]], kind: str = "slide") -> dict[str, Split]:
    """The part of each id, from (id, part, where it says so)."""
    parts: dict[str, Split] = {}
    for each, split, where in pairs:
        if parts.setdefault(each, split) != split:
            raise CohortError(where, f"{kind} {each} is in {parts[each]} and in {split}", "keep one of them")
    return parts


def _clam_parts(table: Table) -> dict[str, Split]:
    """The part of each slide: ids below train, val, test; or ids first, then True or False below each."""
    columns = _part_columns(table)
    values = {table.value(record, i).casefold() for record in table.records for i in columns}
    is_bool = bool(values - {""}) and values <= {"true", "false", ""}
    if is_bool and 0 in columns:
        raise CohortError(
            shown(table.path), "has no ids before its True and False", "add them as first column"
        )
    pairs = []
    for record in table.records:
        for i, split in columns.items():
            text = table.value(record, i)
            if text and (not is_bool or text.casefold() == "true"):
                slide = slide_name(table.value(record, 0) if is_bool else text)
                pairs.append((slide, split, table.where(record.number)))
    return _parts(pairs)


def _part_columns(table: Table) -> dict[int, Split]:
    words = [SPLIT_WORDS.get(name.casefold()) for name in table.header]
    for split in SPLITS:
        if words.count(split) != 1:
            what = f"has {words.count(split)} columns of {split} slides, among {some(list(table.header), 12)}"
            raise CohortError(shown(table.path), what, "give CLAM's train, val and test")
    return {i: word for i, word in enumerate(words) if word is not None}


# --- JSON ---------------------------------------------------------------------------------------------------------


def _json_fold(path: Path, fold: int) -> _Fold:
    try:
        found = json.loads(path.read_bytes())
        folds = list(_stamp(found, path) if isinstance(found, dict) else _slideflow(found, path))
    except OSError as error:
        raise CohortError(shown(path), f"cannot be read ({error.strerror})", "check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"is neither STAMP's nor Slideflow's file of splits ({one_line(error)})"
        raise CohortError(shown(path), what, "give the splits.json that one of them wrote") from error
    if not 0 <= fold < len(folds):
        raise _no_fold(path, fold, len(folds))
    return folds[fold]


def _stamp(found: dict[str, Any], path: Path) -> Iterator[_Fold]:
    for each in found["splits"]:
        parts: dict[Split, Any] = {"train": each["train_patients"], "test": each["test_patients"]}
        pairs = [(_text(name), part, shown(path)) for part, names in parts.items() for name in names]
        yield _Fold(_parts(pairs, "patient"), by_patient=True)


def _slideflow(found: list[dict[str, Any]], path: Path) -> Iterator[_Fold]:
    for plan in found:
        slides = {part: [_record(name) for name in names] for part, names in plan["tfrecords"].items()}
        if plan["strategy"] == "fixed":
            yield _plan(slides["training"], slides["validation"], path)
            continue
        for name in sorted(slides, key=lambda part: int(part.rpartition("-")[2])):
            others = [slide for other, some in slides.items() if other != name for slide in some]
            yield _plan(others, slides[name], path)


def _plan(train: list[str], valid: list[str], path: Path) -> _Fold:
    parts: dict[Split, list[str]] = {"train": train, "valid": valid}
    return _Fold(_parts((slide, part, shown(path)) for part, names in parts.items() for slide in names))


def _record(name: Any) -> str:
    """A slide's id from its name, or from the path of its records."""
    return slide_name(_RECORDS.sub("", _text(name).replace("\\", "/").rsplit("/", 1)[-1]))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        message = f"{value!r} is no id in quotation marks"
        raise TypeError(message)
    return value
