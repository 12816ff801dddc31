"""docs/results.md and its picture, made from the result files: `python -m benchmarks.results_page`.

Never edited by hand; a test holds the page against what this makes of the files that are there.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import REPO
from benchmarks.mil_models import MODELS
from benchmarks.reach import DEVICES_GIB, SIDES_PX
from benchmarks.results_tables import METHODS, gpu, heads, layouts, number, reach
from benchmarks.summary import (
    ACCURACY,
    HEATMAPS,
    SLIDES,
    STREAMING,
    Found,
    Goal,
    newest,
    runs_of,
    value_of,
    wanted,
)

PAGE = REPO / "docs" / "results.md"
PICTURE = REPO / "docs" / "pictures" / "results-auroc.svg"
REACH_PICTURE = PICTURE.with_name("results-reach.svg")
COHORTS = {  # the result's variant -> what it is
    "tissue-slides": "tissue slides, burden 0.12",
    "tissue-06": "tissue slides, burden 0.06",
    "tissue-03": "tissue slides, burden 0.03",
    "arrangement": "arrangement phantoms",
}
_FORMER, _CELLS = "former defaults", "cells by themselves"
OURS = {  # cohort -> our results on it, and what in them is not by default; all of the tissue slides' by layout
    "tissue-slides": {
        "tissue-12-small-lesions-gated-cohort-cpu": "",
        "tissue-slides": _FORMER,
        "tissue-slides-unaveraged": f"{_FORMER}, not averaged",
    },
    "tissue-06": {
        "tissue-06-small-lesions-gated-cohort-cpu": "",
        "tissue-06-small-lesions": _CELLS,
        "tissue-06-epochs12": _FORMER,
    },
    "tissue-03": {"tissue-03-small-lesions": _CELLS},
    "arrangement": {
        "arrangement": "",
        "arrangement-k6": "K = 6",
        "arrangement-k6-barrier-every-2": "K = 6, every other barrier",
        "arrangement-k6-no-barriers": "K = 6, no barriers",
        "arrangement-k6-no-rfr": "K = 6, nothing reconstructed",
        "arrangement-zeros-all": "zeros, all cells",
    },
}
OPEN = (
    "K = 2, 4 and 8 on tissue slides, and all K at equal wall time; K = 1 against 3 was trained once on each of "
    "three layouts, K = 6 against 3 once on `arrangement`",
    "alpha, number and size of reconstruction's patches, on accuracy; with nothing reconstructed, once on each of "
    "three layouts, no difference was seen; on `arrangement` in six modules, once, 0.66 instead of 0.84",
    "tissue pooling and glass against the paper's zeros and all, on tissue slides: on `arrangement`, one training "
    "each, both tell all test slides apart",
    "the defaults at burden 0.06 (a training is under way), 0.03, and at 0.12 on layouts 1 and 2",
    "which heads, and whether with barriers, at burden 0.06: of seven settings, one training each on three "
    "layouts, the paper's heads, and those that classify cells without barriers, are ahead, by no more than luck "
    "can do; the two together; burden 0.03 on more than one layout",
    "what more patients, more pixels or a larger network give at burden 0.03, where this one reaches 0.715 told of "
    "every patch of the training slides",
    "barriers on `arrangement` in six modules: one training each, they cost much, half of them less",
    "stem stride, learning rate, number of training slides, label noise: in whole trainings, not only of a head on "
    "frozen features (`python -m benchmarks.heads`, three layouts); frozen BatchNorm scale",
    "on a GPU: a step on prepared slides, whose pixels have to be decoded; 80,000 px at K = 1 and with 8 GiB; why "
    "K = 8 takes 1.9 of the time of K = 1, at 1.1 of the arithmetic",
)
SHOWN_MIL = """MIL's figure is the mean of three trainings, its interval that of their averaged probabilities, so
the one need not lie in the other; each training's AUROC is in the result file.
"""
SHOWN_HEATMAPS = """Of the test slides with a lesion, by the model's own head; the other modules' figures are in the
files. Files before 2026-11-26 scored the logit of the slide's class alone, and no other module; since then it is
what the pictures show, what a cell adds to that logit above the others'. In the demo a few cells of a lesion hold
nearly all that speaks for it, and many others of the same lesion speak slightly against it: nearly all evidence is
on the lesion, but the average precision, which sees only the order of the cells, is low ([log](log.md)).
"""
SHOWN_STREAMING = """Times on a CPU are with threads that spin as they wait, as PyTorch has them. Since 2026-11-28
they sleep, which is slower where nothing else runs and far faster where something does ([log](log.md)).
"""
HEAD = """# Results

Made from the files in `benchmarks/results/` by `python -m benchmarks.results_page`, not by hand. Each file names
its machine, versions and settings; the command beside a figure makes it again. Most were taken on two processor
cores. The tissue slides are laid out by [`examples/tissue_slides.py`](../examples/tissue_slides.py) from a public
set of patches, layouts 0, 1 and 2 by `--seed`; the slides of `arrangement` are drawn as
[`examples/arrangement.yaml`](../examples/arrangement.yaml) says.
"""


def page(results: dict[str, Found]) -> str:
    """The whole page."""
    parts = [HEAD, "## Accuracy\n", _accuracy(results), layouts(results)]
    parts += [
        "## Streaming\n",
        SHOWN_STREAMING,
        _goals(STREAMING, results),
        gpu(results),
        "## Slides and viewer\n",
        _goals(SLIDES, results),
    ]
    parts += ["## All goals of accuracy\n", _goals(ACCURACY, results)]
    parts += ["## Heatmaps against known lesions\n", SHOWN_HEATMAPS, _goals(HEATMAPS, results)]
    parts += [
        heads(found, _words(stem.removeprefix("heads-")))
        for stem, found in sorted(results.items())
        if stem.startswith("heads-")
    ]
    parts += [
        reach(results),
        "## Open\n",
        "Asked, and not answered yet:\n\n" + "\n".join(f"- {line}" for line in OPEN) + "\n",
    ]
    return "\n".join(filter(None, parts))


def _words(cohort: str) -> str:
    name, _, layout = cohort.partition("-layout")
    return COHORTS.get(name, name) + (", layout " + layout.replace("-", ", ") if layout else "")


def _goals(goals: Sequence[Goal], results: dict[str, Found]) -> str:
    rows = ["| what | measured | goal | made by |", "| --- | --- | --- | --- |"]
    for goal in goals:
        value, runs = value_of(goal, results), runs_of(goal, results)
        if value is None:
            rows.append(f"| {goal.words} | not measured | {wanted(goal)} | |")
            continue
        missed = " (missed)" if goal.is_met(value) is False else ""
        found, drawn = runs[0][1], {layout for layout, _ in runs}
        link = f"[{found.date}](../benchmarks/results/{found.path.name})"
        several = f"{len(drawn)} layouts" if len(drawn) > 1 else f"{len(runs)} seeds"
        words = f"{goal.words}, mean of {several}" if len(runs) > 1 else goal.words
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


def methods(cohort: str, results: dict[str, Found]) -> list[tuple[str, float, str, Found]]:
    """What was run on a cohort, of its layouts the first: method, test AUROC, interval, source; ours first."""
    rows: list[tuple[str, float, str, Found]] = []
    for name, changed in OURS[cohort].items():
        for stem, found in sorted(results.items()):
            if match := re.fullmatch(rf"run_record-{name}(-layout0|-(?P<seed>seed\d))?", stem):
                words = ", ".join(filter(None, ("**holoslide**", changed, match["seed"])))
                value, interval = number(found, "slides_auroc"), str(found.figures["slides_auroc_interval"])
                rows.append((words, value, interval, found))
    mil = results.get(f"mil-{cohort}")
    if mil is not None:
        rows += [
            (f"MIL: {name}", number(mil, f"{name}_auroc"), str(mil.figures[f"{name}_interval"]), mil)
            for name in MODELS
            if f"{name}_auroc" in mil.figures
        ]
    if ours := [found for name, *_, found in rows if "holoslide" in name]:
        rows.append(("mean colour", number(ours[0], "mean_colour_auroc"), "", ours[0]))
    return rows


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
        yticks=ticks, yticklabels=names, xlim=(0.28, 1.01), xlabel="test AUROC, 95 % interval over patients"
    )
    axes.axvline(0.5, color="#8a969b", linewidth=1, linestyle="--")
    axes.set_ylim(y - 0.3, -0.6)  # downwards, with room for the first heading
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def draw_reach(results: dict[str, Found], path: Path) -> None:
    """Peak memory by the side of the slide, a line a method, and where devices end."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "holoslide"
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    for method, words in METHODS.items():
        ours = "holoslide" in words
        values = [number(results["reach"], f"{method}_mb_{side}") / 1000 for side in SIDES_PX]
        style = "--" if method.endswith("k1") else "-"
        axes.plot(SIDES_PX, values, style, marker="o", markersize=4, color="#1f5a73" if ours else "#8a969b")
        shift = {"holoslide_k8": -9, "holoslide_k1": 5}.get(method, 0)
        axes.annotate(
            words.replace("*", ""), (SIDES_PX[-1], values[-1]), (8, shift), textcoords="offset points",
            va="center", fontsize=8, weight="bold" if ours else "normal",
        )  # fmt: skip
    for gib in DEVICES_GIB:
        axes.axhline(gib * 2**30 / 1e9, color="#c96a2b", linewidth=0.8, linestyle=":")
        axes.text(SIDES_PX[0], gib * 1.12, f"{gib} GiB", color="#a3501c", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="side of the slide, px", ylabel="peak memory of a step, GB")
    axes.set_xticks(SIDES_PX, [f"{side:,}" for side in SIDES_PX])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Write the page and its pictures."""
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
    draw_reach(results, REACH_PICTURE)


if __name__ == "__main__":
    main()
