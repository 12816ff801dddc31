"""The report's figures, as pictures that are part of the page: SVG and JPEG in data URIs, nothing to fetch."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from holoslide.evaluation.calibration import Bin
from holoslide.evaluation.curves import Band, Contest

# Okabe and Ito's colours, which the colour-blind tell apart too; the first two carry most contrast.
CLASS_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8A6D00", "#56B4E9", "#444444")
INK, MUTED, RULE, ACCENT = "#1d2733", "#5c6875", "#dde2e7", "#0b5570"
_DEPTH = LinearSegmentedColormap.from_list("depth", ["#9cc3cf", "#0b5570"])
_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#aab3bc",
    "axes.grid": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.0,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",  # what text is measured with; the page is set in the reader's own font
    "font.size": 9.0,
    "grid.color": "#e8ebee",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "holoslide",
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $x$
    "xtick.color": MUTED,
    "xtick.labelsize": 8.5,
    "xtick.major.size": 0.0,
    "ytick.color": MUTED,
    "ytick.labelsize": 8.5,
    "ytick.major.size": 0.0,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture for `<img>`: a data URI, its size, and what it shows in words."""

    uri: str
    width: int
    height: int
    alt: str


def module_colours(modules: int) -> list[str]:
    """Pale for the first module, deep for the last, whose answer is the prediction."""
    return [to_hex(_DEPTH((k + 1) / modules)) for k in range(modules)]


def per_epoch(
    runs: Sequence[tuple[Sequence[int], Sequence[Sequence[float]]]],
    *,
    best_epoch: int | None,
    modules: int,
    alt: str,
    size: tuple[float, float] = (3.7, 2.5),
    is_share: bool = False,
) -> Picture:
    """One line per module over the epochs, and a mark where the model was chosen.

    Of several runs (epochs, values as EK) each has a thin line, and their mean a thick one, as far as all go. The
    values may be of the first modules only; NaN is a gap.
    """
    every = [(np.asarray(epochs), np.array(values, dtype=np.float64)) for epochs, values in runs]
    shortest = min(len(epochs) for epochs, _ in every)
    mean = np.mean([values[:shortest] for _, values in every], axis=0)
    colours = module_colours(modules)[: mean.shape[1]]

    def draw(axes: Axes) -> None:
        for k, colour in enumerate(colours):
            is_last = k == modules - 1
            if len(every) > 1:
                for epochs, values in every:
                    axes.plot(epochs, values[:, k], color=colour, linewidth=0.8, alpha=0.5, zorder=1)
            axes.plot(
                every[0][0][:shortest],
                mean[:, k],
                color=colour,
                linewidth=2.2 if is_last else 1.3,
                marker="o" if shortest <= 15 else None,
                markersize=3,
                zorder=3 if is_last else 2,
            )
        if best_epoch is not None:
            axes.axvline(best_epoch, color=INK, linewidth=0.9, linestyle=(0, (3, 3)), zorder=1)
        _over_epochs(axes, np.concatenate([values for _, values in every]), is_share=is_share)

    return _svg(draw, alt, size=size)


def _over_epochs(axes: Axes, values: NDArray[np.float64], *, is_share: bool) -> None:
    if is_share:
        axes.set_ylim(min(0.4, _least(values) - 0.04), 1.02)
    elif (values[np.isfinite(values)] > 0).all():
        axes.set_ylim(bottom=0)
    axes.margins(x=0.03)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set_xlabel("epoch")


def roc(
    contests: Sequence[Contest], bands: Sequence[Band] = (), *, point: tuple[float, float] | None = None
) -> Picture:
    """ROC curves, each with its band if there are bands; every contest has slides of both kinds.

    `point` is a decision's false and true positive rate.
    """

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color="#aab3bc", linewidth=1, linestyle=(0, (3, 3)))
        _bands(axes, bands)
        for colour, one in zip(_class_colours(len(contests)), contests, strict=True):
            axes.plot(*one.roc(), color=colour, linewidth=2, label=_drawable(one.name))
        if point is not None:
            axes.plot(*point, "o", color="#1d2733", markersize=7, gid="decision", clip_on=False, zorder=3)
        _square(axes, x="1 − specificity", y="sensitivity")
        if len(contests) > 1:
            axes.legend(loc="lower right")

    names = ", ".join(one.name for one in contests)
    marked = (
        "" if point is None else f"; decision at sensitivity {point[1]:.3f}, specificity {1 - point[0]:.3f}"
    )
    return _svg(draw, f"ROC curve: {names}{marked}", size=(3.7, 3.5))


def precision_recall(contests: Sequence[Contest], bands: Sequence[Band] = ()) -> Picture:
    """Precision over recall, each with its band if there are bands; dashed: the class's share of the slides."""

    def draw(axes: Axes) -> None:
        _bands(axes, bands)
        for colour, one in zip(_class_colours(len(contests)), contests, strict=True):
            axes.axhline(
                float(one.truth_N.mean()), color=colour, linewidth=0.9, linestyle=(0, (3, 3)), alpha=0.6
            )
            axes.step(
                *one.precision_recall(), where="pre", color=colour, linewidth=2, label=_drawable(one.name)
            )
        _square(axes, x="recall (sensitivity)", y="precision")
        if len(contests) > 1:
            axes.legend(loc="lower left")

    return _svg(draw, f"Precision-recall curve: {', '.join(one.name for one in contests)}", size=(3.7, 3.5))


def by_module(series: Sequence[tuple[str, Sequence[tuple[float, float, float]], float]]) -> Picture:
    """For each named measure its (value, low, high) at every module, first to last; dashed: guessing."""

    def draw(axes: Axes) -> None:
        for i, (name, points, chance) in enumerate(series):
            value, low, high = np.array(points, dtype=np.float64).reshape(-1, 3).T
            x = np.arange(1, len(value) + 1) + (i - (len(series) - 1) / 2) * 0.16
            errors = np.maximum(0.0, [value - low, high - value])
            axes.axhline(chance, color=CLASS_COLOURS[i], linewidth=0.9, linestyle=(i * 3, (3, 3)), alpha=0.6)
            axes.errorbar(
                x,
                value,
                yerr=np.nan_to_num(errors),
                color=CLASS_COLOURS[i],
                marker="os^D"[i % 4],
                markersize=5.5,
                linewidth=1.2,
                elinewidth=1.2,
                capsize=0,
                linestyle=":",
                label=name,
            )
        modules = len(series[0][1])
        axes.set_xticks(range(1, modules + 1))
        axes.set_xlim(0.5, modules + 0.5)
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(-0.02, min(bottom, 0.4)), max(top, 1.02))
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("module (depth)")
        _legend_above(axes, len(series))

    return _svg(draw, f"{' and '.join(name for name, _, _ in series)} by module", size=(5.0, 2.5))


def reliability(series: Sequence[tuple[str, Sequence[Bin]]], *, x: str, y: str) -> Picture:
    """What came true over what was stated, bin by bin, each with its interval and the number of its slides.

    On the diagonal is the truth. The bins are not joined: what lies between them was not measured.
    """

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color="#aab3bc", linewidth=1, linestyle=(0, (3, 3)))
        for i, (name, bins) in enumerate(series):
            colour = (ACCENT, CLASS_COLOURS[1])[i]  # as stated, and after the temperature
            stated, observed, low, high = np.array([(b.stated, b.observed, b.low, b.high) for b in bins]).T
            errors = np.maximum(0.0, [observed - low, high - observed])
            axes.errorbar(
                stated, observed, yerr=errors, color=colour, marker="os"[i], markersize=5, linestyle="none",
                elinewidth=1, alpha=0.95, label=name,
            )  # fmt: skip
            for one in bins:
                axes.annotate(
                    str(one.slides), (one.stated, one.observed), fontsize=7.5, color=colour,
                    xytext=(-5 if i else 5, 5 if i or one.observed < 0.15 else -10),
                    textcoords="offset points", ha="right" if i else "left",
                )  # fmt: skip
        _square(axes, x=x, y=y)
        _legend_above(axes, len(series))

    return _svg(draw, f"Reliability: {y} over {x}", size=(3.7, 3.7))


def _legend_above(axes: Axes, entries: int) -> None:
    """Above the axes, where no data can lie; none for a single entry."""
    if entries > 1:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=entries, handletextpad=0.3)


def spread(series: Sequence[tuple[str, Sequence[float]]]) -> Picture:
    """The values that several runs reached of each named measure, and a bar at their mean."""

    def draw(axes: Axes) -> None:
        for row, (_, values) in enumerate(reversed(series)):
            known = np.array([value for value in values if np.isfinite(value)])
            axes.scatter(
                known, np.full(len(known), row), s=34, color=ACCENT, alpha=0.55, linewidths=0, zorder=3
            )
            if len(known):
                axes.plot([known.mean()] * 2, [row - 0.26, row + 0.26], color=INK, linewidth=2, zorder=4)
        axes.set_yticks(range(len(series)), [name for name, _ in reversed(series)])
        axes.set_ylim(-0.6, len(series) - 0.4)
        least = min((_least(np.array(values, dtype=np.float64)) for _, values in series), default=0.0)
        axes.set_xlim(min(0.4, least - 0.04), 1.02)
        axes.grid(visible=False, axis="y")

    return _svg(draw, f"Spread over the runs: {', '.join(name for name, _ in series)}", size=(5.0, 2.4))


def by_run(
    lines: Sequence[tuple[str, Sequence[int], Sequence[float], int | None]],
    *,
    alt: str,
    is_share: bool = False,
) -> Picture:
    """One line per run (name, epochs, values, chosen epoch) over the epochs; a dot where its model was chosen."""

    def draw(axes: Axes) -> None:
        for i, (_, epochs, values, best) in enumerate(lines):
            colour = CLASS_COLOURS[i % len(CLASS_COLOURS)]
            axes.plot(epochs, values, color=colour, linewidth=1.5)
            if best is not None and best in epochs:
                axes.plot([best], [values[list(epochs).index(best)]], "o", color=colour, markersize=6)
        if is_share:
            every = np.array([value for _, _, values, _ in lines for value in values], dtype=np.float64)
            axes.set_ylim(min(0.4, _least(every) - 0.04), 1.02)
        axes.margins(x=0.03)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.set_xlabel("epoch")

    return _svg(draw, alt, size=(5.0, 2.5))


def photo(pixels_HW3: NDArray[np.uint8], alt: str, *, quality: int = 88) -> Picture:
    """A picture of tissue as JPEG, colour kept at full resolution where OpenCV can."""
    options = [
        *(cv2.IMWRITE_JPEG_QUALITY, quality),
        *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
    ]
    done, data = cv2.imencode(".jpg", cv2.cvtColor(pixels_HW3, cv2.COLOR_RGB2BGR), options)
    if not done:
        message = f"a picture of shape {pixels_HW3.shape} could not be written as JPEG"
        raise ValueError(message)
    height, width = pixels_HW3.shape[:2]
    return Picture(_uri("image/jpeg", data.tobytes()), width, height, alt)


def exact(pixels_HW3: NDArray[np.uint8], alt: str) -> Picture:
    """A small picture, without loss, as PNG."""
    done, data = cv2.imencode(".png", cv2.cvtColor(pixels_HW3, cv2.COLOR_RGB2BGR))
    if not done:
        message = f"a picture of shape {pixels_HW3.shape} could not be written as PNG"
        raise ValueError(message)
    height, width = pixels_HW3.shape[:2]
    return Picture(_uri("image/png", data.tobytes()), width, height, alt)


def fitted(pixels_HW3: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The picture, made smaller where its longer side is over `side`; averages, so nothing flickers."""
    height, width = pixels_HW3.shape[:2]
    factor = side / max(height, width)
    if factor >= 1:
        return pixels_HW3
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(cv2.resize(pixels_HW3, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _drawable(name: str) -> str:
    """A name without what XML and UTF-8 cannot hold: control characters, bytes that are no text."""
    return re.sub("[\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\ufffe\\uffff]", "\ufffd", name)


def _class_colours(count: int) -> list[str]:
    return [ACCENT] if count == 1 else [CLASS_COLOURS[i % len(CLASS_COLOURS)] for i in range(count)]


def _bands(axes: Axes, bands: Sequence[Band]) -> None:
    for colour, band in zip(_class_colours(len(bands)), bands, strict=True):
        axes.fill_between(band.x, band.low, band.high, color=colour, alpha=0.14, linewidth=0)


def _square(axes: Axes, *, x: str, y: str) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")
    axes.set_xlabel(_drawable(x))
    axes.set_ylabel(_drawable(y))


def _least(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.min()) if len(finite) else 1.0


def _svg(draw: Callable[[Axes], None], alt: str, *, size: tuple[float, float]) -> Picture:
    """Draw on fresh axes, without matplotlib's global figures, and keep the text as text."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Text is only measured here; the reader's browser has the letters that this font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = re.sub(r"'DejaVu Sans'(, sans-serif)?", _FONTS.replace("'", "&apos;"), text[text.index("<svg") :])
    width, height = (round(72 * side) for side in size)
    return Picture(_uri("image/svg+xml", text.encode()), width, height, alt)


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
