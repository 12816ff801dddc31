"""What each section of the report shows: sentences, tables and pictures, made from the run's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holoslide.evaluation import figures, overlay, scales
from holoslide.evaluation.curves import DRAWS, Contest, bands
from holoslide.evaluation.intervals import LEVEL
from holoslide.evaluation.metrics import Interval, Metrics, Resampling
from holoslide.evaluation.overlay import Placement
from holoslide.evaluation.report_data import Group, RunReport, SlidePicture
from holoslide.evaluation.scales import Scale

THUMBNAIL_SIDE_PX = 720  # wider than a column of the page, for sharp screens and paper
FEW_SLIDES = 30  # of the rarer class: below this the page says to read the intervals

GROUPS: Mapping[Group | None, tuple[str, str]] = {
    "worst": ("Wrong, the surest first", "Wrong by the likelier class: look here first."),
    "uncertain": (
        "Least sure",
        "Of the other slides, those of smallest distance between the two likeliest classes, whether that is small "
        "or not.",
    ),
    "best": ("Right, the surest first", "Right by the likelier class, the classes taking turns."),
    None: ("Slides", ""),
}


@dataclass(frozen=True, slots=True)
class Line:
    """A measure in the table of results; `chance` is what guessing reaches, `is_share` that it lies in 0 to 1."""

    name: str
    words: str
    slides: Interval
    patients: Interval | None
    chance: float | None
    is_share: bool = True


def summary(report: RunReport) -> list[str]:
    """The run in a few plain sentences."""
    sentences = (_trained_on(report), _chosen(report), _found(report), _reached(report), _caution(report))
    return [s for s in sentences if s]


def _trained_on(report: RunReport) -> str:
    modules = len(report.history[0].valid_losses) if report.history else len(report.module_metrics)
    of = f" of {_count(modules, 'module')}" if modules else ""
    subject = f"A network{of} was trained"
    if report.runs:
        one = "fold" if report.repeats == "folds" else "seed"
        subject = f"{_count(len(report.runs), 'network')}{of} were trained, one a {one},"
    text = f"{subject} to tell {_listed(report.classes)} apart from one label per slide"
    if report.table:
        return f"{text}. Here it is measured on another cohort, {report.table}."
    if not report.cohort:
        return f"{text}."
    slides = sum(part.slides for part in report.cohort)
    if len(report.cohort) == 1:
        parts = f" of {_count(report.cohort[0].patients, 'patient')}"
    else:
        parts = ": " + _listed([f"{part.slides} in {part.name}" for part in report.cohort])
    left_out = slides_left_out(report)
    rest = f" {_count(left_out, 'slide')} left out, for the reasons given below." if left_out else ""
    return f"{text}. The cohort has {_count(slides, 'slide')}{parts}.{rest}"


def _chosen(report: RunReport) -> str:
    if not report.history or report.best_epoch is None:
        return ""
    epochs = _count(len(report.history), "epoch")
    return f"Of {epochs}, epoch {report.best_epoch} was best on the validation slides."


def _found(report: RunReport) -> str:
    """Which class is the positive one, and how it came to be."""
    if report.positive is None:
        return ""
    other = "" if report.positive.is_chosen else "; evaluate.positive chooses the other"
    return f"The positive class is {report.positive.name} ({report.positive.how}{other})."


def positive_class(report: RunReport) -> str | None:
    """The positive one of two classes."""
    if report.metrics is not None:
        return report.metrics.positive
    return report.classes[-1] if len(report.classes) == 2 else None


def likelier(report: RunReport) -> str:
    """How a slide's prediction comes from its probabilities, beside a threshold's call."""
    return "by the likelier class" if len(report.classes) == 2 else "by the likeliest class"


def _reached(report: RunReport) -> str:
    metrics = report.metrics
    if metrics is None:
        return "Nothing was scored: how it does on slides it has not seen is not known."
    kind = "slide" if report.part == "all" else f"{report.part} slide"
    text = f"On {_count(metrics.slides, kind)} of {_count(metrics.patients, 'patient')}, "
    if metrics.auroc.value is not None:
        text += f"{_auroc_name(metrics)} is {number(metrics.auroc.value)}"
        if metrics.auroc.low is not None and metrics.auroc.high is not None:
            text += f" (95\u00a0% interval {number(metrics.auroc.low)} to {number(metrics.auroc.high)})"
        text += ", and "
    right = sum(row[i] for i, row in enumerate(metrics.confusion))
    answers = f"{right} of {_count(metrics.slides, 'answer')} {'is' if right == 1 else 'are'} right"
    return f"{text}{answers} {likelier(report)}."


def _caution(report: RunReport) -> str:
    """A word on how much the numbers can carry."""
    if report.metrics is None:
        return ""
    rarest = min(report.metrics.per_class, key=lambda one: one.slides)
    if rarest.slides >= FEW_SLIDES:
        return ""
    counts = {one.slides for one in report.metrics.per_class}
    advice = "so read the intervals rather than the values"
    if len(counts) == 1:
        return f"There are only {_count(rarest.slides, 'such slide')} of each class, {advice}."
    if rarest.slides == 0:
        return f"No such slide is {rarest.name}: what needs slides of every class is not measured."
    verb = "is" if rarest.slides == 1 else "are"
    return f"Only {_count(rarest.slides, 'such slide')} {verb} {rarest.name}, {advice}."


def _auroc_name(metrics: Metrics) -> str:
    return "AUROC" if metrics.positive is not None else "mean AUROC"


def slides_left_out(report: RunReport) -> int:
    """How many; a slide may have more than one reason, and a reason may concern the table as a whole."""
    return len({slide_id for slide_id, _ in report.left_out if slide_id})


def flow(report: RunReport) -> str:
    """What was found, used and not used, in a sentence."""
    if report.flow is not None:
        found = report.flow
        done = "scored" if report.table else "used"
        gone = _listed([f"{reason} ({number})" for reason, number in found.reasons.items()])
        rest = f" Not {done}: {gone}." if gone else f" Every slide was {done}."
        taken = f"{_count(found.used, 'slide')} of {_count(found.patients, 'patient')} {done}"
        parts = f" in {len(report.cohort)} parts" if len(report.cohort) > 1 else ""
        return f"{_count(found.found, 'slide')} found, {taken}{parts}.{rest}"
    used = sum(part.slides for part in report.cohort)
    left_out = slides_left_out(report)
    rest = f"{_count(left_out, 'slide')} left out" if left_out else "no slide left out"
    return f"{_count(used, 'slide')} in {_count(len(report.cohort), 'part')}, {rest}."


def scored_slides(report: RunReport) -> str:
    """What the results are of."""
    of = f" of {report.table}" if report.table else ""
    return ("all slides" if report.part == "all" else f"the {report.part} slides") + of


def flattery(report: RunReport) -> str:
    """A warning where results are of slides that training has seen."""
    if report.table:
        seen = report.learnt_from
        files = f"{_count(seen, 'slide')} of these {'is a file' if seen == 1 else 'are files'} of the network's own"
        return f"{files} training or validation part, which flatters the results." if seen else ""
    if report.part == "train":
        return "The network was trained on these slides: results on slides it has not seen will be worse."
    if report.part == "valid":
        return "The epoch was chosen on these slides, which flatters the results."
    if report.part == "all" and any(part.name == "train" for part in report.cohort):
        return (
            "Among these are the slides of training, which flatters the results: score the test part alone."
        )
    return ""


def classes(report: RunReport) -> list[str]:
    """The classes, and labels of the cohort that are none of them."""
    others = {label for part in report.cohort for label in part.by_class}
    return [*report.classes, *sorted(others - set(report.classes))]


def totals(report: RunReport) -> dict[str, int]:
    """Slides of each class in all parts."""
    return {
        name: sum(part.by_class.get(name, (0, 0))[0] for part in report.cohort) for name in classes(report)
    }


def learning(report: RunReport) -> dict[str, Any] | None:
    """The curves of all modules, and what the epochs took; of several runs, all of them."""
    histories = [run.history for run in report.runs if run.history] or [report.history]
    records = [record for history in histories for record in history]
    if not records:
        return None
    modules = len(records[0].train_losses)
    given = [panel for panel in _PANELS if getattr(records[0], panel[1])]
    is_even = len(given) % 2 == 0
    draw = partial(
        figures.per_epoch,
        best_epoch=report.best_epoch,
        modules=modules,
        size=(5.0, 2.5) if is_even else (3.7, 2.5),
    )
    panels = []
    for name, key, is_share in given:
        runs = [([r.epoch for r in history], [getattr(r, key) for r in history]) for history in histories]
        panels.append((name, draw(runs, alt=f"{name} by epoch", is_share=is_share)))
    return {
        "panels": panels,
        "in_pairs": is_even,
        "runs": len(histories),
        "epochs": len(records),
        "colours": figures.module_colours(modules),
        "seconds": sum(record.seconds or 0.0 for record in records),
        "peak_rss_bytes": max(record.peak_rss_bytes for record in records),
        "peak_device_bytes": max(record.peak_device_bytes for record in records),
    }


_PANELS = (  # name, field of an epoch's record, whether it lies in 0 to 1
    ("Training loss", "train_losses", False),
    ("Validation loss", "valid_losses", False),
    ("Validation AUROC", "valid_aurocs", True),
    ("Reconstruction loss", "reconstruction_losses", False),
)


def scores(report: RunReport) -> dict[str, Any] | None:
    """Slides and, where they are not the same, patients; the confusion matrix with each row's shares."""
    metrics, patients = report.metrics, report.patient_metrics
    if metrics is None:
        return None
    if patients is not None and patients.slides == metrics.slides:
        patients = None
    confusion = [[(count, count / max(1, sum(row))) for count in row] for row in metrics.confusion]
    return {
        "lines": _lines(metrics, patients),
        "by_patient": patients is not None,
        "metrics": metrics,
        "confusion": confusion,
        "per_class": metrics.per_class if metrics.positive is None else (),
    }


def _lines(metrics: Metrics, patients: Metrics | None) -> list[Line]:
    shares = [one.slides / metrics.slides for one in metrics.per_class]
    if metrics.positive is not None:
        of = f"random {metrics.positive} slide scores above a random other one"
        guessed = shares[metrics.classes.index(metrics.positive)]
        precision = f"Precision for {metrics.positive}, averaged over all sensitivities."
    else:
        of, guessed = "random slide of a class scores above a random other one", sum(shares) / len(shares)
        precision = "Precision averaged over all sensitivities, and over classes."
    commonest = "Right answers by the likeliest class, of all. Guessing: always the commonest class."
    measures: list[tuple[str, str, str, float | None]] = [
        ("AUROC", "auroc", f"How often a {of}.", 0.5),
        ("AUPRC", "auprc", precision, guessed),
        ("Accuracy", "accuracy", commonest, max(shares)),
        ("Balanced accuracy", "balanced_accuracy", "Right answers within a class, averaged over classes.",
         1 / len(shares)),
        ("F1", "macro_f1", "Harmonic mean of precision and sensitivity, averaged over classes.", None),
        ("Log loss", "log_loss", "How far probabilities are from the labels: lower is better.", None),
    ]  # fmt: skip
    return [
        Line(
            name,
            words,
            getattr(metrics, key),
            None if patients is None else getattr(patients, key),
            chance,
            is_share=key != "log_loss",
        )
        for name, key, words, chance in measures
    ]


def contests(report: RunReport) -> list[Contest]:
    """What ROC and PR curves are drawn of: the positive one of two classes, or each of more against the rest."""
    known = [p for p in report.predictions if p.label in report.classes]
    positive = positive_class(report)
    names = report.classes if positive is None else (positive,)
    patients = np.array([p.patient_id for p in known], dtype=np.str_)
    found = []
    for name in names:
        truth = np.array([p.label == name for p in known], dtype=np.bool_)
        score = np.array([p.probabilities[report.classes.index(name)] for p in known], dtype=np.float64)
        if truth.any() and not truth.all():
            found.append(Contest(name, truth, score, patients))
    return found


def curves(report: RunReport) -> dict[str, Any] | None:
    """ROC and precision-recall curves, with bands where every contest has one."""
    found = contests(report)
    if not found:
        return None
    how = report.metrics.resampling if report.metrics else Resampling(DRAWS, 0, LEVEL, 0)
    rng = np.random.default_rng(how.seed)
    given = [bands(one, rng, draws=how.draws, level=how.level) for one in found]
    spread = [pair for pair in given if pair is not None]
    has_bands = len(spread) == len(found)
    flat = [
        one.name
        for one, pair in zip(found, given, strict=True)
        if pair is not None and all((band.high - band.low).max() < _LEAST_BAND for band in pair)
    ]
    return {
        "names": [one.name for one in found],
        "roc": figures.roc(found, [roc for roc, _ in spread] if has_bands else (), point=_decision(report)),
        "pr": figures.precision_recall(found, [pr for _, pr in spread] if has_bands else ()),
        "has_bands": has_bands and len(flat) < len(found),
        "flat": _listed(flat),
    }


_LEAST_BAND = 1e-9  # of a band that can be seen


def _decision(report: RunReport) -> tuple[float, float] | None:
    """The decision's false and true positive rate; None without one."""
    if report.decision is None:
        return None
    (spared, alarms), (missed, hits) = report.decision.calls
    return alarms / max(1, spared + alarms), hits / max(1, missed + hits)


def depth(report: RunReport) -> dict[str, Any] | None:
    """AUROC and balanced accuracy of each module's own head, beside guessing."""
    if not report.module_metrics:
        return None
    series = [
        ("AUROC", [_point(one.auroc) for one in report.module_metrics], 0.5),
        (
            "Balanced accuracy",
            [_point(one.balanced_accuracy) for one in report.module_metrics],
            1 / len(report.classes),
        ),
    ]
    wrong_way = [
        str(k)
        for k, one in enumerate(report.module_metrics, start=1)
        if one.auroc.high is not None and one.auroc.high < 0.5
    ]
    return {
        "figure": figures.by_module(series),
        "wrong_way": _listed(wrong_way),
        "several": len(wrong_way) > 1,
    }


def _point(interval: Interval) -> tuple[float, float, float]:
    """(value, low, high), NaN where there is none."""
    value = np.nan if interval.value is None else interval.value
    low = value if interval.low is None else interval.low
    return value, low, value if interval.high is None else interval.high


def pictures(report: RunReport) -> dict[Group | None, list[dict[str, Any]]]:
    """The pictures of each group with their heatmaps, all attention on one scale."""
    relative = {
        i: scales.relative_attention(one.attention_HW)
        for i, one in enumerate(report.pictures)
        if one.attention_HW is not None
    }
    scale = scales.attention_scale(list(relative.values()))
    groups: dict[Group | None, list[dict[str, Any]]] = {group: [] for group in GROUPS}
    for i, one in enumerate(report.pictures):
        maps = []
        if i in relative:
            sums = scales.attention_sums(relative[i])
            maps.append(_map(one, "Attention", relative[i], scale, sums))
        if one.evidence_HW is not None:
            target = one.evidence_class or one.prediction
            own, sums = scales.evidence_scale(one.evidence_HW, target), scales.evidence_sums(one.evidence_HW)
            sums = f"{sums} {_score(report, one, target)}".rstrip()
            maps.append(_map(one, f"Evidence for {target}", one.evidence_HW, own, sums))
        photo = figures.photo(figures.fitted(one.thumbnail_HW3, THUMBNAIL_SIDE_PX), f"slide {one.slide_id}")
        groups[one.group].append({"slide": one, "photo": photo, "maps": maps, "bar": _scale_bar(one)})
    is_none_wrong = any(group is not None and shown for group, shown in groups.items()) and not any(
        one.is_right is False for one in report.predictions
    )
    return {group: shown for group, shown in groups.items() if shown or (group == "worst" and is_none_wrong)}


def _score(report: RunReport, slide: SlidePicture, target: str) -> str:
    """What the evidence comes to with the constant, which is what the probability is made of."""
    if slide.constant is None or slide.evidence_HW is None:
        return ""
    score = scales.signed(float(np.nansum(slide.evidence_HW, dtype=np.float64)) + slide.constant)
    if len(report.classes) == 2:
        what = f"the log-odds of {target}"
    else:
        what = f"the logit of {target} above the mean of the others'"
    return f"With the constant {scales.signed(slide.constant)}: {score}, {what}."


def _map(
    slide: SlidePicture, name: str, values_HW: NDArray[np.floating], scale: Scale, sums: str
) -> dict[str, Any]:
    if slide.box_px is None:
        message = f"slide {slide.slide_id} has a heatmap but no box to draw it in"
        raise ValueError(message)
    small = figures.fitted(slide.thumbnail_HW3, THUMBNAIL_SIDE_PX)
    height, width = slide.thumbnail_HW3.shape[:2]
    box = overlay.box_on_picture(slide.box_px, (0, 0, height, width), small.shape[:2])
    drawn = overlay.overlay(small, values_HW, Placement.in_box(box, values_HW.shape), scale)
    ticks = scale.tick_places()
    return {
        "name": name,
        "picture": figures.photo(drawn, f"{name} over slide {slide.slide_id}"),
        "strip": figures.exact(overlay.legend_strip(scale), f"colours from {ticks[0][1]} to {ticks[-1][1]}"),
        "unit": scale.unit,
        "ticks": ticks,
        "sums": sums,
    }


def _scale_bar(slide: SlidePicture) -> tuple[float, str] | None:
    """(percent of the picture's width, label) of a round length of about a fifth of it."""
    if slide.um_per_px is None:
        return None
    width_um = slide.thumbnail_HW3.shape[1] * slide.um_per_px
    power = 10.0 ** np.floor(np.log10(width_um / 4))
    length_um = max(step * power for step in (1, 2, 5) if step * power <= width_um / 4)
    label = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    return 100 * float(length_um) / width_um, label


def number(value: float | None, digits: int = 3) -> str:
    """A measure; never 1.000 for what is less than 1, nor 0.000 for what is more than 0.

    >>> number(0.93), number(0.99996), number(0.00004), number(0.0), number(float("nan"))
    ('0.930', '> 0.999', '< 0.001', '0.000', '–')
    """
    if value is None or not np.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    if value > 0 and text == f"{0:.{digits}f}":
        return f"< {10**-digits:.{digits}f}"
    return f"> {1 - 10**-digits:.{digits}f}" if value < 1 and text == f"{1:.{digits}f}" else text


def share(value: float) -> str:
    return f"{100 * value:.0f}\u00a0%"  # a line never breaks before the sign


def duration(seconds: float) -> str:
    """
    >>> duration(3.2), duration(75), duration(7500), duration(200000)
    ('3.2 s', '1 min 15 s', '2 h 5 min', '2 d 8 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    for unit, length, small, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= length:
            whole, rest = divmod(round(seconds / part), length // part)
            return f"{whole} {unit} {rest} {small}"
    raise AssertionError


def bytes_(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _listed(names: Sequence[str]) -> str:
    """
    >>> _listed(["a"]), _listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
