"""Augmentation of a slide that is never in memory as a whole: drawn once, applied the same to every window.

The paper's (arXiv 2207.08267): a random crop, flips, quarter turns, colour jitter. Crops are cut along the tissue
mask's cells, so the mask of an augmented slide is exact, and its colour is one affine map of RGB, so any window
of the augmented slide equals, byte for byte, that window cut from the augmented whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import cv2
import numpy as np
from numpy.typing import NDArray

from holoslide.errors import ConfigError
from holoslide.geometry import Box
from holoslide.pixels import ArrayPixels, Pixels, one_colour
from holoslide.slides.stain import dye_change, through_density

__all__ = ["ArrayPixels", "AugmentConfig", "Augmented", "Draw", "Pixels", "draw"]

Colour = tuple[tuple[float, float, float, float], ...]  # three rows: new R, G, B from (R, G, B, 1)
FLIPS = ((True, False), (False, True), (True, True))
_FLIP_CODES = {(True, False): 0, (False, True): 1, (True, True): -1}  # OpenCV's
LUMA = np.array([0.299, 0.587, 0.114])  # Rec. 601, as in torchvision's saturation


@dataclass(frozen=True, slots=True)
class AugmentConfig:
    """How training slides are varied; the defaults are the paper's, except for `hue`."""

    crop: float = 0.6
    """Probability of a crop."""
    crop_least: float = 0.5
    """A crop keeps a share of each side drawn between this and 1."""
    crop_least_small: float = 0.9
    """The same for sides under `small_px`."""
    small_px: int = 3000
    """Sides of fewer raster pixels are small."""
    flip: float = 0.75
    """Probability of a flip; vertical, horizontal and both are as likely."""
    turn: bool = True
    """Rotate by 0, 90, 180 or 270 degrees."""
    brightness: float = 0.1
    """A factor drawn from 1 - value to 1 + value."""
    contrast: float = 0.1
    """A factor drawn likewise, about the grey `pivot`."""
    saturation: float = 0.1
    """A factor drawn likewise."""
    hue: float = 0.02
    """The largest rotation about the grey axis, in turns. The paper says no more than "0.1" of its jitter; a
    tenth of a turn makes pink tissue orange or violet, so hue goes less far here."""
    stain: float = 0.0
    """Haematoxylin and eosin each times a factor drawn from 1 - value to 1 + value, in tissue alone; slower
    than the other changes of colour, and off unless asked for."""
    pivot: float = 190.0
    """The grey that contrast turns about, 0 to 255; fixed, as a window's own mean would differ between
    windows."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a share outside 0..1, and the like."""
        most = {"pivot": 255.0, "small_px": math.inf, "hue": 0.5}
        for each in fields(self):
            value = getattr(self, each.name)
            if not 0 <= value <= most.get(each.name, 1.0):  # also refuses nan
                what = f"{value} is out of range"
                raise ConfigError(f"augment.{each.name}", what, f"give 0 to {most.get(each.name, 1.0):g}")
        for name in ("crop_least", "crop_least_small"):
            if getattr(self, name) == 0:
                what = "a crop to 0 of a side leaves nothing"
                raise ConfigError(f"augment.{name}", what, "give more than 0, at most 1")

    @classmethod
    def none(cls) -> AugmentConfig:
        """No augmentation at all."""
        return cls(crop=0, flip=0, turn=False, brightness=0, contrast=0, saturation=0, hue=0)


@dataclass(frozen=True, slots=True)
class Draw:
    """What happens to one slide: crop, transpose, reverse, stain, colour, in this order; by default nothing.

    `size` and `place` are per axis (y, x) of the slide: the share of the side that is kept, and where it lies
    within the room left, 0 at the start, 1 at the end. `reverse` is per axis of the result. `stain` is what
    haematoxylin and eosin are multiplied by.
    """

    size: tuple[float, float] = (1.0, 1.0)
    place: tuple[float, float] = (0.0, 0.0)
    transpose: bool = False
    reverse: tuple[bool, bool] = (False, False)
    stain: tuple[float, float] | None = None
    colour: Colour | None = None


def draw(config: AugmentConfig, shape_px: tuple[int, int], rng: np.random.Generator) -> Draw:
    """One draw for a slide of (height, width) pixels."""
    cropped = rng.random() < config.crop
    least = [config.crop_least_small if side < config.small_px else config.crop_least for side in shape_px]
    size = rng.uniform(least, 1.0)
    place = rng.random(2)
    flipped = rng.random() < config.flip
    flip_y, flip_x = FLIPS[rng.integers(3)] if flipped else (False, False)
    transpose = False
    for _ in range(int(rng.integers(4)) if config.turn else 0):
        transpose, flip_y, flip_x = not transpose, not flip_x, flip_y  # transpose, then reverse the rows
    return Draw(
        size=(float(size[0]), float(size[1])) if cropped else (1.0, 1.0),
        place=(float(place[0]), float(place[1])) if cropped else (0.0, 0.0),
        transpose=transpose,
        reverse=(flip_y, flip_x),
        colour=_draw_colour(config, rng),
        stain=_draw_stain(config, rng),
    )


def _draw_stain(config: AugmentConfig, rng: np.random.Generator) -> tuple[float, float] | None:
    if not config.stain:
        return None
    haematoxylin, eosin = rng.uniform(1 - config.stain, 1 + config.stain, 2)
    return float(haematoxylin), float(eosin)


def _draw_colour(config: AugmentConfig, rng: np.random.Generator) -> Colour | None:
    """Brightness, contrast, saturation and hue, in this order, as one affine map; None if all are off."""
    spread = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    brightness, contrast, saturation, turns = rng.uniform(-spread, spread)
    if not spread.any():
        return None
    pivot = np.full((3, 1), config.pivot)
    matrix = np.hstack([np.eye(3) * (1 + brightness) * (1 + contrast), -contrast * pivot])
    grey = np.tile(LUMA, (3, 1))
    matrix = (grey + (1 + saturation) * (np.eye(3) - grey)) @ matrix
    matrix = _about_grey(2 * math.pi * turns) @ matrix
    return tuple((float(r), float(g), float(b), float(shift)) for r, g, b, shift in matrix)


def _about_grey(angle: float) -> NDArray[np.float64]:
    """The rotation of RGB about the axis of greys, (3, 3) (Rodrigues)."""
    cross = np.array([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    return np.asarray(np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross)


class Augmented:
    """The pixels of a slide after a draw; reads from the slide only what a window needs.

    The crop is rounded to whole mask cells. Where that takes the last, ragged cells of a slide and turns them to
    the front, they are filled up with glass. A crop that would hold no tissue is not made.
    """

    def __init__(self, pixels: Pixels, how: Draw) -> None:
        mask, cell_px = np.asarray(pixels.mask, np.bool_), pixels.mask_cell_px
        whole = Box(0, 0, *mask.shape)
        crop = _crop(whole, how)
        if not mask[crop.slices].any():
            crop = whole
        crop_px = crop.times(cell_px)
        ends = how.reverse[::-1] if how.transpose else how.reverse  # per axis of the slide
        height, width = pixels.shape_px
        bottom = crop_px.bottom if ends[0] else min(crop_px.bottom, height)
        right = crop_px.right if ends[1] else min(crop_px.right, width)
        self._crop_px = Box(crop_px.top, crop_px.left, bottom, right)
        self._pixels, self._how = pixels, how
        self.shape_px = self._crop_px.shape[::-1] if how.transpose else self._crop_px.shape
        cells = np.ascontiguousarray(mask[crop.slices]).view(np.uint8)
        self.mask: NDArray[np.bool_] = _turn(cells, how).view(np.bool_)
        self.mask_cell_px = cell_px
        self._matrix = None if how.colour is None else np.array(how.colour, np.float32)
        self._density = None if how.stain is None else dye_change(*how.stain)
        self.glass: NDArray[np.uint8] = self._recolour(np.asarray(pixels.glass)[None, None])[0, 0]

    def read(self, box_px: Box) -> NDArray[np.uint8]:
        """(h, w, 3) of any box of the augmented slide; glass outside it."""
        part = box_px.intersect(Box(0, 0, *self.shape_px))
        if not part.area:
            return one_colour(box_px.shape, self.glass)
        pixels = self._recolour(_turn(self._pixels.read(self._source(part)), self._how))
        if part == box_px:
            return pixels
        window = one_colour(box_px.shape, self.glass)
        window[part.relative_to(box_px).slices] = pixels
        return window

    def _source(self, box_px: Box) -> Box:
        """The box of the slide that is turned into this box."""
        height, width = self.shape_px
        top, bottom, left, right = box_px.top, box_px.bottom, box_px.left, box_px.right
        if self._how.reverse[0]:
            top, bottom = height - bottom, height - top
        if self._how.reverse[1]:
            left, right = width - right, width - left
        if self._how.transpose:
            top, left, bottom, right = left, top, right, bottom
        return Box(top, left, bottom, right).shifted(self._crop_px.top, self._crop_px.left)

    def _recolour(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if (
            self._density is not None
        ):  # against the slide's own glass, which has no density and stays as it is
            rgb = through_density(rgb, self._density, float(np.mean(self._pixels.glass)))
        if self._matrix is None:
            return rgb
        return np.asarray(cv2.transform(rgb, self._matrix), np.uint8)


def _crop(whole_cell: Box, how: Draw) -> Box:
    """The part that is kept, in whole cells, at least one."""
    starts, sides = [], []
    for cells, size, place in zip(whole_cell.shape, how.size, how.place, strict=True):
        side = min(cells, max(1, round(size * cells)))
        sides.append(side)
        starts.append(round(place * (cells - side)))
    return Box.at(starts[0], starts[1], sides[0], sides[1])


def _turn(values: NDArray[np.uint8], how: Draw) -> NDArray[np.uint8]:
    """Transpose and reverse (H, W) or (H, W, 3), in a tenth of the time that NumPy takes."""
    if how.transpose:
        values = np.asarray(cv2.transpose(values), np.uint8)
    code = _FLIP_CODES.get(how.reverse)
    return values if code is None else np.asarray(cv2.flip(values, code), np.uint8)
