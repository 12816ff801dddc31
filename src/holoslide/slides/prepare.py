"""From slide files to rasters: find the tissue, cut to it, write one file per slide; many slides at once.

A raster is made strip by strip, so that memory follows the slide's width and not its area: a strip of level 0
is read, painted, cut into tiles, compressed to a scratch file, and halved into the strip of the next level. Only
then is the file put together, when its size and the colour of its tissue are known. Nothing in it depends on
the time or the machine: equal recipes give equal bytes.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from holoslide.errors import CohortError, ConfigError, HoloslideError, SlideError
from holoslide.geometry import Box, ceil_div
from holoslide.slides.claim import LostClaim, claimed, is_clean, part_of, unfinished
from holoslide.slides.crew import Beat, Died, run_all
from holoslide.slides.facts import GLASS, Mpp, shown
from holoslide.slides.ordered import in_order
from holoslide.slides.outlines import outline_sha256
from holoslide.slides.pyramid import BLOCK_PX, MIN_QUALITY, PyramidLevel, write_tiff
from holoslide.slides.raster import TILE_PX, Raster, RasterRecord, Recipe
from holoslide.slides.reader import Reader, open_slide
from holoslide.slides.region import find_tissue
from holoslide.slides.source import Stamp, noted_other, noted_sha256, slide_sha256, stamp_of, write_note
from holoslide.slides.stain import Stains, find_stains
from holoslide.slides.tissue import Mask, TissueConfig

MOST_ENLARGED = 1.1  # a slide this much coarser than the raster still serves
ALGORITHM = 2  # to be raised with every change that gives other bytes: rasters of before are made again
_EXACT_PX = 2**15  # columns of a strip whose pixels float32, which OpenCV counts in, can count
STALL_S = 600.0  # a slide that gets no further for so long is given up

Advance = Callable[[int, int, str], None]  # (done, total, what was done last)


@dataclass(frozen=True, slots=True)
class PrepareConfig:
    """How rasters are made."""

    mpp: float = 2.0
    """Microns per raster pixel: what one pixel that the network sees measures."""
    mask_cell_um: float = 16.0
    """About how large the cells of the tissue mask are; their side is rounded to a multiple of 8 pixels."""
    jpeg_quality: int = 90
    """75 to 100."""
    icc: bool = False
    """Colours as the slide's own colour profile means them, in sRGB, where it has one; else they are as
    stored."""
    stain: Literal["none", "macenko"] = "none"
    """macenko turns the two dyes of each slide into reference ones, in the tissue. It needs the extra
    `stain`."""
    tissue: TissueConfig = field(default_factory=TissueConfig)
    """How tissue is told from glass."""

    def __post_init__(self) -> None:
        """Raise ConfigError for values that cannot be."""
        for name in ("mpp", "mask_cell_um"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"prepare.{name}", f"{value} um cannot be", "give a positive number")
            object.__setattr__(self, name, float(value))  # 2 and 2.0 are written alike
        if not MIN_QUALITY <= self.jpeg_quality <= 100:
            what = f"{self.jpeg_quality} is out of range: below {MIN_QUALITY} glass would change its colour"
            raise ConfigError("prepare.jpeg_quality", what, f"give {MIN_QUALITY} to 100")

        if self.stain not in ("none", "macenko"):
            raise ConfigError("prepare.stain", f"there is no {self.stain!r}", "give none or macenko")

    @property
    def mask_cell_px(self) -> int:
        """Side of a mask cell in raster pixels, a multiple of 8."""
        return BLOCK_PX * max(1, round(self.mask_cell_um / (BLOCK_PX * self.mpp)))


@dataclass(frozen=True, slots=True)
class PrepareJob:
    """A slide to prepare; `mpp`, um per pixel of its level 0, goes before what the file says.

    `fallback_mpp` counts where neither says. `mask` is the user's own tissue mask (see `outlines.py`), which goes
    before what would be found.
    """

    slide_id: str
    path: Path
    mpp: float | None = None
    mask: Path | None = None
    fallback_mpp: float | None = None


@dataclass(frozen=True, slots=True)
class PrepareResult:
    """What became of a job: the raster's path, or the reason, one line, why there is none.

    `mpp` is the slide's, as it was used; `recipe` is the raster's.
    """

    slide_id: str
    status: Literal["made", "reused", "failed"]
    path: Path | None = None
    reason: str | None = None
    seconds: float = 0.0
    mpp: Mpp | None = None
    recipe: Recipe | None = None


def prepare(
    jobs: Sequence[PrepareJob],
    folder: Path,
    config: PrepareConfig,
    *,
    workers: int = 1,
    stall_s: float = STALL_S,
    progress: Advance | None = None,
) -> list[PrepareResult]:
    """Prepare slides in `workers` processes of their own; results in the order of the jobs.

    Where there are more workers than slides, each process decodes with several threads instead.
    Whatever is wrong with a slide is that slide's failure alone, even what kills the process that reads it, or
    lets it get no further for `stall_s`. Raises `CohortError` for two jobs with one slide id, `SlideError` where
    `folder` cannot be made.
    """
    check_jobs(jobs, folder)
    results: dict[int, PrepareResult] = {}
    threads = max(1, workers // max(1, len(jobs)))
    work = [(job, folder, config, threads) for job in jobs]
    for index, outcome in run_all(attempt, work, workers=workers, limit_s=stall_s):
        result = results[index] = result_of(jobs[index], outcome)
        if progress is not None:
            progress(len(results), len(jobs), f"{result.slide_id}: {result.status}")
    return [results[index] for index in range(len(jobs))]


def check_jobs(jobs: Sequence[PrepareJob], folder: Path) -> None:
    """Refuse two jobs whose slide ids are one, or one file's name in the folder, which is made."""
    twice = [slide_id for slide_id, count in Counter(job.slide_id for job in jobs).items() if count > 1]
    if twice:
        raise CohortError(
            ascii(twice[0])[1:-1], "two slides have this id", "give each slide an id of its own"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"the folder cannot be made ({error.strerror})"
        raise SlideError(shown(folder), what, "give another for the rasters") from error
    first: dict[str, str] = {}
    for job in jobs:
        alike = first.setdefault(unicodedata.normalize("NFC", job.slide_id).casefold(), job.slide_id)
        if alike != job.slide_id and not _tells_case(folder):
            what = f"and {shown(Path(alike))} would be one file in {shown(folder)}, where case makes no difference"
            raise CohortError(ascii(job.slide_id)[1:-1], what, "give each slide an id of its own")


def _tells_case(folder: Path) -> bool:
    """Whether a and A are two files there, as on Linux; on a Mac they are one, and so are two writings of é."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="case-") as file:
            path = Path(file.name)
            return not path.with_name(path.name.upper()).exists()
    except OSError:
        return True  # nothing can be written there, of which each slide will say so


def result_of(job: PrepareJob, outcome: PrepareResult | Died) -> PrepareResult:
    """The result, also of a job whose process died."""
    if not isinstance(outcome, Died):
        return outcome
    what = f"the process that read it died ({outcome.how})"
    reason = str(SlideError(shown(job.path), what, "leave the slide out, and report it"))
    return PrepareResult(job.slide_id, "failed", None, reason, outcome.seconds)


def attempt(work: tuple[PrepareJob, Path, PrepareConfig, int], beat: Beat) -> PrepareResult:
    """`prepare_slide` with so many threads; what is wrong with the slide is the result."""
    (job, folder, config, threads), started = work, time.monotonic()
    try:
        return prepare_slide(job, folder, config, beat=beat, threads=threads)
    except HoloslideError as error:
        reason = str(error)
    except MemoryError:
        reason = str(SlideError(shown(job.path), "does not fit into memory", "prepare with fewer --workers"))
    return PrepareResult(job.slide_id, "failed", None, reason, time.monotonic() - started)


def prepare_slide(
    job: PrepareJob, folder: Path, config: PrepareConfig, *, beat: Beat = lambda: None, threads: int = 1
) -> PrepareResult:
    """Make a slide's raster in `folder`, unless it is there and its recipe is the very same.

    `beat` is called while it gets on, from any of `threads`; the raster is the same for any number of them. Raises
    `SlideError`: the slide cannot be read, changes meanwhile, has no mpp or no tissue, is much coarser than the
    raster; or the raster cannot be written, or is there already of another slide.
    """
    started = time.monotonic()
    target = raster_path(folder, job.slide_id)
    if target.exists() and job.path.exists() and target.samefile(job.path):
        what = "is a slide, and its raster would take its place"
        raise SlideError(shown(target), what, "choose another folder for the rasters")
    with open_slide(
        job.path, mpp=job.mpp, fallback_mpp=job.fallback_mpp, icc=config.icc, threads=threads
    ) as slide:
        slide.on_part = beat
        _refuse_coarse(slide, config.mpp)
        stamp = stamp_of(job.path)
        noted = noted_sha256(target, stamp)
        recipe = _recipe(job, slide, config, noted or slide_sha256(job.path, beat))
        status: Literal["made", "reused"] = "reused"
        try:
            while noted is None or not (_is_made(target, recipe) and is_clean(target)):
                with suppress(LostClaim), claimed(target, beat):
                    if not _is_made(target, recipe):  # nor by another process, meanwhile
                        _refuse_anothers(target, job.path, recipe)
                        with unfinished(target) as file:
                            _make(slide, recipe, config, file, mask=job.mask)
                            _refuse_changed(job.path, stamp)
                        status = "made"
                    part_of(target).unlink(missing_ok=True)
                    write_note(target, stamp, recipe.slide_sha256)
                    noted = recipe.slide_sha256
        except OSError as error:
            what = f"cannot be written ({error.strerror or error})"
            raise SlideError(shown(target), what, "make room there, or choose another folder") from error
        mpp = slide.require_mpp()
    return PrepareResult(job.slide_id, status, target, None, time.monotonic() - started, mpp, recipe)


def _refuse_changed(path: Path, stamp: Stamp) -> None:
    if stamp_of(path) != stamp:
        raise SlideError(shown(path), "changed while it was read", "run it again, once it is copied whole")


def _refuse_anothers(target: Path, path: Path, recipe: Recipe) -> None:
    other = noted_other(target, path, recipe.slide_sha256) if target.exists() else None
    if other is not None:
        what = f"is the raster of another slide of this name, {shown(Path(other))}"
        raise SlideError(shown(target), what, "give another folder for the rasters, or delete it")


def raster_path(folder: Path, slide_id: str) -> Path:
    """Where the raster of a slide is; `SlideError` for an id that is no file name."""
    if slide_id in {"", ".", ".."} or "/" in slide_id or "\0" in slide_id:
        where = ascii(slide_id)
        raise SlideError(where, "is a slide id that cannot name a file", "use no slashes in slide ids")
    return folder / f"{slide_id}.tif"


# --- Whether it is made already -----------------------------------------------------------------------------


def _recipe(job: PrepareJob, slide: Reader, config: PrepareConfig, sha256: str) -> Recipe:
    mpp = slide.require_mpp()
    return Recipe(
        slide_id=job.slide_id,
        slide_sha256=sha256,
        slide_mpp=(float(mpp.y), float(mpp.x)),  # 1 and 1.0 are written alike
        slide_mpp_source=mpp.source,
        settings=dataclasses.asdict(config),
        mask_sha256=None if job.mask is None else outline_sha256(job.mask, slide.bounds_l0),
        algorithm=ALGORITHM,
    )


def _is_made(target: Path, recipe: Recipe) -> bool:
    if not target.exists():
        return False
    try:
        with Raster.open(target) as raster:
            return raster.record.recipe == recipe
    except SlideError:  # damaged, or of another version: made again
        return False


# --- Where the raster lies on the slide ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    origin_l0: tuple[int, int]
    shape_px: tuple[int, int]
    mask: Mask  # one value per cell


def _refuse_coarse(slide: Reader, mpp: float) -> None:
    own = slide.require_mpp()
    if max(own.y, own.x) > mpp * MOST_ENLARGED:
        what = f"has {max(own.y, own.x):.4g} um per pixel, too coarse for a raster at {mpp:g}"
        least = math.ceil(max(own.y, own.x) * 100) / 100
        remedy = f"prepare with --mpp {least:g} or more, for a model trained so, or leave it out"
        raise SlideError(shown(slide.path), what, remedy)


def _place(slide: Reader, config: PrepareConfig, mask: Path | None) -> _Place:
    """The tissue's bounding box on the slide, and the mask in cells counted from its corner.

    Raises `SlideError` where there is no tissue.
    """
    own, bounds, cell_px = slide.require_mpp(), slide.bounds_l0, config.mask_cell_px
    tissue, frame = find_tissue(slide, config.tissue, mask)
    per_thumb = frame.l0_per_px
    if not tissue.any():
        remedy = "look at it; draw its tissue (--masks), or before training lower prepare.tissue."
        remedy += "least_contrast or speck_um2, or leave it out"
        if mask is not None:
            remedy = f"the mask {shown(mask)} leaves nothing of it: mend the mask"
        raise SlideError(shown(slide.path), "no tissue found", remedy)
    origin, cuts, sizes = [], [], []
    for axis in (0, 1):
        length_l0, per_px = bounds.shape[axis], config.mpp / (own.y, own.x)[axis]
        used = np.flatnonzero(tissue.any(axis=1 - axis))
        corner = math.floor(used[0] * per_thumb[axis])
        size = max(1, math.ceil((length_l0 - corner) / per_px - 1e-6))  # no further than the slide
        last_l0 = (used[-1] + 1) * per_thumb[axis] - corner
        cells = min(ceil_div(size, cell_px), math.ceil(last_l0 / (per_px * cell_px) - 1e-6))
        edges = (corner + np.arange(cells + 1) * (per_px * cell_px)) / per_thumb[axis]
        origin.append(corner + (bounds.top, bounds.left)[axis])
        sizes.append(min(size, cells * cell_px))
        cuts.append(edges)
    return _Place((origin[0], origin[1]), (sizes[0], sizes[1]), _pool(tissue, cuts[0], cuts[1]))


def _pool(mask: Mask, y_edges: NDArray[np.floating], x_edges: NDArray[np.floating]) -> Mask:
    """Between neighbouring edges, in cells of `mask`: is there any?"""
    sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int64)
    np.cumsum(np.cumsum(mask, axis=0), axis=1, out=sums[1:, 1:])
    low, high = [], []
    for edges, limit in ((y_edges, mask.shape[0]), (x_edges, mask.shape[1])):
        low.append(np.clip(np.floor(edges[:-1] + 1e-6).astype(np.int64), 0, limit - 1))
        high.append(np.clip(np.ceil(edges[1:] - 1e-6).astype(np.int64), 1, limit))
    rows = sums[high[0]] - sums[low[0]]
    return np.asarray(rows[:, high[1]] - rows[:, low[1]] > 0)


# --- Making the file ----------------------------------------------------------------------------------------


def _make(
    slide: Reader, recipe: Recipe, config: PrepareConfig, file: IO[bytes], *, mask: Path | None
) -> None:
    """Write the raster of a slide into an empty file; what is needed meanwhile lies in the same folder."""
    place = _place(slide, config, mask)
    stains = None
    if config.stain == "macenko":
        stains = find_stains(
            slide.path, partial(_pixels, slide, place, config), place.mask, config.mask_cell_px
        )
    counts = np.zeros((3, 256), np.int64)
    with tempfile.TemporaryFile(dir=Path(file.name).parent) as scratch:
        pyramid = PyramidLevel(place.shape_px, config.jpeg_quality, scratch, threads=slide.threads)
        for strip, tissue in _strips(slide, place, config, stains):
            counts += _histogram(strip, tissue)
            pyramid.add(strip)
        levels = pyramid.levels()
        record = _record(slide, recipe, config, place, counts, levels=len(levels))
        record = replace(record, stains=None if stains is None else stains.dyes)
        write_tiff(levels, record, place.mask, file)


def _pixels(slide: Reader, place: _Place, config: PrepareConfig, box: Box) -> NDArray[np.uint8]:
    """RGB of a box of the raster, tissue or not."""
    return slide.read(box, config.mpp, place.origin_l0, threads=1)


def _strips(
    slide: Reader, place: _Place, config: PrepareConfig, stains: Stains | None
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """The raster in strips one tile high: RGB, glass outside the mask; and which pixels are tissue.

    As many are in the making as the reader has threads.
    """
    height, width = place.shape_px
    boxes = [Box(top, 0, min(top + TILE_PX, height), width) for top in range(0, height, TILE_PX)]
    return in_order(partial(_strip, slide, place, config, stains), boxes, threads=slide.threads)


def _strip(
    slide: Reader, place: _Place, config: PrepareConfig, stains: Stains | None, strip_box: Box
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One of them. Only runs of tiles with tissue in them are read."""
    cells = strip_box.cover(config.mask_cell_px)
    inside = place.mask[cells.slices].astype(np.uint8)
    inside = inside.repeat(config.mask_cell_px, axis=0).repeat(config.mask_cell_px, axis=1)
    tissue = np.ascontiguousarray(inside[strip_box.relative_to(cells.times(config.mask_cell_px)).slices])
    strip = np.empty((*strip_box.shape, 3), np.uint8)
    cv2.rectangle(strip, (0, 0), (strip_box.width, strip_box.height), GLASS, cv2.FILLED)
    for left, right in _runs(tissue):
        pixels = _pixels(slide, place, config, Box(strip_box.top, left, strip_box.bottom, right))
        if stains is not None:
            pixels = stains(pixels)
        cv2.copyTo(pixels, tissue[:, left:right], strip[:, left:right])
    return strip, tissue


def _histogram(strip: NDArray[np.uint8], tissue: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How many pixels of tissue have each value, (3, 256)."""
    counts = np.zeros((3, 256), np.int64)
    for left in range(0, strip.shape[1], _EXACT_PX):
        part = np.s_[:, left : left + _EXACT_PX]
        for channel in range(3):
            found = cv2.calcHist([strip[part]], [channel], tissue[part], [256], [0, 256])
            counts[channel] += found.ravel().astype(np.int64)
    return counts


def _runs(tissue: NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Columns from..to that hold tissue, in whole tiles, neighbours joined."""
    starts = np.arange(0, tissue.shape[1], TILE_PX)
    used = np.logical_or.reduceat(tissue.any(axis=0), starts)
    steps = np.flatnonzero(np.diff(np.concatenate([[False], used, [False]]).astype(np.int8)))
    for first, last in zip(steps[::2].tolist(), steps[1::2].tolist(), strict=True):
        yield first * TILE_PX, min(last * TILE_PX, tissue.shape[1])


def _record(
    slide: Reader, recipe: Recipe, config: PrepareConfig, place: _Place, counts: NDArray[np.int64], *, levels: int
) -> RasterRecord:  # fmt: skip
    total = int(counts[0].sum())
    grey = np.arange(256)
    means = [float((row * grey).sum() / total) for row in counts]
    variances = [float((row * (grey - m) ** 2).sum() / total) for row, m in zip(counts, means, strict=True)]
    bounds = slide.bounds_l0
    return RasterRecord(
        recipe=recipe,
        mpp=config.mpp,
        shape_px=place.shape_px,
        origin_l0=place.origin_l0,
        shape_l0=slide.shape_l0,
        bounds_l0=(bounds.top, bounds.left, bounds.bottom, bounds.right),
        levels=levels,
        mask_cell_px=config.mask_cell_px,
        glass=GLASS,
        icc_profile=slide.icc_profile,
        tissue_px=total,
        tissue_mean=(means[0], means[1], means[2]),
        tissue_std=(math.sqrt(variances[0]), math.sqrt(variances[1]), math.sqrt(variances[2])),
    )
