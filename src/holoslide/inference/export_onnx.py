"""The whole classifier as one ONNX file, for rasters of any size, with a card that says what goes in and comes out.

The file has no tiles: it sees the whole raster at once, and takes the memory of that. Streaming's two borders
become plain padding. "glass": so much glass is put around the raster that no cell that votes sees zero padding.
"zeros": nothing is put around it, and the network's own padding is what the border is. Which cells vote comes from
the tissue mask, as a weight of 0 or 1: a graph has no lists of cells.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from holoslide.errors import ModelError
from holoslide.files import write_atomically
from holoslide.geometry import Box, ceil_div
from holoslide.inference.card import ATTENTION, escaped
from holoslide.models.classifier import LocalClassifier
from holoslide.models.options import StreamConfig
from holoslide.models.readout import Readout
from holoslide.models.streamed import StreamedClassifier, head_stride
from holoslide.pixels import Pixels
from holoslide.streaming.receptive import Receptive

OPSET = 18
INPUTS, OUTPUTS = ("pixels", "tissue"), ("logits", "probabilities", "attention", "evidence")


@dataclass(frozen=True, slots=True)
class _Frame:
    """Pixels of padding before the raster, the backbone's total stride, and the largest head cell's side."""

    before_px: int
    stride_px: int
    cell_px: int


class WholeClassifier(nn.Module):
    """A streamed classifier's answer without streaming: `pixels` (H, W, 3), `tissue` (H, W), both uint8.

    Gives logits (K, L) of all heads; and of the last, the probabilities (L,), and attention (h, w) and evidence
    (L, h, w) on the grid of its cells, 0 where a cell does not vote.
    """

    mean: Tensor
    std: Tensor
    glass: Tensor

    def __init__(self, network: StreamedClassifier) -> None:
        super().__init__()
        model = network.model
        self.border, self.pool = network.border, network.pool
        self.stem, self.parts = model.stem, model.parts
        self.head_stems = nn.ModuleList(head.stem for head in network.heads)
        self.readouts = [head.readout for head in network.heads]
        self.weights = nn.ModuleList(self.readouts)  # so that they move and are exported with the rest
        self.kernels = [head_stride(head) for head in network.heads]
        fields = _fields(network)
        self.strides = [field.stride for field in fields]
        self.frame = _frame(fields, self.kernels)
        self.register_buffer("mean", 255 * model.mean.float())
        self.register_buffer("std", 255 * model.std.float())
        self.register_buffer("glass", torch.tensor(model.glass, dtype=torch.float32))

    def forward(self, pixels_HW3: Tensor, tissue_HW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        inside_HW = (tissue_HW.float() > 0).float()  # ONNX Runtime 1.20 compares no bytes
        features = self.stem(self._padded(pixels_HW3, inside_HW))
        logits = []
        for k, part in enumerate(self.parts):
            features = part(features)
            cells_CHW, votes_HW = self._cells(k, features, inside_HW)
            answer, attention_HW, evidence_LHW = _read(self.readouts[k], cells_CHW, votes_HW)
            logits.append(answer)
        return torch.stack(logits), torch.softmax(logits[-1], dim=0), attention_HW, evidence_LHW

    def _padded(self, pixels_HW3: Tensor, inside_HW: Tensor) -> Tensor:
        """Normalised, with glass wherever there is no tissue, and around it: (1, 3, H', W')."""
        above_HW3 = (pixels_HW3.float() - self.glass) * inside_HW[..., None]
        image = above_HW3.permute(2, 0, 1)[None]
        if self.border == "glass":
            stride, before = self.frame.stride_px, self.frame.before_px
            after = before + ceil_div(self.frame.cell_px, stride) * stride
            # The sizes of all maps follow from these two. So written, the exporter sees that they are multiples
            # of the stride, and need not reason about remainders at every layer.
            down, right = (after + (n + stride - 1) // stride * stride - n for n in image.shape[2:])
            image = F.pad(image, (before, right, before, down))
        shift = (self.glass - self.mean) / self.std
        return image / self.std[:, None, None] + shift[:, None, None]

    def _cells(self, k: int, features_BCHW: Tensor, inside_HW: Tensor) -> tuple[Tensor, Tensor]:
        """Head k's cells (C, h, w), and a weight of 1 for each that votes, (h, w)."""
        kernel, stride = self.kernels[k], self.strides[k]
        side_px = kernel * stride
        if self.border == "glass":
            first = self.frame.before_px // stride
            rows = (inside_HW.shape[0] + side_px - 1) // side_px
            columns = (inside_HW.shape[1] + side_px - 1) // side_px
            features_BCHW = features_BCHW[
                :, :, first : first + rows * kernel, first : first + columns * kernel
            ]
        cells_CHW = self.head_stems[k](features_BCHW)[0]
        if self.pool == "all":
            return cells_CHW, torch.ones_like(cells_CHW[0])
        padded = F.pad(inside_HW[None, None], (0, side_px - 1, 0, side_px - 1))
        votes_HW = F.max_pool2d(padded, side_px, stride=side_px)[0, 0]
        return cells_CHW, votes_HW[: cells_CHW.shape[1], : cells_CHW.shape[2]]


class _Voting:
    """All cells of a grid, in one piece, of which some vote; see `holoslide.models.readout.Cells`."""

    def __init__(self, readout: Readout, cells_CHW: Tensor, votes_HW: Tensor) -> None:
        cells_NC, self.votes_N = cells_CHW.flatten(1).T, votes_HW.flatten()
        share_N = self.votes_N / self.votes_N.sum()
        mean_C = share_N @ cells_NC
        self.values_NC = readout.values(cells_NC, mean_C, share_N @ (cells_NC - mean_C) ** 2)

    def each(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(self.values_NC)

    def pooled(self, weights_N: Tensor) -> Tensor:
        return weights_N @ self.values_NC

    def softmax(self, scores: Tensor) -> Tensor:
        heard = self.votes_N > 0 if scores.dim() == 1 else self.votes_N[:, None] > 0
        return torch.softmax(torch.where(heard, scores, torch.full_like(scores, -torch.inf)), dim=0)


def _read(readout: Readout, cells_CHW: Tensor, votes_HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A readout over the cells that vote: logits (L,), attention and evidence on the grid."""
    explained = readout.explained(_Voting(readout, cells_CHW, votes_HW))
    height, width = votes_HW.shape
    return (
        explained.logits_L,
        explained.attention_N.reshape(height, width),
        explained.evidence_NL.T.reshape(-1, height, width),
    )


def _fields(network: StreamedClassifier) -> list[Receptive]:
    """The receptive field on pixels of each part's output."""
    field, fields = Receptive(), []
    for chain in (network.stem, *network.parts):
        for segment in chain.segments:
            field = field.then(segment.field)
        fields.append(field)
    return fields[1:]


def _frame(fields: list[Receptive], kernels: list[int]) -> _Frame:
    stride = math.lcm(*(field.stride for field in fields))
    halo = max(max(-field.low, field.high) for field in fields)
    cell = max(field.stride * kernel for field, kernel in zip(fields, kernels, strict=True))
    return _Frame(ceil_div(halo, stride) * stride, stride, cell)


def onnx_inputs(
    raster: Pixels, *, pool: str = "tissue", border: str = "glass"
) -> dict[str, NDArray[np.uint8]]:
    """What the file is fed with: a prepared slide's pixels, and its tissue mask in pixels, 1 or 0.

    Where tissue decides what votes, both reach to the end of the mask's last cells, as the mask does; but with a
    border of zeros, which begin where the raster ends.
    """
    cell = raster.mask_cell_px
    tissue = raster.mask.astype(np.uint8).repeat(cell, axis=0).repeat(cell, axis=1)
    if pool == "all" or border == "zeros":
        tissue = tissue[: raster.shape_px[0], : raster.shape_px[1]]
    return {"pixels": raster.read(Box(0, 0, *tissue.shape)), "tissue": np.ascontiguousarray(tissue)}


def export_onnx(
    model: LocalClassifier, folder: Path, *, card: str = "", more: Mapping[str, Any] | None = None
) -> Path:
    """Write `model.onnx`, and what goes in and comes out into `model-onnx.md`, below `card`; gives the file.

    `more`, plain values, goes into the file's property beside what the model says of itself. The model is copied to
    the processor and to float32. Raises `ModelError` where the libraries for it are not installed.
    """
    onnx = _library()
    network = StreamedClassifier(copy.deepcopy(model).cpu().float().eval(), StreamConfig())
    whole = WholeClassifier(network).eval()
    side = 4 * whole.frame.cell_px + 1  # of the example: any size will do, but no special one
    example = (torch.full((side, side + 8, 3), 200, dtype=torch.uint8), torch.ones(side, side + 8).byte())
    # With a border of zeros what is smaller than a cell has none. Left to find that out, torch would trace twice.
    least = 2 if whole.border == "glass" else whole.frame.cell_px
    sides = {0: torch.export.Dim("height", min=least), 1: torch.export.Dim("width", min=least)}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own, about its own
        program = torch.onnx.export(
            whole, example, dynamo=True, dynamic_shapes=(sides, sides), opset_version=OPSET,
            input_names=list(INPUTS), output_names=list(OUTPUTS), verbose=False,
        )  # fmt: skip
    if program is None:
        raise ModelError("onnx", "torch's exporter gave nothing", "export with another version of torch")
    proto = program.model_proto
    facts = _facts(network, whole)
    for output in proto.graph.output[2:]:  # else they are named by the formula of their size
        for dimension, name in zip(output.type.tensor_type.shape.dim[-2:], ("rows", "columns"), strict=True):
            dimension.dim_param = name
    onnx.helper.set_model_props(proto, {"holoslide": json.dumps({**facts, **(more or {})})})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    write_atomically(path, lambda file: file.write(proto.SerializeToString()))
    section = _SECTION.format(**{**facts, "classes": escaped(", ".join(map(repr, model.classes)))})
    text = (card + section).lstrip()
    write_atomically(folder / "model-onnx.md", lambda file: file.write(text.encode()))
    return path


def _library() -> Any:
    """The `onnx` module; torch's exporter wants `onnxscript` beside it, and says so in a traceback of its own."""
    try:
        import_module("onnxscript")
        return import_module("onnx")
    except ImportError as error:
        raise ModelError("onnx", f"needs {error.name}", "pip install 'holoslide[onnx]'") from error


def _facts(network: StreamedClassifier, whole: WholeClassifier) -> dict[str, Any]:
    """What a user of the file must know; also in the file itself, as the property `holoslide`."""
    model, pooling = network.model, network.model.config.heads.pooling
    field, kernel = _fields(network)[-1], whole.kernels[-1]
    cell = field.then(Receptive(kernel, 0, kernel - 1))
    return {
        "classes": list(model.classes),
        "mpp": model.mpp,
        "glass": list(model.glass),
        "border": network.border,
        "pool": network.pool,
        "heads": len(network.heads),
        "attention": ATTENTION[pooling],
        "sum": "all cells' sum to the logits" if pooling == "auto" else "a constant is missing to the logits",
        "cell_px": cell.stride,
        # A cell is drawn around the middle of what it sees, which padding moves by a little.
        "shift_px": (cell.low + cell.high) / 2 - (cell.stride - 1) / 2,
    }


_SECTION = """
## The ONNX file

`model.onnx` is the whole classifier, from a raster's pixels to the answer, for rasters of any size.

| name | shape | what it is |
| --- | --- | --- |
| `pixels` (in) | (H, W, 3) uint8 | RGB of the slide at {mpp} um per pixel |
| `tissue` (in) | (H, W) uint8 | 1: tissue; 0: none, and the pixel is taken as glass, {glass} |
| `logits` (out) | ({heads}, L) | of every head, the last being the model's answer |
| `probabilities` (out) | (L,) | of the classes, in this order: {classes} |
| `attention` (out) | (h, w) | {attention}; sums to 1 over the last head's cells |
| `evidence` (out) | (L, h, w) | what each cell adds to each logit; {sum} |

Cell (y, x) is the square of {cell_px} pixels whose first pixel is (y, x) * {cell_px} {shift_px:+}. The border is
"{border}", the pooling is over "{pool}". `holoslide.inference.export_onnx.onnx_inputs` makes the two inputs from a
prepared slide. The raster goes through in one piece: memory grows with its area, unlike in holoslide itself.
"""
