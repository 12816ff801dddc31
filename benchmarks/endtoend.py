"""End to end (K = 1): the streamed step beside the plain one, and beside lightstream 1.0.7 where it is installed.

ResNet-34 without pretrained weights on an all-tissue raster, borders of zeros, one head, no reconstruction.

recompute_ratio         bf16, every graph made anew: seconds over the plain step's.
kept_ratio              bf16, graphs kept as far as the budget goes: the same.
..._ratio_f32           the same in float32.
lightstream_over_ours   float32: lightstream's seconds over ours, graphs kept as far as our budget goes.
lightstream_over_plain  float32: the same over the plain step's, from `lightstream_over_ours` and `kept_ratio_f32`.

lightstream streams the whole network, tiles overlapping by all of its receptive field; it freezes BatchNorm's scale
and shift, which we train, and trains the stem, which we freeze. Its tile side gives its memory; ours is planned for
`--memory`, and both peaks are told. Its tensors are contiguous: with channels_last its gradient of the weights
fails in oneDNN. It is no dependency: `pip install lightstream==1.0.7 lightning`.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import Figure, Options, Result, main, paired, peak_memory, resident_bytes
from benchmarks.plain import PAPERS_HEADS, normalised, whole
from benchmarks.slides import GLASS, NoisePixels
from benchmarks.steps import draws, follow_plan, plain, streamed, without_graphs
from holoslide.models.classifier import LocalClassifier
from holoslide.models.options import BackboneConfig, InputConfig, ModelConfig, StreamConfig
from holoslide.models.streamed import StreamedClassifier

RIVAL = "1.0.7"


def network(backbone: str) -> LocalClassifier:
    """One module, with weights that are the same each time."""
    config = ModelConfig(
        backbone=BackboneConfig(name=backbone, weights="none"),
        modules=1,
        heads=PAPERS_HEADS,
        border="zeros",
        pool="all",
    )
    model = LocalClassifier.from_config(
        config,
        classes=("no", "yes"),
        inputs=InputConfig(glass=GLASS),
        generator=torch.Generator().manual_seed(0),
    )
    return model.to(memory_format=torch.channels_last)


def ours(options: Options, *, mixed: torch.dtype | None) -> StreamedClassifier:
    """Our side: a network ready to be streamed."""
    values = options.values
    config = StreamConfig(memory_gib=values["memory"], segment_units=values["segment_units"])
    return StreamedClassifier(network(values["backbone"]).to(options.device), config, mixed=mixed)


def theirs(options: Options) -> Callable[[], object]:
    """lightstream's step with our head and loss, float32. Raises `ImportError` if it is not installed."""
    make = importlib.import_module("lightstream.core.constructor").StreamingConstructor
    freeze = importlib.import_module("lightstream.core.utils").freeze_normalization_layers
    model = network(options.values["backbone"]).to(options.device)
    model = model.to(memory_format=torch.contiguous_format)
    pixels_1CHW = normalised(model, whole(NoisePixels(side_px(options)), options.device)).contiguous()
    head = model.heads[0]
    trunk = nn.Sequential(copy.deepcopy(model.stem), copy.deepcopy(model.parts[0])).requires_grad_(True)  # noqa: FBT003
    freeze(trunk)
    builder = make(
        trunk,
        options.values["tile"],
        verbose=False,
        normalize_on_gpu=False,
        add_keep_modules=[nn.BatchNorm2d],
    )
    builder.statistics_on_cpu = False  # means: move nothing to "cuda" after measuring on the CPU
    streaming: Any = builder.prepare_streaming_model()
    freeze(streaming)
    label = torch.tensor(1, device=options.device)

    def run() -> None:
        streaming.zero_grad()
        head.zero_grad()
        output_BCHW: Tensor = streaming.forward(pixels_1CHW).requires_grad_()
        loss = F.cross_entropy(head(output_BCHW, generator=draws()), label)
        torch.autograd.backward([loss])
        streaming.backward(pixels_1CHW, output_BCHW.grad)

    return run


def side_px(options: Options) -> int:
    """The raster's."""
    return int(options.values["side"] or (1024 if options.quick else 2048))


def our_step_memory(options: Options) -> int:
    """Resident bytes before our float32 step, which is then made; to be run in a process of its own."""
    streams, slide = ours(options, mixed=None), NoisePixels(side_px(options))
    follow_plan(streams, slide)
    return _before(streamed(streams, slide))


def their_step_memory(options: Options) -> int:
    """The same of lightstream's."""
    return _before(theirs(options))


def _before(step: Callable[[], object]) -> int:
    before = resident_bytes()
    step()
    return before


def _peak(function: Callable[[Options], int], options: Options) -> int:
    peak = peak_memory(function, options)
    return peak.most_bytes - int(peak.value)


def compare(options: Options, *, mixed: torch.dtype | None, rounds: int, rival: bool) -> dict[str, Figure]:
    """Ours with all graphs made anew over plain; if `rival`, lightstream against both, our graphs kept."""
    slide, streams = NoisePixels(side_px(options)), ours(options, mixed=mixed)
    alone, step = plain(streams.model, slide, mixed=mixed), streamed(streams, slide)
    plan = follow_plan(streams, slide)
    streams.follow(without_graphs(plan))
    times = paired(alone, step, rounds=rounds)
    suffix = "" if mixed is not None else "_f32"
    figures: dict[str, Figure] = {
        f"recompute_ratio{suffix}": round(times.ratio, 3),
        f"recompute_range{suffix}": "{:.2f} to {:.2f}".format(*times.ratio_range),
    }
    streams.follow(plan)
    times = paired(alone, step, rounds=rounds)
    figures[f"kept_ratio{suffix}"] = round(times.ratio, 3)
    if rival:
        over_ours = paired(step, theirs(options), rounds=max(1, rounds // 2))
        figures |= {
            "lightstream_over_ours": round(over_ours.ratio, 2),
            "lightstream_over_ours_range": "{:.2f} to {:.2f}".format(*over_ours.ratio_range),
            "lightstream_over_plain": round(over_ours.ratio * times.ratio, 2),
        }
    return figures


def why_no_rival() -> str | None:
    """Why lightstream is left out; None if it can be run."""
    try:
        importlib.import_module("lightstream.core.constructor")
        found = importlib.metadata.version("lightstream")
    except ImportError as error:
        return f"{error}: pip install lightstream=={RIVAL} lightning"
    return None if found == RIVAL else f"lightstream is {found}: pip install lightstream=={RIVAL}"


def measure(options: Options) -> Result:
    """The ratios; lightstream's are null where it is not installed, and `configuration` says why."""
    rounds, reason = (3 if options.quick else 5), why_no_rival()
    figures = compare(options, mixed=torch.bfloat16, rounds=rounds, rival=False)
    figures |= compare(options, mixed=None, rounds=rounds, rival=reason is None)
    if reason is None:
        figures["lightstream_bytes"] = _peak(their_step_memory, options)
        figures["our_bytes"] = _peak(our_step_memory, options)
    else:
        figures |= {"lightstream_over_ours": None, "lightstream_over_plain": None}
    configuration = {**options.values, "side": side_px(options), "lightstream": reason or RIVAL}
    return Result(figures=figures, configuration=configuration)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--side", type=int, metavar="PX", help="the raster's (1024, --full 2048)")
    parser.add_argument("--backbone", default="resnet34", help="by torchvision's name (resnet34)")
    parser.add_argument("--tile", type=int, default=1920, metavar="PX", help="lightstream's tile side (1920)")
    parser.add_argument("--memory", type=float, default=3.0, metavar="GIB", help="our budget (3)")
    parser.add_argument(
        "--segment-units", type=int, default=4, metavar="N", help="units in a segment of ours, 0 for all (4)"
    )


if __name__ == "__main__":
    main("endtoend", __doc__, measure, add_arguments=_arguments)
