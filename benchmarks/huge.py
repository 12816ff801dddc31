"""One training step on a raster that nothing could hold, inside a budget: peak memory, the plan, and seconds.

ResNet-34 without pretrained weights, 60,000 x 60,000 px with one round piece of tissue on 20 % of it, bf16, border
of glass, AdamW's step included. The raster is never decoded whole: each window is made as it is read. Extra is the
resident set's peak less what the process held before the network was made, so that weights, gradients and moments
count, as they do in the plan.
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import dataclass

import torch

from benchmarks.common import Figure, Options, Result, main, peak_memory
from benchmarks.slides import NoisePixels
from benchmarks.steps import follow_plan, streamed
from benchmarks.streaming import resnet34
from holoslide.models.options import StreamConfig
from holoslide.models.streamed import StreamedClassifier

QUICK_PX, FULL_PX = 6000, 60000


@dataclass(frozen=True, slots=True)
class Told:
    """What a step tells of itself and of its plan."""

    seconds: float
    cpu_seconds: float
    loss: float
    planned: dict[str, Figure]


def one_step(side_px: int, modules: int, *, tissue: float, memory_gib: float, folder: str | None) -> Told:
    """A training step with its optimiser's, planned for the budget; to be run in a process of its own."""
    model, slide = resnet34(modules), NoisePixels(side_px, tissue=tissue)
    config = StreamConfig(memory_gib=memory_gib, folder=folder)
    network = StreamedClassifier(model, config, mixed=torch.bfloat16)
    plan = follow_plan(network, slide)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    step = streamed(network, slide)
    started, cpu_started = time.perf_counter(), _cpu_s()
    loss = step()
    optimizer.step()
    planned: dict[str, Figure] = {
        "planned_bytes": plan.peak_bytes,
        "planned_file_bytes": plan.file_bytes,
        "planned_s": round(plan.seconds, 1),
        "tiles": "; ".join(f"{s.name}: {s.tiles} of side {s.tiling.side}" for s in plan.stages),
    }
    return Told(time.perf_counter() - started, _cpu_s() - cpu_started, loss, planned)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(options: Options) -> Result:
    """Bytes and seconds; `extra_over_budget` is what the budget has to hold, over it."""
    values = options.values
    side_px = values["side"] or (QUICK_PX if options.quick else FULL_PX)
    settings = {"tissue": values["tissue"], "memory_gib": values["memory"], "folder": values["folder"]}
    peak = peak_memory(one_step, side_px, values["modules"], **settings)
    told: Told = peak.value
    figures: dict[str, Figure] = {
        "peak_resident_bytes": peak.most_bytes,
        "extra_bytes": peak.added_bytes,
        "extra_over_budget": round(peak.added_bytes / (values["memory"] * 2**30), 3),
        "seconds": round(told.seconds, 1),
        "cpu_seconds": round(told.cpu_seconds, 1),
        "loss": round(told.loss, 4),
        **told.planned,
    }
    configuration = {"backbone": "resnet34", "dtype": "bfloat16 autocast", "side_px": side_px, **settings}
    configuration.pop("folder")  # a path of this machine
    return Result(figures=figures, configuration=configuration | {"modules": values["modules"]})


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--side", type=int, metavar="PX", help=f"the raster's ({QUICK_PX}, --full {FULL_PX})")
    parser.add_argument("--modules", type=int, default=4, metavar="K", help="locally trained modules (4)")
    parser.add_argument("--tissue", type=float, default=0.2, metavar="SHARE", help="of the raster (0.2)")
    parser.add_argument("--memory", type=float, default=4.0, metavar="GIB", help="the budget (4)")
    parser.add_argument(
        "--folder", metavar="DIR", help="where maps that do not fit go (the temporary folder)"
    )


if __name__ == "__main__":
    main("huge", __doc__, measure, add_arguments=_arguments)
