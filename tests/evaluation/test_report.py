"""The report: one page with nothing to fetch and nothing to run, that says what is there and what is missing."""

import base64
import dataclasses
import hashlib
import re
import statistics
import warnings
from datetime import UTC, datetime
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

from holoslide.evaluation._report_view import number
from holoslide.evaluation.metrics import Metrics, Predictions, compute_metrics
from holoslide.evaluation.options import EvaluateConfig
from holoslide.evaluation.outcome import Outcome, assess
from holoslide.evaluation.report import (
    CohortPart,
    EpochRecord,
    PredictionRow,
    RunReport,
    SlidePicture,
    render,
    write_report,
)
from holoslide.evaluation.report_data import CohortFlow, Resource, RunSummary, SlideFile

EVIL = """<script>alert(1)</script>"><img src=x onerror=alert(2)>' {{ 7*7 }} $x_$ &amp; ]]>"""


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


# --- Nothing to fetch, nothing to run ---------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [("normal", "tumour"), ("a", "b", "c")])
def test_the_page_is_whole_and_fetches_nothing(classes: tuple[str, ...]) -> None:
    text = render(full(classes))
    page = Page(text)
    assert page.open == []
    assert {name for name, _ in page.elements}.isdisjoint(
        {"script", "link", "iframe", "object", "embed", "form", "base", "svg"}
    )
    for _, attributes in page.elements:
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert "http:" not in text
    assert "https:" not in text
    anchors = {attributes["href"][1:] for attributes in page.all("a")}
    assert anchors == set(page.sections)
    assert all(image["alt"] for image in page.all("img"))


def test_the_page_forbids_by_itself_what_it_does_not_do() -> None:
    metas = Page(render(full())).all("meta")
    policy = next(m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "script-src" not in policy  # so that the default holds
    assert "img-src data:;" in policy


def test_whatever_the_user_named_is_inert() -> None:
    evil, plain = f"e {EVIL}", several()
    classes = ("normal", evil)
    rows = [
        PredictionRow(f"{r.slide_id} {EVIL}", EVIL, classes[r.label != "normal"], classes[0], r.probabilities)
        for r in plain.predictions
    ]
    found = judged(rows, classes, evil)
    assert found.decision is not None
    assert found.calibration is not None
    report = dataclasses.replace(
        plain,
        title=EVIL,
        command=EVIL,
        classes=classes,
        config_yaml=f"</pre>{EVIL}",
        environment={EVIL: EVIL},
        cohort=[CohortPart.count(EVIL, [(r.patient_id, r.label) for r in rows])],
        left_out=[(EVIL, EVIL)],
        part=EVIL,
        metrics=found.metrics,
        patient_metrics=None,
        module_metrics=found.modules,
        predictions=rows,
        pictures=[picture(rows[1], classes)],
        timing={EVIL: 1.0},
        flow=CohortFlow(73, 72, 36, {EVIL: 1}),
        calibration=found.calibration,
        decision=found.decision,
        undecided=EVIL,
        positive=found.positive,
        resources=[Resource(EVIL, "bytes", 1.0, 2.0)],
        files=[SlideFile(EVIL, EVIL, 0.25, EVIL, 1, EVIL)],
        directory=EVIL,
        again=EVIL,
        runs=[dataclasses.replace(run, name=f"{EVIL} {i}") for i, run in enumerate(plain.runs)],
    )
    pages = [Page(render(report)), Page(render(dataclasses.replace(report, decision=None, lacking=EVIL)))]
    for page in pages:
        assert page.open == []
        assert not page.all("script")
        assert all(image["src"].startswith("data:image/") for image in page.all("img"))
        assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
        assert "".join(page.pieces).count(EVIL) > 20  # all there, as text
        assert "49" not in re.sub(r"0\.\d+|[0-9a-f]{16,}", "", page.words)  # no template of theirs was run
        for root in svgs(page):
            assert not root.findall(".//{*}script")
    for words in (
        f"Deciding: find 80 % of {evil}",
        f"Probabilities of {evil}.",
        f"The positive class is {evil} (",
    ):
        assert words in pages[0].words
    assert f"None: {EVIL}." in pages[1].words


def svgs(page: Page) -> list[ElementTree.Element]:
    """The page's drawings, which must be well-formed."""
    head = "data:image/svg+xml;base64,"
    found = [image["src"] for image in page.all("img") if image["src"].startswith(head)]
    assert found
    return [ElementTree.fromstring(base64.b64decode(uri.removeprefix(head))) for uri in found]


def test_figures_hold_text_and_nothing_from_elsewhere() -> None:
    drawn = svgs(Page(render(full(("a", "b", "$c_$ <c>\x01")))))
    texts = [element.text or "" for root in drawn for element in root.iter() if element.tag.endswith("}text")]
    assert "sensitivity" in texts
    assert "$c_$ <c>\ufffd" in texts
    for root in drawn:
        for element in root.iter():
            for name, value in element.attrib.items():
                assert not name.endswith("href") or value.startswith("#")


def test_letters_the_drawing_font_lacks_are_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "肿瘤" in Page(render(full(("正常", "肿瘤", "中间")))).words


# --- What it says -----------------------------------------------------------------------------------------------


def test_the_summary_says_what_was_trained_and_what_came_out() -> None:
    report = full()
    words = Page(render(report)).words
    right = sum(p.is_right is True for p in report.predictions)
    assert report.metrics is not None
    assert report.metrics.auroc.value is not None
    assert "A network of 3 modules was trained to tell normal and tumour apart" in words
    assert "The cohort has 72 slides: 24 in train, 24 in valid and 24 in test. 1 slide left out" in words
    assert "Of 3 epochs, epoch 2 was best on the validation slides." in words
    assert (
        f"On 24 test slides of 12 patients, AUROC is {report.metrics.auroc.value:.3f} (95 % interval" in words
    )
    assert (
        f"{right} of 24 answers are right by the likelier class. There are only 12 such slides of each"
        in words
    )


@pytest.mark.parametrize(
    ("part", "warning"),
    [
        ("train", "was trained on these slides"),
        ("valid", "was chosen on these slides"),
        ("all", "of training"),
        ("test", ""),
    ],
)
def test_results_on_slides_that_training_has_seen_are_called_so(part: str, warning: str) -> None:
    words = Page(render(dataclasses.replace(full(), part=part))).words
    assert (warning in words) if warning else ("flatters" not in words)
    if part == "all":
        assert "Results on all slides" in words
        elsewhere = dataclasses.replace(
            full(), part=part, cohort=[CohortPart.count("test", [("p", "normal")])]
        )
        assert "flatters" not in Page(render(elsewhere)).words  # a cohort of its own


def test_every_measure_stands_there_with_its_interval() -> None:
    report = full()
    words = Page(render(report)).words
    for metrics in (report.metrics, report.patient_metrics):
        assert metrics is not None
        for one in (
            metrics.auroc,
            metrics.auprc,
            metrics.balanced_accuracy,
            metrics.macro_f1,
            metrics.log_loss,
        ):
            assert one.low is not None
            assert one.high is not None
            assert f"{number(one.low)} to {number(one.high)}" in words
    assert "By patient" in words
    alone = dataclasses.replace(report, patient_metrics=report.metrics)
    assert "By patient" not in Page(render(alone)).words  # no news


def test_what_is_not_defined_says_why_and_is_never_nan() -> None:
    rows = [p for p in predictions(("normal", "tumour")) if p.label == "normal"]
    metrics = measured(rows, ("normal", "tumour"))
    report = dataclasses.replace(
        full(),
        predictions=rows,
        metrics=metrics,
        patient_metrics=None,
        module_metrics=[metrics] * 3,
        pictures=[],
    )
    text = render(report)
    words = Page(text).words
    assert "every slide is of class normal" in words or "no slide is of class tumour" in words
    assert "On 12 test slides of 6 patients, " in words
    assert "ROC:" not in words  # no curve without both classes
    assert "nan" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text).lower().split()


def test_the_confusion_matrix_is_in_counts_and_rows_are_labels() -> None:
    rows = [
        PredictionRow(str(i), str(i), label, guess, (float(guess == "n"), float(guess == "t")))
        for i, (label, guess) in enumerate(
            [("n", "n")] * 5 + [("n", "t")] * 1 + [("t", "n")] * 2 + [("t", "t")] * 4
        )
    ]
    report = dataclasses.replace(full(("n", "t")), predictions=rows, metrics=measured(rows, ("n", "t")))
    assert "labelled n t n 5 83 % 1 17 % t 2 33 % 4 67 %" in Page(render(report)).words


def test_wrong_and_unknown_are_told_in_words_not_in_colour_alone() -> None:
    rows = [
        PredictionRow("one", "p1", "tumour", "normal", (0.9, 0.1)),
        PredictionRow("two", "p2", None, "normal", (0.8, 0.2)),
        PredictionRow("three", "p3", "normal", "normal", (0.7, 0.3)),
    ]
    words = Page(render(dataclasses.replace(full(), predictions=rows, pictures=[]))).words
    assert "one p1 tumour normal ✗ wrong" in words
    assert "3 slides, 1 wrong by the likelier class" in words
    assert "not labelled" in words


def test_the_chosen_epoch_and_all_modules_are_in_the_learning_curves() -> None:
    page = Page(render(full()))
    assert "module 1" in page.words
    assert "module 3, the prediction" in page.words
    assert "epoch 2, chosen" in page.words
    assert {"Training loss by epoch", "Validation AUROC by epoch", "Reconstruction loss by epoch"} <= {
        image["alt"] for image in page.all("img")
    }


def test_a_picture_comes_with_its_heatmaps_legends_and_scale_bar() -> None:
    page = Page(render(full()))
    alts = [image["alt"] for image in page.all("img")]
    assert "slide slide 0" in alts
    assert "Attention over slide slide 0" in alts
    assert "Evidence for tumour over slide slide 0" in alts
    assert "evidence for tumour, in logits per cell" in page.words
    assert "the average cell's attention" in page.words
    assert "100 µm" in page.words  # of 640


def test_a_large_thumbnail_is_made_smaller_and_its_cells_stay_in_place() -> None:
    classes = ("normal", "tumour")
    row = predictions(classes)[0]
    attention = np.full((10, 10), 1e-6)
    attention[2, 7] = 1.0
    big = SlidePicture(
        row.slide_id,
        row.label,
        row.prediction,
        row.probabilities,
        np.full((3000, 2400, 3), 235, np.uint8),
        attention,
        None,
        (300.0, 240.0, 2700.0, 2160.0),
    )
    page = Page(render(dataclasses.replace(full(), pictures=[big])))
    source = next(
        image for image in page.all("img") if image["alt"] == f"Attention over slide {row.slide_id}"
    )
    data = base64.b64decode(source["src"].partition(",")[2])
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).astype(int)
    height, width = pixels.shape[:2]
    assert max(height, width) < 1000
    rows, columns = np.nonzero(pixels[:, :, 1] - pixels[:, :, 0] > 60)  # the yellow end: more green than blue
    # The cell's middle is (300 + 2.5 * 240, 240 + 7.5 * 192) of (3000, 2400).
    assert rows.mean() / height == pytest.approx(0.3, abs=0.01)
    assert columns.mean() / width == pytest.approx(0.7, abs=0.01)


def test_a_heatmap_without_a_place_is_refused() -> None:
    report = full()
    lost = dataclasses.replace(report.pictures[0], box_px=None)
    with pytest.raises(ValueError, match="slide 0 has a heatmap but no box"):
        render(dataclasses.replace(report, pictures=[lost]))


# --- Which class, which threshold, which numbers ------------------------------------------------------------------


def cells(page: Page, row: str) -> str:
    """What stands behind a row's name on the page."""
    return page.words.partition(f" {row} ")[2]


@pytest.mark.parametrize(
    ("positive", "of", "how"),
    [
        (None, "tumour", "the last by name; evaluate.positive chooses the other"),
        ("tumour", "tumour", "chosen by evaluate.positive"),
        ("normal", "normal", "chosen by evaluate.positive"),
    ],
)
def test_the_page_says_at_its_top_which_class_is_positive_and_all_is_of_it(
    positive: str | None, of: str, how: str
) -> None:
    report = full(("normal", "tumour"), positive)
    words = Page(render(report)).words
    other = {"normal": "tumour", "tumour": "normal"}[of]
    top = words[: words.index("Slides, and patients in brackets")]
    assert f"The positive class is {of} ({how})." in top
    assert f"Deciding: find 80 % of {of}" in words
    assert f"How often a random {of} slide scores above" in words
    assert f"ROC: {of}" in words
    assert f"Probabilities of {of}." in words
    assert f"Of the {other} slides, left alone." in words


@pytest.mark.parametrize("positive", ["normal", "tumour"])
def test_the_decision_stands_there_number_by_number(positive: str) -> None:
    report = full(("normal", "tumour"), positive)
    page, found = Page(render(report)), report.decision
    assert found is not None
    assert found.threshold is not None
    column = report.classes.index(positive)
    called = [r.probabilities[column] >= found.threshold.value for r in report.predictions]
    truth = [r.label == positive for r in report.predictions]
    hits = sum(c and t for c, t in zip(called, truth, strict=True))
    alarms = sum(c and not t for c, t in zip(called, truth, strict=True))
    missed, spared = sum(truth) - hits, len(truth) - sum(truth) - alarms
    expected = {
        "Sensitivity": (hits, hits + missed),
        "Specificity": (spared, spared + alarms),
        "Positive predictive value": (hits, hits + alarms),
        "Negative predictive value": (spared, spared + missed),
    }
    assert (
        len({hits / (hits + alarms), spared / (spared + missed)}) == 2
    )  # so that one for the other is noticed
    section = page.words[page.words.index("Deciding: find") : page.words.index("Do the probabilities")]
    for name, (number_of, of) in expected.items():
        after = section.partition(f" {name} ")[2]
        assert re.search(rf"\. {number_of / of:.3f} .*? {number_of} of {of} ", after[:200]), name
    predictive = "at this cohort's 50 % "
    assert section.count(f"{predictive}{positive}.") == 2
    assert f"{found.threshold.found} of {found.threshold.positives}, where it spares" in section
    assert f"is at least {found.threshold.value:.3f} :" in section
    names = [r.slide_id for r, c, t in zip(report.predictions, called, truth, strict=True) if t and not c]
    assert len(names) == missed
    if names:
        assert f"missed ( {', '.join(names)} )" in section


def test_the_two_meanings_of_called_are_told_apart() -> None:
    report = full()
    page = Page(render(report))
    assert report.decision is not None
    assert report.decision.threshold is not None
    assert "Confusion matrix, by the likelier class: slides" in page.words
    assert f"Called tumour at {report.decision.threshold.value:.3f} " in page.words
    table = page.words[page.words.index("Slide Patient Label Prediction") :]
    for row, called in zip(report.predictions, report.decision.called, strict=True):
        verdict = "✓ right" if row.is_right else "✗ wrong"
        call = "called" if called else "missed" if row.label == "tumour" else "no"
        assert f"{row.slide_id} {row.patient_id} {row.label} {row.prediction} {verdict} {call} " in table


def test_calibration_and_its_temperature_stand_there() -> None:
    report = full()
    page, found = Page(render(report)), report.calibration
    assert found is not None
    assert found.after is not None
    assert found.temperature.value is not None
    for name, key in (("Calibration error (ECE)", "ece"), ("Brier score", "brier")):
        before, after = (f"{getattr(each, key):.3f}" for each in (found.before, found.after))
        assert re.search(rf"\. {before} {after} ", cells(page, name)[:120]), name
    assert f"a temperature of {found.temperature.value:.2f}, fitted on the 24 validation slides" in page.words
    texts = [e.text for root in svgs(page) for e in root.iter() if e.tag.endswith("}text")]
    assert all(str(each.slides) in texts for each in found.before.bins)


@pytest.mark.parametrize(
    ("ece", "word"), [(0.01, "is less than"), (0.05, "is within"), (0.2, "is more than")]
)
def test_an_error_is_below_within_or_beyond_chance(ece: float, word: str) -> None:
    found = full().calibration
    assert found is not None
    before = dataclasses.replace(found.before, ece=ece, ece_by_chance=(0.03, 0.09))
    report = dataclasses.replace(full(), calibration=dataclasses.replace(found, before=before))
    assert f"An error of {ece:.3f} {word} the 0.030 to 0.090 that chance" in Page(render(report)).words


def test_of_three_classes_the_page_says_why_nothing_is_decided() -> None:
    page = Page(render(full(("a", "b", "c"))))
    assert "Decision None: a threshold tells two classes apart, and there are 3." in page.words
    assert "positive class" not in page.words
    assert "by the likeliest class" in page.words


def test_modules_have_intervals_and_a_word_where_one_points_the_wrong_way() -> None:
    report = full()
    backwards = [dataclasses.replace(r, probabilities=r.probabilities[::-1]) for r in report.predictions]
    modules = [measured(backwards, report.classes), report.metrics]
    page = Page(render(dataclasses.replace(report, module_metrics=modules)))
    for k, one in enumerate(modules, start=1):
        assert one is not None
        value, low, high = (number(v) for v in (one.auroc.value, one.auroc.low, one.auroc.high))
        assert f" {k} {value} {low} to {high} " in page.words
    assert (
        "The interval of the AUROC of module 1 lies below 0.5: it ranks these slides the wrong way"
        in page.words
    )
    assert "wrong way" not in Page(render(report)).words


def test_more_than_was_planned_is_worth_a_word() -> None:
    words = Page(render(full())).words
    assert "Memory for slides 1000 MiB 1.4 GiB 144 %" in words
    assert "One epoch with its validation 1 min 0 s 1 min 3 s 105 %" in words
    assert "More than planned: memory for slides by 44 %." in words


def test_where_nothing_is_wrong_the_page_says_so_and_draws_no_band() -> None:
    rows = [
        PredictionRow(f"s{i}", f"p{i}", name, name, (p, 1 - p))
        for i, (name, p) in enumerate([("normal", 0.9), ("tumour", 0.0001)] * 6)
    ]
    shown = [dataclasses.replace(picture(rows[0], ("normal", "tumour")), group="best")]
    report = dataclasses.replace(
        full(), predictions=rows, metrics=measured(rows, ("normal", "tumour")), pictures=shown, decision=None
    )
    page = Page(render(report))
    assert "Wrong, the surest first No slide is wrong by the likelier class." in page.words
    assert "that curve has no band" in page.words
    assert "as do the bands" not in page.words
    assert "< 0.001 > 0.999" in page.words
    assert "0.000" not in page.words
    assert "as do the bands" in Page(render(full())).words


def test_the_data_are_there_by_the_head_of_their_hashes_and_one_for_all() -> None:
    report = full()
    page = Page(render(report))
    for one in report.files:
        assert f"{one.slide_id} test 0.25 openslide.mpp-x {one.sha256[:16]} " in page.words
        assert one.sha256 not in page.words
    lines = "".join(f"{f.sha256}  {f.slide_id}\n" for f in sorted(report.files, key=lambda f: f.slide_id))
    assert f"of their ids: {hashlib.sha256(lines.encode()).hexdigest()} ." in page.words


# --- Several runs -------------------------------------------------------------------------------------------------


def test_several_runs_stand_there_with_mean_and_deviation() -> None:
    report = several()
    page = Page(render(report))
    for name, key in (("AUROC", "auroc"), ("AUPRC", "auprc"), ("Balanced accuracy", "balanced_accuracy")):
        values = [getattr(run.metrics, key).value for run in report.runs]
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        assert (
            f" {name} {mean:.3f} {deviation:.3f} {number(min(values))} to {number(max(values))}" in page.words
        )
    for run in report.runs:
        shown = [
            getattr(run.metrics, key).value for key in ("auroc", "auprc", "balanced_accuracy", "accuracy")
        ]
        assert f"{run.name} {run.metrics.slides} {' '.join(number(v) for v in shown)}" in page.words
    assert "3 networks of 3 modules were trained, one a fold, to tell normal and tumour apart" in page.words
    assert "A network" not in page.words


def test_several_runs_show_the_learning_of_all_modules() -> None:
    page = Page(render(several()))
    alts = {image["alt"] for image in page.all("img")}
    assert {f"{name} by epoch" for name in ("Training loss", "Validation loss", "Validation AUROC")} <= alts
    assert "module 1 module 2 module 3, the prediction thin: each of 3 runs; thick: their mean" in page.words
    assert "6 min 6 s" in page.words  # of three runs with two epochs of 61 s


def test_maps_of_one_seed_are_not_said_to_explain_the_mean() -> None:
    words = Page(render(several("seeds"))).words
    assert (
        "mean of 3 networks, the maps are those of the first (run-1) alone: the evidence does not add"
        in words
    )
    assert "the maps are those of the first" not in Page(render(several("folds"))).words


# --- What is missing --------------------------------------------------------------------------------------------

OPTIONAL = {
    each.name: each
    for each in dataclasses.fields(RunReport)
    if each.default is not dataclasses.MISSING or each.default_factory is not dataclasses.MISSING
}


@pytest.mark.parametrize("name", OPTIONAL)
def test_any_part_may_be_missing(name: str) -> None:
    each = OPTIONAL[name]
    empty = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
    page = Page(render(dataclasses.replace(several() if name == "history" else full(), **{name: empty})))
    assert page.open == []
    assert {attributes["href"][1:] for attributes in page.all("a")} == set(page.sections)


def test_all_parts_may_be_missing() -> None:
    page = Page(render(RunReport("Bare", "holoslide train", datetime(2025, 1, 1, tzinfo=UTC), ("a", "b"))))
    assert page.sections == ["results", "run"]
    assert "Nothing was scored" in page.words
    assert not page.all("img")


def test_parts_of_a_history_and_of_a_picture_may_be_missing() -> None:
    report = full()
    bare = SlidePicture("s", None, "normal", (0.6, 0.4), np.zeros((8, 9, 3), np.uint8))
    history = [EpochRecord(1, (0.5, 0.4), (0.6, 0.5)), EpochRecord(2, (0.4, 0.3), (0.6, float("nan")))]
    page = Page(render(dataclasses.replace(report, history=history, best_epoch=None, pictures=[bare])))
    alts = {image["alt"] for image in page.all("img")}
    assert "Validation loss by epoch" in alts
    assert "Validation AUROC by epoch" not in alts
    assert "no label" in page.words


def test_a_single_epoch_of_a_single_module_is_drawn() -> None:
    page = Page(render(dataclasses.replace(full(), history=[epoch(1, modules=1)], best_epoch=1)))
    assert "A network of 1 module was" in page.words


# --- Files ---------------------------------------------------------------------------------------


def test_the_same_run_gives_the_same_page() -> None:
    assert render(full()) == render(full())


def test_a_report_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_report(full(), path)
    before = path.read_bytes()
    assert before.decode().lstrip().lower().startswith("<!doctype html>")

    def fail(_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_report(dataclasses.replace(full(), title="Another"), path)
    assert path.read_bytes() == before
    monkeypatch.undo()
    write_report(dataclasses.replace(full(), title="Another"), path)
    assert b"Another" in path.read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_a_file_name_that_is_no_text_can_be_written(tmp_path: Path) -> None:
    odd = b"caf\xe9.svs".decode("utf-8", "surrogateescape")
    rows = [dataclasses.replace(p, slide_id=odd) for p in predictions(("normal", odd))]
    report = dataclasses.replace(full(("normal", odd)), predictions=rows, left_out=[(odd, "damaged")])
    write_report(report, tmp_path / "report.html")
    assert "caf?.svs" in (tmp_path / "report.html").read_text(encoding="utf-8")
