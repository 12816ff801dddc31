"""Slides prepared by the workers of a Dask cluster, which see the same files as this machine.

Each slide is prepared in a process of its own on its worker, as it would be here: what kills or stops that process
is the slide's failure. A worker that is lost altogether has its slides given to another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from holoslide.errors import ConfigError, SlideError
from holoslide.slides.crew import run_all
from holoslide.slides.facts import one_line, shown
from holoslide.slides.prepare import (
    STALL_S,
    Advance,
    PrepareConfig,
    PrepareJob,
    PrepareResult,
    attempt,
    check_jobs,
    result_of,
)

CONNECT_S = 20


def on_cluster(
    address: str, function: Callable[..., Any], work: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[int, Any]]:
    """Call a module's function on each piece of work on a cluster; (index, result or exception) as they come."""
    with _connected(address) as client:
        yield from _outcomes(client, function, work)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """A client of the scheduler at `address`. Raises `ConfigError` where there is none."""
    try:
        import distributed
    except ImportError as error:
        raise ConfigError("cluster", f"needs Dask ({error})", "pip install 'holoslide[cluster]'") from error
    try:
        client = distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError) as error:  # a TimeoutError is an OSError
        what = f"no Dask scheduler answers there ({one_line(error)})"
        raise ConfigError(f"cluster {address}", what, "start one: dask scheduler, and dask worker") from error
    with client:
        yield client


def _outcomes(
    client: Any, function: Callable[..., Any], work: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[int, Any]]:
    import distributed

    futures = [client.submit(function, *each, pure=False) for each in work]
    order = {future.key: index for index, future in enumerate(futures)}
    for future in distributed.as_completed(futures, loop=client.loop):
        error = future.exception()
        yield order[future.key], future.result() if error is None else error
        future.release()


def prepare_on_cluster(
    jobs: Sequence[PrepareJob],
    folder: Path,
    config: PrepareConfig,
    address: str,
    *,
    stall_s: float = STALL_S,
    progress: Advance | None = None,
) -> list[PrepareResult]:
    """As `prepare`, on the workers of the Dask scheduler at `address`. Raises `ConfigError` where none answers."""
    check_jobs(jobs, folder)
    results: dict[int, PrepareResult] = {}
    work = [(job, folder.absolute(), config, stall_s) for job in jobs]
    for index, outcome in on_cluster(address, attempt_apart, work):
        result = outcome if isinstance(outcome, PrepareResult) else _lost(jobs[index], outcome)
        results[index] = result
        if progress is not None:
            progress(len(results), len(jobs), f"{result.slide_id}: {result.status}")
    return [results[index] for index in range(len(jobs))]


def attempt_apart(job: PrepareJob, folder: Path, config: PrepareConfig, stall_s: float) -> PrepareResult:
    """Prepare one slide in a process of its own."""
    ((_, outcome),) = run_all(attempt, [(job, folder, config, 1)], workers=1, limit_s=stall_s)
    return result_of(job, outcome)


def _lost(job: PrepareJob, error: Exception) -> PrepareResult:
    what = f"no worker of the cluster could prepare it ({one_line(error)})"
    remedy = "look at the workers' logs: they need this holoslide, and the same files"
    return PrepareResult(job.slide_id, "failed", None, str(SlideError(shown(job.path), what, remedy)))
