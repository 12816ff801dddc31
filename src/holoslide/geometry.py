"""Boxes on pixel and cell grids: pure integers, (y, x) order, half-open.

A box does not know its frame; the name of the variable does: `box_l0` (level-0 pixels), `box_px` (raster
pixels), `box_cell` (feature cells).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Border = Literal["glass", "zeros"]
"""What lies around a map: a slide that goes on for ever as glass, or what each layer pads with."""


def ceil_div(a: int, b: int) -> int:
    """The smallest integer at least a / b, for any sign of a.

    >>> ceil_div(7, 3), ceil_div(-7, 3)
    (3, -2)
    """
    return -(-a // b)


@dataclass(frozen=True, slots=True)
class Box:
    """The cells with top <= y < bottom and left <= x < right; may reach outside any raster."""

    top: int
    left: int
    bottom: int
    right: int

    @classmethod
    def at(cls, top: int, left: int, height: int, width: int) -> Box:
        """The box of a given size whose first cell is (top, left)."""
        return cls(top, left, top + height, left + width)

    @property
    def height(self) -> int:
        """Number of rows, never negative."""
        return max(0, self.bottom - self.top)

    @property
    def width(self) -> int:
        """Number of columns, never negative."""
        return max(0, self.right - self.left)

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width)."""
        return self.height, self.width

    @property
    def area(self) -> int:
        """Number of cells."""
        return self.height * self.width

    @property
    def slices(self) -> tuple[slice, slice]:
        """Index of this box in an array of its own frame, for boxes that start at 0 or later."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def shifted(self, dy: int, dx: int) -> Box:
        """The box moved by (dy, dx)."""
        return Box(self.top + dy, self.left + dx, self.bottom + dy, self.right + dx)

    def relative_to(self, other: Box) -> Box:
        """The same cells, counted from the first cell of `other`."""
        return self.shifted(-other.top, -other.left)

    def intersect(self, other: Box) -> Box:
        """The cells in both; empty (area 0) if there are none.

        >>> Box(0, 0, 4, 4).intersect(Box(2, 3, 9, 9))
        Box(top=2, left=3, bottom=4, right=4)
        """
        return Box(
            max(self.top, other.top),
            max(self.left, other.left),
            min(self.bottom, other.bottom),
            min(self.right, other.right),
        )

    def contains(self, other: Box) -> bool:
        """Whether every cell of `other` is in this box."""
        return self.intersect(other) == other

    def times(self, factor: int) -> Box:
        """The same area on a grid `factor` times finer."""
        return Box(self.top * factor, self.left * factor, self.bottom * factor, self.right * factor)

    def cover(self, factor: int) -> Box:
        """The cells of a grid `factor` times coarser that this box touches.

        >>> Box(3, -1, 9, 4).cover(4)
        Box(top=0, left=-1, bottom=3, right=1)
        """
        return Box(
            self.top // factor,
            self.left // factor,
            ceil_div(self.bottom, factor),
            ceil_div(self.right, factor),
        )

    def tiles(self, side: int) -> Iterator[Box]:
        """Cut into boxes of at most `side`, on a grid anchored at this box's first cell, row by row."""
        for top in range(self.top, self.bottom, side):
            for left in range(self.left, self.right, side):
                yield Box(top, left, min(top + side, self.bottom), min(left + side, self.right))
