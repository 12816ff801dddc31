"""What a training step holds for its backward pass, by the number of modules K: bytes, and the ratios to K = 1.

ResNet-34 with a stem stride of 3 on a square raster, border of zeros, all cells pooled; every module with its head
and its reconstruction. Measured are holoslide's step with each module in one tile (tiles of a fixed size would make
it all but independent of K and of the slide), and the same step in plain PyTorch. Held is what autograd saved and
has not freed yet, each storage once, parameters and buffers left out; the figure is the most that is held at any
moment of the step.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from benchmarks.common import Figure, HeldForBackward, Options, Result, main
from benchmarks.plain import PAPERS_HEADS, plain_step
from holoslide.models.classifier import LocalClassifier
from holoslide.models.options import BackboneConfig, ModelConfig, StreamConfig
from holoslide.models.streamed import StreamedClassifier
from holoslide.pixels import ArrayPixels
from holoslide.training.local import LocalStep

MODULES = (1, 2, 4, 8)
QUICK_PX, FULL_PX = 1500, 3000


def held_bytes(modules: int, side_px: int, device: torch.device, *, plain: bool) -> int:
    """The most that one step of ResNet-34 in K modules holds for backward, float32."""
    generator = torch.Generator(device).manual_seed(0)
    config = ModelConfig(
        backbone=BackboneConfig(name="resnet34", weights="none", stem_stride=3),
        modules=modules,
        heads=PAPERS_HEADS,
        border="zeros",
        pool="all",
    )
    model = LocalClassifier.from_config(config, classes=("no", "yes")).to(device)
    pixels_1CHW = torch.randint(256, (1, 3, side_px, side_px), generator=generator, device=device)
    step = LocalStep(StreamedClassifier(model, StreamConfig(tile_cells=side_px)))
    parameters = [t for m in (model, *_twins(step)) for t in (*m.parameters(), *m.buffers())]
    with HeldForBackward(parameters) as held:
        if plain:
            plain_step(model, pixels_1CHW, 1, generator=generator)
        else:
            pixels_HWC = pixels_1CHW[0].permute(1, 2, 0).to(torch.uint8).cpu().numpy()
            mask = np.ones((1, 1), np.bool_)
            slide = ArrayPixels(pixels_HWC, mask, mask_cell_px=side_px, glass=(240, 240, 240))
            step(slide, 1, generator=torch.Generator().manual_seed(0))
    if held.bytes_now:
        message = f"{held.bytes_now} bytes are still held after the step"
        raise RuntimeError(message)
    return held.most_bytes


def _twins(step: LocalStep) -> list[torch.nn.Module]:
    chains = (step.network.stem, *step.network.parts)
    return [segment.folded.twin for chain in chains for segment in chain.segments]


def measure(options: Options) -> Result:
    """`k<K>_bytes` and `k<K>_over_k1` of our step, `plain_k<K>_...` of the plain one.

    The patches to reconstruct have one size on every slide, so the smaller the raster, the more they weigh.
    """
    side_px = options.values["side"] or (QUICK_PX if options.quick else FULL_PX)
    figures: dict[str, Figure] = {}
    for prefix in ("", "plain_"):
        held = {k: held_bytes(k, side_px, options.device, plain=bool(prefix)) for k in MODULES}
        figures |= {f"{prefix}k{k}_over_k1": round(held[k] / held[1], 4) for k in MODULES[:0:-1]}
        figures |= {f"{prefix}k{k}_bytes": held[k] for k in MODULES}
    configuration = {"backbone": "resnet34", "stem_stride": 3, "side_px": side_px, "dtype": "float32"}
    return Result(figures=figures, configuration=configuration)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--side", type=int, metavar="PX", help=f"the raster's ({QUICK_PX}, --full {FULL_PX})")


if __name__ == "__main__":
    main("memory", __doc__, measure, add_arguments=_arguments)
