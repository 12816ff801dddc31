"""Which files a slide is made of, and whether they are the ones a raster was made from, without reading them anew.

A slide's hash is taken once. Beside the raster lies a note of it, with the slide's path, and size and time of each
file; as long as these are the same, so is the hash: without the note the slide is hashed again. The path tells a
slide that was changed from another one of its name, whose raster is not to be replaced.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holoslide.errors import SlideError
from holoslide.slides.companions import files_named_in
from holoslide.slides.facts import shown

CHUNK_BYTES = 2**24
SETTLED_NS = 2 * 10**9  # coarsest clock of a file system: a file changed within it may bear the same time


@dataclass(frozen=True, slots=True)
class Stamp:
    """A slide's absolute path, and its files, by name: size in bytes and time of the last change in ns."""

    path: str
    files: tuple[tuple[str, int, int], ...]


def stamp_of(path: Path) -> Stamp:
    """The stamp of a slide as it is now. Raises `SlideError`."""
    try:
        states = [(file, file.stat()) for file in slide_files(path)]
    except OSError as error:
        raise SlideError(shown(path), f"cannot be read ({error.strerror})", "check the file") from error
    files = tuple((_name(path, file), state.st_size, state.st_mtime_ns) for file, state in states)
    return Stamp(str(path.absolute()), files)


def slide_sha256(path: Path, beat: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a slide's file; of all of them where it has several (MRXS, VMS, DICOM). Raises `SlideError`."""
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
    if path.suffix.lower() in (".vms", ".vmu"):
        return [path, *files_named_in(path)]
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
    values = _noted(target)
    if (values.get("slide"), values.get("files")) != (stamp.path, [list(each) for each in stamp.files]):
        return None
    if any(changed_ns + SETTLED_NS > values["noted_ns"] for _, _, changed_ns in stamp.files):
        return None
    sha256 = values.get("sha256")
    return sha256 if isinstance(sha256, str) else None


def noted_other(target: Path, path: Path, sha256: str) -> str | None:
    """The path of another slide, by the note that a raster was made of it: one in another place, and not a copy."""
    values = _noted(target)
    other = values.get("slide")
    if not isinstance(other, str) or values.get("sha256") == sha256:
        return None
    return None if Path(other) in {path.absolute(), *slide_files(path.absolute())} else other


def _noted(target: Path) -> dict[str, Any]:
    """What the note beside a raster says, and, as `noted_ns`, when it was written; empty where there is none."""
    note = note_of(target)
    try:
        values = json.loads(note.read_text(encoding="utf-8", errors="surrogateescape"))
        return {**values, "noted_ns": note.stat().st_mtime_ns} if isinstance(values, dict) else {}
    except (OSError, ValueError):
        return {}


def write_note(target: Path, stamp: Stamp, sha256: str) -> None:
    """Note a slide's hash; the same text for the same slide."""
    text = json.dumps({"slide": stamp.path, "files": stamp.files, "sha256": sha256})
    note = note_of(target)
    new = note.with_name(f"{note.name}.new")
    new.write_text(text, encoding="utf-8", errors="surrogateescape")
    new.replace(note)
