"""Places of patches that other tools wrote into H5 files, `coords`: their squares, taken together, are tissue.

| tool | what a coordinate is | the side of a patch |
| --- | --- | --- |
| TRIDENT | level-0 pixel of the top-left corner, x first | `patch_size_level0` |
| CLAM | the same | `patch_size` at `patch_level`, times `downsample` |
| STAMP | the corner in micrometres (`unit` `um`, or with `tile_size_um`), x first | `tile_size_um`, `tile_size` |
| STAMP 1 | the corner in pixels of 256 / 224 um, x first | 224, the step of its grid; the features are `feats` |
| others | level-0 pixel, x first | the step of their grid |

STAMP's are told apart as its own `get_coords` does it; but a step of 224 may be any tool's, so its features are
asked for, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holoslide.errors import SlideError
from holoslide.slides.facts import DAMAGE, one_line, shown

_LEAST_SIDE = 8  # level-0 pixels
_STAMP_PX, _STAMP_UM = 224.0, 256 / 224  # side of a patch of STAMP 1, and um per pixel


@dataclass(frozen=True, slots=True)
class Patches:
    """Squares on a slide: their top-left corners (n, 2), x first, and the side, in `um` or in level-0 pixels."""

    corners: NDArray[np.float64]
    side: float
    is_um: bool


def read_patches(path: Path) -> Patches:
    """The patches of an H5 file; SlideError for what holds no coordinates, or no side that could be known."""
    import h5py

    try:
        with h5py.File(path) as file:
            found = file["coords"]
            corners = np.asarray(found[()], np.float64)
            is_stamps = "feats" in file
            said = {key: _plain(value) for source in (file, found) for key, value in source.attrs.items()}
    except DAMAGE as error:
        what = f"is no H5 file with coords ({one_line(error)})"
        raise SlideError(shown(path), what, "give a file of patches of CLAM, TRIDENT or STAMP") from error
    corners = corners[0] if corners.ndim == 3 and len(corners) == 1 else corners
    if corners.ndim != 2 or corners.shape[1:] != (2,) or not np.isfinite(corners).all():
        what = f"holds coords of shape {corners.shape}, not (n, 2)"
        raise SlideError(shown(path), what, "give a file of patches of CLAM, TRIDENT or STAMP")
    if not len(corners):
        raise SlideError(shown(path), "holds no patch", "make its patches again, or leave the mask out")
    is_um = said.get("unit") == "um" or "tile_size_um" in said
    side = _stated(said, is_um=is_um) or _step(corners)
    if is_stamps and not is_um and side == _STAMP_PX:
        corners, side, is_um = corners * _STAMP_UM, _STAMP_PX * _STAMP_UM, True
    if side is None or not np.isfinite(side) or (side < _LEAST_SIDE and not is_um):
        remedy = "add the attribute patch_size_level0 to coords"
        raise SlideError(shown(path), "does not say how large its patches are", remedy)
    return Patches(corners, side, is_um)


def _plain(value: Any) -> Any:
    """An attribute as text or as numbers."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _stated(said: Mapping[str, Any], *, is_um: bool) -> float | None:
    """The side that the file's attributes give, if they do."""
    if is_um:
        return _number(said.get("tile_size_um")) or _number(said.get("tile_size"))
    if "patch_size_level0" in said:
        return _number(said["patch_size_level0"])
    size, level = _number(said.get("patch_size")), _number(said.get("patch_level", 0))
    downsample = 1.0 if level == 0 and "downsample" not in said else _number(said.get("downsample"))
    return None if size is None or downsample is None else size * downsample


def _number(value: Any) -> float | None:
    """A positive number; of several, as CLAM's downsample for x and y, the first."""
    try:
        number = float(np.asarray(value, np.float64).reshape(-1)[0])
    except (TypeError, ValueError, IndexError):
        return None
    return number if number >= 0 else None


def _step(corners: NDArray[np.float64]) -> float | None:
    """The step of the grid that corners lie on, the same in both directions; None where they lie on none."""
    steps = []
    for axis in (0, 1):
        values = np.unique(np.rint(corners[:, axis]).astype(np.int64))
        if len(values) > 1:
            steps.append(int(np.gcd.reduce(np.diff(values))))
    return float(steps[0]) if steps and len(set(steps)) == 1 else None
