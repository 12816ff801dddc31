"""Where things are in a run's folder; imports nothing heavy."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from holoslide.errors import CheckpointError

LEFT_OUT, FACTS, DATA, PLAN = "left_out.csv", "run.json", "data.csv", "plan.json"
_REPEAT = re.compile(r"(?:fold|seed)-(-?\d+)")


def rasters_of(run: Path) -> Path | None:
    """Where a run's prepared slides are, if it says so and they are still there; of several runs, the first's."""
    for folder in repeats_of(run) or [run]:
        rasters = read_json(folder / FACTS).get("rasters")
        if rasters:
            return Path(rasters) if Path(rasters).is_dir() else None
    return None


def repeats_of(run: Path) -> list[Path]:
    """The runs that `train --folds` or `--seeds` made in a folder, in order; none where it is a run by itself.

    Those that its `metrics.json` names; before that is written, those that are there.
    """
    told = read_json(run / "metrics.json").get("runs")
    if told is None and (run / FACTS).exists():
        return []
    names = {folder.name for folder in run.glob("*-*")} if told is None else set(told)
    numbers = {name: int(found[1]) for name in names if (found := _REPEAT.fullmatch(name))}
    folders = [run / name for name in sorted(numbers, key=numbers.__getitem__)]
    return [folder for folder in folders if (folder / "cohort.csv").is_file()]


def model_of(folder: Path) -> Path:
    """Where the model is in a run's folder, or in a saved model's; CheckpointError where there is none."""
    if (folder / "best").is_dir():
        return folder / "best"
    if (folder / "model.yaml").is_file():
        return folder
    repeats = repeats_of(folder)
    if repeats:
        what = f"holds {len(repeats)} runs, and no model of its own"
        raise CheckpointError(folder, what, f"give one of them, such as {repeats[0]}")
    if folder.is_dir():
        raise CheckpointError(folder, "holds no model", "give the folder that train wrote, when it is done")
    raise CheckpointError(folder, "is not a run or a model", "give the folder that train wrote")


def settings_of(folder: Path) -> Path | None:
    """The settings beside a run's or a saved model; a run's `best` by itself has the run's, or slides would be
    prepared for it in another way.
    """
    homes = [folder, *([folder.parent] if folder.resolve().name == "best" else [])]
    return next((home / "config.yaml" for home in homes if (home / "config.yaml").is_file()), None)


def read_json(path: Path) -> dict[str, Any]:
    """What a run wrote about itself; nothing where it has not yet. CheckpointError for a damaged file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            path, f"is damaged ({error})", "delete it, and evaluate the run again"
        ) from error
    return found if isinstance(found, dict) else {}
