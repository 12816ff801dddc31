"""Stream a module of your own over a picture that need not fit: exact values, exact gradients, tile by tile.

python examples/stream_your_own_module.py --side 4000
"""

import argparse

import torch
from torch import nn

from holoslide.streaming.chain import Chain
from holoslide.streaming.features import TensorSource
from holoslide.streaming.storage import Storage, StorageConfig
from holoslide.streaming.tiled import Segment, Tiling


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
    image = torch.rand(3, given.side, given.side - 60)

    # Streamed: at most 256 MiB of maps in memory, what is more in a file; zeros around, as torch has it.
    storage = Storage(StorageConfig(device_bytes=2**28), torch.device("cpu"))
    chain = Chain([Segment(module, border="zeros")], [Tiling(side=128)], storage)
    output = chain.forward(TensorSource(image, glass=torch.ones(3)), training=True)
    chain.backward(lambda batch, tile: [(tile, torch.ones_like(tile))])  # dL/d(output), here of L = the sum
    streamed = module[0].weight.grad.clone()

    # Whole, to compare.
    module.zero_grad()
    whole = module(image[None])[0]
    whole.sum().backward()
    values = output.windows([output.frame])[0]
    print(f"output {tuple(values.shape)}")
    print(f"values differ by at most {(values - whole).abs().max():.1e}")
    print(
        f"gradients differ by {((streamed - module[0].weight.grad).norm() / streamed.norm()):.1e} of their size"
    )


if __name__ == "__main__":
    main()
