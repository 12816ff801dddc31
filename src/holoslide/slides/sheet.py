"""The contact sheet of a cohort: one HTML file with a card for each slide, the most suspicious first.

Like a run's report it holds no script and fetches nothing, opens offline and prints; all that comes from users and
files is escaped. What makes a slide suspicious is said on its card, in the order of its weight.
"""

from __future__ import annotations

import base64
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import median

from jinja2 import Environment, StrictUndefined

from holoslide.errors import SlideError
from holoslide.files import write_atomically
from holoslide.slides.cohort import Cohort, SlideRow
from holoslide.slides.facts import shown
from holoslide.slides.findings import Finding
from holoslide.slides.survey import Picture, Survey

ERROR, WARNING = 100.0, 30.0  # what a finding adds to a slide's suspicion
NO_LABEL = 5.0  # not to be told by looking
FEW = 8  # below so many slides nothing is said of what is usual
NOTED = 3.0  # robust deviations from the median, from which a slide is unlike the others
FOLD_ROWS = 12  # a longer list of findings is folded


@dataclass(frozen=True, slots=True)
class Card:
    """A slide on the sheet; `suspicion` orders, `reasons` say why, (severity or "note", text)."""

    slide_id: str
    row: SlideRow
    survey: Survey | None
    suspicion: float
    reasons: tuple[tuple[str, str], ...]

    @property
    def level(self) -> str:
        """How loud the card is: error, warning, note or quiet."""
        kinds = [kind for kind, _ in self.reasons]
        return next((kind for kind in ("error", "warning", "note") if kind in kinds), "quiet")


def cards(cohort: Cohort, findings: Sequence[Finding], surveys: Sequence[Survey]) -> list[Card]:
    """A card for every slide of the cohort, sorted by suspicion, then as in the table."""
    of_slide: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        for slide_id in finding.also or (finding.slide_id or finding.where,):
            of_slide[slide_id].append(finding)
    known = {each.slide_id: each for each in surveys}
    unlike = _unlike(surveys)
    found = []
    for row in cohort:
        each = known.get(row.slide_id)
        weighed: list[tuple[float, str, str]] = [
            (_weight(f), f.severity, f"{f.kind}: {f.what}; {f.remedy}") for f in of_slide[row.slide_id]
        ]
        notes = [*unlike.get(row.slide_id, []), *_left_out(each)]
        weighed += [(weight, "note", text) for weight, text in notes]
        weighed.sort(key=lambda item: -item[0])
        reasons = tuple((kind, text) for _, kind, text in weighed)
        found.append(Card(row.slide_id, row, each, sum(weight for weight, _, _ in weighed), reasons))
    return sorted(found, key=lambda card: -card.suspicion)  # stable


def _weight(finding: Finding) -> float:
    if finding.kind == "no label":
        return NO_LABEL
    return ERROR if finding.severity == "error" else WARNING


def _left_out(each: Survey | None) -> list[tuple[float, str]]:
    """Notes of pen and blur, by how much of the slide they are."""
    if each is None or each.areas is None:
        return []
    areas = each.areas
    notes = []
    if areas.pen_mm2:
        notes.append((4 + min(10.0, areas.pen_mm2), f"{areas.pen_mm2:.2g} mm² of pen left out"))
    whole = areas.blurred_mm2 + areas.tissue_mm2
    if areas.tissue_mm2 and areas.blurred_mm2 > 0.02 * whole:
        notes.append(
            (
                20 * areas.blurred_mm2 / whole,
                f"{areas.blurred_mm2 / whole:.0%} of the tissue out of focus, left out",
            )
        )
    return notes


def _unlike(surveys: Sequence[Survey]) -> dict[str, list[tuple[float, str]]]:
    """What makes slides unlike the others: area, colour and brightness of the tissue, in robust deviations."""
    seen = [each for each in surveys if each.areas is not None and each.tissue_rgb is not None]
    notes: dict[str, list[tuple[float, str]]] = defaultdict(list)
    if len(seen) < FEW:
        return notes
    measures: list[tuple[str, str, list[float]]] = [
        ("little tissue", "much tissue", [math.log(s.areas.tissue_mm2) for s in seen if s.areas]),
        ("dark tissue", "pale tissue", [sum(s.tissue_rgb) for s in seen if s.tissue_rgb]),
        ("blue tissue", "red tissue", [s.tissue_rgb[0] - s.tissue_rgb[2] for s in seen if s.tissue_rgb]),
    ]
    for low, high, values in measures:
        middle = median(values)
        spread = 1.4826 * median(abs(value - middle) for value in values)
        for each, value in zip(seen, values, strict=True):
            deviation = (value - middle) / spread if spread else 0.0
            if abs(deviation) > NOTED:
                said = f"{low if deviation < 0 else high} for this cohort"
                notes[each.slide_id].append((min(abs(deviation), 10.0), said))
    return notes


def write_sheet(
    path: Path, cohort: Cohort, findings: Sequence[Finding], surveys: Sequence[Survey], *, command: str = ""
) -> None:
    """Write the page, UTF-8, whole or not at all; SlideError where it cannot be written."""
    data = render(cohort, findings, surveys, command=command).encode("utf-8", errors="replace")
    try:
        write_atomically(path, lambda file: file.write(data))
    except OSError as error:
        what = f"cannot be written ({error.strerror or error})"
        raise SlideError(shown(path), what, "give another place for the contact sheet") from error


def render(
    cohort: Cohort, findings: Sequence[Finding], surveys: Sequence[Survey], *, command: str = ""
) -> str:
    """The page as text."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"uri": _uri, "area": _area, "cut": _cut}
    template = files("holoslide.slides").joinpath("sheet.html.j2").read_text(encoding="utf-8")
    found = cards(cohort, findings, surveys)
    ids = {row.slide_id for row in cohort}
    areas = [each.areas.tissue_mm2 for each in surveys if each.areas]
    return environment.from_string(template).render(
        name=Path(cohort.name).name,
        cards=found,
        general=[f for f in findings if not ids & {f.slide_id or f.where, *f.also}],
        counts={
            level: sum(card.level == level for card in found)
            for level in ("error", "warning", "note", "quiet")
        },
        total_mm2=sum(areas),
        median_mm2=median(areas) if areas else 0.0,
        fold_rows=FOLD_ROWS,
        command=command,
    )


def _uri(picture: Picture) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(picture.jpeg).decode("ascii")


def _area(mm2: float) -> str:
    """An area with two or three figures."""
    return f"{mm2:.0f}" if mm2 >= 100 else f"{mm2:.3g}" if mm2 >= 1 else f"{mm2:.2g}"


def _cut(text: str, most: int = 240) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
