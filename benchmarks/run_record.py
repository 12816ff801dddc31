"""A finished run as a result file: what it was trained on and how, what it reached, and the baseline to beat.

    python -m benchmarks.run_record RUN NAME --full

The baseline is a logistic regression on the mean colour of a slide's tissue: what needs no network at all.
`module_K_auroc` is each module's own classifier, `ensemble_auroc` the mean of all their probabilities.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.common import Figure, Options, Result, main, without_folders
from holoslide.runs import rasters_of
from holoslide.slides.cohort import Cohort
from holoslide.slides.raster import Raster


def measure(options: Options) -> Result:
    """Test metrics with their intervals, the mean-colour baseline, seconds of training, slides by part."""
    run = Path(options.values["run"])
    cohort = Cohort.from_csv(run / "cohort.csv")
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    history = (run / "history.csv").read_text(encoding="utf-8").splitlines()
    seconds = history[0].split(",").index("seconds")
    figures: dict[str, Figure] = {}
    for level in ("slides", "patients"):
        for name in ("auroc", "auprc", "balanced_accuracy"):
            value = (metrics.get(level) or {}).get(name)
            if value:
                figures[f"{level}_{name}"] = round(value["value"], 4)
                figures[f"{level}_{name}_interval"] = f"{value['low']:.3f} to {value['high']:.3f}"
    figures |= _by_module(run / "predictions_modules.csv", cohort.classes)
    figures["mean_colour_auroc"] = round(_mean_colour(cohort, run), 4)
    figures["epochs"] = len(history) - 1
    figures["training_s"] = round(sum(float(row.split(",")[seconds]) for row in history[1:]), 1)
    figures |= {f"{part}_slides": len(getattr(cohort, part)) for part in ("train", "valid", "test")}
    configuration = {
        "command": without_folders(facts["command"]),
        "best_epoch": facts.get("best_epoch"),
        "config": yaml.safe_load(without_folders((run / "config.yaml").read_text(encoding="utf-8"))),
    }
    return Result(figures=figures, configuration=configuration, variant=options.values["name"])


def _by_module(table: Path, classes: Sequence[str]) -> dict[str, Figure]:
    """Test AUROC, two classes, of every module's classifier and of all together."""
    if len(classes) != 2:
        return {}
    with table.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    chances: dict[str, dict[str, float]] = {}
    truth = {row["slide_id"]: row["label"] == classes[1] for row in rows}
    for row in rows:
        chances.setdefault(row["module"], {})[row["slide_id"]] = float(row[f"p_{classes[1]}"])
    slides = sorted(truth)
    labels = [truth[slide] for slide in slides]
    found = {module: np.array([of[slide] for slide in slides]) for module, of in chances.items()}
    figures = {f"module_{k}_auroc": round(float(roc_auc_score(labels, p)), 4) for k, p in found.items()}
    mean = np.mean(list(found.values()), axis=0)
    return {**figures, "ensemble_auroc": round(float(roc_auc_score(labels, mean)), 4)}


def _mean_colour(cohort: Cohort, run: Path) -> float:
    rasters = rasters_of(run)
    if rasters is None:
        raise SystemExit(f"{run}: its rasters are gone; prepare them again")
    parts = {}
    for part in ("train", "test"):
        colours, targets = [], []
        for row in getattr(cohort, part):
            with Raster.open(rasters / f"{row.slide_id}.tif") as raster:
                colours.append(raster.record.tissue_mean)
            targets.append(cohort.classes.index(row.label))
        parts[part] = np.array(colours), np.array(targets)
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(*parts["train"])
    tested, truth = parts["test"]
    return float(roc_auc_score(truth, model.predict_proba(tested)[:, 1]))


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("name", help="goes into the name of the result file")


if __name__ == "__main__":
    main("run_record", __doc__, measure, add_arguments=_arguments)
