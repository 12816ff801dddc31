"""What slides tell side by side: copies, other resolutions, little tissue, labels that go with the scanner."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

from holoslide.slides.cohort import Cohort, SlideRow
from holoslide.slides.findings import Finding, some
from holoslide.slides.source import file_key
from holoslide.slides.survey import SAME_MPP, Survey

RARE = 0.05  # a resolution of no more than this share of the slides is out of line
FEW = 8  # below so many slides, or patients, nothing is said of what is usual
OFF_POWER = 1.6  # how far 10 / objective power may be from the mpp
ALIKE = 1.5  # grey levels, root mean square, between the sketches of one picture saved twice
PLAIN = 2.0  # grey levels, deviation of a sketch that shows too little to be compared
LITTLE_MM2 = 0.1
LITTLE_SHARE = 0.02  # of the median of the cohort
STRONG = 0.5  # Cramer's V from which an attribute tells a label
SURE = 0.005  # probability, by permutation, up to which that is no accident
PERMUTATIONS = 2000


def compare(cohort: Cohort, surveys: Sequence[Survey]) -> list[Finding]:
    """Findings about slides that were opened, as a cohort."""
    rows = {row.slide_id: row for row in cohort}
    return [
        *_copies(surveys, rows),
        *_odd_mpp(surveys, rows),
        *_little_tissue(surveys, rows),
        *_confounded(surveys, rows),
    ]


# --- Copies -------------------------------------------------------------------------------------------------------


def _copies(surveys: Sequence[Survey], rows: dict[str, SlideRow]) -> Iterator[Finding]:
    """Errors for the same pixels under two names, warnings for the same picture with other pixels."""
    groups: dict[str, list[Survey]] = defaultdict(list)
    for each in surveys:
        if each.print_ is not None and each.print_.exact:
            groups[each.print_.exact].append(each)
    for group in groups.values():
        files = {file_key(each.path) for each in group}
        if len(group) > 1 and len(files) > 1:  # one file under two ids is said already
            ids = [each.slide_id for each in group]
            what = f"slides {some(ids)} are the same pixels in {len(files)} files"
            what += _labels_and_parts([rows[slide_id] for slide_id in ids])
            yield Finding(
                "error",
                "same pixels twice",
                ids[0],
                what,
                "keep one of them",
                rows[ids[-1]].row,
                also=tuple(ids),
            )
    for first, second in _lookalikes([group[0] for group in groups.values()]):
        ids = [first.slide_id, second.slide_id]
        what = f"slides {some(ids)} look the same, though their pixels are not" + _labels_and_parts(
            [rows[i] for i in ids]
        )
        remedy = "keep one, if they are one scan saved twice"
        yield Finding("warning", "looks the same", ids[0], what, remedy, rows[ids[1]].row, also=tuple(ids))


def _labels_and_parts(rows: list[SlideRow]) -> str:
    labels = sorted({row.label for row in rows if row.label is not None})
    parts = sorted({row.split for row in rows if row.split is not None})
    said = [f"labels {' and '.join(labels)}"] * (len(labels) > 1) + [f"in {' and '.join(parts)}"] * (
        len(parts) > 1
    )
    return f" ({', '.join(said)})" if said else ""


def _lookalikes(surveys: list[Survey]) -> Iterator[tuple[Survey, Survey]]:
    shown = [each for each in surveys if each.print_ is not None and each.print_.sketch.std() > PLAIN]
    if len(shown) < 2:
        return
    sketches = np.stack([each.print_.sketch.ravel() for each in shown if each.print_]).astype(np.float32)
    sizes = (sketches**2).sum(axis=1)
    for start in range(0, len(shown), 512):  # in blocks, so that 10,000 slides need no square of them
        block = sketches[start : start + 512]
        apart = sizes[start : start + 512, None] + sizes[None] - 2 * block @ sketches.T
        near = np.argwhere(apart < sketches.shape[1] * ALIKE**2)
        yield from ((shown[start + i], shown[j]) for i, j in near.tolist() if start + i < j)


# --- Resolution and area ------------------------------------------------------------------------------------------


def _odd_mpp(surveys: Sequence[Survey], rows: dict[str, SlideRow]) -> Iterator[Finding]:
    known = sorted(((math.sqrt(s.mpp.y * s.mpp.x), s) for s in surveys if s.mpp), key=lambda pair: pair[0])
    groups: list[list[tuple[float, Survey]]] = []
    for pair in known:
        if groups and pair[0] <= groups[-1][-1][0] * SAME_MPP:
            groups[-1].append(pair)
        else:
            groups.append([pair])
    usual = max(groups, key=len, default=[])
    for group in groups:
        is_rare = len(known) >= FEW and len(group) <= max(1, RARE * len(known)) and group is not usual
        for mpp, each in group:
            reason = None
            if is_rare:
                reason = f"{len(usual)} of {len(known)} slides have {usual[len(usual) // 2][0]:.4g}"
            elif each.mpp and max(each.mpp.y / each.mpp.x, each.mpp.x / each.mpp.y) > SAME_MPP:
                reason = f"its pixels are {each.mpp.y:.4g} um high and {each.mpp.x:.4g} wide"
            elif each.objective_power and not 1 / OFF_POWER < mpp * each.objective_power / 10 < OFF_POWER:
                reason = (
                    f"its objective of {each.objective_power:g}x gives about {10 / each.objective_power:.4g}"
                )
            if reason and each.mpp:
                what = f"has {mpp:.4g} um per pixel (from: {each.mpp.source}), while {reason}"
                remedy = "make sure of it, and give it in the table's mpp column"
                yield Finding.of_slide(
                    "warning", "mpp out of line", each.slide_id, what, remedy, rows[each.slide_id].row
                )


def _little_tissue(surveys: Sequence[Survey], rows: dict[str, SlideRow]) -> Iterator[Finding]:
    areas = [each.areas.tissue_mm2 for each in surveys if each.areas and each.areas.tissue_mm2]
    usual = median(areas) if len(areas) >= FEW else 0.0
    least = max(LITTLE_MM2, LITTLE_SHARE * usual)
    for each in surveys:
        if each.areas and 0 < each.areas.tissue_mm2 < least:
            what = f"has {each.areas.tissue_mm2:.2g} mm2 of tissue"
            what += f", where {usual:.2g} is usual" if usual else ""
            remedy = "look at it: is it all that there is?"
            yield Finding.of_slide(
                "warning", "little tissue", each.slide_id, what, remedy, rows[each.slide_id].row
            )


# --- Labels that can be told without the tissue -------------------------------------------------------------------


def _confounded(surveys: Sequence[Survey], rows: dict[str, SlideRow]) -> Iterator[Finding]:
    """Warnings where a label goes with how a slide was made; each patient counts once."""
    values: dict[str, dict[str, str]] = {
        "scanner": {s.slide_id: s.vendor for s in surveys if s.vendor},
        "mpp": {s.slide_id: f"{math.sqrt(s.mpp.y * s.mpp.x):.2g} um" for s in surveys if s.mpp},
        "magnification": {s.slide_id: f"{s.objective_power:g}x" for s in surveys if s.objective_power},
        "site": {slide_id: site for slide_id, row in rows.items() if (site := site_of(row))},
    }
    for name, of_slide in values.items():
        first: dict[str, tuple[str, str]] = {}
        for slide_id, value in of_slide.items():
            row = rows[slide_id]
            if row.label is not None:
                first.setdefault(row.patient_id, (row.label, value))
        pairs = list(first.values())
        labels, kinds = (sorted({pair[i] for pair in pairs}) for i in (0, 1))
        if len(pairs) < FEW or len(labels) < 2 or len(kinds) < 2:
            continue
        codes = np.array([(labels.index(label), kinds.index(kind)) for label, kind in pairs])
        strength, chance = association(codes[:, 0], codes[:, 1])
        if strength >= STRONG and chance <= SURE:
            said = [_mostly(label, [kind for other, kind in pairs if other == label]) for label in labels]
            what = f"goes with the {name}: {some(said)} (Cramer's V {strength:.2f})"
            remedy = (
                f"a network may learn the {name}: balance the classes over it, or test on a {name} of its own"
            )
            yield Finding("warning", "label confounded", "label", what, remedy)


def site_of(row: SlideRow) -> str | None:
    """Where a slide was made: the table's site, else a TCGA barcode's own.

    >>> site_of(SlideRow("TCGA-CR-7395-01A-01-TS1", "TCGA-CR-7395"))
    'CR'
    """
    if row.site is not None:
        return row.site
    barcode = re.match(r"TCGA-([A-Z0-9]{2})-", row.slide_id)
    return barcode[1] if barcode else None


def _mostly(label: str, kinds: list[str]) -> str:
    kind, count = Counter(kinds).most_common(1)[0]
    return f"{label} {kind} {count} of {len(kinds)}"


def association(a: NDArray[np.int64], b: NDArray[np.int64]) -> tuple[float, float]:
    """Cramer's V of two codings (n,), and how probable so strong a one is by chance, from seeded permutations."""
    rng = np.random.default_rng(0)
    strength = _cramer(a, b)
    as_strong = sum(_cramer(a, rng.permutation(b)) >= strength - 1e-9 for _ in range(PERMUTATIONS))
    return strength, (1 + as_strong) / (1 + PERMUTATIONS)


def _cramer(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    rows, columns = int(a.max()) + 1, int(b.max()) + 1
    table = np.bincount(a * columns + b, minlength=rows * columns).reshape(rows, columns).astype(np.float64)
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    chi2 = float(((table - expected) ** 2 / expected).sum())
    return math.sqrt(chi2 / (table.sum() * (min(rows, columns) - 1)))
