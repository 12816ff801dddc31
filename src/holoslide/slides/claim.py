"""One writer for each raster, also on several machines, and nothing left behind by those that were killed.

A claim is a file beside the raster, with a lock of the kernel, which dies with its holder. Such locks do not reach
other machines on every network file system: therefore the file says which machine its holder runs on, and is
touched as long as it lives. A claim of this machine counts while it is locked; one of another machine also until
it was not touched for `LEASE_S`. A holder that merely slept too long finds its unfinished file replaced, and begins
anew. Equal recipes give equal bytes: even two writers at once do no harm.

(filelock's leases were tried: a kill leaves files of theirs behind, and one whose process is a zombie, as all are
in a container without an init, lasts its full time.)
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from holoslide.files import is_same, lock

LEASE_S = 60.0
_ASK_S = 0.1  # how often one asks who waits


class LostClaim(Exception):  # noqa: N818 - what happened, not what is wrong
    """Another process took over while the raster was written."""


def part_of(target: Path) -> Path:
    """The name of a raster while it is written."""
    return target.with_name(f".{target.name}.part")


def claim_of(target: Path) -> Path:
    """The name of the claim."""
    return target.with_name(f".{target.name}.lock")


def is_clean(target: Path) -> bool:
    """Whether nobody writes the raster, nor left anything when killed."""
    return not (part_of(target).exists() or claim_of(target).exists())


@contextmanager
def claimed(target: Path, beat: Callable[[], None]) -> Iterator[None]:
    """Wait until nobody else writes the raster, then keep others out. Raises OSError."""
    path = claim_of(target)
    file = _take(path, beat)
    over = threading.Event()
    heart = threading.Thread(target=_touch, args=(file, over), daemon=True)
    heart.start()
    try:
        yield
    finally:
        over.set()
        heart.join()
        if is_same(file, path):
            path.unlink()
        file.close()


def _take(path: Path, beat: Callable[[], None]) -> IO[bytes]:
    """The claim's file, locked and signed."""
    seen: tuple[object, float] = (None, time.monotonic())
    while True:
        with contextlib.ExitStack() as undo:
            file = undo.enter_context(
                os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
            )
            if lock(file) and is_same(file, path):
                state = os.fstat(file.fileno())
                owner, now = file.read(), time.monotonic()
                mark = (owner, state.st_ino, state.st_mtime_ns)
                seen = seen if seen[0] == mark else (mark, now)
                if owner in (b"", _machine()) or now - seen[1] > LEASE_S:
                    file.seek(0)
                    file.truncate()
                    file.write(_machine())
                    undo.pop_all()
                    return file
        beat()
        time.sleep(_ASK_S)


def _machine() -> bytes:
    """What locks of the kernel hold for: this boot of this machine, containers and all."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
    except OSError:  # not Linux
        return socket.gethostname().encode()


def _touch(file: IO[bytes], over: threading.Event) -> None:
    while not over.wait(LEASE_S / 4):
        with contextlib.suppress(OSError):  # a full disk, or one that is away for a while
            os.utime(file.fileno())


@contextmanager
def unfinished(target: Path) -> Iterator[IO[bytes]]:
    """A new file that becomes the raster at the end; gone if anything goes wrong. Within `claimed` alone.

    Raises OSError, and `LostClaim` where another process began to write it meanwhile.
    """
    part = part_of(target)
    part.unlink(missing_ok=True)  # a killed run's; one that still writes keeps writing into nothing
    with part.open("xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not is_same(file, part):
                raise LostClaim
            part.replace(target)
        except BaseException:
            if is_same(file, part):
                with contextlib.suppress(OSError):
                    part.unlink()
            raise
