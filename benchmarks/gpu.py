"""Streamed against plain training on a GPU: seconds a slide, peak memory, share of the card's measured bf16 rate.

ResNet-34 without pretrained weights, bf16, K = 1, 4, 8, rasters of 10,000 to 80,000 px a side (5x to 40x) with one
round piece of tissue on 30 % of them, made window by window. Streamed: border of glass, tissue alone. Plain: all of
the raster, read and on the card before the clock starts, until it runs out of memory. For each K and side:

..._s         seconds of a training step of one slide, the second of its side: the first asks for memory.
..._peak_gib  the most that tensors took on the GPU.
..._share     multiplications that the tissue needs, forwards and backwards without recomputing, as counted on small
              rasters of tissue alone, over the time, by the rate of a large bf16 matrix product on this card.
..._read_s    seconds that threads were at work to read pixels, all together: near ..._s times their number, one a
              core, the host is what limits. These pixels are made up, which costs little; those of a prepared slide
              are decoded, which costs more (`python -m benchmarks.reading`).

Runs from a copy of the repository with PYTHONPATH=src, without OpenSlide, FastAPI and imagecodecs. HOLOSLIDE_COMMIT
names the commit where there is no clone.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.common import Figure, Options, Result, main
from benchmarks.slides import NoisePixels
from benchmarks.steps import Step, follow_plan, plain, streamed
from benchmarks.streaming import resnet34
from holoslide.geometry import Box
from holoslide.models.options import StreamConfig
from holoslide.models.streamed import StreamedClassifier

BF16 = torch.bfloat16
SIDES_PX, QUICK_PX = (10_000, 20_000, 40_000, 80_000), (192, 320)
MODULES = (1, 4, 8)


class TimedPixels(NoisePixels):
    """Counts the seconds that reading takes, in all threads."""

    def __init__(self, side_px: int, *, tissue: float) -> None:
        super().__init__(side_px, tissue=tissue)
        self.spans: list[float] = []

    def read(self, box_px: Box) -> NDArray[np.uint8]:
        """As of `NoisePixels`."""
        started = time.perf_counter()
        window = super().read(box_px)
        self.spans.append(time.perf_counter() - started)
        return window


class Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class hook has no types
    """Counts multiplications and additions of convolutions and matrix products, forwards and backwards.

    torch's own counter also follows modules, with hooks that a backward pass inside a backward pass trips over.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


class Card:
    """The device: its clock, its peak, its rate."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.is_gpu = device, device.type == "cuda"

    def wait(self) -> None:
        """Until all that was started is done."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def clear(self) -> None:
        """Forget what is no longer used, and the peak so far."""
        gc.collect()
        if self.is_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float | None:
        """The most that tensors took since `clear`; None on a CPU."""
        return round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2) if self.is_gpu else None

    def seconds(self, step: Step) -> float:
        """Of one step."""
        self.wait()
        started = time.perf_counter()
        step()
        self.wait()
        return time.perf_counter() - started

    def bf16_rate(self) -> float:
        """Multiplications and additions a second of a large matrix product, the median of ten after three."""
        side = 8192 if self.is_gpu else 512
        a, b = (torch.randn(side, side, device=self.device).to(BF16) for _ in range(2))

        def product() -> float:
            torch.mm(a, b)
            return 0.0

        times = [self.seconds(product) for _ in range(13)][3:]
        return 2 * side**3 / statistics.median(times)


def flops_by_area(modules: int, card: Card, sides_px: tuple[int, int]) -> tuple[float, float]:
    """What a plain step on tissue alone takes: multiplications and additions at no area, and per pixel."""
    model, counts = resnet34(modules).to(card.device), []
    for side_px in sides_px:
        with Flops() as counted:
            plain(model, NoisePixels(side_px), mixed=BF16)()
        counts.append(counted.total)
    small, large = (side_px**2 for side_px in sides_px)
    slope = (counts[1] - counts[0]) / (large - small)
    return counts[0] - slope * small, slope


class Case:
    """All measurements of one K."""

    def __init__(self, options: Options, card: Card, modules: int, *, rate: float) -> None:
        self.options, self.card, self.modules, self.rate = options, card, modules, rate
        sides_px = (512, 1024) if card.is_gpu else (128, 192)
        self.flops_fixed, self.flops_px = flops_by_area(modules, card, sides_px)
        self.model = resnet34(modules).to(card.device)
        # As in training, where AdamW holds them: the plan counts with them.
        self.moments = [torch.zeros_like(p) for p in self.model.parameters() for _ in range(2)]
        self.figures: dict[str, Figure] = {}

    def streamed(self, sides_px: Sequence[int]) -> None:
        """Every side."""
        values = self.options.values
        units = values["segment_units"] if self.modules == 1 else 0
        config = StreamConfig(memory_gib=values["memory"], segment_units=units)
        network = StreamedClassifier(self.model, config, mixed=BF16)
        for side_px in sides_px:
            slide = TimedPixels(side_px, tissue=values["tissue"])
            self.card.clear()
            plan = follow_plan(network, slide)
            step = streamed(network, slide)
            step()
            slide.spans.clear()
            self._note(f"k{self.modules}_{side_px}px", step, slide)
            self._tell(f"k{self.modules}_{side_px}px_read_s", round(sum(slide.spans), 3))
            self._tell(f"k{self.modules}_{side_px}px_planned_gib", round(plan.peak_bytes / 2**30, 2))
        if values["profile"]:
            self._profile(streamed(network, slide))

    def plain(self, sides_px: Sequence[int]) -> None:
        """Every side until memory runs out."""
        for side_px in sides_px:
            slide = NoisePixels(side_px, tissue=self.options.values["tissue"])
            name = f"plain_k{self.modules}_{side_px}px"
            self.card.clear()
            try:
                step = plain(self.model, slide, mixed=BF16)
                step()
                self._note(name, step, slide)
            except torch.OutOfMemoryError:
                self._tell(f"{name}_s", "out of memory")
                break
        self.model.zero_grad()

    def _note(self, name: str, step: Step, slide: NoisePixels) -> None:
        seconds = self.card.seconds(step)
        tissue_px = float(slide.mask.sum()) * slide.mask_cell_px**2
        useful = self.flops_fixed + self.flops_px * tissue_px
        self._tell(f"{name}_s", round(seconds, 3))
        self._tell(f"{name}_peak_gib", self.card.peak_gib())
        self._tell(f"{name}_share", round(useful / seconds / self.rate, 4))

    def _tell(self, name: str, figure: Figure) -> None:
        """At once, too: a machine that is lent may be gone before the end."""
        self.figures[name] = figure
        print(f"{name} {figure}", flush=True)

    def _profile(self, step: Step) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.card.is_gpu:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as profile:
            step()
            self.card.wait()
        by = "self_cuda_time_total" if self.card.is_gpu else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=60), flush=True)


def measure(options: Options) -> Result:
    """The figures of every K and side that were asked for."""
    values, card = options.values, Card(options.device)
    torch.backends.cudnn.benchmark = values["cudnn_benchmark"]
    sides_px = values["sides"] or (QUICK_PX if options.quick else SIDES_PX)
    rate = card.bf16_rate()
    figures: dict[str, Figure] = {"bf16_tflops": round(rate / 1e12, 2)}
    for modules in values["modules"]:
        case = Case(options, card, modules, rate=rate)
        figures[f"k{modules}_flops_per_px"] = round(case.flops_px)
        try:
            if "streamed" in values["only"]:
                case.streamed(sides_px)
            if "plain" in values["only"]:
                case.plain(sides_px)
        except KeyboardInterrupt:  # a lent machine's time is short: what there is counts
            figures |= case.figures
            break
        figures |= case.figures
        del case
        card.clear()
    configuration = {**values, "sides": list(sides_px), "backbone": "resnet34", "dtype": "bfloat16 autocast"}
    return Result(figures=figures, configuration=configuration, variant=cast("str", values["part"]))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _arguments(parser: argparse.ArgumentParser) -> None:
    shown = ",".join(map(str, SIDES_PX))
    parser.add_argument("--sides", type=_numbers, metavar="PX,PX", help=f"of the rasters (--full {shown})")
    parser.add_argument("--modules", type=_numbers, default=list(MODULES), metavar="K,K", help="(1,4,8)")
    parser.add_argument("--only", default="streamed,plain", metavar="WHICH", help="streamed, plain or both")
    parser.add_argument("--tissue", type=float, default=0.3, metavar="SHARE", help="of the raster (0.3)")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="budget of the plan (most of what is free)"
    )
    parser.add_argument("--segment-units", type=int, default=4, metavar="N", help="in a segment at K = 1 (4)")
    parser.add_argument(
        "--cudnn-benchmark", action="store_true", help="let cuDNN try its algorithms, both sides"
    )
    parser.add_argument(
        "--profile", action="store_true", help="print where a streamed step of the last side went"
    )
    parser.add_argument("--part", default="", metavar="NAME", help="added to the name of the result file")


if __name__ == "__main__":
    main("gpu", __doc__, measure, add_arguments=_arguments)
