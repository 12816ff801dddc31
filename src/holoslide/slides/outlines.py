"""Users' own tissue masks, laid on a slide's thumbnail as they are: nothing is added, and nothing taken out.

| file | what it is |
| --- | --- |
| `.geojson`, `.json` | polygons in level-0 pixels, with holes: TRIDENT's `contours_geojson`, from the slide's first pixel; QuPath's annotations, from the corner of the scanned part, which is all that it shows. What QuPath classifies with a trailing asterisk (`Ignore*`) is taken out |
| `.pkl` | CLAM's contours: `tissue` and `holes` in level-0 pixels. Read without running what a pickle may hold |
| `.h5` | places of patches: `coords` of CLAM, TRIDENT or STAMP, see `coords.py` |
| `.png` | a picture of the whole slide, of any size: what is not 0 is tissue, what is transparent is not. With a palette, both numbers and colours must say so |
"""  # noqa: E501

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from holoslide.errors import SlideError
from holoslide.geometry import Box
from holoslide.slides.coords import read_patches
from holoslide.slides.facts import DAMAGE, one_line, shown
from holoslide.slides.morphology import Mask

SUFFIXES = (".geojson", ".json", ".pkl", ".h5", ".png")
NAMES = (*SUFFIXES, "_patches.h5")  # what follows a slide's id; the last is TRIDENT's
READING = "2"  # of H5 and palettes: to be raised where they are read otherwise, so that rasters are made anew
OVERHANG = 0.01  # of the slide's longer side: how far outlines may reach beyond it
SKEW = 0.02  # how much a picture's sides may differ in scale

FINE = 4  # polygons are drawn so much finer than the grid, as what an outline runs through is drawn with it
STRIP_PX = 256  # and as many rows at a time

Ring = NDArray[np.float64]  # (n, 2), x first, level-0 pixels
Polygon = list[Ring]  # the outline, then its holes


@dataclass(frozen=True, slots=True)
class Frame:
    """A grid on a slide of `shape_l0`: (h, w) of its cells, where the first begins, and level-0 pixels per cell.

    `scanned_l0` is the part that was scanned, where the slide says which.
    """

    shape: tuple[int, int]
    origin_l0: tuple[int, int]
    l0_per_px: tuple[float, float]
    shape_l0: tuple[int, int]
    um_per_l0: tuple[float, float] | None = None  # where it is known
    scanned_l0: Box | None = None


def outline_sha256(path: Path, scanned_l0: Box) -> str:
    """The SHA-256 of a mask's file, and of how it is read: of where the slide's scanned part begins, unless at the
    first pixel, and for some of the number of the reading.

    SlideError where it cannot be read.
    """
    data, corner = _bytes(path), (scanned_l0.top, scanned_l0.left)
    digest = hashlib.sha256(data)
    digest.update(repr(corner).encode() if any(corner) else b"")
    digest.update(READING.encode() if path.suffix.lower() == ".h5" or _has_palette(data) else b"")
    return digest.hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SlideError(shown(path), f"cannot be read ({error.strerror})", "mend the mask's path") from error


def read_outline(path: Path, frame: Frame) -> Mask:
    """A user's mask on a grid (h, w); SlideError for what is no mask of the slide."""
    data, suffix = _bytes(path), path.suffix.lower()
    if suffix == ".png":
        return _picture(data, path, frame)
    if suffix not in SUFFIXES:
        raise SlideError(shown(path), "is no mask in a known format", f"give {', '.join(SUFFIXES)}")
    ignored: list[Polygon] = []
    shown_l0 = Box(0, 0, *frame.shape_l0)  # what the program showed that the mask was drawn in
    if suffix == ".h5":
        kept = _squares(path, frame)
    elif suffix == ".pkl":
        kept = _contours(data, path)
    else:
        kept, ignored, is_qupaths = _geojson(data, path)
        shown_l0 = frame.scanned_l0 if is_qupaths and frame.scanned_l0 is not None else shown_l0
    _refuse_strange(kept, path, shown_l0)
    corner = shown_l0.left, shown_l0.top
    kept, ignored = ([[ring + corner for ring in each] for each in some] for some in (kept, ignored))
    return _fill(kept, frame) & ~_fill(ignored, frame)


def find_outline(folder: Path, slide_id: str) -> Path:
    """The mask of a slide in a folder, named by its id; SlideError if there is none, or more than one."""
    found = [path for path in (folder / f"{slide_id}{ending}" for ending in NAMES) if path.is_file()]
    if len(found) == 1:
        return found[0].absolute()
    if not found:
        remedy = (
            "add it; or name the masks in the table's mask column, where an empty cell lets holoslide look"
        )
        raise SlideError(slide_id, f"has no mask in {shown(folder)}", remedy)
    what = f"has {len(found)} masks: {', '.join(path.name for path in found)}"
    raise SlideError(slide_id, what, "keep one of them")


# --- Polygons -----------------------------------------------------------------------------------------------------


def _geojson(data: bytes, path: Path) -> tuple[list[Polygon], list[Polygon], bool]:
    """What is tissue, what is to be ignored, and whether QuPath wrote it, or a program that writes as it does."""
    kept: list[Polygon] = []
    ignored: list[Polygon] = []
    is_qupaths = False
    try:
        found = json.loads(data)
        for feature in _features(found):
            is_qupaths |= _is_qupaths(feature)
            polygons = _polygons(feature["geometry"] if feature.get("type") == "Feature" else feature)
            (ignored if _is_ignored(feature) else kept).extend(polygons)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"is no GeoJSON of polygons ({one_line(error)})"
        raise SlideError(shown(path), what, "export annotations with area as GeoJSON") from error
    return kept, ignored, is_qupaths


def _features(found: Any) -> list[Any]:
    if isinstance(found, list):
        return [each for one in found for each in _features(one)]
    if found["type"] == "FeatureCollection":
        return list(found["features"])
    return [found]


def _is_qupaths(feature: dict[str, Any]) -> bool:
    """By what every version of it writes with each object, and nobody else does."""
    return bool({"objectType", "object_type", "isLocked"} & set(feature.get("properties") or ()))


def _is_ignored(feature: dict[str, Any]) -> bool:
    classification = (feature.get("properties") or {}).get("classification") or {}
    return isinstance(classification, dict) and str(classification.get("name", "")).endswith("*")


def _polygons(geometry: dict[str, Any]) -> list[Polygon]:
    kind = geometry["type"]
    if kind == "GeometryCollection":
        return [polygon for each in geometry["geometries"] for polygon in _polygons(each)]
    if kind not in ("Polygon", "MultiPolygon"):
        message = f"a {kind} has no area"
        raise ValueError(message)
    several = geometry["coordinates"] if kind == "MultiPolygon" else [geometry["coordinates"]]
    return [[_ring([point[:2] for point in ring]) for ring in polygon] for polygon in several if polygon]


def _ring(points: Any) -> Ring:
    ring = np.asarray(points, np.float64)
    if ring.ndim != 2 or ring.shape[1] != 2 or len(ring) < 3 or not np.isfinite(ring).all():
        message = f"an outline of shape {ring.shape} is none"
        raise ValueError(message)
    return ring


class _Arrays(pickle.Unpickler):
    """A pickle that may hold numpy arrays and plain values, and runs nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if name in ("ndarray", "dtype") and module == "numpy":
            return getattr(np, name)
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]  # wherever this numpy has it
        message = f"it names {module}.{name}"
        raise pickle.UnpicklingError(message)


def _squares(path: Path, frame: Frame) -> list[Polygon]:
    """What the patches cover together."""
    from shapely import box, get_parts, union_all

    patches = read_patches(path)
    per = np.ones(2)
    if patches.is_um:
        if frame.um_per_l0 is None:
            what, remedy = (
                "is in micrometres, and the slide does not say what its pixels are",
                "give --slide-mpp",
            )
            raise SlideError(shown(path), what, remedy)
        per = 1 / np.array(frame.um_per_l0[::-1])
    low, high = patches.corners * per, (patches.corners + patches.side) * per
    limit = np.array(frame.shape_l0[::-1], np.float64)
    high = np.where(low < limit, np.minimum(high, limit), high)  # the last of a row may be padded
    whole = union_all(box(low[:, 0], low[:, 1], high[:, 0], high[:, 1]))
    return [
        [np.asarray(ring.coords)[:-1] for ring in (part.exterior, *part.interiors)]
        for part in get_parts(whole)
    ]


def _contours(data: bytes, path: Path) -> list[Polygon]:
    """CLAM's segmentation: `tissue`, a list of contours (n, 1, 2), and `holes`, a list of such lists."""
    try:
        found = _Arrays(io.BytesIO(data)).load()
        outlines = [np.asarray(contour).reshape(-1, 2) for contour in found["tissue"]]
        holes = [[np.asarray(hole).reshape(-1, 2) for hole in some] for some in found["holes"]]
        kept: list[Polygon] = [
            [_ring(outline), *(_ring(hole) for hole in inside if len(hole) > 2)]
            for outline, inside in zip(outlines, holes, strict=True)
            if len(outline) > 2
        ]
    except (*DAMAGE, pickle.UnpicklingError, EOFError, ImportError, AttributeError) as error:
        what = f"is no CLAM segmentation ({one_line(error)})"
        raise SlideError(shown(path), what, "give the file that CLAM's saveSegmentation wrote") from error
    return kept


def _refuse_strange(polygons: list[Polygon], path: Path, shown_l0: Box) -> None:
    """SlideError for outlines that hold nothing, or are not of this slide, of which a box is shown."""
    if not polygons:
        raise SlideError(shown(path), "holds no polygon", "draw the tissue, or leave the mask out")
    points = np.concatenate([polygon[0] for polygon in polygons])
    height, width = shown_l0.shape
    slack = OVERHANG * max(height, width)
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    if left < -slack or top < -slack or right > width + slack or bottom > height + slack:
        what = f"reaches x {left:.0f} to {right:.0f}, y {top:.0f} to {bottom:.0f}"
        what += f" on a slide of {width} x {height} pixels"
        remedy = "give a mask of this slide, in full-resolution pixels"
        if shown_l0.top or shown_l0.left:
            what += ", the scanned part, which QuPath shows"
            remedy += " from its corner (in QuPath: without --no-crop)"
        raise SlideError(shown(path), what, remedy)


def _fill(polygons: list[Polygon], frame: Frame) -> Mask:
    """The cells most of which is in a polygon and in none of its holes."""
    mask = np.zeros(frame.shape, np.bool_)
    scale = 1 / np.array(frame.l0_per_px[::-1])
    origin = np.array(frame.origin_l0[::-1])
    for polygon in polygons:
        rings = [(ring - origin) * scale for ring in polygon]
        low, high = rings[0].min(axis=0), rings[0].max(axis=0)
        left, top = (max(0, math.floor(value)) for value in low.tolist())
        right, bottom = (
            min(side, math.ceil(value)) for side, value in zip(frame.shape[::-1], high.tolist(), strict=True)
        )
        for row in range(top, bottom if right > left else top, STRIP_PX):
            rows = min(STRIP_PX, bottom - row)
            fine = np.zeros((rows * FINE, (right - left) * FINE), np.uint8)
            drawn = [np.rint(((ring - (left, row)) * FINE - 0.5) * 256).astype(np.int32) for ring in rings]
            cv2.fillPoly(fine, drawn, 255, shift=8)  # even-odd: a hole is outside
            shares = cv2.resize(fine, (right - left, rows), interpolation=cv2.INTER_AREA)
            mask[row : row + rows, left:right] |= shares > 127
    return mask


# --- Pictures -----------------------------------------------------------------------------------------------------


def _picture(data: bytes, path: Path, frame: Frame) -> Mask:
    """A PNG of the whole slide, read at the middle of each cell."""
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    except cv2.error as error:  # OpenCV's limit; what is damaged is None
        what = "has more than 2^30 pixels, too many to decode"
        raise SlideError(shown(path), what, "make it smaller: it may have any size") from error
    if picture is None:
        raise SlideError(shown(path), "is no PNG, or a damaged one", "export the mask again")
    found = _marked(picture, data, path)
    scales = [have / want for have, want in zip(found.shape, frame.shape_l0, strict=True)]
    rounding = 1 / min(found.shape)  # a thumbnail's sides are whole numbers
    if abs(scales[0] / scales[1] - 1) > SKEW + rounding:
        height, width = frame.shape_l0
        what = f"is a picture of {found.shape[1]} x {found.shape[0]} pixels, the slide has {width} x {height}"
        raise SlideError(shown(path), what, "give a picture of the whole slide, of its proportions")
    rows, columns = (
        np.clip((origin + (np.arange(count) + 0.5) * per) * scale, 0, side - 1).astype(np.int64)
        for origin, count, per, scale, side in zip(
            frame.origin_l0, frame.shape, frame.l0_per_px, scales, found.shape, strict=True
        )
    )
    return np.asarray(found[rows[:, None], columns[None, :]])


def _marked(picture: NDArray[Any], data: bytes, path: Path) -> Mask:
    """Where a decoded picture is neither 0 nor transparent.

    Whoever paints with a palette means its colours; whoever exports labels (QuPath, ImageJ) means the numbers, and
    shows the 0 of the background white as often as black. SlideError where the two differ.
    """
    colours = picture.reshape(*picture.shape[:2], -1)
    opaque = colours[..., 3] > 0 if colours.shape[2] == 4 else np.ones(colours.shape[:2], np.bool_)
    found = (colours[..., :3] > 0).any(axis=2)
    if _has_palette(data):
        try:
            numbers = np.asarray(PngImageFile(io.BytesIO(data))) > 0
        except DAMAGE as error:
            what = f"is a damaged PNG ({one_line(error)})"
            raise SlideError(shown(path), what, "export the mask again") from error
        if ((numbers != found) & opaque).any():
            what = "has a palette in which 0 is not black, or another number is: its tissue may be either"
            remedy = "save it as grey, without a palette, 0 where there is no tissue"
            raise SlideError(shown(path), what, remedy)
    return np.asarray(found & opaque)


def _has_palette(data: bytes) -> bool:
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[25:26] == b"\x03"
