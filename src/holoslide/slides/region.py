"""The tissue of a slide file, as `prepare` and `audit` both find it: the user's mask, or what the pixels show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from holoslide.geometry import Box
from holoslide.slides.focus import out_of_focus
from holoslide.slides.outlines import Frame, read_outline
from holoslide.slides.reader import Reader
from holoslide.slides.tissue import Mask, TissueConfig, segment

COARSE = 2.0  # times `focus_mpp`: a slide with larger pixels cannot tell what is out of focus


@dataclass(frozen=True, slots=True)
class Region:
    """What is where on a slide's thumbnail (h, w, 3), which covers the scanned part.

    `tissue` is what is used; `pen` and `blurred` are what was left out for that reason. `frame` places the pixels,
    of `um_per_px`, on the slide.
    """

    thumbnail: NDArray[np.uint8]
    tissue: Mask
    pen: Mask
    blurred: Mask
    frame: Frame
    um_per_px: float

    def mm2(self, mask: Mask) -> float:
        """The area of a mask."""
        return float(np.count_nonzero(mask)) * self.um_per_px**2 / 1e6


def frame_of(slide: Reader, config: TissueConfig) -> tuple[Frame, float]:
    """The grid of a slide's thumbnail, and its um per pixel."""
    own, bounds = slide.require_mpp(), slide.bounds_l0
    um_per_px = max(config.thumbnail_mpp, own.y, own.x)
    l0_per_px = (um_per_px / own.y, um_per_px / own.x)
    shape = [max(1, math.ceil(n / per - 1e-6)) for n, per in zip(bounds.shape, l0_per_px, strict=True)]
    place = ((shape[0], shape[1]), (bounds.top, bounds.left), l0_per_px)
    return Frame(*place, slide.shape_l0, (own.y, own.x), bounds), um_per_px


def find_tissue(slide: Reader, config: TissueConfig, mask: Path | None = None) -> tuple[Mask, Frame]:
    """As `find_region`, without what is only to be looked at: with the user's mask no pixel is read."""
    if mask is not None:
        frame, _ = frame_of(slide, config)
        return read_outline(mask, frame), frame
    region = find_region(slide, config)
    return region.tissue, region.frame


def find_region(slide: Reader, config: TissueConfig, mask: Path | None = None) -> Region:
    """The tissue of an open slide; with the user's `mask`, exactly that. SlideError where either cannot be read."""
    (frame, um_per_px), own = frame_of(slide, config), slide.require_mpp()
    thumbnail = slide.read(Box.at(0, 0, *frame.shape), um_per_px, frame.origin_l0)
    nothing = np.zeros(frame.shape, np.bool_)
    if mask is not None:
        return Region(thumbnail, read_outline(mask, frame), nothing, nothing, frame, um_per_px)
    found = segment(thumbnail, um_per_px, config)
    blurred = nothing
    if config.skip_blur and max(own.y, own.x) <= COARSE * config.focus_mpp:
        focus_mpp = max(config.focus_mpp, own.y, own.x)
        blurred = out_of_focus(
            lambda box: slide.read(box, focus_mpp, frame.origin_l0, threads=1),
            found.tissue,
            um_per_px / focus_mpp,
            least=config.least_sharpness,
            threads=slide.threads,
        )
    return Region(thumbnail, found.tissue & ~blurred, found.pen, blurred, frame, um_per_px)
