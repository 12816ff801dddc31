"""Worker processes for work that may kill them: a death is the outcome of one piece of work, not of the run."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar, cast

Work = TypeVar("Work")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Died:
    """The outcome of work whose process ended before it answered."""

    how: str
    seconds: float


@dataclass(slots=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    index: int = -1
    started: float = 0.0

    def how_it_died(self) -> str:
        self.process.join()
        code = self.process.exitcode or 0
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def run_all(
    function: Callable[[Work], Result], work: Sequence[Work], *, workers: int
) -> Iterator[tuple[int, Result | Died]]:
    """Call a module's function on each piece of work in fresh processes; (index, outcome) as they come.

    The processes are spawned, so that no reader, lock or thread of ours is in them.
    """
    todo = list(range(len(work)))[::-1]
    crew: dict[Connection, _Worker] = {}
    try:
        for _ in range(min(workers, len(work))):
            _give(crew, function, work, todo.pop())
        while crew:
            for connection in list(wait(list(crew))):
                worker = crew[connection]  # type: ignore[index]
                index, outcome = worker.index, _outcome(worker)
                alive = not isinstance(outcome, Died)
                if not alive:
                    del crew[worker.connection]
                    worker.connection.close()
                yield index, cast("Result | Died", outcome)
                if todo:
                    _give(crew, function, work, todo.pop(), worker if alive else None)
                elif alive:
                    _dismiss(crew.pop(worker.connection))
    finally:
        for worker in crew.values():
            worker.process.terminate()
            _dismiss(worker)


def _outcome(worker: _Worker) -> object:
    try:
        return worker.connection.recv()
    except (EOFError, ConnectionResetError):
        return Died(worker.how_it_died(), time.monotonic() - worker.started)


def _give(
    crew: dict[Connection, _Worker],
    function: Callable[[Work], Result],
    work: Sequence[Work],
    index: int,
    worker: _Worker | None = None,
) -> None:
    """Give a worker its next piece; a new one where there is none, or it died while it had nothing to do."""
    if worker is not None:
        try:
            worker.connection.send(work[index])
        except BrokenPipeError:
            del crew[worker.connection]
            worker.connection.close()
            worker = None
    if worker is None:
        worker = _start(function)
        crew[worker.connection] = worker
        worker.connection.send(work[index])
    worker.index, worker.started = index, time.monotonic()


def _start(function: Callable[[Work], Result]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, function), daemon=True)
    process.start()
    theirs.close()  # so that its death is the end of our side, too
    return _Worker(process, ours)


def _dismiss(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.join()


def _serve(connection: Connection, function: Callable[[Work], Result]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends us
    while True:
        try:
            work = connection.recv()
        except EOFError:
            return
        connection.send(function(work))
