"""One writer for each raster, also on several machines, and nothing left behind by those that were killed.

A claim is a lease (a file beside the raster, which its holder touches every few seconds), because locks of the
kernel do not reach across every network file system. The lease of a process that died on this machine is taken
over at once, one of another machine when it was not touched for `LEASE_S`. A holder that merely slept too long
finds its unfinished file replaced, and gives way. Equal recipes give equal bytes: even two writers do no harm.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from holoslide.errors import SlideError
from holoslide.slides.facts import shown

LEASE_S = 60.0
_ASK_S = 2.0  # how often a process that waits says that it is alive


def part_of(target: Path) -> Path:
    """The name of a raster while it is written."""
    return target.with_name(f".{target.name}.part")


def claim_of(target: Path) -> Path:
    """The name of the lease."""
    return target.with_name(f".{target.name}.lock")


def is_clean(target: Path) -> bool:
    """Whether nobody writes the raster, nor left anything when killed."""
    return not (part_of(target).exists() or claim_of(target).exists())


@contextmanager
def claimed(target: Path, beat: Callable[[], None]) -> Iterator[None]:
    """Wait until nobody else writes the raster, then keep others out. Raises OSError."""
    from filelock import SoftFileLease, Timeout

    lease = SoftFileLease(claim_of(target), lease_duration=LEASE_S, poll_interval=0.2)
    while True:
        try:
            lease.acquire(timeout=_ASK_S)
        except Timeout:
            beat()
            continue
        break
    try:
        yield
    finally:
        lease.release()


@contextmanager
def unfinished(target: Path) -> Iterator[IO[bytes]]:
    """A new file that becomes the raster at the end; gone if anything goes wrong. Within `claimed` alone.

    Raises OSError, and `SlideError` where the claim was lost meanwhile.
    """
    part = part_of(target)
    part.unlink(missing_ok=True)  # a killed run's; one that still writes keeps writing into nothing
    with part.open("xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if not _is_same(file, part):
                what = "was taken over by another process while it was written"
                raise SlideError(shown(target), what, "run it again, once no other process is at it")
            part.replace(target)
        except BaseException:
            if _is_same(file, part):
                with contextlib.suppress(OSError):
                    part.unlink()
            raise


def _is_same(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
