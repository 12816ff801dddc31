"""What opens slide files: OpenSlide for vendor formats and DICOM, tifffile for TIFF, Pillow for PNG and JPEG.

Optional: wsidicom for DICOM that OpenSlide refuses, zarr for OME-Zarr. A backend gives facts and the exact pixels
of any box of any level; `reader.py` makes rasters of them. Which formats were tried on what: `docs/formats.md`.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holoslide.errors import SlideError
from holoslide.geometry import Box
from holoslide.slides.companions import COPY_ALL, is_companioned, missing_companion
from holoslide.slides.dicom import WsidicomBackend, file_of_folder
from holoslide.slides.facts import (
    CACHE_BYTES,
    DAMAGE,
    DAMAGED,
    EXPORT_RGB,
    Backend,
    ForkLock,
    Mpp,
    bounds_from_properties,
    make_levels,
    mpp_from_properties,
    number,
    one_line,
    orientation_of,
    over_glass,
    shown,
    unreadable,
)
from holoslide.slides.omezarr import OmeZarrBackend, is_zarr
from holoslide.slides.tiff import TiffBackend, aperio_pages

MAX_IMAGE_PX = 2**28  # PNG and JPEG cannot be read in part: 0.8 GB as RGB


def open_backend(path: Path) -> Backend:
    """Open a slide by its content, whatever its name; SlideError if it is none, or cannot be used."""
    head = _head_of(path)
    if head is None:
        return _open_folder(path)
    lacking = missing_companion(path)
    if lacking is not None:
        raise SlideError(shown(path), f"lacks {lacking}, which belongs to it", COPY_ALL)
    is_cover = is_companioned(path)  # MRXS begins as JPEG, VSI as TIFF: small pictures of the slide
    if head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) and not is_cover:
        return ImageBackend(path, head)
    openslide = _import_openslide(path)
    is_dicom = head[128:] == b"DICM"
    try:
        vendor = openslide.OpenSlide.detect_format(path)
        if is_dicom and vendor is not None:
            openslide.OpenSlide(path).close()
    except openslide.OpenSlideError as error:
        if is_dicom:
            return WsidicomBackend(path, one_line(error))
        raise SlideError(shown(path), f"cannot be opened ({one_line(error)})", DAMAGED) from error
    if vendor not in (None, "generic-tiff"):
        return OpenSlideBackend(path)
    if is_dicom:
        return WsidicomBackend(path, "not known as a slide")
    if is_cover:
        what = f"is {path.suffix[1:].upper()} of a kind that OpenSlide does not read"
        raise SlideError(shown(path), what, "export it as OME-TIFF")
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return TiffBackend(path)
    what = "is not a slide in any known format"
    raise SlideError(shown(path), what, "give a slide OpenSlide knows, TIFF, PNG or JPEG")


def _head_of(path: Path) -> bytes | None:
    """A file's first bytes, not empty; None for a folder."""
    try:
        kind = path.stat().st_mode
        if stat.S_ISDIR(kind):
            return None
        if not stat.S_ISREG(kind):  # reading a pipe might wait for ever
            raise SlideError(shown(path), "is no file", "give a slide's file")
        with path.open("rb") as file:
            head = file.read(132)
    except FileNotFoundError:
        raise SlideError(shown(path), "there is no such file", "check the path") from None
    except OSError as error:
        raise SlideError(shown(path), f"cannot be opened ({error.strerror})", "check the file") from error
    if not head:
        raise SlideError(shown(path), "is empty (0 bytes)", "copy or export it again")
    return head


def _open_folder(path: Path) -> Backend:
    """A folder that is a slide: OME-Zarr, or the files of one DICOM series."""
    if is_zarr(path):
        return OmeZarrBackend(path)
    try:
        dicom = file_of_folder(path)
    except OSError as error:
        what = f"cannot be opened ({error.strerror})"
        raise SlideError(shown(path), what, "check the folder") from error
    if dicom is not None:
        return open_backend(dicom)
    remedy = "give a file, or a folder that is one slide: OME-Zarr, or the .dcm files of one"
    raise SlideError(shown(path), "is a folder", remedy)


def _import_openslide(path: Path) -> Any:
    try:
        import openslide
    except ImportError as error:
        remedy = "pip install openslide-python openslide-bin"
        raise SlideError(shown(path), f"needs OpenSlide ({error})", remedy) from error
    return openslide


class OpenSlideBackend:
    """Vendor formats and DICOM.

    OpenSlide addresses levels by level-0 pixel: where a level's downsampling is not whole (most SVS), boxes
    land between its pixels and are interpolated, so that pixels depend on the box. Aperio files are therefore
    decoded by tifffile, which gives OpenSlide's very pixels, and faster; the other formats are read there in
    cells of a fixed grid, so that a pixel is always the same, at most half a level-0 pixel off.
    """

    pixels = "8-bit RGB"
    orientation = 1
    _cell = 256

    def __init__(self, path: Path) -> None:
        self._path, self._lock, self._pid = path, ForkLock(), -1
        self._slide: Any = None
        self._inherited: Any = None
        openslide = _import_openslide(path)
        try:
            slide = self._handle()
            listed = {key: slide.properties.get(key) for key in slide.properties}
            self._ratios = tuple(slide.level_downsamples)
            shapes = [(height, width) for width, height in slide.level_dimensions]
        except openslide.OpenSlideError as error:
            raise SlideError(shown(path), f"cannot be opened ({one_line(error)})", DAMAGED) from error
        properties = {key: value for key, value in listed.items() if value is not None}
        self.vendor = properties.get("openslide.vendor", "unknown")
        self.levels = make_levels(shapes, self._ratios)
        self.mpp = mpp_from_properties(properties)
        self.objective_power = number(properties.get("openslide.objective-power"))
        self.bounds_l0 = bounds_from_properties(properties, shapes[0])
        self._pages = aperio_pages(path, shapes) if self.vendor == "aperio" else []
        self.icc_profile = self._find_profile()

    def in_strips(self, level: int) -> bool:
        """Never: all that OpenSlide opens is tiled, or as good as."""
        return False

    def read_level(self, level: int, box: Box) -> NDArray[np.uint8]:
        """See `Backend`."""
        if self._pages:
            return self._pages[level].read(box)
        if float(self._ratios[level]).is_integer():
            return self._region(level, box)
        out = np.empty((*box.shape, 3), np.uint8)
        frame = Box(0, 0, *self.levels[level].shape)
        for index in box.cover(self._cell).tiles(1):
            cell = index.times(self._cell).intersect(frame)
            part = cell.intersect(box)
            out[part.relative_to(box).slices] = self._region(level, cell)[part.relative_to(cell).slices]
        return out

    def close(self) -> None:
        """Let go of the files."""
        with self._lock:
            if self._slide is not None and self._pid == os.getpid():
                self._slide.close()
                self._slide = None
        for page in self._pages[:1]:
            page.file.close()

    def _find_profile(self) -> bytes | None:
        """As it is in the file: whether it can be used is seen when it is asked for."""
        profile: bytes | None = self._handle()._profile  # the public property parses it, and fails if damaged
        return profile

    def _region(self, level: int, box: Box) -> NDArray[np.uint8]:
        openslide, ratio = _import_openslide(self._path), self._ratios[level]
        corner = (round(box.left * ratio), round(box.top * ratio))
        try:
            image = self._handle().read_region(corner, level, (box.width, box.height))
        except openslide.OpenSlideError as error:
            raise unreadable(self._path, level, box, error) from error
        rgba = np.asarray(image)
        return np.asarray(image.convert("RGB")) if rgba[..., 3].min() == 255 else over_glass(rgba)

    def _handle(self) -> Any:
        """This process's handle: a forked worker must not use its parent's, whose locks and files it shares.

        Nor may it close that one, which takes the same locks: it is only kept.
        """
        with self._lock:
            if self._slide is None or self._pid != os.getpid():
                openslide = _import_openslide(self._path)
                self._inherited = self._slide
                self._slide = openslide.OpenSlide(self._path)
                self._slide.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
                self._pid = os.getpid()
            return self._slide


class ImageBackend:
    """A PNG or JPEG as a whole slide; decoded whole, 3 bytes per pixel, when first read."""

    objective_power: float | None = None
    mpp: Mpp | None = None  # their dots per inch are meant for printers

    def __init__(self, path: Path, head: bytes) -> None:
        self._path, self._lock = path, ForkLock()
        self._values: NDArray[np.uint8] | None = None
        self.vendor = "png" if head.startswith(b"\x89PNG") else "jpeg"
        if self.vendor == "png" and head[24:25] == b"\x10":
            raise SlideError(shown(path), "has 16-bit samples", EXPORT_RGB)
        with path.open("rb") as file:
            image = self._open(file)
            mode, (width, height) = image.mode, image.size
        if mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
            raise SlideError(shown(path), f"has pixels of kind {mode}, neither RGB nor grey", EXPORT_RGB)
        if width * height > MAX_IMAGE_PX:
            what = (
                f"is {width} x {height} px, too large for {self.vendor.upper()}, which must be decoded whole"
            )
            raise SlideError(shown(path), what, "save it as a tiled TIFF (vips tiffsave --tile --pyramid)")
        self.icc_profile: bytes | None = image.info.get("icc_profile")
        self.orientation = _exif_orientation(image.info.get("exif", b""))
        self.pixels = "8-bit grey, shown as RGB" if mode in ("1", "L", "LA") else "8-bit RGB"
        self.levels = make_levels([(height, width)])
        self.bounds_l0 = Box(0, 0, height, width)

    def in_strips(self, level: int) -> bool:
        """No: once decoded, every pixel is at hand."""
        return False

    def read_level(self, level: int, box: Box) -> NDArray[np.uint8]:
        """See `Backend`."""
        with self._lock:
            if self._values is None:
                self._values = self._decode(box)
        return self._values[box.slices]

    def close(self) -> None:
        """Let go of the pixels."""
        self._values = None

    def _open(self, file: Any) -> Any:
        """Pillow's reader of this very format; `Image.open` would warn of sizes that are usual here."""
        from PIL.JpegImagePlugin import JpegImageFile
        from PIL.PngImagePlugin import PngImageFile

        try:
            return PngImageFile(file) if self.vendor == "png" else JpegImageFile(file)
        except DAMAGE as error:
            what = f"is not a readable {self.vendor.upper()} ({one_line(error)})"
            raise SlideError(shown(self._path), what, DAMAGED) from error

    def _decode(self, box: Box) -> NDArray[np.uint8]:
        with self._path.open("rb") as file:
            image = self._open(file)
            try:
                if image.mode in ("LA", "P", "RGBA") or "transparency" in image.info:
                    return over_glass(np.asarray(image.convert("RGBA")))
                return np.asarray(image.convert("RGB"))
            except DAMAGE as error:
                raise unreadable(self._path, 0, box, error) from error


def _exif_orientation(data: bytes) -> int:
    from PIL.Image import Exif

    exif = Exif()
    try:
        exif.load(data)
        return orientation_of(exif.get(274))
    except DAMAGE:
        return 1
