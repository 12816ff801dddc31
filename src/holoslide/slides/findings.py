"""What an audit finds, and why a slide is left out: one kind of line for both."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning"]
Kind = Literal[
    "ambiguous file",
    "conflicting labels",
    "few classes",
    "file without a row",
    "label confounded",
    "label without a slide",
    "little tissue",
    "looks the same",
    "missing companion",
    "missing file",
    "mpp out of line",
    "no label",
    "no mask",
    "no mpp",
    "no patient",
    "no split",
    "no tissue",
    "out of focus",
    "patient in two splits",
    "same file twice",
    "same pixels twice",
    "similar classes",
    "similar patients",
    "small class",
    "split drawn",
    "split without a slide",
    "turned",
    "unread column",
    "unreadable",
    "unusable mask",
]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a cohort that a person should know: where, what, and what to do about it.

    An error makes a slide or the cohort unusable; a warning does not. `where` is a slide's id, a patient's, a
    class or the table; `row` is the table's row, the header being row 1 and blank rows counted; `slide_id` is set
    where it is about one slide alone, `also` names all slides where it is about several.
    """

    severity: Severity
    kind: Kind
    where: str
    what: str
    remedy: str
    row: int | None = None
    slide_id: str | None = None
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.remedy}"

    @classmethod
    def of_slide(
        cls, severity: Severity, kind: Kind, slide_id: str, what: str, remedy: str, row: int | None = None
    ) -> Finding:
        """About one slide."""
        return cls(severity, kind, slide_id, what, remedy, row, slide_id)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


def some(names: list[str], most: int = 5) -> str:
    """A few of many names, for a message.

    >>> some(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def similar(names: Iterable[str]) -> list[list[str]]:
    """Names that differ by no more than case, spaces, how a number is written, or how an accent is.

    >>> similar(["P 1", "p1", "7", "07", "7b"])
    [['P 1', 'p1'], ['7', '07']]
    """
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        groups[_loosely(name)].append(name)
    return [group for group in groups.values() if len(group) > 1]


def _loosely(name: str) -> Hashable:
    try:
        return float(name)
    except ValueError:
        return "".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())


def similar_patients(patients: Iterable[str], table: str) -> list[Finding]:
    """A warning where ids that may be one patient's are several: it would be trained on, and tested on."""
    pairs = [" and ".join(group) for group in similar(patients)]
    if not pairs:
        return []
    what = f"patients {some(pairs)} are all but one text, and are taken for different ones"
    remedy = "write the id of a patient the same everywhere"
    return [Finding("warning", "similar patients", table, what, remedy)]
