"""Where the tissue is: from a thumbnail to a mask, in small pure steps, every setting in um or um2.

Light only ever loses to tissue, so everything is measured against the glass of the slide itself: the thumbnail
is divided by the glass's colour, which takes grey and tinted backgrounds out at once, and what is left of
white is stain (colour), absorption (darkness) and structure (texture). Pale fat has little of the first two
but a net of membranes, which the third sees. Saturated green and blue, and neutral black, where there is
much of it, are ink or the dark beyond the scan, never stained tissue. (Red pen is too near to eosin and blood to
be told from them by colour.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from holoslide.errors import ConfigError

Mask = NDArray[np.bool_]
WHITE_RGB = (245, 245, 245)  # what the lamp is taken to be where a slide shows no glass at all


@dataclass(frozen=True, slots=True)
class TissueConfig:
    """How tissue is told from glass.

    `thumbnail_mpp`: um per pixel of the thumbnail that is looked at. `smooth_um`: sigma of the blur that takes
    out noise. `least_contrast`, `most_contrast`: Otsu's threshold is kept between these (Lab units from the
    glass), so that a slide without tissue gives none, and one without glass is not split into dark and pale
    tissue. `texture_um`: side of the neighbourhood whose unrest counts as texture, which is tissue from
    `least_texture` (Lab units) on. `close_um`: gaps up to this wide are closed. `hole_um2`, `speck_um2`: smaller
    holes are filled, smaller pieces dropped. `margin_um`: the mask is grown by this, so that pale edges are in.
    `skip_ink`: leave out coloured pen.
    """

    thumbnail_mpp: float = 8.0
    smooth_um: float = 8.0
    least_contrast: float = 4.0
    most_contrast: float = 8.0
    texture_um: float = 56.0
    least_texture: float = 1.5
    close_um: float = 64.0
    hole_um2: float = 60_000.0
    speck_um2: float = 20_000.0
    margin_um: float = 0.0
    skip_ink: bool = True

    def __post_init__(self) -> None:
        """Raise ConfigError for a length or area that cannot be."""
        for name in (each.name for each in fields(self) if each.name != "skip_ink"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                where, what = f"prepare.tissue.{name}", f"{value} is not a number of at least 0"
                raise ConfigError(where, what, "give a length in um, an area in um2 or a contrast")
            object.__setattr__(self, name, float(value))  # 8 and 8.0 are written alike
        if self.thumbnail_mpp == 0:
            where, what = "prepare.tissue.thumbnail_mpp", "0 um per pixel is no thumbnail"
            raise ConfigError(where, what, "give 4 to 16")
        if self.least_contrast > self.most_contrast:
            where, what = "prepare.tissue.least_contrast", f"{self.least_contrast} is above most_contrast"
            raise ConfigError(where, what, f"give at most {self.most_contrast}")


def find_tissue(thumbnail: NDArray[np.uint8], um_per_px: float, config: TissueConfig) -> Mask:
    """The tissue of a thumbnail (h, w, 3) as a mask (h, w); all False where there is none.

    `um_per_px` is the thumbnail's own, which may be coarser than the one the configuration asks for.
    """
    white = balance(thumbnail, glass_colour(thumbnail))
    smooth = np.asarray(cv2.GaussianBlur(white, (0, 0), max(config.smooth_um / um_per_px, 0.3)), np.float32)
    pixel_um2 = um_per_px**2
    excluded = beyond_scan(thumbnail)
    if config.skip_ink:
        excluded |= ink(smooth)
    excluded = drop_specks(excluded, config.speck_um2 / pixel_um2)  # pigment, or dye on a margin, is small
    excluded = grow(excluded, 2 * config.smooth_um / um_per_px)
    score = contrast(smooth)
    stained = score > threshold(score[~excluded], config.least_contrast, config.most_contrast)
    side_px = _odd(config.texture_um / um_per_px)
    structured = shrink(texture(white, side_px) > config.least_texture, side_px // 2)
    mask = close((stained | structured) & ~excluded, config.close_um / um_per_px) & ~excluded
    smallest_um2 = min(config.speck_um2, 0.02 * mask.size * pixel_um2)  # a tiny slide has tiny pieces
    mask = drop_specks(mask, smallest_um2 / pixel_um2)
    mask = fill_holes(mask, config.hole_um2 / pixel_um2)
    return grow(mask, config.margin_um / um_per_px) & ~excluded


def glass_colour(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The colour of bare glass, (3,): the mode of bright, even, hardly coloured pixels; white if there are few.

    Scanners and stitchers fill what they did not scan with one flat colour. Where that is the mode, a second
    one with some noise in it, a twentieth of the picture or more, is the glass.
    """
    blurred: NDArray[Any] = cv2.blur(rgb, (3, 3))
    even = _range(blurred) < 12
    blurred = blurred.astype(np.float32)
    pinkish = (blurred[..., 0] + blurred[..., 2]) / 2 - blurred[..., 1]  # no lamp is, but faint stain
    candidate = (blurred.min(axis=2) > 150) & (np.ptp(blurred, axis=2) < 22) & (pinkish < 12) & even
    if np.count_nonzero(candidate) < max(9, 0.01 * candidate.size):
        return np.array(WHITE_RGB, np.float32)
    colour, _ = _mode(blurred[candidate])
    flat = (_range(rgb) == 0) & (np.abs(blurred - colour).max(axis=2) < 1)
    if np.count_nonzero(flat) > 0.01 * candidate.size:
        rest = candidate & ~cv2.dilate(flat.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(np.bool_)
        if rest.any():
            second, count = _mode(blurred[rest])
            if count > 0.05 * candidate.size and np.ptp(second) < 16:
                return second
    return colour


def _range(rgb: NDArray[np.uint8]) -> NDArray[np.int16]:
    """The largest difference, in any channel, among a pixel and its eight neighbours."""
    kernel = np.ones((3, 3), np.uint8)
    return np.asarray((cv2.dilate(rgb, kernel).astype(np.int16) - cv2.erode(rgb, kernel)).max(axis=2))


def _mode(pixels: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
    """The commonest colour of (n, 3), and how many pixels are within 3 grey levels of it."""
    grey = pixels.mean(axis=1)
    levels = np.convolve(np.bincount(grey.astype(np.int64), minlength=256), np.ones(5), mode="same")
    near = np.abs(grey - np.argmax(levels)) <= 3
    return np.median(pixels[near], axis=0).astype(np.float32), int(np.count_nonzero(near))


def balance(rgb: NDArray[np.uint8], glass: NDArray[np.float32]) -> NDArray[np.float32]:
    """The share of light that gets through, (h, w, 3) in 0..1: glass, and what is brighter, is 1."""
    return np.asarray(np.minimum(rgb.astype(np.float32) / glass, np.float32(1)), np.float32)


def contrast(white: NDArray[np.float32]) -> NDArray[np.float32]:
    """Distance from white in Lab, (h, w); darkness counts half, as shadows are dark and stain is coloured."""
    lab = cv2.cvtColor(np.ascontiguousarray(white), cv2.COLOR_RGB2LAB)
    return np.asarray(
        np.sqrt((0.5 * (100 - lab[..., 0])) ** 2 + lab[..., 1] ** 2 + lab[..., 2] ** 2), np.float32
    )


def texture(white: NDArray[np.float32], side_px: int) -> NDArray[np.float32]:
    """Standard deviation of lightness (Lab) around each pixel, (h, w), less what noise alone gives."""
    light = cv2.cvtColor(np.ascontiguousarray(white), cv2.COLOR_RGB2LAB)[..., 0]
    mean = cv2.blur(light, (side_px, side_px))
    variance = cv2.blur(light * light, (side_px, side_px)) - mean * mean
    deviation = np.sqrt(np.maximum(variance, 0))
    noise = np.float32(np.percentile(deviation, 5))
    return np.asarray(np.maximum(deviation - 2 * min(noise, np.float32(1.5)), 0), np.float32)


def threshold(score: NDArray[np.float32], least: float, most: float) -> float:
    """Otsu's threshold of the scores, kept between `least` and `most`."""
    if score.size == 0:
        return most
    scaled = np.clip(score * (255 / 40), 0, 255).astype(np.uint8)
    otsu, _ = cv2.threshold(scaled.reshape(-1, 1), 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return float(np.clip(otsu * 40 / 255, least, most))


def ink(white: NDArray[np.float32]) -> Mask:
    """Green and blue pen: more saturated, at those hues, than haematoxylin or any common stain gets."""
    hsv = cv2.cvtColor(np.ascontiguousarray(white), cv2.COLOR_RGB2HSV)
    hue, saturation, value = hsv[..., 0], hsv[..., 1], hsv[..., 2]
    green = (hue > 75) & (hue < 190) & (saturation > 0.25)
    blue = (hue >= 190) & (hue < 245) & ((saturation > 0.5) | ((saturation > 0.35) & (value > 0.82)))
    return np.asarray(green | blue)


def beyond_scan(rgb: NDArray[np.uint8]) -> Mask:
    """Neutral black: the dark beyond the scanned area, or black ink laid on thick."""
    return np.asarray((rgb.max(axis=2) < 50) & (np.ptp(rgb, axis=2) < 15))


def close(mask: Mask, width_px: float) -> Mask:
    """Bridge gaps up to `width_px` wide; the picture's edge closes nothing by itself."""
    side = _odd(width_px)
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


def _odd(width_px: float) -> int:
    """An odd number of pixels, at least 3."""
    return max(3, 2 * int(width_px / 2) + 1)
