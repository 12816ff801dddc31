"""How results show themselves in a notebook: small pieces of HTML that need neither files nor network."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from holoslide.evaluation.overlay import BoxPx, Placement, encode_png, overlay
from holoslide.inference.heatmap import Heatmap
from holoslide.inference.layers import Layer, layers_of

PICTURE_PX = 260
_QUIET = "color:#777;font-size:12px"


# A slide's pixels (H, W, 3), and where a heatmap's grid lies on them.
Slide = tuple[NDArray[np.uint8], BoxPx]


def heatmap_html(heatmap: Heatmap, *, slide: Slide | None = None) -> str:
    """Attention and the evidence for each class side by side, every cell a square, with legends.

    They lie on the slide where it is given, and else on white.
    """
    pictures = "".join(_picture(layer, slide) for layer in layers_of(heatmap, 1, last=False))
    rows, columns = heatmap.attention_HW.shape
    place = f"{rows} x {columns} cells of {heatmap.cell_l0[0]:g} x {heatmap.cell_l0[1]:g} level-0 pixels"
    corner = f"first corner at y {heatmap.origin_l0[0]:g}, x {heatmap.origin_l0[1]:g}"
    return (
        f'<div style="display:flex;flex-wrap:wrap;gap:18px">{pictures}</div>'
        f'<div style="{_QUIET}">{place}, {corner}</div>'
    )


def prediction_html(
    slide_id: str,
    prediction: str,
    probabilities: Iterable[tuple[str, float]],
    heatmap: Heatmap,
    *,
    slide: Slide | None = None,
) -> str:
    """A slide's probabilities as bars, and its heatmap, on the slide where that is given."""
    bars = "".join(_bar(name, p, own=name == prediction) for name, p in probabilities)
    maps = heatmap_html(heatmap, slide=slide)
    return f"<h4>{escape(slide_id)}: {escape(prediction)}</h4><table>{bars}</table>{maps}"


def table_html(title: str, facts: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    """A title, facts by name, and below them the rows of a table, of which the first is the header."""
    said = "".join(f"<tr>{_cell(name)}{_cell(value)}</tr>" for name, value in facts)
    head = "".join(f'<th style="text-align:left">{escape(text)}</th>' for text in (rows[0] if rows else ()))
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[1:])
    measured = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if rows else ""
    return f"<h4>{escape(title)}</h4><table>{said}</table>{measured}"


def _cell(text: str) -> str:
    return f'<td style="text-align:left">{escape(text)}</td>'


def _bar(name: str, p: float, *, own: bool) -> str:
    colour = "#2a8f80" if own else "#9aa3ad"
    fill = f'<div style="background:{colour};height:9px;width:{100 * p:.1f}%"></div>'
    return (
        f'<tr>{_cell(name)}<td style="width:180px">'
        f'<div style="background:#8883">{fill}</div></td>{_cell(f"{p:.3f}")}</tr>'
    )


def _picture(layer: Layer, slide: Slide | None) -> str:
    rows, columns = layer.values_HW.shape if slide is None else slide[0].shape[:2]
    width = round(PICTURE_PX * min(1, columns / rows))
    ticks = layer.scale.tick_places()
    shift = ["0", *["-50%"] * (len(ticks) - 2), "-100%"]  # labels at the ends stay within the legend
    marks = "".join(
        f'<span style="position:absolute;left:{100 * place:.2f}%;transform:translateX({move})">'
        f"{escape(label)}</span>"
        for (place, label), move in zip(ticks, shift, strict=True)
    )
    return (
        f'<figure style="margin:0"><img src="{_data(_png(layer, slide))}" width="{width}" '
        f'style="image-rendering:pixelated;background:#fff" alt="{escape(layer.scale.unit)}"><br>'
        f'<img src="{_data(layer.legend_png())}" width="{PICTURE_PX}" height="9" alt="legend">'
        f'<div style="{_QUIET};width:{PICTURE_PX}px;position:relative;height:1.5em">{marks}</div>'
        f'<figcaption style="{_QUIET};width:{PICTURE_PX}px">{escape(layer.scale.unit)}<br>{escape(layer.sums)}'
        f"</figcaption></figure>"
    )


def _png(layer: Layer, slide: Slide | None) -> bytes:
    """The layer on the slide, or by itself, one pixel a cell."""
    if slide is None:
        return layer.png()
    pixels, grid_px = slide
    drawn = overlay(pixels, layer.values_HW, Placement.in_box(grid_px, layer.values_HW.shape), layer.scale)
    return encode_png(drawn)


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
