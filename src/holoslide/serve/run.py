"""A run as the viewer sees it: its slides, what was predicted, and the layers that can be laid over them.

A folder of several runs (`train --folds`, `--seeds`) is seen as one: each slide with the run that tested it. With
seeds all of them did; then the prediction is their mean, as in the report, and the layers are the first seed's.
"""

from __future__ import annotations

import csv
import hashlib
import math
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from holoslide.errors import CheckpointError, SlideError
from holoslide.inference.heatmap import Heatmap, heatmap_paths
from holoslide.inference.layers import Layer, layers_of
from holoslide.runs import DATA, LEFT_OUT, read_json, repeats_of
from holoslide.serve.stamps import Stamp, stamp_of
from holoslide.slides.cohort import Cohort, SlideRow
from holoslide.slides.polygons import mask_polygons
from holoslide.slides.raster import Raster

TABLES = ("cohort.csv", "predictions.csv", "predictions_modules.csv", "metrics.json", LEFT_OUT)


@dataclass(frozen=True, slots=True)
class Layers:
    """What can be laid over a slide, by name, and in a line each why some of it cannot."""

    by_name: dict[str, Layer]
    faults: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Training:
    """One network's run: which slides are its test part, and what it said of those that it scored.

    `calibrated`: `predictions` are after the temperature; `by_module` never is.
    """

    folder: Path
    tests: frozenset[str]
    predictions: dict[str, dict[str, str]]
    by_module: list[dict[str, str]]
    calibrated: bool = False

    @classmethod
    def read(cls, folder: Path, cohort: Cohort) -> Training:
        """From its folder; what was not scored yet is not there."""
        return cls(
            folder,
            frozenset(row.slide_id for row in cohort.test),
            _predictions(folder),
            _table(folder / "predictions_modules.csv"),
            bool(read_json(folder / "metrics.json").get("calibrated")),
        )

    @property
    def modules(self) -> int:
        """How many heads it has."""
        return max((int(row["module"]) for row in self.by_module), default=1)


class RunView:
    """The folder of a run as it is when this is made; `rasters` is where its prepared slides are."""

    def __init__(self, folder: Path, rasters: Path | None = None) -> None:
        self.stamps = _stamps(folder)  # before they are read: what changes meanwhile is read again
        if not (folder / "cohort.csv").is_file():
            raise CheckpointError(
                folder, "is not a run: it has no cohort.csv", "give the folder that train wrote"
            )
        self.folder, self.rasters = folder, rasters
        cohort = Cohort.from_csv(folder / "cohort.csv")
        self.rows: dict[str, SlideRow] = {row.slide_id: row for row in cohort}
        repeats = repeats_of(folder)
        self.repeats = f"{repeats[0].name.partition('-')[0]}s" if repeats else None
        self.trainings = [Training.read(one, Cohort.from_csv(one / "cohort.csv")) for one in repeats]
        self.trainings = self.trainings or [Training.read(folder, cohort)]
        self.means = _predictions(folder) if self.repeats == "seeds" else {}
        self.modules = max(training.modules for training in self.trainings)
        scored = next((row for one in self.trainings for row in one.predictions.values()), {})
        self.classes = tuple(key[2:] for key in scored if key.startswith("p_")) or cohort.classes
        self.left_out = self._left_out()
        self._layers_of = lru_cache(maxsize=16)(self._layers)
        self._outline_of = lru_cache(maxsize=64)(self._outline)

    @property
    def key(self) -> str:
        """Tells this run from others of its name, and nothing else of where it lies."""
        return hashlib.sha256(str(self.folder.resolve()).encode()).hexdigest()[:16]

    @property
    def state(self) -> str:
        """Tells this run, as its tables are, from others and from itself before it was evaluated again."""
        return hashlib.sha256(repr((self.key, self.stamps)).encode()).hexdigest()[:16]

    def layers_stamp(self, slide_id: str) -> tuple[Stamp | None, ...]:
        """What changes with a slide's layers."""
        return tuple(stamp_of(path) for path in self._paths(slide_id))

    def layers(self, slide_id: str) -> Layers:
        """A slide's layers as its heatmaps are now."""
        return self._layers_of(slide_id, self.layers_stamp(slide_id))

    def outline_stamp(self, slide_id: str) -> Stamp | None:
        """What changes with a slide's tissue; None where it is not known."""
        return None if self.rasters is None else stamp_of(self.rasters / f"{slide_id}.tif")

    def outline(self, slide_id: str) -> list[list[list[tuple[float, float]]]]:
        """The tissue as polygons, each an outline and its holes, of level-0 points (x, y).

        SlideError where the prepared slide is no longer the one that the run had.
        """
        return self._outline_of(slide_id, self.outline_stamp(slide_id))

    def slides(self) -> list[dict[str, Any]]:
        """A line for each slide of the run, in the table's order."""
        return [self._line(row) for row in self.rows.values()]

    def probabilities(self, slide_id: str) -> list[dict[str, Any]]:
        """Each module's probabilities of the classes, the last being the model's."""
        rows = [row for row in self._training(slide_id).by_module if row["slide_id"] == slide_id]
        return [{"module": int(row["module"]), "p": self._p(row)} for row in rows]

    def source(self, slide_id: str) -> dict[str, Any]:
        """Of several runs, the one whose layers are shown, how many the prediction is the mean of, and so in words.

        `advice` says how to get layers where there are none.
        """
        training = self._training(slide_id)
        run, scored = training.folder.name, slide_id in training.predictions
        mean_of = len(self.trainings) if slide_id in self.means else None
        words: str | None = None
        if mean_of:
            words = f"The answer is the mean of {mean_of} seeds; layers and modules are those of {run}."
        elif self.repeats == "folds" and scored and slide_id in training.tests:
            words = f"Tested by {run}, which has not seen this patient."
        elif self.repeats and scored:
            words = f"{run} alone has scored it."
        if training.calibrated and scored and not mean_of:
            after = (
                "In the list, probabilities are after the temperature; here, and in the maps, as predicted."
            )
            words = f"{words} {after}" if words else after
        advice = f"run holoslide evaluate{f' on {run}' if self.repeats else ''}"
        if self.repeats != "folds":
            advice += f" with --split all, then holoslide serve on {run}/all"
        return {
            "run": run if self.repeats else None,
            "mean_of": mean_of,
            "words": words,
            "advice": f"{advice}.",
        }

    def _training(self, slide_id: str) -> Training:
        """The first of those that tested a slide, of these one that scored it; else one that did by other means."""

        def fits(one: Training) -> tuple[bool, bool]:
            return slide_id in one.tests, slide_id in one.predictions

        return max(self.trainings, key=fits)  # the first of equals

    def _line(self, row: SlideRow) -> dict[str, Any]:
        training = self._training(row.slide_id)
        predicted = self.means.get(row.slide_id) or training.predictions.get(row.slide_id)
        tested_in = training.folder.name if row.slide_id in training.tests else None
        return {
            "id": row.slide_id,
            "patient": row.patient_id,
            "label": row.label,
            "split": tested_in if self.repeats == "folds" else row.split,
            "prediction": predicted["prediction"] if predicted else None,
            "p": self._p(predicted) if predicted else None,
            "heatmap": self._paths(row.slide_id)[-1].is_file(),
            "file": row.path.name if row.path is not None else None,
        }

    def _p(self, row: dict[str, str]) -> list[float]:
        return [float(row[f"p_{name}"]) for name in self.classes]

    def _paths(self, slide_id: str) -> list[Path]:
        return heatmap_paths(self._training(slide_id).folder / "heatmaps", slide_id, self.modules)

    def _left_out(self) -> dict[str, str]:
        """The slides that no training used, with the reason."""
        folders = [self.folder, *(one.folder for one in self.trainings)]
        rows = [row for folder in dict.fromkeys(folders) for row in _table(folder / LEFT_OUT)]
        gone = {row["slide_id"]: row["reason"] for row in rows if row["slide_id"]}
        return {slide_id: reason for slide_id, reason in gone.items() if slide_id not in self.rows}

    def _layers(self, slide_id: str, stamps: tuple[Stamp | None, ...]) -> Layers:
        layers: dict[str, Layer] = {}
        faults: list[str] = []
        for module, (path, stamp) in enumerate(zip(self._paths(slide_id), stamps, strict=True), start=1):
            if stamp is None:
                continue
            try:
                heatmap = Heatmap.load(path)
            except SlideError as error:  # what else there is of the slide can be looked at
                faults.append(f"{path.parent.name}/{path.name}: {error.what}; {error.remedy}")
                continue
            layers |= {layer.name: layer for layer in layers_of(heatmap, module, last=module == self.modules)}
        return Layers(layers, tuple(faults))

    def _had(self, slide_id: str) -> tuple[str, str] | None:
        """Of the prepared slide that the run had: the hash of its slide, and its pixels of tissue."""
        rows = {row["slide_id"]: row for row in _table(self._training(slide_id).folder / DATA)}
        row = rows.get(slide_id)
        return None if row is None else (row["slide_sha256"], row["tissue_px"])

    def _outline(self, slide_id: str, stamp: Stamp | None) -> list[list[list[tuple[float, float]]]]:
        if self.rasters is None or stamp is None:
            return []
        path, had = self.rasters / f"{slide_id}.tif", self._had(slide_id)
        with Raster.open(path) as raster:
            if had not in (None, (raster.record.recipe.slide_sha256, str(raster.tissue_px))):
                what = "was prepared anew since, with other settings or from another file"
                raise SlideError(path, what, "evaluate the run again, or give its own with --rasters")
            cell = raster.mask_cell_px
            per_y, per_x = raster.l0_per_px
            origin = float(raster.origin_l0[0]), float(raster.origin_l0[1])
            pieces = mask_polygons(raster.mask, origin, (cell * per_y, cell * per_x))
        return [
            [[(round(x, 1), round(y, 1)) for x, y in ring.coords] for ring in (p.exterior, *p.interiors)]
            for p in pieces
        ]


class LiveRun:
    """A run that may be evaluated or trained again while it is looked at; safe between threads."""

    def __init__(self, folder: Path, rasters: Path | None = None) -> None:
        self._rasters = rasters
        self._lock = threading.Lock()
        self._view = RunView(folder, rasters)
        self.folder = folder

    def now(self) -> RunView:
        """The run as its tables are now: they are read anew when one of them has changed."""
        with self._lock:
            if self._view.stamps != _stamps(self.folder):
                self._view = RunView(self.folder, self._rasters)
            return self._view


def _stamps(folder: Path) -> dict[str, Stamp | None]:
    """Of all tables that a run, or a folder of several, is read from."""
    paths = [folder / name for name in TABLES]
    paths += [each / name for each in sorted(folder.glob("*-*")) for name in TABLES]
    return {path.relative_to(folder).as_posix(): stamp_of(path) for path in paths}


def _predictions(folder: Path) -> dict[str, dict[str, str]]:
    return {row["slide_id"]: row for row in _table(folder / "predictions.csv")}


def _table(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin it with a mark
            found = csv.reader(file, strict=True)
            header = next(found, ["slide_id"])
            if "slide_id" not in header:
                raise SlideError(path, "has no column slide_id", "evaluate the run again")
            rows = [dict(zip(header, cells, strict=True)) for cells in found if cells]
        for row in rows:
            for key, value in row.items():
                if key.startswith("p_") and not math.isfinite(float(value)):
                    raise SlideError(path, f"holds {value} for {row['slide_id']}", "evaluate the run again")
    except (ValueError, csv.Error) as error:
        raise SlideError(path, f"is damaged ({error})", "evaluate the run again") from error
    return rows
