"""The report: one page with nothing to fetch and nothing to run, that says what is there and what is missing."""

import base64
import dataclasses
import re
import warnings
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
import pytest
from tests.evaluation.reports import Page, epoch, full, judged, measured, picture, predictions, several, svgs

from holoslide.evaluation._report_view import number
from holoslide.evaluation.figures import Picture
from holoslide.evaluation.report import (
    CohortPart,
    EpochRecord,
    PredictionRow,
    RunReport,
    SlidePicture,
    render,
    write_report,
)
from holoslide.evaluation.report_data import CohortFlow, Resource, SlideFile

EVIL = """<script>alert(1)</script>"><img src=x onerror=alert(2)>' {{ 7*7 }} $x_$ &amp; ]]>"""


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
    assert "No such slide is tumour: what needs slides of every class is not measured." in words
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
    assert "evidence for tumour above the others, in logits per cell" in page.words
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


def test_the_same_run_gives_the_same_page(pictures: dict[bytes, Picture]) -> None:
    page = render(full())
    pictures.clear()
    assert render(full()) == page


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
