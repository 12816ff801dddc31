"""A training step beside a program that keeps one core busy: what it costs that waiting threads spin, or sleep.

OpenMP's threads wait for one another at the end of every operation. By default they spin for some milliseconds, and
so hold the cores that the last of them, pushed aside by the other program, would need. holoslide has them sleep at
once, which costs a little where nothing else runs. Steps of a ResNet-18 to layer3 in three modules, float32, half
of the slide tissue, a thread on each core, each setting in processes of its own and in turn: `spin_busy` and
`sleep_busy` are the time of a step beside the other program over that of one alone; `sleep_over_spin_busy` and
`sleep_over_spin_alone` compare the two.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

from benchmarks.common import Figure, Options, Result, in_new_process, main
from benchmarks.objective import NETWORKS, TISSUE, made
from benchmarks.slides import NoisePixels
from benchmarks.steps import streamed

WAITING = {  # libgomp's own number of turns, which goes before the policy; and holoslide's policy
    "spin": {"GOMP_SPINCOUNT": "300000"},
    "sleep": {"OMP_WAIT_POLICY": "passive"},
}


def steps_s(side_px: int, count: int) -> list[float]:
    """Seconds of each of `count` steps, after one that does not count."""
    slide = NoisePixels(side_px, tissue=TISSUE)
    step = streamed(made(NETWORKS["resnet18_k3"], slide), slide)
    seconds = []
    for _ in range(count + 1):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


@contextmanager
def busy_core() -> Iterator[None]:
    """A program of another session: Linux shares cores out to sessions, and then within them."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        yield
    finally:
        other.kill()
        other.wait()


def new_process_s(waiting: str, side_px: int, count: int, *, busy: bool) -> list[float]:
    """`steps_s` in a process whose threads wait that way."""
    with patch.dict(os.environ, WAITING[waiting]), busy_core() if busy else nullcontext():
        return in_new_process(steps_s, side_px, count)


def measure(options: Options) -> Result:
    """The four ratios, of medians over all rounds, and the seconds behind them."""
    side_px, count, rounds = (300, 2, 1) if options.quick else (1000, 4, 3)
    found: dict[str, list[float]] = {f"{name}_{where}": [] for name in WAITING for where in ("alone", "busy")}
    for _ in range(rounds):
        for name in WAITING:
            found[f"{name}_alone"] += new_process_s(name, side_px, count, busy=False)
            found[f"{name}_busy"] += new_process_s(name, side_px, count, busy=True)
    median = {name: statistics.median(seconds) for name, seconds in found.items()}
    figures: dict[str, Figure] = {
        "spin_busy": round(median["spin_busy"] / median["spin_alone"], 2),
        "sleep_busy": round(median["sleep_busy"] / median["sleep_alone"], 2),
        "sleep_over_spin_busy": round(median["sleep_busy"] / median["spin_busy"], 3),
        "sleep_over_spin_alone": round(median["sleep_alone"] / median["spin_alone"], 3),
    }
    figures |= {f"{name}_s": round(seconds, 3) for name, seconds in median.items()}
    configuration = {"side_px": side_px, "tissue": TISSUE, "steps": count, "rounds": rounds}
    return Result(figures=figures, configuration=configuration)


if __name__ == "__main__":
    main("busy", __doc__, measure)
