"""One module's own loss: its auxiliary classifier's, plus the reconstruction of its input (RFR).

The loss is a function of the module's output map alone. So it is computed on that map's values, and gives
dL/d(output) piece by piece: for the cells that the head reads, and for the patches that are reconstructed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from holoslide.geometry import Box
from holoslide.models.heads import Head
from holoslide.models.reconstruction import draw_patches
from holoslide.models.streamed import StreamedClassifier, voting_cells
from holoslide.streaming.features import Batch, FeatureMap
from holoslide.streaming.host import hand_back_freed
from holoslide.streaming.tiled import OutputGradient


@dataclass(frozen=True, slots=True)
class Loss:
    """What one module's objective came to: logits (L,), and the losses as scalars where they were computed, for
    on a GPU each number that is asked for waits for all that was started.
    """

    logits_L: Tensor
    classification: Tensor
    reconstruction: Tensor


@dataclass(frozen=True, slots=True)
class CellGrads:
    """dL/d(cells) of a head, (N, C); `rows` and `voting` as in `HeadCells`."""

    grads_NC: Tensor
    rows: Sequence[Tensor]
    voting: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class Patches:
    """Random places of a module's output, of one shape, and dL/d(output) there, (B, C, H, W)."""

    boxes: Sequence[Box]
    grads_BCHW: Tensor


class Objective:
    """loss_k = CE(head(x_k), y) + alpha * L1(decoder(x_k), x_{k-1}) of method part 1; no decoder for the last.

    Gradients of the head's and the decoder's own parameters are added to their `.grad` by `loss_and_gradient`
    (and, for the head's stem, when its gradient is pulled back).
    """

    def __init__(self, network: StreamedClassifier, k: int, *, class_weights: Tensor | None) -> None:
        self.network = network
        self.head = network.heads[k]
        self.decoder = network.decoders[k] if k < len(network.decoders) else None
        self.config = network.model.config.reconstruction
        self.class_weights = class_weights
        self.segment = network.parts[k].segments[-1]

    def loss_and_gradient(
        self,
        output: FeatureMap,
        features: FeatureMap,
        label: int,
        *,
        generator: torch.Generator,
        scale: float,
    ) -> tuple[Loss, OutputGradient]:
        """The loss of one slide for the module from `features` to `output`, and its gradient times `scale`."""
        logits_L, classification, wants = self._classify(output, label, generator=generator, scale=scale)
        boxes = self._draw(output, features, generator) if self.decoder is not None else []
        reconstruction, patches = self._reconstruct(output, features, boxes, scale=scale)
        if output.device.type == "cpu":
            hand_back_freed(output.tiles.size_bytes)  # the decoder took much, and is done
        glass_C = _outside(patches, output) if patches is not None else None
        gradient = OutputGradient(_Pull(self.head, wants, patches), glass_C)
        return Loss(logits_L, classification, reconstruction), gradient

    def _classify(
        self, output: FeatureMap, label: int, *, generator: torch.Generator, scale: float
    ) -> tuple[Tensor, Tensor, CellGrads]:
        """Logits, loss, and dL/d(cells); the cells themselves are not kept."""
        with self.segment.autocast():
            cells = self.network.head_cells(self.head, output)
        leaf_NC = cells.cells_NC.requires_grad_()
        logits_L = self.head.readout(leaf_NC, generator=generator)
        loss = -F.log_softmax(logits_L, dim=0)[label]
        if self.class_weights is not None:  # cross_entropy's mean over one slide would cancel it
            loss = loss * self.class_weights[label]
        torch.autograd.backward([loss * scale])
        assert leaf_NC.grad is not None
        return logits_L.detach(), loss.detach(), CellGrads(leaf_NC.grad, cells.rows, cells.voting)

    def _draw(self, output: FeatureMap, features: FeatureMap, generator: torch.Generator) -> list[Box]:
        stride = output.field.stride // features.field.stride
        side = self.decoder.side if self.decoder is not None else 0
        return draw_patches(
            output.tissue.mask,
            self.config,
            mask_cell_px=output.tissue.cell_px[0],
            cell_px=output.field.stride,
            map_cells=(features.frame.height // stride, features.frame.width // stride),
            side=side,
            generator=generator,
        )

    def _reconstruct(
        self, output: FeatureMap, features: FeatureMap, boxes: Sequence[Box], *, scale: float
    ) -> tuple[Tensor, Patches | None]:
        if self.decoder is None or not boxes:
            return torch.zeros((), dtype=torch.double, device=output.device), None
        stride = output.field.stride // features.field.stride
        seen_BCHW = output.windows(boxes)
        target_BCHW = features.windows([box.times(stride) for box in boxes])
        weight = self.config.alpha * scale
        with self.segment.autocast():
            loss, grad_BCHW = self.decoder.pull_back(seen_BCHW, target_BCHW, scale=stride, weight=weight)
        return loss, Patches(boxes, grad_BCHW)


class _Pull:
    """dL/d(output) of a batch of tiles: through the head's stem, and from the patches that overlap them."""

    def __init__(self, head: Head, cells: CellGrads, patches: Patches | None) -> None:
        self.head, self.cells, self.patches = head, cells, patches

    def __call__(self, batch: Batch, result_BCHW: Tensor) -> list[tuple[Tensor, Tensor]]:
        """As `holoslide.streaming.tiled.Pull`."""
        roots = []
        rows = self.cells.rows[batch.number]
        if len(rows):
            cells_nC = voting_cells(self.head, result_BCHW, self.cells.voting[batch.number])
            roots.append((cells_nC, self.cells.grads_NC[rows]))
        if self.patches is not None:
            grad_BCHW = _overlap(self.patches, batch, result_BCHW)
            if grad_BCHW is not None:
                roots.append((result_BCHW, grad_BCHW))
        return roots


def _outside(patches: Patches, output: FeatureMap) -> Tensor | None:
    """The gradient of those cells of the patches, (C,), that no tile holds: they all are the glass."""
    outside = np.ones((len(patches.boxes), *patches.boxes[0].shape), np.bool_)
    for held, box in zip(outside, patches.boxes, strict=True):
        for _, tile in output.grid.overlapping(box):
            held[tile.intersect(box).relative_to(box).slices] = False
    if not outside.any():
        return None
    exact = torch.promote_types(patches.grads_BCHW.dtype, torch.float32)
    which_BHW = torch.from_numpy(outside).to(output.device, exact, non_blocking=True)
    return torch.einsum("bchw,bhw->c", patches.grads_BCHW.to(exact), which_BHW)


def _overlap(patches: Patches, batch: Batch, result_BCHW: Tensor) -> Tensor | None:
    grad_BCHW: Tensor | None = None
    for i, tile in enumerate(batch.boxes):
        for box, grad_CHW in zip(patches.boxes, patches.grads_BCHW, strict=True):
            part = box.intersect(tile)
            if part.area:
                if grad_BCHW is None:
                    grad_BCHW = torch.zeros_like(result_BCHW)
                rows, columns = part.relative_to(tile).slices
                from_rows, from_columns = part.relative_to(box).slices
                grad_BCHW[i, :, rows, columns].add_(grad_CHW[:, from_rows, from_columns])
    return grad_BCHW
