"""Masks as polygons: the exact outlines of their cells, at level 0."""

from __future__ import annotations

import numpy as np
import shapely
from numpy.typing import NDArray


def mask_polygons(
    mask_HW: NDArray[np.bool_], origin_l0: tuple[float, float], cell_l0: tuple[float, float]
) -> list[shapely.Polygon]:
    """The pieces of a mask with their holes, x first, largest first; cells that only share a corner are apart.

    `origin_l0` (y, x) is the first cell's corner, `cell_l0` (y, x) a cell's sides.

    >>> [p.bounds for p in mask_polygons(np.array([[True, True]]), (10.0, 0.0), (2.0, 3.0))]
    [(0.0, 10.0, 6.0, 12.0)]
    """
    edges = np.diff(np.pad(mask_HW.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(edges == 1)
    _, stops = np.nonzero(edges == -1)
    # Whole numbers here, so that neighbouring rows share their edges to the last bit.
    union = shapely.union_all(shapely.box(starts, rows, stops, rows + 1)).simplify(0)
    scale, origin = np.array(cell_l0[::-1]), np.array(origin_l0[::-1])
    placed = shapely.transform(union, lambda xy: xy * scale + origin)
    pieces = [piece for piece in shapely.get_parts(placed) if not piece.is_empty]
    return sorted(pieces, key=lambda piece: -piece.area)
