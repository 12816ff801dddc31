"""What the report says of a class to find, of its threshold and calibration, and of several runs, by number."""

import dataclasses
import hashlib
import re
import statistics

import numpy as np
import pytest
from tests.evaluation.reports import Page, full, measured, picture, several, svgs

from holoslide.evaluation._report_judged import calibrated, taught
from holoslide.evaluation._report_view import number
from holoslide.evaluation.calibration import Temperature, tempered
from holoslide.evaluation.outcome import pool
from holoslide.evaluation.report import PredictionRow, RunReport, render

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
        is_tumour = row.label == "tumour"
        call = ("called" if is_tumour else "false alarm") if called else "missed" if is_tumour else "no"
        assert f"{row.slide_id} {row.patient_id} {row.label} {row.prediction} {verdict} {call} " in table


def test_the_decision_is_a_dot_on_the_roc_where_its_rates_are() -> None:
    report = full()
    assert report.decision is not None
    (spared, alarms), (missed, hits) = report.decision.calls
    alt = f"sensitivity {hits / (hits + missed):.3f}, specificity {spared / (spared + alarms):.3f}"

    def drawn(report: RunReport) -> tuple[str, bool]:
        page = Page(render(report))
        roc = next(image for image in page.all("img") if image["alt"].startswith("ROC"))
        place = [image["src"] for image in page.all("img") if "svg" in image["src"]].index(roc["src"])
        return roc["alt"], any(e.get("id") == "decision" for e in svgs(page)[place].iter())

    assert drawn(report) == (f"ROC curve: tumour; decision at {alt}", True)
    assert drawn(dataclasses.replace(report, decision=None)) == ("ROC curve: tumour", False)


@pytest.mark.parametrize(
    ("part", "fixed", "temperature"),
    [
        (
            "test",
            "The threshold comes from those alone, never from the slides here.",
            "On these slides the temperature",
        ),
        (
            "valid",
            "These are the very slides that it was fixed on",
            "the very ones that it was fitted on, the",
        ),
        ("train", "the network was trained on these.", "On these slides the temperature"),
        ("all", "Those are among the slides here", "among which are those that it was fitted on, the"),
    ],
)
def test_threshold_and_temperature_are_said_to_be_of_other_slides_only_where_they_are(
    part: str, fixed: str, temperature: str
) -> None:
    words = Page(render(dataclasses.replace(full(), part=part))).words
    assert fixed in words
    assert temperature in words
    assert ("never from the slides here" in words) == (part == "test")
    theirs = Page(render(dataclasses.replace(full(), part=part, table="theirs.csv"))).words
    assert "The threshold comes from those alone, never from the slides here." in theirs


def test_calibrated_probabilities_are_told_from_those_that_calls_are_made_by() -> None:
    said = "a slide is called by its probability as predicted"
    as_predicted, calibrated = (
        Page(render(dataclasses.replace(full(), calibrated=is_asked))).words for is_asked in (False, True)
    )
    assert said not in as_predicted
    assert said in calibrated
    assert "results of this page are of the probabilities as predicted." in as_predicted
    assert "results of this page are of the calibrated probabilities, but for decision" in calibrated


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


def test_of_three_classes_a_temperature_is_not_said_to_change_no_ranking() -> None:
    """It does: of these two slides the first is the surer of class a as predicted, and the second at 1/4."""
    two = np.array([[0.5, 0.49, 0.01], [0.48, 0.26, 0.26]])
    assert (np.argsort(tempered(two, 0.25)[:, 0]) != np.argsort(two[:, 0])).all()
    for classes, said in ((("a", "b", "c"), False), (("normal", "tumour"), True)):
        told = calibrated(full(classes))
        assert told is not None
        assert ("no ranking" in told["how"]) == said
        assert "no predicted class" in told["how"]


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


@pytest.mark.parametrize(
    ("modules", "every", "said"),
    [
        (3, 1, "trained without a word from the modules behind it. The last one's"),
        (
            3,
            2,
            "it learnt from those behind it, too, up to the next gradient barrier, one after every 2. The",
        ),
        (3, 3, "no gradient barrier is between them, so it learnt from those of all modules behind it, too."),
        (1, 1, "The network is one module, trained from end to end: its classifier's answer"),
    ],
)
def test_what_a_module_learnt_from_is_said_as_it_was(modules: int, every: int, said: str) -> None:
    report = dataclasses.replace(full(), module_metrics=full().module_metrics[-modules:], barrier_every=every)
    assert said in taught(report)
    assert ("without a word from" in taught(report)) == (modules > 1 and every == 1)


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


def test_folds_each_have_their_temperature_and_the_page_does_not_deny_it() -> None:
    labels, by_head = ["normal", "tumour"] * 8, np.tile([[0.7, 0.3], [0.6, 0.4]], (1, 8, 1))
    patients, part = [f"p{i}" for i in range(16)], [0] * 8 + [1] * 8

    def page(*temperatures: float | None) -> str:
        given = [Temperature(value, 5, 5, None if value else "too few") for value in temperatures]
        found = pool(
            labels, by_head, patients, ("normal", "tumour"), temperatures=given, thresholds=[], part_N=part
        )
        runs = [
            dataclasses.replace(r, temperature=t)
            for r, t in zip(several().runs[:2], temperatures, strict=True)
        ]
        report = dataclasses.replace(several(), calibration=found.calibration, decision=None, runs=runs)
        return Page(render(report)).words

    words = page(2.0, None)
    assert "Calibrated: each run's logits divided by a temperature of its own (2.00, none), fitted" in words
    assert "the runs' temperatures" in words
    assert "Not calibrated" not in words
    words = page(None, None)
    assert "Not calibrated: no run's validation slides tell a temperature." in words
    assert "the runs' temperatures" not in words


def test_no_command_is_given_for_a_network_that_came_from_python() -> None:
    words = Page(render(dataclasses.replace(full(), again="", given_model=True))).words
    assert "no command trains it anew" in words
    assert "no command trains it anew" not in Page(render(full())).words


def test_folds_are_said_to_share_no_patient_and_how_they_are_made_up() -> None:
    report = dataclasses.replace(several(), splits="drawn by patient, with seed 3")
    words = Page(render(report)).words
    assert "The folds share no patient: drawn by patient, with seed 3." in words
    counts = [[one.slides for one in run.metrics.per_class] for run in report.runs]
    rows = [
        f"{run.name} {first} {second} {run.metrics.slides} {run.metrics.patients}"
        for run, (first, second) in zip(report.runs, counts, strict=True)
    ]
    assert f"Fold normal tumour All slides Patients {' '.join(rows)}" in words
    assert "Scores of different networks are pooled here" in words
    one = Page(render(dataclasses.replace(full(), splits=report.splits))).words
    assert "No patient is in two parts; the parts were drawn by patient, with seed 3." in one
    assert "pooled" not in one


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
