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
from holoslide.slides import marks
from holoslide.slides.morphology import Mask, close, drop_specks, fill_holes, grow, odd, shrink

__all__ = ["Mask", "Segmented", "TissueConfig", "find_tissue", "segment"]

SWITCHES = ("skip_pen", "skip_debris", "skip_blur")
WHITE_RGB = (245, 245, 245)  # what the lamp is taken to be where a slide shows no glass at all
NET_UM = 40.0  # gaps in what has structure: the meshes of fat


@dataclass(frozen=True, slots=True)
class TissueConfig:
    """How tissue is told from glass. Units of colour are those of Lab, as a distance from the glass."""

    thumbnail_mpp: float = 8.0
    """Microns per pixel of the thumbnail that is looked at."""
    smooth_um: float = 6.0
    """Sigma of the blur that takes out noise."""
    least_contrast: float = 4.0
    """Otsu's threshold is kept above this, so that a slide without tissue gives none."""
    most_contrast: float = 8.0
    """Otsu's threshold is kept below this, so that one without glass is not split into dark and pale tissue.
    """
    texture_um: float = 56.0
    """Side of the neighbourhood whose unrest counts as texture."""
    least_texture: float = 1.0
    """From this texture on it is tissue, however pale."""
    close_um: float = 64.0
    """Gaps up to this wide are closed."""
    hole_um2: float = 60_000.0
    """Smaller holes are filled."""
    speck_um2: float = 20_000.0
    """Smaller pieces are dropped."""
    margin_um: float = 0.0
    """The mask is grown by this, so that pale edges are in."""
    skip_pen: bool = True
    """Leave out felt pen: black, blue, green and red."""
    skip_debris: bool = True
    """Leave out coverslip edges, rims of bubbles and dirt."""
    skip_blur: bool = True
    """Leave out what is out of focus."""
    focus_mpp: float = 2.0
    """Microns per pixel at which focus is judged."""
    least_sharpness: float = 0.28
    """Out of focus is where the finest structures have less than this share of the contrast of the coarser
    ones. Sharp slides: 0.5 and more; after a blur with a sigma of 2 pixels: under 0.25."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a length or area that cannot be."""
        for name in (each.name for each in fields(self) if each.name not in SWITCHES):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                where, what = f"prepare.tissue.{name}", f"{value} is not a number of at least 0"
                raise ConfigError(where, what, "give a length in um, an area in um2 or a contrast")
            object.__setattr__(self, name, float(value))  # 8 and 8.0 are written alike
        for name, remedy in (("thumbnail_mpp", "give 4 to 16"), ("focus_mpp", "give 1 to 4")):
            if getattr(self, name) == 0:
                raise ConfigError(f"prepare.tissue.{name}", "0 um per pixel is no picture", remedy)
        if self.least_contrast > self.most_contrast:
            where, what = "prepare.tissue.least_contrast", f"{self.least_contrast} is above most_contrast"
            raise ConfigError(where, what, f"give at most {self.most_contrast}")


@dataclass(frozen=True, slots=True)
class Segmented:
    """What a thumbnail shows: `tissue`, and the `pen` that was left out, as masks of its size."""

    tissue: Mask
    pen: Mask


def find_tissue(thumbnail: NDArray[np.uint8], um_per_px: float, config: TissueConfig) -> Mask:
    """The tissue of a thumbnail (h, w, 3) as a mask (h, w); all False where there is none.

    `um_per_px` is the thumbnail's own, which may be coarser than the one the configuration asks for.
    """
    return segment(thumbnail, um_per_px, config).tissue


def segment(thumbnail: NDArray[np.uint8], um_per_px: float, config: TissueConfig) -> Segmented:
    """As `find_tissue`, with what was left out."""
    white = balance(thumbnail, glass_colour(thumbnail))
    smooth = np.asarray(cv2.GaussianBlur(white, (0, 0), max(config.smooth_um / um_per_px, 0.3)), np.float32)
    lab, pixel_um2 = _lab(smooth), um_per_px**2
    score = contrast(lab)
    side_px = odd(config.texture_um / um_per_px)
    # a window sees an edge before it is there, a soft one a pixel earlier; inside a net of membranes there is none
    unrest = close(texture(white, side_px) > config.least_texture, NET_UM / um_per_px)
    structured = shrink(unrest, side_px // 2 + 1)
    pen = np.zeros(score.shape, np.bool_)
    if config.skip_pen:
        plain = (score < config.least_contrast) & ~structured
        pen = marks.pen(smooth, plain, um_per_px, least_um2=config.speck_um2)
    dark = drop_specks(marks.beyond_scan(thumbnail), config.speck_um2 / pixel_um2)
    excluded = pen | grow(dark, 2 * config.smooth_um / um_per_px)
    stained = score > threshold(score[~excluded], config.least_contrast, config.most_contrast)
    mask = close((stained | structured) & ~excluded, config.close_um / um_per_px) & ~excluded
    if config.skip_debris:
        mask &= ~marks.debris(mask, lab, um_per_px)
    smallest_um2 = min(config.speck_um2, 0.02 * mask.size * pixel_um2)  # a tiny slide has tiny pieces
    mask = drop_specks(mask, smallest_um2 / pixel_um2)
    mask = fill_holes(mask, config.hole_um2 / pixel_um2)
    return Segmented(grow(mask, config.margin_um / um_per_px) & ~excluded, pen)


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


def _lab(white: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(white), cv2.COLOR_RGB2LAB), np.float32)


def contrast(lab: NDArray[np.float32]) -> NDArray[np.float32]:
    """Distance from white, (h, w); darkness counts half, as shadows are dark and stain is coloured."""
    return np.asarray(
        np.sqrt((0.5 * (100 - lab[..., 0])) ** 2 + lab[..., 1] ** 2 + lab[..., 2] ** 2), np.float32
    )


def texture(white: NDArray[np.float32], side_px: int) -> NDArray[np.float32]:
    """Standard deviation of lightness (Lab) around each pixel, (h, w), less what noise alone gives."""
    light = _lab(white)[..., 0]
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
