"""From a slide's file to its prediction, everything counted: holoslide beside MIL on patches twice as fine.

Both have ResNet-18 up to layer3. holoslide prepares the slide at `--mpp` and runs it once. MIL, as its users would
run it, has the slide at half of that, cut into patches of 256 px that are at least half tissue, each through the
network, then ABMIL. Figures are CPU seconds of one slide, all threads, imports and the plan left out, in processes
of their own; the least of a few rounds in turns. `mil_over_ours` says how many times more MIL takes.

The slide is drawn tissue at 0.5 um with levels 4 and 16 times coarser, as scanners write them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray

from benchmarks.common import REPO, Figure, Options, Result, cpu_s, main
from benchmarks.mil import features
from benchmarks.mil_models import MODELS
from holoslide.inference.predict import score_slide
from holoslide.models.classifier import LocalClassifier
from holoslide.models.memory import plan_for
from holoslide.models.options import BackboneConfig, InputConfig, ModelConfig, StreamConfig
from holoslide.models.precision import mixed_dtype
from holoslide.models.streamed import StreamedClassifier
from holoslide.slides.phantom import LABELS, PhantomConfig, draw_phantom
from holoslide.slides.prepare import PrepareConfig, PrepareJob, prepare_slide
from holoslide.slides.raster import Raster

QUICK_PX, FULL_PX = 8192, 24576
PATCH_PX = 256
CPU = torch.device("cpu")


def classifier(modules: int) -> LocalClassifier:
    """ResNet-18 up to layer3; weights do not change the time."""
    backbone = BackboneConfig(name="resnet18", weights="none", truncate="layer3")
    config = ModelConfig(backbone=backbone, modules=modules)
    generator = torch.Generator().manual_seed(0)
    inputs = InputConfig(glass=(243, 243, 243))
    return LocalClassifier.from_config(
        config, classes=("no", "yes"), inputs=inputs, generator=generator
    ).eval()


def by_holoslide(slide: Path, mpp: float) -> dict[str, float]:
    """CPU seconds of preparing and of the network."""
    network = StreamedClassifier(classifier(3), StreamConfig(memory_gib=4), mixed=mixed_dtype("auto", CPU))

    with tempfile.TemporaryDirectory() as folder:
        seconds = cpu_s(lambda: _prepare(slide, mpp, Path(folder)))
        with Raster.open(Path(folder) / "one.tif") as raster:
            network.follow(plan_for(network, raster, training=False))  # once for a cohort
            return {"prepare_s": seconds, "network_s": cpu_s(lambda: score_slide(network, raster))}


def by_mil(slide: Path, mpp: float) -> dict[str, float]:
    """The same of patches at twice the resolution."""
    encoder, head = classifier(1), MODELS["abmil"](256, 2).eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        seconds = cpu_s(lambda: _prepare(slide, mpp / 2, Path(folder)))
        with Raster.open(Path(folder) / "one.tif") as raster:
            return {
                "prepare_s": seconds,
                "network_s": cpu_s(lambda: head(features(encoder, raster, PATCH_PX))),
            }


def _prepare(slide: Path, mpp: float, out: Path) -> None:
    prepare_slide(PrepareJob("one", slide, 0.5), out, PrepareConfig(mpp=mpp))


def apart(tool: str, slide: Path, mpp: float) -> dict[str, float]:
    """One way, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", "from benchmarks.prediction import _answer; _answer()"],
        input=json.dumps([tool, str(slide), mpp]), stdout=subprocess.PIPE, text=True, check=True, cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)
    return found


def _answer() -> None:
    tool, slide, mpp = json.loads(sys.stdin.read())
    found = {"holoslide": by_holoslide, "mil": by_mil}[tool](Path(slide), mpp)
    sys.stdout.write(json.dumps(found))


def draw(path: Path, side: int) -> None:
    """A square slide at 0.5 um, all tissue but what the drawing leaves bare."""
    config = PhantomConfig(mpp=2.0, least_um=4000, most_um=4200)
    tile = draw_phantom("focus", LABELS["focus"][0], seed=(1, 1), config=config).pixels[:2048, :2048]
    rgb = np.tile(tile, (-(-side // tile.shape[0]), -(-side // tile.shape[1]), 1))[:side, :side]
    with tifffile.TiffWriter(path) as tiff:
        for level in range(3):
            tiff.write(
                _smaller(rgb, 4**level), tile=(256, 256), photometric="rgb", compression="jpeg",
                compressionargs={"level": 85}, metadata=None, subfiletype=int(level > 0),
                resolution=(20_000 / 4**level,) * 2, resolutionunit="CENTIMETER",
            )  # fmt: skip


def _smaller(rgb: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    height, width = (n // factor for n in rgb.shape[:2])
    cells = rgb[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    result: NDArray[np.uint8] = cells.mean(axis=(1, 3)).astype(np.uint8)
    return result


def measure(options: Options) -> Result:
    """CPU seconds of either way's two parts, and the ratio of the sums."""
    side = options.values["side"] or (QUICK_PX if options.quick else FULL_PX)
    rounds, mpp = options.values["rounds"], options.values["mpp"]
    least: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        slide = Path(folder) / "drawn.tif"
        draw(slide, side)
        for _ in range(rounds):
            for tool in ("holoslide", "mil"):
                for part, seconds in apart(tool, slide, mpp).items():
                    key = f"{tool}_{part}"
                    least[key] = min(least.get(key, seconds), seconds)
    ours, theirs = (
        sum(least[f"{tool}_{part}"] for part in ("prepare_s", "network_s")) for tool in ("holoslide", "mil")
    )
    figures: dict[str, Figure] = {name: round(seconds, 2) for name, seconds in least.items()}
    figures["mil_over_ours"] = round(theirs / ours, 2)
    figures["network_over_ours"] = round(least["mil_network_s"] / least["holoslide_network_s"], 2)
    return Result(figures=figures, configuration={"side_px": side, "rounds": rounds, "mpp": mpp})


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--side", type=int, metavar="PX", help=f"of the drawn slide ({QUICK_PX}, --full {FULL_PX})"
    )
    parser.add_argument("--rounds", type=int, default=2, metavar="N")
    parser.add_argument("--mpp", type=float, default=2.0, metavar="UM", help="holoslide's um per pixel (2)")


if __name__ == "__main__":
    main("prediction", __doc__, measure, add_arguments=_arguments)
