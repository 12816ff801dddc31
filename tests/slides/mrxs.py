"""MRXS slides as MIRAX scanners lay them out, in the little that OpenSlide reads: one level of JPEG tiles."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE_PX = 256
_VERSION, _SLIDE_ID = b"01.02", b"0123456789ABCDEF0123456789ABCDEF"
_LISTING = """[GENERAL]
SLIDE_ID = {slide_id}
IMAGENUMBER_X = {across}
IMAGENUMBER_Y = {down}
OBJECTIVE_MAGNIFICATION = 20
CameraImageDivisionsPerSide = 1
[HIERARCHICAL]
HIER_COUNT = 1
NONHIER_COUNT = 0
INDEXFILE = Index.dat
HIER_0_NAME = Slide zoom level
HIER_0_COUNT = 1
HIER_0_VAL_0 = ZoomLevel_0
HIER_0_VAL_0_SECTION = LAYER_0_LEVEL_0_SECTION
[DATAFILE]
FILE_COUNT = 1
FILE_0 = Data0000.dat
[LAYER_0_LEVEL_0_SECTION]
OVERLAP_X = 0
OVERLAP_Y = 0
MICROMETER_PER_PIXEL_X = {mpp_x}
MICROMETER_PER_PIXEL_Y = {mpp}
IMAGE_FILL_COLOR_BGR = 16777215
IMAGE_FORMAT = JPEG
IMAGE_CONCAT_FACTOR = 0
DIGITIZER_WIDTH = {side}
DIGITIZER_HEIGHT = {side}
"""


def write_mrxs(
    path: Path, rgb: NDArray[np.uint8], *, scanned: NDArray[np.bool_], mpp: float, mpp_x: float | None = None
) -> Path:
    """A slide of whole tiles, `scanned` (rows, columns) of which are stored; a picture of it is the file itself.

    `mpp_x` where the pixels are not square.
    """
    folder = path.with_suffix("")
    folder.mkdir()
    path.write_bytes(_jpeg(rgb[::16, ::16]))  # real ones begin so, too
    head = _VERSION + _SLIDE_ID
    data, entries = bytearray(head), b""
    for row, column in np.argwhere(scanned).tolist():
        tile = _jpeg(rgb[row * SIDE_PX : (row + 1) * SIDE_PX, column * SIDE_PX : (column + 1) * SIDE_PX])
        entries += struct.pack("<4i", row * scanned.shape[1] + column, len(data), len(tile), 0)
        data += tile
    (folder / "Data0000.dat").write_bytes(data)
    records = len(head) + 8  # after the places of the two roots
    pages = struct.pack("<5i", records + 4, 0, records + 12, len(entries) // 16, 0) + entries
    roots = struct.pack("<2i", records, records + len(pages))
    (folder / "Index.dat").write_bytes(head + roots + pages + struct.pack("<i", 0))
    down, across = scanned.shape
    facts = {"across": across, "down": down, "side": SIDE_PX, "mpp": mpp, "mpp_x": mpp_x or mpp}
    listing = _LISTING.format(slide_id=_SLIDE_ID.decode(), **facts)
    (folder / "Slidedat.ini").write_text(listing, encoding="utf-8-sig")
    return path


def _jpeg(rgb: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()
