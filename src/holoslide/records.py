"""What a run writes about itself beside its results: its slides, its command, its machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from holoslide.files import write_rows
from holoslide.prepared import Prepared
from holoslide.runs import read_json
from holoslide.slides.raster import Raster
from holoslide.training.history import resident_bytes


def write_left_out(left_out: Sequence[tuple[str, str]], path: Path) -> None:
    """Every slide that is not used, with its reason."""
    write_rows([{"slide_id": slide, "reason": reason} for slide, reason in left_out], path)


def data_rows(prepared: Prepared) -> list[dict[str, str]]:
    """What each slide is that is used: its part, the hash of its file, its resolution, its tissue."""
    rows = []
    for row in prepared.cohort:
        with Raster.open(prepared.rasters[row.slide_id]) as raster:
            recipe = raster.record.recipe
            rows.append(
                {
                    "slide_id": row.slide_id,
                    "split": row.split or "",
                    "slide_sha256": recipe.slide_sha256,
                    "slide_mpp": repr(recipe.slide_mpp[0]),
                    "slide_mpp_source": recipe.slide_mpp_source,
                    "tissue_px": str(raster.tissue_px),
                }
            )
    return rows


def run_facts(prepared: Prepared) -> dict[str, object]:
    """The command, where and when it was given, on what machine, and what had been used before training."""
    made = sum(result.seconds for result in prepared.results if result.status == "made")
    rasters = next(iter(prepared.rasters.values())).parent
    return {
        "command": command_given(),
        "directory": str(Path.cwd()),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "rss_before_bytes": resident_bytes(),
        "seconds": {"preparing": round(made, 1)} if made else {},
        "rasters": str(rasters.resolve()),
    }


def begun(path: Path) -> dict[str, object]:
    """Of a run that is resumed, the facts that stay those of its beginning."""
    if not path.exists():
        return {}
    before = read_json(path)
    kept = ("command", "directory", "started", "seconds")
    return {key: before[key] for key in kept if key in before} | {
        "resumed": [*before.get("resumed", []), datetime.now(UTC).isoformat(timespec="seconds")]
    }


def command_given() -> str:
    """What was typed: the command, or the script that calls the library."""
    program = Path(sys.argv[0])
    if program.stem in {"holoslide", "cli"} or program.parts[-2:] == ("holoslide", "__main__.py"):
        return shlex.join(["holoslide", *sys.argv[1:]])
    return shlex.join(["python", *sys.argv])


def environment() -> dict[str, str]:
    """Versions and hardware, as a report names them."""
    names = (
        "holoslide", "torch", "torchvision", "timm", "lightning-fabric", "numpy", "scipy", "scikit-learn",
        "opencv-python-headless", "openslide-python", "openslide-bin", "tifffile", "imagecodecs",
    )  # fmt: skip
    facts = {}
    for name in names:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a machine that only trains may do without some
            facts[name] = "not installed"
    if (commit := _commit()) is not None:
        facts["holoslide commit"] = commit
    facts["python"] = platform.python_version()
    facts["system"] = platform.platform(terse=True)
    facts["processors"] = f"{os.cpu_count()} × {_processor()} ({platform.machine()})"
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
    return facts


def _commit() -> str | None:
    """The commit that a source checkout stands at, and whether files differ from it; None of a plain install."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or not (root / "pyproject.toml").exists():
        return None  # else a repository of the user's, around the environment, would pass for ours
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return None
    return found.stdout.strip().replace("-dirty", ", with changes") or None


def _processor() -> str:
    """The processor's model, as the system names it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        names = [
            line.partition(":")[2] for line in path.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0].strip()
    return platform.processor() or "processor"
