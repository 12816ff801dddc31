"""A run as the viewer sees it: its slides, what was predicted, and the layers that can be laid over them."""

from __future__ import annotations

import csv
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from holoslide.errors import CheckpointError, SlideError
from holoslide.inference.heatmap import Heatmap, heatmap_paths
from holoslide.inference.layers import Layer, layers_of
from holoslide.slides.cohort import Cohort, SlideRow
from holoslide.slides.polygons import mask_polygons
from holoslide.slides.raster import Raster


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
            layers |= {layer.name: layer for layer in layers_of(heatmap, module, last=module == self.modules)}
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
