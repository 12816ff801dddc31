"""Whether a killed `prepare` leaves anything that matters: killed over and over, then run once more, to the end.

What the last run leaves is compared with what an undisturbed one left: the same names, the same bytes. Every other
kill is aimed at a moment when a slide is in the making, the rest come at random times after the run's first trace.
After each kill a finished raster is removed, so that there is always something to do. All workers die at once, as
when a machine goes down.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import Figure, Options, Result, main
from holoslide.slides.phantom import PhantomConfig, write_phantoms

RUN = """
import sys
from pathlib import Path
from holoslide.slides.prepare import PrepareConfig, PrepareJob, prepare
slides = [Path(name) for name in sys.argv[2:]]
jobs = [PrepareJob(s.stem, s) for s in slides]
for result in prepare(jobs, Path(sys.argv[1]), PrepareConfig(mpp=1.0), workers=2):
    print(result.slide_id, result.status, result.reason)
"""
QUICK, FULL = 6, 50
LONGEST_S = 1.0  # that a random kill waits after the first trace

Traces = set[tuple[str, int, int]]


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def unfinished(folder: Path) -> Traces:
    """What there is of slides in the making, or of those whose makers were killed; another when written to."""
    found: Traces = set()
    for path in [*folder.glob(".*.part"), *folder.glob(".*.lock")]:
        with contextlib.suppress(FileNotFoundError):  # done meanwhile
            state = path.stat()
            found.add((path.name, state.st_ino, state.st_ctime_ns))
    return found


def undisturbed(folder: Path, slides: Sequence[Path]) -> str:
    """A run that nobody kills; what it said."""
    command = [sys.executable, "-c", RUN, str(folder), *map(str, slides)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def killed(folder: Path, slides: Sequence[Path], *, wait_s: float | None) -> bool:
    """A run that is killed; whether with a slide in the making.

    `wait_s` is the time from the run's first trace on; None kills it when a slide is in the making.
    """
    before = unfinished(folder)
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, folder, *slides],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    _wait(process, folder, before, is_aimed=wait_s is None)
    time.sleep(wait_s or 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the workers, too: they share the session we made
    process.wait()
    return bool(unfinished(folder) - before)


def _wait(process: subprocess.Popen[bytes], folder: Path, before: Traces, *, is_aimed: bool) -> None:
    """Until a slide is in the making; if `is_aimed`, the run stands still then, so that the moment lasts."""
    while process.poll() is None:
        if unfinished(folder) - before:
            if not is_aimed:
                return
            os.killpg(process.pid, signal.SIGSTOP)
            if unfinished(folder) - before:
                return
            os.killpg(process.pid, signal.SIGCONT)
        time.sleep(0.002)


def strike(
    folder: Path, slides: Sequence[Path], kills: int, *, seed: int, longest_s: float = LONGEST_S
) -> int:
    """Kill so many runs, aimed and at random in turn; how many had a slide in the making."""
    rng, torn = random.Random(seed), 0
    for number in range(kills):
        wait_s = rng.uniform(0, longest_s)
        torn += killed(folder, slides, wait_s=wait_s if number % 2 else None)
        finished = sorted(folder.glob("*.tif"))
        if finished:
            rng.choice(finished).unlink()
    return torn


def measure(options: Options) -> Result:
    """Kills, those with a slide in the making, and the files that differ from an undisturbed run's."""
    kills = options.values["kills"] or (QUICK if options.quick else FULL)
    seed = options.values["seed"]
    config = PhantomConfig(least_um=1600, most_um=2000, mpp=1.0)
    with tempfile.TemporaryDirectory() as place:
        write_phantoms(Path(place), task="focus", slides=8, config=config, seed=seed)
        slides = sorted((Path(place) / "slides").iterdir())[:4]
        for path in slides:
            os.utime(path, (1_700_000_000, 1_700_000_000))  # a slide just written is hashed anew each time
        whole, disturbed = Path(place) / "whole", Path(place) / "disturbed"
        undisturbed(whole, slides)
        torn = strike(disturbed, slides, kills, seed=seed)
        said = undisturbed(disturbed, slides)
        expected, found = contents(whole), contents(disturbed)
    differing = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    figures: dict[str, Figure] = {
        "kills": kills,
        "with_a_slide_in_the_making": torn,
        "files_expected": len(expected),
        "files_that_differ": len(differing),
        "differing": "; ".join(sorted(differing)) or None,
        "failed_in_the_last_run": said.count(" failed "),
    }
    return Result(figures=figures, configuration={"slides": len(slides), "workers": 2, "seed": seed})


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, metavar="N", help=f"({QUICK}, --full {FULL})")
    parser.add_argument("--seed", type=int, default=0)


if __name__ == "__main__":
    main("kill", __doc__, measure, add_arguments=_arguments)
