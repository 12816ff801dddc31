"""Is training in bf16 the same streamed as plain? Loss curves of 50 steps, held against what noise makes of them.

ResNet in K modules without pretrained weights, AdamW, one slide a step, two classes that differ by the colour of
some of their patches; borders of zeros and all cells voting, so that both executions do the same work with the same
draws. All runs start from the same weights.

gap        most that the streamed curve is from the plain one, at any step: total loss over the plain curve's mean.
noise_gap  the same for plain runs whose weights were first moved at random by half of what bf16 can tell apart.
float_gap  the same for a plain run in float32: what bf16 itself does.

Streamed is as good as plain where gap is no more than noise_gap. `..._mean` are means over the steps instead.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import Figure, Options, Result, main
from benchmarks.plain import plain_step, whole
from holoslide.models.calibration import calibrate
from holoslide.models.classifier import LocalClassifier
from holoslide.models.options import (
    BackboneConfig,
    HeadConfig,
    ModelConfig,
    ReconstructionConfig,
    StreamConfig,
)
from holoslide.models.streamed import StreamedClassifier
from holoslide.pixels import ArrayPixels
from holoslide.training.local import LocalStep

BF16_HALF_STEP = 2.0**-9
GLASS, CELL_PX, PATCH_PX, SLIDES = (243, 243, 243), 32, 24, 8
Run = Callable[[LocalClassifier, ArrayPixels, int, int], float]
"""From model, slide, label and step number to the total loss; gradients are added to `.grad`."""


def slides(side_px: int) -> list[ArrayPixels]:
    """Noise of one colour, classes in turn; every odd slide has a fifth of its patches in another."""
    return [_slide(side_px, odd=bool(n % 2), rng=np.random.default_rng(n)) for n in range(SLIDES)]


def _slide(side_px: int, *, odd: bool, rng: np.random.Generator) -> ArrayPixels:
    rgb: NDArray[np.uint8] = rng.integers(90, 200, (side_px, side_px, 3)).astype(np.uint8)
    if odd:
        for top, left in rng.integers(
            0, max(1, side_px - PATCH_PX), (max(1, (side_px // PATCH_PX) ** 2 // 5), 2)
        ):
            rgb[top : top + PATCH_PX, left : left + PATCH_PX, 0] //= 2
    return ArrayPixels(rgb, mask_cell_px=CELL_PX, glass=GLASS)


def network(options: Options, side_px: int) -> LocalClassifier:
    """The model all runs start from, its BatchNorm statistics taken from two of the slides."""
    config = ModelConfig(
        backbone=BackboneConfig(name=options.values["backbone"], weights="none"),
        modules=options.values["modules"],
        border="zeros",
        pool="all",
        heads=HeadConfig(norm="slide", kernel=3),
        reconstruction=ReconstructionConfig(patches=4, side=8),
    )
    generator = torch.Generator().manual_seed(0)
    model = LocalClassifier.from_config(config, classes=("even", "odd"), generator=generator)
    device = torch.device("cpu")
    pixels = torch.cat([whole(slide, device) for slide in slides(side_px)[:2]])
    shift, scale = model.mean.view(1, 3, 1, 1), model.std.view(1, 3, 1, 1)
    calibrate(model, (pixels / 255 - shift) / scale)
    return model.to(options.device).to(memory_format=torch.channels_last)


def curve(
    model: LocalClassifier, cohort: Sequence[ArrayPixels], run: Run, *, steps: int, lr: float
) -> list[float]:
    """The total loss at each step of a run of one slide a step."""
    optimizer = torch.optim.AdamW(model.parameter_groups(lr), lr=lr, weight_decay=0.01)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        number = step % len(cohort)
        losses.append(run(model, cohort[number], number % 2, step))
        optimizer.step()
    return losses


def plain_run(mixed: torch.dtype | None) -> Run:
    """Plain execution, in autocast's dtype."""

    def run(model: LocalClassifier, slide: ArrayPixels, label: int, step: int) -> float:
        pixels_1CHW = whole(slide, next(model.parameters()).device)
        draws = torch.Generator().manual_seed(step)
        result = plain_step(model, pixels_1CHW, label, slide=slide, mixed=mixed, generator=draws)
        return sum(result.classification) + sum(result.reconstruction)

    return run


def streamed_run(model: LocalClassifier, tile_cells: int) -> Run:
    """Streamed execution of this very model in bf16, each slide in several tiles of every map."""
    config = StreamConfig(tile_cells=tile_cells)
    local = LocalStep(StreamedClassifier(model, config, mixed=torch.bfloat16))

    def run(_: LocalClassifier, slide: ArrayPixels, label: int, step: int) -> float:
        result = local(slide, label, generator=torch.Generator().manual_seed(step))
        return sum(result.classification) + sum(result.reconstruction)

    return run


def shaken(model: LocalClassifier, seed: int) -> LocalClassifier:
    """A copy whose every weight is off by at most half a step of bf16."""
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in twin.parameters():
            noise = 2 * torch.rand(parameter.shape, generator=generator) - 1
            parameter.mul_(1 + BF16_HALF_STEP * noise.to(parameter))
    return twin


def gap(curve_a: Sequence[float], curve_b: Sequence[float]) -> tuple[float, float]:
    """The most and the mean difference of two curves, over the mean of the second."""
    scale = statistics.mean(curve_b)
    gaps = [abs(a - b) / scale for a, b in zip(curve_a, curve_b, strict=True)]
    return max(gaps), statistics.mean(gaps)


def measure(options: Options) -> Result:
    """The gaps, and the curves themselves in the configuration."""
    values = options.values
    side_px = values["side"] or (192 if options.quick else 384)
    steps, noises = values["steps"], values["noises"] or (1 if options.quick else 3)
    model, cohort, bf16 = network(options, side_px), slides(side_px), torch.bfloat16

    def train(start: LocalClassifier, run: Run) -> list[float]:
        return curve(start, cohort, run, steps=steps, lr=values["lr"])

    plain = train(copy.deepcopy(model), plain_run(bf16))
    mine = copy.deepcopy(model)
    curves = {"streamed": train(mine, streamed_run(mine, values["tile"]))}
    for seed in range(1, noises + 1):
        curves[f"noise_{seed}"] = train(shaken(model, seed), plain_run(bf16))
    curves["float32"] = train(copy.deepcopy(model), plain_run(None))
    gaps = {name: gap(found, plain) for name, found in curves.items()}
    noise = [pair for name, pair in gaps.items() if name.startswith("noise")]
    figures: dict[str, Figure] = {
        "gap": round(gaps["streamed"][0], 5),
        "gap_mean": round(gaps["streamed"][1], 5),
        "noise_gap": round(max(most for most, _ in noise), 5),
        "noise_gap_mean": round(max(mean for _, mean in noise), 5),
        "float_gap": round(gaps["float32"][0], 5),
        "float_gap_mean": round(gaps["float32"][1], 5),
        "first_loss": round(statistics.mean(plain[: len(cohort)]), 4),
        "last_loss": round(statistics.mean(plain[-len(cohort) :]), 4),
    }
    shown = {name: [round(loss, 5) for loss in found] for name, found in {"plain": plain, **curves}.items()}
    return Result(
        figures=figures, configuration={**values, "side": side_px, "slides": SLIDES, "curves": shown}
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", default="resnet34", help="by torchvision's name (resnet34)")
    parser.add_argument("--modules", type=int, default=4, metavar="K", help="locally trained modules (4)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="of the optimiser (50)")
    parser.add_argument("--side", type=int, metavar="PX", help="the rasters' (192, --full 384)")
    parser.add_argument(
        "--tile", type=int, default=24, metavar="CELLS", help="tile side of the streamed run (24)"
    )
    parser.add_argument("--noises", type=int, metavar="N", help="plain runs with noise (1, --full 3)")
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate of the heads (3e-4)")


if __name__ == "__main__":
    main("curve", __doc__, measure, add_arguments=_arguments)
