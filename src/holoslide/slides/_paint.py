"""What phantom slides are painted with: two stains on a canvas, fibres, nuclei, glands, vessels, fat, ink.

A canvas holds how much haematoxylin and eosin there is at each pixel; light is let through by Beer and Lambert's
law when it is developed. All lengths are in um, places are (y, x) in um from the canvas's first corner; only
the canvas knows its pixels. Each structure takes a generator of its own, so that one does not change another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.float32]
Places = NDArray[np.float64]  # (n, 2), um

ANGLES, VARIANTS = (
    12,
    8,
)  # sprites of a kind of nucleus: orientations over half a turn, and individuals of each
INKS_RGB = {
    "black": (0.18, 0.18, 0.2),
    "blue": (0.2, 0.3, 0.75),
    "green": (0.2, 0.6, 0.4),
    "red": (0.8, 0.2, 0.25),
}


@dataclass(frozen=True, slots=True)
class Nucleus:
    """A kind of nucleus: axes (um), their relative spread, bumpiness, darkness and its spread, chromatin."""

    long_um: float
    short_um: float
    spread: float
    bumps: float
    dark: float
    dark_spread: float
    clumps: float
    nucleoli: bool = False


FIBROBLAST = Nucleus(12, 2.8, 0.25, 0.05, 0.95, 0.15, 0.1)
LYMPHOCYTE = Nucleus(6.6, 6.0, 0.08, 0.04, 1.25, 0.1, 0.2)
EPITHELIAL = Nucleus(9.5, 6.0, 0.12, 0.05, 0.85, 0.1, 0.2)
TUMOUR = Nucleus(14.5, 11, 0.24, 0.1, 1.0, 0.2, 0.4, nucleoli=True)


@dataclass(frozen=True, slots=True)
class Stain:
    """Optical density (R, G, B) of one unit of either stain, the glass's colour, and the scanner's noise."""

    haematoxylin: tuple[float, float, float] = (1.22, 1.24, 0.64)
    eosin: tuple[float, float, float] = (0.12, 0.96, 0.64)
    glass: tuple[float, float, float] = (243.0, 242.0, 243.0)
    noise: float = 2.0

    @classmethod
    def drawn(cls, rng: np.random.Generator, spread: float) -> Stain:
        """One laboratory's and scanner's: strength, hue and glass vary; `spread` 0 gives the usual stain."""
        stains = []
        for usual in (cls().haematoxylin, cls().eosin):
            strength = math.exp(spread * rng.normal(0, 0.12))
            hue = np.exp(spread * rng.normal(0, 0.06, 3))
            stains.append(_triple(np.array(usual) * strength * hue))
        glass = np.array(cls().glass) + spread * (rng.uniform(-6, 3) + rng.normal(0, 1, 3))
        return cls(stains[0], stains[1], _triple(glass), noise=float(rng.uniform(1.5, 2.5)))


def _triple(values: NDArray[np.float64]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


class Canvas:
    """Amounts of haematoxylin `h` and eosin `e`, (H, W) each, of a field of (height, width) um."""

    def __init__(self, size_um: tuple[float, float], mpp: float) -> None:
        self.mpp = mpp
        self.size_um = size_um
        self.shape_px = (round(size_um[0] / mpp), round(size_um[1] / mpp))
        self.h = np.zeros(self.shape_px, np.float32)
        self.e = np.zeros(self.shape_px, np.float32)

    def around(self, place: Places, reach_um: float) -> tuple[tuple[slice, slice], Plane, Plane]:
        """The pixels within `reach_um` of a place: their slices, and (y, x) from the place in um."""
        axes, slices = [], []
        for centre_um, side in zip(place, self.shape_px, strict=True):
            start = max(0, math.floor((centre_um - reach_um) / self.mpp))
            stop = max(start, min(side, math.ceil((centre_um + reach_um) / self.mpp)))
            slices.append(slice(start, stop))
            axes.append(((np.arange(start, stop) + 0.5) * self.mpp - centre_um).astype(np.float32))
        y_um, x_um = np.meshgrid(axes[0], axes[1], indexing="ij")
        return (slices[0], slices[1]), y_um, x_um

    def stamp(
        self, nuclei: Sprites, places: Places, angles: NDArray[np.float64], rng: np.random.Generator
    ) -> None:
        """Put a nucleus at each place, its long axis at `angles` (from x towards y)."""
        bins = np.rint(angles / math.pi * ANGLES).astype(np.int64) % ANGLES
        picks = rng.integers(0, VARIANTS, len(places))
        half = nuclei.side // 2
        corners = np.floor(places / self.mpp).astype(np.int64) - half
        bottom, right = np.array(self.shape_px) - nuclei.side
        inside = (corners >= 0).all(1) & (corners[:, 0] <= bottom) & (corners[:, 1] <= right)
        for (top, left), angle, pick in zip(
            corners[inside].tolist(), bins[inside].tolist(), picks[inside].tolist(), strict=True
        ):
            under = self.h[top : top + nuclei.side, left : left + nuclei.side]
            np.maximum(under, nuclei.h[angle, pick], out=under)


class Sprites:
    """Pictures of nuclei of one kind, drawn once and stamped often: `h` is (angles, variants, side, side)."""

    def __init__(self, kind: Nucleus, mpp: float, rng: np.random.Generator) -> None:
        count = ANGLES * VARIANTS
        self.side = 2 * math.ceil(0.5 * kind.long_um * math.exp(2.5 * kind.spread) / mpp) + 3
        shape = (count, 1, 1)
        size = np.exp(kind.spread * np.clip(rng.normal(0, 1, shape), -2, 2))
        slimness = np.exp(0.4 * kind.spread * np.clip(rng.normal(0, 1, shape), -2, 2))
        long, short = 0.5 * kind.long_um * size * slimness, 0.5 * kind.short_um * size / slimness
        turn = (np.arange(count) // VARIANTS).reshape(shape) * (math.pi / ANGLES)
        turn = turn + rng.normal(0, 0.5 * math.pi / ANGLES, shape)
        axis = (np.arange(self.side) - self.side // 2) * mpp
        y = axis[:, None] + rng.uniform(-0.5, 0.5, shape) * mpp
        x = axis[None, :] + rng.uniform(-0.5, 0.5, shape) * mpp
        u = (x * np.cos(turn) + y * np.sin(turn)) / long
        v = (y * np.cos(turn) - x * np.sin(turn)) / short
        around = np.arctan2(v, u)
        rim = np.ones_like(u)
        for lobes in (2, 3, 4):
            rim += (
                kind.bumps
                / (lobes - 1)
                * rng.normal(0, 1, shape)
                * np.cos(lobes * around + rng.uniform(0, 6.3, shape))
            )
        radius = np.hypot(u, v) / np.maximum(rim, 0.4)
        cover = np.clip((1 - radius) * np.minimum(long, short) / mpp + 0.5, 0, 1)
        clumps = rng.standard_normal(u.shape).astype(np.float32)
        clumps = np.stack([cv2.GaussianBlur(each, (0, 0), max(0.4, 0.9 / mpp)) for each in clumps])
        clumps /= clumps.std()
        dark = kind.dark * np.exp(rng.normal(0, kind.dark_spread, shape))
        inner = 0.72 + 0.28 * np.clip(radius, 0, 1) ** 3 + 0.5 * kind.clumps * clumps
        if kind.nucleoli:
            spot = np.hypot(u - rng.uniform(-0.4, 0.4, shape), v - rng.uniform(-0.4, 0.4, shape)) * short
            inner = inner + 0.5 * np.exp(-((spot / 1.4) ** 2))
        self.h = (cover * dark * np.maximum(inner, 0.2)).astype(np.float32)
        self.h = self.h.reshape(ANGLES, VARIANTS, self.side, self.side)


def noise(rng: np.random.Generator, shape: tuple[int, int], step: float) -> Plane:
    """Smooth noise of mean 0 and deviation about 1, (h, w); `step` is its grain in array cells."""
    cells = [math.ceil(side / step) + 3 for side in shape]
    coarse = rng.standard_normal(cells, dtype=np.float32)
    size = (math.ceil(cells[1] * step), math.ceil(cells[0] * step))
    fine = cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)
    start = int(step)  # away from the border, where resizing repeats values
    return np.asarray(fine[start : start + shape[0], start : start + shape[1]] * 1.3, np.float32)


def smoothstep(values: Plane, low: float, high: float) -> Plane:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((values - low) * (1 / (high - low)), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


class Fibres:
    """Wavy bundles of collagen: lines of equal `across` are the fibres, on a coarse grid of `step_um`."""

    step_um = 8.0

    def __init__(self, size_um: tuple[float, float], rng: np.random.Generator) -> None:
        shape = (math.ceil(size_um[0] / self.step_um) + 2, math.ceil(size_um[1] / self.step_um) + 2)
        y, x = (axis.astype(np.float32) * self.step_um for axis in np.indices(shape))
        turn = rng.uniform(0, math.pi)
        along = x * math.cos(turn) + y * math.sin(turn) + 150 * noise(rng, shape, 90)
        across = y * math.cos(turn) - x * math.sin(turn)
        for grain, height in ((140, 230), (50, 50), (22, 17), (10, 7)):
            across += height * noise(rng, shape, grain)
        phase = 3 * noise(rng, shape, 25)
        across += (4 + 2.5 * noise(rng, shape, 30)) * np.sin(along * (2 * math.pi / 75) + phase)  # crimp
        self.across, self.along = across - across.min() + 8, along - along.min() + 8
        self.slack = noise(rng, shape, 45) + 0.5 * noise(rng, shape, 12)  # high: loose, with clefts
        self.rng = rng

    def angle(self, places: Places) -> NDArray[np.float64]:
        """The direction of the fibres at places, from x towards y."""
        gradient_y, gradient_x = np.gradient(cv2.GaussianBlur(self.across, (0, 0), 3))
        y, x = np.clip(
            (places / self.step_um).astype(np.int64).T, 0, np.array(self.across.shape)[:, None] - 1
        )
        return np.asarray(np.arctan2(gradient_y[y, x], gradient_x[y, x]) + math.pi / 2, np.float64)

    def texture(self, shape_px: tuple[int, int], mpp: float) -> tuple[Plane, Plane]:
        """Fine fibres, and their bundles, (H, W) each with deviation about 1."""
        stretch = 4.0  # the texture is that much coarser along the fibres
        sheet_shape = (math.ceil(self.across.max()) + 8, math.ceil(self.along.max() / stretch) + 8)
        rows, columns = (self._spread(plane, shape_px, mpp) for plane in (self.across, self.along / stretch))
        planes = []
        for sigma in ((0.9, 3.0), (3.2, 7.0)):
            sheet = cv2.GaussianBlur(
                self.rng.standard_normal(sheet_shape, dtype=np.float32),
                (0, 0),
                sigmaX=sigma[1],
                sigmaY=sigma[0],
            )
            sheet *= 1 / sheet.std()
            plane = cv2.remap(sheet, columns, rows, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
            planes.append(np.asarray(plane, np.float32))
        return planes[0], planes[1]

    def spread_slack(self, shape_px: tuple[int, int], mpp: float) -> Plane:
        """How loose the tissue is, (H, W)."""
        return self._spread(self.slack, shape_px, mpp)

    def _spread(self, plane: Plane, shape_px: tuple[int, int], mpp: float) -> Plane:
        return spread(plane, self.step_um / mpp, shape_px)


def spread(plane: Plane, factor: float, shape_px: tuple[int, int]) -> Plane:
    """A coarse plane on a grid `factor` times finer."""
    scale = np.array([[1 / factor, 0, 0.5 / factor - 0.5], [0, 1 / factor, 0.5 / factor - 0.5]])
    return np.asarray(
        cv2.warpAffine(
            plane,
            scale,
            shape_px[::-1],
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        ),
        np.float32,
    )


def lattice(
    size_um: tuple[float, float], spacing_um: float, rng: np.random.Generator, *, jitter: float = 0.3
) -> Places:
    """Jittered hexagonal places over a field, which never crowd nor leave gaps."""
    rows = np.arange(0, size_um[0], spacing_um * math.sqrt(0.75))
    columns = np.arange(0, size_um[1], spacing_um)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    x = x + (np.arange(len(rows)) % 2)[:, None] * (0.5 * spacing_um)
    places = np.stack([y.ravel(), x.ravel()], 1)
    return np.asarray(places + rng.uniform(-jitter, jitter, places.shape) * spacing_um)


class Outline:
    """A bumpy closed line around a place: its radius (um) in every direction."""

    directions = 1024

    def __init__(self, radius_um: float, bumps: float, rng: np.random.Generator) -> None:
        self.radius_um = radius_um
        lobes = np.arange(2, 20)[:, None]
        heights = np.clip(rng.normal(0, 1, lobes.shape), -1.5, 1.5) * bumps / lobes**1.25
        turn = np.arange(self.directions) * (2 * math.pi / self.directions)
        bumpy = 1 + (heights * np.cos(lobes * turn + rng.uniform(0, 2 * math.pi, lobes.shape))).sum(0)
        self.table_um = (radius_um * np.maximum(bumpy, 0.4)).astype(np.float32)
        self.reach_um = float(self.table_um.max())

    def at(self, angle: NDArray[np.floating]) -> NDArray[np.float32]:
        """Radius in um at angles."""
        index = np.rint(angle * (self.directions / (2 * math.pi))).astype(np.int32)
        return np.asarray(np.take(self.table_um, index & (self.directions - 1)), np.float32)

    def inside(self, y_um: Plane, x_um: Plane, soft_um: float) -> Plane:
        """1 inside, 0 outside, soft over `soft_um`."""
        depth = self.at(np.arctan2(y_um, x_um)) - np.hypot(y_um, x_um)
        return np.asarray(np.clip(depth * (1 / soft_um) + 0.5, 0, 1), np.float32)

    def holds(self, offsets: Places, margin_um: float = 0.0) -> NDArray[np.bool_]:
        """Whether offsets from the centre, (n, 2), lie inside by `margin_um`."""
        return np.asarray(np.hypot(*offsets.T) < self.at(np.arctan2(*offsets.T)) - margin_um)


def blend(plane: Plane, value: float | Plane, share: Plane) -> None:
    """Replace a share of a plane by a value, in place."""
    plane += (value - plane) * share
