"""What each section of the report shows: sentences, tables and pictures, made from the run's data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holoslide.evaluation import figures, overlay
from holoslide.evaluation.figures import Contest, Picture
from holoslide.evaluation.overlay import Placement, Scale
from holoslide.evaluation.report_data import Group, RunReport, SlidePicture

THUMBNAIL_SIDE_PX = 720  # wider than a column of the page, for sharp screens and paper
FEW_SLIDES = 30  # of the rarer class: below this the page says to read the intervals

GROUPS: Mapping[Group | None, tuple[str, str]] = {
    "worst": ("Surely wrong", "The wrong answers the network was surest of: look here first."),
    "uncertain": ("Most uncertain", "The smallest distance between the two likeliest classes."),
    "best": ("Surely right", "The right answers it was surest of, the classes taking turns."),
    None: ("Slides", ""),
}

EXPLAINED: Mapping[str, str] = {
    "AUROC": "How often a random slide of the class scores above a random slide of another. 0.5 is guessing.",
    "AUPRC": "Precision averaged over all sensitivities. Guessing reaches the share of the class.",
    "Accuracy": "Share of right answers. A large class counts more.",
    "Balanced accuracy": "Share of right answers within each class, averaged over classes.",
    "F1": "Harmonic mean of precision and sensitivity, averaged over classes.",
}


def summary(report: RunReport) -> list[str]:
    """The run in a few plain sentences."""
    return [s for s in (_trained_on(report), _chosen(report), _reached(report), _caution(report)) if s]


def _trained_on(report: RunReport) -> str:
    modules = len(report.history[0].valid_losses) if report.history else len(report.module_scores)
    network = f"A network of {_count(modules, 'module')}" if modules else "A network"
    text = f"{network} was trained to tell {_listed(report.classes)} apart from one label per slide"
    if not report.cohort:
        return f"{text}."
    slides = sum(part.slides for part in report.cohort)
    parts = _listed([f"{part.slides} in {part.name}" for part in report.cohort])
    left_out = len({slide_id for slide_id, _ in report.left_out})
    rest = f" {_count(left_out, 'slide')} left out, for the reasons given below." if left_out else ""
    return f"{text}. The cohort has {_count(slides, 'slide')}: {parts}.{rest}"


def _chosen(report: RunReport) -> str:
    if not report.history or report.best_epoch is None:
        return ""
    epochs = _count(len(report.history), "epoch")
    return f"Of {epochs}, epoch {report.best_epoch} was best on the validation slides."


def _reached(report: RunReport) -> str:
    scores = report.slide_scores
    if scores is None:
        return f"No {report.part} slides were scored: how it does on slides it has not seen is not known."
    text = f"On {_count(scores.count, f'{report.part} slide')}"
    auroc = scores.measure("AUROC")
    if auroc is not None and np.isfinite(auroc.value):
        text += f", AUROC is {number(auroc.value)}"
        if auroc.low is not None and auroc.high is not None:
            text += f" (95 % interval {number(auroc.low)} to {number(auroc.high)})"
    known = [p for p in report.predictions if p.label is not None]
    if known:
        text += f", and {sum(p.is_right is True for p in known)} of {len(known)} answers are right"
    return f"{text}."


def _caution(report: RunReport) -> str:
    """A word on how much the numbers can carry."""
    labels = [p.label for p in report.predictions if p.label is not None]
    if not labels or report.slide_scores is None:
        return ""
    counts = {name: labels.count(name) for name in report.classes}
    rarest = min(counts, key=lambda name: counts[name])
    if counts[rarest] >= FEW_SLIDES:
        return ""
    verb = "is" if counts[rarest] == 1 else "are"
    return f"Only {counts[rarest]} of them {verb} {rarest}, so read the intervals rather than the values."


def flow(report: RunReport) -> list[tuple[str, int]]:
    """(what, slides) from the table to what was used."""
    if not report.cohort:
        return []
    used = sum(part.slides for part in report.cohort)
    left_out = len({slide_id for slide_id, _ in report.left_out})
    return [("slides in the table", used + left_out), ("left out", left_out), ("used", used)]


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
    history = report.history
    if not history:
        return None
    epochs = [record.epoch for record in history]
    panels = [("Training loss", [record.train_losses for record in history], False)]
    panels.append(("Validation loss", [record.valid_losses for record in history], False))
    panels.append(("Validation AUROC", [record.valid_aurocs for record in history], True))
    panels.append(("Reconstruction loss", [record.reconstruction_losses for record in history], False))
    modules = len(history[0].train_losses)
    drawn = [
        (
            name,
            figures.per_epoch(
                epochs,
                values,
                best_epoch=report.best_epoch,
                modules=modules,
                alt=f"{name} by epoch",
                is_share=share,
            ),
        )
        for name, values, share in panels
        if values[0]
    ]
    return {
        "panels": drawn,
        "colours": figures.module_colours(modules),
        "seconds": sum(record.seconds or 0.0 for record in history),
        "peak_rss_bytes": max(record.peak_rss_bytes for record in history),
        "peak_device_bytes": max(record.peak_device_bytes for record in history),
    }


def scores(report: RunReport) -> dict[str, Any] | None:
    """Slides and, where they are not the same, patients; the confusion matrix with each row's shares."""
    slides, patients = report.slide_scores, report.patient_scores
    if slides is None:
        return None
    if patients is not None and patients.count == slides.count:
        patients = None
    confusion = None
    if slides.confusion_LL is not None:
        totals = slides.confusion_LL.sum(axis=1)
        confusion = [
            [(int(count), float(count) / max(1, int(total))) for count in row]
            for row, total in zip(slides.confusion_LL, totals, strict=True)
        ]
    return {"slides": slides, "patients": patients, "confusion": confusion}


def contests(report: RunReport) -> list[Contest]:
    """What ROC and PR curves are drawn of: the second of two classes, or each of more against the rest."""
    known = [p for p in report.predictions if p.label in report.classes]
    names = report.classes[1:] if len(report.classes) == 2 else report.classes
    found = []
    for name in names:
        truth = np.array([p.label == name for p in known], dtype=np.bool_)
        score = np.array([p.probabilities[report.classes.index(name)] for p in known], dtype=np.float64)
        if truth.any() and not truth.all():
            found.append(Contest(name, truth, score))
    return found


def curves(report: RunReport) -> dict[str, Any] | None:
    found = contests(report)
    if not found:
        return None
    return {
        "names": [one.name for one in found],
        "roc": figures.roc(found, report.roc_bands),
        "pr": figures.precision_recall(found, report.pr_bands),
    }


def depth(report: RunReport) -> Picture | None:
    """AUROC and accuracy of each module's own head."""
    series = []
    for name in ("AUROC", "Balanced accuracy"):
        measures = [scores.measure(name) for scores in report.module_scores]
        points = [
            (m.value, m.value if m.low is None else m.low, m.value if m.high is None else m.high)
            for m in measures
            if m is not None
        ]
        if points and len(points) == len(measures):
            series.append((name, points))
    return figures.by_module(series) if series else None


def pictures(report: RunReport) -> dict[Group | None, list[dict[str, Any]]]:
    """The pictures of each group with their heatmaps, all attention on one scale."""
    relative = {
        i: overlay.relative_attention(one.attention_HW)
        for i, one in enumerate(report.pictures)
        if one.attention_HW is not None
    }
    scale = overlay.attention_scale(list(relative.values()))
    groups: dict[Group | None, list[dict[str, Any]]] = {group: [] for group in GROUPS}
    for i, one in enumerate(report.pictures):
        maps = []
        if i in relative:
            maps.append(_map(one, "Attention", relative[i], scale))
        if one.evidence_HW is not None:
            target = one.evidence_class or one.prediction
            evidence_scale = overlay.evidence_scale(one.evidence_HW, target)
            maps.append(_map(one, f"Evidence for {target}", one.evidence_HW, evidence_scale))
        photo = figures.photo(figures.fitted(one.thumbnail_HW3, THUMBNAIL_SIDE_PX), f"slide {one.slide_id}")
        groups[one.group].append({"slide": one, "photo": photo, "maps": maps, "bar": _scale_bar(one)})
    return {group: shown for group, shown in groups.items() if shown}


def _map(slide: SlidePicture, name: str, values_HW: NDArray[np.floating], scale: Scale) -> dict[str, Any]:
    if slide.box_px is None:
        message = f"slide {slide.slide_id} has a heatmap but no box to draw it in"
        raise ValueError(message)
    small = figures.fitted(slide.thumbnail_HW3, THUMBNAIL_SIDE_PX)
    height, width = slide.thumbnail_HW3.shape[:2]
    box = overlay.box_on_picture(slide.box_px, (0, 0, height, width), small.shape[:2])
    drawn = overlay.overlay(small, values_HW, Placement.in_box(box, values_HW.shape), scale)
    return {
        "name": name,
        "picture": figures.photo(drawn, f"{name} over slide {slide.slide_id}"),
        "strip": figures.exact(scale.strip(), f"colours from {scale.ticks[0][1]} to {scale.ticks[-1][1]}"),
        "unit": scale.unit,
        "ticks": scale.tick_places(),
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
    """A measure; never 1.000 for what is less than 1.

    >>> number(0.93), number(0.99996), number(float("nan"))
    ('0.930', '> 0.999', '–')
    """
    if value is None or not np.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    return f"> {1 - 10**-digits:.{digits}f}" if value < 1 and text == f"{1:.{digits}f}" else text


def share(value: float) -> str:
    return f"{100 * value:.0f} %"


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
