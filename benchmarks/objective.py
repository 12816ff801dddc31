"""What heads and reconstruction cost: a training step with them, beside the modules' own two passes alone.

Each module is run forwards and, from a gradient that is given, backwards; then the whole step without
reconstruction; then as it is. Taken in turn on one slide, half of it tissue, for several sides of it, in float32:
`<network>_<side>_share` is what heads and reconstruction add together, as a share of the step (the goal is a
quarter at most), `..._heads` what the heads alone add, `..._reconstruction` the rest. `share` is the largest.
"""

from __future__ import annotations

import dataclasses
import statistics

import torch
from torch import Tensor

from benchmarks.common import Figure, Options, Result, in_turn, main
from benchmarks.slides import GLASS, NoisePixels
from benchmarks.steps import Step, streamed
from holoslide.models.classifier import LocalClassifier
from holoslide.models.memory import plan_for
from holoslide.models.options import (
    BackboneConfig,
    InputConfig,
    ModelConfig,
    ReconstructionConfig,
    StreamConfig,
)
from holoslide.models.streamed import StreamedClassifier
from holoslide.streaming.features import Batch
from holoslide.streaming.tiled import OutputGradient

NETWORKS = {
    "resnet18_k3": ModelConfig(
        backbone=BackboneConfig(name="resnet18", weights="none", truncate="layer3"), modules=3
    ),
    "resnet34_k4": ModelConfig(backbone=BackboneConfig(name="resnet34", weights="none"), modules=4),
}
TISSUE = 0.5


def made(config: ModelConfig, slide: NoisePixels) -> StreamedClassifier:
    """The network with a plan for the slide; its weights are the same each time."""
    model = LocalClassifier.from_config(
        config,
        classes=("no", "yes"),
        inputs=InputConfig(glass=GLASS),
        generator=torch.Generator().manual_seed(0),
    ).to(memory_format=torch.channels_last)
    network = StreamedClassifier(model, StreamConfig())
    network.follow(plan_for(network, slide, training=True))
    return network


def modules_alone(network: StreamedClassifier, slide: NoisePixels) -> Step:
    """Both passes of every module, as a step has them, from a gradient of ones instead of a loss's."""

    def ones(batch: Batch, result_BCHW: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(result_BCHW, torch.ones_like(result_BCHW))]

    def run() -> float:
        network.model.zero_grad()
        features = network.stem_map(slide, training=True)
        for k, group in enumerate(network.groups):
            output = network.part_map(k, features, training=True)
            network.backward(group, [features, output], [OutputGradient(ones)])
            features.free()
            features = output
        features.free()
        return 0.0

    return run


def shares(config: ModelConfig, side_px: int, rounds: int) -> dict[str, float]:
    """What heads and reconstruction add, as shares of the step, and its seconds."""
    slide = NoisePixels(side_px, tissue=TISSUE)
    network = made(config, slide)
    bare = made(dataclasses.replace(config, reconstruction=ReconstructionConfig(alpha=0)), slide)
    steps = modules_alone(network, slide), streamed(bare, slide), streamed(network, slide)
    alone, headed, whole = (statistics.median(times) for times in in_turn(*steps, rounds=rounds))
    return {
        "share": round(1 - alone / whole, 3),
        "heads": round((headed - alone) / whole, 3),
        "reconstruction": round((whole - headed) / whole, 3),
        "seconds": round(whole, 2),
    }


def measure(options: Options) -> Result:
    """The shares by network and side."""
    sides, rounds = ((512,), 1) if options.quick else ((1000, 2000), 3)
    names = ("resnet18_k3",) if options.quick else tuple(NETWORKS)
    found = {f"{name}_{side}": shares(NETWORKS[name], side, rounds) for name in names for side in sides}
    figures: dict[str, Figure] = {
        f"{name}_{key}": value for name, each in found.items() for key, value in each.items()
    }
    figures["share"] = max(each["share"] for each in found.values())
    return Result(figures=figures, configuration={"dtype": "float32", "tissue": TISSUE, "rounds": rounds})


if __name__ == "__main__":
    main("objective", __doc__, measure)
