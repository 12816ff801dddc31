"""Where things are in a run's folder; imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path

LEFT_OUT, FACTS, DATA = "left_out.csv", "run.json", "data.csv"


def rasters_of(run: Path) -> Path | None:
    """Where a run's prepared slides are, if it says so and they are still there."""
    path = run / FACTS
    if not path.exists():
        return None
    rasters = json.loads(path.read_text(encoding="utf-8")).get("rasters")
    return Path(rasters) if rasters and Path(rasters).is_dir() else None
