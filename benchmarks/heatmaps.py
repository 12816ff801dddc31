"""Do heatmaps point at what they should? Attention and evidence of a run's test slides, held against known places.

    python -m benchmarks.heatmaps RUN NAME --truth FOLDER --full

FOLDER has one grey PNG for each slide, of any scale, above 0 where the lesion is; `holoslide demo` draws them
beside its slides. Counted are the slides with a lesion. A cell is of the lesion if the lesion touches it.

pointing_evidence   share of slides whose strongest cell for the slide's class is of the lesion (the pointing game).
auprc_evidence      mean over slides of the average precision of the cells' evidence for the slide's class.
..._attention       the same of the attention.
auprc_chance        mean share of cells that are of the lesion: what evidence drawn at random reaches.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import average_precision_score

from benchmarks.common import Figure, Options, Result, main
from holoslide.inference.heatmap import Heatmap
from holoslide.slides.cohort import Cohort
from holoslide.slides.reader import open_slide


def lesion_cells(heatmap: Heatmap, truth: NDArray[np.bool_], shape_l0: tuple[int, int]) -> NDArray[np.bool_]:
    """Which cells of a heatmap the lesion touches, (h, w), from a picture of the whole slide."""
    spans = []
    for axis in (0, 1):
        edges_l0 = heatmap.origin_l0[axis] + heatmap.cell_l0[axis] * np.arange(
            heatmap.attention_HW.shape[axis] + 1
        )
        edges = edges_l0 * truth.shape[axis] / shape_l0[axis]
        first = np.clip(np.floor(edges[:-1]), 0, truth.shape[axis]).astype(int)
        last = np.clip(np.ceil(edges[1:]), 0, truth.shape[axis]).astype(int)
        spans.append((first, last))
    (top, bottom), (left, right) = spans
    sums = np.zeros((truth.shape[0] + 1, truth.shape[1] + 1), np.int64)
    sums[1:, 1:] = truth.cumsum(0).cumsum(1)
    inside = sums[bottom][:, right] - sums[top][:, right] - sums[bottom][:, left] + sums[top][:, left]
    return np.asarray(inside > 0)


def judge(scores_HW: NDArray[np.float32], lesion_HW: NDArray[np.bool_]) -> tuple[bool, float]:
    """Whether the strongest cell is of the lesion, and the average precision over the cells that vote."""
    voting = np.isfinite(scores_HW)
    strongest = np.unravel_index(np.nanargmax(scores_HW), scores_HW.shape)
    return bool(lesion_HW[strongest]), float(average_precision_score(lesion_HW[voting], scores_HW[voting]))


def measure(options: Options) -> Result:
    """The figures above over the test slides with a lesion."""
    run, truths = Path(options.values["run"]), Path(options.values["truth"])
    cohort = Cohort.from_csv(run / "cohort.csv")
    rows, shares = [], []
    for slide in cohort.test:
        truth = np.asarray(Image.open(truths / f"{slide.slide_id}.png").convert("L")) > 0
        if not truth.any():
            continue
        assert slide.path is not None
        with open_slide(slide.path) as reader:
            shape_l0 = reader.shape_l0
        heatmap = Heatmap.load(run / "heatmaps" / f"{slide.slide_id}.npz")
        lesion_HW = lesion_cells(heatmap, truth, shape_l0)
        evidence_HW = heatmap.evidence_LHW[heatmap.classes.index(slide.label)]
        rows.append((*judge(evidence_HW, lesion_HW), *judge(heatmap.attention_HW, lesion_HW)))
        shares.append(float(lesion_HW[np.isfinite(evidence_HW)].mean()))
    if not rows:
        raise SystemExit(f"{truths}: no test slide of {run} has a lesion there")
    names = ("pointing_evidence", "auprc_evidence", "pointing_attention", "auprc_attention")
    figures: dict[str, Figure] = {
        name: round(statistics.fmean(column), 3)
        for name, column in zip(names, zip(*rows, strict=True), strict=True)
    }
    figures |= {"auprc_chance": round(statistics.fmean(shares), 3), "slides": len(rows)}
    return Result(figures=figures, configuration={}, variant=options.values["name"])


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder, with its heatmaps")
    parser.add_argument("name", help="goes into the name of the result file")
    parser.add_argument("--truth", required=True, metavar="FOLDER", help="where the lesions are, a PNG each")


if __name__ == "__main__":
    main("heatmaps", __doc__, measure, add_arguments=_arguments)
