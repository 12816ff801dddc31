"""What the report says of a class to find, of its threshold and calibration, and of several runs, by number."""

import dataclasses
import hashlib
import re
import statistics

import pytest
from tests.evaluation.reports import Page, full, measured, picture, several, svgs

from holoslide.evaluation._report_view import number
from holoslide.evaluation.report import (
    PredictionRow,
    render,
)

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
