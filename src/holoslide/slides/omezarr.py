"""OME-Zarr: a folder of chunks, read by the optional zarr; versions 0.4 and 0.5, from this machine's disk.

Plain RGB alone: axes y and x, three channels of 8 bits, no stack. Other channels are refused as fluorescence.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holoslide.errors import SlideError
from holoslide.geometry import Box
from holoslide.slides.facts import (
    DAMAGE,
    DAMAGED,
    EXPORT_RGB,
    Level,
    Mpp,
    make_levels,
    number,
    one_line,
    shown,
    unreadable,
)

MARKS = (".zgroup", "zarr.json", ".zattrs")  # one of these is in every such folder
_UNITS_UM = {"micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6}
_RGB = ("FF0000", "00FF00", "0000FF")


def is_zarr(folder: Path) -> bool:
    """Whether a folder is a Zarr hierarchy."""
    return any((folder / mark).is_file() for mark in MARKS)


class OmeZarrBackend:
    """An OME-Zarr image. Raises `SlideError`: zarr is not installed, several images, or not 8-bit RGB."""

    vendor = "ome-zarr"
    pixels = "8-bit RGB"
    objective_power: float | None = None
    icc_profile: bytes | None = None
    orientation = 1

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            import zarr
        except ImportError as error:
            what = f"is OME-Zarr, which needs zarr ({error})"
            raise SlideError(shown(path), what, "pip install 'holoslide[zarr]'") from error
        try:
            group: Any = zarr.open_group(path, mode="r")
            image = self._image(dict(group.attrs))
            self._axes = [axis["name"] for axis in image["axes"]]
            self._arrays = [group[dataset["path"]] for dataset in image["datasets"]]
            self._check_axes()
            self._channel = self._axes.index("c")
            shapes = [self._shape(array) for array in self._arrays]
            self.mpp = _mpp(image)
        except DAMAGE as error:
            what = f"is not a readable OME-Zarr ({one_line(error)})"
            raise SlideError(shown(path), what, DAMAGED) from error
        self.levels: tuple[Level, ...] = make_levels(shapes)
        self.bounds_l0 = Box(0, 0, *shapes[0])

    def in_strips(self, level: int) -> bool:
        """No: it is cut into chunks."""
        return False

    def read_level(self, level: int, box: Box) -> NDArray[np.uint8]:
        """See `Backend`."""
        rows, columns = box.slices
        parts: dict[str, Any] = {"y": rows, "x": columns, "c": slice(None)}
        try:
            values = np.asarray(self._arrays[level][tuple(parts.get(axis, 0) for axis in self._axes)])
        except DAMAGE as error:
            raise unreadable(self._path, level, box, error) from error
        left = [axis for axis in self._axes if axis in parts]
        return np.ascontiguousarray(values.transpose([left.index(axis) for axis in "yxc"]))

    def close(self) -> None:
        """Nothing is held open."""

    def _image(self, attributes: Mapping[str, Any]) -> Mapping[str, Any]:
        """The one image's description. Version 0.5 has it under `ome`."""
        facts = attributes.get("ome", attributes)
        images = facts.get("multiscales") or []
        if len(images) != 1:
            inside = "several" if images or "bioformats2raw.layout" in facts else "no"
            what, remedy = f"holds {inside} images", "give the folder of the image that is the slide"
            raise SlideError(shown(self._path), what, remedy)
        colours = [str(each.get("color", "")).upper() for each in facts.get("omero", {}).get("channels", ())]
        if len(colours) == 3 and tuple(colours) != _RGB and len(set(colours)) > 1:
            what = f"has channels of the colours {', '.join(colours)}, as fluorescence does"
            raise SlideError(shown(self._path), what, EXPORT_RGB)
        image: Mapping[str, Any] = images[0]
        return image

    def _check_axes(self) -> None:
        first = self._arrays[0]
        sizes = dict(zip(self._axes, first.shape, strict=True))
        if sizes.get("c", 1) != 3:
            what = f"has {sizes.get('c', 1)} channels: fluorescence, multi-channel or grey"
            raise SlideError(shown(self._path), what, EXPORT_RGB)
        if {"y", "x"} - set(sizes) or any(n > 1 for axis, n in sizes.items() if axis not in "cyx"):
            what = f"holds a stack ({' x '.join(f'{axis} {n}' for axis, n in sizes.items())})"
            raise SlideError(shown(self._path), what, EXPORT_RGB)
        if first.dtype != np.uint8:
            raise SlideError(shown(self._path), f"has {first.dtype} samples", EXPORT_RGB)

    def _shape(self, array: Any) -> tuple[int, int]:
        sizes = dict(zip(self._axes, array.shape, strict=True))
        return int(sizes["y"]), int(sizes["x"])


def _mpp(image: Mapping[str, Any]) -> Mpp | None:
    """From the scale of the finest level, in the units of its axes."""
    steps = [
        *image["datasets"][0].get("coordinateTransformations", ()),
        *image.get("coordinateTransformations", ()),
    ]
    sides = []
    for at, axis in enumerate(image["axes"]):
        if axis["name"] not in "yx":
            continue
        side = _UNITS_UM.get(axis.get("unit", ""))
        if side is None:
            return None
        for step in steps:
            side *= float(step["scale"][at]) if step.get("type") == "scale" else 1.0
        sides.append(number(side))
    y, x = sides
    return Mpp(y, x, "slide") if y and x else None
