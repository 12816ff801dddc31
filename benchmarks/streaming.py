"""Streaming: is it exact, is its memory flat, how fast is it beside plain execution, does its plan hold?

ResNet-34 without pretrained weights, every module with its head and its reconstruction. Parts, each by `--only`:

grad   `grad_rel_error`: the largest difference of any gradient from the plain step's, float64, over the largest.
flat   `flat_ratio`: peak extra memory of a training step on the large raster over that on the small one, feature
       maps in a file; in the full run for K = 8, 4 and 1 (each by flat8, flat4, flat1), 12,000 px over 3,000 px.
time   `time_ratio_recompute`, `time_ratio_kept`: a streamed step's time over the plain local step's at the same K,
       in turn, all tissue, borders of zeros; `time_ratio_tissue30`: one round piece of tissue, 30 % of the
       raster, borders of glass, graphs kept, over the plain step on the whole raster. In the full run for K = 4, 8
       and 1 (each by time4, time8, time1).
plan   `plan_error`: the plan's peak against the measured one, by the measured one.

All but `grad` in the precision that training takes on this processor: bf16 where it has units for it, else float32;
or as `--precision` says; without such units the quick run, too, takes much longer than three minutes. Extra memory
is the resident set's peak in a process of its own, less what it held before the step.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import get_args

import torch

from benchmarks.common import (
    Figure,
    Options,
    Paired,
    Result,
    give_back_freed,
    main,
    paired,
    peak_memory,
    resident_bytes,
)
from benchmarks.plain import PAPERS_HEADS, plain_step, whole
from benchmarks.slides import GLASS, NoisePixels
from benchmarks.steps import draws, follow_plan, plain, streamed
from holoslide.geometry import Border
from holoslide.models.classifier import LocalClassifier
from holoslide.models.memory import plan_for
from holoslide.models.options import BackboneConfig, InputConfig, ModelConfig, Precision, StreamConfig
from holoslide.models.precision import mixed_dtype
from holoslide.models.streamed import StreamedClassifier
from holoslide.streaming.plan import Plan, parameter_bytes
from holoslide.streaming.storage import StorageConfig
from holoslide.training.local import LocalStep

Mixed = torch.dtype | None
Run = Callable[[Options], dict[str, Figure]]

FLAT_MODULES = (8, 4, 1)
TIME_MODULES = (4, 8, 1)
PARTS = ("grad", "flat", "time", "plan")
KEEPS_ALL_GIB = 10.0
# Budgets that bind on the smaller raster, too: else it takes less than it may.
FLAT_GIB = {torch.bfloat16: 1.2, None: 1.4}
FLAT_QUICK_GIB = 0.9


def resnet34(
    modules: int, *, dtype: torch.dtype = torch.float32, border: Border = "glass"
) -> LocalClassifier:
    """ResNet-34 in K modules with the paper's heads; its weights are the same each time.

    With a border of zeros all cells vote.
    """
    config = ModelConfig(
        backbone=BackboneConfig(name="resnet34", weights="none"),
        modules=modules,
        heads=PAPERS_HEADS,
        border=border,
        pool="all" if border == "zeros" else "tissue",
    )
    generator = torch.Generator().manual_seed(0)
    model = LocalClassifier.from_config(
        config, classes=("no", "yes"), inputs=InputConfig(glass=GLASS), generator=generator
    )
    return model.to(dtype).to(memory_format=torch.channels_last)


# --- Exact ------------------------------------------------------------------------------------------------------


def gradient_error(modules: int = 4, side_px: int = 352) -> float:
    """The largest absolute difference of any gradient over the largest gradient of that parameter, float64."""
    slide, model = NoisePixels(side_px), resnet34(modules, dtype=torch.float64, border="zeros")
    plain_step(model, whole(slide, torch.device("cpu")), 1, slide=slide, generator=draws())
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    network = StreamedClassifier(model, StreamConfig(tile_cells=18))
    LocalStep(network)(slide, 1, generator=draws())
    found = [p.grad for p in model.parameters() if p.grad is not None]
    # A bias before a norm has no gradient but rounding: small ones are held against the largest.
    tiny = 1e-2 * max(float(grad.abs().max()) for grad in expected)
    pairs = zip(expected, found, strict=True)
    return max(float((a - b).abs().max()) / max(float(a.abs().max()), tiny) for a, b in pairs)


# --- Memory -----------------------------------------------------------------------------------------------------


def plan_of(side_px: int, modules: int, *, memory_gib: float, mixed: Mixed) -> tuple[Plan, int]:
    """The plan of a training step, and what of it is there before: weights, their folded twins, AdamW's moments."""
    model = resnet34(modules)
    network = StreamedClassifier(model, StreamConfig(memory_gib=memory_gib), mixed=mixed)
    plan = plan_for(network, NoisePixels(side_px), training=True)
    assert plan is not None
    return plan, 3 * parameter_bytes(model) + parameter_bytes(model.parts)


def training_step(side_px: int, modules: int, plan: Plan, *, mixed: Mixed) -> tuple[int, float]:
    """A step by a plan, and the optimiser's, after one on a small slide: bytes held before it, and seconds.

    A small slide comes before it in the same step, too: then all gradients are there, as in all steps of more than
    one slide.
    """
    model = resnet34(modules)
    network = StreamedClassifier(model, StreamConfig(), mixed=mixed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    network.follow(plan)
    step = LocalStep(network)

    def train(slide: NoisePixels) -> None:
        for one in (NoisePixels(256), slide):
            step(one, 1, generator=draws())
        optimizer.step()

    train(NoisePixels(256))
    optimizer.zero_grad()
    give_back_freed()
    before, started = resident_bytes(), time.perf_counter()
    train(NoisePixels(side_px))
    return before, time.perf_counter() - started


@dataclasses.dataclass(frozen=True, slots=True)
class Extra:
    """What one step took beyond what was there before it, and what its plan had said."""

    measured_bytes: int
    planned_bytes: int
    measured_s: float
    planned_s: float


def extra_memory(
    side_px: int, modules: int, *, memory_gib: float, mixed: Mixed, in_file: bool = False
) -> Extra:
    """Plan a training step and make it, each in a process of its own."""
    planned = peak_memory(plan_of, side_px, modules, memory_gib=memory_gib, mixed=mixed)
    plan, there = planned.value
    if in_file:
        plan = dataclasses.replace(plan, storage=StorageConfig(device_bytes=0))
    peak = peak_memory(training_step, side_px, modules, plan, mixed=mixed)
    before, seconds = peak.value
    return Extra(peak.most_bytes - before, plan.peak_bytes - there, seconds, plan.seconds)


def flatness(
    sides_px: tuple[int, int], modules: int, *, memory_gib: float, mixed: Mixed
) -> dict[str, Figure]:
    """Peak extra memory on two sides of a raster that is all tissue, maps in a file."""
    small, large = (
        extra_memory(side, modules, memory_gib=memory_gib, mixed=mixed, in_file=True).measured_bytes
        for side in sides_px
    )
    return {"ratio": round(large / small, 3), "small_bytes": small, "large_bytes": large}


def plan_error(side_px: int, *, mixed: Mixed) -> dict[str, Figure]:
    """How far a plan's peak is from the measured one."""
    extra = extra_memory(side_px, 4, memory_gib=2.0, mixed=mixed)
    return {
        "plan_error": round(abs(extra.planned_bytes - extra.measured_bytes) / extra.measured_bytes, 3),
        "plan_planned_bytes": extra.planned_bytes,
        "plan_measured_bytes": extra.measured_bytes,
        "plan_planned_s": round(extra.planned_s, 1),
        "plan_measured_s": round(extra.measured_s, 1),
    }


# --- Time -------------------------------------------------------------------------------------------------------


def time_ratio(
    side_px: int, modules: int, *, kept: bool, tissue: float = 1.0, rounds: int, mixed: Mixed
) -> Paired:
    """A plain local step and a streamed one, in turn."""
    model = resnet34(modules, border="zeros" if tissue == 1 else "glass")
    slide = NoisePixels(side_px, tissue=tissue)
    network = StreamedClassifier(model, StreamConfig(memory_gib=KEEPS_ALL_GIB), mixed=mixed)
    follow_plan(network, slide, kept=kept)
    return paired(plain(model, NoisePixels(side_px), mixed=mixed), streamed(network, slide), rounds=rounds)


def _times(side_px: int, modules: int, suffix: str, *, rounds: int, mixed: Mixed) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    for name, how in (
        ("recompute", {"kept": False}),
        ("kept", {"kept": True}),
        ("tissue30", {"kept": True, "tissue": 0.3}),
    ):
        times = time_ratio(side_px, modules, rounds=rounds, mixed=mixed, **how)
        figures[f"time_ratio_{name}{suffix}"] = round(times.ratio, 3)
        figures[f"time_range_{name}{suffix}"] = "{:.2f} to {:.2f}".format(*times.ratio_range)
    return figures


# --- The benchmark ----------------------------------------------------------------------------------------------


def measure(options: Options) -> Result:
    """The figures of the parts that were asked for."""
    chosen = (options.values["only"] or ",".join(PARTS)).split(",")
    runs: dict[str, Run] = {
        "grad": _grad, "flat": _flat, "time": _time, "plan": _plan,
        **{f"flat{k}": _flat_of(k) for k in FLAT_MODULES},
        **{f"time{k}": _time_of(k) for k in TIME_MODULES},
    }  # fmt: skip
    figures: dict[str, Figure] = {}
    for name in chosen:
        if name not in runs:
            raise SystemExit(f"--only {name}: choose among {', '.join(runs)}")
        figures |= runs[name](options)
    dtype = "float32" if _mixed(options) is None else "bfloat16 autocast"
    configuration = {"backbone": "resnet34", "dtype": dtype, "parts": chosen}
    variant = "-".join(chosen) if options.values["only"] else ""
    return Result(figures=figures, configuration=configuration, variant=variant)


def _mixed(options: Options) -> Mixed:
    return mixed_dtype(options.values["precision"], torch.device("cpu"))


def _grad(options: Options) -> dict[str, Figure]:
    return {"grad_rel_error": gradient_error()}


def _flat_of(modules: int) -> Run:
    def run(options: Options) -> dict[str, Figure]:
        mixed = _mixed(options)
        sides, gib = ((1500, 6000), FLAT_QUICK_GIB) if options.quick else ((3000, 12000), FLAT_GIB[mixed])
        found = flatness(sides, modules, memory_gib=gib, mixed=mixed)
        return {f"flat_{key}_k{modules}": value for key, value in found.items()}

    return run


def _flat(options: Options) -> dict[str, Figure]:
    if options.quick:
        found = flatness((1500, 6000), 4, memory_gib=FLAT_QUICK_GIB, mixed=_mixed(options))
        return {f"flat_{key}": value for key, value in found.items()}
    figures: dict[str, Figure] = {}
    for modules in FLAT_MODULES:
        figures |= _flat_of(modules)(options)
    return figures


def _time_of(modules: int) -> Run:
    def run(options: Options) -> dict[str, Figure]:
        rounds, mixed = options.values["rounds"] or (3 if options.quick else 5), _mixed(options)
        if modules == 1:
            side = 1024 if options.quick else 2048
            alone = time_ratio(side, 1, kept=False, rounds=rounds, mixed=mixed)
            return {"time_ratio_recompute_k1": round(alone.ratio, 3)}
        side, suffix = 1536 if options.quick else 3072, "" if modules == 4 else f"_k{modules}"
        return _times(side, modules, suffix, rounds=rounds, mixed=mixed)

    return run


def _time(options: Options) -> dict[str, Figure]:
    if options.quick:
        return _time_of(4)(options)
    figures: dict[str, Figure] = {}
    for modules in TIME_MODULES:
        figures |= _time_of(modules)(options)
    return figures


def _plan(options: Options) -> dict[str, Figure]:
    return plan_error(1500 if options.quick else 4000, mixed=_mixed(options))


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", metavar="PARTS", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, metavar="N", help="steps of each that are timed (3, --full 5)")
    parser.add_argument("--precision", choices=get_args(Precision), default="auto", help="as train.precision")


if __name__ == "__main__":
    main("streaming", __doc__, measure, add_arguments=_arguments)
