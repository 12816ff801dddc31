"""TIFF by tifffile: OME-TIFF with its pyramid, and any TIFF without a vendor's marks, tiled, striped or BigTIFF.

Only the tiles or strips that a box touches are decoded, so memory follows the box.
"""

from __future__ import annotations

import math
import os
import re
import weakref
import xml.etree.ElementTree as ET
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holoslide.errors import SlideError
from holoslide.geometry import Box, ceil_div
from holoslide.slides.facts import (
    CACHE_BYTES,
    DAMAGE,
    DAMAGED,
    EXPORT_RGB,
    GLASS,
    ForkLock,
    Mpp,
    make_levels,
    mpp_from_resolution,
    number,
    one_line,
    orientation_of,
    over_glass,
    quiet,
    shown,
    unreadable,
)

ROWS_BYTES = 2**24  # whole rows of an uncompressed TIFF that are read at a time
MAX_SEGMENT_BYTES = 2**29  # one compressed strip or tile cannot be read in part

_OME_UNITS_UM = {"µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6}
_ASSOCIATED = re.compile(r"(?<![a-z])(label|macro|thumbnail|overview)(?![a-z])", re.IGNORECASE)  # words alone


def aperio_pages(path: Path, shapes: Sequence[tuple[int, int]]) -> list[TiffPixels]:
    """The levels of an SVS, of these shapes; none where it holds anything but plain tiles of RGB.

    JPEG and JPEG 2000 in RGB: that in YCbCr (33003) is left to OpenSlide, which converts its colours.
    """
    import tifffile

    quiet("tifffile")
    file = TiffFileBytes(path)
    try:
        with tifffile.TiffFile(path) as tiff:
            images: list[Any] = [page.keyframe for page in tiff.pages]
            tiled = [page for page in images if page.is_tiled and 0 not in page.databytecounts]
            levels = []
            for level, shape in enumerate(shapes):
                pages = [page for page in tiled if (page.imagelength, page.imagewidth) == shape]
                if len(pages) != 1 or pages[0].compression not in (7, 33005):
                    return []
                levels.append(TiffPixels(file, pages[0], level))
            return levels
    except (SlideError, *DAMAGE):
        return []  # OpenSlide has opened it, and will read it or say what is wrong


class TiffFileBytes:
    """A TIFF's bytes, safe to read from several threads and after a fork, and its decoded segments."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        self.close = weakref.finalize(self, os.close, self._descriptor)
        self._decoded: OrderedDict[tuple[int, int], NDArray[np.uint8] | None] = OrderedDict()
        self._held_bytes = 0
        self._lock = ForkLock()

    def read(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes; ValueError where the file ends early."""
        parts = []
        while count > 0:
            part = os.pread(self._descriptor, count, offset)
            if not part:
                message = "the file ends early"
                raise ValueError(message)
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return b"".join(parts)

    def cached(self, key: tuple[int, int]) -> tuple[bool, NDArray[np.uint8] | None]:
        """Whether a segment is at hand, and it."""
        with self._lock:
            if key not in self._decoded:
                return False, None
            self._decoded.move_to_end(key)
            return True, self._decoded[key]

    def keep(self, key: tuple[int, int], segment: NDArray[np.uint8] | None) -> None:
        """Keep a segment in place of those longest unused; the last one is kept whatever its size."""
        with self._lock:
            if key not in self._decoded:
                self._decoded[key] = segment
                self._held_bytes += 0 if segment is None else segment.nbytes
            while self._held_bytes > CACHE_BYTES and len(self._decoded) > 1:
                _, old = self._decoded.popitem(last=False)
                self._held_bytes -= 0 if old is None else old.nbytes


class TiffPixels:
    """One image of a TIFF, decoded tile by tile or strip by strip: only those that a box touches."""

    def __init__(self, file: TiffFileBytes, page: Any, level: int) -> None:
        self.file, self._level = file, level
        key = self._key = page.keyframe
        self.shape: tuple[int, int] = (key.imagelength, key.imagewidth)
        self._check()
        self._planes = key.planarconfig == 2
        # Strips stored as they are: any row can be read alone.
        self._raw_rows = bool(page.is_final) and not key.is_tiled
        self.in_strips = not key.is_tiled
        self._size = (
            (key.tilelength, key.tilewidth)
            if key.is_tiled
            else (max(1, min(key.rowsperstrip, self.shape[0])), self.shape[1])
        )
        self._offsets, self._counts = page.dataoffsets, page.databytecounts
        self._options = {}
        if key.compression in (6, 7, 34892, 33007):  # JPEG keeps its tables apart
            self._options = {"jpegtables": page.jpegtables, "jpegheader": key.jpegheader}
        if not self._raw_rows:
            if math.prod(self._size) * key.samplesperpixel > MAX_SEGMENT_BYTES:
                what = f"is compressed in pieces of {self._size[1]} x {self._size[0]} px, too large to decode"
                remedy = "save it as a tiled TIFF (vips tiffsave --tile --pyramid)"
                raise SlideError(shown(file.path), what, remedy)
            self._decode = key.decode

    def read(self, box: Box) -> NDArray[np.uint8]:
        """RGB (h, w, 3) of a box inside the image."""
        out = np.empty((*box.shape, self._key.samplesperpixel), np.uint8)
        try:
            if self._raw_rows:
                self._read_rows(box, out)
            else:
                for part, plane, values in self._segments(box):
                    target = out[part.relative_to(box).slices]
                    if plane is None:
                        target[:] = values
                    else:
                        target[..., plane] = values[..., 0]
        except DAMAGE as error:
            raise unreadable(self.file.path, self._level, box, error) from error
        return self._rgb(out)

    def _segments(self, box: Box) -> Iterator[tuple[Box, int | None, NDArray[np.uint8]]]:
        """For each tile or strip in a box: the part of the box, the plane (None: all), the pixels."""
        (h, w), (height, width) = self._size, self.shape
        across, down = ceil_div(width, w), ceil_div(height, h)
        for row in range(box.top // h, ceil_div(box.bottom, h)):
            for column in range(box.left // w, ceil_div(box.right, w)):
                segment = Box.at(row * h, column * w, h, w)
                part = segment.intersect(box)
                for plane in range(self._key.samplesperpixel) if self._planes else (None,):
                    values = self._segment(((plane or 0) * down + row) * across + column)
                    if values is None:
                        blank = np.broadcast_to(np.array(GLASS[0], np.uint8), (*part.shape, 1))
                        yield part, plane, blank
                    else:
                        yield part, plane, values[part.relative_to(segment).slices]

    def _segment(self, index: int) -> NDArray[np.uint8] | None:
        """A decoded tile or strip (h, w, samples); None where the file leaves it out."""
        key = (self._level, index)
        known, values = self.file.cached(key)
        if known:
            return values
        offset, count = self._offsets[index], self._counts[index]
        if count:
            data = self.file.read(offset, count)
            decoded, _, _ = self._decode(data, index, **self._options)
            values = decoded[0]
        self.file.keep(key, values)
        return values

    def _read_rows(self, box: Box, out: NDArray[np.uint8]) -> None:
        samples = self._key.samplesperpixel
        planes, depth = (samples, 1) if self._planes else (1, samples)
        row_bytes = self.shape[1] * depth
        at_once = max(1, ROWS_BYTES // row_bytes)
        for plane in range(planes):
            for top in range(box.top, box.bottom, at_once):
                count = min(at_once, box.bottom - top)
                start = self._offsets[0] + (plane * self.shape[0] + top) * row_bytes
                data = self.file.read(start, count * row_bytes)
                rows = np.frombuffer(data, np.uint8).reshape(count, self.shape[1], depth)
                target = out[top - box.top : top - box.top + count]
                target[..., plane : plane + depth] = rows[:, box.left : box.right]

    def _rgb(self, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        samples = values.shape[2]
        if samples <= 2:
            grey = 255 - values[..., :1] if self._key.photometric == 0 else values[..., :1]
            values = np.concatenate([np.repeat(grey, 3, axis=2), values[..., 1:]], axis=2)
        if samples in (1, 3):
            return values
        if self._key.extrasamples == (0,) and values[..., 3].min(initial=255) < 255:
            what = "has a channel beside its colours, and does not say whether it is transparency"
            raise SlideError(shown(self.file.path), what, "save it without that channel, as RGB")
        return over_glass(values, premultiplied=self._key.extrasamples == (1,))

    def _check(self) -> None:
        """Refuse what is not 8-bit RGB or grey, with or without transparency."""
        key, where = self._key, shown(self.file.path)
        if 0 in self.shape:
            raise SlideError(where, "has no pixels", DAMAGED)
        if key.bitspersample != 8 or key.sampleformat != 1:
            kind = {1: "unsigned", 2: "signed", 3: "floating-point"}.get(key.sampleformat, "complex")
            raise SlideError(where, f"has {key.bitspersample}-bit {kind} samples", EXPORT_RGB)
        colours = {0: 1, 1: 1, 2: 3, 6: 3}.get(key.photometric)  # grey from white, from black, RGB, YCbCr
        if colours is None or (key.photometric == 6 and key.compression not in (6, 7)):
            name = getattr(key.photometric, "name", key.photometric)
            raise SlideError(where, f"has pixels of kind {name}, neither RGB nor grey", EXPORT_RGB)
        if not colours <= key.samplesperpixel <= colours + 1:
            raise SlideError(where, f"has {key.samplesperpixel} channels", EXPORT_RGB)


class TiffBackend:
    """OME-TIFF with its pyramid, and any TIFF that bears no vendor's marks: tiled, striped, BigTIFF."""

    def __init__(self, path: Path) -> None:
        import tifffile

        quiet("tifffile")
        self._file = TiffFileBytes(path)
        try:
            with tifffile.TiffFile(path) as tiff:
                self.vendor = "ome-tiff" if tiff.is_ome else "generic-tiff"
                pages, image = _ome_pages(path, tiff) if tiff.is_ome else (_plain_pages(path, tiff), None)
                self._pages = [TiffPixels(self._file, page, level) for level, page in enumerate(pages)]
                base = pages[0].keyframe
                self.pixels = "8-bit RGB" if base.samplesperpixel > 2 else "8-bit grey, shown as RGB"
                self.mpp = None if image is None else _ome_mpp(image)
                if self.mpp is None:
                    self.mpp = _tag_mpp(base)
                self.icc_profile = _icc_profile(base)
                self.orientation = orientation_of(base.tags.valueof("Orientation"))
                self.objective_power = None if image is None else _ome_power(tiff.ome_metadata or "", image)
        except DAMAGE as error:
            raise SlideError(shown(path), f"is not a readable TIFF ({one_line(error)})", DAMAGED) from error
        self.levels = make_levels([page.shape for page in self._pages])
        self.bounds_l0 = Box(0, 0, *self.levels[0].shape)

    def in_strips(self, level: int) -> bool:
        """See `Backend`."""
        return self._pages[level].in_strips

    def read_level(self, level: int, box: Box) -> NDArray[np.uint8]:
        """See `Backend`."""
        return self._pages[level].read(box)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def _plain_pages(path: Path, tiff: Any) -> list[Any]:
    """The largest image and its smaller copies, finest first; several different images are refused.

    A copy says that it is one, as OpenSlide wants it, too: two squares of tissue are of one form as well.
    """
    pages = []
    for series in tiff.series:
        _one_plane(path, series)
        pages += [page for level in series.levels for page in level.pages if page is not None]
    pages.sort(key=lambda page: -page.keyframe.imagelength * page.keyframe.imagewidth)
    if not pages:
        raise SlideError(shown(path), "holds no image", DAMAGED)
    height, width = pages[0].keyframe.imagelength, pages[0].keyframe.imagewidth
    levels = pages[:1]
    for page in pages[1:]:
        h, w = page.keyframe.imagelength, page.keyframe.imagewidth
        if not (page.is_subifd or getattr(page, "subfiletype", 0) & 1):
            what = f"holds several images ({width} x {height} and {w} x {h} px), not marked as smaller copies"
            remedy = "save the one that is the slide to a file of its own (vips tiffsave --tile --pyramid)"
            raise SlideError(shown(path), what, remedy)
        alike = abs(h * width - w * height) <= max(height, width)  # the same form, but for a rounded pixel
        if alike and h < levels[-1].keyframe.imagelength:  # a copy of another form is a label or a macro
            levels.append(page)
    return levels


def _ome_pages(path: Path, tiff: Any) -> tuple[list[Any], ET.Element]:
    """The levels of the one image that is the slide, and its description."""
    series = list(tiff.series)
    try:
        images = ET.fromstring(tiff.ome_metadata).findall("{*}Image")
    except ET.ParseError as error:
        raise SlideError(shown(path), f"has broken OME-XML ({error})", "export it again") from error
    if len(images) != len(series):
        what = f"its OME-XML tells of {len(images)} images, the file holds {len(series)}"
        raise SlideError(shown(path), what, "export it again, as a single OME-TIFF")
    slides = [
        (one, image)
        for one, image in zip(series, images, strict=True)
        if len(series) == 1 or not _ASSOCIATED.search(one.name or "")
    ]
    if len(slides) != 1:
        what = f"holds {len(slides)} images ({', '.join(one_line(one.name) for one, _ in slides[:5])})"
        raise SlideError(shown(path), what, "save the one that is the slide to a file of its own")
    one, image = slides[0]
    _one_plane(path, one)
    if one.keyframe.samplesperpixel < 3:
        what = "holds one grey channel, as fluorescence does"
        raise SlideError(shown(path), what, EXPORT_RGB)
    return [level.pages[0] for level in one.levels], image


def _one_plane(path: Path, series: Any) -> None:
    """Refuse stacks, time series and channels stored one by one."""
    names = {"C": "channels", "Z": "z-planes", "T": "time points"}
    sizes = dict(zip(series.axes, series.shape, strict=True))
    extra = {axis: size for axis, size in sizes.items() if axis not in "YXS" and size > 1}
    if extra:
        said = " x ".join(f"{size} {names.get(axis, 'images')}" for axis, size in extra.items())
        what = f"holds {said}: fluorescence, multi-channel or a stack"
        raise SlideError(shown(path), what, EXPORT_RGB)


def _ome_mpp(image: ET.Element) -> Mpp | None:
    pixels = image.find("{*}Pixels")
    if pixels is None:
        return None
    sides = []
    for axis in "YX":
        size = number(pixels.get(f"PhysicalSize{axis}"))
        unit = _OME_UNITS_UM.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        if size is None or unit is None:
            return None
        sides.append(size * unit)
    return Mpp(sides[0], sides[1], "slide")


def _ome_power(xml: str, image: ET.Element) -> float | None:
    settings = image.find("{*}ObjectiveSettings")
    for objective in ET.fromstring(xml).iterfind("{*}Instrument/{*}Objective"):
        if settings is not None and objective.get("ID") == settings.get("ID"):
            return number(objective.get("NominalMagnification"))
    return None


def _icc_profile(page: Any) -> bytes | None:
    value = page.tags.valueof("InterColorProfile")
    return value if isinstance(value, bytes) else None


def _tag_mpp(page: Any) -> Mpp | None:
    values: list[float | None] = []
    for name in ("YResolution", "XResolution"):
        tag = page.tags.get(name)
        over, under = tag.value if tag is not None else (0, 1)
        values.append(over / under if under else None)
    unit = page.tags.get("ResolutionUnit")
    return mpp_from_resolution(values[0], values[1], None if unit is None else int(unit.value))
