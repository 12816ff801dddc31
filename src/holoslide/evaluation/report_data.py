"""What a report is made of: plain data, which the pipeline fills in and the page shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from holoslide.evaluation.calibration import Calibration
from holoslide.evaluation.decision import Decision
from holoslide.evaluation.metrics import Metrics
from holoslide.evaluation.options import Positive
from holoslide.evaluation.overlay import BoxPx

Group = Literal["worst", "uncertain", "best"]
Repeats = Literal["folds", "seeds"]


@dataclass(frozen=True, slots=True)
class CohortPart:
    """One part of the cohort: its slides and patients, in all and by class as {class: (slides, patients)}."""

    name: str
    slides: int
    patients: int
    by_class: Mapping[str, tuple[int, int]]

    @classmethod
    def count(cls, name: str, rows: Iterable[tuple[str, str | None]]) -> CohortPart:
        """Count (patient_id, label) of each slide; one without a label counts in the whole only.

        >>> CohortPart.count("test", [("p1", "a"), ("p1", "a"), ("p2", "b")])
        CohortPart(name='test', slides=3, patients=2, by_class={'a': (2, 1), 'b': (1, 1)})
        """
        rows = list(rows)
        by_class = {}
        for label in sorted({label for _, label in rows if label is not None}):
            patients = [patient for patient, its in rows if its == label]
            by_class[label] = (len(patients), len(set(patients)))
        return cls(name, len(rows), len({patient for patient, _ in rows}), by_class)


@dataclass(frozen=True, slots=True)
class CohortFlow:
    """From the slides that were `found` to those that are `used`; `reasons` counts the others."""

    found: int
    used: int
    patients: int
    reasons: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class SlideFile:
    """What a slide was when it was prepared: `sha256` of its file, `mpp` of level 0 and who told it, its tissue."""

    slide_id: str
    sha256: str
    mpp: float
    mpp_source: str
    tissue_px: int
    split: str = ""


@dataclass(frozen=True, slots=True)
class Resource:
    """What was planned to be used, and what was; None where that is not known."""

    name: str
    unit: Literal["bytes", "seconds"]
    planned: float | None
    measured: float


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One of several runs of a cohort, as `name` says (fold 1, seed 0).

    `temperature` and `threshold` are its own, None where there is none.
    """

    name: str
    metrics: Metrics
    history: Sequence[EpochRecord] = ()
    best_epoch: int | None = None
    temperature: float | None = None
    threshold: float | None = None


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch: losses and AUROC of the K heads, from the first module to the last, and what it took.

    `train_losses` are those of classification; `reconstruction_losses` has an entry per module that reconstructs.
    """

    epoch: int
    train_losses: tuple[float, ...]
    valid_losses: tuple[float, ...]
    valid_aurocs: tuple[float, ...] = ()
    reconstruction_losses: tuple[float, ...] = ()
    lr: float | None = None
    seconds: float | None = None
    peak_rss_bytes: int = 0
    peak_device_bytes: int = 0

    @classmethod
    def from_row(cls, row: Mapping[str, float]) -> EpochRecord:
        """From a row of a run's `history.csv`, as numbers."""

        def numbered(prefix: str) -> tuple[float, ...]:
            keys = [key for key in row if key.rpartition("_")[0] == prefix]
            return tuple(float(row[key]) for key in sorted(keys, key=lambda key: int(key.rpartition("_")[2])))

        return cls(
            int(row["epoch"]),
            numbered("train/classification"),
            numbered("valid/loss"),
            numbered("valid/auroc"),
            numbered("train/reconstruction"),
            row.get("lr"),
            row.get("seconds"),
            int(row.get("peak_rss_bytes", 0)),
            int(row.get("peak_device_bytes", 0)),
        )


@dataclass(frozen=True, slots=True)
class PredictionRow:
    """What the last module says of a slide; probabilities in the order of the classes, label None if unknown."""

    slide_id: str
    patient_id: str
    label: str | None
    prediction: str
    probabilities: tuple[float, ...]

    @property
    def is_right(self) -> bool | None:
        """None where the truth is not known."""
        return None if self.label is None else self.label == self.prediction

    def row(self, classes: Sequence[str]) -> dict[str, str]:
        """A line of a table of predictions: `slide_id, patient_id, label, prediction, p_<class>...`.

        Probabilities are written to the last bit: of sure slides, fewer digits would make ranks equal.
        """
        return {
            "slide_id": self.slide_id,
            "patient_id": self.patient_id,
            "label": self.label or "",
            "prediction": self.prediction,
            **{f"p_{name}": repr(float(p)) for name, p in zip(classes, self.probabilities, strict=True)},
        }


@dataclass(frozen=True, slots=True)
class SlidePicture:
    """A slide to look at: its thumbnail, and the heads' cells over `box_px` (top, left, bottom, right) of it.

    `attention_HW` sums to one over the cells, `evidence_HW` is what each adds to the logits in favour of
    `evidence_class` (see `scales.evidence_for`); both are NaN where there is no cell. The
    `constant` is what the head adds whatever the slide: with it the evidence adds up to the score of that class.
    """

    slide_id: str
    label: str | None
    prediction: str
    probabilities: tuple[float, ...]
    thumbnail_HW3: NDArray[np.uint8]
    attention_HW: NDArray[np.floating] | None = None
    evidence_HW: NDArray[np.floating] | None = None
    box_px: BoxPx | None = None
    evidence_class: str = ""
    group: Group | None = None
    um_per_px: float | None = None
    constant: float | None = None

    @property
    def is_right(self) -> bool | None:
        """None where the truth is not known."""
        return None if self.label is None else self.label == self.prediction


@dataclass(frozen=True, slots=True)
class RunReport:
    """All that a report shows. What is empty or None is left out of the page, or said to be missing.

    `part` is the part of the cohort that was scored; `metrics` are of its slides, `patient_metrics` of its
    patients, `module_metrics` those of each head on its slides, from the first to the last. Calibration and
    decision are missing for the reasons in `lacking` and `undecided`. `positive` is the class that is to be found,
    of two. `timing` is seconds by step. `command` trained the network, given in `directory`; `evaluation` made the
    report, given in `evaluated_in`, where that was another command; `again` trains the same anew, which no command
    does where the network came from Python (`given_model`). `runs` are those of several folds or seeds (`repeats`),
    whose slides are scored together.

    `table` names another cohort than the network was trained on: then cohort, left-outs and files are that one's,
    and `learnt_from` counts its slides whose files training had. `splits` says how the parts came about.
    `calibrated` says that probabilities and metrics are those after the temperature. A gradient barrier followed
    every `barrier_every` modules.
    """

    title: str
    command: str
    created: datetime
    classes: tuple[str, ...]
    config_yaml: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    cohort: Sequence[CohortPart] = ()
    left_out: Sequence[tuple[str, str]] = ()
    history: Sequence[EpochRecord] = ()
    best_epoch: int | None = None
    part: str = "test"
    metrics: Metrics | None = None
    patient_metrics: Metrics | None = None
    module_metrics: Sequence[Metrics] = ()
    predictions: Sequence[PredictionRow] = ()
    pictures: Sequence[SlidePicture] = ()
    timing: Mapping[str, float] = field(default_factory=dict)
    flow: CohortFlow | None = None
    calibration: Calibration | None = None
    decision: Decision | None = None
    lacking: str = ""
    undecided: str = ""
    positive: Positive | None = None
    resources: Sequence[Resource] = ()
    files: Sequence[SlideFile] = ()
    directory: str = ""
    again: str = ""
    given_model: bool = False
    repeats: Repeats | None = None
    runs: Sequence[RunSummary] = ()
    evaluation: str = ""
    evaluated_in: str = ""
    table: str = ""
    learnt_from: int = 0
    splits: str = ""
    calibrated: bool = False
    barrier_every: int = 1


def choose_slides(predictions: Sequence[PredictionRow], *, each: int = 3) -> dict[str, Group]:
    """The slides worth looking at, by id: surely wrong, most uncertain, surely right.

    A slide is in one group only, in this order of precedence. The surely right take turns between the classes,
    so that no class fills the group alone.
    """
    chosen: dict[str, Group] = {}
    wrong = sorted((p for p in predictions if p.is_right is False), key=lambda p: -max(p.probabilities))
    chosen |= {p.slide_id: "worst" for p in wrong[:each]}
    left = [p for p in predictions if p.slide_id not in chosen]
    chosen |= {p.slide_id: "uncertain" for p in sorted(left, key=_gap)[:each]}
    right = sorted(
        (p for p in left if p.is_right and p.slide_id not in chosen), key=lambda p: -max(p.probabilities)
    )
    taken: dict[str, int] = {}
    turns = []
    for p in right:  # the n-th of each class comes before the n+1-th of any
        taken[p.prediction] = taken.get(p.prediction, 0) + 1
        turns.append((taken[p.prediction], p.slide_id))
    return chosen | {slide_id: "best" for _, slide_id in sorted(turns, key=lambda turn: turn[0])[:each]}


def _gap(prediction: PredictionRow) -> float:
    """From the likeliest class to the next."""
    ordered = sorted(prediction.probabilities, reverse=True)
    return ordered[0] - ordered[1] if len(ordered) > 1 else ordered[0]
