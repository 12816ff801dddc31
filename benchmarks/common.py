"""What all benchmarks share: arguments, facts of the machine, result files, memory, paired timing.

A benchmark is a module with a function that returns its figures:

    def measure(options: Options) -> Result: ...

    if __name__ == "__main__":
        main("memory", __doc__, measure)
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")
Figure = float | int | str | None
REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"

# --- A benchmark as a program -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a benchmark was called; `values` are the arguments it added itself."""

    quick: bool
    device: torch.device
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a benchmark found: flat `figures`, and the `configuration` that they hold for.

    `variant` goes into the name of the result file, where a benchmark has several.
    """

    figures: Mapping[str, Figure]
    configuration: Mapping[str, object]
    variant: str = ""


def main(
    name: str,
    description: str | None,
    measure: Callable[[Options], Result],
    *,
    add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Run `python -m benchmarks.<name>`: parse, measure, print, and save the dated result."""
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser(name, description)
    if add_arguments is not None:
        add_arguments(parser)
    values = vars(parser.parse_args(argv))
    options = Options(quick=not values.pop("full"), device=torch.device(values.pop("device")), values=values)
    as_json, save = values.pop("json"), values.pop("save") or not options.quick
    values.pop("quick")
    started = time.perf_counter()
    result = measure(options)
    record = {
        "benchmark": name,
        "date": datetime.now().astimezone().date().isoformat(),
        "command": without_folders(shlex.join(["python", "-m", f"benchmarks.{name}", *argv])),
        "seconds": round(time.perf_counter() - started, 1),
        "figures": dict(result.figures),
        "configuration": dict(result.configuration),
        "machine": machine(options.device),
        "versions": versions(),
    }
    width = max(map(len, result.figures), default=0)
    for key, value in result.figures.items():
        print(f"{key:<{width}}  {value:,}" if isinstance(value, int) else f"{key:<{width}}  {value}")
    if save:
        print(f"saved {save_record(record, quick=options.quick, variant=result.variant).relative_to(REPO)}")
    if as_json:
        print(json.dumps(record["figures"]))


def _parser(name: str, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="within 3 minutes on 2 cores (the default)")
    size.add_argument("--full", action="store_true", help="the real thing; saves its result")
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object of the figures")
    parser.add_argument("--save", action="store_true", help="save the result of --quick too")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1 ..."
    )
    return parser


def without_folders(command: str) -> str:
    """A command with absolute paths cut to their last name: where things lay is no one's business."""
    return re.sub(r"(?<![\w.])/[\w./-]*?([\w.-]+)(?=$|[^\w./-])", r"\1", command)


def save_record(
    record: Mapping[str, object], *, quick: bool, variant: str = "", folder: Path = RESULTS
) -> Path:
    """Write <name>[-variant]-<date>[-quick].json; one of the same day is replaced."""
    name = "-".join(filter(None, [str(record["benchmark"]), variant, str(record["date"])]))
    path = folder / f"{name}{'-quick' if quick else ''}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


# --- Where it ran -----------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Figure]:
    """CPU model, cores and threads used, memory, and the GPU if one was used."""
    on_gpu = device.type == "cuda"
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "gpu_memory_gib": (
            round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1) if on_gpu else None
        ),
    }


def versions() -> dict[str, str | None]:
    """Python, torch, holoslide and the commit, with + if the working tree differs from it."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "holoslide": _version("holoslide"),
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # run from its source, not installed


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        run = ["git", "-C", str(REPO), *arguments]
        return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # A new result file is no change of what was measured.
        dirty = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("HOLOSLIDE_COMMIT")  # not a clone: a copy on a machine lent for its GPU


# --- Processes of their own -------------------------------------------------------------------------------------


def in_new_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a function of a module gives, or raises, in a new process, which finds the environment as it is now."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()


# --- Peak memory ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Peak:
    """What a function's process held before it and at the most during it, and what the function returned.

    `gpu_bytes` is the most that tensors took on the GPU, None if there is none.
    """

    value: Any
    before_bytes: int
    most_bytes: int
    gpu_bytes: int | None

    @property
    def added_bytes(self) -> int:
        """What the function added to the process at its peak."""
        return self.most_bytes - self.before_bytes


def peak_memory(function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> Peak:
    """Run a function of a module, with arguments that can be pickled, in a new process, and watch its memory.

    What the function imports by itself counts, so import at the top of its module. Raises what it raises.
    """
    return in_new_process(_watched, function, args, kwargs)


def _watched(function: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Peak:
    on_gpu = torch.cuda.is_available()
    before = resident_bytes()
    value = function(*args, **kwargs)
    gpu = max(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))) if on_gpu else None
    return Peak(value, before, _peak_resident_bytes(), gpu)


def give_back_freed() -> None:
    """Have the C library hand back what was freed, so that it does not count as held; glibc alone can."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident_bytes() -> int:
    """What this process holds in memory now."""
    return _status_bytes("VmRSS") or _peak_resident_bytes()


def _peak_resident_bytes() -> int:
    # On Linux ru_maxrss is handed on from the process that forked; VmHWM is this process's own.
    unit = 1 if sys.platform == "darwin" else 1024
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_bytes(key: str) -> int:
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0


# --- What autograd holds ----------------------------------------------------------------------------------------


class HeldForBackward:
    """Counts, while it is entered, the bytes that autograd holds: `bytes_now`, and `most_bytes` so far."""

    def __init__(self, leave_out: Iterable[Tensor]) -> None:
        self.bytes_now = self.most_bytes = 0
        self._left_out = {tensor.untyped_storage().data_ptr() for tensor in leave_out}
        self._holders: dict[int, int] = {}  # storage -> how many saved tensors share it
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor)

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)

    def _pack(self, tensor: Tensor) -> _Saved:
        return _Saved(tensor, self)

    def add(self, storage: torch.UntypedStorage) -> None:
        """One more saved tensor needs this storage."""
        key = storage.data_ptr()
        if key in self._left_out:
            return
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self.bytes_now += storage.nbytes()
            self.most_bytes = max(self.most_bytes, self.bytes_now)

    def remove(self, storage: torch.UntypedStorage) -> None:
        """One saved tensor that needed this storage is gone."""
        key = storage.data_ptr()
        if key in self._left_out:
            return
        self._holders[key] -= 1
        if self._holders[key] == 0:
            del self._holders[key]
            self.bytes_now -= storage.nbytes()


class _Saved:
    """A tensor saved for backward, for as long as the graph keeps it."""

    def __init__(self, tensor: Tensor, count: HeldForBackward) -> None:
        self.tensor, self._count = tensor, count
        count.add(tensor.untyped_storage())

    def __del__(self) -> None:
        self._count.remove(self.tensor.untyped_storage())


# --- Paired timing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Paired:
    """Seconds of two functions run in turn, A B A B ...: a machine's drift falls on both alike."""

    a_s: tuple[float, ...]
    b_s: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median seconds of B over those of A: under 1, B is the faster."""
        return statistics.median(self.b_s) / statistics.median(self.a_s)

    @property
    def ratio_range(self) -> tuple[float, float]:
        """The least and the greatest ratio of one round."""
        ratios = [b / a for a, b in zip(self.a_s, self.b_s, strict=True)]
        return min(ratios), max(ratios)


def paired(a: Callable[[], object], b: Callable[[], object], *, rounds: int = 5, warm_up: int = 1) -> Paired:
    """Time two functions in turn, after `warm_up` untimed rounds; waits for the GPU where there is one."""
    return Paired(*in_turn(a, b, rounds=rounds, warm_up=warm_up))


def in_turn(*functions: Callable[[], object], rounds: int, warm_up: int = 1) -> list[tuple[float, ...]]:
    """Seconds of each function's rounds, as `paired`, for any number of them."""
    times = [[_seconds(function) for function in functions] for _ in range(warm_up + rounds)]
    return list(zip(*times[warm_up:], strict=True))


def cpu_s(function: Callable[[], object]) -> float:
    """User and system time of this process while it runs, all threads."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    function()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _seconds(function: Callable[[], object]) -> float:
    _wait()
    started = time.perf_counter()
    function()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
