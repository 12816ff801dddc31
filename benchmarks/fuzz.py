"""Damaged slides and rasters: does any of them give a traceback, a hang, or the end of the process that reads it?

Real slides (HOLOSLIDE_TEST_DATA, or ../shared/data, if it is there), small files of many kinds made here, and a
raster are mutated: bytes, integers, whole ranges, lengths. Each is opened, described, read, prepared. Every outcome
must be pixels, or an error of one line. The process of a reader that dies counts as `died`, since the run
goes on; `tracebacks`, `hangs` and `odd_messages` must be 0.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.common import REPO, Figure, Options, Result, main
from benchmarks.damage import RASTER, made_sources, mutated, probe, real_sources
from holoslide.slides.crew import Died, run_all

LIMIT_S = 30.0
BATCH = 200  # files on the disk at a time


def cases(sources: Mapping[str, bytes], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents of `count` damaged files; the n-th is the same however many there are."""
    names = sorted(sources)
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        name = names[number % len(names)]
        yield (
            f"{'raster' if name.startswith('raster') else 'slide'}-{number:05}-{name}",
            mutated(sources[name], rng),
        )


def fuzz(
    sources: Mapping[str, bytes], count: int, *, seed: int, keep: Path | None = None, limit_s: float = LIMIT_S
) -> tuple[Counter[str], list[str], float]:
    """How often each outcome came, the texts of the bad ones, and the longest case in seconds."""
    found: Counter[str] = Counter()
    bad: list[str] = []
    longest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        everything = list(cases(sources, count, seed))
        for start in range(0, count, BATCH):
            paths = []
            for name, data in everything[start : start + BATCH]:
                paths.append(Path(folder) / Path(name).stem / name)  # DICOM looks for parts beside it
                paths[-1].parent.mkdir()
                paths[-1].write_bytes(data)
            clock = time.monotonic()
            for index, outcome in run_all(
                probe, [(path, Path(folder)) for path in paths], workers=1, limit_s=limit_s
            ):
                longest, clock = max(longest, time.monotonic() - clock), time.monotonic()
                kind, text = _kind(outcome)
                found[kind] += 1
                if kind not in ("read", "refused"):
                    bad.append(f"{paths[index].name}: {kind}: {text}")
                    if keep is not None:
                        (keep / paths[index].name).write_bytes(paths[index].read_bytes())
            for path in Path(folder).iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return found, bad, longest


def _kind(outcome: tuple[str, str] | Died) -> tuple[str, str]:
    if not isinstance(outcome, Died):
        return outcome
    return ("hangs" if "no further" in outcome.how else "died"), outcome.how


def measure(options: Options) -> Result:
    """Outcomes over made and real files."""
    count = options.values["cases"] or (300 if options.quick else 3000)
    keep = options.values["keep"]
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    data = Path(os.environ.get("HOLOSLIDE_TEST_DATA", REPO.parent / "shared" / "data")) / "wsi"
    real = real_sources(data, largest_bytes=2**15 if options.quick else 2**23)
    sources = {**made_sources(), **real, "raster.tif": RASTER.read_bytes()}
    found, bad, longest = fuzz(sources, count, seed=options.values["seed"], keep=keep)
    for text in bad:
        print(text)
    kinds = ("read", "refused", "died", "too_large", "tracebacks", "hangs", "odd_messages")
    figures: dict[str, Figure] = {"cases": count, **{kind: found[kind] for kind in kinds}}
    figures["longest_s"] = round(longest, 1)
    configuration = {"files": sorted(sources), "real_files": len(real), "seed": options.values["seed"]}
    return Result(figures=figures, configuration=configuration)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=int, metavar="N", help="damaged files (300, --full 3000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the files that did harm")


if __name__ == "__main__":
    main("fuzz", __doc__, measure, add_arguments=_arguments)
