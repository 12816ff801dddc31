"""Where things are on a phantom slide: pieces of tissue, places with room for structures, the pen's way.

Places are chosen on a grid of `CELL_UM`, each kind of thing with a generator of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from holoslide.slides import _structures as structures
from holoslide.slides._paint import Canvas, Fibres, Outline, Places, Plane, lattice, noise, smoothstep, spread

CELL_UM = 8.0  # the grid on which places are chosen


@dataclass(frozen=True, slots=True)
class Spacing:
    """Pairs of neighbours: `gap_um` between the two, `far_um` to all others, edge to edge; radius of each (um)."""

    gap_um: float
    far_um: float
    radius_um: float = 110.0
    pairs: int = 4  # even, so that half of them can be of either kind


class Streams:
    """Generators by name, so that what is drawn for one thing never depends on another."""

    names = ("size", "outline", "fibres", "cells", "scatter", "fat", "vessel", "gland", "places", "shape", "kinds",
             "lesion", "crowd", "nest", "follicle", "glass", "pen", "stain", "blur", "debris")  # fmt: skip

    def __init__(self, seed: tuple[int, ...]) -> None:
        self.seed = seed

    def __call__(self, name: str, index: int = 0) -> np.random.Generator:
        return np.random.default_rng([*self.seed, self.names.index(name), index])


@dataclass(frozen=True, slots=True)
class Ground:
    """A slide while it is painted.

    `depth_um` says of each cell how deep in the tissue it lies, below 0 on glass; `truth_um` is the truth's scale;
    `fat` is how many lobules of fat are tried for beside the usual ones.
    """

    canvas: Canvas
    cells: structures.Cells
    depth_um: Plane
    streams: Streams
    truth_um: float
    fat: int = 0

    def stroma(self) -> None:
        """Collagen with its fibroblasts, and a few lymphocytes."""
        canvas, fibres = self.canvas, Fibres(self.canvas.size_um, self.streams("fibres"))
        structures.stroma(canvas, fibres)
        rng = self.streams("scatter")
        places = self._in_tissue(lattice(canvas.size_um, 24, rng, jitter=0.45), 0)
        places = places[rng.random(len(places)) < 0.7]
        canvas.stamp(
            self.cells.fibroblast, places, fibres.angle(places) + rng.normal(0, 0.15, len(places)), rng
        )
        crowding = noise(rng, self.depth_um.shape, 30)
        places = self._in_tissue(lattice(canvas.size_um, 22, rng, jitter=0.45), 0)
        y, x = (places / CELL_UM).astype(np.int64).T
        places = places[rng.random(len(places)) < 0.35 * np.clip(crowding[y, x] - 0.4, 0, 1)]
        canvas.stamp(self.cells.lymphocyte, places, rng.uniform(0, math.pi, len(places)), rng)

    def _in_tissue(self, places: Places, depth_um: float) -> Places:
        y, x = np.floor(places / CELL_UM).astype(np.int64).T
        inside = (y >= 0) & (x >= 0) & (y < self.depth_um.shape[0]) & (x < self.depth_um.shape[1])
        inside[inside] = self.depth_um[y[inside], x[inside]] > depth_um
        return np.asarray(places[inside])

    def furnish(self, free: NDArray[np.bool_], *, lobules: int) -> None:
        """Put fat, vessels and lobules of glands where there is room, the largest first."""
        self._fatten(free)
        wanted: list[tuple[str, int, tuple[float, float]]] = [
            ("gland", lobules, (170, 330)), ("fat", 4, (130, 330)), ("vessel", 14, (18, 60)),
        ]  # fmt: skip
        for kind, most, radii in wanted:
            rng = self.streams(kind)
            for index in range(int(rng.integers(most // 2, most + 1))):
                radius_um = float(rng.uniform(*radii))
                place = take(free, radius_um, rng, gap_um=20)
                if place is not None:
                    paint = {"gland": structures.lobule, "fat": structures.fat, "vessel": structures.vessel}[
                        kind
                    ]
                    paint(self.canvas, self.cells, place, radius_um, self.streams(kind, index + 1))

    def _fatten(self, free: NDArray[np.bool_]) -> None:
        """Put more fat anywhere in the tissue, its border included, where nothing is yet."""
        places = np.argwhere(self.depth_um > 0)
        for index in range(self.fat):
            rng = self.streams("fat", 1000 + index)
            place = (places[rng.integers(len(places))] + 0.5) * CELL_UM
            radius_um, disc = float(rng.uniform(130, 330)), np.ones_like(free)
            clear(disc, place, radius_um)
            if not (~disc & ~free & (self.depth_um > 40)).any():
                structures.fat(self.canvas, self.cells, place, radius_um, rng)
                clear(free, place, radius_um)

    def truth(self) -> NDArray[np.uint8]:
        """An empty truth."""
        height, width = (round(side / self.truth_um) for side in self.canvas.size_um)
        return np.zeros((height, width), np.uint8)

    def mark(self, truth: NDArray[np.uint8], place: Places, outline: Outline, value: int) -> None:
        """Note in the truth what stands at a place."""
        axes = [(np.arange(side) + 0.5) * self.truth_um for side in truth.shape]
        y, x = np.meshgrid(axes[0] - place[0], axes[1] - place[1], indexing="ij")
        truth[outline.holds(np.stack([y.ravel(), x.ravel()], 1)).reshape(truth.shape)] = value


def pair_up(free: NDArray[np.bool_], dial: Spacing, rng: np.random.Generator) -> Places | None:
    """Centres of neighbours, two and two, (2 * pairs, 2); None if they do not fit."""
    room_um = _room(free)
    allowed = np.argwhere(room_um >= dial.radius_um + 10)
    if not len(allowed):
        return None
    apart, far = 2 * dial.radius_um + dial.gap_um, 2 * dial.radius_um + dial.far_um
    for _ in range(200):
        firsts = (allowed[rng.integers(0, len(allowed), 600)] + 0.5) * CELL_UM
        turns = rng.uniform(0, 2 * math.pi, 600)
        seconds = firsts + apart * np.stack([np.sin(turns), np.cos(turns)], 1)
        pairs = np.stack([firsts, seconds], 1)  # (n, 2, 2)
        cells = np.floor(seconds / CELL_UM).astype(np.int64)
        inside = np.asarray(((cells >= 0) & (cells < room_um.shape)).all(1))
        inside[inside] = room_um[tuple(cells[inside].T)] >= dial.radius_um + 10
        pairs = pairs[inside]
        chosen: list[Places] = []
        while len(pairs) and len(chosen) < dial.pairs:
            chosen.append(pairs[0])
            distances = np.linalg.norm(pairs[:, :, None] - pairs[0][None, None], axis=-1)
            pairs = pairs[distances.min((1, 2)) >= far]
        if len(chosen) == dial.pairs:
            return np.concatenate(chosen)
    return None


def _room(free: NDArray[np.bool_]) -> Plane:
    """How far each cell is from what is not free, in um."""
    padded = np.pad(free, 1).astype(np.uint8)
    return np.asarray(cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1] * np.float32(CELL_UM))


def take(
    free: NDArray[np.bool_], radius_um: float, rng: np.random.Generator, *, gap_um: float
) -> Places | None:
    """A random place with room for a disc, which is free no more, nor is a gap around it; None if there is none."""
    places = np.argwhere(_room(free) >= radius_um)
    if not len(places):
        return None
    place = (places[rng.integers(len(places))] + 0.5) * CELL_UM
    clear(free, place, radius_um + gap_um)
    return np.asarray(place, np.float64)


def clear(free: NDArray[np.bool_], place: Places, radius_um: float) -> None:
    """Take a disc from what is free."""
    y, x = ((np.arange(side) + 0.5) * CELL_UM - at for side, at in zip(free.shape, place, strict=True))
    free[:] &= y[:, None] ** 2 + x[None, :] ** 2 > radius_um**2


def pieces(size_um: tuple[float, float], rng: np.random.Generator, *, most: int, room_um: float) -> Plane:
    """Up to `most` pieces of tissue: how deep in the tissue each cell is, in um, below 0 on glass.

    There are fewer, and they are thicker, where a disc of radius `room_um` would not fit otherwise.
    """
    shape = (round(size_um[0] / CELL_UM), round(size_um[1] / CELL_UM))
    y, x = ((axis.astype(np.float32) + 0.5) * CELL_UM for axis in np.indices(shape))
    thick_um = 1.25 * room_um + 120  # half of a piece, of which the border's bumps may take some
    fit = int(0.43 * max(size_um) / thick_um)
    count = max(1, min(int(rng.integers(1, most + 1)), fit))
    lying = size_um[1] >= size_um[0]  # pieces lie along the longer side
    depth_um = np.full(shape, -1e4, np.float32)
    for index in range(count):
        share = (index + 0.5) / count
        centre = np.array(size_um) * ((0.5, share) if lying else (share, 0.5))
        half = np.array(size_um) * ((0.43, 0.43 / count) if lying else (0.43 / count, 0.43))
        shrink = rng.uniform(
            (0.9, 0.9) if most == 1 else (0.66, 0.84), (1.0, 1.0)
        )  # across, and along the row
        half = np.maximum(half * (shrink if lying else shrink[::-1]), thick_um)
        turn = 0.0 if most == 1 else rng.normal(0, 0.12)
        dy, dx = y - centre[0], x - centre[1]
        v, u = dy * math.cos(turn) - dx * math.sin(turn), dy * math.sin(turn) + dx * math.cos(turn)
        round_ = (np.abs(v / half[0]) ** 2.6 + np.abs(u / half[1]) ** 2.6) ** (1 / 2.6)
        depth_um = np.maximum(depth_um, (1 - round_) * half.min())
    depth_um += 55 * noise(rng, shape, 50) + 16 * noise(rng, shape, 9)
    margin = np.minimum(np.minimum(y, size_um[0] - y), np.minimum(x, size_um[1] - x))
    return np.asarray(np.minimum(depth_um, margin - 80), np.float32)


def tissue_cover(depth_um: Plane, canvas: Canvas, rng: np.random.Generator) -> Plane:
    """The tissue, (H, W), 0 to 1, with frayed edges."""
    fine = spread(depth_um, CELL_UM / canvas.mpp, canvas.shape_px)
    fine += 9 * noise(rng, canvas.shape_px, 30 / canvas.mpp) + 4 * noise(rng, canvas.shape_px, 8 / canvas.mpp)
    return smoothstep(fine, -1.5 - canvas.mpp, 1.5 + canvas.mpp)


def pen_line(depth_um: Plane, rng: np.random.Generator) -> Places:
    """A pen's way along the border of a piece of tissue, some distance outside, (n, 2) in um."""
    away = float(rng.uniform(-60, -20))
    around, _ = cv2.findContours((depth_um > away).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    line = max(around, key=len)[:, 0, ::-1].astype(np.float64) * CELL_UM
    length = int(rng.integers(60, 200))
    start = int(rng.integers(len(line)))
    part = line[(start + np.arange(min(length, len(line)))) % len(line)]
    kernel = np.ones(25) / 25
    padded = np.pad(part, ((12, 12), (0, 0)), mode="edge")
    return np.stack([np.convolve(padded[:, axis], kernel, mode="valid") for axis in (0, 1)], 1)
