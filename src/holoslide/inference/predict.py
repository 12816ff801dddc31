"""What a trained network says about a slide: probabilities of every head, and what each cell contributed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from holoslide.models.readout import Explanation
from holoslide.models.streamed import HeadCells, StreamedClassifier, head_stride
from holoslide.pixels import Pixels
from holoslide.streaming.features import FeatureMap
from holoslide.streaming.receptive import Receptive


@dataclass(frozen=True, slots=True)
class CellScores:
    """What the voting cells of one head contributed; N cells, L classes.

    `evidence_NL` summed over the cells, plus `bias_L`, is the logits; `attention_N` sums to one. Cell (y, x) of
    `places` (N, 2) is the square of `side_px` raster pixels whose first pixel is (y, x) * side_px + shift_px.
    """

    places: NDArray[np.int64]
    attention_N: NDArray[np.float32]
    evidence_NL: NDArray[np.float32]
    bias_L: NDArray[np.float32]
    side_px: int
    shift_px: float


@dataclass(frozen=True, slots=True)
class SlideScores:
    """The K heads' logits for one slide, (K, L), the last being the prediction's, and the cells of some heads."""

    logits_KL: NDArray[np.float64]
    cells: dict[int, CellScores]

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """Softmax of each head's logits, (K, L)."""
        shifted = np.exp(self.logits_KL - self.logits_KL.max(axis=1, keepdims=True))
        result: NDArray[np.float64] = shifted / shifted.sum(axis=1, keepdims=True)
        return result


def score_slide(network: StreamedClassifier, slide: Pixels, *, explain: Sequence[int] = ()) -> SlideScores:
    """Run a slide through the network; `explain` names the heads (0 to K - 1) whose cells are wanted."""
    logits, cells = [], {}
    with torch.no_grad():
        for k, (head, output, gathered) in enumerate(network.read(slide)):
            explanation = head.readout.explain(gathered.cells_NC)
            logits.append(explanation.logits_L.double().cpu().numpy())
            if k in explain:
                cells[k] = _cell_scores(gathered, explanation, output, head_stride(head))
    return SlideScores(np.stack(logits), cells)


def _cell_scores(
    gathered: HeadCells, explanation: Explanation, output: FeatureMap, stride: int
) -> CellScores:
    field = output.field.then(Receptive(stride, 0, stride - 1))
    # A cell is drawn where it looks: around the middle of its receptive field, which padding moves by a little.
    shift = (field.low + field.high) / 2 - (field.stride - 1) / 2
    return CellScores(
        gathered.places,
        attention_N=explanation.attention_N.float().cpu().numpy(),
        evidence_NL=explanation.evidence_NL.float().cpu().numpy(),
        bias_L=explanation.bias_L.float().cpu().numpy(),
        side_px=field.stride,
        shift_px=shift,
    )
