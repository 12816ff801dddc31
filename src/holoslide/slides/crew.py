"""Worker processes for work that may kill or stop them: that is the outcome of one piece of work, not of the run.

The processes are programs of their own, not `multiprocessing`'s: they import nothing of the caller's script, so
that it needs no `if __name__ == "__main__"`; and they can be started where `multiprocessing` refuses, as in the
daemons of a Dask cluster.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

from holoslide.errors import ConfigError

Work = TypeVar("Work")
Result = TypeVar("Result")
Beat = Callable[[], None]  # to be called now and then by work that gets on

_PROGRAM = "import sys; sys.path[:] = {path!r}; from holoslide.slides.crew import serve; serve({descriptor})"
_FIRST_TO_GO = "500"  # Linux kills these when memory runs out, before the run itself


@dataclass(frozen=True, slots=True)
class Died:
    """The outcome of work whose process ended, or was ended, before it answered."""

    how: str
    seconds: float


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection[Any, Any]
    index: int = -1
    started: float = 0.0
    heard: float = 0.0

    def died(self, how: str | None = None) -> Died:
        code = self.process.wait()
        how = how or (signal.Signals(-code).name if code < 0 else f"exit code {code}")
        return Died(how, time.monotonic() - self.started)


def run_all(
    function: Callable[[Work, Beat], Result],
    work: Sequence[Work],
    *,
    workers: int,
    limit_s: float | None = None,
) -> Iterator[tuple[int, Result | Died]]:
    """Call a module's function on each piece of work in fresh processes; (index, outcome) as they come.

    The function gets the piece and a beat to call while it gets on, from any thread; a process that neither answers
    nor beats for `limit_s` is killed. ConfigError for fewer than one worker.
    """
    if workers < 1:
        raise ConfigError("workers", f"{workers} processes can do nothing", "give 1 or more")
    crew = _Crew(function, work, limit_s)
    try:
        for _ in range(min(workers, len(work))):
            crew.give()
        while crew.busy:
            yield from crew.outcomes()
    finally:
        crew.end()


class _Crew:
    """The processes at work, by the connection to each."""

    def __init__(self, function: Callable[..., Any], work: Sequence[Any], limit_s: float | None) -> None:
        self._function, self._work, self._limit_s = function, work, limit_s
        self._todo = list(range(len(work)))[::-1]
        self.busy: dict[Connection[Any, Any], _Worker] = {}

    def outcomes(self) -> Iterator[tuple[int, Any]]:
        """Wait for news of any; what came of it."""
        for connection in wait(list(self.busy), self._patience_s()):
            worker = self.busy[connection]  # type: ignore[index]
            try:
                is_done, outcome = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                self._bury(worker)
                yield worker.index, worker.died()
                self.give()
                continue
            worker.heard = time.monotonic()
            if is_done:
                yield worker.index, outcome
                self.give(worker)
        for worker in self._overdue():
            worker.process.kill()
            self._bury(worker)
            yield worker.index, worker.died(f"it got no further for {self._limit_s:g} s")
            self.give()

    def give(self, worker: _Worker | None = None) -> None:
        """Give a worker the next piece; a new one where there is none, or it died while it had nothing to do."""
        if not self._todo:
            if worker is not None:
                self._bury(worker)
                worker.process.wait()
            return
        index = self._todo.pop()
        if worker is not None:
            try:
                worker.connection.send(self._work[index])
            except BrokenPipeError:
                self._bury(worker)
                worker.process.wait()
                worker = None
        if worker is None:
            worker = _start(self._function)
            self.busy[worker.connection] = worker
            with contextlib.suppress(BrokenPipeError):  # it died already: its end of the connection says so
                worker.connection.send(self._work[index])
        worker.index, worker.started = index, time.monotonic()
        worker.heard = worker.started

    def end(self) -> None:
        """Kill those that are still at work."""
        for worker in list(self.busy.values()):
            worker.process.kill()
            self._bury(worker)
            worker.process.wait()

    def _bury(self, worker: _Worker) -> None:
        del self.busy[worker.connection]
        worker.connection.close()

    def _patience_s(self) -> float | None:
        if self._limit_s is None:
            return None
        first = min(worker.heard for worker in self.busy.values())
        return max(0.0, first + self._limit_s - time.monotonic()) + 0.01

    def _overdue(self) -> list[_Worker]:
        if self._limit_s is None:
            return []
        latest = time.monotonic() - self._limit_s
        return [worker for worker in self.busy.values() if worker.heard < latest]


def _start(function: Callable[..., Any]) -> _Worker:
    ours, theirs = Pipe()
    program = _PROGRAM.format(path=sys.path, descriptor=theirs.fileno())
    process = subprocess.Popen(
        [sys.executable, "-c", program], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
    )
    theirs.close()  # so that its death is the end of our side, too
    ours.send(function)
    return _Worker(process, ours)


def serve(descriptor: int) -> None:
    """A worker's life: the function, then pieces of work, until there are no more or the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends us
    with contextlib.suppress(OSError):  # not Linux
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)
    connection: Connection[Any, Any] = Connection(descriptor)
    one_at_a_time = threading.Lock()

    def beat() -> None:
        try:
            with one_at_a_time:
                connection.send((False, None))
        except BrokenPipeError:
            os._exit(1)  # nobody waits for this work any more

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        function = connection.recv()
        while True:
            connection.send((True, function(connection.recv(), beat)))
