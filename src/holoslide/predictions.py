"""What a trained model says of slides: probabilities, and where in the slide they come from.

A table of predictions has a row for each slide; a folder of heatmaps the raw scores and two pictures of each.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from holoslide.config import RunConfig
from holoslide.errors import CheckpointError, ConfigError, MemoryPlanError, SlideError
from holoslide.evaluation.calibration import Temperature
from holoslide.evaluation.legend import with_legend
from holoslide.evaluation.overlay import Placement, encode_png, overlay
from holoslide.evaluation.report_data import PredictionRow
from holoslide.evaluation.scales import (
    attention_scale,
    attention_sums,
    evidence_for,
    evidence_scale,
    evidence_sums,
    relative_attention,
)
from holoslide.files import lock, write_atomically, write_rows
from holoslide.inference.heatmap import Heatmap, make_heatmap, save_heatmaps
from holoslide.inference.predict import SlideScores, score_slide
from holoslide.inference.show import PICTURE_PX, prediction_html
from holoslide.models.classifier import LocalClassifier
from holoslide.models.hub import model_folder
from holoslide.models.memory import plan_for
from holoslide.models.precision import mixed_dtype
from holoslide.models.streamed import StreamedClassifier
from holoslide.prepared import Advance, Prepared
from holoslide.reporting import raster_picture
from holoslide.runs import model_of, settings_of
from holoslide.slides.cluster import on_cluster
from holoslide.slides.cohort import SlideRow
from holoslide.slides.facts import one_line
from holoslide.slides.prepare import PrepareConfig
from holoslide.slides.raster import Raster, Recipe


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model says about one slide of a cohort, and the heatmap of each of its heads, the last the model's."""

    row: SlideRow
    raster: Path
    classes: tuple[str, ...]
    scores: SlideScores
    heatmaps: tuple[Heatmap, ...]

    def without_maps(self) -> Prediction:
        """The probabilities alone: what all cells say of a cohort of large slides would fill the memory."""
        return dataclasses.replace(self, scores=SlideScores(self.scores.logits_KL, {}), heatmaps=())

    @property
    def heatmap(self) -> Heatmap:
        """The model's own: the last head's."""
        return self.heatmaps[-1]

    @property
    def prediction(self) -> str:
        """The class that the last head finds most probable."""
        return self.classes[int(self.scores.probabilities[-1].argmax())]

    @property
    def probabilities(self) -> dict[str, float]:
        """The model's, by class."""
        return dict(zip(self.classes, map(float, self.scores.probabilities[-1]), strict=True))

    def _repr_html_(self) -> str:
        """What a notebook shows: the maps lie on the slide, if its raster is still there."""
        slide = None
        if self.raster.is_file():
            with Raster.open(self.raster) as raster:
                slide = raster_picture(raster, self.heatmap, side=2 * PICTURE_PX)
        return prediction_html(
            self.row.slide_id, self.prediction, list(self.probabilities.items()), self.heatmap, slide=slide
        )


class Predictor:
    """A trained model, ready to score rasters; `source` is a run, a saved model, or a hub's `hub:owner/name`."""

    def __init__(self, source: str | Path, config: RunConfig | None = None) -> None:
        folder = model_folder(source)
        best = model_of(folder)
        self.folder = folder
        self.model_folder = best
        self.model = LocalClassifier.load(best)
        told = settings_of(folder)
        self.config = config or (RunConfig() if told is None else RunConfig.load(told))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(device)
        mixed = mixed_dtype(self.config.train.precision, device)
        self.network = StreamedClassifier(self.model, self.config.stream, mixed=mixed)

    def score(self, row: SlideRow, raster_path: Path, made: Recipe | None = None) -> Prediction:
        """Run one slide; the heatmaps come from the same pass as the prediction. Whatever fails, memory and disk
        included, is that slide's: a `SlideError`. So is a raster that is no longer as it was `made`.
        """
        try:
            return self._score(row, raster_path, made)
        except (MemoryPlanError, torch.OutOfMemoryError, OSError) as error:
            raise SlideError(
                row.slide_id,
                f"cannot be run ({one_line(error)})",
                "give memory or disk more room, or take it out",
            ) from error

    def _score(self, row: SlideRow, raster_path: Path, made: Recipe | None) -> Prediction:
        heads = range(len(self.network.heads))
        with Raster.open(raster_path) as raster:
            if made is not None and raster.record.recipe != made:
                what = "was prepared anew meanwhile, with other settings or from another file"
                raise SlideError(raster_path, what, "give each command its own --rasters")
            if self.model.mpp is not None and not math.isclose(raster.mpp, self.model.mpp, rel_tol=1e-6):
                raise SlideError(
                    raster_path,
                    f"is at {raster.mpp} um/px and the model at {self.model.mpp}",
                    f"prepare it with --mpp {self.model.mpp}",
                )
            self.network.follow(plan_for(self.network, raster, training=False))
            scores = score_slide(self.network, raster, explain=heads)
            maps = tuple(make_heatmap(scores.cells[k], raster, self.model.classes) for k in heads)
        return Prediction(row, raster_path, self.model.classes, scores, maps)

    def weights_sha256(self) -> str:
        """Tells this model from others, and from itself trained on."""
        with (self.model_folder / "model.safetensors").open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def prepare_config(self) -> PrepareConfig:
        """How rasters must be made for this model."""
        mpp = self.model.mpp or self.config.prepare.mpp
        return dataclasses.replace(self.config.prepare, mpp=mpp)


def predictions_of(
    scored: Iterable[Prediction], *, head: int = -1, temperature: Temperature | None = None
) -> list[PredictionRow]:
    """What a head says of each slide; raw unless given a temperature."""
    predictions = []
    for one in scored:
        probabilities = one.scores.probabilities[head]
        if temperature is not None:
            probabilities = temperature.apply(probabilities)
        row, predicted = one.row, one.classes[int(probabilities.argmax())]
        values = tuple(float(p) for p in probabilities)
        predictions.append(PredictionRow(row.slide_id, row.patient_id, row.label, predicted, values))
    return predictions


def predict_cohort(
    predictor: Predictor, prepared: Prepared, out: Path, *, heatmaps: Path | None = None,
    cluster: str | None = None, progress: Advance | None = None,
) -> int:  # fmt: skip
    """Score slides into a table, and draw their heatmaps; a slide that fails is added to those left out.

    `cluster` is the address of a Dask scheduler, whose workers score: they need the same files, and the model's.
    Until all are done, those that are lie in `<out>.partial.csv`: a run that is stopped loses none. Where none
    could be scored, a table that is there stays. Raises ConfigError where another command writes the same table.
    """
    rows = list(prepared.cohort)
    table: dict[int, dict[str, str]] = {}
    heatmaps = None if heatmaps is None else heatmaps.absolute()
    model = predictor.folder.absolute(), predictor.weights_sha256()
    made = prepared.recipes.get
    work = [(row, prepared.rasters[row.slide_id].absolute(), heatmaps, made(row.slide_id)) for row in rows]
    found: Iterator[tuple[int, Any]]
    if cluster is None:
        found = ((index, _predicted(predictor, *each)) for index, each in enumerate(work))
    else:
        found = on_cluster(cluster, predict_one, [(*model, *each) for each in work])
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial.csv")
    with partial.open("a", encoding="utf-8", newline="", buffering=1) as file:
        if not lock(file):
            raise ConfigError(out, "is being written by another command", "give each its own table (--out)")
        file.truncate(0)
        for done, (index, outcome) in enumerate(found, start=1):
            if isinstance(outcome, dict):
                writer = csv.DictWriter(file, list(outcome))
                if not table:
                    writer.writeheader()
                writer.writerow(outcome)
                table[index] = outcome
            else:
                prepared.left_out.append((rows[index].slide_id, one_line(outcome)))
            if progress is not None:
                progress(done, len(rows), rows[index].slide_id)
    write_scored([table[index] for index in sorted(table)], out)
    partial.unlink()
    return len(table)


def write_scored(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """A table of predictions. None take the place of none: what an earlier command found stays."""
    if rows or not path.exists():
        write_rows(rows, path)


def _predicted(
    predictor: Predictor, row: SlideRow, raster: Path, heatmaps: Path | None, made: Recipe | None
) -> dict[str, str] | SlideError:
    """A slide's row of the table of predictions, or what is wrong with the slide."""
    try:
        one = predictor.score(row, raster, made)
        if heatmaps is not None:
            draw_heatmap(one, heatmaps)
    except SlideError as error:
        return error
    except OSError as error:
        return SlideError(row.slide_id, f"its heatmap cannot be written ({one_line(error)})", "make room")
    (prediction,) = predictions_of([one])
    return prediction.row(predictor.model.classes)


_one_at_a_time = threading.Lock()  # a cluster's worker may have several threads, and has one model for all


@functools.lru_cache(maxsize=1)
def _predictor(folder: Path, sha256: str) -> Predictor:
    """A worker outlives a command: the folder may hold another model by the next one."""
    predictor = Predictor(folder)
    if predictor.weights_sha256() != sha256:
        raise CheckpointError(
            folder, "holds another model than where the work comes from", "give all the same files"
        )
    return predictor


def predict_one(
    folder: Path, sha256: str, row: SlideRow, raster: Path, heatmaps: Path | None, made: Recipe | None = None
) -> dict[str, str] | SlideError:
    """Score one slide on a cluster's worker, which keeps the model, known by its hash, for the next."""
    with _one_at_a_time:
        return _predicted(_predictor(folder, sha256), row, raster, heatmaps, made)


def draw_heatmap(one: Prediction, folder: Path) -> None:
    """Write a slide's raw scores, and its attention and the predicted class's evidence over the slide.

    The pictures have their legend below the slide, whose pixels begin at the top left.
    """
    save_heatmaps(folder, one.row.slide_id, one.heatmaps)
    with Raster.open(one.raster) as raster:
        pixels, grid_px = raster_picture(raster, one.heatmap)
    target = int(one.scores.probabilities[-1].argmax())
    relative = relative_attention(one.heatmap.attention_HW)
    evidence = evidence_for(one.heatmap.evidence_LHW, target)
    place = Placement.in_box(grid_px, one.heatmap.attention_HW.shape)
    layers = {
        "attention": (relative, attention_scale([relative]), attention_sums(relative)),
        "evidence": (
            evidence,
            evidence_scale(evidence, one.heatmap.classes[target]),
            evidence_sums(evidence),
        ),
    }
    for name, (values, scale, sums) in layers.items():
        drawn = with_legend(overlay(pixels, values, place, scale), scale, sums)
        write_png(drawn, folder / f"{one.row.slide_id}-{name}.png")


def write_png(pixels: NDArray[np.uint8], path: Path) -> None:
    """RGB pixels as a PNG, whole or not at all."""
    write_atomically(path, lambda file: file.write(encode_png(pixels)))
