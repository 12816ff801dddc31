"""A cohort written as the tables and splits of other tools, which `tables.py` and `folds.py` read.

| tool | files |
| --- | --- |
| `holoslide` | `slides.csv` |
| `paper` | `slides.csv`: `slide_id` (file name), `label`, `type` (train, valid, test) |
| `clam` | `dataset.csv`: `case_id,slide_id,label`; `splits_0.csv`, `splits_0_bool.csv` |
| `stamp` | `clini.csv`: `PATIENT,label`; `slide.csv`: `PATIENT,FILENAME`; `splits.json` |
| `slideflow` | `annotations.csv`: `patient,slide,label,dataset`; `splits.json` |
| `trident` | `wsi.csv`: `wsi[,mpp]`; and, for Patho-Bench, `splits.tsv`: `case_id,slide_id,label,fold_0` |

Splits are written where every labelled slide is in a part. STAMP knows no valid part: it draws its own from the
patients to train on, among which ours go.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

from holoslide.errors import CohortError, ConfigError
from holoslide.slides.cohort import Cohort, SlideRow
from holoslide.slides.facts import shown
from holoslide.slides.findings import Finding
from holoslide.slides.tables import SPLITS, Split

Rows = list[list[str]]
CLAM_NAMES: dict[Split, str] = {"train": "train", "valid": "val", "test": "test"}


def write_as(tool: str, cohort: Cohort, folder: Path, *, slides: Path | None = None) -> list[Path]:
    """Write the slides of a cohort that are `usable_by` another tool for it; the files that were written.

    `slides` is the folder that file names are relative to; without it they are bare names. `ConfigError` for a
    tool that is not known, `CohortError` for what its tables cannot say, or a folder that cannot be written to.
    """
    if tool not in TOOLS:
        raise ConfigError("--to", f"there is no tool {tool}", f"choose one of {', '.join(TOOLS)}")
    usable, _ = usable_by(tool, cohort)
    if not len(usable):
        raise CohortError(cohort.name, "holds no slide with a label", "add labels")
    cohort.refuse_split_patients()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return TOOLS[tool](usable, folder, slides)
    except OSError as error:
        what = f"cannot be written ({error.strerror or error})"
        raise CohortError(shown(folder), what, "make room there, or choose another folder") from error


def usable_by(tool: str, cohort: Cohort) -> tuple[Cohort, list[Finding]]:
    """The slides that a tool's tables can name, and a finding for each that they cannot: most want a label."""
    if tool == "holoslide":
        return cohort, []
    return cohort.usable(labels=tool != "trident", files=False)


def _holoslide(cohort: Cohort, folder: Path, _: Path | None) -> list[Path]:
    cohort.to_csv(folder / "slides.csv")
    return [folder / "slides.csv"]


def _paper(cohort: Cohort, folder: Path, slides: Path | None) -> list[Path]:
    _refuse_partly_split(cohort)
    rows = [[_file(cohort, row, slides), row.label or "", row.split or ""] for row in cohort]
    return [_table(folder / "slides.csv", ["slide_id", "label", "type"], rows)]


def _clam(cohort: Cohort, folder: Path, _: Path | None) -> list[Path]:
    rows = [[row.patient_id, row.slide_id, row.label or ""] for row in cohort]
    files = [_table(folder / "dataset.csv", ["case_id", "slide_id", "label"], rows)]
    if not _is_split(cohort):
        return files
    parts = [[row.slide_id for row in cohort if row.split == split] for split in SPLITS]
    longest = max(map(len, parts))
    columns = [part + [""] * (longest - len(part)) for part in parts]
    listed = [[str(number), *each] for number, each in enumerate(zip(*columns, strict=True))]
    flags = [[row.slide_id, *(str(row.split == split) for split in SPLITS)] for row in cohort]
    header = ["", *(CLAM_NAMES[split] for split in SPLITS)]
    files.append(_table(folder / "splits_0.csv", header, listed))
    return [*files, _table(folder / "splits_0_bool.csv", header, flags)]


def _stamp(cohort: Cohort, folder: Path, slides: Path | None) -> list[Path]:
    """Its features lie as the slides do, in the same folders, the last suffix replaced."""
    labels = _label_by_patient(cohort)
    files = [_table(folder / "clini.csv", ["PATIENT", "label"], [list(each) for each in labels.items()])]
    names = [row.slide_id + ".svs" if row.path is None else _file(cohort, row, slides) for row in cohort]
    features = [PurePosixPath(name).with_suffix(".h5").as_posix() for name in names]
    rows = [[row.patient_id, feature] for row, feature in zip(cohort, features, strict=True)]
    files.append(_table(folder / "slide.csv", ["PATIENT", "FILENAME"], rows))
    if _is_split(cohort):
        fold = {
            "train_patients": _patients(cohort, ("train", "valid")),
            "test_patients": _patients(cohort, ("test",)),
        }
        files.append(_json(folder / "splits.json", {"splits": [fold]}))
    return files


def _slideflow(cohort: Cohort, folder: Path, _: Path | None) -> list[Path]:
    is_split = _is_split(cohort)
    header = ["patient", "slide", "label", *(["dataset"] if is_split else [])]
    rows = [
        [row.patient_id, row.slide_id, row.label or "", *([_dataset(row)] if is_split else [])]
        for row in cohort
    ]
    files = [_table(folder / "annotations.csv", header, rows)]
    if is_split:
        labels = _label_by_patient(cohort)
        slides: dict[str, list[str]] = {patient: [] for patient in labels}
        parts: dict[str, list[str]] = {"training": [], "validation": []}
        for row in cohort:
            slides[row.patient_id].append(row.slide_id)
            if row.split != "test":
                parts["training" if row.split == "train" else "validation"].append(row.slide_id)
        patients = {
            patient: {"outcome_label": cohort.classes.index(labels[patient]), "slides": slides[patient]}
            for patient in _patients(cohort, ("train", "valid"))
        }
        plan = {"strategy": "fixed", "patients": patients, "tfrecords": parts, "id": 0}
        files.append(_json(folder / "splits.json", [plan]))
    return files


def _dataset(row: SlideRow) -> str:
    """Slideflow validates on some of what it trains on, and keeps `eval` apart."""
    return "eval" if row.split == "test" else "train"


def _trident(cohort: Cohort, folder: Path, slides: Path | None) -> list[Path]:
    mpps = [row.mpp or row.fallback_mpp for row in cohort]
    files = [_file(cohort, row, slides) for row in cohort]
    if all(mpps):
        rows = [[name, repr(mpp)] for name, mpp in zip(files, mpps, strict=True)]
        written = [_table(folder / "wsi.csv", ["wsi", "mpp"], rows)]
    elif any(mpps):
        first = next(row for row, mpp in zip(cohort, mpps, strict=True) if not mpp)
        what = f"{sum(not mpp for mpp in mpps)} slides have no mpp, others have"
        raise CohortError(
            cohort.where(first), what, "TRIDENT takes it from the table for all, or for none: fill it in"
        )
    else:
        written = [_table(folder / "wsi.csv", ["wsi"], [[name] for name in files])]
    labelled = cohort.usable(files=False)[0]
    if not len(labelled) or not _is_split(labelled):
        return written
    rows = [[r.patient_id, r.slide_id, r.label or "", CLAM_NAMES[r.split or "train"]] for r in labelled]
    header = ["case_id", "slide_id", "label", "fold_0"]
    return [*written, _table(folder / "splits.tsv", header, rows, separator="\t")]


# --- What they share ----------------------------------------------------------------------------------------------


def _is_split(cohort: Cohort) -> bool:
    """Whether the slides are in parts; CohortError where only some are."""
    _refuse_partly_split(cohort)
    return any(row.split is not None for row in cohort)


def _refuse_partly_split(cohort: Cohort) -> None:
    without = [row for row in cohort if row.split is None]
    if without and len(without) < len(cohort):
        what = f"{len(without)} slides have no split, others have"
        raise CohortError(cohort.where(without[0]), what, "fill the column in, take them out, or empty it")


def _patients(cohort: Cohort, parts: Sequence[Split]) -> list[str]:
    return list(dict.fromkeys(row.patient_id for row in cohort if row.split in parts))


def _label_by_patient(cohort: Cohort) -> dict[str, str]:
    """The label of each patient; CohortError where one has two."""
    labels: dict[str, str] = {}
    for row in cohort:
        label = row.label or ""
        if labels.setdefault(row.patient_id, label) != label:
            what = f"patient {row.patient_id} has slides labelled {labels[row.patient_id]}, and {label} here"
            raise CohortError(cohort.where(row), what, "the other tool has one label a patient: choose it")
    return labels


def _file(cohort: Cohort, row: SlideRow, slides: Path | None) -> str:
    """The name of a slide's file, relative to a folder."""
    if row.path is None:
        fault = row.fault.what if row.fault is not None else "no folder of slides was given"
        what = f"slide {row.slide_id} has no file: {fault}"
        raise CohortError(cohort.where(row), what, "the other tool names slides by file: give --slides")
    if slides is not None and row.path.is_relative_to(slides.absolute()):
        return row.path.relative_to(slides.absolute()).as_posix()
    return row.path.name


def _table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]], *, separator: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=separator, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    return path


def _json(path: Path, values: object) -> Path:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


TOOLS: dict[str, Callable[[Cohort, Path, Path | None], list[Path]]] = {
    "holoslide": _holoslide,
    "paper": _paper,
    "clam": _clam,
    "stamp": _stamp,
    "slideflow": _slideflow,
    "trident": _trident,
}
