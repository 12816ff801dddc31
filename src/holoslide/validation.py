"""What a run's model says of the validation slides, which temperature and threshold come from.

`validation.json` keeps probabilities alone. What the slides are (which are in the part, their labels and patients)
is the table's to say, for a table may be corrected after its slides were scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holoslide.evaluation.metrics import Predictions
from holoslide.files import write_json
from holoslide.runs import read_json
from holoslide.slides.cohort import Cohort, SlideRow

VALIDATION = "validation.json"
Said = dict[str, Any]
"""Of one slide: `slide_id`, `raster` (the digest of its recipe) and `probabilities` (of the last head)."""


def validation_rows(cohort: Cohort) -> list[SlideRow]:
    """The labelled slides of the validation part."""
    return [row for row in cohort.valid if row.label is not None]


def read_said(run: Path, *, model_sha256: str | None = None) -> dict[str, Said]:
    """What is kept of each slide, by id; of another model than that, nothing. CheckpointError if it is damaged."""
    kept = read_json(run / VALIDATION)
    if model_sha256 is not None and kept.get("model_sha256") != model_sha256:
        return {}
    return {one["slide_id"]: one for one in kept.get("slides", [])}


def write_said(run: Path, said: Sequence[Said], *, model_sha256: str) -> None:
    """Keep it for the next evaluation."""
    write_json({"model_sha256": model_sha256, "slides": said}, run / VALIDATION)


def judged(
    rows: Sequence[SlideRow], said: dict[str, Said], classes: Sequence[str], *, positive: str | None = None
) -> Predictions:
    """Labels and patients of the slides beside their probabilities; HoloslideError for a label that is no class."""
    probabilities = [said[row.slide_id]["probabilities"] for row in rows]
    labels, patients = [row.label or "" for row in rows], [row.patient_id for row in rows]
    return Predictions.checked(labels, probabilities, patients, classes, positive=positive)
