"""The slides of a study: whose they are, what their label is, which part they are in, where their files lie.

Ids and labels are text, as written. A row that cannot be used stays, with the reason, until `usable()` leaves it
out and says so: no slide vanishes silently. Tables of other tools: see `tables.py`.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from holoslide.errors import CohortError, SlideError
from holoslide.files import write_text
from holoslide.slides.facts import shown
from holoslide.slides.findings import Finding, similar_patients, some
from holoslide.slides.locate import SlideFiles
from holoslide.slides.outlines import find_outline
from holoslide.slides.rows import (
    SlideRow,
    own_patients,
    row_of_file,
    row_of_record,
    row_without_file,
    row_without_label,
    with_clini,
    without_slides,
)
from holoslide.slides.splits import SplitConfig, draw_split, how_split
from holoslide.slides.tables import (
    SPLITS,
    Split,
    find_columns,
    read_table,
    unread_columns,
)

__all__ = ["SPLITS", "Cohort", "Finding", "SlideRow", "Split", "SplitConfig"]

COLUMNS = ("slide_id", "patient_id", "label", "split", "mpp", "path")


@dataclass(frozen=True)
class Cohort:
    """Slides, no two with one id. `classes` are in the order of a network's outputs; `name` is the table's.

    `notes` are what was found on the way here. CohortError if two rows have one id, or a label is no class.
    """

    rows: tuple[SlideRow, ...]
    classes: tuple[str, ...]
    name: str = field(default="cohort", compare=False)
    notes: tuple[Finding, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        known = set(self.classes)
        for row in self.rows:
            if row.label is not None and row.label not in known:
                remedy = f"classes: {', '.join(self.classes) or 'none'}"
                raise CohortError(self.where(row), f"label {row.label} is none of the classes", remedy)
        self._refuse_doubles()

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[SlideRow]:
        return iter(self.rows)

    @classmethod
    def from_rows(
        cls, rows: Iterable[SlideRow], *, name: str = "cohort", notes: Iterable[Finding] = ()
    ) -> Cohort:
        """A cohort whose classes are the labels that occur, in order: of number if all are whole, else of text."""
        rows = tuple(rows)
        return cls(rows, _in_order({row.label for row in rows if row.label is not None}), name, tuple(notes))

    @classmethod
    def from_csv(
        cls,
        path: str | Path,
        *,
        slides: str | Path | None = None,
        label: str | None = None,
        clini: str | Path | None = None,
        require_files: bool = False,
        require_splits: bool = True,
    ) -> Cohort:
        """Read a slide table in any of the dialects of `tables.py`.

        `slides` is the folder of the slide files, searched with all below it; a `path` column goes before it.
        `label` names the label's column, where it is not called so. `clini` is STAMP's table of patients and
        labels, `path` then being its slide table. CohortError, with table and row, for what contradicts itself;
        for a patient in two splits unless `require_splits` is off, for which see `audit`; and, where
        `require_files` is on, for the first slide without a file.
        """
        path = Path(path)
        table = read_table(path)
        columns = find_columns(table, label=label if clini is None else None)
        if "slide" not in columns:
            raise without_slides(table, columns)
        notes = unread_columns(table, columns)
        files = SlideFiles(path.parent, None if slides is None else Path(slides))
        rows = [row_of_record(table, record, columns, files) for record in table.records]
        if not rows:
            raise CohortError(shown(path), "holds no slide", "give a row for each slide")
        notes += own_patients(table, columns, rows)
        notes += similar_patients((row.patient_id for row in rows), shown(path))
        used = {row.path for row in rows if row.path is not None}
        notes += files.without_row(used, {row.slide_id for row in rows}, shown(path))
        if clini is not None:
            rows, found = with_clini(table, columns, rows, Path(clini), label)
            notes += found
        cohort = cls.from_rows(rows, name=shown(path), notes=notes)
        if require_splits:
            cohort.refuse_split_patients()
        if require_files:
            cohort.refuse_missing_files()
        return cohort

    @classmethod
    def from_files(cls, paths: Iterable[str | Path], *, mpp: float | None = None) -> Cohort:
        """Slide files as a cohort without labels, each a patient of its own; `mpp` as in `with_mpp`.

        A file that is not there stays, with its reason, as from a table. CohortError for two with one id.
        """
        files = SlideFiles(Path(), None)
        rows = [row_of_file(files, path) for path in map(str, paths)]
        cohort = cls.from_rows(rows, name="slide files")
        return cohort if mpp is None else cohort.with_mpp(mpp)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Cohort:
        """Slides sorted into a folder for each class, `folder/tumour/a.svs`, each a patient of its own.

        CohortError for a slide that lies in no class's folder, for two with one id, and where there is none.
        """
        folder = Path(folder)
        files, rows, name = SlideFiles(Path(), folder), [], shown(folder)
        paths, notes = files.every()
        for path in paths:
            label, *below = path.relative_to(folder).parts
            if not below:
                raise CohortError(shown(path), "is in no folder of a class", "put it into one, or elsewhere")
            rows.append(row_of_file(files, str(path), label=label))
        if not rows:
            raise CohortError(name, "holds no slide", "sort the slides into a folder for each class")
        what = "each file is taken for a patient of its own"
        notes.append(Finding("warning", "no patient", name, what, "mend patient_id if a patient has several"))
        return cls.from_rows(rows, name=name, notes=notes)

    def to_csv(self, path: str | Path) -> None:
        """Write it as a table of ours, which `from_csv` reads back the same: all classes that have a slide.

        Paths below the table's folder are written relative to it, so that both can be moved together.
        """
        path = Path(path)
        folder = path.parent.absolute()
        more = [name for name in ("mask", "site") if any(getattr(row, name) is not None for row in self.rows)]
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*COLUMNS, *more])
        for row in self.rows:
            mpp = "" if row.mpp is None else repr(row.mpp)
            extra = {"mask": _written(row.mask, folder), "site": row.site}
            values = [row.slide_id, row.patient_id, row.label, row.split, mpp, _written(row.path, folder)]
            writer.writerow([*values, *(extra[name] for name in more)])
        write_text(text.getvalue(), path)

    # --- Parts --------------------------------------------------------------------------------------------------

    @property
    def train(self) -> Cohort:
        """The slides to train on."""
        return self.part("train")

    @property
    def valid(self) -> Cohort:
        """The slides to choose the best epoch on."""
        return self.part("valid")

    @property
    def test(self) -> Cohort:
        """The slides to touch once, at the end."""
        return self.part("test")

    def part(self, split: Split) -> Cohort:
        """The slides of one part, with all classes; CohortError if a patient is in two."""
        self.refuse_split_patients()
        return replace(self, rows=tuple(row for row in self.rows if row.split == split), notes=())

    def with_splits(self, config: SplitConfig) -> Cohort:
        """Draw a part for the labelled slides that have none; what the table says stays as it is.

        Drawn are the parts that the table names for no slide: all three where it names none, train and valid
        where it names a test set. Where a patient has a part, the patient's other slides are put there too.
        Slides without a label are in no part. CohortError if there is none left to draw, or a class is too small.
        """
        self.refuse_split_patients()
        given = {row.patient_id: row.split for row in self.rows if row.split is not None}
        rows = [
            row if row.label is None else replace(row, split=given.get(row.patient_id)) for row in self.rows
        ]
        labels = _labels_by_patient(row for row in rows if row.split is None)
        if not labels and not given:
            raise CohortError(
                self.name, "holds no slide with a label", "a split is drawn by the labels: add them"
            )
        if not labels:
            return replace(self, rows=tuple(rows))
        named = set(given.values())
        shares = {part: share for part, share in config.shares().items() if part not in named}
        if not shares:
            missing = [row for row in rows if row.split is None and row.label is not None]
            what = f"{len(missing)} slides have no split ({some([row.slide_id for row in missing])}), others have"
            raise CohortError(self.where(missing[0]), what, "fill the column in, take them out, or empty it")
        drawn = draw_split(labels, shares, seed=config.seed, where=self.name)
        rows = [
            row if row.split or row.label is None else replace(row, split=drawn[row.patient_id])
            for row in rows
        ]
        notes = [*self.notes, *self._what_was_drawn(drawn, sorted(named))]
        return replace(self, rows=tuple(rows), notes=tuple(notes))

    def how_split(self, given: Cohort, config: SplitConfig) -> str:
        """In words, how the parts came about: those of the table, `given`, and those that were drawn."""
        return how_split((row.split for row in given), (row.split for row in self), seed=config.seed)

    def with_mpp(self, mpp: float) -> Cohort:
        """Microns per pixel for the slides that have none, neither in the table nor in their files."""
        if not (math.isfinite(mpp) and mpp > 0):
            raise CohortError(
                self.name, f"{mpp} um per pixel cannot be", "give a positive number, such as 0.25"
            )
        return replace(self, rows=tuple(replace(row, fallback_mpp=mpp) for row in self.rows))

    def with_masks(self, folder: str | Path) -> Cohort:
        """The users' own tissue masks from a folder, named by slide id; a mask of the table goes before it.

        A slide without one stays, with that as the reason why it cannot be used.
        """
        folder, rows = Path(folder), []
        if not folder.is_dir():
            raise CohortError(shown(folder), "is no folder", "give the folder of the masks")
        for row in self.rows:
            if row.mask is not None or row.path is None:
                rows.append(row)
                continue
            try:
                rows.append(replace(row, mask=find_outline(folder, row.slide_id)))
            except SlideError as error:
                fault = Finding.of_slide("error", "no mask", row.slide_id, error.what, error.remedy, row.row)
                rows.append(replace(row, path=None, fault=fault))
        return replace(self, rows=tuple(rows))

    def shard(self, number: int, of: int) -> Cohort:
        """Every `of`-th slide from the `number`-th (1 to `of`) on: no slide is in two shards, each is in one."""
        if not 1 <= number <= of:
            remedy = f"count from 1 to {max(1, of)} (SLURM: --array=1-{max(1, of)})"
            raise CohortError(self.name, f"there is no shard {number} of {of}", remedy)
        return replace(self, rows=self.rows[number - 1 :: of])

    # --- What can be used ---------------------------------------------------------------------------------------

    def usable(self, *, labels: bool = True, files: bool = True) -> tuple[Cohort, list[Finding]]:
        """The slides that can be worked with, and a finding for each that is left out.

        Training needs labels and files; prediction needs no `labels`, and work on prepared slides no `files`.
        """
        kept, findings = [], []
        for row in self.rows:
            reason = (row_without_file(row) if files else None) or (
                row_without_label(row) if labels else None
            )
            if reason is None:
                kept.append(row)
            else:
                findings.append(reason)
        return replace(self, rows=tuple(kept)), findings

    def class_weights(self) -> tuple[float, ...]:
        """A weight for each class, by inverse frequency; over the labelled slides their mean is 1.

        CohortError if a class has no slide.
        """
        counts = Counter(row.label for row in self.rows if row.label is not None)
        for name in self.classes:
            if not counts[name]:
                raise CohortError(self.name, f"holds no slide of class {name}", "train without class weights")
        return tuple(counts.total() / (len(self.classes) * counts[name]) for name in self.classes)

    # --- What contradicts itself --------------------------------------------------------------------------------

    def where(self, row: SlideRow) -> str:
        """A slide's place, for messages."""
        return f"{self.name}, {f'slide {row.slide_id}' if row.row is None else f'row {row.row}'}"

    def refuse_split_patients(self) -> None:
        """CohortError if a patient is in two parts."""
        first: dict[str, SlideRow] = {}
        for row in self.rows:
            if row.split is None:
                continue
            before = first.setdefault(row.patient_id, row)
            if before.split != row.split:
                what = f"patient {row.patient_id} is in {before.split} (slide {before.slide_id}) and in {row.split}"
                what += f" (slide {row.slide_id})"
                raise CohortError(self.where(row), what, "put all slides of a patient into one split")

    def refuse_missing_files(self) -> None:
        """CohortError for the first slide without a file, with the number of them."""
        findings = [each for each in map(row_without_file, self.rows) if each is not None]
        if findings:
            first = next(row for row in self.rows if row_without_file(row) is not None)
            what = f"slide {first.slide_id} has no file: {findings[0].what}"
            more = f" ({len(findings)} slides have none)" if len(findings) > 1 else ""
            raise CohortError(self.where(first), what + more, findings[0].remedy)

    def _refuse_doubles(self) -> None:
        first: dict[str, SlideRow] = {}
        for row in self.rows:
            before = first.setdefault(row.slide_id, row)
            if before is row:
                continue
            what = f"slide {row.slide_id} is there already"
            if before.row is not None:
                what = f"slide {row.slide_id} stands in row {before.row} already"
            elif before.path is not None:
                what += f", as {before.path}"
            if before.label != row.label:
                what += f", there with label {before.label or 'unknown'}, here with {row.label or 'unknown'}"
            elif before.patient_id != row.patient_id:
                what += f", there of patient {before.patient_id}, here of {row.patient_id}"
            raise CohortError(self.where(row), what, "keep one of them")

    def _what_was_drawn(self, drawn: Mapping[str, Split], named: list[Split]) -> list[Finding]:
        if not named:
            return []
        counts = Counter(drawn.values())
        parts = " and ".join(f"{counts[part]} into {part}" for part in SPLITS if counts[part])
        what = f"names only {', '.join(named)}; of the other patients {parts} were drawn"
        return [
            Finding("warning", "split drawn", self.name, what, "fill in the split of each slide to decide it")
        ]


def _in_order(labels: set[str]) -> tuple[str, ...]:
    if all(label.removeprefix("-").isdecimal() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def _labels_by_patient(rows: Iterable[SlideRow]) -> dict[str, frozenset[str]]:
    labels: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.label is not None:
            labels[row.patient_id].add(row.label)
    return {patient: frozenset(each) for patient, each in labels.items()}


def _written(path: Path | None, folder: Path) -> str:
    if path is None:
        return ""
    path = path.absolute()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
