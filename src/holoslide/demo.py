"""The demo: synthetic slides, and settings that run the whole job on two processor cores in minutes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from holoslide.config import RunConfig
from holoslide.errors import ConfigError
from holoslide.slides.phantom import write_phantoms

# Small, from nothing: the first two stages of ResNet-18 at 4 um/px, in two modules, heads that classify each cell.
# Few slides allow few steps, so the heads learn fast; random filters must not, or they drift away from what the
# heads read. Fourteen validation slides rank too coarsely to choose by AUROC.
SETTINGS = {
    "prepare": {"mpp": 4.0},
    "augment": {"crop": 0.0},
    "model": {
        "backbone": {"name": "resnet18", "weights": "none", "truncate": "layer2"},
        "modules": 2,
        "heads": {"pooling": "auto"},
        "reconstruction": {"alpha": 0.1, "side": 32},
    },
    "train": {
        "epochs": 8,
        "lr": 1e-3,
        "backbone_lr_ratio": 0.05,
        "monitor": "loss",
    },
}


def demo_config() -> RunConfig:
    """The demo's settings."""
    return RunConfig.from_dict(SETTINGS, where="demo")


def draw_demo(
    out: Path, *, task: str, slides: int, seed: int, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Draw the slides, unless they are there; gives their table. `ConfigError` where others are."""
    if task not in ("focus", "arrangement"):
        raise ConfigError("--task", f"is {task}", "choose focus or arrangement")
    table, note = out / "slides.csv", out / "drawn.json"
    wanted = json.dumps({"task": task, "slides": slides, "seed": seed})
    if table.exists():
        drawn = note.read_text(encoding="utf-8") if note.exists() else "something else"
        if drawn != wanted:
            raise ConfigError(out, f"holds slides of {drawn}, not of {wanted}", "give another --out")
        return table
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(wanted, encoding="utf-8")
    workers = os.cpu_count() or 1
    return write_phantoms(out, task=task, slides=slides, seed=seed, workers=workers, progress=progress)  # type: ignore[arg-type]
