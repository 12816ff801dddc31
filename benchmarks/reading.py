"""What it takes to read windows of a prepared slide, as training does, beside tifffile decoding the whole raster.

A drawn slide is prepared, and all its windows with tissue are read, as plans cut them and as training turns, flips
and recolours them. CPU time of one process, one thread at work, in turns; medians.

<window>_over_decode            all windows as they are, over tifffile's time for the raster, decoded once.
<window>_augmented_over_decode  the same, turned, flipped and recoloured by eight draws.
<window>_augmented_mpx_s        million pixels of windows so read in a second of CPU.
<window>_speedup                how many times faster `readers` threads read them than one: wall time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import tifffile
import torch

from benchmarks.common import Figure, Options, Result, cpu_s, main, paired
from benchmarks.prepare import cases
from holoslide.geometry import Box
from holoslide.pixels import Pixels
from holoslide.slides.augment import AugmentConfig, Augmented, draw
from holoslide.slides.prepare import PrepareConfig, PrepareJob, prepare_slide
from holoslide.slides.raster import Raster
from holoslide.streaming.host import cores
from holoslide.streaming.sources import PixelSource

QUICK_PX, FULL_PX = 4096, 12288
HALO_PX = 16  # of ResNet's stem
DRAWS = 8
WINDOWS_PX = (512, 2048)


def windows(pixels: Pixels, side_px: int) -> list[Box]:
    """Those with tissue, each with its halo."""
    frame, cell_px = Box(0, 0, *pixels.shape_px), pixels.mask_cell_px
    tiles = [tile.times(side_px).intersect(frame) for tile in frame.cover(side_px).tiles(1)]
    tissue = [tile for tile in tiles if pixels.mask[tile.cover(cell_px).slices].any()]
    return [Box(t.top - HALO_PX, t.left - HALO_PX, t.bottom + HALO_PX, t.right + HALO_PX) for t in tissue]


def read(path: Path, side_px: int, draws: Sequence[int | None]) -> None:
    """All windows once for each draw; None is the slide as it is."""
    for number in draws:
        with Raster.open(path) as raster:
            pixels: Pixels = raster
            if number is not None:
                how = draw(AugmentConfig(), raster.shape_px, np.random.default_rng(number))
                pixels = Augmented(raster, how)
            for box in windows(pixels, side_px):
                pixels.read(box)


def augmented_px(path: Path, side_px: int) -> int:
    """Pixels of all windows of all draws."""
    total = 0
    with Raster.open(path) as raster:
        for number in range(DRAWS):
            how = draw(AugmentConfig(), raster.shape_px, np.random.default_rng(number))
            total += sum(box.area for box in windows(Augmented(raster, how), side_px))
    return total


def by_readers(path: Path, side_px: int, readers: int) -> None:
    """As a GPU's step reads a slide: window after window."""
    with Raster.open(path) as raster:
        source = PixelSource(
            Augmented(raster, draw(AugmentConfig(), raster.shape_px, np.random.default_rng(0))),
            mean=torch.zeros(3), std=torch.ones(3), device=torch.device("cpu"), dtype=torch.float32,
            readers=readers,
        )  # fmt: skip
        for box in windows(source.pixels, side_px):
            source.windows([box])


def whole(path: Path) -> None:
    """The raster at once, by tifffile."""
    with tifffile.TiffFile(path) as tiff:
        tiff.pages[0].asarray(maxworkers=1)


def compare(path: Path, side_px: int, *, rounds: int, readers: int) -> dict[str, Figure]:
    """The figures of windows of one side."""
    each: dict[str, list[float]] = {"decode": [], "read": [], "augmented": []}
    for _ in range(rounds + 1):
        each["decode"].append(cpu_s(lambda: whole(path)))
        each["read"].append(cpu_s(lambda: read(path, side_px, [None])))
        each["augmented"].append(cpu_s(lambda: read(path, side_px, range(DRAWS))))
    found = {name: statistics.median(seconds[1:]) for name, seconds in each.items()}
    figures: dict[str, Figure] = {
        "over_decode": round(found["read"] / found["decode"], 2),
        "augmented_over_decode": round(found["augmented"] / DRAWS / found["decode"], 2),
        "augmented_mpx_s": round(augmented_px(path, side_px) / found["augmented"] / 1e6, 1),
    }
    if readers > 1:
        times = paired(
            lambda: by_readers(path, side_px, readers), lambda: by_readers(path, side_px, 1), rounds=rounds
        )
        figures["speedup"] = round(times.ratio, 2)
    return figures


def measure(options: Options) -> Result:
    """For windows of two sides."""
    side, rounds, readers = FULL_PX, options.values["rounds"], options.values["readers"]
    if options.quick:
        side = QUICK_PX
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drawn = cases(folder, side, folder)[0]
        prepare_slide(PrepareJob("one", Path(drawn.path), 1.0), folder, PrepareConfig(mpp=1.0))
        for side_px in WINDOWS_PX:
            found = compare(folder / "one.tif", side_px, rounds=rounds, readers=readers)
            figures |= {f"w{side_px}_{key}": value for key, value in found.items()}
        with Raster.open(folder / "one.tif") as raster:
            figures |= {"raster_mpx": round(np.prod(raster.shape_px) / 1e6, 1)}
            figures |= {"tissue_share": round(raster.tissue_px / float(np.prod(raster.shape_px)), 3)}
    return Result(figures=figures, configuration={"side_px": side, "rounds": rounds, "readers": readers})


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--readers", type=int, default=cores(), metavar="N", help="threads (one a core)")


if __name__ == "__main__":
    main("reading", __doc__, measure, add_arguments=_arguments)
