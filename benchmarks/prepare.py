"""CPU time of `prepare` per output pixel, beside pyvips on the same work: decode, average, write a JPEG pyramid.

Both read the same file, and write 256-pixel JPEG tiles of quality 90, 4:4:4, in a pyramid. Ours gets a mask of the
whole slide, so that it leaves nothing out and looks for nothing; `_with_tissue` is `prepare` as it comes, which
looks for tissue, pen and blur, and writes only what it found. CPU time is user and system time of one process, all
its threads, imports left out; the least of a few rounds, in turns. Goal: at most 1.2 times pyvips.

`_two_threads` is how many times faster `prepare` as it comes is with two threads in its process: wall time, the
median of rounds in turns.

Slides: drawn tissue as a TIFF of one level of JPEG tiles at 0.5 um, so that all of level 0 must be decoded, brought
to 2 um and kept at 0.5 um; and a real SVS of JPEG, if it is there (pyvips as packaged reads none of JPEG 2000).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import tifffile

from benchmarks.common import REPO, Figure, Options, Result, cpu_s, main
from holoslide.slides.phantom import LABELS, PhantomConfig, draw_phantom

QUICK_PX, FULL_PX = 4096, 12288
THREAD_ROUNDS = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A slide, its um per pixel, and those of the raster."""

    name: str
    path: str
    mpp: float
    out_mpp: float


def by_holoslide(case: Case, mask: str | None) -> dict[str, float]:
    """Seconds and pixels of one raster; to be run in a process of its own."""
    from holoslide.slides.prepare import PrepareConfig, PrepareJob, prepare_slide
    from holoslide.slides.raster import Raster

    config = PrepareConfig(mpp=case.out_mpp)
    job = PrepareJob("one", Path(case.path), case.mpp, None if mask is None else Path(mask))
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first"
        first.mkdir()
        prepare_slide(
            dataclasses.replace(job, path=Path(case.path)), first, config
        )  # libraries loaded, file cached
        out = Path(folder) / "out"
        out.mkdir()
        seconds = cpu_s(lambda: prepare_slide(job, out, config))
        with Raster.open(out / "one.tif") as raster:
            pixels = raster.shape_px[0] * raster.shape_px[1] if mask is not None else raster.tissue_px
    return {"seconds": seconds, "pixels": pixels}


def by_threads(case: Case, mask: str | None) -> dict[str, float]:
    """Wall seconds of `prepare` as it comes with one thread over those with two, rounds in turns."""
    del mask
    from holoslide.slides.prepare import PrepareConfig, PrepareJob, prepare_slide

    cv2.setNumThreads(1)  # OpenCV would take more by itself
    job, config = PrepareJob("one", Path(case.path), case.mpp), PrepareConfig(mpp=case.out_mpp)

    def seconds(threads: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            prepare_slide(job, Path(folder), config, threads=threads)
            return time.perf_counter() - started

    seconds(2)  # libraries loaded, file cached
    return {"speedup": float(np.median([seconds(1) / seconds(2) for _ in range(THREAD_ROUNDS)]))}


def by_pyvips(case: Case, mask: str | None) -> dict[str, float]:
    """The same by pyvips."""
    import pyvips

    del mask
    found: dict[str, float] = {}

    def work(out: str) -> None:
        image = pyvips.Image.new_from_file(case.path, access="sequential")
        image = image.extract_band(0, n=3) if image.bands > 3 else image
        if case.out_mpp > case.mpp:
            image = image.resize(case.mpp / case.out_mpp, kernel="linear")
        image.tiffsave(
            out, tile=True, tile_width=256, tile_height=256, pyramid=True, compression="jpeg", Q=90
        )
        found["pixels"] = image.width * image.height

    with tempfile.TemporaryDirectory() as folder:
        work(f"{folder}/first.tif")
        seconds = cpu_s(lambda: work(f"{folder}/out.tif"))
    return {"seconds": seconds, **found}


def apart(tool: str, case: Case, mask: str | None) -> dict[str, float]:
    """One tool on one case in a process of its own, of one thread where that can be said."""
    given = json.dumps([tool, dataclasses.asdict(case), mask])
    threads = {"VIPS_CONCURRENCY": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "from benchmarks.prepare import _answer; _answer()"],
        input=given, stdout=subprocess.PIPE, text=True, check=True, cwd=REPO, env={**os.environ, **threads},
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _answer() -> None:
    tool, case, mask = json.loads(sys.stdin.read())
    tools = {"holoslide": by_holoslide, "pyvips": by_pyvips, "threads": by_threads}
    found = tools[tool](Case(**case), mask)
    sys.stdout.write(json.dumps(found))


def compare(case: Case, rounds: int, folder: Path) -> dict[str, Figure]:
    """Microseconds of CPU per 1,000 output pixels of either, and ours over theirs."""
    mask = folder / "whole.png"
    with tifffile.TiffFile(case.path) as tiff:
        height, width = tiff.pages[0].shape[:2]
    cv2.imwrite(str(mask), np.full((max(1, height // 64), max(1, width // 64)), 255, np.uint8))
    tools: dict[str, tuple[str, str | None]] = {
        "holoslide": ("holoslide", str(mask)), "pyvips": ("pyvips", None), "with_tissue": ("holoslide", None),
    }  # fmt: skip
    least = dict.fromkeys(tools, np.inf)
    for _ in range(rounds):
        for name, (tool, given) in tools.items():
            found = apart(tool, case, given)
            least[name] = min(least[name], found["seconds"] / found["pixels"])
    figures: dict[str, Figure] = {
        f"{case.name}_{name}_us_per_1000_px": round(value * 1e9, 1) for name, value in least.items()
    }
    figures[f"{case.name}_ratio"] = round(least["holoslide"] / least["pyvips"], 2)
    figures[f"{case.name}_two_threads"] = round(apart("threads", case, None)["speedup"], 2)
    return figures


def cases(folder: Path, side: int, data: Path) -> list[Case]:
    """What is compared."""
    config = PhantomConfig(mpp=2.0, least_um=4000, most_um=4200)
    tile = draw_phantom("focus", LABELS["focus"][0], seed=(1, 1), config=config).pixels[:2048, :2048]
    rgb = np.tile(tile, (-(-side // tile.shape[0]), -(-side // tile.shape[1]), 1))[:side, :side]
    path = folder / "drawn.tif"
    tifffile.imwrite(
        path, rgb, tile=(256, 256), photometric="rgb", compression="jpeg", compressionargs={"level": 85},
        metadata=None, resolution=(20_000, 20_000), resolutionunit="CENTIMETER",
    )  # fmt: skip
    found = [Case("jpeg_to_2um", str(path), 0.5, 2.0), Case("jpeg_to_0.5um", str(path), 0.5, 0.5)]
    real = data / "wsi" / "CMU-1-Small-Region.svs"
    if real.exists():
        found.append(Case("svs_to_0.5um", str(real), 0.499, 0.499))
    return found


def measure(options: Options) -> Result:
    """For each case: `_holoslide`, `_pyvips` and `_with_tissue` in us of CPU per 1,000 pixels, and `_ratio`."""
    side = options.values["side"] or (QUICK_PX if options.quick else FULL_PX)
    rounds = options.values["rounds"]
    figures: dict[str, Figure] = {}
    data = Path(os.environ.get("HOLOSLIDE_TEST_DATA", REPO.parent / "shared" / "data"))
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder), side, data):
            figures |= compare(case, rounds, Path(folder))
    return Result(figures=figures, configuration={"side_px": side, "rounds": rounds})


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--side", type=int, metavar="PX", help=f"of the drawn slide ({QUICK_PX}, --full {FULL_PX})"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N")


if __name__ == "__main__":
    main("prepare", __doc__, measure, add_arguments=_arguments)
