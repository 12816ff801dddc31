"""A legend below a drawn heatmap, for pictures that travel alone."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from numpy.typing import NDArray

from holoslide.evaluation.overlay import legend_strip
from holoslide.evaluation.scales import Scale

LEAST_WIDTH_PX = 320  # for the labels; a narrower picture gets white beside it
_MARGIN, _STRIP, _LINE, _TEXT = 10, 10, 17, 12  # px


def with_legend(drawn_HW3: NDArray[np.uint8], scale: Scale, sums: str) -> NDArray[np.uint8]:
    """The picture with its scale and how it adds up below; its own pixels stay at the top left."""
    height, width = drawn_HW3.shape[0], max(drawn_HW3.shape[1], LEAST_WIDTH_PX)
    lines = textwrap.wrap(scale.unit, width // 7) + textwrap.wrap(sums, width // 7)
    below = 2 * _MARGIN + _STRIP + _LINE * (len(lines) + 1)
    sheet = PIL.Image.new("RGB", (width, height + below), "white")
    sheet.paste(PIL.Image.fromarray(drawn_HW3), (0, 0))
    length, y = width - 2 * _MARGIN, height + _MARGIN
    strip = np.repeat(legend_strip(scale, length), _STRIP, axis=0)
    sheet.paste(PIL.Image.fromarray(strip), (_MARGIN, y))
    pen, font = PIL.ImageDraw.Draw(sheet), _font()
    ticks = scale.tick_places()
    for number, (place, label) in enumerate(ticks):
        anchor = "la" if number == 0 else "ra" if number == len(ticks) - 1 else "ma"
        pen.text((_MARGIN + place * length, y + _STRIP + 2), label, "black", font, anchor)
    for number, line in enumerate(lines, start=1):
        pen.text((_MARGIN, y + _STRIP + 4 + number * _LINE), line, "black", font)
    return np.asarray(sheet)


def _font() -> PIL.ImageFont.FreeTypeFont:
    """matplotlib's own, which has all signs that a legend needs."""
    return PIL.ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", _TEXT)
