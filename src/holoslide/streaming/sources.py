"""What windows are cut from first: the pixels of a slide, or a tensor. Feature maps are what comes of them.

Axes: B batch, C channels, H W rows and columns of cells.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from holoslide.errors import ConfigError
from holoslide.geometry import Box, ceil_div
from holoslide.pixels import Pixels
from holoslide.streaming.host import cores
from holoslide.streaming.receptive import Receptive
from holoslide.streaming.tissue import Tissue

_STRIP_PX = 256  # at least: what two strips share is decoded twice


class Source(Protocol):
    """What windows are cut from: a feature map, or the pixels of a slide."""

    channels: int
    field: Receptive  # from raster pixels to this map's cells
    tissue: Tissue
    frame: Box  # the raster's own cells; what lies outside is glass, or nothing where the border is zeros
    glass: Tensor  # (C,)
    device: torch.device
    slow: bool  # whether reading is worth doing ahead of time

    def windows(self, boxes: Sequence[Box]) -> Tensor:
        """The cells of boxes of one shape, (B, C, H, W) in channels_last; glass where nothing is stored."""
        ...


class PixelSource:
    """Normalised pixels of a slide as the first map: (pixel / 255 - mean) / std, per channel.

    `readers` is how many threads read. By default one where the processor computes, too, and one a core beside a
    GPU, which would wait for a slide's pixels if a single core had to decode them.
    """

    slow = True
    channels = 3
    field = Receptive()

    def __init__(
        self,
        pixels: Pixels,
        *,
        mean: Tensor,
        std: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        readers: int | None = None,
    ) -> None:
        self.pixels = pixels
        self._readers = (1 if device.type == "cpu" else cores()) if readers is None else readers
        self._pool = ThreadPoolExecutor(self._readers, thread_name_prefix="holoslide-pixels")
        self.device = device
        self.tissue = Tissue(np.asarray(pixels.mask), pixels.mask_cell_px, pixels.shape_px)
        self.frame = Box(0, 0, *pixels.shape_px)
        self._scale = (1 / (255 * std)).to(device, dtype)
        self._shift = (-mean / std).to(device, dtype)
        self.glass = self._normalise(torch.from_numpy(np.array(pixels.glass)).to(device))

    def windows(self, boxes: Sequence[Box]) -> Tensor:
        """(B, 3, H, W) in the dtype of this source."""
        shape, beside_gpu = (len(boxes), *boxes[0].shape, 3), self.device.type == "cuda"
        raw = torch.empty(shape, dtype=torch.uint8, pin_memory=beside_gpu)  # else the copy waits, and is slow
        raw_BHWC = raw.numpy()

        def read(number: int, part: Box) -> None:
            raw_BHWC[number, *part.relative_to(boxes[number]).slices] = self.pixels.read(part)

        numbers, parts = zip(*self._parts(boxes), strict=True)
        each = map if self._readers == 1 else self._pool.map
        deque(each(read, numbers, parts), maxlen=0)
        return self._normalise(raw.to(self.device, non_blocking=True)).permute(0, 3, 1, 2)

    def _parts(self, boxes: Sequence[Box]) -> Iterator[tuple[int, Box]]:
        """Boxes with their numbers, in strips where there are more readers than boxes."""
        strips = ceil_div(self._readers, len(boxes))
        for number, box in enumerate(boxes):
            rows = max(_STRIP_PX, ceil_div(box.height, strips))
            for top in range(box.top, box.bottom, rows):
                yield number, Box(top, box.left, min(top + rows, box.bottom), box.right)

    def _normalise(self, values: Tensor) -> Tensor:
        return torch.addcmul(self._shift, values.to(self._scale.dtype), self._scale)


class TensorSource:
    """A map that is already in memory, (C, H, W), as the first map; `glass` (C,) is what surrounds it.

    `tissue` tells where there is more than glass (default: everywhere); only that is computed.
    """

    slow = False
    field = Receptive()

    def __init__(
        self, values_CHW: Tensor, *, glass: Tensor | None = None, tissue: Tissue | None = None
    ) -> None:
        """`glass` (C,) is zero if it is not given; where there is no `tissue`, values must be glass, too."""
        if values_CHW.ndim != 3:
            raise ConfigError(
                "TensorSource", f"was given a tensor of shape {tuple(values_CHW.shape)}", "give (C, H, W)"
            )
        self.channels, height, width = values_CHW.shape
        self.glass = values_CHW.new_zeros(self.channels) if glass is None else glass.detach()
        if self.glass.shape != (self.channels,):
            raise ConfigError(
                "TensorSource",
                f"glass has the shape {tuple(self.glass.shape)}",
                f"give one value for each of the {self.channels} channels",
            )
        self.values_CHW = values_CHW.detach()
        self.device = values_CHW.device
        self.frame = Box(0, 0, height, width)
        self.tissue = tissue or Tissue.everywhere((height, width))

    def windows(self, boxes: Sequence[Box]) -> Tensor:
        """(B, C, H, W)."""
        out_BHWC = self.glass.expand(len(boxes), *boxes[0].shape, -1).clone()
        for out_HWC, box in zip(out_BHWC, boxes, strict=True):
            part = box.intersect(self.frame)
            if part.area:
                rows, columns = part.slices
                out_HWC[part.relative_to(box).slices] = self.values_CHW[:, rows, columns].permute(1, 2, 0)
        return out_BHWC.permute(0, 3, 1, 2)
