"""Train on the very parts that CLAM used, fold by fold, from its slide table and its `splits_{i}.csv`.

    python examples/bring_clam_splits.py dataset.csv splits/task_1 --slides slides/ --out runs/clam

Each fold is a run of its own; its predictions are also written as CLAM writes them, `fold_{i}.csv`.
"""

import argparse
import csv
from pathlib import Path

from holoslide import Cohort, RunConfig, evaluate, fit
from holoslide.slides.folds import with_split_file


def main() -> None:
    """Read the command line, and do it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="CLAM's: case_id, slide_id, label")
    parser.add_argument("splits", type=Path, help="folder of splits_0.csv, splits_1.csv, ...")
    parser.add_argument("--slides", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, help="settings, as of `holoslide train`")
    given = parser.parse_args()

    cohort = Cohort.from_csv(given.table, slides=given.slides)
    config = RunConfig.load(given.config)
    fold = 0
    while (split := given.splits / f"splits_{fold}.csv").exists():
        out = given.out / f"fold_{fold}"
        # Slides are prepared once, for all folds.
        run = fit(with_split_file(cohort, split), config, out=out, rasters=given.out / "rasters")
        auroc = evaluate(run).metrics.auroc.value
        with (out / "predictions.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        classes = [key[2:] for key in rows[0] if key.startswith("p_")]
        with (given.out / f"fold_{fold}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["slide_id", "Y", "Y_hat", *(f"p_{k}" for k in range(len(classes)))])
            for row in rows:
                truth, answer = classes.index(row["label"]), classes.index(row["prediction"])
                writer.writerow([row["slide_id"], truth, answer, *(row[f"p_{name}"] for name in classes)])
        print(f"fold {fold}: AUROC {'not defined' if auroc is None else format(auroc, '.3f')}")
        fold += 1


if __name__ == "__main__":
    main()
