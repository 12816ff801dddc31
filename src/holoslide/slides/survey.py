"""What opening a slide tells, before anything is trained: is it whole, how large are its pixels, where is its tissue.

Slides are opened in worker processes, whose death is a finding about one slide. What comes back of each is small: facts,
a thumbnail of some 15 kB with the outline of its tissue, and two prints of its pixels, by which copies are found.
"""  # noqa: E501

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from holoslide.errors import HoloslideError, SlideError
from holoslide.geometry import Box
from holoslide.slides.companions import COPY_ALL, missing_companion
from holoslide.slides.crew import Beat, Died, run_all
from holoslide.slides.facts import Mpp, shown
from holoslide.slides.findings import Finding
from holoslide.slides.morphology import Mask
from holoslide.slides.reader import Reader, open_slide
from holoslide.slides.region import Region, find_region
from holoslide.slides.tissue import TissueConfig

PROBE_PX = 64
PROBES = 3  # each way, spread over the scanned part, and one in the last corner
PICTURE_PX = 320  # longer side of a thumbnail
PICTURE_QUALITY = 72
STALL_S = 600.0  # a slide that gets no further for so long is given up
SKETCH = 32  # cells each way of the coarse picture by which copies are found
MOST_BLURRED = 0.3  # of the tissue, from which it is worth a warning
SAME_MPP = 1.08  # ratio up to which two resolutions are one


@dataclass(frozen=True, slots=True)
class SurveyJob:
    """A slide to look at; `mpp` and `mask` as in a slide table, `row` for its findings.

    `fallback_mpp` counts where neither table nor file tell the microns per pixel.
    """

    slide_id: str
    path: Path
    mpp: float | None = None
    mask: Path | None = None
    row: int | None = None
    fallback_mpp: float | None = None


@dataclass(frozen=True, slots=True)
class Picture:
    """A small JPEG of the scanned part, and the outline of the tissue as an SVG path in its pixels."""

    jpeg: bytes
    width: int
    height: int
    outline: str = ""


@dataclass(frozen=True, slots=True)
class Print:
    """The pixels of a slide in brief: `exact`, a digest of some, "" where all are alike; `sketch` of all."""

    shape_l0: tuple[int, int]
    exact: str
    sketch: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Areas:
    """Square millimetres: of what is used, and of what was left out as pen or for want of focus."""

    tissue_mm2: float
    pen_mm2: float
    blurred_mm2: float


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of one slide after it was opened; None for what could not be found out."""

    slide_id: str
    path: Path
    findings: tuple[Finding, ...] = ()
    vendor: str | None = None
    shape_l0: tuple[int, int] | None = None
    mpp: Mpp | None = None
    objective_power: float | None = None
    areas: Areas | None = None
    tissue_rgb: tuple[float, float, float] | None = None
    own_mask: bool = False
    picture: Picture | None = field(default=None, repr=False)
    print_: Print | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, object]:
        """The facts, ready for JSON; pictures and findings are left out."""
        return {
            "slide_id": self.slide_id,
            "path": str(self.path),
            "vendor": self.vendor,
            "shape": self.shape_l0,
            "mpp": self.mpp and {"y": self.mpp.y, "x": self.mpp.x, "source": self.mpp.source},
            "objective_power": self.objective_power,
            "tissue_mm2": None if self.areas is None else round(self.areas.tissue_mm2, 4),
            "pen_mm2": None if self.areas is None else round(self.areas.pen_mm2, 4),
            "blurred_mm2": None if self.areas is None else round(self.areas.blurred_mm2, 4),
            "own_mask": self.own_mask,
        }


def survey(
    jobs: Sequence[SurveyJob],
    config: TissueConfig,
    *,
    workers: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Survey]:
    """Open slides in `workers` processes of their own; results in the order of the jobs."""
    found: dict[int, Survey] = {}
    for index, outcome in run_all(
        survey_slide, [(job, config) for job in jobs], workers=workers, limit_s=STALL_S
    ):
        job = jobs[index]
        if isinstance(outcome, Died):
            what = f"{shown(job.path)} the process that read it died ({outcome.how})"
            outcome = Survey(
                job.slide_id, job.path, (_error(job, "unreadable", what, "leave it out, and report it"),)
            )
        found[index] = outcome
        if progress is not None:
            progress(len(found), len(jobs), job.slide_id)
    return [found[index] for index in range(len(jobs))]


def survey_slide(work: tuple[SurveyJob, TissueConfig], beat: Beat = lambda: None) -> Survey:
    """Look at one slide; whatever is wrong with it is among the findings."""
    job, config = work
    lacking = missing_companion(job.path)
    if lacking is not None:
        what = f"{_name(job)} lacks {lacking}, which belongs to it"
        return Survey(job.slide_id, job.path, (_error(job, "missing companion", what, COPY_ALL),))
    try:
        with open_slide(job.path, mpp=job.mpp, fallback_mpp=job.fallback_mpp) as slide:
            slide.on_part = beat
            return _look(job, slide, config)
    except SlideError as error:
        return Survey(job.slide_id, job.path, (_unreadable(job, error),))
    except MemoryError:
        what = f"{shown(job.path)} does not fit into memory"
        return Survey(
            job.slide_id, job.path, (_error(job, "unreadable", what, "audit with fewer --workers"),)
        )


def _look(job: SurveyJob, slide: Reader, config: TissueConfig) -> Survey:
    findings: list[Finding] = []
    print_, region, picture = None, None, None
    if slide.mpp is None:
        what = f"{_name(job)} does not tell its microns per pixel"
        findings.append(_error(job, "no mpp", what, "give it in the table's mpp column, or with --slide-mpp"))
    findings += [*_contradicted(job, slide.stated_mpp), *_turned(job, slide.orientation)]
    try:
        with open_slide(job.path, mpp=1.0) as bare:  # so that a raster pixel is a slide pixel
            bare.on_part = slide.on_part
            thumbnail = _thumbnail(bare)
            print_ = _print(bare, thumbnail)
        if slide.mpp is not None:
            region, found = _region(job, slide, config)
            findings += found
            thumbnail = thumbnail if region is None else region.thumbnail
        picture = draw_picture(thumbnail, None if region is None else region.tissue)
    except SlideError as error:
        findings.append(_unreadable(job, error))
    has_tissue = region is not None and region.tissue.any()
    return Survey(
        slide_id=job.slide_id,
        path=job.path,
        findings=tuple(findings),
        vendor=slide.vendor,
        shape_l0=slide.shape_l0,
        mpp=slide.mpp,
        objective_power=slide.objective_power,
        areas=None
        if region is None
        else Areas(*(region.mm2(m) for m in (region.tissue, region.pen, region.blurred))),
        tissue_rgb=_mean_rgb(region) if region is not None and has_tissue else None,
        own_mask=job.mask is not None,
        picture=picture,
        print_=print_,
    )


def _contradicted(job: SurveyJob, stated: Mpp | None) -> list[Finding]:
    """That the table gives other microns per pixel than the file, before which it goes."""
    if job.mpp is None or stated is None:
        return []
    ratios = [job.mpp / side for side in (stated.y, stated.x)]
    if all(1 / SAME_MPP <= ratio <= SAME_MPP for ratio in ratios):
        return []
    what = f"the table gives {job.mpp:.4g} um per pixel, which is used, {_name(job)} {stated.x:.4g}"
    what += f" (from: {stated.source})"
    remedy = "make sure which is right; leave the table's empty if the file's is"
    return [Finding.of_slide("warning", "mpp out of line", job.slide_id, what, remedy, job.row)]


def _turned(job: SurveyJob, orientation: int) -> list[Finding]:
    """That other programs may show the slide otherwise than it is read."""
    if orientation == 1:
        return []
    what = (
        f"{_name(job)} has orientation tag {orientation}, which is not followed: pixels are taken as stored"
    )
    remedy = "save it upright, without the tag, if your masks are drawn on it turned or mirrored"
    return [Finding.of_slide("warning", "turned", job.slide_id, what, remedy, job.row)]


def _region(job: SurveyJob, slide: Reader, config: TissueConfig) -> tuple[Region | None, list[Finding]]:
    """The tissue, and what is to be said of it."""
    try:
        region = find_region(slide, config, job.mask)
    except HoloslideError as error:
        if job.mask is None or error.where != shown(job.mask):
            raise
        return None, [_error(job, "unusable mask", f"{error.where} {error.what}", error.remedy)]
    tissue, blurred = region.mm2(region.tissue), region.mm2(region.blurred)
    findings = []
    if not tissue:
        seen = "the mask holds nothing of the slide" if job.mask is not None else "no tissue found"
        if blurred:
            seen += f", but {blurred:.2g} mm2 that are out of focus"
        findings.append(_error(job, "no tissue", seen, "look at it; prepare leaves such a slide out"))
    elif blurred > MOST_BLURRED * (tissue + blurred):
        what = f"{blurred / (tissue + blurred):.0%} of the tissue is out of focus, and left out"
        findings.append(
            Finding.of_slide("warning", "out of focus", job.slide_id, what, "scan it again", job.row)
        )
    return region, findings


def _thumbnail(bare: Reader) -> NDArray[np.uint8]:
    """The scanned part, RGB, its longer side about twice a picture's; `bare` has one um per pixel."""
    bounds = bare.bounds_l0
    factor = max(1.0, max(bounds.shape) / (2 * PICTURE_PX))
    shape = [max(1, round(side / factor)) for side in bounds.shape]
    return bare.read(Box.at(0, 0, *shape), factor, (bounds.top, bounds.left))


def _print(bare: Reader, thumbnail: NDArray[np.uint8]) -> Print:
    """Reads pieces of level 0 all over the slide, too, which finds files that are cut short."""
    pieces = [bare.read(box, 1.0) for box in _probes(bare.bounds_l0)]
    digest = ""
    if any(np.ptp(piece) > 0 for piece in pieces):
        together = hashlib.sha256(repr(bare.shape_l0).encode())
        for piece in pieces:
            together.update(piece.tobytes())
        digest = together.hexdigest()
    sketch = cv2.resize(thumbnail, (SKETCH, SKETCH), interpolation=cv2.INTER_AREA)
    return Print(bare.shape_l0, digest, np.asarray(sketch, np.uint8))


def _probes(bounds: Box) -> Iterator[Box]:
    height, width = (min(PROBE_PX, side) for side in bounds.shape)
    places = [(y, x) for y in range(1, 2 * PROBES, 2) for x in range(1, 2 * PROBES, 2)]
    for y, x in [*places, (2 * PROBES, 2 * PROBES)]:
        top = bounds.top + (bounds.height - height) * y // (2 * PROBES)
        left = bounds.left + (bounds.width - width) * x // (2 * PROBES)
        yield Box.at(top, left, height, width)


def _mean_rgb(region: Region) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in region.thumbnail[region.tissue].mean(axis=0))
    return red, green, blue


# --- Pictures -----------------------------------------------------------------------------------------------------


def draw_picture(thumbnail: NDArray[np.uint8], tissue: Mask | None, side_px: int = PICTURE_PX) -> Picture:
    """A thumbnail (h, w, 3) as a small JPEG, with the outline of its tissue (h, w)."""
    shrink = min(1.0, side_px / max(thumbnail.shape))
    height, width = (max(1, round(side * shrink)) for side in thumbnail.shape[:2])
    small = cv2.resize(thumbnail, (width, height), interpolation=cv2.INTER_AREA)
    jpeg = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, PICTURE_QUALITY])[1].tobytes()
    return Picture(jpeg, width, height, "" if tissue is None else outline_path(tissue, (height, width)))


def outline_path(mask: Mask, shape: tuple[int, int]) -> str:
    """The outlines of a mask, holes included, as an SVG path on a picture of `shape`."""
    scale = np.array([shape[1] / mask.shape[1], shape[0] / mask.shape[0]])
    lines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parts = []
    for line in lines:
        points = (cv2.approxPolyDP(line, 0.7 / float(scale.min()), closed=True)[:, 0] + 0.5) * scale
        if len(points) > 2:
            parts.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z")
    return "".join(parts)


# --- What is wrong ----------------------------------------------------------------------------------------------


def _unreadable(job: SurveyJob, error: SlideError) -> Finding:
    return _error(job, "unreadable", f"{error.where} {error.what}", error.remedy)


def _error(job: SurveyJob, kind: str, what: str, remedy: str) -> Finding:
    return Finding.of_slide("error", kind, job.slide_id, what, remedy, job.row)  # type: ignore[arg-type]


def _name(job: SurveyJob) -> str:
    return shown(Path(job.path.name))
