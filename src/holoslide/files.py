"""Files that are never seen half written, and locks of those that have one writer."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

UNREADABLE = (
    OSError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
"""What `torch.load` and `numpy.load` raise for a file that is something else, or cut short."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # of a file system that has none


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write under a temporary name, on to the disk, and rename: `path` is the old file or the new one.

    Raises OSError, with the file's name, where the disk does not take it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with _alone(temporary) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        except BaseException as error:
            temporary.unlink(missing_ok=True)  # half a file on a disk that may be full
            if isinstance(error, OSError) and error.errno and error.filename is None:
                error.filename = str(path)  # a write does not know it
            raise
        temporary.replace(path)
    sync(path.parent)


@contextmanager
def _alone(path: Path) -> Iterator[IO[bytes]]:
    """An empty file to write, once nobody else does; what a killed process left in it is gone."""
    while True:
        with open(path, "r+b", opener=_made) as file:  # opened by its name, which tifffile asks for
            lock(file, wait=True)
            if is_same(file, path):  # who had it has not renamed it meanwhile
                file.truncate(0)
                yield file
                return


def _made(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def is_same(file: IO[Any], path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def sync(path: Path) -> None:
    """Let a file's bytes, or a folder's names, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock an open file; whether no other process on this machine has it. A lock dies with its holder.

    Where the file system has no locks, nobody can tell. Raises OSError.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def write_text(text: str, path: Path) -> None:
    """A text, whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(values: object, path: Path) -> None:
    """Plain values as JSON, whole or not at all."""
    write_text(json.dumps(values, indent=2), path)


def write_rows(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """A CSV of equal rows, whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["slide_id"])
    writer.writeheader()
    writer.writerows(rows)
    write_text(text.getvalue(), path)
