"""Which files a slide is made of, and whether they are the ones a raster was made from, without reading them anew.

A slide's hash is taken once. Beside the raster lies a note of it, with size and time of each file; as long as
these are the same, so is the hash. The note decides nothing but this: without it the slide is hashed again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

from holoslide.errors import SlideError
from holoslide.slides.facts import shown

CHUNK_BYTES = 2**24
SETTLED_NS = 2 * 10**9  # coarsest clock of a file system: a file changed within it may bear the same time


@dataclass(frozen=True, slots=True)
class Stamp:
    """A slide's files, by name: size in bytes and time of the last change in ns."""

    files: tuple[tuple[str, int, int], ...]


def stamp_of(path: Path) -> Stamp:
    """The stamp of a slide as it is now. Raises `SlideError`."""
    try:
        states = [(file, file.stat()) for file in slide_files(path)]
    except OSError as error:
        raise SlideError(shown(path), f"cannot be read ({error.strerror})", "check the file") from error
    return Stamp(tuple((_name(path, file), state.st_size, state.st_mtime_ns) for file, state in states))


def slide_sha256(path: Path, beat: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a slide's file; of all of them where it has several (MRXS, DICOM). Raises `SlideError`."""
    try:
        digests = {_name(path, each): _sha256(each, beat) for each in slide_files(path)}
    except OSError as error:
        raise SlideError(shown(path), f"cannot be read ({error.strerror})", "check the file") from error
    if len(digests) == 1:
        return next(iter(digests.values()))
    listing = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()


def _name(slide: Path, file: Path) -> str:
    """A file's name within its slide: in a folder of chunks, many are called 0."""
    return file.relative_to(slide).as_posix() if slide.is_dir() else file.name


def _sha256(path: Path, beat: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            beat()
    return digest.hexdigest()


def slide_files(path: Path) -> list[Path]:
    """The file itself, and those of the same slide beside it; of an OME-Zarr, all files of the folder."""
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.is_file())
    if path.suffix.lower() == ".mrxs":
        folder = path.with_suffix("")
        return [path, *sorted(p for p in folder.iterdir() if p.is_file())] if folder.is_dir() else [path]
    series = dicom_series(path)
    if series is None:
        return [path]
    siblings = {p for p in path.parent.iterdir() if p.is_file() and dicom_series(p) == series}
    return sorted(siblings | {path})


def file_key(path: Path) -> Hashable:
    """The same for all names and links of a file."""
    try:
        status = path.stat()
    except OSError:
        return path  # gone since it was found: opening it says so
    return status.st_dev, status.st_ino


def dicom_series(path: Path) -> bytes | None:
    """The series instance UID (0020,000E) of a DICOM file; None for other files."""
    with path.open("rb") as file:
        head = file.read(132)
        if head[128:] != b"DICM":
            return None
        found = re.search(rb"\x20\x00\x0e\x00(?:UI..|....)([0-9.]{5,64})", file.read(2**16), re.DOTALL)
    return found[1] if found else None


# --- The note beside a raster -------------------------------------------------------------------------------


def note_of(target: Path) -> Path:
    """Where the note of a raster is."""
    return target.with_name(f".{target.name}.source")


def noted_sha256(target: Path, stamp: Stamp) -> str | None:
    """The slide's hash by the note beside its raster; None where there is none that can be trusted."""
    note = note_of(target)
    try:
        noted_ns = note.stat().st_mtime_ns
        values = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or values.get("files") != [list(each) for each in stamp.files]:
        return None
    if any(changed_ns + SETTLED_NS > noted_ns for _, _, changed_ns in stamp.files):
        return None
    sha256 = values.get("sha256")
    return sha256 if isinstance(sha256, str) else None


def write_note(target: Path, stamp: Stamp, sha256: str) -> None:
    """Note a slide's hash; the same text for the same slide."""
    text = json.dumps({"files": stamp.files, "sha256": sha256})
    note = note_of(target)
    new = note.with_name(f"{note.name}.new")
    new.write_text(text, encoding="utf-8", errors="surrogateescape")
    new.replace(note)
