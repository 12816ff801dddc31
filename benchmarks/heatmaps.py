"""Do heatmaps point at what they should? Attention and evidence of a run's test slides, held against known places.

    python -m benchmarks.heatmaps RUN NAME --truth FOLDER --full

FOLDER has one grey PNG for each slide, of any scale, above 0 where the lesion is; `holoslide demo` draws them
beside its slides. Counted are the slides with a lesion. A cell is of the lesion if the lesion touches it.

pointing_evidence   share of slides whose strongest cell for the slide's class is of the lesion (the pointing game).
auprc_evidence      mean over slides of the average precision of the cells' evidence for the slide's class.
share_evidence      mean share of what speaks for the class that is on the lesion (the energy-based pointing game).
..._attention       the same of the attention.
..._module1, ...    the same of the heads before the model's own.
auprc_chance        mean share of cells that are of the lesion: what evidence drawn at random reaches.

Evidence is what the pictures show: what a cell adds to the logit of the class above the mean of the others.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import average_precision_score

from benchmarks.common import Figure, Options, Result, main
from holoslide.config import RunConfig
from holoslide.evaluation.scales import evidence_for
from holoslide.inference.heatmap import Heatmap, heatmap_paths
from holoslide.slides.cohort import Cohort
from holoslide.slides.reader import open_slide


def picture_of(truths: Path, slide_id: str) -> NDArray[np.bool_]:
    """Where the lesion is, of any scale."""
    return np.asarray(Image.open(truths / f"{slide_id}.png").convert("L")) > 0


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


@dataclass(frozen=True, slots=True)
class Judged:
    """A map against the lesion: is its strongest cell on it, the cells' average precision, and the share on it."""

    pointing: float
    auprc: float
    share: float


def judge(scores_HW: NDArray[np.floating], lesion_HW: NDArray[np.bool_]) -> Judged:
    """Count the cells that vote."""
    voting = np.isfinite(scores_HW)
    scores, lesion = scores_HW[voting].astype(np.float64), lesion_HW[voting]
    positive = np.maximum(scores, 0)
    share = float(positive[lesion].sum() / positive.sum()) if positive.any() else 0.0
    return Judged(float(lesion[scores.argmax()]), float(average_precision_score(lesion, scores)), share)


def judge_maps(maps: Mapping[str, NDArray[np.floating]], lesion_HW: NDArray[np.bool_]) -> dict[str, float]:
    """The figures of several maps of one slide: `pointing_NAME` and so on."""
    judged = {name: asdict(judge(scores_HW, lesion_HW)) for name, scores_HW in maps.items()}
    return {f"{kind}_{name}": value for name, one in judged.items() for kind, value in one.items()}


def judge_slide(
    paths: Sequence[Path], label: str, truth: NDArray[np.bool_], shape_l0: tuple[int, int]
) -> dict[str, float]:
    """The figures of one slide, from the heatmaps of its heads, the last the model's own."""
    figures: dict[str, float] = {}
    for module, path in enumerate(paths, start=1):
        heatmap = Heatmap.load(path)
        lesion_HW = lesion_cells(heatmap, truth, shape_l0)
        own = module == len(paths)
        of = "" if own else f"_module{module}"
        maps: dict[str, NDArray[np.floating]] = {
            f"evidence{of}": evidence_for(heatmap.evidence_LHW, heatmap.classes.index(label)),
            f"attention{of}": heatmap.attention_HW,
        }
        figures |= judge_maps(maps, lesion_HW)
        if own:
            figures["auprc_chance"] = float(lesion_HW[np.isfinite(heatmap.attention_HW)].mean())
    return figures


def measure(options: Options) -> Result:
    """The figures above over the test slides with a lesion."""
    run, truths = Path(options.values["run"]), Path(options.values["truth"])
    modules = RunConfig.load(run / "config.yaml").model.modules
    slides = []
    for slide in Cohort.from_csv(run / "cohort.csv").test:
        truth = picture_of(truths, slide.slide_id)
        if not truth.any():
            continue
        assert slide.path is not None
        assert slide.label is not None
        with open_slide(slide.path) as reader:
            shape_l0 = reader.shape_l0
        paths = heatmap_paths(run / "heatmaps", slide.slide_id, modules)
        slides.append(judge_slide(paths, slide.label, truth, shape_l0))
    if not slides:
        raise SystemExit(f"{truths}: no test slide of {run} has a lesion there")
    figures: dict[str, Figure] = {
        key: round(statistics.fmean(one[key] for one in slides), 3) for key in slides[0]
    }
    figures["slides"] = len(slides)
    return Result(figures=figures, configuration={"modules": modules}, variant=options.values["name"])


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder, with its heatmaps")
    parser.add_argument("name", help="goes into the name of the result file")
    parser.add_argument("--truth", required=True, metavar="FOLDER", help="where the lesions are, a PNG each")


if __name__ == "__main__":
    main("heatmaps", __doc__, measure, add_arguments=_arguments)
