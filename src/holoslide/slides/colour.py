"""Colours as a slide's ICC profile means them, in sRGB."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holoslide.errors import SlideError
from holoslide.slides.facts import one_line, shown

_WITHOUT = "prepare it without prepare.icc"


class ToSrgb:
    """Turns a slide's RGB into sRGB, perceptually, as its profile says; `name` tells which profile that is.

    SlideError for a profile that is damaged, or not of RGB.
    """

    def __init__(self, path: Path, profile: bytes) -> None:
        from PIL import ImageCms

        try:
            own: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if own.profile.xcolor_space.strip() != "RGB":
                what = f"has a colour profile of kind {one_line(own.profile.xcolor_space)}, not RGB"
                raise SlideError(shown(path), what, _WITHOUT)
            srgb = ImageCms.createProfile("sRGB")
            self._transform: Any = ImageCms.buildTransform(own, srgb, "RGB", "RGB")
            said = one_line(ImageCms.getProfileDescription(own))
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            what = f"has a colour profile that cannot be used ({one_line(error)})"
            raise SlideError(shown(path), what, _WITHOUT) from error
        self.name = f"{said} (sha256 {hashlib.sha256(profile).hexdigest()[:16]})"

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """RGB (h, w, 3) in, the same out, each pixel by itself."""
        from PIL import Image

        if not pixels.size:
            return pixels
        image = Image.fromarray(np.ascontiguousarray(pixels))
        self._transform.apply_in_place(image)
        return np.asarray(image)
