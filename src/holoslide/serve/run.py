"""A run as the viewer sees it: its slides, what was predicted, and the layers that can be laid over them."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from holoslide.errors import CheckpointError, SlideError
from holoslide.evaluation.overlay import (
    Scale,
    attention_scale,
    evidence_for,
    evidence_scale,
    relative_attention,
)
from holoslide.inference.heatmap import Heatmap, heatmap_paths
from holoslide.slides.cohort import Cohort, SlideRow
from holoslide.slides.polygons import mask_polygons
from holoslide.slides.raster import Raster

FAINTEST = 0.35  # opacity of a cell whose evidence is 0


@dataclass(frozen=True, slots=True)
class Layer:
    """Scores of one head on its grid, and how they are coloured; `box_l0` (top, left, bottom, right)."""

    name: str
    module: int
    title: str
    values_HW: NDArray[np.float64]
    scale: Scale
    box_l0: tuple[float, float, float, float]

    def facts(self) -> dict[str, Any]:
        """Plain values; ticks are (position from 0 to 1, label)."""
        return {
            "name": self.name,
            "module": self.module,
            "title": self.title,
            "unit": self.scale.unit,
            "rows": self.values_HW.shape[0],
            "columns": self.values_HW.shape[1],
            "box_l0": self.box_l0,
            "ticks": self.scale.tick_places(),
        }

    def png(self) -> bytes:
        """One pixel per cell, transparent where no cell votes, and nearly so where evidence says little."""
        alpha = np.where(np.isfinite(self.values_HW), self._opacity(), 0.0)
        rgba = np.dstack([self.scale.colour(self.values_HW), 255 * alpha]).round().astype(np.uint8)
        return _png(rgba)

    def _opacity(self) -> NDArray[np.float64]:
        """1, but for evidence less the nearer it is to 0: its pale middle colours would veil the tissue."""
        if not self.scale.low < 0 < self.scale.high:
            return np.ones(self.values_HW.shape)
        strength = np.abs(2 * self.scale.position(self.values_HW) - 1)
        return FAINTEST + (1 - FAINTEST) * np.nan_to_num(np.sqrt(strength))

    def legend_png(self) -> bytes:
        """The scale from low to high, as the layer's colours are."""
        place = np.linspace(0, 1, 256)
        if self.scale.logarithmic:
            values = self.scale.low * (self.scale.high / self.scale.low) ** place
        else:
            values = self.scale.low + place * (self.scale.high - self.scale.low)
        return _png(self.scale.colour(values)[None].round().astype(np.uint8))

    def raw(self) -> bytes:
        """The scores as little-endian float32, row by row; NaN where no cell votes."""
        return self.values_HW.astype("<f4").tobytes()


class RunView:
    """The folder of a run, read when the viewer starts; `rasters` is where its prepared slides are."""

    def __init__(self, folder: Path, rasters: Path | None = None) -> None:
        if not (folder / "cohort.csv").is_file():
            raise CheckpointError(
                folder, "is not a run: it has no cohort.csv", "give the folder that train wrote"
            )
        self.folder, self.rasters = folder, rasters
        cohort = Cohort.from_csv(folder / "cohort.csv")
        self.rows: dict[str, SlideRow] = {row.slide_id: row for row in cohort}
        self.predictions = {row["slide_id"]: row for row in _table(folder / "predictions.csv")}
        self.by_module = _table(folder / "predictions_modules.csv")
        self.modules = max((int(row["module"]) for row in self.by_module), default=1)
        named = [key[2:] for key in next(iter(self.predictions.values()), {}) if key.startswith("p_")]
        self.classes = tuple(named) or cohort.classes
        self.layers = lru_cache(maxsize=16)(self._layers)
        self.outline = lru_cache(maxsize=64)(self._outline)

    def slides(self) -> list[dict[str, Any]]:
        """A line for each slide of the run, in the table's order."""
        return [self._line(row) for row in self.rows.values()]

    def probabilities(self, slide_id: str) -> list[dict[str, Any]]:
        """Each module's probabilities of the classes, the last being the model's."""
        rows = [row for row in self.by_module if row["slide_id"] == slide_id]
        return [{"module": int(row["module"]), "p": self._p(row)} for row in rows]

    def _line(self, row: SlideRow) -> dict[str, Any]:
        predicted = self.predictions.get(row.slide_id)
        return {
            "id": row.slide_id,
            "patient": row.patient_id,
            "label": row.label,
            "split": row.split,
            "prediction": predicted["prediction"] if predicted else None,
            "p": self._p(predicted) if predicted else None,
            "heatmap": self._paths(row.slide_id)[-1].is_file(),
            "file": row.path.name if row.path is not None else None,
        }

    def _p(self, row: dict[str, str]) -> list[float]:
        return [float(row[f"p_{name}"]) for name in self.classes]

    def _paths(self, slide_id: str) -> list[Path]:
        return heatmap_paths(self.folder / "heatmaps", slide_id, self.modules)

    def _layers(self, slide_id: str) -> dict[str, Layer]:
        layers: dict[str, Layer] = {}
        for module, path in enumerate(self._paths(slide_id), start=1):
            if not path.is_file():
                continue
            heatmap = Heatmap.load(path)
            layers |= {layer.name: layer for layer in _of_head(heatmap, module, last=module == self.modules)}
        return layers

    def _outline(self, slide_id: str) -> list[list[list[tuple[float, float]]]]:
        """The tissue as polygons, each an outline and its holes, of level-0 points (x, y)."""
        if self.rasters is None:
            return []
        path = self.rasters / f"{slide_id}.tif"
        if not path.is_file():
            return []
        with Raster.open(path) as raster:
            cell = raster.mask_cell_px
            per_y, per_x = raster.l0_per_px
            origin = float(raster.origin_l0[0]), float(raster.origin_l0[1])
            pieces = mask_polygons(raster.mask, origin, (cell * per_y, cell * per_x))
        return [
            [[(round(x, 1), round(y, 1)) for x, y in ring.coords] for ring in (p.exterior, *p.interiors)]
            for p in pieces
        ]


def _of_head(heatmap: Heatmap, module: int, *, last: bool) -> list[Layer]:
    where = f"module {module}" + (" (the model's)" if last else "")
    relative = relative_attention(heatmap.attention_HW)
    layers = [
        Layer(
            f"attention-{module}",
            module,
            f"Attention, {where}",
            relative,
            attention_scale([relative]),
            heatmap.box_l0,
        )
    ]
    for number, name in enumerate(heatmap.classes):
        evidence = evidence_for(heatmap.evidence_LHW, number)
        scale, title = evidence_scale(evidence, name), f"Evidence for {name}, {where}"
        layers.append(Layer(f"evidence-{module}-{number}", module, title, evidence, scale, heatmap.box_l0))
    return layers


def _table(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for key, value in row.items():
            if key.startswith("p_") and not math.isfinite(float(value)):
                raise SlideError(path, f"holds {value} for {row['slide_id']}", "evaluate the run again")
    return rows


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()
