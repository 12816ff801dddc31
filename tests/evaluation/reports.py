"""Reports to look at: one with everything in it, one of several runs, and the page that was made of them."""

import base64
import dataclasses
from datetime import UTC, datetime
from functools import cache
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np

from holoslide.evaluation.metrics import Metrics, Predictions, compute_metrics
from holoslide.evaluation.options import EvaluateConfig
from holoslide.evaluation.outcome import Outcome, assess
from holoslide.evaluation.report import (
    CohortPart,
    EpochRecord,
    PredictionRow,
    RunReport,
    SlidePicture,
)
from holoslide.evaluation.report_data import CohortFlow, Resource, RunSummary, SlideFile


class Page(HTMLParser):
    """The elements of a page, and its text."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "base"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.pieces: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.pieces.append(data)

    @property
    def words(self) -> str:
        """All text, a space where an element ends and wherever there is any."""
        return " ".join(" ".join(self.pieces).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] for attributes in self.all("section")]


def predictions(classes: tuple[str, ...], count: int = 24) -> list[PredictionRow]:
    rng = np.random.default_rng(7)
    rows = []
    for i in range(count):
        target = (i // 2) % len(classes)  # two slides a patient, of one class
        odds = rng.dirichlet(1 + 3.0 * np.eye(len(classes))[target])
        rows.append(
            PredictionRow(
                f"slide {i}",
                f"patient {i // 2}",
                classes[target],
                classes[int(odds.argmax())],
                tuple(odds.tolist()),
            )
        )
    return rows


def measured(rows: list[PredictionRow], classes: tuple[str, ...]) -> Metrics:
    columns = [r.label for r in rows], [r.probabilities for r in rows], [r.patient_id for r in rows]
    return compute_metrics(*columns, classes, draws=50)


def picture(row: PredictionRow, classes: tuple[str, ...]) -> SlidePicture:
    rng = np.random.default_rng(1)
    attention = rng.random((5, 4))
    attention[0, 0] = np.nan
    thumbnail = rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)
    return SlidePicture(
        row.slide_id,
        row.label,
        row.prediction,
        row.probabilities,
        thumbnail,
        attention / np.nansum(attention),
        attention - 0.5,
        (0.0, 0.0, 50.0, 40.0),
        classes[-1],
        "worst",
        um_per_px=16.0,
    )


def epoch(number: int, modules: int = 3) -> EpochRecord:
    values = [1.0 / (number + k) for k in range(modules)]
    row = {f"train/classification_{k}": v for k, v in enumerate(values, 1)}
    row |= {f"valid/loss_{k}": v for k, v in enumerate(values, 1)}
    row |= {f"valid/auroc_{k}": 1 - v / 2 for k, v in enumerate(values, 1)}
    row |= {f"train/reconstruction_{k}": v for k, v in enumerate(values[:-1], 1)}
    return EpochRecord.from_row(
        {"epoch": number, "lr": 2e-5, "seconds": 61.0, "peak_rss_bytes": 2.0**31} | row
    )


def judged(rows: list[PredictionRow], classes: tuple[str, ...], positive: str | None = None) -> Outcome:
    """All that is measured of them, against validation slides of which the twelfth is answered wrongly."""
    other = predictions(classes, 36)[12:]
    valid = Predictions.checked(
        [r.label for r in other], [r.probabilities for r in other], [r.patient_id for r in other], classes
    )
    by_head = np.array([[r.probabilities for r in rows]] * 3)
    asked = EvaluateConfig(sensitivity=0.8, positive=positive)
    labels, patients = [r.label or "" for r in rows], [r.patient_id for r in rows]
    return assess(labels, by_head, patients, classes, valid=valid, asked=asked)


def files(names: list[str]) -> list[SlideFile]:
    return [
        SlideFile(name, f"{i:064x}"[::-1], 0.25, "openslide.mpp-x", 5000, "test")
        for i, name in enumerate(names)
    ]


@cache
def full(classes: tuple[str, ...] = ("normal", "tumour"), positive: str | None = None) -> RunReport:
    """A report with everything in it but several runs, which `several` adds."""
    rows = predictions(classes)
    found = judged(rows, classes, positive)
    return RunReport(
        title="A run",
        command="holoslide train slides.csv --out run",
        created=datetime(2025, 3, 4, 5, 6, tzinfo=UTC),
        classes=classes,
        config_yaml="train:\n  epochs: 3\n",
        environment={"torch": "2.11.0", "device": "a processor"},
        cohort=[
            CohortPart.count(part, [(r.patient_id, r.label) for r in rows])
            for part in ("train", "valid", "test")
        ],
        left_out=[("slide 99", "holds no tissue")],
        history=[epoch(1), epoch(2), epoch(3)],
        best_epoch=2,
        metrics=found.metrics,
        patient_metrics=found.patients,
        module_metrics=found.modules,
        predictions=rows,
        pictures=[picture(row, classes) for row in rows[:2]],
        timing={"training": 3725.0},
        flow=CohortFlow(73, 72, 36, {"holds no tissue": 1}),
        calibration=found.calibration,
        decision=found.decision,
        undecided=found.undecided,
        positive=found.positive,
        resources=[
            Resource("Memory for slides", "bytes", 1000 * 2**20, 1440 * 2**20),
            Resource("One epoch with its validation", "seconds", 60.0, 63.0),
        ],
        files=files([r.slide_id for r in rows]),
        directory="/home/someone",
        again="holoslide train run/cohort.csv --out again",
    )


def several(repeats: str = "folds") -> RunReport:
    """The same of three runs, of ten, eight and six of its slides."""
    one, rows = full(), list(full().predictions)
    runs = [
        RunSummary(f"run-{n}", measured(rows[a:b], one.classes), [epoch(1), epoch(2)], n, 1.5, 0.25 * n)
        for n, (a, b) in enumerate([(0, 10), (10, 18), (18, 24)], start=1)
    ]
    return dataclasses.replace(one, history=[], best_epoch=None, repeats=repeats, runs=runs)


def svgs(page: Page) -> list[ElementTree.Element]:
    """The page's drawings, which must be well-formed."""
    head = "data:image/svg+xml;base64,"
    found = [image["src"] for image in page.all("img") if image["src"].startswith(head)]
    assert found
    return [ElementTree.fromstring(base64.b64decode(uri.removeprefix(head))) for uri in found]
