"""Settings against one another on a cohort: each trained and tested as a user would, several side by side.

    python -m benchmarks.settings slides.csv tissue-06-layout0 --config examples/tissue.yaml \\
        --weights resnet18.pth --rasters rasters --jobs 7 --full

NAME-layoutN says which draw of the slides it is. Each setting is a `holoslide train` of its own, in a process with
one thread, and then a result of its own, `run_record-NAME-SETTING-layoutN`, by `benchmarks.run_record`: of these
the table in docs/results.md is made. Some change the training slides too: fewer patients, or labels turned. Small
slides leave a GPU idle, so several trainings share it well, best under NVIDIA's MPS. Without a cohort, an epoch on
a few drawn slides: to see that it runs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import REPO, Figure, Options, Result, main
from holoslide.slides.phantom import PhantomConfig, write_phantoms


@dataclass(frozen=True, slots=True)
class Setting:
    """What a training is told, and how a table names it; of how many patients, with how many labels turned."""

    words: str
    sets: tuple[str, ...] = ()
    patients: float = 1.0
    noise: float = 0.0


# Each cell is classified by itself, and then the cells' answers are pooled.
CELLS = ("model.heads.pooling=auto",)
SLIDE = ("model.heads.norm=slide",)
# What was the default until 2026-11-28, for comparison.
FORMER = (
    "model.backbone.scale=cohort",
    "model.heads.norm=slide",
    "model.heads.kernel=null",
    "train.backbone_lr_ratio=0.5",
    "train.heads_first=0",
    "train.accumulate=4",
)
SMALL = "small-lesions"  # these results' name, by what they were tried for
SETTINGS = {
    f"{SMALL}-gated-cohort": Setting("**the defaults**"),
    f"{SMALL}-gated": Setting("`model.heads.norm=slide` (the paper's)", SLIDE),
    f"{SMALL}-gated-no-rfr": Setting(
        "so, and `model.reconstruction.alpha=0` (nothing reconstructed)",
        (*SLIDE, "model.reconstruction.alpha=0"),
    ),
    f"{SMALL}-gated-no-barriers": Setting(
        "`model.heads.norm=slide`, `model.barrier_every=3` (no barriers: the heads' losses reach all below them)",
        (*SLIDE, "model.barrier_every=3"),
    ),
    f"{SMALL}-gated-epochs24": Setting("`model.heads.norm=slide`, 24 epochs", (*SLIDE, "train.epochs=24")),
    SMALL: Setting("cells by themselves: `model.heads.pooling=auto`", CELLS),
    f"{SMALL}-k1": Setting("cells, `model.modules=1` (end to end)", (*CELLS, "model.modules=1")),
    f"{SMALL}-rate3": Setting(
        "cells, `train.backbone_lr_ratio=0.3` (0.1)", (*CELLS, "train.backbone_lr_ratio=0.3")
    ),
    f"{SMALL}-no-rfr": Setting(
        "cells, `model.reconstruction.alpha=0`", (*CELLS, "model.reconstruction.alpha=0")
    ),
    f"{SMALL}-no-barriers": Setting("cells, `model.barrier_every=3`", (*CELLS, "model.barrier_every=3")),
    f"{SMALL}-k2": Setting("cells, `model.modules=2`", (*CELLS, "model.modules=2")),
    f"{SMALL}-k6": Setting("cells, `model.modules=6`", (*CELLS, "model.modules=6")),
    f"{SMALL}-zeros-all": Setting(
        "cells, `model.border=zeros`, `model.pool=all` (the paper's)",
        (*CELLS, "model.border=zeros", "model.pool=all"),
    ),
    f"{SMALL}-half": Setting("cells, half of the training patients", CELLS, patients=0.5),
    f"{SMALL}-noise10": Setting("cells, a tenth of the training labels turned", CELLS, noise=0.1),
    "former": Setting("the defaults until 2026-11-28, 8 epochs", (*FORMER, "train.epochs=8")),
    "epochs12": Setting("the defaults until 2026-11-28, 12 epochs", FORMER),
}
QUICK = ("train.epochs=1", "model.backbone.truncate=layer1", "model.modules=2", "prepare.mpp=8.0")
DRAWN = PhantomConfig(least_um=1500, most_um=1700, mpp=4.0)


def measure(options: Options) -> Result:
    """Test AUROC by setting."""
    values = dict(options.values)
    if not options.quick and not (values["cohort"] and values["name"]):
        raise SystemExit("--full: give a cohort, and a name for its results")
    names = values["only"].split(",") if values["only"] else list(SETTINGS)
    if unknown := set(names) - set(SETTINGS):
        raise SystemExit(
            f"--only: there is no {', '.join(sorted(unknown))}; choose from {', '.join(SETTINGS)}"
        )
    with tempfile.TemporaryDirectory() as folder:
        work = Path(values["out"] or folder).resolve()
        if values["cohort"] is None:
            values["cohort"] = write_phantoms(Path(folder), task="focus", slides=12, config=DRAWN)
            names = names[:1] if values["only"] is None else names
        sets = (*QUICK, *values["sets"]) if options.quick else tuple(values["sets"])
        prepare(values, sets, work)

        def run(name: str) -> float:
            cohort = changed(SETTINGS[name], Path(values["cohort"]), work / f"{name}.csv")
            auroc = train(SETTINGS[name], values | {"cohort": cohort}, sets, work / name)
            if not options.quick:  # at once: another setting may fail
                record(work / name, values["name"], name)
            return auroc

        with ThreadPoolExecutor(values["jobs"]) as pool:
            done = [pool.submit(run, name) for name in names]
        aurocs = {name: job.result() for name, job in zip(names, done, strict=True)}
    figures: dict[str, Figure] = {f"{name}_auroc": auroc for name, auroc in aurocs.items()}
    return Result(figures=figures, configuration={"sets": sets}, variant=values["name"] or "drawn")


def prepare(values: Mapping[str, Any], sets: tuple[str, ...], work: Path) -> None:
    """All slides, once, before any training asks for them."""
    work.mkdir(parents=True, exist_ok=True)
    only = [one for one in sets if one.startswith("prepare.")]
    _run("prepare", *_where(values, work), *_given(only), log=work / "prepare.log")


def changed(setting: Setting, table: Path, into: Path) -> Path:
    """The table, or one of fewer training patients, or with training labels of two classes turned."""
    if setting.patients == 1 and not setting.noise:
        return table
    with table.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    rng, training = np.random.default_rng(0), [row for row in rows if row["split"] == "train"]
    patients = rng.permutation(sorted({row["patient_id"] for row in training}))
    dropped = set(patients[round(setting.patients * len(patients)) :].tolist())
    kept = [row for row in training if row["patient_id"] not in dropped]
    labels = sorted({row["label"] for row in rows})
    other = dict(zip(labels, reversed(labels), strict=True))
    for index in rng.permutation(len(kept))[: round(setting.noise * len(kept))]:
        kept[index]["label"] = other[kept[index]["label"]]
    for row in rows:
        row["path"] = str((table.parent / row["path"]).resolve())
    with into.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0])
        writer.writeheader()
        writer.writerows(row for row in rows if row["split"] != "train" or row["patient_id"] not in dropped)
    return into


def train(setting: Setting, values: Mapping[str, Any], sets: tuple[str, ...], out: Path) -> float:
    """One run; its test AUROC over slides."""
    given = _given((*setting.sets, *sets))
    given += _given([f"model.backbone.weights={values['weights']}"])
    _run("train", *_where(values, out.parent), *given, "--out", out, log=out.with_suffix(".log"))
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return round(float(metrics["slides"]["auroc"]["value"]), 4)


def record(run: Path, name: str, setting: str) -> None:
    """The run's own result file: its name has the setting before the layout."""
    cohort, _, layout = name.partition("-layout")
    named = f"{cohort}-{setting}" + (f"-layout{layout}" if layout else "")
    command = [sys.executable, "-m", "benchmarks.run_record", str(run), named, "--full"]
    subprocess.run(command, cwd=REPO, check=True)


def _where(values: Mapping[str, Any], work: Path) -> list[object]:
    config = ["--config", Path(values["config"]).resolve()] if values["config"] else []
    rasters = Path(values["rasters"] or work / "rasters").resolve()
    return [Path(values["cohort"]).resolve(), "--rasters", rasters, *config]


def _given(sets: list[str] | tuple[str, ...]) -> list[object]:
    return [word for one in sets for word in ("--set", one)]


def _run(*command: object, log: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as said:
        done = subprocess.run(
            [sys.executable, "-m", "holoslide", *map(str, command)],
            stdout=said, stderr=subprocess.STDOUT, env=environment, check=False,
        )  # fmt: skip
    if done.returncode:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise SystemExit(f"{log.stem}: {' '.join(last)} (all of it: {log})")


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cohort", nargs="?", help="slide table with splits (default: some drawn slides)")
    parser.add_argument("name", nargs="?", help="goes into the names of the result files")
    parser.add_argument("--config", metavar="YAML", help="what all settings share")
    parser.add_argument("--rasters", metavar="DIR", help="where the prepared slides are, or go")
    parser.add_argument("--weights", default="none", help="of the backbone, a file")
    parser.add_argument("--only", metavar="SETTINGS", help=f"some of {','.join(SETTINGS)}")
    parser.add_argument(
        "--set", dest="sets", action="append", default=[], metavar="A.B=C", help="for all, as in train"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings side by side (1)")
    parser.add_argument("--out", metavar="DIR", help="keep the runs there")


if __name__ == "__main__":
    main("settings", __doc__, measure, add_arguments=_arguments)
