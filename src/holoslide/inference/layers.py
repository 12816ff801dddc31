"""A heatmap's layers as pictures for a browser: the attention, and the evidence for each class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holoslide.evaluation.overlay import encode_png
from holoslide.evaluation.scales import (
    Scale,
    attention_scale,
    attention_sums,
    evidence_for,
    evidence_scale,
    evidence_sums,
    relative_attention,
)
from holoslide.inference.heatmap import Heatmap

FAINTEST = 0.35  # opacity of a cell whose evidence is 0


@dataclass(frozen=True, slots=True)
class Layer:
    """Scores of one head on its grid, how they are coloured and, in a line of numbers, how they add up.

    `box_l0` is (top, left, bottom, right).
    """

    name: str
    module: int
    title: str
    values_HW: NDArray[np.float64]
    scale: Scale
    sums: str
    box_l0: tuple[float, float, float, float]

    def facts(self) -> dict[str, Any]:
        """Plain values; ticks are (position from 0 to 1, label)."""
        return {
            "name": self.name,
            "module": self.module,
            "title": self.title,
            "unit": self.scale.unit,
            "sums": self.sums,
            "rows": self.values_HW.shape[0],
            "columns": self.values_HW.shape[1],
            "box_l0": self.box_l0,
            "ticks": self.scale.tick_places(),
        }

    def png(self) -> bytes:
        """One pixel per cell, transparent where no cell votes, and nearly so where evidence says little."""
        alpha = np.where(np.isfinite(self.values_HW), self._opacity(), 0.0)
        rgba = np.dstack([self.scale.colour(self.values_HW), 255 * alpha]).round().astype(np.uint8)
        return encode_png(rgba)

    def _opacity(self) -> NDArray[np.float64]:
        """1, but for evidence less the nearer it is to 0: its pale middle colours would veil the tissue."""
        if not self.scale.low < 0 < self.scale.high:
            return np.ones(self.values_HW.shape)
        strength = np.abs(2 * self.scale.position(self.values_HW) - 1)
        return FAINTEST + (1 - FAINTEST) * np.nan_to_num(np.sqrt(strength))

    def legend_png(self) -> bytes:
        """The scale from low to high, as the layer's colours are."""
        return encode_png(self.scale.strip().round().astype(np.uint8))

    def raw(self) -> bytes:
        """The scores as little-endian float32, row by row; NaN where no cell votes."""
        return self.values_HW.astype("<f4").tobytes()


def layers_of(heatmap: Heatmap, module: int, *, last: bool) -> list[Layer]:
    """The attention, then each class's evidence, of the head of a module, counted from 1."""
    where = f"module {module}" + (" (the model's)" if last else "")
    relative = relative_attention(heatmap.attention_HW)
    layers = [
        Layer(
            f"attention-{module}",
            module,
            f"Attention, {where}",
            relative,
            attention_scale([relative]),
            attention_sums(relative),
            heatmap.box_l0,
        )
    ]
    for number, name in enumerate(heatmap.classes):
        evidence = evidence_for(heatmap.evidence_LHW, number)
        layers.append(
            Layer(
                f"evidence-{module}-{number}",
                module,
                f"Evidence for {name}, {where}",
                evidence,
                evidence_scale(evidence, name),
                evidence_sums(evidence),
                heatmap.box_l0,
            )
        )
    return layers
