"""Runs in processes of their own, to be killed or to be two.

What a run imports is imported once; then a process is forked for each.
"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import torch

from holoslide.training import checkpoint
from tests.training import tiny

for late in ("sklearn.metrics", "torch.utils.tensorboard"):  # most of the time of a small run
    import_module(late)


def live(action: Callable[[], object]) -> NoReturn:
    """All that a forked process does: nothing of its parent's may run on in it."""
    try:
        action()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        os._exit(1)


def forked(action: Callable[[], object], *, kill_after: float | None = None) -> bool:
    """Whether the action came to its end in a process that is killed after some seconds."""
    pid = os.fork()
    if pid == 0:
        live(action)
    if kill_after is not None:  # one that has ended waits for its parent, so the id is still its own
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        message = "the run failed"
        raise RuntimeError(message)
    return not os.WIFSIGNALED(status)


def kill_at_replace(number: int, *, before: bool) -> None:
    """Let this process be killed around its n-th renaming of a file, the moment that checkpoints live by."""
    replace, count = os.replace, 0

    def killing(source: object, target: object) -> None:
        nonlocal count
        count += 1
        if count == number and before:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)  # type: ignore[call-overload]
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = killing


def resume_after_kills(folder: Path) -> dict[str, int]:
    """One run in peace, some killed at random moments, one killed around each of its renamings.

    Gives the number of runs killed at random, of such kills, and of kills around renamings.
    """
    slides, model = tiny.cohort(folder, train=3, valid=2), tiny.model()
    config = tiny.config(epochs=3, checkpoint_minutes=0, average=0.5)

    def run(name: str) -> None:
        tiny.run(folder / name, slides, trained=model, config=config, resume=True)

    assert forked(lambda: run("warm"))  # files in the cache, so that the next one's time is typical
    started = time.monotonic()
    assert forked(lambda: run("peace"))
    seconds, rng = time.monotonic() - started, random.Random(0)

    runs, kills = 0, 0
    while kills < 5 and runs < 10:
        name = f"random{runs}"
        tries = 0  # each life is let live longer, so that a machine that has become slower gets there, too
        while not forked(partial(run, name), kill_after=rng.uniform(0.1, 0.9) * seconds * 1.2**tries):
            tries += 1
        kills += tries
        runs += 1

    def dying() -> None:
        # A life may write five files before it gets anywhere, so some must be let live that long.
        kill_at_replace(1 + lives // 2 % 6, before=lives % 2 == 0)
        run("renaming")

    lives = 0
    while not forked(dying):
        lives += 1
        assert lives < 30, "killed runs get nowhere"
    return {"runs": runs, "kills": kills, "renamings": lives}


def two_ranks(action: Callable[[], object], port: int) -> list[int]:
    """What two processes end with that are told what torchrun would tell them."""
    processes = [os.fork() or ranked(action, number, port) for number in (0, 1)]
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def ranked(action: Callable[[], object], number: int, port: int) -> NoReturn:
    """The life of one of them."""
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test", "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2",
        "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    live(action)


def full_disk(folder: Path) -> None:
    """A run whose checkpoint cannot be written, by the one rank that writes."""

    def full(path: Path, _: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    checkpoint.write_atomically = full
    tiny.run(folder / "run", tiny.cohort(folder), config=tiny.config(devices=2))


def rank(folder: Path, world: int) -> None:
    """One of several processes of a run, as torchrun starts them."""
    config = tiny.config(epochs=2, accumulate=3, devices=world)
    model = tiny.model(dtype=torch.float64)
    if os.environ.get("RANK") == "1":
        with torch.no_grad():
            model.heads[0].stem.weight.zero_()  # rank 0's weights are the ones that count
    result = tiny.run(folder / f"world{world}", tiny.cohort(folder, train=7), trained=model, config=config)
    torch.save((model.state_dict(), result.history), folder / f"world{world}rank{result.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)  # no thread pool, so that forking is safe
    work, where = sys.argv[1], Path(sys.argv[2])
    if work == "kills":
        print(json.dumps(resume_after_kills(where)))
    else:
        action = partial(rank, where, 2) if work == "ranks" else partial(full_disk, where)
        if any(codes := two_ranks(action, int(sys.argv[3]))):
            sys.exit(f"ended with {codes}")
