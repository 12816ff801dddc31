"""Train another network: any CNN of torchvision or timm that is local, cut into as many modules as you like.

python examples/change_the_backbone.py slides.csv --backbone densenet121 --modules 6 --out runs/densenet
"""

import argparse
from pathlib import Path

from holoslide import Cohort, LocalClassifier, RunConfig, fit


def main() -> None:
    """Read the command line, and do it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path)
    parser.add_argument("--backbone", default="densenet121")
    parser.add_argument("--weights", default="default", help="default (downloaded), none, or a file")
    parser.add_argument("--modules", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, help="further settings, as of `holoslide train`")
    given = parser.parse_args()

    changes = [
        f"model.backbone.name={given.backbone}",
        f"model.backbone.weights={given.weights}",
        f"model.modules={given.modules}",
    ]
    run = fit(Cohort.from_csv(given.table), RunConfig.load(given.config, sets=changes), out=given.out)
    model = LocalClassifier.load(run.best)
    print(f"{given.backbone} in {len(model.units)} modules, best after epoch {run.best_epoch}: {run.best}")


if __name__ == "__main__":
    main()
