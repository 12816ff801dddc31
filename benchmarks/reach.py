"""How large a slide each method can train on: peak memory by the side of the slide, 30 % of it tissue.

ResNet-34, float32 (in bf16 all maps are half as large), one slide a step, AdamW. Counted are the bytes of all
tensors alive at once, with weights, gradients and moments; on small slides, which gives the line in the slide's
area, since every map grows with it (`line_error`: how far the middle one of three is off it). `<method>_mb_<side>`
are megabytes on a slide of that side; `<method>_side_<n>gib` is the side in px at which the line reaches so many
GiB, where the method fails.

end_to_end    plain PyTorch, one loss
checkpointed  the same, each of the eight units recomputed in the backward pass (torch.utils.checkpoint)
paper         locally supervised, K = 8, each module on its whole map, the method's own patches
mil           frozen features of patches of 256 px, then ABMIL; what stays is the features
holoslide_k8, holoslide_k1   the plan's peak under a budget of 4 GiB, which training obeys; what does not fit lives
              in a file of `<method>_file_mb_<side>`
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.common import Figure, Options, Result, main
from benchmarks.mil_models import MODELS
from benchmarks.plain import normalised, plain_step
from benchmarks.slides import NoisePixels
from benchmarks.streaming import resnet34
from holoslide.models.classifier import LocalClassifier
from holoslide.models.heads import Head
from holoslide.models.memory import plan_for
from holoslide.models.options import StreamConfig
from holoslide.models.streamed import StreamedClassifier, head_map
from holoslide.streaming.cost import PeakBytes
from holoslide.streaming.plan import parameter_bytes

QUICK_PX, FULL_PX = (384, 480, 576), (768, 1152, 1536)
SIDES_PX = (3000, 10_000, 40_000, 80_000)
DEVICES_GIB = (8, 24, 80)
BUDGET_GIB = 4.0
TISSUE = 0.3  # plain execution takes the whole raster all the same
PATCH_PX, PATCHES_AT_ONCE, FEATURES = 256, 16, 512
MOMENTS = 4  # weights, gradients, two moments


def end_to_end(side_px: int, *, recompute: bool = False) -> int:
    """Bytes of one step of the whole network on the whole slide."""
    model = resnet34(1)
    head = cast("Head", model.heads[0])
    pixels_1CHW = torch.randint(256, (1, 3, side_px, side_px), dtype=torch.uint8)
    with PeakBytes() as counted:
        with torch.no_grad():
            features_BCHW: Tensor = model.stem(normalised(model, pixels_1CHW))
        for unit in cast("nn.Sequential", model.parts[0]):
            if recompute:
                features_BCHW = checkpoint(unit, features_BCHW, use_reentrant=False)
            else:
                features_BCHW = unit(features_BCHW)
        cells_NC = head_map(head, features_BCHW)[0].flatten(1).T
        loss = F.cross_entropy(head.readout(cells_NC), torch.tensor(1))
        torch.autograd.backward([loss])
    return int(counted.peak) + _weights(model)


def checkpointed(side_px: int) -> int:
    """Bytes of the same, units recomputed."""
    return end_to_end(side_px, recompute=True)


def paper(side_px: int) -> int:
    """Bytes of the paper's step."""
    model = resnet34(8)
    pixels_1CHW = torch.randint(256, (1, 3, side_px, side_px), dtype=torch.uint8)
    with PeakBytes() as counted:
        plain_step(model, pixels_1CHW, 1, generator=torch.Generator().manual_seed(0))
    return int(counted.peak) + _weights(model)


def mil(side_px: int) -> int:
    """Bytes of features, patches by the batch, and then of a step on them; the larger."""
    model, bag = resnet34(1).eval(), MODELS["abmil"](FEATURES, 2)
    count = max(1, int(TISSUE * (side_px // PATCH_PX) ** 2))
    with PeakBytes() as counted:
        with torch.no_grad():
            batch = torch.randint(
                256, (min(count, PATCHES_AT_ONCE), 3, PATCH_PX, PATCH_PX), dtype=torch.uint8
            )
            model.parts[0](model.stem(normalised(model, batch)))
        del batch
        logits_L, _ = bag(torch.rand(count, FEATURES), 1)
        torch.autograd.backward([F.cross_entropy(logits_L, torch.tensor(1))])
    return int(counted.peak) + parameter_bytes(model) + MOMENTS * parameter_bytes(bag)


WHOLE: dict[str, Callable[[int], int]] = {
    "end_to_end": end_to_end,
    "checkpointed": checkpointed,
    "paper": paper,
}


def _weights(model: LocalClassifier) -> int:
    # Gradients are made while it is counted.
    return (MOMENTS - 1) * parameter_bytes(model)


def planned(modules: int, side_px: int) -> tuple[int, int]:
    """Peak bytes, and bytes in a file, of training on a slide under the budget."""
    network = StreamedClassifier(resnet34(modules), StreamConfig(memory_gib=BUDGET_GIB))
    plan = plan_for(network, NoisePixels(side_px, tissue=TISSUE), training=True)
    assert plan is not None
    return plan.peak_bytes, plan.file_bytes


def measure(options: Options) -> Result:
    """Megabytes by side, and the largest side by device."""
    small, middle, large = QUICK_PX if options.quick else FULL_PX
    figures: dict[str, Figure] = {"line_error": 0.0}
    for method, step in WHOLE.items():
        first, between, second = step(small), step(middle), step(large)
        slope = (second - first) / (large**2 - small**2)
        fixed = second - slope * large**2
        error = abs(between - fixed - slope * middle**2) / between
        figures["line_error"] = round(max(float(figures["line_error"] or 0), error), 4)
        figures |= {f"{method}_mb_{side}": round((fixed + slope * side**2) / 1e6) for side in SIDES_PX}
        for gib in DEVICES_GIB:
            figures[f"{method}_side_{gib}gib"] = int(math.sqrt(max(0, gib * 2**30 - fixed) / slope))
    figures |= {f"mil_mb_{side}": round(mil(side) / 1e6) for side in SIDES_PX}
    for modules in (8, 1):
        for side in SIDES_PX:
            peak, in_file = planned(modules, side)
            figures[f"holoslide_k{modules}_mb_{side}"] = round(peak / 1e6)
            figures[f"holoslide_k{modules}_file_mb_{side}"] = round(in_file / 1e6)
    configuration = {
        "backbone": "resnet34", "dtype": "float32", "measured_px": [small, middle, large],
        "budget_gib": BUDGET_GIB, "tissue": TISSUE,
    }  # fmt: skip
    return Result(figures=figures, configuration=configuration)


if __name__ == "__main__":
    main("reach", __doc__, measure)
