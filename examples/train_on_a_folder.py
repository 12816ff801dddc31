"""Train on a folder of slides, sorted into one folder per class: `slides/tumour/a.svs`, `slides/normal/b.svs`.

    python examples/train_on_a_folder.py slides/ --out runs/first

A file is taken for a patient of its own. Where patients have several slides, let `holoslide convert slides/` write
the table, and mend its `patient_id`: slides of one patient in both training and test make every number look better
than it is.
"""

import argparse
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

    run = fit(Cohort.from_folder(given.slides), RunConfig.load(given.config), out=given.out)
    auroc = evaluate(run).metrics.auroc
    shown = "not defined" if auroc.value is None else f"{auroc.value:.3f}"
    print(f"AUROC {shown} on the test slides; see {run.folder / 'report.html'}")
    for slide_id, reason in run.left_out:
        print(f"left out: {slide_id}: {reason}")


if __name__ == "__main__":
    main()
