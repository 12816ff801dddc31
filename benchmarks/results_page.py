"""docs/results.md and its picture, made from the result files: `python -m benchmarks.results_page`.

Never edited by hand; a test holds the page against what this makes of the files that are there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import REPO
from benchmarks.mil_models import MODELS
from benchmarks.reach import DEVICES_GIB, SIDES_PX
from benchmarks.summary import ACCURACY, SLIDES, STREAMING, Found, Goal, newest, seeds_of, value_of, wanted

PAGE = REPO / "docs" / "results.md"
PICTURE = REPO / "docs" / "pictures" / "results-auroc.svg"
COHORTS = {  # the result's variant -> what it is
    "tissue-slides": "tissue slides, burden 0.12",
    "tissue-06": "tissue slides, burden 0.06",
    "tissue-03": "tissue slides, burden 0.03",
    "focus": "focus phantoms",
    "arrangement": "arrangement phantoms",
}
QUESTIONS = {
    "pooling": "pooling of the cells",
    "kernel": "side of a cell, in cells of layer3",
    "norm": "norm of the cells",
    "lr": "learning rate",
    "stem": "stride of the first convolution",
    "slides": "share of the training slides",
    "noise": "share of training labels turned",
}
METHODS = {
    "end_to_end": "end to end, plain",
    "checkpointed": "end to end, checkpointed",
    "paper": "the paper's, K = 8",
    "mil": "MIL on frozen features",
    "holoslide_k8": "**holoslide**, K = 8, budget of 4 GiB",
    "holoslide_k1": "**holoslide**, K = 1, budget of 4 GiB",
}
OPEN = (
    "K = 1, 2, 4 and 8 at equal wall time and at convergence",
    "reconstruction on and off, alpha, number and size of patches, on accuracy",
    "tissue pooling and glass against the paper's zeros and all, on accuracy",
    "auxiliary heads without barriers; their ensemble",
    "stem stride, learning rate, pooling, number of training slides, label noise: on frozen features by "
    "`python -m benchmarks.heads`, not run in full yet; frozen BatchNorm scale",
    "burden 0.06 with the defaults, and on a layout that the settings for small lesions were not chosen on; "
    "burden 0.03; three seeds of layout at each burden; `arrangement`",
    "peak memory against slide side for all methods: `python -m benchmarks.reach`, not run in full yet",
    "anything on a GPU: `python -m benchmarks.gpu`",
)
SHOWN_MIL = """MIL's figure is the mean of three trainings, its interval that of their averaged probabilities, so
the one need not lie in the other; each training's AUROC is in the result file.
"""
HEAD = """# Results

Made from the files in `benchmarks/results/` by `python -m benchmarks.results_page`, not by hand. Each file names
its machine, versions and settings; the command beside a figure makes it again. Most were taken on two processor
cores.
"""


def page(results: dict[str, Found]) -> str:
    """The whole page."""
    parts = [HEAD, "## Accuracy\n", _accuracy(results)]
    parts += ["## Streaming\n", _goals(STREAMING, results), "## Slides and viewer\n", _goals(SLIDES, results)]
    parts += ["## All goals of accuracy\n", _goals(ACCURACY, results)]
    parts += [_heads(f"heads-{cohort}", words, results) for cohort, words in COHORTS.items()]
    parts += [_reach(results)]
    parts += [
        "## Open\n",
        "Asked, and not answered yet:\n\n" + "\n".join(f"- {line}" for line in OPEN) + "\n",
    ]
    return "\n".join(parts)


def _goals(goals: Sequence[Goal], results: dict[str, Found]) -> str:
    rows = ["| what | measured | goal | made by |", "| --- | --- | --- | --- |"]
    for goal in goals:
        value, found = value_of(goal, results), results.get(goal.file)
        if value is None or found is None:
            rows.append(f"| {goal.words} | not measured | {wanted(goal)} | |")
            continue
        missed = " (missed)" if goal.is_met(value) is False else ""
        link = f"[{found.date}](../benchmarks/results/{found.path.name})"
        seeds = len(seeds_of(goal, results))
        words = f"{goal.words}, mean of {seeds} seeds" if seeds > 1 else goal.words
        rows.append(f"| {words} | {value:.3g} | {wanted(goal)}{missed} | {link}, `{found.command}` |")
    return "\n".join(rows) + "\n"


def _accuracy(results: dict[str, Found]) -> str:
    """A row for each method and cohort that was run; test AUROC with its interval over patients."""
    rows = ["| cohort | method | test AUROC | 95 % interval | result |", "| --- | --- | --- | --- | --- |"]
    for cohort, words in COHORTS.items():
        for method, value, interval, found in methods(cohort, results):
            link = f"[{found.date}](../benchmarks/results/{found.path.name})"
            rows.append(f"| {words} | {method} | {value:.3f} | {interval} | {link} |")
    shown = "![Test AUROC of each method on each cohort](pictures/results-auroc.svg)\n"
    return "\n".join([*rows, "", SHOWN_MIL, shown])


def _heads(stem: str, words: str, results: dict[str, Found]) -> str:
    """A table of one setting at a time; nothing where it was not measured."""
    found = results.get(stem)
    if found is None:
        return ""
    rows = ["| setting | value | test AUROC | each seed |", "| --- | --- | --- | --- |"]
    for key in found.figures:
        if key.endswith("_auroc"):
            question, value = key.removesuffix("_auroc").split("_")
            seeds = found.figures[f"{question}_{value}_seeds"]
            rows.append(f"| {QUESTIONS[question]} | {value} | {_number(found, key):.3f} | {seeds} |")
    head = (
        f"## One setting at a time: {words}, frozen features\n\nThe last head alone on layer3 of the frozen "
        f"ResNet-18, all else as by default ({_source(found)}).\n"
    )
    return "\n".join([head, *rows]) + "\n"


def _reach(results: dict[str, Found]) -> str:
    """Memory by side of the slide, a row a method; nothing where it was not measured."""
    found = results.get("reach")
    if found is None:
        return ""
    columns = [*(f"{side:,} px" for side in SIDES_PX), *(f"fails at, {gib} GiB" for gib in DEVICES_GIB)]
    rows = [f"| method | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for method, words in METHODS.items():
        cells = [f"{_number(found, f'{method}_mb_{side}') / 1000:,.1f} GB" for side in SIDES_PX]
        for gib in DEVICES_GIB:
            side = found.figures.get(f"{method}_side_{gib}gib")
            cells.append(f"{side:,} px" if isinstance(side, int) else "")
        rows.append(f"| {words} | {' | '.join(cells)} |")
    head = (
        "## How large a slide\n\nPeak memory of a training step of ResNet-34, float32, on a square slide "
        f"with 30 % tissue; small slides counted, larger ones on their line ({_source(found)}).\n"
    )
    return "\n".join([head, *rows]) + "\n"


def _source(found: Found) -> str:
    return f"[{found.date}](../benchmarks/results/{found.path.name}), `{found.command}`"


def methods(cohort: str, results: dict[str, Found]) -> list[tuple[str, float, str, Found]]:
    """What was run on a cohort: method, test AUROC, interval, source; ours first."""
    rows: list[tuple[str, float, str, Found]] = []
    for stem, found in results.items():
        if stem == f"run_record-{cohort}" or stem.startswith(f"run_record-{cohort}-"):
            setting = stem.removeprefix(f"run_record-{cohort}").strip("-")
            name = f"**holoslide**{f', {setting}' if setting else ''}"
            rows.append(
                (name, _number(found, "slides_auroc"), str(found.figures["slides_auroc_interval"]), found)
            )
    mil = results.get(f"mil-{cohort}")
    if mil is not None:
        rows += [
            (f"MIL: {name}", _number(mil, f"{name}_auroc"), str(mil.figures[f"{name}_interval"]), mil)
            for name in MODELS
            if f"{name}_auroc" in mil.figures
        ]
    if ours := [found for name, *_, found in rows if "holoslide" in name]:
        rows.append(("mean colour", _number(ours[0], "mean_colour_auroc"), "", ours[0]))
    return rows


def _number(found: Found, key: str) -> float:
    value = found.figures[key]
    assert isinstance(value, int | float)
    return float(value)


def draw(results: dict[str, Found], path: Path) -> None:
    """A dot and its interval for each method, cohort by cohort."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "holoslide"
    groups = {words: methods(cohort, results) for cohort, words in COHORTS.items()}
    groups = {words: rows for words, rows in groups.items() if rows}
    lines = sum(len(rows) + 1 for rows in groups.values())
    figure, axes = plt.subplots(figsize=(7.5, 0.27 * lines + 1.2), layout="constrained")
    y, ticks, names = 0.0, list[float](), list[str]()
    for words, rows in groups.items():
        axes.text(0.405, y, words, weight="bold", va="center", fontsize=9)
        y += 1
        for method, value, interval, _ in rows:
            colour = "#1f5a73" if "holoslide" in method else "#8a969b"
            if interval:
                low, high = (float(part) for part in interval.split(" to "))
                axes.plot([low, high], [y, y], color=colour, linewidth=2, alpha=0.5, solid_capstyle="butt")
            axes.plot([value], [y], "o", color=colour, markersize=5)
            ticks.append(y)
            names.append(method.replace("*", ""))
            y += 1
    axes.set(
        yticks=ticks, yticklabels=names, xlim=(0.4, 1.01), xlabel="test AUROC, 95 % interval over patients"
    )
    axes.axvline(0.5, color="#8a969b", linewidth=1, linestyle="--")
    axes.set_ylim(y - 0.3, -0.6)  # downwards, with room for the first heading
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.results_page",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    for name in ("--quick", "--full", "--json"):
        parser.add_argument(name, action="store_true", help="no matter: nothing is run")
    parser.parse_args()
    results = newest()
    PAGE.write_text(page(results), encoding="utf-8")
    draw(results, PICTURE)


if __name__ == "__main__":
    main()
