"""Synthetic H&E-like slides for the demo and the tests: what they show is known, and the label is no accident.

Two tasks. `focus`: somewhere there is a small lesion, a sheet of crowded, dark, pleomorphic nuclei, or there is
none; a slide without one has a crowd of lymphocytes in its place, of the same outline and mean colour (red and
green are fitted; blue is a few levels off, as two stains cannot fit three channels).
`arrangement`: every slide holds the same nests of glands and the same lymphoid follicles, two and two near each
other: in `mixed` slides a nest next to a follicle, in `segregated` ones two of a kind. A patch whose diagonal is
shorter than the gap sees at most one of them, so a bag of such patches is the same in both classes.

A label changes only what stands at places that are chosen without it: two slides of one seed and different labels
are equal elsewhere. Stain varies by patient.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from holoslide.errors import ConfigError
from holoslide.slides import _flaws as flaws
from holoslide.slides import _structures as structures
from holoslide.slides._ground import (
    Ground,
    Spacing,
    Streams,
    clear,
    pair_up,
    pen_line,
    pieces,
    take,
    tissue_cover,
)
from holoslide.slides._paint import INKS_RGB, Canvas, Outline, Places, Plane, Stain

Task = Literal["focus", "arrangement"]
Difficulty = Literal["easy", "medium", "hard"]

LABELS: dict[str, tuple[str, str]] = {"focus": ("benign", "lesion"), "arrangement": ("mixed", "segregated")}


@dataclass(frozen=True, slots=True)
class FocusDial:
    """Radius of the lesion (um), the share of stroma that parts it into nests, and the number of other crowds."""

    radius_um: float
    septa: float
    crowds: int


FOCUS: dict[str, FocusDial] = {
    "easy": FocusDial(260, 0.4, 2),
    "medium": FocusDial(150, 0.2, 4),
    "hard": FocusDial(80, 0.0, 6),
}
ARRANGEMENT: dict[str, Spacing] = {
    "easy": Spacing(200, 500),  # blind: patches of up to 141 um
    "medium": Spacing(300, 560),  # 212 um
    "hard": Spacing(400, 620),  # 282 um
}


@dataclass(frozen=True, slots=True)
class PhantomConfig:
    """How slides are drawn.

    `mpp`: um per pixel of the finest level. `least_um`, `most_um`: each side's length is drawn between them.
    `stain_spread`: how much stain differs between patients, 1 as between laboratories, 0 not at all. `pen`: share
    of slides with a pen mark, of `pen_colour` (any, black, blue, green or red). `truth_um`: um per pixel of the
    truth. `jpeg_quality`: of the slide files. `blurred`, `debris`: shares of slides with an area out of focus, and
    with a coverslip's edge, bubbles, a hair and dust. `fat`: lobules of fat tried for beside the usual few.
    """

    mpp: float = 1.0
    least_um: float = 3000.0
    most_um: float = 4000.0
    stain_spread: float = 1.0
    pen: float = 0.15
    truth_um: float = 16.0
    jpeg_quality: int = 85
    pen_colour: str = "any"
    blurred: float = 0.0
    debris: float = 0.0
    fat: int = 0

    def __post_init__(self) -> None:
        """Raise `ConfigError` for what cannot be drawn."""
        for name in (each.name for each in fields(self) if each.name != "pen_colour"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"phantom.{name}", f"{value} is out of range", "give a number of at least 0"
                )
        if not 0.25 <= self.mpp <= 4:
            raise ConfigError("phantom.mpp", f"{self.mpp} um per pixel cannot be drawn", "give 0.25 to 4")
        if not 1000 <= self.least_um <= self.most_um:
            what = f"no side is between {self.least_um} and {self.most_um} um and at least 1000"
            raise ConfigError("phantom.least_um", what, "give 1000 <= least_um <= most_um")
        if self.truth_um not in (8, 16, 24, 32, 40, 48, 56, 64):
            raise ConfigError(
                "phantom.truth_um", f"{self.truth_um} um is no such scale", "give 8, 16, ... or 64"
            )
        for name in ("pen", "blurred", "debris"):
            if getattr(self, name) > 1:
                raise ConfigError(f"phantom.{name}", f"{getattr(self, name)} is no share", "give 0 to 1")
        if self.pen_colour not in ("any", *INKS_RGB):
            what = f"there is no {self.pen_colour!r} pen"
            raise ConfigError("phantom.pen_colour", what, f"give any, {', '.join(INKS_RGB)}")
        if not 1 <= self.jpeg_quality <= 100:
            raise ConfigError("phantom.jpeg_quality", f"{self.jpeg_quality} is out of range", "give 1 to 100")


@dataclass(frozen=True, slots=True)
class Phantom:
    """A drawn slide: `pixels` (H, W, 3), and on a grid of `truth_um`: `truth`, `tissue`, `ink` and `blurred`.

    `truth` is 255 where the lesion is (focus), or 128 on nests of glands and 255 on follicles (arrangement).
    `sites_um` (n, 2) are the centres of the chosen places, (y, x), and `kinds` what stands there.
    """

    pixels: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    tissue: NDArray[np.bool_]
    ink: NDArray[np.bool_]
    blurred: NDArray[np.bool_]
    sites_um: Places
    kinds: tuple[str, ...]


def draw_phantom(
    task: Task,
    label: str,
    *,
    seed: tuple[int, ...],
    difficulty: Difficulty = "easy",
    config: PhantomConfig | None = None,
    stain: Stain | None = None,
) -> Phantom:
    """One slide; `stain` is drawn from the seed if none is given. Raises `ConfigError` for unknown names."""
    _check(task, difficulty, label)
    config = config or PhantomConfig()
    streams = Streams(seed)
    sides = streams("size").uniform(config.least_um, config.most_um, 2) // config.truth_um * config.truth_um
    canvas = Canvas((float(sides[0]), float(sides[1])), config.mpp)
    if task == "focus":
        depth_um = pieces(
            canvas.size_um, streams("outline"), most=3, room_um=1.1 * FOCUS[difficulty].radius_um
        )
    else:
        depth_um = pieces(canvas.size_um, streams("outline"), most=1, room_um=0)
    cells = structures.Cells(config.mpp, streams("cells"))
    ground = Ground(canvas, cells, depth_um, streams, config.truth_um, config.fat)
    paint = {"focus": _paint_focus, "arrangement": _paint_arrangement}[task]
    sites_um, kinds, truth = paint(ground, label, difficulty)
    cover = tissue_cover(depth_um, canvas, streams("outline", 1))
    stain = stain or Stain.drawn(streams("stain"), config.stain_spread)
    pixels = structures.develop(canvas, cover, stain, streams("glass"))
    marked, blurred = _spoil(pixels, ground, stain, config)
    tissue, ink, soft = (
        cv2.resize(plane, truth.shape[::-1], interpolation=cv2.INTER_AREA) > 0.5
        for plane in (cover, marked, blurred)
    )
    return Phantom(pixels, truth, tissue, ink, soft, sites_um, kinds)


def _spoil(
    pixels: NDArray[np.uint8], ground: Ground, stain: Stain, config: PhantomConfig
) -> tuple[Plane, Plane]:
    """Draw pen and flaws onto a finished slide, in place; gives where there is pen, and where it is blurred."""
    mpp, streams = ground.canvas.mpp, ground.streams
    marked, blurred = (np.zeros(ground.canvas.shape_px, np.float32) for _ in range(2))
    rng = streams("blur")
    if rng.random() < config.blurred:
        blurred = flaws.out_of_focus(pixels, ground.depth_um, mpp, stain.noise, rng)
    rng = streams("debris")
    if rng.random() < config.debris:
        flaws.debris(pixels, mpp, rng)
    rng = streams("pen")
    if rng.random() < config.pen:
        line = pen_line(ground.depth_um, rng)
        marked = structures.ink(pixels, line, mpp, rng, colour=config.pen_colour)
    return marked, blurred


Painted = tuple[Places, tuple[str, ...], NDArray[np.uint8]]


def _paint_focus(ground: Ground, label: str, difficulty: Difficulty) -> Painted:
    """Site 0 is the lesion's; without one, and at all other sites, there are lymphocytes."""
    dial, streams, canvas = FOCUS[difficulty], ground.streams, ground.canvas
    rng, free = streams("places"), ground.depth_um > 40
    sites, outlines = [], []
    for index in range(dial.crowds + 1):
        shape = streams("shape", index)
        outline = Outline(dial.radius_um * float(shape.uniform(0.9, 1.1)), 0.3, shape)
        place = take(free, outline.radius_um, rng, gap_um=60)
        if place is None and index == 0:
            raise _too_small(ground, "a lesion")
        if place is not None:
            sites.append(place)
            outlines.append(outline)
    ground.stroma()
    ground.furnish(free, lobules=6)
    truth = ground.truth()
    kinds = ["lesion" if label == "lesion" else "crowd"] + ["crowd"] * (len(sites) - 1)
    for index, (place, outline, kind) in enumerate(zip(sites, outlines, kinds, strict=True)):
        window, _, _ = canvas.around(place, outline.reach_um + 10)
        before = canvas.h[window].copy(), canvas.e[window].copy()
        structures.lymphocytes(canvas, ground.cells, place, outline, streams("crowd", index))
        if kind == "lesion":  # in place of the crowd, and in its colour
            target = structures.mean_light(canvas.h[window], canvas.e[window])
            canvas.h[window], canvas.e[window] = before
            structures.tumour(canvas, ground.cells, place, outline, dial.septa, streams("lesion"))
            structures.tint(canvas, place, outline, target)
            ground.mark(truth, place, outline, 255)
    return np.array(sites), tuple(kinds), truth


def _paint_arrangement(ground: Ground, label: str, difficulty: Difficulty) -> Painted:
    """Nests and follicles, half of the sites each; which stands where is all that the label decides."""
    dial, streams = ARRANGEMENT[difficulty], ground.streams
    rng, free = streams("places"), ground.depth_um > 40
    sites = pair_up(free, dial, rng)
    if sites is None:
        raise _too_small(ground, f"{dial.pairs} pairs of structures")
    for place in sites:
        clear(free, place, dial.radius_um + 20)
    ground.stroma()
    ground.furnish(free, lobules=0)
    rng = streams("kinds")
    if label == "mixed":
        pairs = rng.permuted([("nest", "follicle")] * dial.pairs, axis=1)
    else:
        pairs = rng.permutation([("nest", "nest"), ("follicle", "follicle")] * (dial.pairs // 2))
    kinds = tuple(str(kind) for kind in pairs.ravel())
    truth = ground.truth()
    count = {"nest": 0, "follicle": 0}
    for place, kind in zip(sites, kinds, strict=True):
        own = streams(kind, count[kind])  # the first nest is the same nest, wherever it stands
        count[kind] += 1
        if kind == "nest":
            outline = Outline(dial.radius_um, 0.0, own)
            structures.nest(ground.canvas, ground.cells, place, dial.radius_um, own)
        else:
            outline = Outline(0.8 * dial.radius_um, 0.08, own)  # a crowd's border is soft
            structures.lymphocytes(ground.canvas, ground.cells, place, outline, own)
        ground.mark(truth, place, outline, 128 if kind == "nest" else 255)
    return sites, kinds, truth


def write_phantoms(
    out: Path,
    *,
    task: Task,
    slides: int = 60,
    seed: int = 0,
    difficulty: Difficulty = "easy",
    config: PhantomConfig | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Draw a cohort into a folder; gives the path of its table. The same arguments give the same bytes.

    Writes `slides/*.tiff` (pyramids of JPEG tiles with their mpp), `truth/*.png` (see `Phantom`) and
    `truth/truth.csv` with its scale, `tissue/*.png` (white where tissue is, same scale), and last `slides.csv`
    (slide_id, patient_id, label, split, path). Half of the slides have either label, some patients have two, and
    whole patients go into train (60 %), valid (15 %) and test (25 %). `progress` is told (done, all). Raises
    `ConfigError`.
    """
    _check_cohort(task, difficulty, slides, workers)
    config = config or PhantomConfig()
    for folder in ("slides", "truth", "tissue"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    rows = plan(task, slides, seed)
    patients = list(dict.fromkeys(row.patient_id for row in rows))
    jobs = [
        Job(out, task, difficulty, config, row, (seed, index), (seed, patients.index(row.patient_id), 0))
        for index, row in enumerate(rows)
    ]
    for done, _ in enumerate(_run(jobs, workers), start=1):
        if progress is not None:
            progress(done, slides)
    legend = {"focus": "255 lesion", "arrangement": "128 nest of glands; 255 follicle"}[task]
    truth = [(row.slide_id, f"{row.slide_id}.png", config.truth_um, legend) for row in rows]
    _write_table(out / "truth" / "truth.csv", ("slide_id", "path", "um_per_px", "legend"), truth)
    table = [(*astuple(row), f"slides/{row.slide_id}.tiff") for row in rows]
    return _write_table(out / "slides.csv", ("slide_id", "patient_id", "label", "split", "path"), table)


@dataclass(frozen=True, slots=True)
class Row:
    """One slide of a cohort."""

    slide_id: str
    patient_id: str
    label: str
    split: str


@dataclass(frozen=True, slots=True)
class Job:
    """One slide to draw; what it shows follows from `seed`, and how it is stained from `stain_seed`."""

    out: Path
    task: Task
    difficulty: Difficulty
    config: PhantomConfig
    row: Row
    seed: tuple[int, ...]
    stain_seed: tuple[int, ...]


SPLITS = {"train": 0.6, "valid": 0.15, "test": 0.25}


def plan(task: str, slides: int, seed: int) -> list[Row]:
    """Who has which label, how many slides, and in which split: by patient, equal shares of either label."""
    rng = np.random.default_rng([seed, slides])
    patients: list[tuple[str, str, int]] = []  # label, split, slides
    for label, count in zip(LABELS[task], (slides - slides // 2, slides // 2), strict=True):
        sizes: list[int] = []
        while sum(sizes) < count:
            sizes.append(min(2 if len(sizes) % 4 == 3 else 1, count - sum(sizes)))
        wanted = {split: share * count for split, share in SPLITS.items()}
        for number, place in enumerate(rng.permutation(len(sizes))):
            # the first three patients leave no split empty
            split = (
                list(SPLITS)[number] if number < len(SPLITS) else max(wanted, key=lambda name: wanted[name])
            )
            wanted[split] -= sizes[place]
            patients.append((label, split, sizes[place]))
    rows = []
    for number, place in enumerate(rng.permutation(len(patients)), start=1):
        label, split, count = patients[place]
        rows += [
            Row(
                f"{task}-{number:03d}{'ab'[copy] if count == 2 else ''}",
                f"patient-{number:03d}",
                label,
                split,
            )
            for copy in range(count)
        ]
    return rows


def _run(jobs: list[Job], workers: int) -> Iterator[None]:
    if workers == 1:
        yield from map(_write_one, jobs)
        return
    # New processes, not forks: the caller may hold threads and a GPU.
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=cv2.setNumThreads, initargs=(1,)
    ) as pool:
        yield from pool.map(_write_one, jobs)


def _write_one(job: Job) -> None:
    name, config = job.row.slide_id, job.config
    stain = Stain.drawn(Streams(job.stain_seed)("stain"), config.stain_spread)
    phantom = draw_phantom(
        job.task, job.row.label, seed=job.seed, difficulty=job.difficulty, config=config, stain=stain
    )
    write_pyramid(job.out / "slides" / f"{name}.tiff", phantom.pixels, config)
    for folder, plane in (("truth", phantom.truth), ("tissue", phantom.tissue.astype(np.uint8) * 255)):
        png = cv2.imencode(".png", plane)[1].tobytes()
        with _whole(job.out / folder / f"{name}.png") as path:
            path.write_bytes(png)


def write_pyramid(path: Path, rgb: NDArray[np.uint8], config: PhantomConfig) -> None:
    """A tiled TIFF of JPEG tiles, each level half of the one before."""
    levels = [rgb]
    while max(levels[-1].shape) > 512:
        height, width = levels[-1].shape[:2]
        half = cv2.resize(levels[-1], (width // 2, height // 2), interpolation=cv2.INTER_AREA)
        levels.append(half.astype(np.uint8, copy=False))
    write_levels(path, levels, mpp=config.mpp, jpeg_quality=config.jpeg_quality)


def write_levels(path: Path, levels: Sequence[NDArray[np.uint8]], *, mpp: float, jpeg_quality: int) -> None:
    """Levels (h, w, 3), each half of the one before, as JPEG tiles of a TIFF, with um per pixel in its tags."""
    import tifffile  # slow to import, and only needed here

    with _whole(path) as temporary, tifffile.TiffWriter(temporary) as tiff:
        for index, level in enumerate(levels):
            per_cm = 1e4 / (mpp * 2**index)
            tiff.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": jpeg_quality},
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                subfiletype=1 if index else 0,
                metadata=None,
                software=False,
            )


def _write_table(path: Path, columns: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> Path:
    with _whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Another name to write under, so that the file is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    yield temporary
    temporary.replace(path)


def _check(task: str, difficulty: str, label: str | None = None) -> None:
    if task not in LABELS:
        raise ConfigError("phantom.task", f"there is no task {task!r}", f"give {' or '.join(LABELS)}")
    if difficulty not in FOCUS:
        raise ConfigError("phantom.difficulty", f"there is no {difficulty!r}", f"give {', '.join(FOCUS)}")
    if label is not None and label not in LABELS[task]:
        what = f"{task} has no label {label!r}"
        raise ConfigError("phantom.label", what, f"give {' or '.join(LABELS[task])}")


def _check_cohort(task: str, difficulty: str, slides: int, workers: int) -> None:
    _check(task, difficulty)
    if slides < 8:
        raise ConfigError("phantom.slides", f"{slides} are too few for three splits", "give at least 8")
    if workers < 1:
        raise ConfigError("phantom.workers", f"{workers} processes draw nothing", "give at least 1")


def _too_small(ground: Ground, what: str) -> ConfigError:
    height, width = ground.canvas.size_um
    return ConfigError(
        "phantom.least_um", f"{height:.0f} x {width:.0f} um have no room for {what}", "give larger sides"
    )
