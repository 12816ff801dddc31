"""What lies on a slide and is no tissue: felt pen of four colours, lines and rims without colour, the dark around.

All of it is told from a balanced thumbnail (glass is 1). Stains have colours of their own: haematoxylin takes red
and green alike, and little blue; eosin takes green most, then blue, hardly red. Ink does otherwise:

- green and blue ink lets through a hue that no common stain has at that saturation;
- red ink takes blue nearly as much as green, which eosin does not; blood does, too, but lies in tissue;
- black ink takes all three alike; so does carbon in a lung or a node, which lies in tissue, too.

So red and black count as pen where they border on glass, as a stroke across a slide does somewhere.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from holoslide.slides.morphology import (
    Mask,
    close,
    drop_specks,
    fill_holes,
    grow,
    mean_over,
    pieces_of,
    thin_parts,
)

ON_GLASS = 0.1  # share of a red or black piece's border that is glass, from which it is pen
COLOURLESS = 3.0  # Lab units that the mean colour of a piece is from grey
THIN_UM = (
    80.0  # strands of colourless matter narrower than this are edges of coverslips, rims of bubbles, hair
)
SMALL_UM2 = 250_000.0  # a colourless piece up to this large is dirt
MESH_UM2 = 20_000.0  # of fat
STROKE_UM = 160.0  # how far beside sure ink there may be ink over tissue
SOFT_UM = 16.0  # how far a stroke fades out


def pen(white: NDArray[np.float32], plain: Mask, um_per_px: float, *, least_um2: float) -> Mask:
    """Where there is felt pen, of any of the four colours; `plain` says where the thumbnail shows bare glass.

    `white` is the balanced thumbnail (h, w, 3), slightly smoothed. Pieces below `least_um2` are pigment, dye on a
    margin, or a vessel.
    """
    strokes = close(_coloured(white, um_per_px, least_um2) | _black_or_red(white, plain), SOFT_UM / um_per_px)
    count, labels = pieces_of(strokes)
    sizes_um2 = np.bincount(labels.ravel(), minlength=count) * um_per_px**2
    keep = sizes_um2 >= least_um2
    keep[0] = False
    return grow(np.asarray(keep[labels]), SOFT_UM / um_per_px)


def _coloured(white: NDArray[np.float32], um_per_px: float, least_um2: float) -> Mask:
    """Green and blue: more saturated, at those hues, than haematoxylin or any common stain gets.

    Beside such strokes, what looks like ink over tissue: it takes less blue, or more red, for its green than stain.
    """
    hsv = cv2.cvtColor(np.ascontiguousarray(white), cv2.COLOR_RGB2HSV)
    hue, saturation, value = hsv[..., 0], hsv[..., 1], hsv[..., 2]
    green = (hue > 75) & (hue < 190) & (saturation > 0.25)
    blue = (hue >= 190) & (hue < 245) & ((saturation > 0.5) | ((saturation > 0.35) & (value > 0.82)))
    sure = drop_specks(np.asarray(green | blue), 0.5 * least_um2 / um_per_px**2)
    if not sure.any():
        return sure
    density = -np.log(np.maximum(white, 1 / 255))
    bluish = (hue >= 190) & (hue < 265) & (saturation > 0.4) & (density[..., 2] < 0.46 * density[..., 1])
    greenish = (density[..., 0] > 1.05 * density[..., 1]) & (density[..., 1] > 0.3)
    return sure | (np.asarray(bluish | greenish) & grow(sure, STROKE_UM / um_per_px))


def _black_or_red(white: NDArray[np.float32], plain: Mask) -> Mask:
    """Pieces of red or black that border on glass."""
    density = -np.log(np.maximum(white, 1 / 255))
    red, green, blue = (density[..., channel] for channel in range(3))
    taken = np.maximum(green, 1e-3)
    is_black = (red > 0.72 * green) & (blue > 0.75 * green) & (density.mean(axis=2) > 0.5)
    dyed = (green > 0.45) & (red < 0.45 * green)
    is_red = dyed & (blue > _red_ink(blue[dyed] / taken[dyed]) * green)
    found = np.zeros(plain.shape, np.bool_)
    for candidate in (np.asarray(is_black), np.asarray(is_red)):
        count, labels = pieces_of(candidate)
        rim = cv2.dilate(labels.astype(np.float32), np.ones((7, 7), np.uint8)).astype(np.int32)
        rim[grow(candidate, 1)] = 0  # the soft edge of a stroke is neither
        keep = mean_over(rim, plain, count) > ON_GLASS
        keep[0] = False
        found |= np.asarray(keep[labels])
    return found


def _red_ink(blue_over_green: NDArray[np.floating]) -> float:
    """The ratio from which red is ink and not this slide's eosin, whose own differs between laboratories."""
    if not len(blue_over_green):
        return 1.0
    return float(np.clip(np.percentile(blue_over_green, 25) + 0.13, 0.78, 0.95))


def debris(mask: Mask, lab: NDArray[np.float32], um_per_px: float) -> Mask:
    """Of what was taken for tissue, the thin and the small parts without colour.

    `lab` is the balanced thumbnail in Lab. The mean colour of a part tells, in which noise evens out.
    """
    found = np.zeros(mask.shape, np.bool_)
    meshed = fill_holes(mask, MESH_UM2 / um_per_px**2)  # a net of membranes is as wide as all its meshes
    thin = thin_parts(meshed, THIN_UM / um_per_px) & mask
    for parts, most_um2 in ((thin, np.inf), (mask, SMALL_UM2)):
        count, labels = pieces_of(parts)
        colour = np.hypot(*(mean_over(labels, lab[..., channel], count) for channel in (1, 2)))
        sizes_um2 = np.bincount(labels.ravel(), minlength=count) * um_per_px**2
        drop = (colour < COLOURLESS) & (sizes_um2 <= most_um2)
        drop[0] = False
        found |= np.asarray(drop[labels])
    return found


def beyond_scan(rgb: NDArray[np.uint8]) -> Mask:
    """Neutral black, as scanners paint what they did not scan."""
    return np.asarray((rgb.max(axis=2) < 50) & (np.ptp(rgb, axis=2) < 15))
