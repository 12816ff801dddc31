"""The tables of docs/results.md that are more than a list of goals; each is empty where nothing was measured."""

from __future__ import annotations

import re
import statistics

from benchmarks.reach import DEVICES_GIB, SIDES_PX
from benchmarks.settings import SETTINGS
from benchmarks.summary import Found

QUESTIONS = {
    "pooling": "pooling of the cells",
    "kernel": "side of a cell, in cells of layer3",
    "norm": "norm of the cells",
    "lr": "learning rate",
    "stem": "stride of the first convolution",
    "slides": "share of the training slides",
    "noise": "share of training labels turned",
    "maps": "pooling and norm together",
}
METHODS = {
    "end_to_end": "end to end, plain",
    "checkpointed": "end to end, checkpointed",
    "paper": "the paper's, K = 8",
    "mil": "MIL on frozen features",
    "holoslide_k8": "**holoslide**, K = 8, budget of 4 GiB",
    "holoslide_k1": "**holoslide**, K = 1, budget of 4 GiB",
}
LAYOUTS = range(3)
RUN = re.compile(r"run_record-tissue-(?P<burden>\d\d)-(?P<setting>.+)-layout(?P<layout>\d)")
_SIDES_PX = (10_000, 20_000, 40_000, 80_000)


def layouts(results: dict[str, Found]) -> str:
    """Settings by layout of the tissue slides: the same patients, drawn into slides and parts anew."""
    found: dict[tuple[str, str], dict[int, Found]] = {}
    for stem, result in results.items():
        if match := RUN.fullmatch(stem):
            found.setdefault((match["burden"], match["setting"]), {})[int(match["layout"])] = result
    if not found:
        return ""
    rows = [f"| burden | setting | {' | '.join(f'layout {n}' for n in LAYOUTS)} | mean |", "| --- " * 6 + "|"]
    for burden in sorted({key[0] for key in found}, reverse=True):
        for name, setting in SETTINGS.items():
            for kind, words in (("", setting.words), ("-cpu", f"{setting.words}, in float32 on a CPU")):
                runs = found.get((burden, name + kind), {})
                rows += _layout_row(f"0.{burden} | {words}", runs, "slides_auroc")
        for words, kind, key in (
            (f"{SETTINGS['former'].words}, on a CPU", "run_record", "slides_auroc"),
            ("MIL, the best of seven by validation", "mil", "best_auroc"),
            ("told of every training patch, the network frozen", "supervised", "frozen_auroc"),
            ("told of every training patch", "supervised", "trained_auroc"),
        ):
            runs = {n: results[name] for n in LAYOUTS if (name := f"{kind}-{_name(burden, n)}") in results}
            rows += _layout_row(f"0.{burden} | {words}", runs, key)
    return "\n".join(["## Settings, by layout\n", SHOWN_LAYOUTS, *rows]) + "\n"


def _name(burden: str, layout: int) -> str:
    """Of a cohort's results; the first layout's name says no more."""
    name = "tissue-slides" if burden == "12" else f"tissue-{burden}"
    return f"{name}-layout{layout}" if layout else name


def _layout_row(start: str, found: dict[int, Found], key: str) -> list[str]:
    if not found:
        return []
    cells = []
    for n in LAYOUTS:
        link = (
            f"[{number(found[n], key):.3f}](../benchmarks/results/{found[n].path.name})" if n in found else ""
        )
        cells.append(link)
    mean = statistics.mean(number(one, key) for one in found.values())
    return [f"| {start} | {' | '.join(cells)} | {f'{mean:.3f}' if len(found) == len(LAYOUTS) else ''} |"]


SHOWN_LAYOUTS = """Test AUROC of the last module, one training each (seed 0), 12 epochs where no other is told,
on 82 slides of 41 patients; the interval over patients is in the file, and about 0.06 to either
side. A layout is a draw: other slides, and other patients to train, validate and test on. One
training says little: on layout 0 the same settings on a CPU and on a GPU are as far apart as two
settings. On two GPUs of a kind they end with the same figures. Told of every training patch: the
same network as a classifier of single patches, which learns from all patches of the training slides
where tumour is, and not from the slides' labels (`python -m benchmarks.supervised`).
"""


def gpu(results: dict[str, Found]) -> str:
    """Seconds and memory of a step on a GPU, by side of the slide and number of modules."""
    small, large, tight = (results.get(f"gpu-{part}") for part in ("to-40000px", "80000px", "k4-8gib"))
    if small is None or large is None or tight is None:
        return ""
    rows = [
        "| side | K | s a step | plain | peak, GiB | plain | planned, GiB | share of the bf16 rate | plain |",
        "| --- " * 9 + "|",
    ]
    for side in _SIDES_PX:
        for k in (1, 4, 8):
            figures = small.figures | large.figures
            plain, streamed = f"plain_k{k}_{side}px", f"k{k}_{side}px"
            if f"{streamed}_s" in figures:
                names = [f"{start}_{of}" for of in ("s", "peak_gib") for start in (streamed, plain)]
                names += [f"{streamed}_planned_gib", f"{streamed}_share", f"{plain}_share"]
                shown = " | ".join(str(figures.get(name, "")) for name in names)
                rows.append(f"| {side:,} px | {k} | {shown} |")
    rows += ["", SHOWN_TIGHT.format(tight=_source(tight)), "| side | s a step | peak, GiB | planned, GiB |"]
    rows.append("| --- " * 4 + "|")
    for side in _SIDES_PX:
        if f"k4_{side}px_s" in tight.figures:
            shown = " | ".join(
                str(tight.figures[f"k4_{side}px_{of}"]) for of in ("s", "peak_gib", "planned_gib")
            )
            rows.append(f"| {side:,} px | {shown} |")
    return "\n".join([SHOWN_GPU.format(small=_source(small), large=_source(large)), *rows]) + "\n"


SHOWN_GPU = """### On a GPU

ResNet-34, bf16, one round piece of tissue on 30 % of the slide, an NVIDIA H200 with all of its memory to plan for
({small};
{large}). Plain: the whole raster at once, read beforehand. Streamed: pixels made up window by window; those of a
prepared slide have to be decoded, which these times leave out (`python -m benchmarks.reading`). A time is the
second step's at its side, with slides being drawn on the machine's other cores. The share is of a large matrix
product's rate, for what the tissue needs. At 80,000 px K = 1 was stopped before its first step ended: no figure.
"""
SHOWN_TIGHT = """\
With 8 GiB and K = 4; a time is that of the first step at its side, asking for memory included ({tight}):
"""


_POINTING = {
    "pointing_evidence": "strongest evidence on the lesion",
    "pointing_seeds": "each seed",
    "pointing_attention": "strongest attention on it",
    "auprc_evidence": "AP, evidence",
    "auprc_attention": "attention",
    "auprc_chance": "chance",
}
SHOWN_POINTING = """\
Share of the test slides with a lesion whose strongest cell lies on it, and the average precision (AP) of their
cells, by evidence for the slide's class and by attention.
"""


def heads(found: Found, words: str) -> str:
    """A table of one setting at a time."""
    rows = ["| setting | value | test AUROC | each seed |", "| --- | --- | --- | --- |"]
    pointing = [f"| heads | {' | '.join(_POINTING.values())} |", "| --- " * (len(_POINTING) + 1) + "|"]
    for key in found.figures:
        if key.endswith("_auroc"):
            setting = key.removesuffix("_auroc")
            question, value = setting.split("_")
            seeds = found.figures[f"{setting}_seeds"]
            rows.append(f"| {QUESTIONS[question]} | {value} | {number(found, key):.3f} | {seeds} |")
            if f"{setting}_auprc_chance" in found.figures:
                shown = " | ".join(str(found.figures[f"{setting}_{of}"]) for of in _POINTING)
                pointing.append(f"| {value} | {shown} |")
    if len(pointing) > 2:
        rows += ["", SHOWN_POINTING, *pointing]
    head = (
        f"## One setting at a time: {words}, frozen features\n\nThe last head alone on layer3 of the frozen "
        f"ResNet-18, all else as by default ({_source(found)}).\n"
    )
    return "\n".join([head, *rows]) + "\n"


def reach(results: dict[str, Found]) -> str:
    """Memory by side of the slide, a row a method; nothing where it was not measured."""
    found = results.get("reach")
    if found is None:
        return ""
    columns = [*(f"{side:,} px" for side in SIDES_PX), *(f"fails at, {gib} GiB" for gib in DEVICES_GIB)]
    rows = [f"| method | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for method, words in METHODS.items():
        cells = [f"{number(found, f'{method}_mb_{side}') / 1000:,.1f} GB" for side in SIDES_PX]
        for gib in DEVICES_GIB:
            side = found.figures.get(f"{method}_side_{gib}gib")
            cells.append(f"{side:,} px" if isinstance(side, int) else "")
        rows.append(f"| {words} | {' | '.join(cells)} |")
    in_file = max(number(found, f"holoslide_k{k}_file_mb_{SIDES_PX[-1]}") for k in (1, 8))
    head = (
        "## How large a slide\n\nPeak memory of a training step of ResNet-34, float32, on a square slide "
        f"with 30 % tissue; small slides counted, larger ones on their line ({_source(found)}). Ours is what "
        f"the plan says, which training obeys; the rest is in a file, {in_file / 1000:.0f} GB at most.\n"
    )
    shown = "![Peak memory by the side of the slide, a line a method](pictures/results-reach.svg)"
    return "\n".join([head, *rows, "", shown]) + "\n"


def _source(found: Found) -> str:
    return f"[{found.date}](../benchmarks/results/{found.path.name}), `{found.command}`"


def number(found: Found, key: str) -> float:
    """A figure that is one."""
    value = found.figures[key]
    assert isinstance(value, int | float)
    return float(value)
