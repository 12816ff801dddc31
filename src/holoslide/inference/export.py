"""Heatmaps as other programs read them: QuPath's GeoJSON, CLAM's attention H5, a pyramidal OME-TIFF.

| file | read by | frame |
| --- | --- | --- |
| `.geojson` | QuPath, anything that reads GeoJSON | level-0 pixels from the frame's corner, x first |
| `.h5` | CLAM's heatmap scripts and what follows them | level-0 pixel of a cell's corner, x first |
| `.ome.tif` | QuPath, Fiji, napari: see `export_tiff.py` | a smaller image of the frame, in um |

The frame is what QuPath shows of a slide: the part that was scanned, where the slide says which (OpenSlide's
bounds), else all of it. QuPath's OpenslideImageServer crops to it unless told `--no-crop`. CLAM reads by OpenSlide,
whose level 0 is always the whole slide.
"""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from holoslide.errors import ConfigError
from holoslide.evaluation.scales import evidence_for, evidence_scale, relative_attention
from holoslide.files import write_atomically, write_text
from holoslide.geometry import Box
from holoslide.inference.heatmap import Heatmap
from holoslide.slides.polygons import mask_polygons
from holoslide.slides.raster import RasterRecord

_NAMESPACE = uuid.UUID("6f1f9a0c-5d0e-4c61-9a55-4d1c3f6a2b10")  # of ids: a cell has one for ever, by model
HOT_RGB = (214, 96, 30)


@dataclass(frozen=True, slots=True)
class Exported:
    """One slide's heatmap with what its file must say: the slide's id, size and um per pixel (y, x) of level 0.

    `prediction` is the class whose evidence is drawn. `frame_l0` is the part of level 0 that a viewer shows, and
    counts from. `model` tells models apart: the hash of its weights.
    """

    slide_id: str
    heatmap: Heatmap
    prediction: str
    shape_l0: tuple[int, int]
    mpp: tuple[float, float]
    frame_l0: Box
    model: str = ""

    @classmethod
    def of(
        cls, heatmap: Heatmap, record: RasterRecord, prediction: str, *, crop: bool = True, model: str = ""
    ) -> Exported:
        """With the slide's facts from its raster's record; `crop` frames the scanned part, else the whole slide."""
        shape, recipe = record.shape_l0, record.recipe
        frame = Box(*record.bounds_l0) if crop else Box(0, 0, *shape)
        return cls(recipe.slide_id, heatmap, prediction, shape, recipe.slide_mpp, frame, model)

    @property
    def origin_l0(self) -> tuple[float, float]:
        """The grid's first corner (y, x), counted from the frame's."""
        y, x = self.heatmap.origin_l0
        return y - self.frame_l0.top, x - self.frame_l0.left

    @property
    def evidence(self) -> NDArray[np.float64]:
        """The prediction's evidence above the other classes', per cell."""
        return evidence_for(self.heatmap.evidence_LHW, self.heatmap.classes.index(self.prediction))


# --- QuPath -------------------------------------------------------------------------------------------------------


def write_geojson(path: Path, slide: Exported, *, share: float = 0.5) -> None:
    """Cells as detections with measurements, hot regions as annotations, in level-0 pixels of the frame.

    Hot are the strongest cells that together hold `share` of all evidence that speaks for the prediction.
    """
    checked_share(share)
    features = [*_regions(slide, share), *_cells(slide)]
    text = json.dumps({"type": "FeatureCollection", "features": features}, allow_nan=False)
    write_text(text, path)


def checked_share(share: float) -> float:
    """The share, which must be above 0 and at most 1. Raises `ConfigError`."""
    if not 0 < share <= 1:
        raise ConfigError("hot regions", f"a share of {share} cannot be", "give a number above 0, up to 1")
    return share


def hot_cells(evidence_HW: NDArray[np.float64], share: float) -> NDArray[np.bool_]:
    """The strongest cells that hold `share` of the positive evidence; none where none is positive.

    >>> hot_cells(np.array([[5.0, 3.0, 1.0, -9.0, np.nan]]), 0.5)
    array([[ True, False, False, False, False]])
    """
    positive = np.where(np.isfinite(evidence_HW), np.maximum(evidence_HW, 0), 0)
    falling = np.sort(positive, axis=None)[::-1]
    total = falling.sum()
    if total <= 0:
        return np.zeros(evidence_HW.shape, np.bool_)
    last = int(np.searchsorted(np.cumsum(falling), share * total * (1 - 1e-9)))
    result: NDArray[np.bool_] = (positive >= falling[min(last, len(falling) - 1)]) & (positive > 0)
    return result


def _cells(slide: Exported) -> Iterator[dict[str, Any]]:
    heatmap, evidence = slide.heatmap, slide.evidence
    relative = relative_attention(heatmap.attention_HW)
    colours = evidence_scale(evidence, slide.prediction).colour(evidence).round().astype(int)
    (top, left), (side_y, side_x) = slide.origin_l0, heatmap.cell_l0
    for y, x in np.argwhere(np.isfinite(heatmap.attention_HW)):
        measurements = {
            "attention": float(heatmap.attention_HW[y, x]),
            "attention, times the average": float(relative[y, x]),
            f"evidence for {slide.prediction}, above the others (logits)": float(evidence[y, x]),
        }
        for name, values_HW in zip(heatmap.classes, heatmap.evidence_LHW, strict=True):
            measurements[f"evidence for {name} (logits)"] = float(values_HW[y, x])
        corners = [(0, 0), (0, 1), (1, 1), (1, 0), (0, 0)]
        ring = [[left + (x + dx) * side_x, top + (y + dy) * side_y] for dy, dx in corners]
        yield _feature(
            slide,
            f"cell {y} {x}",
            {"type": "Polygon", "coordinates": [ring]},
            {"objectType": "detection", "color": colours[y, x].tolist(), "measurements": measurements},
        )


def _regions(slide: Exported, share: float) -> Iterator[dict[str, Any]]:
    evidence = slide.evidence
    hot = hot_cells(evidence, share)
    total = float(evidence[hot].sum())
    name = f"hot: {slide.prediction}"
    (top, left), (side_y, side_x) = slide.origin_l0, slide.heatmap.cell_l0
    for number, piece in enumerate(mask_polygons(hot, slide.origin_l0, slide.heatmap.cell_l0), start=1):
        shapely.prepare(piece)
        rows, columns = np.nonzero(hot)
        centres = shapely.points(left + (columns + 0.5) * side_x, top + (rows + 0.5) * side_y)
        inside = shapely.contains(piece, centres)
        held = float(evidence[rows[inside], columns[inside]].sum())
        measurements = {
            f"evidence for {slide.prediction}, above the others (logits)": held,
            "share of the hot cells' evidence": held / total,
            "cells": float(inside.sum()),
            "area (um^2)": float(piece.area * slide.mpp[0] * slide.mpp[1]),
        }
        properties = {
            "objectType": "annotation",
            "name": f"{name} {number}",
            "color": list(HOT_RGB),
            "classification": {"name": name, "color": list(HOT_RGB)},
            "isLocked": True,
            "measurements": measurements,
        }
        yield _feature(slide, f"region {number}", shapely.geometry.mapping(piece), properties)


def _feature(slide: Exported, what: str, geometry: Any, properties: dict[str, Any]) -> dict[str, Any]:
    identity = uuid.uuid5(_NAMESPACE, f"{slide.model}/{slide.slide_id}/{what}")
    return {"type": "Feature", "id": str(identity), "geometry": geometry, "properties": properties}


# --- CLAM ---------------------------------------------------------------------------------------------------------


def write_h5(path: Path, slide: Exported) -> None:
    """`attention_scores` (N, 1) and `coords` (N, 2) as CLAM names them, and `evidence` (N, L), in one order.

    A cell's corner is rounded to whole pixels; its exact place is in the attributes `origin_l0` and `cell_l0`.
    """
    import h5py

    heatmap = slide.heatmap
    rows, columns = np.nonzero(np.isfinite(heatmap.attention_HW))
    (top, left), (side_y, side_x) = heatmap.origin_l0, heatmap.cell_l0
    corners = np.stack([left + columns * side_x, top + rows * side_y], axis=1)
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        attention = heatmap.attention_HW[rows, columns][:, None].astype(np.float32)
        scores = file.create_dataset("attention_scores", data=attention)
        scores.attrs["meaning"] = "weight of the cell in the answer, 1 in all; not a score before the softmax"
        coords = file.create_dataset("coords", data=np.rint(corners).astype(np.int64))
        evidence = file.create_dataset("evidence", data=heatmap.evidence_LHW[:, rows, columns].T)
        evidence.attrs["classes"] = list(heatmap.classes)
        evidence.attrs["bias"] = heatmap.bias_L
        coords.attrs.update(_clam_attributes(slide, path))
    write_atomically(path, lambda target: target.write(buffer.getvalue()))


def _clam_attributes(slide: Exported, path: Path) -> dict[str, Any]:
    heatmap, size_xy = slide.heatmap, slide.shape_l0[::-1]
    return {
        "patch_size": max(1, round(heatmap.cell_l0[1])),
        "patch_level": 0,
        "downsample": (1.0, 1.0),
        "downsampled_level_dim": size_xy,
        "level_dim": size_xy,
        "name": slide.slide_id,
        "save_path": path.parent.name,
        "origin_l0": heatmap.origin_l0,
        "cell_l0": heatmap.cell_l0,
    }
