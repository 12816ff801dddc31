"""Train on a folder of slides, sorted into one folder per class: `slides/tumour/a.svs`, `slides/normal/b.svs`.

    python examples/train_on_a_folder.py slides/ --out runs/first

A file is taken for a patient of its own. Where patients have several slides, write a table with their names
instead: slides of one patient in both training and test make every number look better than it is.
"""

import argparse
import csv
from pathlib import Path

from holoslide import Cohort, RunConfig, evaluate, fit


def main() -> None:
    """Read the command line, and do it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slides", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, help="settings, as of `holoslide train`")
    given = parser.parse_args()

    given.out.mkdir(parents=True, exist_ok=True)
    table = given.out / "slides.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "patient_id", "label", "path"])
        for path in sorted(given.slides.glob("*/*")):
            writer.writerow([path.stem, path.stem, path.parent.name, path.resolve()])

    run = fit(Cohort.from_csv(table), RunConfig.load(given.config), out=given.out)
    measured = evaluate(run).metrics
    print(f"AUROC {measured.auroc.value:.3f} on the test slides; see {run.folder / 'report.html'}")
    for slide_id, reason in run.left_out:
        print(f"left out: {slide_id}: {reason}")


if __name__ == "__main__":
    main()
