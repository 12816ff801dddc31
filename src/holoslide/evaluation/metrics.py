"""How good predictions are, with intervals over patients: what is not defined is None and says why, never NaN.

N slides, C classes, P patients. Values are scikit-learn's; intervals are percentiles of a bootstrap over patients
(`bootstrap.py`), since slides of one patient are no independent draws. Everything takes probabilities, not logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn import metrics as sk

from holoslide.errors import HoloslideError
from holoslide.evaluation.bootstrap import Values, draw_weights, statistics

LEVEL = 0.95
SUM_TOLERANCE = 1e-3  # of a row's probabilities: tables hold a few decimals
_SOFTMAX = "give softmax of the logits"


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its bootstrap interval. None where it is not defined, with the `reason`.

    `skipped` draws of the bootstrap have no value, for want of a class, and are left out of the interval.
    """

    value: float | None
    low: float | None
    high: float | None
    skipped: int = 0
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ClassMetrics:
    """One class against the rest."""

    name: str
    slides: int
    auroc: Interval
    auprc: Interval
    f1: Interval


@dataclass(frozen=True, slots=True)
class Resampling:
    """How the intervals came about; `lacking` of the `draws` had no slide of some class."""

    draws: int
    seed: int
    level: float
    lacking: int


@dataclass(frozen=True, slots=True)
class Metrics:
    """All measures of one set of predictions.

    Of two classes the last is the `positive` one, and `auroc` and `auprc` are its; of more there is no positive,
    and they are macro means. Macro means are over all classes, and undefined where a class's is. The predicted
    class is the most probable. `confusion` counts slides, rows being labels and columns predictions.
    """

    classes: tuple[str, ...]
    slides: int
    patients: int
    positive: str | None
    auroc: Interval
    auprc: Interval
    macro_auroc: Interval
    macro_auprc: Interval
    accuracy: Interval
    balanced_accuracy: Interval
    macro_f1: Interval
    log_loss: Interval
    per_class: tuple[ClassMetrics, ...]
    confusion: tuple[tuple[int, ...], ...]
    resampling: Resampling

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Curve:
    """Points of a curve. Empty where it is not defined, with the `reason`.

    ROC: x is the false positive rate, y the true positive rate; PR: x is recall, y precision. A point is what
    calling all slides of at least its threshold positive gives; None is a threshold above all.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    thresholds: tuple[float | None, ...]
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Predictions:
    """Checked predictions: labels as numbers of classes (N,), probabilities (N, C), patients (N,)."""

    labels: NDArray[np.int64]
    probabilities: Values
    patients: NDArray[np.str_]
    classes: tuple[str, ...]

    @classmethod
    def checked(
        cls, labels: ArrayLike, probabilities: ArrayLike, patients: ArrayLike, classes: Sequence[str]
    ) -> Predictions:
        """Labels may be numbers of classes or their names; HoloslideError, with the row, for what cannot be."""
        classes = tuple(classes)
        numbers = _numbers(labels, classes)
        checked = _probabilities(probabilities, len(numbers), classes)
        return cls(numbers, checked, _patients(patients, len(numbers)), classes)

    def by_patient(self) -> Predictions:
        """One row a patient: the mean probability over the slides; HoloslideError if their labels differ."""
        names, first_P, patient_N = np.unique(self.patients, return_index=True, return_inverse=True)
        labels_P = self.labels[first_P]
        odd = np.flatnonzero(labels_P[patient_N] != self.labels)
        if len(odd):
            one, other = labels_P[patient_N[odd[0]]], self.labels[odd[0]]
            what = f"has slides of {self.classes[one]} and {self.classes[other]}"
            remedy = "a label of its own for each slide has no value for the patient: measure slides"
            raise HoloslideError(f"patient {self.patients[odd[0]]}", what, remedy)
        sums_PC = np.zeros((len(names), len(self.classes)))
        np.add.at(sums_PC, patient_N, self.probabilities)
        return Predictions(labels_P, sums_PC / np.bincount(patient_N)[:, None], names, self.classes)


def by_patient(
    labels: ArrayLike, probabilities: ArrayLike, patients: ArrayLike, classes: Sequence[str]
) -> Predictions:
    """Patients in place of slides, where the label is the patient's; see `Predictions.by_patient`."""
    return Predictions.checked(labels, probabilities, patients, classes).by_patient()


def compute_metrics(
    labels: ArrayLike,
    probabilities: ArrayLike,
    patients: ArrayLike,
    classes: Sequence[str],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Metrics:
    """Every measure with its 95 % interval over patients; raises what `Predictions.checked` does.

    Labels (N,) are names or numbers of `classes`; probabilities (N, C) have a row sum of 1.
    """
    if draws < 1:
        raise HoloslideError("draws", f"are {draws}", "give 1 or more, such as 1000")
    given = Predictions.checked(labels, probabilities, patients, classes)
    points, reasons = _points(given)
    losses_N = _losses(given)
    chunks, lacking = [], 0
    for weights_BN in draw_weights(given.patients, draws, np.random.default_rng(seed)):
        chunks.append(statistics(weights_BN, given.labels, given.probabilities, losses_N))
        counts_BC = weights_BN @ np.eye(len(given.classes), dtype=np.int64)[given.labels]
        lacking += int((counts_BC == 0).any(axis=1).sum())
    number, fewest = len(np.unique(given.patients)), _fewest_patients(given)
    found = {
        name: _interval(
            point, reasons.get(name), np.concatenate([each[name] for each in chunks]),
            patients=number, cases=number if name == "accuracy" else fewest,
        )
        for name, point in points.items()
    }  # fmt: skip
    return _assembled(given, found, Resampling(draws, seed, LEVEL, lacking))


def roc_points(labels: ArrayLike, probabilities: ArrayLike, classes: Sequence[str]) -> dict[str, Curve]:
    """The ROC curve of each class against the rest."""
    curves = {}
    for name, is_c, scores in _one_vs_rest(labels, probabilities, classes):
        reason = _without_auroc(is_c, name)
        x, y, thresholds = sk.roc_curve(is_c, scores) if reason is None else ((), (), ())
        curves[name] = _curve(x, y, [None, *thresholds[1:]] if reason is None else [], reason)
    return curves


def pr_points(labels: ArrayLike, probabilities: ArrayLike, classes: Sequence[str]) -> dict[str, Curve]:
    """The precision-recall curve of each class against the rest, from all slides called positive to none."""
    curves = {}
    for name, is_c, scores in _one_vs_rest(labels, probabilities, classes):
        reason = _without_positive(is_c, name)
        precision, recall, thresholds = (
            sk.precision_recall_curve(is_c, scores) if reason is None else ((), (), ())
        )
        curves[name] = _curve(recall, precision, [*thresholds, None] if reason is None else [], reason)
    return curves


# --- Checks -----------------------------------------------------------------------------------------------------


def _numbers(labels: ArrayLike, classes: tuple[str, ...]) -> NDArray[np.int64]:
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise HoloslideError("classes", f"are {classes}", "give two or more, no two alike")
    given = np.asarray(labels)
    if given.ndim != 1 or not len(given):
        raise HoloslideError("labels", f"have shape {given.shape}", "give one for each of one slide or more")
    if np.issubdtype(given.dtype, np.integer):
        index = {number: number for number in range(len(classes))}
    else:
        index = {name: number for number, name in enumerate(classes)}  # type: ignore[misc]
    numbers = [index.get(label) for label in given.tolist()]
    if None in numbers:
        row = numbers.index(None)
        remedy = f"give a class ({', '.join(classes)}) or its number, and leave slides without a label out"
        raise HoloslideError(f"labels, row {row}", f"{given.tolist()[row]!r} is no class", remedy)
    return np.array(numbers, np.int64)


def _probabilities(probabilities: ArrayLike, slides: int, classes: tuple[str, ...]) -> Values:
    given = np.asarray(probabilities, np.float64)
    if given.shape != (slides, len(classes)):
        what = f"have shape {given.shape} for {slides} slides and {len(classes)} classes"
        raise HoloslideError("probabilities", what, "give a row for each slide and a column for each class")
    finite = np.isfinite(given).all(axis=1)
    if not finite.all():
        row = int(finite.argmin())
        raise HoloslideError(f"probabilities, row {row}", "holds what is not finite", "mend the prediction")
    inside = ((given >= 0) & (given <= 1)).all(axis=1)
    if not inside.all():
        row = int(inside.argmin())
        worst = given[row][np.abs(given[row] - 0.5).argmax()]
        raise HoloslideError(f"probabilities, row {row}", f"holds {worst:g}, as logits would", _SOFTMAX)
    off = np.abs(given.sum(axis=1) - 1)
    if off.max() > SUM_TOLERANCE:
        row = int(off.argmax())
        raise HoloslideError(f"probabilities, row {row}", f"sums to {given[row].sum():g}, not to 1", _SOFTMAX)
    return given


def _patients(patients: ArrayLike, slides: int) -> NDArray[np.str_]:
    ids = np.asarray(patients, object)
    if ids.shape != (slides,):
        raise HoloslideError(
            "patients", f"have shape {ids.shape} for {slides} slides", "give one for each slide"
        )
    for row, patient in enumerate(ids.tolist()):
        if not isinstance(patient, str | int | np.integer) or patient == "":
            remedy = "give ids as text, and the slide's own where the patient is not known"
            raise HoloslideError(f"patients, row {row}", f"{patient!r} is no id", remedy)
    return ids.astype(np.str_)


# --- Values -----------------------------------------------------------------------------------------------------


def _points(given: Predictions) -> tuple[dict[str, float | None], dict[str, str]]:
    """Each measure over all slides, and why those are None that are; names are those of `statistics`."""
    labels, probabilities, classes = given.labels, given.probabilities, given.classes
    predicted = probabilities.argmax(axis=1)
    numbers = list(range(len(classes)))
    f1 = sk.f1_score(labels, predicted, labels=numbers, average=None, zero_division=np.nan)
    points: dict[str, float | None] = {}
    reasons: dict[str, str] = {}

    def note(name: str, value: float | None, reason: str | None) -> None:
        points[name] = None if value is None else float(value)
        if reason is not None:
            reasons[name] = reason

    for c, name in enumerate(classes):
        is_c, scores = labels == c, probabilities[:, c]
        why = _without_auroc(is_c, name)
        note(f"auroc {c}", None if why else sk.roc_auc_score(is_c, scores), why)
        why = _without_positive(is_c, name)
        note(f"auprc {c}", None if why else sk.average_precision_score(is_c, scores), why)
        why = f"no slide is of class {name} or predicted so" if np.isnan(f1[c]) else None
        note(f"f1 {c}", None if why else f1[c], why)
    for measure in ("auroc", "auprc", "f1"):
        why = next((reasons[f"{measure} {c}"] for c in numbers if f"{measure} {c}" in reasons), None)
        values = [value for c in numbers if (value := points[f"{measure} {c}"]) is not None]
        note(f"macro {measure}", None if why else float(np.mean(values)), why)
    why = next((reason for c in numbers if (reason := _without_positive(labels == c, classes[c]))), None)
    note("balanced accuracy", None if why else sk.balanced_accuracy_score(labels, predicted), why)
    note("accuracy", sk.accuracy_score(labels, predicted), None)
    note("log loss", sk.log_loss(labels, _normalised(probabilities), labels=numbers), None)
    return points, reasons


def _without_positive(is_c: NDArray[np.bool_], name: str) -> str | None:
    return None if is_c.any() else f"no slide is of class {name}"


def _without_auroc(is_c: NDArray[np.bool_], name: str) -> str | None:
    return f"every slide is of class {name}" if is_c.all() else _without_positive(is_c, name)


def _normalised(probabilities: Values) -> Values:
    """Rows that sum to 1 exactly, which rounding in a table undoes. For the log loss alone: it can change ranks."""
    result: Values = probabilities / probabilities.sum(axis=1, keepdims=True)
    return result


def _losses(given: Predictions) -> Values:
    """-log of the label's probability, (N,), clipped as scikit-learn does."""
    own = _normalised(given.probabilities)[np.arange(len(given.labels)), given.labels]
    eps = np.finfo(np.float64).eps
    losses: Values = -np.log(np.clip(own, eps, 1 - eps))
    return losses


def _fewest_patients(given: Predictions) -> int:
    """Of the class that has fewest, and has any."""
    return min(len(np.unique(given.patients[given.labels == c])) for c in np.unique(given.labels))


def _interval(
    value: float | None, reason: str | None, drawn_B: Values, *, patients: int, cases: int
) -> Interval:
    """Percentiles over the draws that have a value, if those are at least half.

    What is perfect is perfect in every draw, and would get no interval. There the lower end is Clopper's and
    Pearson's for so many `cases` without a miss: as many pairs of patients of different classes, all of them ranked
    right (AUROC), or patients, all of them told right.
    """
    defined_B = drawn_B[~np.isnan(drawn_B)]
    skipped = len(drawn_B) - len(defined_B)
    if value is None:
        return Interval(None, None, None, skipped, reason)
    if patients < 2:
        return Interval(value, None, None, skipped, "one patient has no spread")
    if skipped > len(drawn_B) / 2:
        why = f"not defined in {skipped} of {len(drawn_B)} draws, for want of a class"
        return Interval(value, None, None, skipped, why)
    low, high = np.quantile(defined_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if low == high == 1:
        low = ((1 - LEVEL) / 2) ** (1 / cases)
    return Interval(value, float(low), float(high), skipped)


def _assembled(given: Predictions, found: Mapping[str, Interval], resampling: Resampling) -> Metrics:
    classes = given.classes
    confusion = sk.confusion_matrix(
        given.labels, given.probabilities.argmax(axis=1), labels=list(range(len(classes)))
    )
    is_binary = len(classes) == 2
    return Metrics(
        classes=classes,
        slides=len(given.labels),
        patients=len(np.unique(given.patients)),
        positive=classes[-1] if is_binary else None,
        auroc=found["auroc 1" if is_binary else "macro auroc"],
        auprc=found["auprc 1" if is_binary else "macro auprc"],
        macro_auroc=found["macro auroc"],
        macro_auprc=found["macro auprc"],
        accuracy=found["accuracy"],
        balanced_accuracy=found["balanced accuracy"],
        macro_f1=found["macro f1"],
        log_loss=found["log loss"],
        per_class=tuple(
            ClassMetrics(
                name,
                int((given.labels == c).sum()),
                found[f"auroc {c}"],
                found[f"auprc {c}"],
                found[f"f1 {c}"],
            )
            for c, name in enumerate(classes)
        ),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        resampling=resampling,
    )


def _one_vs_rest(
    labels: ArrayLike, probabilities: ArrayLike, classes: Sequence[str]
) -> list[tuple[str, NDArray[np.bool_], Values]]:
    numbers = _numbers(labels, tuple(classes))
    checked = _probabilities(probabilities, len(numbers), tuple(classes))
    return [(name, numbers == c, checked[:, c]) for c, name in enumerate(classes)]


def _curve(
    x: Sequence[float], y: Sequence[float], thresholds: Sequence[float | None], reason: str | None
) -> Curve:
    return Curve(
        tuple(float(each) for each in x),
        tuple(float(each) for each in y),
        tuple(None if each is None else float(each) for each in thresholds),
        reason,
    )
