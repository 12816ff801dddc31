"""Folders as `train --folds` and `--seeds` leave them, made of one run's tables and heatmaps."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Collection
from pathlib import Path

Rows = list[dict[str, str]]


def read_rows(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, rows: Rows) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def keep_slides(run: Path, slides: Collection[str]) -> None:
    """Take away all that a run says of other slides, but for its cohort."""
    for name in ("predictions.csv", "predictions_modules.csv"):
        write_table(run / name, [row for row in read_rows(run / name) if row["slide_id"] in slides])
    for path in (run / "heatmaps").rglob("*"):
        if path.is_file() and path.name.partition(".")[0] not in slides:
            path.unlink()


def make_folds(run: Path, out: Path) -> Path:
    """Two folds: the first tests the slides of odd numbers, the second those of even ones."""
    cohort = read_rows(run / "cohort.csv")
    for n in (1, 2):
        fold = out / f"fold-{n}"
        shutil.copytree(run, fold)
        tested = {row["slide_id"] for row in cohort[n - 1 :: 2]}
        keep_slides(fold, tested)
        parts = [row | {"split": "test" if row["slide_id"] in tested else "train"} for row in cohort]
        write_table(fold / "cohort.csv", parts)
    shutil.copy(run / "config.yaml", out)
    write_table(out / "cohort.csv", cohort)
    write_table(
        out / "predictions.csv",
        [row for n in (1, 2) for row in read_rows(out / f"fold-{n}" / "predictions.csv")],
    )
    (out / "metrics.json").write_text(json.dumps({"together": {}, "runs": {"fold-1": {}, "fold-2": {}}}))
    return out


def make_seeds(run: Path, out: Path) -> Path:
    """Two seeds, of which the second says the opposite of the first; only test slides are scored."""
    cohort = read_rows(run / "cohort.csv")
    tested = {row["slide_id"] for row in cohort if row["split"] == "test"}
    for seed in (5, 6):
        shutil.copytree(run, out / f"seed-{seed}")
        keep_slides(out / f"seed-{seed}", tested)
    first = read_rows(out / "seed-5" / "predictions.csv")
    other = [row | {"p_benign": row["p_lesion"], "p_lesion": row["p_benign"]} for row in first]
    write_table(out / "seed-6" / "predictions.csv", other)
    mean = [row | {"prediction": "benign", "p_benign": "0.500000", "p_lesion": "0.500000"} for row in first]
    write_table(out / "predictions.csv", mean)
    write_table(out / "cohort.csv", cohort)
    (out / "metrics.json").write_text(json.dumps({"together": {}, "runs": {"seed-5": {}, "seed-6": {}}}))
    return out
