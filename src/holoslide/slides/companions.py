"""Slides of several files: what belongs to the file that one names, and is not there."""

from __future__ import annotations

import re
from configparser import ConfigParser
from configparser import Error as IniError
from pathlib import Path

from holoslide.slides.facts import DAMAGE, shown

COPY_ALL = "copy the slide again, all its files"


def is_companioned(path: Path) -> bool:
    """Whether a file is but the cover of its slide: the pixels are in a folder beside it, whatever it holds."""
    return path.suffix.lower() in (".mrxs", ".vsi")


def missing_companion(path: Path) -> str | None:
    """The name of a file or folder that a slide's file stands for nothing without, if it is not there."""
    suffix = path.suffix.lower()
    if suffix == ".mrxs":
        return _missing_of_mrxs(path)
    if suffix == ".vsi" and not (path.with_name(f"_{path.stem}_")).is_dir():
        return f"the folder {shown(Path(f'_{path.stem}_'))}"
    return None


def files_named_in(path: Path) -> list[Path]:
    """Of a Hamamatsu VMS or VMU, which is but a text: the files beside it that it names, which hold the pixels."""
    parser = _listing(path, encoding="latin-1")
    if parser is None:
        return []
    values = {value for section in parser.sections() for _, value in parser.items(section) if value}
    return sorted(file for file in (path.parent / name for name in values) if file.is_file())


def _missing_of_mrxs(path: Path) -> str | None:
    folder = path.with_suffix("")
    name = shown(Path(folder.name))
    if not folder.is_dir():
        return f"the folder {name}"
    listing = folder / "Slidedat.ini"
    if not listing.is_file():
        return f"{name}/{listing.name}"
    parser = _listing(listing, encoding="utf-8-sig")
    if parser is None:
        return None
    names = [parser.get("HIERARCHICAL", "INDEXFILE", fallback="Index.dat")]
    if parser.has_section("DATAFILE"):
        names += [value for key, value in parser.items("DATAFILE") if re.fullmatch(r"file_\d+", key)]
    gone = [name for name in names if not (folder / name).is_file()]
    return f"{name}/{shown(Path(gone[0]))}" if gone else None


def _listing(path: Path, *, encoding: str) -> ConfigParser | None:
    """What a scanner's text says of a slide's files; None where it is damaged, which opening the slide will say.

    Scanners write what a strict reader refuses: a key twice, a colon in a key, a per cent sign in a name.
    """
    parser = ConfigParser(interpolation=None, strict=False, delimiters=("=",))
    try:
        parser.read_string(path.read_text(encoding=encoding))
    except (*DAMAGE, IniError):
        return None
    return parser
