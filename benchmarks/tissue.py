"""How well the tissue mask fits the known tissue of phantom slides: intersection over union, by what is hard.

Each case is drawn several times, as either task, in the stains of as many laboratories, written as a slide file
(pyramid of JPEG tiles) and read back. What counts as tissue is what was painted, without what lies under pen or is
out of focus, on cells of 8 um. Besides, for the cases with pen and blur: the share of it that is still in the mask.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.common import REPO, Figure, Options, Result, main
from holoslide.slides._paint import Stain
from holoslide.slides.phantom import LABELS, PhantomConfig, Task, draw_phantom, write_pyramid
from holoslide.slides.reader import open_slide
from holoslide.slides.region import find_region
from holoslide.slides.tissue import TissueConfig

PLAIN = PhantomConfig(mpp=1.0, pen=0.0, truth_um=8.0)
GREY = (176.0, 177.0, 179.0)
CASES: dict[str, dict[str, float | str]] = {
    "clean": {},
    "pale": {"strength": 0.3},
    "fatty": {"fat": 60},
    "grey": {"grey": 1},
    "debris": {"debris": 1.0},
    **{f"pen_{colour}": {"pen": 1.0, "pen_colour": colour} for colour in ("black", "blue", "green", "red")},
    "blur": {"blurred": 1.0},
    "all": {"pen": 1.0, "blurred": 1.0, "debris": 1.0, "grey": 1, "fat": 20},
}
QUICK, FULL = 1, 4  # slides of each task in a case


def measure(options: Options) -> Result:
    """`<case>_iou_least` and `_median`, `<case>_taken_in` (of pen or blur, at the most), `seconds_median`."""
    count = options.values["slides"] or (QUICK if options.quick else FULL)
    figures: dict[str, Figure] = {}
    seconds: list[float] = []
    if options.values["pictures"] is not None:
        draw_pictures(options.values["data"], options.values["pictures"])
    with tempfile.TemporaryDirectory() as folder:
        for case in options.values["cases"] or CASES:
            trials = [trial(case, task, seed, Path(folder)) for seed in range(count) for task in LABELS]
            ious = [each.iou for each in trials]
            figures[f"{case}_iou_least"] = round(min(ious), 4)
            figures[f"{case}_iou_median"] = round(statistics.median(ious), 4)
            if any(each.taken_in is not None for each in trials):
                figures[f"{case}_taken_in"] = round(max(each.taken_in or 0 for each in trials), 4)
            seconds += [each.seconds for each in trials]
    figures["seconds_median"] = round(statistics.median(seconds), 3)
    configuration = {"slides_a_case": 2 * count, "tissue": dataclasses.asdict(TissueConfig()), "cases": CASES}
    return Result(figures=figures, configuration=configuration)


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """One slide: how well its mask fits, the share of pen and blur that is in it, and how long finding it took."""

    iou: float
    taken_in: float | None
    seconds: float


def trial(case: str, task: Task | str, seed: int, folder: Path) -> Trial:
    """Draw, write, read, find, compare."""
    changes: dict[str, Any] = dict(CASES[case])
    strength, is_grey = changes.pop("strength", 1.0), changes.pop("grey", 0)
    stain = Stain.drawn(np.random.default_rng([4, seed]), 1.0)
    dyes: dict[str, Any] = {
        name: tuple(strength * value for value in getattr(stain, name)) for name in ("haematoxylin", "eosin")
    }
    stain = dataclasses.replace(stain, **dyes, glass=GREY if is_grey else stain.glass)
    config = dataclasses.replace(PLAIN, **changes)
    phantom = draw_phantom(task, LABELS[task][seed % 2], seed=(seed, 4), config=config, stain=stain)  # type: ignore[arg-type]
    path = folder / "slide.tiff"
    write_pyramid(path, phantom.pixels, config)
    started = time.perf_counter()
    with open_slide(path) as slide:
        found = find_region(slide, TissueConfig()).tissue
    seconds = time.perf_counter() - started
    shape = found.shape[1], found.shape[0]
    tissue, ink, blurred = (
        cv2.resize(plane.astype(np.uint8), shape, interpolation=cv2.INTER_NEAREST) > 0
        for plane in (phantom.tissue, phantom.ink, phantom.blurred)
    )
    truth, marks = tissue & ~ink & ~blurred, (ink | blurred) & (tissue | ink)
    iou = float((found & truth).sum() / max(1, (found | truth).sum()))
    taken_in = float((found & marks).sum() / marks.sum()) if marks.any() else None
    return Trial(iou, taken_in, seconds)


REAL = {
    "CMU-1-Small-Region.svs": None,
    "TCGA-CR-7395-01A-01-TS1.svs": 0.5,  # it does not say; by the size of its nuclei
    "multiframe_camelyon_challenge_image.dcm": None,
}


def draw_pictures(data: Path, out: Path) -> None:
    """The masks of the real slides, for eyes: green around tissue, red around pen, blue around what is blurred."""
    out.mkdir(parents=True, exist_ok=True)
    for name, mpp in REAL.items():
        with open_slide(data / "wsi" / name, mpp=mpp) as slide:
            config = TissueConfig()
            if mpp is None and slide.require_mpp().x > config.thumbnail_mpp:
                region = find_region(slide, config)
            else:
                region = find_region(slide, dataclasses.replace(config, thumbnail_mpp=4.0))
        picture = region.thumbnail.copy()
        planes = [(region.tissue, (0, 150, 60)), (region.pen, (210, 0, 0)), (region.blurred, (0, 60, 220))]
        for mask, colour in planes:
            lines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
            cv2.drawContours(picture, lines, -1, colour, 2, cv2.LINE_AA)
        path = out / f"tissue-{Path(name).stem.lower()}.jpg"
        cv2.imwrite(str(path), picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR", help="draw the masks of the real slides there"
    )
    parser.add_argument("--data", type=Path, default=REPO.parent / "shared" / "data", help="the real slides")
    parser.add_argument(
        "--slides", type=int, metavar="N", help=f"of each task in a case ({QUICK}, --full {FULL})"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help=", ".join(CASES))


if __name__ == "__main__":
    main("tissue", __doc__, measure, add_arguments=_arguments)
