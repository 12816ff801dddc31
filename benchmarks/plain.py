"""The paper's step in ordinary PyTorch, each module on its whole map: the opponent in every benchmark.

No tiles, no windows, nothing skipped or recomputed: borders are zero padding, every cell votes, and memory grows
with the slide. Axes: B batch (1: one slide), C channels, H W rows and columns, N cells in row-major order, K
modules, L classes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from holoslide.geometry import Box
from holoslide.models.classifier import LocalClassifier
from holoslide.models.heads import Head
from holoslide.models.options import HeadConfig
from holoslide.models.reconstruction import Decoder, draw_patches
from holoslide.models.streamed import head_map
from holoslide.pixels import Pixels

PAPERS_HEADS = HeadConfig(norm="slide", kernel=None)


@dataclass(frozen=True, slots=True)
class PlainResult:
    """Losses and logits of the K modules for one slide."""

    classification: tuple[float, ...]
    reconstruction: tuple[float, ...]
    logits_KL: Tensor


def plain_step(
    model: LocalClassifier,
    pixels_1CHW: Tensor,
    label: int,
    *,
    slide: Pixels | None = None,
    mixed: torch.dtype | None = None,
    generator: torch.Generator,
) -> PlainResult:
    """Method part 1 for one slide: adds every module's gradients to `.grad`.

    `pixels_1CHW` are 0 to 255, on the model's device, of the whole raster of `slide`, in whose tissue patches are
    drawn (default: anywhere). `mixed` is autocast's dtype, None for none; `generator` draws the head's dropout
    and the patches, in the order in which the streamed step draws them, so that both draw alike.
    """
    heads = cast("list[Head]", model.heads)
    target = torch.tensor(label, device=pixels_1CHW.device)
    classification, reconstruction, logits = [], [], []
    with torch.autocast(pixels_1CHW.device.type, dtype=mixed, enabled=mixed is not None):
        with torch.no_grad():
            features_BCHW = model.stem(normalised(model, pixels_1CHW))  # frozen
        tissue = Tissue.of(slide, features_BCHW, pixels_1CHW)
        for k, (part, head) in enumerate(zip(model.parts, heads, strict=True)):
            output_BCHW = part(features_BCHW)
            cells_NC = head_map(head, output_BCHW)[0].flatten(1).T
            logits_L = head.readout(cells_NC, generator=generator)
            loss = F.cross_entropy(logits_L, target)
            classification.append(float(loss.detach()))
            logits.append(logits_L.detach())
            reconstruction.append(0.0)
            if k < len(model.decoders):
                tissue = dataclasses.replace(tissue, cell_px=tissue.cell_px * model.strides[k])
                rebuilt = _reconstruction(model, k, features_BCHW, output_BCHW, tissue, generator)
                reconstruction[-1] = float(rebuilt.detach())
                loss = loss + model.config.reconstruction.alpha * rebuilt
            torch.autograd.backward([loss])
            features_BCHW = output_BCHW.detach()  # values only: nothing flows back
            del loss, output_BCHW, cells_NC
    return PlainResult(tuple(classification), tuple(reconstruction), torch.stack(logits))


@dataclass(frozen=True, slots=True)
class Tissue:
    """Where patches may be drawn: a mask, and what a cell of it and a cell of the present map stand for."""

    mask: NDArray[np.bool_]
    mask_cell_px: int
    cell_px: int

    @classmethod
    def of(cls, slide: Pixels | None, features_BCHW: Tensor, pixels_1CHW: Tensor) -> Self:
        """Of the stem's map; all of a square raster where there is no slide."""
        cell_px = round(pixels_1CHW.shape[2] / features_BCHW.shape[2])
        if slide is None:
            return cls(np.ones((1, 1), np.bool_), max(pixels_1CHW.shape[2:]), cell_px)
        return cls(slide.mask, slide.mask_cell_px, cell_px)


def whole(slide: Pixels, device: torch.device) -> Tensor:
    """All pixels of a slide, (1, 3, H, W) in channels_last, uint8."""
    pixels_HWC = torch.from_numpy(slide.read(Box(0, 0, *slide.shape_px)))
    return pixels_HWC.to(device).permute(2, 0, 1)[None]


def normalised(model: LocalClassifier, pixels_1CHW: Tensor) -> Tensor:
    """(pixel / 255 - mean) / std per channel, in the dtype of the model's parameters."""
    pixels_1CHW = pixels_1CHW.to(next(model.parameters()).dtype)
    mean, std = (values.view(1, 3, 1, 1).to(pixels_1CHW) for values in (model.mean, model.std))
    return (pixels_1CHW / 255 - mean) / std


def _reconstruction(
    model: LocalClassifier,
    k: int,
    features_BCHW: Tensor,
    output_BCHW: Tensor,
    tissue: Tissue,
    generator: torch.Generator,
) -> Tensor:
    """RFR of module k: random patches of its output, decoded, against the same places of its input."""
    stride, decoder = model.strides[k], cast("Decoder", model.decoders[k])
    whole_cells = (features_BCHW.shape[2] // stride, features_BCHW.shape[3] // stride)
    boxes_cell = draw_patches(
        tissue.mask,
        model.config.reconstruction,
        mask_cell_px=tissue.mask_cell_px,
        cell_px=tissue.cell_px,
        map_cells=whole_cells,
        side=decoder.side,
        generator=generator,
    )
    seen_BCHW = torch.cat([output_BCHW[:, :, *box.slices] for box in boxes_cell])
    target_BCHW = torch.cat([features_BCHW[:, :, *box.times(stride).slices] for box in boxes_cell])
    return decoder.loss(seen_BCHW, target_BCHW, scale=stride)
