"""The figures that the project's goals name, from the newest result files; what was not measured says so.

python -m benchmarks.summary --json
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, Figure

_NAME = re.compile(r"(?P<stem>.+)-(?P<date>\d{4}-\d\d-\d\d)(?P<quick>-quick)?\.json")


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure of a result file, and what it should be: at least or at most so much (None: nothing is promised)."""

    name: str
    words: str
    file: str  # the result's name without its date
    key: str
    least: float | None = None
    most: float | None = None
    less: tuple[str, str] | None = None  # another file and its figure, to be taken off

    def is_met(self, value: float) -> bool | None:
        """None where nothing is promised."""
        if self.least is None and self.most is None:
            return None
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


STREAMING = (
    Goal("grad_rel_error", "streamed against plain gradients, float64", "streaming-grad-plan", "grad_rel_error",
         most=1e-10),
    Goal("flat_ratio_k8", "memory, 12,000 over 3,000 px, K = 8", "streaming-flat8", "flat_ratio_k8", most=1.15),
    Goal("flat_ratio_k4", "the same, K = 4", "streaming-flat4", "flat_ratio_k4", most=1.15),
    Goal("flat_ratio_k1", "the same, K = 1", "streaming-flat1", "flat_ratio_k1", most=1.15),
    Goal("time_ratio_recompute", "time over plain, all recomputed, K = 4", "streaming-time", "time_ratio_recompute",
         most=1.25),
    Goal("time_ratio_recompute_k8", "the same, K = 8", "streaming-time", "time_ratio_recompute_k8", most=1.35),
    Goal("time_ratio_kept", "time over plain, graphs kept, K = 4", "streaming-time", "time_ratio_kept", most=1.0),
    Goal("time_ratio_kept_k8", "the same, K = 8", "streaming-time", "time_ratio_kept_k8", most=1.0),
    Goal("time_ratio_tissue30", "30 % tissue, over plain on all, K = 4", "streaming-time", "time_ratio_tissue30",
         most=0.40),
    Goal("time_ratio_tissue30_k8", "the same, K = 8", "streaming-time", "time_ratio_tissue30_k8", most=0.40),
    Goal("time_ratio_k1", "end to end, over plain", "streaming-time", "time_ratio_recompute_k1", most=1.5),
    Goal("time_ratio_recompute_float32", "in float32, no AVX-512: all recomputed, K = 4", "streaming-time4",
         "time_ratio_recompute", most=1.25),
    Goal("time_ratio_kept_float32", "the same, graphs kept", "streaming-time4", "time_ratio_kept", most=1.0),
    Goal("time_ratio_tissue30_float32", "the same, 30 % tissue", "streaming-time4", "time_ratio_tissue30",
         most=0.40),
    Goal("lightstream_over_ours", "lightstream 1.0.7 over ours, end to end", "endtoend", "lightstream_over_ours",
         least=3.0),
    Goal("strips_ratio", "without AVX-512: weight gradient in strips, time over oneDNN's", "convolution",
         "mean_ratio"),
    Goal("busy_spin", "a step beside a program on one core, over alone, where waiting threads spin", "busy",
         "spin_busy"),
    Goal("busy_sleep", "the same where they sleep, as holoslide has them", "busy", "sleep_busy"),
    Goal("sleep_over_spin", "a step alone, threads that sleep over threads that spin", "busy",
         "sleep_over_spin_alone"),
    Goal("objective_share", "heads and reconstruction, share of a step", "objective", "share", most=0.25),
    Goal("plan_error", "planned against measured peak memory", "streaming-grad-plan", "plan_error", most=0.15),
    Goal("huge_over_budget", "60,000 px in 4 GiB: peak over the budget", "huge", "extra_over_budget", most=1.0),
    Goal("curve_gap", "bf16 loss curve, streamed against plain", "curve", "gap"),
    Goal("curve_noise_gap", "the same, plain against plain with noise", "curve", "noise_gap"),
    Goal("plain_k8_over_k1", "the paper's step: memory for the backward pass, K = 8 over 1", "memory",
         "plain_k8_over_k1"),
)  # fmt: skip
SLIDES = (
    Goal("audit_missed", "planted faults that were missed, of 20 in 300 slides", "audit", "missed", most=0),
    Goal("kills_differing", "files that differ after 50 kills", "kill", "files_that_differ", most=0),
    Goal(
        "prepare_over_pyvips", "CPU time over pyvips, 0.5 to 2 um", "prepare", "jpeg_to_2um_ratio", most=1.2
    ),
    Goal("prepare_over_pyvips_copy", "the same, kept at 0.5 um", "prepare", "jpeg_to_0.5um_ratio", most=1.2),
    Goal("prepare_over_pyvips_svs", "the same, a small SVS", "prepare", "svs_to_0.5um_ratio", most=1.2),
    Goal(
        "prepare_two_threads",
        "one slide with two threads, times faster",
        "prepare",
        "jpeg_to_2um_two_threads",
    ),
    Goal(
        "viewer_tiles_s",
        "viewer: tiles a second, 8 clients, none asked for before",
        "viewer-demo",
        "tiles_s_cold",
        least=60,
    ),
    Goal(
        "viewer_first_s",
        "viewer: first picture of a slide in a browser, s",
        "viewer-demo",
        "first_browser_s",
        most=1,
    ),
    Goal(
        "reading_over_decode",
        "windows of a prepared slide, turned and recoloured: CPU time over decoding it once",
        "reading",
        "w2048_augmented_over_decode",
    ),
    Goal("tissue_iou", "tissue found on clean phantoms, least IoU", "tissue", "clean_iou_least", least=0.95),
)
_TISSUE12 = "run_record-tissue-12-small-lesions-gated-cohort-cpu"
ACCURACY = (
    Goal("demo_auroc", "demo: focus phantoms, from random weights", "run_record-demo", "slides_auroc"),
    Goal("tissue12_auroc", "tissue slides, burden 0.12", _TISSUE12, "slides_auroc", least=0.97),
    Goal("tissue12_mil_auroc", "the same, best MIL by validation", "mil-tissue-slides", "best_auroc"),
    Goal(
        "tissue12_over_mil",
        "the same, holoslide less that",
        _TISSUE12,
        "slides_auroc",
        least=0.05,
        less=("mil-tissue-slides", "best_auroc"),
    ),
    Goal(
        "tissue06_auroc",
        "tissue slides, burden 0.06",
        "run_record-tissue-06-small-lesions-gated-cohort-cpu",
        "slides_auroc",
        least=0.90,
    ),
    Goal(
        "tissue06_cells_auroc",
        "the same, `model.heads.pooling=auto` instead of the default",
        "run_record-tissue-06-small-lesions",
        "slides_auroc",
    ),
    Goal("tissue06_mil_auroc", "the same, best MIL by validation", "mil-tissue-06", "best_auroc"),
    Goal(
        "tissue06_supervised_auroc",
        "the same, the network told of every training patch",
        "supervised-tissue-06",
        "trained_auroc",
    ),
    Goal("tissue03_auroc", "tissue slides, burden 0.03", "run_record-tissue-03", "slides_auroc", least=0.80),
    Goal("tissue03_mil_auroc", "the same, best MIL by validation", "mil-tissue-03", "best_auroc"),
    Goal(
        "tissue03_supervised_auroc",
        "the same, the network told of every training patch",
        "supervised-tissue-03",
        "trained_auroc",
    ),
    Goal(
        "prediction_mil_over_ours",
        "slide file to prediction: MIL at twice the resolution, times longer",
        "prediction",
        "mil_over_ours",
        least=7,
    ),
    Goal(
        "arrangement_auroc",
        "arrangement phantoms, by `examples/arrangement.yaml`",
        "run_record-arrangement",
        "slides_auroc",
        least=0.95,
    ),
)
_MAPS = (
    ("demo", "demo", "heatmaps-demo"),
    ("tissue06", "tissue slides, burden 0.06, small lesions", "heatmaps-tissue-06-small-lesions"),
    ("tissue12", "tissue slides, burden 0.12", "heatmaps-tissue-slides"),
    (
        "tissue12_gated",
        "the same, small lesions with the paper's heads",
        "heatmaps-tissue-12-small-lesions-gated",
    ),
)
HEATMAPS = tuple(
    Goal(f"{name}_{short}", f"{words}: {what}", file, key)
    for name, words, file in _MAPS
    for short, key, what in (
        ("share", "share_evidence", "share of the evidence for a lesion that is on it"),
        ("pointing", "pointing_evidence", "strongest evidence is on the lesion"),
        ("auprc", "auprc_evidence", "average precision of the evidence"),
        ("pointing_attention", "pointing_attention", "strongest attention is on the lesion"),
        ("auprc_attention", "auprc_attention", "average precision of the attention"),
        ("auprc_chance", "auprc_chance", "average precision of chance"),
    )
    if (name, short) != ("tissue12", "share")  # measured before the benchmark counted it
)
GOALS = (*STREAMING, *SLIDES, *ACCURACY, *HEATMAPS)


@dataclass(frozen=True, slots=True)
class Found:
    """A result file's figures, and where they are from."""

    figures: dict[str, Figure]
    path: Path
    date: str
    command: str


def newest(folder: Path = RESULTS) -> dict[str, Found]:
    """The newest result of each name; a full one goes before a quick one."""
    found: dict[str, tuple[tuple[bool, str], Path]] = {}
    for path in sorted(folder.glob("*.json")):
        match = _NAME.fullmatch(path.name)
        if match is None:
            continue
        rank = (match["quick"] is None, match["date"])
        if match["stem"] not in found or rank > found[match["stem"]][0]:
            found[match["stem"]] = (rank, path)
    return {stem: _read(path) for stem, (_, path) in found.items()}


def _read(path: Path) -> Found:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Found(record["figures"], path, record["date"], record["command"])


def value_of(goal: Goal, results: dict[str, Found]) -> float | None:
    """The mean over layouts of the slides; less another figure, over those that have both. None: not measured."""
    values = by_layout(goal, results)
    if goal.less is not None:
        others = by_layout(Goal("", "", *goal.less), results)
        values = {layout: values[layout] - others[layout] for layout in values.keys() & others.keys()}
    return statistics.mean(values.values()) if values else None


def by_layout(goal: Goal, results: dict[str, Found]) -> dict[int, float]:
    """The figure of each layout, in the mean of the seeds that were trained on it."""
    values: dict[int, list[float]] = {}
    for layout, found in runs_of(goal, results):
        value = found.figures.get(goal.key)
        if isinstance(value, int | float):
            values.setdefault(layout, []).append(float(value))
    return {layout: statistics.mean(seeds) for layout, seeds in values.items()}


def runs_of(goal: Goal, results: dict[str, Found]) -> list[tuple[int, Found]]:
    """The goal's file, and those of its name and another seed or layout (`NAME-seed1`, `NAME-layout0`, ...).

    With each the number of the layout, 0 where none is said.
    """
    same = re.compile(re.escape(goal.file) + r"(-seed\d+|-layout(?P<layout>\d+))?")
    matches = [(same.fullmatch(stem), found) for stem, found in sorted(results.items())]
    return [(int(match["layout"] or 0), found) for match, found in matches if match is not None]


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description=__doc__)
    parser.add_argument(
        "--json", action="store_true", help="one JSON object: name to value, null if not measured"
    )
    parser.add_argument("--quick", action="store_true", help="no matter: nothing is run")
    parser.add_argument("--full", action="store_true", help="no matter: nothing is run")
    as_json, results = parser.parse_args().json, newest()
    values = {goal.name: value_of(goal, results) for goal in GOALS}
    if as_json:
        print(json.dumps(values))
        return
    for goal in GOALS:
        value = values[goal.name]
        shown = "not measured" if value is None else f"{value:.4g}"
        kept = {True: "met", False: "MISSED", None: ""}[None if value is None else goal.is_met(value)]
        print(f"{goal.name:<26} {shown:<14} {wanted(goal):<10} {kept:<8} {goal.words}")


def wanted(goal: Goal) -> str:
    """The goal in a few signs."""
    if goal.least is not None:
        return f">= {goal.least:g}"
    return f"<= {goal.most:g}" if goal.most is not None else ""


if __name__ == "__main__":
    main()
