"""The readout of a head: it sees all voting cells of a slide, some thousands at a time.

On a slide of 40x even the small map that a head's stem makes has a million cells. So where they are more than a
chunk, the readout streams, too: it keeps the cells and their gradient, and makes everything in between chunk by
chunk, once more in the backward pass.
Axes: N cells, C channels, L classes, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from holoslide.errors import SlideError
from holoslide.models.options import Norm
from holoslide.models.pooling import dropout

# Numbers of one chunk, of which ten times as many are made: what a processor's cache holds; on a GPU more, where a
# chunk is a hundred launches.
CHUNK_VALUES = {"cpu": 2**18, "gpu": 2**22}


@dataclass(frozen=True, slots=True)
class Explanation:
    """A readout's logits, and what each cell contributed: `evidence_NL.sum(0) + bias_L == logits_L`."""

    logits_L: Tensor
    attention_N: Tensor
    evidence_NL: Tensor
    bias_L: Tensor


class CellNorm(nn.Module):
    """GroupNorm with as many groups as channels over a map of N cells; defined for one cell, too."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, cells_NC: Tensor, mean_C: Tensor, variance_C: Tensor) -> Tensor:
        """Some cells (n, C), by the mean and variance of all, -> (n, C)."""
        return (cells_NC - mean_C) * (torch.rsqrt(variance_C + self.eps) * self.weight) + self.bias


class CellScale(nn.Module):
    """A scale and a shift per channel alone: what a cell says does not depend on the slide's other cells."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, cells_NC: Tensor, mean_C: Tensor, variance_C: Tensor) -> Tensor:
        """As `CellNorm`, whatever the statistics."""
        return cells_NC * self.weight + self.bias


NORMS: dict[Norm, type[CellNorm] | type[CellScale]] = {"slide": CellNorm, "cohort": CellScale}


class Cells(Protocol):
    """All voting cells of a slide, as what they are worth after the norm: their values, (N, C)."""

    def each(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of some cells' values (n, C), of all cells."""

    def pooled(self, weights_N: Tensor) -> Tensor:
        """The weighted sum of the values, (C,)."""

    def softmax(self, scores: Tensor) -> Tensor:
        """Over the cells that vote: (N,) or (N, L)."""


class Readout(nn.Module):
    """Normalise the voting cells and classify them, in the parameters' own precision, also under autocast."""

    def __init__(self, channels: int, classes: int, *, norm: Norm, hidden: int, rate: float) -> None:
        """`rate` is that of the dropout on the cells' weights."""
        super().__init__()
        self.norm = NORMS[norm](channels)
        self.hidden = nn.Linear(channels, hidden)
        self.output = nn.Linear(hidden, classes)
        self.rate = rate

    def forward(self, cells_NC: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Logits (L,). `generator` draws the dropout; without one there is none."""
        _refuse_none(cells_NC)
        kept_N = dropout(self._like(cells_NC).new_ones(len(cells_NC)), self.rate, generator)
        with torch.autocast(cells_NC.device.type, enabled=False):
            return self._read(cells_NC, kept_N)

    @torch.no_grad()
    def explain(self, cells_NC: Tensor) -> Explanation:
        """The logits, the attention, and each cell's exact share of each logit."""
        _refuse_none(cells_NC)
        with torch.autocast(cells_NC.device.type, enabled=False):
            return self.explained((_Whole if _is_one_chunk(cells_NC) else _Chunks)(self, cells_NC))

    def values(self, chunk_nC: Tensor, mean_C: Tensor, variance_C: Tensor) -> Tensor:
        """What is pooled, of some cells (n, C): normalised by the statistics of all, and rectified."""
        return F.relu(self.norm(chunk_nC.to(mean_C.dtype), mean_C, variance_C))

    def explained(self, cells: Cells) -> Explanation:
        """What `explain` gives, of cells that any way can be walked through."""
        raise NotImplementedError

    def _read(self, cells_NC: Tensor, kept_N: Tensor) -> Tensor:
        """Logits (L,), differentiable; `kept_N` multiplies the cells' weights."""
        raise NotImplementedError

    def _like(self, cells_NC: Tensor) -> Tensor:
        return cells_NC.new_empty(0, dtype=self.output.weight.dtype)


@final
class VectorReadout(Readout):
    """Pool the cells to one vector by attention, then classify it: the paper's, after Ilse et al. 2018."""

    def __init__(self, channels: int, classes: int, attention: nn.Module, **options: Any) -> None:
        """`attention` scores cells (N, C) -> (N,)."""
        super().__init__(channels, classes, **options)
        self.attention = attention

    def _read(self, cells_NC: Tensor, kept_N: Tensor) -> Tensor:
        if _is_one_chunk(cells_NC):
            cells = _Whole(self, cells_NC)
            pooled_C = cells.pooled(cells.softmax(cells.each(self.attention)) * kept_N)
        else:
            trained = [*self.norm.parameters(), *self.attention.parameters()]
            pooled_C = _Pool.apply(self, kept_N, cells_NC, *trained)
        logits_L: Tensor = self.output(F.relu(self.hidden(pooled_C)))
        return logits_L

    def explained(self, cells: Cells) -> Explanation:
        """With the pattern of the ReLU before the last layer held fixed, the logits are linear in the pooled
        vector, which is a weighted sum over cells. So the logits are a sum over cells, plus a constant.
        """
        attention_N = cells.softmax(cells.each(self.attention))
        before_H = self.hidden(cells.pooled(attention_N))
        open_LH = self.output.weight * (before_H > 0)
        each_CL = (open_LH @ self.hidden.weight).T
        return Explanation(
            logits_L=self.output(F.relu(before_H)),
            attention_N=attention_N,
            evidence_NL=attention_N[:, None] * cells.each(lambda values_nC: values_nC @ each_CL),
            bias_L=open_LH @ self.hidden.bias + self.output.bias,
        )


@final
class CellReadout(Readout):
    """Classify each cell, then pool the cells' logits, each class by its own softmax over the cells: auto-pool
    (McFee et al. 2018, arXiv 1804.10070) with a fixed sharpness.

    It lies between the mean (sharpness 0) and the maximum: a small lesion is not drowned by the many cells
    without it, and every cell still learns a little. A cell's evidence is its weight times its logit.
    """

    sharpness = 2.0

    def _read(self, cells_NC: Tensor, kept_N: Tensor) -> Tensor:
        if _is_one_chunk(cells_NC):
            cells_NL = _Whole(self, cells_NC).each(self.logits)
        else:
            cells_NL = _Each.apply(self, cells_NC, *self.parameters())
        weights_NL = torch.softmax(self.sharpness * cells_NL, dim=0) * kept_N[:, None]
        return (weights_NL * cells_NL).sum(dim=0)

    def logits(self, values_nC: Tensor) -> Tensor:
        """Some cells' own logits (n, L)."""
        logits_nL: Tensor = self.output(F.relu(self.hidden(values_nC)))
        return logits_nL

    def explained(self, cells: Cells) -> Explanation:
        """There is no constant; the attention shown is the mean of the classes'."""
        cells_NL = cells.each(self.logits)
        weights_NL = cells.softmax(self.sharpness * cells_NL)
        evidence_NL = weights_NL * cells_NL
        return Explanation(
            logits_L=evidence_NL.sum(dim=0),
            attention_N=weights_NL.mean(dim=1),
            evidence_NL=evidence_NL,
            bias_L=torch.zeros_like(evidence_NL[0]),
        )


class _Whole:
    """All cells of a slide at once: what autograd can do by itself."""

    def __init__(self, readout: Readout, cells_NC: Tensor) -> None:
        exact_NC = cells_NC.to(readout.output.weight.dtype)
        variance_C, mean_C = torch.var_mean(exact_NC, dim=0, correction=0)
        self.values_NC = readout.values(exact_NC, mean_C, variance_C)

    def each(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """As `Cells`."""
        return function(self.values_NC)

    def softmax(self, scores: Tensor) -> Tensor:
        """All of them vote."""
        return torch.softmax(scores, dim=0)

    def pooled(self, weights_N: Tensor) -> Tensor:
        """The weighted sum of the values, (C,)."""
        return weights_N @ self.values_NC


class _Chunks:
    """All cells of a slide, walked through in chunks."""

    def __init__(self, readout: Readout, cells_NC: Tensor) -> None:
        self.readout, self.cells_NC = readout, cells_NC
        self.dtype = readout.output.weight.dtype
        self.size = _chunk_cells(cells_NC)
        count = len(cells_NC)
        self.mean_C = self._sum(lambda chunk_nC: chunk_nC) / count
        self.variance_C = self._sum(lambda chunk_nC: (chunk_nC - self.mean_C) ** 2) / count

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Each chunk's place and its cells (n, C)."""
        for start in range(0, len(self.cells_NC), self.size):
            rows = slice(start, start + self.size)
            yield rows, self.cells_NC[rows]

    def each(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of every cell's values, all cells' results together."""
        return torch.cat([function(self._values(chunk_nC)) for _, chunk_nC in self.chunks()])

    def softmax(self, scores: Tensor) -> Tensor:
        """All of them vote."""
        return torch.softmax(scores, dim=0)

    def pooled(self, weights_N: Tensor) -> Tensor:
        """The weighted sum of the values, (C,)."""
        return torch.stack([weights_N[rows] @ self._values(c_nC) for rows, c_nC in self.chunks()]).sum(0)

    def _values(self, chunk_nC: Tensor) -> Tensor:
        return self.readout.values(chunk_nC, self.mean_C, self.variance_C)

    def _sum(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        sums = [function(chunk_nC.to(self.dtype)).sum(dim=0) for _, chunk_nC in self.chunks()]
        return torch.stack(sums).sum(dim=0)


class _Pool(torch.autograd.Function):
    """(C,) from all cells: softmax over their scores, dropout, weighted sum; gradients chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, readout: VectorReadout, kept_N: Tensor, cells_NC: Tensor, *trained: Tensor
    ) -> Tensor:
        cells = _Chunks(readout, cells_NC.detach())
        attention_N = torch.softmax(cells.each(readout.attention), dim=0)
        ctx.attention, ctx.cells, ctx.trained = readout.attention, cells, trained
        ctx.save_for_backward(attention_N, kept_N)
        return cells.pooled(attention_N * kept_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pooled_grad_C: Tensor) -> tuple[Tensor | None, ...]:
        cells: _Chunks = ctx.cells
        attention_N, kept_N = ctx.saved_tensors

        def roots(rows: slice, values_nC: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            yield weights_N[rows] @ values_nC, pooled_grad_C
            scores_n = ctx.attention(values_nC)
            if scores_n.requires_grad:  # the mean's scores do not depend on anything
                yield scores_n, scores_grad_N[rows]

        with torch.autocast(pooled_grad_C.device.type, enabled=False):
            weights_N = attention_N * kept_N
            weights_grad_N = cells.each(lambda values_nC: values_nC @ pooled_grad_C) * kept_N
            scores_grad_N = attention_N * (weights_grad_N - attention_N @ weights_grad_N)
            cells_grad_NC, grads = _chunk_grads(cells, ctx.trained, roots)
        return None, None, cells_grad_NC, *grads


class _Each(torch.autograd.Function):
    """(N, L) from all cells, each by itself; gradients chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, readout: CellReadout, cells_NC: Tensor, *trained: Tensor) -> Tensor:
        cells = _Chunks(readout, cells_NC.detach())
        ctx.function, ctx.cells, ctx.trained = readout.logits, cells, trained
        return cells.each(readout.logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NL: Tensor) -> tuple[Tensor | None, ...]:
        def roots(rows: slice, values_nC: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
            yield ctx.function(values_nC), grad_NL[rows]

        with torch.autocast(grad_NL.device.type, enabled=False):
            cells_grad_NC, grads = _chunk_grads(ctx.cells, ctx.trained, roots)
        return None, cells_grad_NC, *grads


Roots = Callable[[slice, Tensor], Iterable[tuple[Tensor, Tensor]]]


def _chunk_grads(
    cells: _Chunks, trained: tuple[Tensor, ...], roots: Roots
) -> tuple[Tensor, list[Tensor | None]]:
    """dL/d(cells) (N, C) and dL/d(trained), None for what is frozen; `roots` gives what is made of a chunk's
    values, and dL/d(it).
    """
    frozen = [not tensor.requires_grad for tensor in trained]
    trained = tuple(tensor for tensor in trained if tensor.requires_grad)
    statistics = [cells.mean_C.clone().requires_grad_(), cells.variance_C.clone().requires_grad_()]
    sums = [torch.zeros_like(t) for t in (*statistics, *trained)]
    cells_grad_NC = torch.empty_like(cells.cells_NC, dtype=cells.dtype)
    for rows, chunk_nC in cells.chunks():
        leaf_nC = chunk_nC.to(cells.dtype, copy=True).requires_grad_()
        with torch.enable_grad():
            made, made_grads = zip(*roots(rows, cells.readout.values(leaf_nC, *statistics)), strict=True)
        found = torch.autograd.grad(made, [leaf_nC, *statistics, *trained], made_grads, allow_unused=True)
        cells_grad_NC[rows] = found[0]
        for total, grad in zip(sums, found[1:], strict=True):
            if grad is not None:
                total += grad
    mean_grad_C, variance_grad_C = (grad / len(cells.cells_NC) for grad in sums[:2])
    for rows, chunk_nC in cells.chunks():  # mean and variance are of all cells
        far_nC = chunk_nC.to(cells.dtype) - cells.mean_C
        cells_grad_NC[rows].add_(mean_grad_C + 2 * variance_grad_C * far_nC)
    grads = iter(sums[2:])
    return cells_grad_NC.to(cells.cells_NC.dtype), [None if off else next(grads) for off in frozen]


def chunk_values(device: torch.device) -> int:
    """How many numbers of cells are read at a time."""
    return CHUNK_VALUES["cpu" if device.type == "cpu" else "gpu"]


def _chunk_cells(cells_NC: Tensor) -> int:
    return max(1, chunk_values(cells_NC.device) // cells_NC.shape[1])


def _is_one_chunk(cells_NC: Tensor) -> bool:
    return len(cells_NC) <= _chunk_cells(cells_NC)


def _refuse_none(cells_NC: Tensor) -> None:
    if len(cells_NC) == 0:
        raise SlideError("head", "was given no cell to read", "check that the slide has tissue")
