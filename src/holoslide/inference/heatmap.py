"""Heatmaps in register with the slide: a grid of head cells, and where that grid lies at level 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from holoslide.errors import SlideError
from holoslide.files import UNREADABLE, write_atomically

if TYPE_CHECKING:  # the viewer reads heatmaps, and must not wait for torch
    from holoslide.inference.predict import CellScores


class Placed(Protocol):
    """A raster's place on its slide."""

    @property
    def origin_l0(self) -> tuple[float, float]: ...

    @property
    def l0_per_px(self) -> tuple[float, float]: ...


@dataclass(frozen=True, slots=True)
class Heatmap:
    """Raw scores on a grid of cells, NaN where no cell votes.

    `attention_HW` sums to one; `evidence_LHW` summed over the cells, plus `bias_L`, is the logits. The grid's
    first corner is at `origin_l0` (y, x), a cell measures `cell_l0` (y, x) level-0 pixels.
    """

    attention_HW: NDArray[np.float32]
    evidence_LHW: NDArray[np.float32]
    bias_L: NDArray[np.float32]
    origin_l0: tuple[float, float]
    cell_l0: tuple[float, float]
    classes: tuple[str, ...]

    @property
    def box_l0(self) -> tuple[float, float, float, float]:
        """(top, left, bottom, right) of the whole grid at level 0."""
        height, width = self.attention_HW.shape
        (top, left), (cell_y, cell_x) = self.origin_l0, self.cell_l0
        return top, left, top + height * cell_y, left + width * cell_x

    def save(self, path: str | Path) -> None:
        """Write the raw scores as .npz, whole or not at all."""
        write_atomically(
            Path(path),
            lambda file: np.savez_compressed(
                file,
                attention=self.attention_HW,
                evidence=self.evidence_LHW,
                bias=self.bias_L,
                origin_l0=np.array(self.origin_l0),
                cell_l0=np.array(self.cell_l0),
                classes=np.array(self.classes),
            ),
        )

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from holoslide.inference.show import heatmap_html

        return heatmap_html(self)

    @classmethod
    def load(cls, path: str | Path) -> Heatmap:
        """Read what `save` wrote. Raises `SlideError` if it is something else."""
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as data:
                return cls(
                    data["attention"],
                    data["evidence"],
                    data["bias"],
                    (float(data["origin_l0"][0]), float(data["origin_l0"][1])),
                    (float(data["cell_l0"][0]), float(data["cell_l0"][1])),
                    tuple(str(name) for name in data["classes"]),
                )
        except UNREADABLE as error:
            raise SlideError(
                path,
                f"is not a heatmap ({type(error).__name__}: {error})",
                "make it again with holoslide heatmap",
            ) from error


def heatmap_paths(folder: Path, slide_id: str, modules: int) -> list[Path]:
    """Where the raw scores of each module's head are kept: the last, which is the model's own, by the slide's name.

    The others lie in a folder of their module, so that no slide's name can be that of another's file.

    >>> [path.as_posix() for path in heatmap_paths(Path(), "a", 3)]
    ['module-1/a.npz', 'module-2/a.npz', 'a.npz']
    """
    name = f"{slide_id}.npz"
    return [*(folder / f"module-{k}" / name for k in range(1, modules)), folder / name]


def save_heatmaps(folder: Path, slide_id: str, heatmaps: Sequence[Heatmap]) -> None:
    """Keep the raw scores of each module's head, the model's own last: where it is, the others are."""
    for path, one in zip(heatmap_paths(folder, slide_id, len(heatmaps)), heatmaps, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        one.save(path)


def make_heatmap(scores: CellScores, raster: Placed, classes: tuple[str, ...]) -> Heatmap:
    """Put the scores of a head's cells on their grid, and the grid on the slide."""
    first = scores.places.min(axis=0)
    height, width = scores.places.max(axis=0) - first + 1
    attention = np.full((height, width), np.nan, np.float32)
    evidence = np.full((len(classes), height, width), np.nan, np.float32)
    rows, columns = (scores.places - first).T
    attention[rows, columns] = scores.attention_N
    evidence[:, rows, columns] = scores.evidence_NL.T
    corner_px = first * scores.side_px + scores.shift_px
    (origin_y, origin_x), (scale_y, scale_x) = raster.origin_l0, raster.l0_per_px
    return Heatmap(
        attention,
        evidence,
        scores.bias_L,
        origin_l0=(origin_y + float(corner_px[0]) * scale_y, origin_x + float(corner_px[1]) * scale_x),
        cell_l0=(scores.side_px * scale_y, scores.side_px * scale_x),
        classes=classes,
    )
