"""Steps on masks, (h, w) of bool: each grows, shrinks or sieves one; the picture's edge adds nothing by itself."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def close(mask: Mask, width_px: float) -> Mask:
    """Bridge gaps up to `width_px` wide; the picture's edge closes nothing by itself."""
    side = odd(width_px)
    pad = side
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=0)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, kernel)
    return np.asarray(closed[pad:-pad, pad:-pad] > 0)


def grow(mask: Mask, by_px: float) -> Mask:
    """The mask and all within `by_px` of it."""
    side = 2 * round(by_px) + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    return np.asarray(cv2.dilate(mask.astype(np.uint8), kernel) > 0)


def shrink(mask: Mask, by_px: int) -> Mask:
    """The mask without what is within `by_px` of its border; the picture's edge is none."""
    kernel = cv2.getStructuringElement(cv2.MORPH_RECT, (2 * by_px + 1, 2 * by_px + 1))
    shrunk = cv2.erode(mask.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=1)
    return np.asarray(shrunk > 0)


def thin_parts(mask: Mask, width_px: float) -> Mask:
    """The parts of a mask that are narrower than `width_px`; what the picture's edge cuts goes on beyond it."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (odd(width_px),) * 2)
    plane = mask.astype(np.uint8)
    core = cv2.erode(plane, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=1)
    return mask & ~np.asarray(cv2.dilate(core, kernel) > 0)


def drop_specks(mask: Mask, area_px: float) -> Mask:
    """The mask without pieces smaller than `area_px`."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= area_px
    keep[0] = False
    return np.asarray(keep[labels]) if count > 1 else mask


def fill_holes(mask: Mask, area_px: float) -> Mask:
    """The mask with holes smaller than `area_px` filled; what touches the picture's edge is no hole."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    fill = stats[:, cv2.CC_STAT_AREA] < area_px
    fill[np.unique(edge)] = False
    fill[0] = False  # label 0 is the mask itself
    return mask | np.asarray(fill[labels]) if count > 1 else mask


def pieces_of(mask: Mask) -> tuple[int, NDArray[np.int32]]:
    """How many labels there are, and the label of each pixel: 0 outside the mask, 1, 2, ... its pieces."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    return count, np.asarray(labels, np.int32)


def mean_over(labels: NDArray[np.int32], values: NDArray[Any], count: int) -> NDArray[np.float64]:
    """The mean of `values` over the pixels of each label, (count,); 0 for a label without pixels."""
    sizes = np.bincount(labels.ravel(), minlength=count)
    sums = np.bincount(labels.ravel(), values.ravel(), minlength=count)
    return np.asarray(sums / np.maximum(sizes, 1), np.float64)


def odd(width_px: float) -> int:
    """An odd number of pixels, at least 3."""
    return max(3, 2 * int(width_px / 2) + 1)
