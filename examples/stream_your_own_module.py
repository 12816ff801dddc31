"""Stream a module of your own over a picture that need not fit: exact values, exact gradients, tile by tile.

python examples/stream_your_own_module.py --side 4000
"""

import argparse

import torch
from torch import nn

from holoslide.streaming import (
    Segment,
    Storage,
    StorageConfig,
    TensorGradient,
    TensorSource,
    Tiling,
    backward_tiles,
    forward_tiles,
)


def main() -> None:
    """Read the command line, and do it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=1000)
    given = parser.parse_args()

    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
    module = nn.Sequential(*layers).eval()
    image_CHW = torch.rand(3, given.side, given.side - 60)

    # Streamed: at most 256 MiB of maps in memory, what is more in a file; zeros around, as torch has it.
    storage = Storage(StorageConfig(device_bytes=2**28), torch.device("cpu"))
    segment, source = Segment(module, border="zeros"), TensorSource(image_CHW)
    output = forward_tiles(segment, source, tiling=Tiling(side=128), storage=storage)
    values_CHW, pixels = output.whole(), TensorGradient(source)
    backward_tiles(
        segment, source, output, 2 * values_CHW, into=pixels
    )  # dL/d(output), of L = its squares' sum
    output.free()
    streamed = module[0].weight.grad.clone()

    # Whole, to compare.
    module.zero_grad()
    whole_CHW = module(image_CHW.requires_grad_()[None])[0]
    whole_CHW.square().sum().backward()
    print(f"output {tuple(values_CHW.shape)}")
    print(f"values differ by at most {(values_CHW - whole_CHW).abs().max():.1e}")
    for name, ours, plain in (
        ("weights'", streamed, module[0].weight.grad),
        ("pixels'", pixels.values_CHW, image_CHW.grad),
    ):
        print(f"{name} gradients differ by {((ours - plain).norm() / plain.norm()):.1e} of their size")


if __name__ == "__main__":
    main()
