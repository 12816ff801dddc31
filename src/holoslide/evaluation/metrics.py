"""How good predictions are, with intervals over patients: what is not defined is None and says why, never NaN.

N slides, C classes, P patients. Values are scikit-learn's. An interval reaches as far as either of two:
percentiles of a bootstrap over patients (`bootstrap.py`), since slides of one patient are no independent draws; and
a score interval with patients counted (`intervals.py`), since where nearly all is right, few draws differ and the
bootstrap's is too narrow. Everything takes probabilities, not logits. scikit-learn is imported where it measures:
that takes longer than to score a small slide, which knows `Predictions` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from holoslide.errors import HoloslideError
from holoslide.evaluation.bootstrap import Values, draw_weights, statistics
from holoslide.evaluation.intervals import LEVEL, auroc_interval, wilson
from holoslide.evaluation.options import Positive

SUM_TOLERANCE = 1e-3  # of a row's probabilities: tables hold a few decimals
_SOFTMAX = "give softmax of the logits"


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its interval. None where it is not defined, with the `reason`.

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

    Of two classes one is the `positive` one, and `auroc` and `auprc` are its; of more there is no positive, and
    they are macro means. Macro means are over all classes, and undefined where a class's is. The predicted
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
    """Checked predictions: labels as numbers of classes (N,), probabilities (N, C), patients (N,).

    `positive` is one of two classes; None of more.
    """

    labels: NDArray[np.int64]
    probabilities: Values
    patients: NDArray[np.str_]
    classes: tuple[str, ...]
    positive: str | None

    @classmethod
    def checked(
        cls,
        labels: ArrayLike,
        probabilities: ArrayLike,
        patients: ArrayLike,
        classes: Sequence[str],
        *,
        positive: str | None = None,
    ) -> Predictions:
        """Labels may be numbers of classes or their names; HoloslideError, with the row, for what cannot be.

        `positive` is one of two classes (default: the last).
        """
        classes = tuple(classes)
        numbers = _numbers(labels, classes)
        checked = _probabilities(probabilities, len(numbers), classes)
        found = Positive.of(classes, positive)
        patients = _patients(patients, len(numbers))
        return cls(numbers, checked, patients, classes, found.name if found else None)

    @property
    def of_positive(self) -> tuple[NDArray[np.bool_], Values]:
        """Of two classes: which slides are of the positive one, and its probability; (N,) each."""
        if self.positive is None:
            raise HoloslideError("a threshold", f"of {len(self.classes)} classes", "give predictions of two")
        number = self.classes.index(self.positive)
        return self.labels == number, self.probabilities[:, number]

    @property
    def other(self) -> str:
        """The one of two classes that is not the positive one."""
        return next(name for name in self.classes if name != self.positive)

    def with_probabilities(self, probabilities_NC: Values) -> Predictions:
        """The same slides, predicted otherwise."""
        return replace(self, probabilities=probabilities_NC)

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
        means_PC = sums_PC / np.bincount(patient_N)[:, None]
        return Predictions(labels_P, means_PC, names, self.classes, self.positive)


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
    positive: str | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Metrics:
    """Every measure with its 95 % interval over patients; raises what `Predictions.checked` does.

    Labels (N,) are names or numbers of `classes`; probabilities (N, C) have a row sum of 1.
    """
    return measure(
        Predictions.checked(labels, probabilities, patients, classes, positive=positive),
        draws=draws,
        seed=seed,
    )


def measure(given: Predictions, *, draws: int = 1000, seed: int = 0) -> Metrics:
    """The same of checked predictions."""
    if draws < 1:
        raise HoloslideError("draws", f"are {draws}", "give 1 or more, such as 1000")
    points, reasons = _points(given)
    losses_N = _losses(given)
    chunks, lacking = [], 0
    for weights_BN in draw_weights(given.patients, draws, np.random.default_rng(seed)):
        chunks.append(statistics(weights_BN, given.labels, given.probabilities, losses_N))
        counts_BC = weights_BN @ np.eye(len(given.classes), dtype=np.int64)[given.labels]
        lacking += int((counts_BC == 0).any(axis=1).sum())
    patients = _Patients.counted(given)
    found = {
        name: _interval(
            name, point, reasons.get(name), np.concatenate([each[name] for each in chunks]), patients
        )
        for name, point in points.items()
    }
    return _assembled(given, found, Resampling(draws, seed, LEVEL, lacking))


def roc_points(labels: ArrayLike, probabilities: ArrayLike, classes: Sequence[str]) -> dict[str, Curve]:
    """The ROC curve of each class against the rest."""
    from sklearn import metrics as sk

    curves = {}
    for name, is_c, scores in _one_vs_rest(labels, probabilities, classes):
        reason = _without_auroc(is_c, name)
        x, y, thresholds = sk.roc_curve(is_c, scores) if reason is None else ((), (), ())
        curves[name] = _curve(x, y, [None, *thresholds[1:]] if reason is None else [], reason)
    return curves


def pr_points(labels: ArrayLike, probabilities: ArrayLike, classes: Sequence[str]) -> dict[str, Curve]:
    """The precision-recall curve of each class against the rest, from all slides called positive to none."""
    from sklearn import metrics as sk

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
    from sklearn import metrics as sk

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


@dataclass(frozen=True, slots=True)
class _Patients:
    """How many patients there are, and for each class those with slides of it, and with others; (C,) each."""

    number: int
    with_C: tuple[int, ...]
    without_C: tuple[int, ...]

    @classmethod
    def counted(cls, given: Predictions) -> _Patients:
        def patients(which_N: NDArray[np.bool_]) -> int:
            return len(np.unique(given.patients[which_N]))

        classes = range(len(given.classes))
        with_C = tuple(patients(given.labels == c) for c in classes)
        return cls(
            len(np.unique(given.patients)), with_C, tuple(patients(given.labels != c) for c in classes)
        )

    def interval(self, name: str, value: float) -> tuple[float, float] | None:
        """The score interval of a measure; None for the log loss, which is no share.

        That of average precision counts the patients of the class (Boyd et al. 2013), that of balanced accuracy as
        many as a share of the same variance has, that of F1 the patients of the class. Of a macro mean the class
        with fewest counts.
        """
        _, _, number = name.rpartition(" ")
        there = [c for c, count in enumerate(self.with_C) if count]
        c = int(number) if number.isdecimal() else min(there, key=lambda c: self.with_C[c])
        if name == "log loss":
            return None
        if name == "accuracy":
            return wilson(value, self.number)
        if name == "balanced accuracy":
            return wilson(value, len(there) ** 2 / sum(1 / self.with_C[c] for c in there))
        if "auroc" in name:
            return auroc_interval(value, self.with_C[c], self.without_C[c])
        return wilson(
            value, max(1, self.with_C[c])
        )  # 1: F1 is 0 of a class that was predicted without a slide


def _interval(
    name: str, value: float | None, reason: str | None, drawn_B: Values, patients: _Patients
) -> Interval:
    """Percentiles over the draws that have a value, if those are at least half, or beyond them a score interval."""
    defined_B = drawn_B[~np.isnan(drawn_B)]
    skipped = len(drawn_B) - len(defined_B)
    if value is None:
        return Interval(None, None, None, skipped, reason)
    if patients.number < 2:
        return Interval(value, None, None, skipped, "one patient has no spread")
    if skipped > len(drawn_B) / 2:
        why = f"not defined in {skipped} of {len(drawn_B)} draws, for want of a class"
        return Interval(value, None, None, skipped, why)
    low, high = (float(end) for end in np.quantile(defined_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    if (beyond := patients.interval(name, value)) is not None:
        low, high = min(low, beyond[0]), max(high, beyond[1])
    return Interval(value, low, high, skipped)


def _assembled(given: Predictions, found: Mapping[str, Interval], resampling: Resampling) -> Metrics:
    from sklearn import metrics as sk

    classes = given.classes
    confusion = sk.confusion_matrix(
        given.labels, given.probabilities.argmax(axis=1), labels=list(range(len(classes)))
    )
    own = "macro" if given.positive is None else classes.index(given.positive)
    name_of = {key: f"macro {key}" if own == "macro" else f"{key} {own}" for key in ("auroc", "auprc")}
    return Metrics(
        classes=classes,
        slides=len(given.labels),
        patients=len(np.unique(given.patients)),
        positive=given.positive,
        auroc=found[name_of["auroc"]],
        auprc=found[name_of["auprc"]],
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
