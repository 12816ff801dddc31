"""The slides of a cohort made ready: what can be used, and what cannot, with the reason."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from holoslide.errors import CohortError
from holoslide.slides.cluster import prepare_on_cluster
from holoslide.slides.cohort import Cohort, SlideRow
from holoslide.slides.facts import Mpp
from holoslide.slides.prepare import STALL_S, PrepareConfig, PrepareJob, PrepareResult, prepare
from holoslide.slides.raster import Recipe

TABLES = {".csv", ".tsv", ".txt", ".xlsx", ".xls", ".ods"}  # of which a spreadsheet's own are refused as such
Advance = Callable[[int, int, str], None]  # (done, total, what was done last)


@dataclass(frozen=True, slots=True)
class Prepared:
    """The slides of a cohort that can be used, with their rasters, and those that cannot, with the reason.

    `recipes` tell these rasters from others that another command may put in their places meanwhile.
    """

    cohort: Cohort
    rasters: dict[str, Path]
    left_out: list[tuple[str, str]]
    results: list[PrepareResult]
    recipes: dict[str, Recipe] = dataclasses.field(default_factory=dict)

    def outcomes(self) -> list[dict[str, object]]:
        """What became of every slide, ready for JSON; those that had no file to prepare are failed, too."""
        tried = {r.slide_id for r in self.results}
        found: list[dict[str, object]] = [
            {
                "slide_id": r.slide_id,
                "status": r.status,
                "raster": None if r.path is None else str(r.path),
                "reason": r.reason,
                "mpp": r.mpp and dataclasses.asdict(r.mpp),
            }
            for r in self.results
        ]
        return found + [
            {"slide_id": slide_id, "status": "failed", "raster": None, "reason": reason, "mpp": None}
            for slide_id, reason in self.left_out
            if slide_id not in tried
        ]


def cohort_of(sources: Sequence[Path], *, slides: Path | None = None, mpp: float | None = None) -> Cohort:
    """A slide table, or slide files taken as a cohort without labels; `mpp` is theirs, where they do not say.

    A patient may be in two splits: what is done slide by slide asks for none.
    """
    if len(sources) == 1 and sources[0].suffix.lower() in TABLES:
        cohort = Cohort.from_csv(sources[0], slides=slides, require_splits=False)
    else:
        cohort = Cohort.from_files(sources)
    return cohort if mpp is None else cohort.with_mpp(mpp)


def default_rasters(table: Path) -> Path:
    """Where the prepared slides of a table go unless told otherwise; of slide files, by the first of them.

    Whatever lies there already is safe: a raster of another slide of the same name is never replaced, but the
    slide refused (see `slides/source.py`).
    """
    return table.parent / "rasters"


def prepare_cohort(
    cohort: Cohort, rasters: Path, config: PrepareConfig, *, labels: bool = False, workers: int = 0,
    stall_s: float = STALL_S, cluster: str | None = None, progress: Advance | None = None,
) -> Prepared:  # fmt: skip
    """Prepare what is not prepared; a slide that fails is left out with its reason, the rest go on.

    With `labels`, slides without one are left out, too. `cluster` is the address of a Dask scheduler, whose
    workers prepare in place of `workers` processes here.
    """
    usable, findings = cohort.usable(labels=labels)
    jobs = [
        PrepareJob(row.slide_id, row.path, row.mpp, row.mask, row.fallback_mpp)
        for row in usable
        if row.path is not None
    ]
    results: list[PrepareResult]
    if not jobs:
        results = []  # and no folder is made: the slides' may be a mistyped one
    elif cluster is not None:
        results = prepare_on_cluster(jobs, rasters, config, cluster, stall_s=stall_s, progress=progress)
    else:
        count = workers or os.cpu_count() or 1
        results = prepare(jobs, rasters, config, workers=count, stall_s=stall_s, progress=progress)
    left_out = [(finding.where, f"{finding.what}; {finding.remedy}") for finding in findings]
    left_out += [(r.slide_id, r.reason or "failed") for r in results if r.status == "failed"]
    paths = {r.slide_id: r.path for r in results if r.path is not None and r.status != "failed"}
    used = {r.slide_id: r.mpp for r in results}
    rows = tuple(_with_mpp(row, used[row.slide_id]) for row in usable if row.slide_id in paths)
    kept = dataclasses.replace(usable, rows=rows)
    recipes = {r.slide_id: r.recipe for r in results if r.recipe is not None}
    return Prepared(kept, paths, left_out, results, recipes)


def refuse_copies(prepared: Prepared) -> None:
    """CohortError where two patients have one file: it could be trained on, and tested on."""
    first: dict[str, SlideRow] = {}
    for row in prepared.cohort:
        recipe = prepared.recipes.get(row.slide_id)
        before = row if recipe is None else first.setdefault(recipe.slide_sha256, row)
        if before.patient_id != row.patient_id:
            what = f"slide {row.slide_id} of patient {row.patient_id} is the same file as slide {before.slide_id}"
            what += f" of patient {before.patient_id}"
            raise CohortError(prepared.cohort.where(row), what, "keep one of them, or name one patient")


def _with_mpp(row: SlideRow, used: Mpp | None) -> SlideRow:
    """The row with the user's microns per pixel, if they were needed, so that a run's own table has them."""
    if row.mpp is not None or used is None or used.source != "user":
        return row
    return dataclasses.replace(row, mpp=used.y)
