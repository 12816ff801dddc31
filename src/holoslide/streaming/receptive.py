"""The receptive field of a module that runs windows of a map: which input cells an output cell reads."""

from __future__ import annotations

from dataclasses import dataclass

from holoslide.geometry import Box, ceil_div


@dataclass(frozen=True, slots=True)
class Receptive:
    """Cell i of the output reads the input cells `stride * i + low` to `stride * i + high`, both included."""

    stride: int = 1
    low: int = 0
    high: int = 0

    def then(self, following: Receptive) -> Receptive:
        """The receptive field of this module followed by another.

        >>> conv3 = Receptive(1, -1, 1)
        >>> conv3.then(Receptive(2, -1, 1)).then(conv3)
        Receptive(stride=2, low=-4, high=4)
        """
        return Receptive(
            self.stride * following.stride,
            self.stride * following.low + self.low,
            self.stride * following.high + self.high,
        )

    def inputs(self, output_box: Box) -> Box:
        """The input cells that the cells of a box read."""
        return Box(
            output_box.top * self.stride + self.low,
            output_box.left * self.stride + self.low,
            (output_box.bottom - 1) * self.stride + self.high + 1,
            (output_box.right - 1) * self.stride + self.high + 1,
        )

    def outputs(self, input_box: Box) -> Box:
        """The output cells that read any cell of a box."""
        return Box(
            ceil_div(input_box.top - self.high, self.stride),
            ceil_div(input_box.left - self.high, self.stride),
            (input_box.bottom - 1 - self.low) // self.stride + 1,
            (input_box.right - 1 - self.low) // self.stride + 1,
        )

    def readers(self, unit: int) -> Receptive:
        """Where the outputs that read a cell lie: in pixels, for cells of `unit` pixels and outputs' footprints.

        The footprint of output i is its share of the raster, `unit * stride` pixels from `i * unit * stride` on.

        >>> Receptive(2, -3, 3).readers(6)
        Receptive(stride=6, low=-18, high=29)
        """
        return Receptive(unit, -self.high * unit, -self.low * unit + unit * self.stride - 1)

    def hull(self, other: Receptive) -> Receptive:
        """Both fields of one stride."""
        return Receptive(self.stride, min(self.low, other.low), max(self.high, other.high))

    @property
    def margin_before(self) -> int:
        """Output cells by which a window must start early, so that it starts at a multiple of the stride."""
        return max(0, ceil_div(-self.low, self.stride))

    @property
    def margin_after(self) -> int:
        """Output cells by which a window must end late."""
        return max(0, ceil_div(self.high + 1 - self.stride, self.stride))

    def window(self, start: int, stop: int, length: int | None = None) -> tuple[int, int, int]:
        """First and last + 1 input cell of the window of output cells [start, stop), and the crop's start.

        A map of `length` cells cuts it off, but leaves one input cell, also to outputs that read padding alone.
        """
        first, last = start - self.margin_before, stop + self.margin_after
        if length is None:
            return first * self.stride, last * self.stride, start - first
        first = min(max(first, 0), (length - 1) // self.stride)
        return first * self.stride, min(last * self.stride, length), start - first
