"""Which file is a slide's: by the table's path, by file name, or by id, anywhere under a folder."""

from __future__ import annotations

import os
import unicodedata
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from holoslide.errors import CohortError
from holoslide.slides.facts import shown
from holoslide.slides.findings import Finding, some
from holoslide.slides.omezarr import is_zarr
from holoslide.slides.raster import is_raster
from holoslide.slides.source import dicom_series
from holoslide.slides.tables import file_name, is_picture, slide_name

# Slides of other scanners and programs, and pictures, that nothing here reads: what lies beside them may be litter.
_FOREIGN = (".bmp", ".gif", ".heic", ".i2syntax", ".isyntax", ".j2k", ".jp2", ".jxl", ".kfb", ".lif", ".mds",
            ".mdsx", ".oir", ".sdpc", ".tmap", ".tron", ".webp")  # fmt: skip
_UNREAD = "of a kind that is not read"
_AS_TIFF = "save it as pyramidal TIFF (vips tiffsave --tile --pyramid)"


class SlideFiles:
    """The slide files under `slides`, if given; paths of a table are relative to its own folder, or to that."""

    def __init__(self, table_folder: Path, slides: Path | None) -> None:
        self.slides = slides
        self._folders = [table_folder] if slides is None else [table_folder, slides]
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        self._by_id: dict[str, list[Path]] = defaultdict(list)
        self._dicom: dict[str, list[Path]] = defaultdict(list)  # folders of parts, by name
        self._homes: set[str] = set()  # the names of all folders
        self._foreign: list[Path] = []
        self._series: dict[bytes, Path] = {}  # the first file of each that a path has named
        if slides is not None:
            self._walk(slides)
        self._names = sorted(self._by_name)

    def find(
        self, slide_id: str, *, name: str | None, path: str | None, row: int | None = None
    ) -> Path | Finding | None:
        """The slide's file, as an absolute path, or what is wrong; None where nobody said where to look.

        `name` is the file's name with extension, maybe below a folder, `path` the table's path.
        """
        if path is not None:
            return self._told(slide_id, path, row)
        if self.slides is None:
            return None
        below = _slide_at(self.slides / name) if name is not None and "/" in name else None
        if below is not None and not is_raster(below):
            return below
        every = self._named(name) if name is not None else self._with_id(slide_id)
        found = [path for path in every if not is_raster(path)]  # those may lie below the slides' folder
        if len(found) == 1:
            what = f"{shown(found[0])} is there, but cannot be read, or is a link to nothing"
            return _slide_at(found[0]) or _missing(slide_id, row, what, "mend it")
        if found:
            which = some([shown(each.relative_to(self.slides)) for each in found])
            what = f"{len(found)} files could be it ({which})"
            return Finding.of_slide(
                "error", "ambiguous file", slide_id, what, "give the table a path column", row
            )
        what = f"no file {name or slide_id + '.*'} under {shown(self.slides)}"
        if every:
            what += f", only a prepared slide, {shown(every[0].relative_to(self.slides))}"
        foreign = [path for path in self._foreign if _plain(path.stem) == _plain(slide_id)]
        if foreign:
            return _missing(slide_id, row, f"{shown(foreign[0])} is {_UNREAD}", _AS_TIFF)
        near = None if every else self._near(slide_id)
        return _missing(
            slide_id, row, what, f"did you mean {near}?" if near else "add it, or take the row out"
        )

    def _told(self, slide_id: str, path: str, row: int | None) -> Path | Finding:
        """The file that the table's path names."""
        found = self._at(path)
        if found is None and any((folder / path.replace("\\", "/")).is_dir() for folder in self._folders):
            what, remedy = f"{shown(Path(path))} is a folder, and no slide", "name the files in it"
            return _missing(slide_id, row, what, remedy)
        if found is None:
            return _missing(slide_id, row, f"there is no file {shown(Path(path))}", "mend its path")
        if is_raster(found):
            what = f"{shown(Path(path))} is a prepared slide, not the slide itself"
            return _missing(slide_id, row, what, "give the file that it was made from")
        series = _series_of(found)
        first = self._series.setdefault(series, found) if series is not None else found
        if first != found:
            what = f"{shown(Path(path))} is of the same DICOM slide as {shown(first)}"
            return Finding.of_slide(
                "error", "same file twice", slide_id, what, "name one file of each slide", row
            )
        return found

    def beside(self, path: str) -> Path | None:
        """A file that the table names, as an absolute path, whether or not it is there; None for no name."""
        if not path:
            return None
        tries = [(folder / path.replace("\\", "/")).absolute() for folder in self._folders]
        return next((each for each in tries if each.is_file()), tries[0])

    def every(self) -> tuple[list[Path], list[Finding]]:
        """Every slide below the folder, in order, and what was passed over; a folder of DICOM files is one slide.

        PNG and JPEG are slides where there is nothing else, else thumbnails; prepared slides are none.
        """
        apart = [each for folders in self._dicom.values() for each in folders if each.parent != self.slides]
        found = [path for paths in self._by_name.values() for path in paths]
        found = [path for path in found if path.parent not in apart or path.suffix.lower() != ".dcm"] + apart
        pictures = sorted(path for path in found if is_picture(path.name))
        notes, where = [], shown(self.slides or Path())
        if self._foreign:
            what = f"{some([shown(path) for path in sorted(self._foreign)])}: {_UNREAD}"
            notes.append(
                Finding("warning", "file without a row", where, what, f"if one is a slide, {_AS_TIFF}")
            )
        if len(found) > len(pictures) > 0:
            what = f"PNG and JPEG are taken for thumbnails ({some([shown(path) for path in pictures])})"
            remedy = "add a row for one that is a slide"
            notes.append(Finding("warning", "file without a row", where, what, remedy))
            found = [path for path in found if not is_picture(path.name)]
        return [path for path in _one_each(found) if not is_raster(path)], notes

    def without_row(self, used: set[Path], ids: set[str], table: str) -> list[Finding]:
        """A warning where slide files lie in the folder that no row of the table has; pictures may be anything.

        What is named as a slide of the table is not meant: if it is not the slide's file, that is said elsewhere.
        """
        named = {_plain(slide_id) for slide_id in ids}
        homes = {
            path.parent for path in used if path.suffix.lower() == ".dcm"
        }  # of series, one part of which is used
        idle = [
            path
            for slide_id, paths in self._by_id.items()
            for path in paths
            if slide_id not in named
            and path.absolute() not in used
            and path.parent.absolute() not in homes
            and not is_picture(path.name)
            and not is_raster(path)
        ]
        if not idle or self.slides is None:
            return []
        names = [shown(path.relative_to(self.slides)) for path in sorted(idle)]
        files = f"{len(names)} slide file{'s' * (len(names) != 1)}"
        what = f"has no row for {files} under {shown(self.slides)} ({some(names)})"
        remedy = "add rows, if they should count"
        return [Finding("warning", "file without a row", table, what, remedy)]

    def _at(self, path: str) -> Path | None:
        tries = (_slide_at(folder / path.replace("\\", "/")) for folder in self._folders)
        return next((found for found in tries if found is not None), None)

    def _named(self, name: str) -> list[Path]:
        """Files of that name; in the folder that is named with it, too, if there is one of that name."""
        folder, _, last = name.rpartition("/")
        found, home = self._by_name.get(_plain(last), []), _plain(folder.rpartition("/")[2])
        return [path for path in found if home not in self._homes or home in map(_plain, path.parts[:-1])]

    def _with_id(self, slide_id: str) -> list[Path]:
        """Its slides; a PNG or JPEG beside one is taken for a thumbnail."""
        found = self._by_id.get(_plain(slide_id)) or self._dicom.get(_plain(slide_id), [])
        return [path for path in found if not is_picture(path.name)] or found

    def _near(self, slide_id: str) -> str | None:
        """A file whose name begins with the id."""
        at = bisect_left(self._names, _plain(slide_id))
        begins = at < len(self._names) and self._names[at].startswith(_plain(slide_id))
        return self._names[at] if begins else None

    def _walk(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CohortError(shown(folder), "is no folder", "give the folder of the slide files")
        seen = set()  # links may lead round in circles
        for place, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
            status = Path(place).stat()
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            self._homes.update(map(_plain, folders))
            chunked = sorted(name for name in folders if is_zarr(Path(place, name)))
            folders[:] = sorted(set(folders) - set(chunked))  # a Zarr's own folders are many, and no slides
            for name in sorted([*files, *chunked]):
                if name in chunked or (file_name(name) is not None and not name.startswith("._")):
                    self._by_name[_plain(name)].append(Path(place, name))  # ._x is macOS's shadow of x
                    self._by_id[_plain(slide_name(name))].append(Path(place, name))
                elif name.lower().endswith(_FOREIGN) and not name.startswith("._"):
                    self._foreign.append(Path(place, name))
            if Path(place) != folder and _holds_dicom(Path(place), files):
                self._dicom[_plain(Path(place).name)].append(Path(place))


def _refuse(error: OSError) -> None:
    raise CohortError(error.filename, f"cannot be read ({error.strerror})", "give it leave to be read")


def _slide_at(path: Path) -> Path | None:
    """What is opened for a path, absolute: a file, an OME-Zarr, the first of a folder of DICOM files; else None."""
    try:
        found = _of_folder(path) if path.is_dir() else path if path.is_file() else None
    except OSError:
        return None
    return None if found is None else found.absolute()


def _of_folder(folder: Path) -> Path | None:
    """The folder itself where it is an OME-Zarr, or holds several DICOM slides: opening it will say so."""
    if is_zarr(folder):
        return folder
    parts = _dicom_names([each.name for each in folder.iterdir() if each.is_file()])
    series = {dicom_series(folder / part) for part in parts} - {None}
    if len(series) > 1:
        return folder
    return folder / parts[0] if parts and (series or parts[0].lower().endswith(".dcm")) else None


def _series_of(path: Path) -> bytes | None:
    """The DICOM series of a file; None for others, and for what cannot be read, which opening it will say."""
    try:
        return dicom_series(path) if path.suffix.lower() == ".dcm" and path.is_file() else None
    except OSError:
        return None


def _holds_dicom(folder: Path, names: list[str]) -> bool:
    parts = _dicom_names(names)
    try:
        return bool(parts) and (
            parts[0].lower().endswith(".dcm") or dicom_series(folder / parts[0]) is not None
        )
    except OSError:
        return False


def _one_each(paths: Iterable[Path]) -> list[Path]:
    """The paths, of a DICOM series the first."""
    first: dict[Path | bytes, Path] = {}
    for path in sorted(paths):
        first.setdefault(_series_of(path) or path, path)
    return list(first.values())


def _dicom_names(names: list[str]) -> list[str]:
    """Those of a folder's files that can be DICOM: by extension, or all, as archives drop it."""
    seen = sorted(name for name in names if name[:1] != "." and name != "DICOMDIR")
    return [name for name in seen if name.lower().endswith(".dcm")] or seen


def _missing(slide_id: str, row: int | None, what: str, remedy: str) -> Finding:
    return Finding.of_slide("error", "missing file", slide_id, what, remedy, row)


def _plain(name: str) -> str:
    """One form for names that look the same: macOS writes accents apart."""
    return unicodedata.normalize("NFC", name)
