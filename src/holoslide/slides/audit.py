"""What is wrong with a cohort, before a day is spent on it: from the table alone, then by opening each slide."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from holoslide.slides.cohort import SPLITS, Cohort, SlideRow, Split
from holoslide.slides.compare import compare
from holoslide.slides.facts import shown
from holoslide.slides.findings import Finding, Kind, Severity, similar, some
from holoslide.slides.rows import row_without_file, row_without_label
from holoslide.slides.source import file_key
from holoslide.slides.survey import Survey, SurveyJob, survey
from holoslide.slides.tissue import TissueConfig

__all__ = ["Finding", "Kind", "Severity", "Survey", "audit", "audit_slides"]

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def audit(cohort: Cohort) -> list[Finding]:
    """What the table and the names of files tell; no slide is opened. Errors come first, each kind together.

    Read the table with `require_splits` off, so that every patient in two splits is found, not the first alone.
    """
    findings = [
        *cohort.notes,
        *_files(cohort),
        *_same_files(cohort),
        *_labels(cohort),
        *_similar_classes(cohort),
        *_patients(cohort),
        *_splits(cohort),
        *_class_sizes(cohort),
    ]
    return sorted(findings, key=lambda finding: finding.severity == "warning")  # stable


def audit_slides(
    cohort: Cohort,
    *,
    tissue: TissueConfig | None = None,
    workers: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[list[Finding], list[Survey]]:
    """What opening each slide tells, alone and beside the others; and what is known of each.

    Rows without a file are `audit`'s. Errors come first, then in the order of the table.
    """
    jobs = [
        SurveyJob(row.slide_id, row.path, row.mpp, row.mask, row.row, row.fallback_mpp)
        for row in cohort
        if row.path is not None
    ]
    surveys = survey(jobs, tissue or TissueConfig(), workers=workers, progress=progress)
    findings = [finding for each in surveys for finding in each.findings]
    findings += compare(cohort, surveys)
    return sorted(findings, key=lambda finding: finding.severity == "warning"), surveys


def _files(cohort: Cohort) -> list[Finding]:
    if all(row.path is None and row.fault is None for row in cohort):
        what, remedy = "no folder of slides was given", "give one, or a path column in the table"
        return [Finding("error", "missing file", cohort.name, what, remedy)]
    return [each for each in map(row_without_file, cohort) if each is not None]


def _same_files(cohort: Cohort) -> list[Finding]:
    """Errors: a file under two ids is a slide that can be trained on and tested on."""
    findings = []
    paths = {row.slide_id: row.path for row in cohort if row.path is not None}
    for rows in _groups((file_key(paths[row.slide_id]), row) for row in cohort if row.slide_id in paths):
        if len(rows) > 1:
            ids = [row.slide_id for row in rows]
            what = f"slides {some(ids)} are one file, {shown(paths[ids[0]])}"
            findings.append(
                Finding(
                    "error",
                    "same file twice",
                    ids[0],
                    what,
                    "keep one of them",
                    rows[-1].row,
                    also=tuple(ids),
                )
            )
    return findings


def _labels(cohort: Cohort) -> list[Finding]:
    if cohort.rows and all(row.label is None for row in cohort):
        what, remedy = "no slide has a label", "name the label's column, or use the table to predict"
        return [Finding("warning", "no label", cohort.name, what, remedy)]
    return [each for each in map(row_without_label, cohort) if each is not None]


def _similar_classes(cohort: Cohort) -> list[Finding]:
    """Warnings: LUAD and luad, 1 and 1.0 are hardly two classes."""
    remedy = "write them the same, if they are one"
    return [
        Finding("warning", "similar classes", names[0], f"classes {some(names)} are all but one text", remedy)
        for names in similar(cohort.classes)
    ]


def _patients(cohort: Cohort) -> list[Finding]:
    findings = []
    for rows in _groups((row.patient_id, row) for row in cohort):
        patient = rows[0].patient_id
        splits = [split for split in SPLITS if any(row.split == split for row in rows)]
        labels = sorted({row.label for row in rows if row.label is not None})
        last = rows[-1].row
        if len(splits) > 1:
            what = f"is a patient in {' and '.join(splits)} (slides {some([row.slide_id for row in rows])})"
            remedy = "put all slides of a patient into one split"
            slides = tuple(row.slide_id for row in rows)
            findings.append(
                Finding("error", "patient in two splits", patient, what, remedy, last, also=slides)
            )
        if len(labels) > 1:
            what = f"is a patient with slides of {' and '.join(labels)}"
            remedy = "mend the labels, unless each is its slide's own"
            findings.append(Finding("warning", "conflicting labels", patient, what, remedy, last))
    return findings


def _splits(cohort: Cohort) -> list[Finding]:
    """Warnings for slides in no part, where others are in one."""
    if all(row.split is None for row in cohort):
        return []
    what, remedy = "is in no split, while other slides are", "fill it in, or let it be drawn"
    return [
        Finding.of_slide("warning", "no split", row.slide_id, what, remedy, row.row)
        for row in cohort
        if row.split is None and row.label is not None
    ]


def _class_sizes(cohort: Cohort) -> list[Finding]:
    """Whether every class has patients enough for every part, counting slides that can be used."""
    if not cohort.classes:
        return []
    if len(cohort.classes) == 1:
        what, remedy = f"has one class, {cohort.classes[0]}", "training needs slides of at least two"
        return [Finding("error", "few classes", cohort.name, what, remedy)]
    usable = [row for row in cohort if row.label is not None and row.fault is None]
    parts = {row.split for row in usable if row.split is not None}
    rows_of: dict[str | None, list[SlideRow]] = defaultdict(list)
    for row in usable:
        rows_of[row.label].append(row)
    return [each for name in cohort.classes for each in _too_small(name, rows_of[name], parts)]


def _too_small(name: str, rows: list[SlideRow], parts: set[Split]) -> list[Finding]:
    patients = len({row.patient_id for row in rows})
    remedy = "add patients, or leave the class out"
    if not parts and patients < len(SPLITS):
        what = f"is a class of {patients} patient{'s' * (patients != 1)}, too few for train, valid and test"
        return [Finding("error", "small class", name, what, remedy)]
    return [
        Finding(
            "error" if part == "train" else "warning",
            "small class",
            name,
            f"is a class without a slide in {part}",
            remedy,
        )
        for part in SPLITS
        if part in parts and not any(row.split == part for row in rows)
    ]


def _groups(pairs: Iterable[tuple[Key, Value]]) -> list[list[Value]]:
    """The values of each key, in the order of the keys' first."""
    groups: dict[Key, list[Value]] = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return list(groups.values())
