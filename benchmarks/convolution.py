"""The weight gradient of a convolution in channels_last: oneDNN's own beside strips in NCHW, on this processor.

For 3 x 3 convolutions of a ResNet, float32, one thread: `<name>_ratio` is the time of strips over that of PyTorch's
own, taken in turns (under 1: strips are faster), `<name>_gflops` and `<name>_own_gflops` what each computes in a
second, `<name>_forward_gflops` the forward pass. `capability` is what PyTorch uses of the processor: strips are for
AVX2.
"""

from __future__ import annotations

import statistics

import torch
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from benchmarks.common import Figure, Options, Result, main, paired
from holoslide.streaming.convolution import strip_weight_grad

SHAPES = {  # channels in, channels out, stride, side of the input
    "layer1_200": (64, 64, 1, 200),
    "layer1_60": (64, 64, 1, 60),
    "layer2_first": (64, 128, 2, 200),
    "layer2_100": (128, 128, 1, 100),
    "layer3_50": (256, 256, 1, 50),
}


def rates(shape: tuple[int, int, int, int], rounds: int) -> dict[str, float]:
    """The ratio, and GFLOPS of strips, of PyTorch's own and of the forward pass, for one shape."""
    channels, out_channels, stride, side = shape
    features = torch.rand(1, channels, side, side).contiguous(memory_format=torch.channels_last)
    weight = torch.rand(out_channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
    grad = torch.rand_like(F.conv2d(features, weight, None, stride, 1))
    where = {"stride": (stride, stride), "padding": (1, 1), "dilation": (1, 1)}

    def forward() -> object:
        return F.conv2d(features, weight, None, stride, 1)

    def own() -> object:
        return conv2d_weight(features, weight.shape, grad, stride, 1)

    def strips() -> object:
        return strip_weight_grad(features, grad, weight.shape[2:], **where)

    times, forwards = paired(own, strips, rounds=rounds), paired(forward, forward, rounds=rounds)
    gflop = 2 * grad.numel() * channels * 9 / 1e9
    return {
        "ratio": round(times.ratio, 3),
        "gflops": round(gflop / statistics.median(times.b_s), 1),
        "own_gflops": round(gflop / statistics.median(times.a_s), 1),
        "forward_gflops": round(gflop / statistics.median(forwards.a_s), 1),
    }


def measure(options: Options) -> Result:
    """Ratios and rates by shape, and the mean of all ratios."""
    torch.set_num_threads(1)
    found = {name: rates(shape, 3 if options.quick else 15) for name, shape in SHAPES.items()}
    figures: dict[str, Figure] = {"capability": torch.backends.cpu.get_cpu_capability()}
    figures |= {f"{name}_{key}": value for name, each in found.items() for key, value in each.items()}
    figures["mean_ratio"] = round(statistics.mean(each["ratio"] for each in found.values()), 3)
    return Result(figures=figures, configuration={"dtype": "float32", "kernel": 3})


if __name__ == "__main__":
    main("convolution", __doc__, measure)
