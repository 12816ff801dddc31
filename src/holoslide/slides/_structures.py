"""What grows in a phantom's tissue: stroma, glands, vessels, fat, lymphocytes, tumour; then light, glass and ink.

Each function paints one structure onto a canvas at a place in um, (y, x), with a generator of its own.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from holoslide.slides._paint import (
    EPITHELIAL,
    FIBROBLAST,
    INKS_RGB,
    LYMPHOCYTE,
    TUMOUR,
    Canvas,
    Fibres,
    Outline,
    Places,
    Plane,
    Sprites,
    Stain,
    blend,
    lattice,
    noise,
    smoothstep,
    spread,
)


class Cells:
    """The nuclei of one slide, of every kind."""

    def __init__(self, mpp: float, rng: np.random.Generator) -> None:
        self.fibroblast, self.lymphocyte, self.epithelial, self.tumour = (
            Sprites(kind, mpp, rng) for kind in (FIBROBLAST, LYMPHOCYTE, EPITHELIAL, TUMOUR)
        )


def stroma(canvas: Canvas, fibres: Fibres) -> None:
    """Fill the canvas with collagen: pink bundles with clefts between them where it is loose."""
    fine, bundles = fibres.texture(canvas.shape_px, canvas.mpp)
    slack = fibres.spread_slack(canvas.shape_px, canvas.mpp)
    gap = bundles + 0.3 * fine + 1.55 - 0.6 * slack
    open_ = smoothstep(gap, -0.25, 0.35)  # 0 in a cleft
    np.multiply(open_, np.maximum(0.6 + 0.1 * bundles + 0.1 * fine - 0.05 * slack, 0.15), out=canvas.e)
    np.maximum(canvas.e, 0.02, out=canvas.e)
    np.multiply(open_, 0.05 + 0.015 * fine, out=canvas.h)


def gland(canvas: Canvas, cells: Cells, place: Places, radius_um: float, rng: np.random.Generator) -> None:
    """A ring of epithelium around a lumen, its nuclei at the outer side, in a thin sheath."""
    outer, inner = Outline(radius_um, 0.16, rng), Outline(radius_um * rng.uniform(0.3, 0.55), 0.35, rng)
    window, y_um, x_um = canvas.around(place, outer.reach_um + 8)
    e, h = canvas.e[window], canvas.h[window]
    angle, distance = np.arctan2(y_um, x_um), np.hypot(y_um, x_um)
    edge = outer.at(angle)
    sheath = np.exp(-(((distance - edge - 3) / 3) ** 2))
    e += 0.25 * sheath * (1 - e)
    depth = np.clip(distance / edge, 0, 1)
    cover = np.clip((edge - distance) / 1.5 + 0.5, 0, 1)
    grain = noise(rng, e.shape, 3 / canvas.mpp)
    blend(e, 0.34 + 0.16 * depth + 0.03 * grain, cover)
    blend(h, 0.12 + 0.16 * depth**2 + 0.02 * grain, cover)
    lumen = inner.inside(y_um, x_um, 2.5)
    secretion = 0.22 if rng.random() < 0.3 else 0.02
    blend(e, secretion, lumen)
    blend(h, 0.0, lumen)
    count = max(6, round(2 * math.pi * (radius_um - 7) / 7.0))
    turn = np.arange(count) * (2 * math.pi / count) + rng.normal(0, 0.18 / math.sqrt(count), count)
    ring = outer.at(turn) - rng.uniform(5.5, 9.5, count)
    places = place + ring[:, None] * np.stack([np.sin(turn), np.cos(turn)], 1)
    canvas.stamp(cells.epithelial, places, turn + rng.normal(0, 0.2, count), rng)


def lobule(canvas: Canvas, cells: Cells, place: Places, radius_um: float, rng: np.random.Generator) -> None:
    """A round group of glands, close to each other."""
    spacing = float(rng.uniform(76, 92))
    field = lattice((2 * radius_um, 2 * radius_um), spacing, rng, jitter=0.2) - radius_um
    field = field[np.hypot(*field.T) < radius_um - 0.45 * spacing]
    for index, offset in enumerate(field):  # each as large as its nearest neighbour leaves room for
        others = np.delete(field, index, axis=0)
        room_um = np.linalg.norm(others - offset, axis=1).min() if len(others) else spacing
        gland(canvas, cells, place + offset, float(np.clip(rng.uniform(0.4, 0.55) * room_um, 20, 50)), rng)


def nest(canvas: Canvas, cells: Cells, place: Places, radius_um: float, rng: np.random.Generator) -> None:
    """Seven glands, one in the middle, that fill a disc and stay inside it."""
    turn = rng.uniform(0, 2 * math.pi) + np.arange(6) * (math.pi / 3)
    ring = 0.64 * radius_um * np.stack([np.sin(turn), np.cos(turn)], 1)
    for offset in np.concatenate([np.zeros((1, 2)), ring]):
        gland(canvas, cells, place + offset, float(rng.uniform(0.26, 0.3) * radius_um), rng)


def vessel(canvas: Canvas, cells: Cells, place: Places, radius_um: float, rng: np.random.Generator) -> None:
    """A small vessel: muscle around a lumen with or without blood, flat nuclei along it."""
    outer = Outline(radius_um, 0.3, rng)
    window, y_um, x_um = canvas.around(place, outer.reach_um + 4)
    e, h = canvas.e[window], canvas.h[window]
    angle, distance = np.arctan2(y_um, x_um), np.hypot(y_um, x_um)
    edge = outer.at(angle)
    wall = float(rng.uniform(0.14, 0.35))
    cover = np.asarray(np.clip((edge - distance) / 2 + 0.5, 0, 1), np.float32)
    rings = 0.08 * np.sin(distance * (2 * math.pi / 5) + 2 * noise(rng, e.shape, 12 / canvas.mpp))
    blend(e, 0.72 + rings.astype(np.float32), cover)
    blend(h, 0.1, cover)
    lumen = np.asarray(np.clip(((1 - wall) * edge - distance) / 1.5 + 0.5, 0, 1), np.float32)
    blend(h, 0.0, lumen)
    blood = rng.random() < 0.6
    red = noise(rng, e.shape, 3.2 / canvas.mpp)
    blend(e, 0.95 * smoothstep(red, -0.7, 0.1) if blood else 0.02, lumen)
    count = max(5, round(2 * math.pi * radius_um / 14))
    turn = rng.uniform(0, 2 * math.pi, count)
    ring = outer.at(turn) * rng.uniform(1 - wall, 1, count)
    places = place + ring[:, None] * np.stack([np.sin(turn), np.cos(turn)], 1)
    canvas.stamp(cells.fibroblast, places, turn + math.pi / 2, rng)


def fat(canvas: Canvas, cells: Cells, place: Places, radius_um: float, rng: np.random.Generator) -> None:
    """A lobule of fat: round white vacuoles, pressed against each other, in thin membranes."""
    outline = Outline(radius_um, 0.35, rng)
    window, y_um, x_um = canvas.around(place, outline.reach_um)
    e, h = canvas.e[window], canvas.h[window]
    cover = outline.inside(y_um, x_um, 3)
    spacing = 62.0
    seeds = lattice(
        (2 * outline.reach_um + spacing, 2 * outline.reach_um + spacing), spacing, rng, jitter=0.22
    )
    dots = np.full(e.shape, 255, np.uint8)
    cell = (seeds / canvas.mpp).astype(np.int64)
    cell = cell[((cell >= 0) & (cell < e.shape)).all(1)]
    dots[cell[:, 0], cell[:, 1]] = 0
    _, labels = cv2.distanceTransformWithLabels(dots, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    apart = np.ones(e.shape, np.uint8)
    apart[:-1][labels[:-1] != labels[1:]] = 0
    apart[:, :-1][labels[:, :-1] != labels[:, 1:]] = 0
    apart[cover < 0.5] = 0
    depth = cv2.distanceTransform(apart, cv2.DIST_L2, 5) * np.float32(canvas.mpp)
    inner = cv2.GaussianBlur((depth > 3.2).astype(np.float32), (0, 0), 4.0 / canvas.mpp)
    vacuole = smoothstep(
        np.asarray(inner, np.float32), 0.3, 0.42
    )  # less than half: wider than before, its corners rounded
    blend(e, 0.5 - 0.47 * vacuole, cover)
    blend(h, 0.05 * (1 - vacuole), cover)
    walls = np.argwhere((apart == 0) & (cover > 0.9))
    if len(walls):
        picks = walls[rng.integers(0, len(walls), len(seeds) // 3)]
        corner = np.array([window[0].start, window[1].start])
        canvas.stamp(
            cells.fibroblast, (picks + corner) * canvas.mpp, rng.uniform(0, math.pi, len(picks)), rng
        )


def lymphocytes(
    canvas: Canvas, cells: Cells, place: Places, outline: Outline, rng: np.random.Generator
) -> None:
    """A crowd of lymphocytes: small, round, dark, all alike; thinner towards its border."""
    window, y_um, x_um = canvas.around(place, outline.reach_um + 10)
    cover = outline.inside(y_um, x_um, 40)
    blend(canvas.e[window], 0.34, 0.8 * cover)
    blend(canvas.h[window], 0.16, cover)
    offsets = lattice((2 * outline.reach_um, 2 * outline.reach_um), 7.6, rng, jitter=0.42) - outline.reach_um
    depth_um = outline.at(np.arctan2(*offsets.T)) - np.hypot(*offsets.T)
    offsets = offsets[rng.random(len(offsets)) < 0.95 * np.clip((depth_um + 8) / 45, 0, 1)]
    canvas.stamp(cells.lymphocyte, place + offsets, rng.uniform(0, math.pi, len(offsets)), rng)


def tumour(
    canvas: Canvas, cells: Cells, place: Places, outline: Outline, septa: float, rng: np.random.Generator
) -> None:
    """Tumour: crowded nuclei, large, dark and unlike each other, in violet cytoplasm.

    `septa` is the share of pale stroma that parts it into nests; 0 gives one sheet.
    """
    window, y_um, x_um = canvas.around(place, outline.reach_um + 10)
    cover = outline.inside(y_um, x_um, 8)
    bulk = noise(rng, cover.shape, 34 / canvas.mpp)
    if septa > 0:
        edge = float(np.quantile(bulk, septa))
        nests = smoothstep(bulk, edge - 0.1, edge + 0.1)
    else:
        nests = np.ones_like(bulk)
    grain = noise(rng, cover.shape, 7 / canvas.mpp)
    blend(canvas.e[window], 0.42 + 0.06 * grain, cover * nests)
    blend(canvas.h[window], 0.24 + 0.04 * grain, cover * nests)
    offsets = lattice((2 * outline.reach_um, 2 * outline.reach_um), 13.0, rng, jitter=0.36) - outline.reach_um
    offsets = offsets[outline.holds(offsets, 3.0) & (rng.random(len(offsets)) < 0.95)]
    corner = np.array([window[0].start, window[1].start])
    y, x = (np.floor((place + offsets) / canvas.mpp).astype(np.int64) - corner).T
    inside = (y >= 0) & (x >= 0) & (y < nests.shape[0]) & (x < nests.shape[1])
    inside[inside] = nests[y[inside], x[inside]] > 0.5
    offsets = offsets[inside]
    canvas.stamp(cells.tumour, place + offsets, rng.uniform(0, math.pi, len(offsets)), rng)


def tint(canvas: Canvas, place: Places, outline: Outline, target: NDArray[np.floating]) -> None:
    """Scale both stains inside an outline until the mean colour of its surroundings and it is `target` (R, G, B).

    In the usual stain, and over the same window as `mean_light` was taken of: `outline.reach_um + 10` around.
    """
    window, y_um, x_um = canvas.around(place, outline.reach_um + 10)
    inside = outline.inside(y_um, x_um, 8)
    h, e = canvas.h[window], canvas.e[window]
    for _ in range(15):  # red follows haematoxylin; green follows both, so what is left to it is eosin
        now = mean_light(h, e)
        h *= 1 + inside * float(np.clip(math.log(target[0]) / math.log(now[0]) - 1, -0.3, 0.3))
        now = mean_light(h, e)
        e *= 1 + inside * float(np.clip(2 * math.log(target[1]) / math.log(now[1]) - 2, -0.3, 0.3))


def mean_light(h: Plane, e: Plane) -> NDArray[np.floating]:
    """The mean share of light that the usual stain lets through, (R, G, B)."""
    usual = Stain()
    pairs = zip(usual.haematoxylin, usual.eosin, strict=True)
    return np.array([float(np.exp(-(a * h + b * e)).mean(dtype=np.float64)) for a, b in pairs])


def develop(canvas: Canvas, cover: Plane, stain: Stain, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The light that gets through, as RGB: stained tissue where `cover` is 1, uneven glass elsewhere."""
    rgb = np.empty((*canvas.shape_px, 3), np.uint8)
    lamp = spread(1 + 0.004 * noise(rng, (24, 24), 10), max(canvas.shape_px) / 22, canvas.shape_px)
    density = np.array([stain.haematoxylin, stain.eosin], np.float32).T
    grain = rng.standard_normal((512, 4096), dtype=np.float32) * np.float32(stain.noise)
    for top in range(0, canvas.shape_px[0], 256):  # in strips, which stay in the cache
        rows = slice(top, min(top + 256, canvas.shape_px[0]))
        stains = cv2.merge([canvas.h[rows] * cover[rows], canvas.e[rows] * cover[rows]])
        light = cv2.exp(cv2.transform(stains, -density)) * np.array(stain.glass, np.float32)
        light = light * lamp[rows, :, None]
        corner = rng.integers(0, (256, 2048))
        height, width = light.shape[:2]
        tile = grain[corner[0] : corner[0] + height]
        tile = np.take(tile, np.arange(corner[1], corner[1] + width) % tile.shape[1], axis=1)
        light += tile[..., None]
        rgb[rows] = cv2.convertScaleAbs(np.maximum(light, 0))
    return rgb


def ink(
    rgb: NDArray[np.uint8], line_um: Places, mpp: float, rng: np.random.Generator, *, colour: str = "any"
) -> Plane:
    """Draw a felt pen's stroke along a line, in place; gives where it is, (H, W), 0 to 1."""
    drawn = sorted(INKS_RGB)[rng.integers(len(INKS_RGB))]
    let = INKS_RGB[drawn if colour == "any" else colour]
    stroke = np.zeros(rgb.shape[:2], np.uint8)
    points = np.rint(line_um[:, ::-1] / mpp * 16).astype(np.int32)
    cv2.polylines(
        stroke,
        [points],
        isClosed=False,
        color=255,
        thickness=max(1, round(rng.uniform(70, 130) / mpp)),
        lineType=cv2.LINE_AA,
        shift=4,
    )
    corner = np.argwhere(stroke.any(1))[[0, -1], 0], np.argwhere(stroke.any(0))[[0, -1], 0]
    window = slice(corner[0][0], corner[0][1] + 1), slice(corner[1][0], corner[1][1] + 1)
    part = stroke[window].astype(np.float32) * np.float32(1 / 255)
    streaks = np.clip(0.82 + 0.07 * noise(rng, part.shape, 25 / mpp), 0, 1)
    let_through = 1 - (part * streaks)[..., None] * (1 - np.array(let, np.float32))
    rgb[window] = (rgb[window] * let_through).astype(np.uint8)
    return stroke.astype(np.float32) * np.float32(1 / 255)
