"""Train, valid and test drawn by patient, stratified by label: the same on any machine and in any order of rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction

from holoslide.errors import CohortError, ConfigError
from holoslide.slides.tables import SPLITS, Split

_TRIES = 64  # draws before patients of several classes are said not to fit


@dataclass(frozen=True, slots=True)
class SplitConfig:
    """The shares of the patients, which sum to 1. A part with share 0 is not drawn."""

    train: float = 0.7
    """Share of the patients to learn from."""
    valid: float = 0.15
    """Share of the patients that the best epoch is chosen on."""
    test: float = 0.15
    """Share of the patients that is looked at once, at the end."""
    seed: int = 0
    """Of the draw; another seed gives other parts."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for shares that are none."""
        for each in fields(self):
            value = getattr(self, each.name)
            if not (0 <= value < math.inf):  # also refuses nan
                raise ConfigError(f"split.{each.name}", f"is {value}", "give 0 or more")
        if self.train == 0:
            raise ConfigError("split.train", "is 0", "give more than 0: training needs slides")
        total = self.train + self.valid + self.test
        if abs(total - 1) > 1e-6:
            what = f"train, valid and test sum to {total:g}"
            raise ConfigError("split", what, "give shares that sum to 1, such as 0.7, 0.15 and 0.15")

    def shares(self) -> dict[Split, Fraction]:
        """The parts to draw, and the share of each, exactly as written."""
        written = {part: Fraction(repr(float(getattr(self, part)))) for part in SPLITS}
        return {part: share for part, share in written.items() if share}


def how_split(given: Iterable[Split | None], used: Iterable[Split | None], *, seed: int) -> str:
    """Which parts a table gave, and which were drawn, from the parts of its slides before and after.

    >>> how_split([None, None], ["train", "valid"], seed=3)
    'drawn by patient, with seed 3'
    >>> how_split([None, None, "test"], ["train", "valid", "test"], seed=3)
    'given by the table (test) and drawn by patient, with seed 3 (train, valid)'
    """
    named, parts = set(given), set(used)
    by_table, drawn = [p for p in SPLITS if p in named], [p for p in SPLITS if p in parts - named]
    how = {"given by the table": by_table, f"drawn by patient, with seed {seed}": drawn}
    if by_table and drawn:
        return " and ".join(f"{words} ({', '.join(which)})" for words, which in how.items())
    return next((words for words, which in how.items() if which), "")


def draw_split(
    labels: Mapping[str, frozenset[str]], shares: Mapping[Split, Fraction], *, seed: int, where: str
) -> dict[str, Split]:
    """A part for each patient, from the labels of each patient's slides.

    Every class comes as near to its shares as whole patients allow, with at least one patient in every part.
    CohortError where that cannot be. The order of the draw is that of a hash of seed and patient, so adding a
    patient moves few others.
    """
    _refuse_small(labels, len(shares), where)
    total = sum(shares.values())
    shares = {part: share / total for part, share in shares.items()}
    for attempt in range(_TRIES):  # one does, unless patients have several classes
        order = sorted(labels, key=lambda patient: _rank(seed, attempt, patient))
        drawn = _assign(order, labels, shares)
        lacking = _lacking(drawn, labels, shares)
        if lacking is None:
            return drawn
        name, part = lacking
    what = f"class {name} is left without a patient in {part}: patients have slides of several classes"
    raise CohortError(where, what, "give the table a split column")


def _refuse_small(labels: Mapping[str, frozenset[str]], parts: int, where: str) -> None:
    for name, count in sorted(_counts(labels).items()):
        if count < parts:
            what = f"class {name} has {count} patient{'s' * (count != 1)}, too few for {parts} parts"
            remedy = "add patients, leave the class out, or give the table a split column"
            raise CohortError(where, what, remedy)


def _counts(labels: Mapping[str, frozenset[str]]) -> dict[str, int]:
    """Patients of each class."""
    classes = frozenset[str]().union(*labels.values())
    return {name: sum(name in each for each in labels.values()) for name in classes}


def _rank(seed: int, attempt: int, patient: str) -> bytes:
    return hashlib.sha256(f"{seed}/{attempt}/{patient}".encode()).digest()


def _assign(
    order: list[str], labels: Mapping[str, frozenset[str]], shares: Mapping[Split, Fraction]
) -> dict[str, Split]:
    """Rarest class first, each patient to the part that lacks most of the class (Sechidis et al. 2011)."""
    counts = _counts(labels)
    rarest = sorted(counts, key=lambda name: (counts[name], name))
    owed = dict.fromkeys(shares, Fraction(0))
    needs: dict[str, dict[Split, int]] = {}
    for name in rarest:
        needs[name] = _quotas(counts[name], shares, owed)
        for part, share in shares.items():
            owed[part] += counts[name] * share - needs[name][part]
    drawn: dict[str, Split] = {}
    for name in rarest:
        for patient in order:
            if name not in labels[patient] or patient in drawn:
                continue
            need = needs[name]
            part = max(shares, key=lambda p: (need[p], sum(needs[c][p] for c in labels[patient])))
            drawn[patient] = part
            for each in labels[patient]:
                needs[each][part] -= 1
    return drawn


def _quotas(count: int, shares: Mapping[Split, Fraction], owed: Mapping[Split, Fraction]) -> dict[Split, int]:
    """`count` patients by largest remainder, at least one a part; `owed` decides between equals."""
    exact = {part: count * share for part, share in shares.items()}
    quotas = {part: max(1, math.floor(value)) for part, value in exact.items()}
    while sum(quotas.values()) < count:
        part = max(quotas, key=lambda p: (exact[p] - quotas[p], owed[p]))
        quotas[part] += 1
    while sum(quotas.values()) > count:
        part = max((p for p in quotas if quotas[p] > 1), key=lambda p: quotas[p] - exact[p])
        quotas[part] -= 1
    return quotas


def _lacking(
    drawn: Mapping[str, Split], labels: Mapping[str, frozenset[str]], shares: Mapping[Split, Fraction]
) -> tuple[str, Split] | None:
    present = {(name, part) for patient, part in drawn.items() for name in labels[patient]}
    wanted = ((name, part) for name in sorted(_counts(labels)) for part in shares)
    return next((pair for pair in wanted if pair not in present), None)
