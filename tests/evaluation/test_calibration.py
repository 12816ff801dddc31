"""Temperature, reliability, decision: fitted on validation slides, and what they come to on others."""

import dataclasses
import json
import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, confusion_matrix, log_loss

from holoslide.config import RunConfig
from holoslide.errors import ConfigError, HoloslideError
from holoslide.evaluation.calibration import (
    calibration,
    fit_temperature,
    reliability,
    tempered,
)
from holoslide.evaluation.decision import choose_threshold, decide
from holoslide.evaluation.intervals import wilson
from holoslide.evaluation.metrics import Predictions, measure
from holoslide.evaluation.options import EvaluateConfig, Positive
from holoslide.evaluation.outcome import assess, pool

CLASSES = ("benign", "lesion")
ASKED = EvaluateConfig(sensitivity=0.9)


def drawn(slides: int, *, sharpness: float = 1.0, classes: int = 2, seed: int = 0) -> Predictions:
    """Slides of a network whose logits are `sharpness` times those of one that states the truth."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (slides, classes))
    truth = tempered(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), 1.0)
    labels = np.array([rng.choice(classes, p=p) for p in truth])
    names = CLASSES if classes == 2 else tuple("abcdefg"[:classes])
    patients = [f"p{i // 2}" for i in range(slides)]
    return Predictions.checked(labels, tempered(truth, 1 / sharpness), patients, names)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_temperature_is_found_that_undoes_what_was_done(classes: int, sharpness: float) -> None:
    found = fit_temperature(drawn(4000, sharpness=sharpness, classes=classes))
    assert found.value == pytest.approx(sharpness, rel=0.1)
    assert (found.slides, found.patients, found.reason) == (4000, 2000, None)


def test_no_other_temperature_has_less_loss() -> None:
    valid = drawn(60, sharpness=2.0)
    value = fit_temperature(valid).value
    assert value is not None

    def loss(temperature: float) -> float:
        return log_loss(valid.labels, tempered(valid.probabilities, temperature))

    assert all(loss(value) <= loss(value * factor) + 1e-9 for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2))


def test_where_validation_does_not_tell_there_is_no_temperature_and_a_reason() -> None:
    right = Predictions.checked([0, 1, 1], [[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]], list("abc"), CLASSES)
    assert fit_temperature(right).value is None
    assert "every validation slide is right" in (fit_temperature(right).reason or "")
    tied = Predictions.checked(
        [0, 1, 1], [[0.52, 0.48], [0.48, 0.52], [0.5001, 0.4999]], list("abc"), CLASSES
    )
    assert fit_temperature(tied).value is None
    assert "every validation slide is right or nearly so" in (fit_temperature(tied).reason or "")
    wrong = Predictions.checked([1, 0, 1], [[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], list("abc"), CLASSES)
    assert "no better than by guessing" in (fit_temperature(wrong).reason or "")
    np.testing.assert_allclose(fit_temperature(right).apply(right.probabilities), right.probabilities)


def test_a_network_that_says_the_same_of_every_slide_has_no_temperature() -> None:
    for classes in (("a", "b"), ("a", "b", "c")):
        alike = np.full((4, len(classes)), 1 / len(classes))
        found = fit_temperature(Predictions.checked([0, 1, 1, 0], alike, list("pqrs"), classes))
        assert found.value is None
        assert "no better than by guessing" in (found.reason or "")


def test_what_is_certain_and_right_has_the_loss_of_the_measures() -> None:
    sure = Predictions.checked([0, 1], [[1.0, 0.0], [0.0, 1.0]], ["p", "q"], CLASSES)
    assert reliability(sure).log_loss == measure(sure, draws=1).log_loss.value > 0


def test_calibrating_helps_the_overconfident_and_moves_no_rank() -> None:
    temperature = fit_temperature(drawn(300, sharpness=4.0))
    test = drawn(400, sharpness=4.0, seed=1)
    found = calibration(test, temperature)
    assert found.after is not None
    assert found.after.ece < found.before.ece / 2
    assert found.after.log_loss < found.before.log_loss
    after = temperature.apply(test.probabilities)
    assert (np.argsort(after[:, 1]) == np.argsort(test.probabilities[:, 1])).all()
    json.dumps(found.to_dict(), allow_nan=False)


def test_reliability_is_what_its_definition_says() -> None:
    given = drawn(200, sharpness=2.0)
    found = reliability(given)
    p, truth = given.probabilities[:, 1], given.labels == 1
    assert found.of == "lesion"
    assert found.brier == pytest.approx(brier_score_loss(truth, p))
    assert found.log_loss == pytest.approx(log_loss(truth, p))
    ece = 0.0
    for low in range(10):
        inside = (p >= low / 10) & ((p < (low + 1) / 10) | (low == 9))
        if inside.any():
            ece += inside.mean() * abs(p[inside].mean() - truth[inside].mean())
    assert found.ece == pytest.approx(ece)
    assert sum(each.slides for each in found.bins) == 200
    assert all(each.low <= each.observed <= each.high for each in found.bins)


def test_the_honest_are_within_what_chance_gives_and_the_overconfident_beyond() -> None:
    honest, bold = reliability(drawn(300)), reliability(drawn(300, sharpness=4.0))
    assert honest.ece_by_chance[0] < honest.ece < honest.ece_by_chance[1]
    assert bold.ece > bold.ece_by_chance[1]


def test_of_more_classes_reliability_is_that_of_the_prediction() -> None:
    given = Predictions.checked(
        [0, 1, 2, 2],
        [[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7], [0.7, 0.2, 0.1]],
        list("pqrs"),
        "abc",
    )
    found = reliability(given)
    assert found.of is None
    assert [(each.slides, each.observed) for each in found.bins] == [(4, 0.75)]
    assert found.ece == pytest.approx(0.05)


def twice(given: Predictions) -> Predictions:
    """Every slide there twice, as a second one of the same patient."""
    columns = given.labels.tolist(), given.probabilities, given.patients
    labels, p, patients = (np.concatenate([column, column]) for column in columns)
    return Predictions.checked(labels.astype(int), p, patients, given.classes)


def test_reliability_counts_patients_so_that_more_slides_of_the_same_change_nothing() -> None:
    one = drawn(60)
    one = Predictions.checked(one.labels, one.probabilities, [f"q{i}" for i in range(60)], CLASSES)
    single, double = reliability(one), reliability(twice(one))
    assert [b.slides for b in double.bins] == [2 * b.slides for b in single.bins]
    assert [(b.patients, b.low, b.high) for b in double.bins] == [
        (b.patients, pytest.approx(b.low), pytest.approx(b.high)) for b in single.bins
    ]
    assert double.ece_by_chance == pytest.approx(single.ece_by_chance)
    apart = Predictions.checked(
        twice(one).labels, twice(one).probabilities, [str(i) for i in range(120)], CLASSES
    )
    assert reliability(apart).ece_by_chance[1] < 0.85 * single.ece_by_chance[1]


@pytest.mark.parametrize(
    ("sensitivity", "value"), [(1.0, 0.2), (0.8, 0.2), (0.75, 0.4), (0.5, 0.6), (0.26, 0.6), (0.2, 0.9)]
)
def test_the_threshold_is_the_highest_that_finds_enough(sensitivity: float, value: float) -> None:
    p = np.array([0.9, 0.6, 0.4, 0.2, 0.5, 0.3, 0.1])
    valid = Predictions.checked([1, 1, 1, 1, 0, 0, 0], np.stack([1 - p, p], 1), list("abcdefg"), CLASSES)
    found = choose_threshold(valid, sensitivity=sensitivity)
    assert found is not None
    assert found.value == value
    assert (p[:4] >= found.value).mean() >= sensitivity
    assert (found.positives, found.negatives) == (4, 3)
    assert found.found == (p[:4] >= value).sum()
    assert found.spared == (p[4:] < value).sum()


def test_a_decision_counts_what_scikit_learn_counts() -> None:
    test = drawn(80, seed=3)
    threshold = choose_threshold(drawn(60, seed=2), sensitivity=0.9)
    assert threshold is not None
    found = decide(test, 0.9, threshold=threshold)
    called = test.probabilities[:, 1] >= threshold.value
    assert np.array(found.calls).tolist() == confusion_matrix(test.labels, called).tolist()
    (spared, alarms), (missed, hits) = found.calls
    assert found.sensitivity.value == hits / (hits + missed)
    assert found.specificity.value == spared / (spared + alarms)
    assert found.ppv.value == hits / (hits + alarms)
    assert found.npv.value == spared / (spared + missed)
    patients = len(np.unique(test.patients[test.labels == 1]))
    assert (found.sensitivity.low, found.sensitivity.high) == wilson(hits / (hits + missed), patients)


def test_a_decision_of_three_classes_is_refused_and_of_no_positive_is_none() -> None:
    with pytest.raises(HoloslideError, match="give predictions of two"):
        choose_threshold(drawn(9, classes=3), sensitivity=0.9)
    none = Predictions.checked([0, 0], [[0.9, 0.1], [0.8, 0.2]], ["a", "b"], CLASSES)
    assert choose_threshold(none, sensitivity=0.9) is None
    called = decide(none, 0.9, value_N=np.array([0.5, 0.5]))
    assert called.sensitivity.value is None
    assert called.sensitivity.reason == "no slide is of class lesion"
    assert called.ppv.reason == "no slide is called positive"


# --- All together -----------------------------------------------------------------------------------------------


def columns(given: Predictions) -> tuple[list[str], np.ndarray, list[str], tuple[str, ...]]:
    names = [given.classes[i] for i in given.labels]
    return names, np.stack([given.probabilities] * 2), given.patients.tolist(), given.classes


def test_scored_slides_have_no_part_in_temperature_and_threshold() -> None:
    valid, one, other = drawn(80, sharpness=2.0), drawn(40, seed=1), drawn(40, sharpness=5.0, seed=2)
    first, second = (assess(*columns(test), valid=valid, asked=ASKED) for test in (one, other))
    assert first.calibration is not None
    assert second.calibration is not None
    assert first.calibration.temperature == second.calibration.temperature == fit_temperature(valid)
    assert first.decision is not None
    assert first.decision.threshold == choose_threshold(valid, sensitivity=0.9)


def test_metrics_are_of_raw_probabilities_unless_asked() -> None:
    valid, test = drawn(80, sharpness=3.0), drawn(60, sharpness=3.0, seed=1)
    raw = assess(*columns(test), valid=valid, asked=ASKED)
    asked = assess(*columns(test), valid=valid, asked=ASKED, calibrated=True)
    assert raw.metrics == raw.modules[-1] == asked.modules[-1]
    assert asked.metrics.log_loss.value is not None
    assert asked.metrics.log_loss.value < (raw.metrics.log_loss.value or math.nan)
    assert asked.metrics.auroc == raw.metrics.auroc
    assert asked.calibration == raw.calibration


def test_without_validation_slides_the_reason_is_kept() -> None:
    found = assess(*columns(drawn(20)), valid="they are gone", asked=ASKED)
    assert (found.calibration, found.decision, found.lacking) == (None, None, "they are gone")


def test_pooled_slides_keep_their_own_networks_temperature_and_threshold() -> None:
    sharp, dull = drawn(50, sharpness=4.0, seed=1), drawn(50, sharpness=0.5, seed=2)
    valids = drawn(400, sharpness=4.0, seed=3), drawn(400, sharpness=0.5, seed=4)
    temperatures = [fit_temperature(valid) for valid in valids]
    thresholds = [choose_threshold(valid, sensitivity=0.9) for valid in valids]
    labels = [CLASSES[i] for part in (sharp, dull) for i in part.labels]
    probabilities = np.concatenate([sharp.probabilities, dull.probabilities])[None]
    patients = [f"{i}{p}" for i, part in enumerate((sharp, dull)) for p in part.patients]
    found = pool(
        labels, probabilities, patients, CLASSES, temperatures=temperatures, thresholds=thresholds,
        part_N=[0] * 50 + [1] * 50,
    )  # fmt: skip
    assert found.calibration is not None
    assert found.calibration.after is not None
    assert found.calibration.after.log_loss < found.calibration.before.log_loss
    assert found.decision is not None
    expected = [
        decide(part, 0.9, threshold=t).calls for part, t in zip((sharp, dull), thresholds, strict=True)
    ]
    assert np.array(found.decision.calls).tolist() == np.sum(expected, axis=0).tolist()
    assert pool(
        labels, probabilities, patients, CLASSES, temperatures=temperatures[:1], thresholds=[],
        part_N=[0] * 50 + [1] * 50,
    ).lacking  # fmt: skip


# --- The positive class -----------------------------------------------------------------------------------------

CANCER = ("cancer", "normal")


def hunted() -> tuple[Predictions, Predictions]:
    """Validation and test slides of cancer and normal, the other way round by name."""
    one, other = drawn(80, sharpness=2.0, seed=5), drawn(60, sharpness=2.0, seed=6)
    valid, test = (
        Predictions.checked(each.labels, each.probabilities, each.patients, CANCER) for each in (one, other)
    )
    return valid, test


def test_the_positive_class_can_be_chosen_and_all_that_has_one_is_of_it() -> None:
    valid, test = hunted()
    found = assess(*columns(test), valid=valid, asked=EvaluateConfig(sensitivity=0.9, positive="cancer"))
    is_cancer, score = test.labels == 0, test.probabilities[:, 0]
    assert found.metrics.positive == "cancer"
    assert found.metrics.auprc.value == pytest.approx(average_precision_score(is_cancer, score))
    assert found.metrics.auprc == found.metrics.per_class[0].auprc
    assert found.calibration is not None
    assert found.calibration.before.of == "cancer"
    ordered = sorted(valid.probabilities[valid.labels == 0, 0])
    assert found.decision is not None
    assert found.decision.threshold is not None
    assert found.decision.threshold.value in ordered
    assert found.decision.threshold.found >= 0.9 * len(ordered)
    called = score >= found.decision.threshold.value
    assert found.decision.positive == "cancer"
    assert found.decision.called == tuple(called.tolist())
    assert found.decision.sensitivity.value == (called & is_cancer).sum() / is_cancer.sum()
    assert found.decision.ppv.value == (called & is_cancer).sum() / called.sum()
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["positive"] == {"class": "cancer", "how": "chosen by evaluate.positive"}
    assert plain["decision"]["positive"] == plain["slides"]["positive"] == "cancer"


def test_patients_and_pooled_networks_have_the_same_positive_class() -> None:
    valid, test = hunted()
    asked = EvaluateConfig(positive="cancer")
    own = [f"{patient} {label}" for patient, label in zip(test.patients, test.labels, strict=True)]
    labels, by_head, _, _ = columns(test)
    found = assess(labels, by_head, own, CANCER, valid=valid, asked=asked)
    assert found.patients is not None
    assert found.patients.positive == "cancer"
    threshold = choose_threshold(dataclasses.replace(valid, positive="cancer"), sensitivity=0.9)
    assert threshold is not None
    pooled = pool(
        labels, by_head, own, CANCER, temperatures=[fit_temperature(valid)], thresholds=[threshold],
        part_N=[0] * len(labels), positive=Positive.of(CANCER, "cancer"),
    )  # fmt: skip
    assert pooled.metrics.positive == "cancer"
    assert pooled.decision is not None
    assert pooled.decision.positive == "cancer"
    assert pooled.to_dict()["positive"] == {"class": "cancer", "how": "chosen by evaluate.positive"}


def test_left_to_itself_the_positive_class_is_the_last_by_name_and_said_to_be() -> None:
    valid, test = hunted()
    found = assess(*columns(test), valid=valid, asked=ASKED)
    assert found.metrics.positive == "normal"
    assert found.to_dict()["positive"] == {"class": "normal", "how": "the last by name"}


def test_a_positive_class_that_is_none_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        Positive.of(CANCER, "tumour")
    assert str(caught.value) == "evaluate.positive: 'tumour' is no class; choose one of cancer, normal"
    with pytest.raises(
        ConfigError, match=r"is 'a', but there are 3 classes \(a, b, c\); leave it out: each class"
    ):
        Positive.of("abc", "a")
    assert Positive.of("abc", None) is None


def test_a_class_may_be_called_by_a_number() -> None:
    assert RunConfig.load(sets=["evaluate.positive=0"]).evaluate.positive == "0"
    assert RunConfig.load(sets=['evaluate.positive="0"']).evaluate.positive == "0"
    assert RunConfig.load().evaluate.positive is None


def test_a_decision_that_is_not_made_says_why() -> None:
    three = drawn(30, classes=3)
    found = assess(*columns(three), valid=three, asked=ASKED)
    assert found.decision is None
    assert found.undecided == "a threshold tells two classes apart, and there are 3"
    none = Predictions.checked([0, 0], [[0.9, 0.1], [0.8, 0.2]], ["a", "b"], CLASSES)
    found = assess(*columns(drawn(20)), valid=none, asked=ASKED)
    assert found.decision is None
    assert found.undecided == "no validation slide is lesion"
