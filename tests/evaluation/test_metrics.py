"""Metrics: scikit-learn's values, fast resampling that equals it draw by draw, and nothing undefined in silence."""

import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from holoslide.errors import HoloslideError
from holoslide.evaluation import bootstrap
from holoslide.evaluation.intervals import auroc_interval, wilson
from holoslide.evaluation.metrics import Interval, by_patient, compute_metrics, pr_points, roc_points


def study(slides: int, classes: int, *, seed: int = 0, each: int = 2, skill: float = 1.0):
    """Labels, probabilities, patients and class names; `each` slides a patient, all classes there."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, slides)
    labels[:classes] = np.arange(classes)
    logits = rng.normal(size=(slides, classes)) + skill * np.eye(classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return labels, probabilities, [f"p{i // each}" for i in range(slides)], [f"c{c}" for c in range(classes)]


def values(metrics) -> dict[str, Interval]:
    found = {name: each for name, each in vars_of(metrics).items() if isinstance(each, Interval)}
    for each in metrics.per_class:
        found |= {f"{each.name} {k}": v for k, v in vars_of(each).items() if isinstance(v, Interval)}
    return found


def vars_of(record) -> dict[str, object]:
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


# --- Values


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_values_are_scikit_learns(classes):
    labels, p, patients, names = study(80, classes)
    m = compute_metrics(labels, p, patients, names, draws=50)
    predicted = p.argmax(axis=1)
    hot = np.eye(classes)[labels]
    if classes > 2:
        assert m.auroc.value == pytest.approx(sk.roc_auc_score(labels, p, multi_class="ovr", average="macro"))
        assert m.auroc == m.macro_auroc
        assert m.auprc == m.macro_auprc
        assert m.positive is None
    else:
        assert m.auroc.value == pytest.approx(sk.roc_auc_score(labels, p[:, 1]))
        assert m.auprc.value == pytest.approx(sk.average_precision_score(labels, p[:, 1]))
        assert m.auprc == m.per_class[1].auprc != m.per_class[0].auprc
        assert m.positive == "c1"
    assert m.macro_auprc.value == pytest.approx(sk.average_precision_score(hot, p, average="macro"))
    assert m.accuracy.value == pytest.approx(sk.accuracy_score(labels, predicted))
    assert m.balanced_accuracy.value == pytest.approx(sk.balanced_accuracy_score(labels, predicted))
    assert m.macro_f1.value == pytest.approx(sk.f1_score(labels, predicted, average="macro"))
    assert m.log_loss.value == pytest.approx(sk.log_loss(labels, p))
    assert np.array_equal(m.confusion, sk.confusion_matrix(labels, predicted))
    assert [each.f1.value for each in m.per_class] == pytest.approx(
        list(sk.f1_score(labels, predicted, average=None))
    )
    assert [each.slides for each in m.per_class] == np.bincount(labels).tolist()
    assert (m.slides, m.patients, m.classes) == (80, 40, tuple(names))
    assert all(i.low <= i.value <= i.high for i in values(m).values())


def test_labels_by_name_and_plain_values_for_json():
    labels, p, patients, names = study(40, 3)
    m = compute_metrics(labels, p, patients, names, draws=50)
    assert compute_metrics([names[label] for label in labels], p, patients, names, draws=50) == m
    plain = json.loads(json.dumps(m.to_dict(), allow_nan=False))
    assert plain["auroc"]["low"] == m.auroc.low
    assert plain["resampling"] == {"draws": 50, "seed": 0, "level": 0.95, "lacking": m.resampling.lacking}
    assert plain["per_class"][2]["name"] == "c2"


def test_the_seed_decides_and_the_order_of_slides_does_not():
    labels, p, patients, names = study(60, 2)
    m = compute_metrics(labels, p, patients, names, draws=200)
    order = np.random.default_rng(1).permutation(60)
    again = compute_metrics(labels[order], p[order], [patients[i] for i in order], names, draws=200)
    for name, interval in values(m).items():
        other = values(again)[name]
        assert (other.value, other.low, other.high) == pytest.approx(
            (interval.value, interval.low, interval.high)
        )
    assert compute_metrics(labels, p, patients, names, draws=200) == m
    assert compute_metrics(labels, p, patients, names, draws=200, seed=1).log_loss != m.log_loss


# --- The fast bootstrap against scikit-learn on the resampled slides themselves

LEVELS = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0])  # few levels, so that many scores tie


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_each_draw_equals_scikit_learn_with_ties(data):
    slides = data.draw(st.integers(2, 25))
    scores = np.array(data.draw(st.lists(LEVELS | st.floats(0, 1), min_size=slides, max_size=slides)))
    is_positive = np.array(data.draw(st.lists(st.booleans(), min_size=slides, max_size=slides)))
    patients = np.array(data.draw(st.lists(st.sampled_from("abcdefg"), min_size=slides, max_size=slides)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    (weights,) = bootstrap.draw_weights(patients, 8, rng)
    aurocs = bootstrap.weighted_auroc(weights, is_positive, scores)
    auprcs = bootstrap.weighted_auprc(weights, is_positive, scores)
    for times, auroc, auprc in zip(weights, aurocs, auprcs, strict=True):
        drawn = np.repeat(np.arange(slides), times)
        truth, score = is_positive[drawn], scores[drawn]
        if truth.any() and not truth.all():
            assert auroc == pytest.approx(sk.roc_auc_score(truth, score), abs=1e-12)
        else:
            assert math.isnan(auroc)
        if truth.any():
            assert auprc == pytest.approx(sk.average_precision_score(truth, score), abs=1e-12)
        else:
            assert math.isnan(auprc)


@settings(deadline=None, max_examples=60)
@given(slides=st.integers(3, 30), classes=st.integers(2, 4), seed=st.integers(0, 999))
def test_every_measure_of_each_draw_equals_scikit_learn(slides, classes, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, slides)
    p = rng.dirichlet(np.ones(classes), slides)
    patients = rng.integers(0, 6, slides).astype(str)
    losses = -np.log(p[np.arange(slides), labels])
    (weights,) = bootstrap.draw_weights(patients, 5, rng)
    found = bootstrap.statistics(weights, labels, p, losses)
    for b, times in enumerate(weights):
        drawn = np.repeat(np.arange(slides), times)
        truth, predicted = labels[drawn], p[drawn].argmax(axis=1)
        numbers = list(range(classes))
        assert found["accuracy"][b] == pytest.approx(sk.accuracy_score(truth, predicted))
        assert found["log loss"][b] == pytest.approx(sk.log_loss(truth, p[drawn], labels=numbers))
        f1 = sk.f1_score(truth, predicted, labels=numbers, average=None, zero_division=np.nan)
        assert [found[f"f1 {c}"][b] for c in numbers] == pytest.approx(list(f1), nan_ok=True)
        assert found["macro f1"][b] == pytest.approx(f1.mean(), nan_ok=True)
        if set(truth) == set(numbers):
            assert found["balanced accuracy"][b] == pytest.approx(
                sk.balanced_accuracy_score(truth, predicted)
            )
            one_vs_rest = [sk.roc_auc_score(truth == c, p[drawn][:, c]) for c in numbers]
            assert found["macro auroc"][b] == pytest.approx(np.mean(one_vs_rest))
        else:
            assert math.isnan(found["balanced accuracy"][b])
            assert math.isnan(found["macro auroc"][b])


def test_patients_are_drawn_whole_as_many_as_there_are():
    patients = np.array(["a", "b", "a", "c", "c", "c"])
    (weights,) = bootstrap.draw_weights(patients, 500, np.random.default_rng(0))
    a, b, c = weights[:, 0], weights[:, 1], weights[:, 3]
    assert np.array_equal(a, weights[:, 2])
    assert np.array_equal(c, weights[:, 4])
    assert np.array_equal(c, weights[:, 5])
    assert (a + b + c == 3).all()
    assert abs(a.mean() - 1) < 0.1


def test_chunks_change_nothing(monkeypatch):
    arguments = study(50, 3)
    whole = compute_metrics(*arguments, draws=100)
    monkeypatch.setattr(bootstrap, "CHUNK", 50 * 7)
    chunks = list(bootstrap.draw_weights(np.array(arguments[2]), 100, np.random.default_rng(0)))
    assert len(chunks) == 15
    assert sum(map(len, chunks)) == 100
    cut = compute_metrics(*arguments, draws=100)
    for name, interval in values(whole).items():
        assert (values(cut)[name].low, values(cut)[name].high) == pytest.approx((interval.low, interval.high))


def test_intervals_over_patients_hold_what_they_promise_and_over_slides_do_not():
    rng = np.random.default_rng(0)
    held = {"patients": 0, "slides": 0}
    for _ in range(100):
        right = np.repeat(rng.random(40) < 0.7, 4)  # the four slides of a patient are right or wrong together
        labels = rng.integers(0, 2, 160)
        p = np.where((labels == 1) == right, 0.8, 0.2)
        arguments = labels, np.stack([1 - p, p], axis=1)
        for unit, ids in (("patients", np.arange(160) // 4), ("slides", np.arange(160))):
            found = compute_metrics(*arguments, ids, ["0", "1"], draws=100).accuracy
            held[unit] += found.low <= 0.7 <= found.high
    assert held["patients"] > 87
    assert held["slides"] < 75


def test_a_thousand_draws_of_300_slides_take_seconds_at_most():
    arguments = study(300, 3)
    start = time.perf_counter()
    compute_metrics(*arguments)
    assert time.perf_counter() - start < 5


# --- What is not defined


def test_a_class_without_slides_leaves_none_and_a_reason():
    labels, p, patients, names = study(30, 3)
    labels[labels == 2] = 0
    m = compute_metrics(labels, p, patients, names, draws=50)
    for interval in (m.auroc, m.macro_auprc, m.balanced_accuracy, m.per_class[2].auroc, m.per_class[2].auprc):
        assert (interval.value, interval.low, interval.high) == (None, None, None)
        assert interval.reason == "no slide is of class c2"
        assert interval.skipped == 50
    assert m.per_class[0].auroc.value is not None
    assert m.per_class[2].f1.value == 0  # c2 is predicted, always wrongly
    assert m.resampling.lacking == 50
    assert json.dumps(m.to_dict(), allow_nan=False)


def test_one_class_only():
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    m = compute_metrics([0, 0, 0], p, ["a", "b", "c"], ["neg", "pos"], draws=20)
    assert (m.auroc.value, m.auroc.reason) == (None, "no slide is of class pos")
    assert m.per_class[0].auroc.reason == "every slide is of class neg"
    assert m.per_class[1].f1.reason == "no slide is of class pos or predicted so"
    assert m.macro_f1.reason == "no slide is of class pos or predicted so"
    assert m.accuracy == Interval(1.0, pytest.approx(0.4385, abs=1e-4), 1.0)  # three patients


def test_draws_without_a_class_are_left_out_and_counted():
    labels = [0] * 9 + [1]
    p = np.linspace(0.1, 0.9, 10)
    patients = [f"p{i}" for i in range(10)]
    m = compute_metrics(labels, np.stack([1 - p, p], axis=1), patients, ["a", "b"], draws=1000)
    assert 300 < m.auroc.skipped == m.resampling.lacking < 400  # (1 - 1/10)^10 is 35 %
    assert m.auroc.low is not None
    assert m.accuracy.skipped == 0


def test_an_interval_needs_half_of_the_draws():
    labels = [0] * 5 + [1] + [2] + [3]  # all four classes come together in few draws
    p = np.full((8, 4), 0.1) + 0.6 * np.eye(4)[labels]
    m = compute_metrics(labels, p, [f"p{i}" for i in range(8)], list("abcd"), draws=400)
    assert m.macro_auroc.value == 1
    assert m.macro_auroc.low is m.macro_auroc.high is None
    assert m.macro_auroc.reason == f"not defined in {m.macro_auroc.skipped} of 400 draws, for want of a class"


def test_one_patient_has_no_interval():
    labels, p, _, names = study(10, 2)
    m = compute_metrics(labels, p, ["same"] * 10, names, draws=20)
    assert m.auroc.value is not None
    assert (m.auroc.low, m.auroc.high, m.auroc.reason) == (None, None, "one patient has no spread")


# --- What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"p": [[0.4, 0.6], [2.5, -1.5]]},
            "probabilities, row 1: holds 2.5, as logits would; give softmax of",
        ),
        ({"p": [[0.4, 0.6], [0.3, 0.9]]}, "probabilities, row 1: sums to 1.2, not to 1; give softmax of"),
        ({"p": [[0.4, 0.6], [0.3, math.nan]]}, "probabilities, row 1: holds what is not finite"),
        ({"p": [0.4, 0.6]}, r"probabilities: have shape \(2,\) for 2 slides and 2 classes; give a row for"),
        ({"p": [[1.0], [1.0]]}, r"probabilities: have shape \(2, 1\)"),
        ({"labels": [0, 2]}, r"labels, row 1: 2 is no class; give a class \(a, b\) or its number"),
        ({"labels": [-1, 0]}, "labels, row 0: -1 is no class"),
        ({"labels": ["a", "z"]}, "labels, row 1: 'z' is no class"),
        ({"labels": ["a", None]}, "labels, row 1: None is no class; .* leave slides without a label out"),
        ({"labels": [[0], [1]]}, r"labels: have shape \(2, 1\)"),
        (
            {"labels": [], "p": np.zeros((0, 2)), "patients": []},
            r"labels: have shape \(0,\); give one for each",
        ),
        ({"patients": ["p"]}, r"patients: have shape \(1,\) for 2 slides"),
        ({"patients": ["p", None]}, "patients, row 1: None is no id"),
        ({"patients": ["p", math.nan]}, "patients, row 1: nan is no id; give ids as text"),
        ({"patients": ["", "p"]}, "patients, row 0: '' is no id"),
        ({"classes": ["a", "a"]}, "classes: are .*; give two or more, no two alike"),
        ({"draws": 0}, "draws: are 0; give 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, message):
    given = {"labels": [0, 1], "p": [[0.4, 0.6], [0.3, 0.7]], "patients": ["p", "q"], "classes": ["a", "b"]}
    given |= {"draws": 10} | change
    with pytest.raises(HoloslideError, match=message):
        compute_metrics(
            given["labels"], given["p"], given["patients"], given["classes"], draws=given["draws"]
        )


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 9999), classes=st.integers(2, 5))
def test_logits_are_refused(seed, classes):
    logits = np.random.default_rng(seed).normal(size=(8, classes)) * 3
    with pytest.raises(HoloslideError, match="give softmax of the logits"):
        compute_metrics([0] * 8, logits, range(8), [f"c{c}" for c in range(classes)], draws=1)
    with pytest.raises(HoloslideError, match="give softmax of the logits"):
        roc_points([0] * 8, logits, [f"c{c}" for c in range(classes)])


def test_probabilities_as_tables_and_half_precision_hold_them_are_taken():
    labels, p, patients, names = study(50, 3)
    rounded = compute_metrics(labels, p.round(4), patients, names, draws=10)
    single = compute_metrics(labels, p.astype(np.float32), patients, names, draws=10)
    exact = compute_metrics(labels, p, patients, names, draws=10)
    assert rounded.log_loss.value == pytest.approx(exact.log_loss.value, abs=1e-3)
    assert single.auroc.value == pytest.approx(exact.auroc.value, abs=1e-3)


def test_ranks_are_taken_from_what_was_given():
    p = np.array(
        [[0.5000, 0.5001], [0.4999, 0.5001]]
    )  # equal as given, and no longer if rows are made to sum to 1
    assert compute_metrics([0, 1], p, ["p", "q"], ["a", "b"], draws=1).auroc.value == 0.5


# --- Curves


def test_curves_are_scikit_learns():
    labels, p, _, names = study(60, 2)
    roc, pr = roc_points(labels, p, names)["c1"], pr_points(labels, p, names)["c1"]
    fpr, tpr, thresholds = sk.roc_curve(labels, p[:, 1])
    assert np.array_equal(roc.x, fpr)
    assert np.array_equal(roc.y, tpr)
    assert roc.thresholds[0] is None
    assert np.array_equal(roc.thresholds[1:], thresholds[1:])
    precision, recall, thresholds = sk.precision_recall_curve(labels, p[:, 1])
    assert np.array_equal(pr.x, recall)
    assert np.array_equal(pr.y, precision)
    assert np.array_equal(pr.thresholds[:-1], thresholds)
    assert pr.thresholds[-1] is None
    assert sk.auc(roc.x, roc.y) == pytest.approx(sk.roc_auc_score(labels, p[:, 1]))


def test_curves_that_are_not_defined_say_why():
    p = np.array([[0.9, 0.1], [0.8, 0.2]])
    roc, pr = roc_points(["a", "a"], p, ["a", "b"]), pr_points(["a", "a"], p, ["a", "b"])
    assert (roc["a"].x, roc["a"].reason) == ((), "every slide is of class a")
    assert (roc["b"].x, roc["b"].reason) == ((), "no slide is of class b")
    assert pr["a"].reason is None
    assert (pr["b"].y, pr["b"].reason) == ((), "no slide is of class b")


# --- Patients


def test_a_patients_probability_is_the_mean_of_its_slides():
    p = np.array([[0.2, 0.8], [0.9, 0.1], [0.4, 0.6]])
    found = by_patient(["b", "a", "b"], p, ["y", "x", "y"], ["a", "b"])
    assert found.patients.tolist() == ["x", "y"]
    assert found.labels.tolist() == [0, 1]
    assert found.probabilities == pytest.approx(np.array([[0.9, 0.1], [0.3, 0.7]]))
    m = compute_metrics(found.labels, found.probabilities, found.patients, found.classes, draws=10)
    assert (m.slides, m.patients, m.accuracy.value) == (2, 2, 1.0)


def test_a_patient_of_two_labels_has_none():
    p = np.array([[0.2, 0.8], [0.9, 0.1]])
    with pytest.raises(HoloslideError, match=r"patient y: has slides of b and a; .* measure slides"):
        by_patient(["b", "a"], p, ["y", "y"], ["a", "b"])


# --- Intervals


@pytest.mark.parametrize(("hits", "of"), [(8, 10), (0, 4), (4, 4), (1, 90)])
def test_the_interval_of_a_share_is_wilsons(hits, of):
    expected = stats.binomtest(hits, of).proportion_ci(method="wilson")
    assert wilson(hits / of, of) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("auroc", [0.0, 0.03, 0.5, 0.8, 0.97, 1.0])
@pytest.mark.parametrize(("positives", "negatives"), [(4, 4), (6, 30), (30, 6), (1, 1)])
def test_the_interval_of_an_auroc_holds_what_cannot_be_ruled_out(auroc, positives, negatives):
    true = np.linspace(0, 1, 20001)
    q1, q2 = true / (2 - true), 2 * true**2 / (1 + true)  # Hanley and McNeil 1982
    half = (positives + negatives) / 2 - 1  # both kinds alike, as in Newcombe's method 5
    variance = true * (1 - true) + half * (q1 - true**2) + half * (q2 - true**2)
    inside = true[np.abs(auroc - true) <= 1.959964 * np.sqrt(variance / (positives * negatives))]
    assert auroc_interval(auroc, positives, negatives) == pytest.approx(
        (min(auroc, inside.min()), max(auroc, inside.max())), abs=2e-4
    )


def ranked(errors: int):
    """Six patients of either class, two slides each; of `errors` of them one slide is ranked too low."""
    labels = np.repeat([0, 1], 12)
    score = np.linspace(0, 1, 24)
    for i in range(errors):
        score[12 + 2 * i] = 0.45 + i / 1000
    return labels, np.stack([1 - score, score], axis=1), [f"p{i // 2}" for i in range(24)], ("no", "yes")


def test_what_is_perfect_is_not_certain_and_no_worse_known_than_what_is_nearly_so():
    """The floor under a result rises with the result, and slides and patients do not contradict each other."""
    perfect, nearly, worse = (compute_metrics(*ranked(errors), draws=200) for errors in range(3))
    assert (perfect.auroc.value, perfect.auroc.high) == (1, 1)
    assert perfect.auroc.low == auroc_interval(1.0, 6, 6)[0]  # patients, not slides
    assert perfect.accuracy.low == wilson(1.0, 12)[0]
    assert worse.auroc.low < nearly.auroc.low < perfect.auroc.low
    assert nearly.auroc.value > 0.95
    assert nearly.auroc.low < 0.75
    of_patients = by_patient(*ranked(1))
    mean = compute_metrics(
        of_patients.labels, of_patients.probabilities, of_patients.patients, ("no", "yes"), draws=200
    )
    assert mean.auroc.value == 1
    assert mean.auroc.low > nearly.auroc.low


def test_an_interval_is_never_narrower_than_the_bootstraps():
    labels, p, patients, names = study(90, 2, each=3)
    m = compute_metrics(labels, p, patients, names, draws=400)
    (weights,) = bootstrap.draw_weights(np.array(patients), 400, np.random.default_rng(0))
    drawn = bootstrap.weighted_auroc(weights, labels == 1, p[:, 1])
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert m.auroc.low <= low
    assert m.auroc.high >= high


def test_the_positive_class_can_be_chosen():
    labels, p, patients, names = study(60, 2)
    m = compute_metrics(labels, p, patients, names, positive="c0", draws=50)
    assert m.positive == "c0"
    assert m.auprc == m.per_class[0].auprc != m.per_class[1].auprc
    with pytest.raises(HoloslideError, match="'x' is no class; choose one of c0, c1"):
        compute_metrics(labels, p, patients, names, positive="x", draws=50)
