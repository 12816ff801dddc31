"""Several segments one after another: streamed one at a time, trained end to end."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from holoslide.streaming.features import FeatureMap, GradientMap, GridSpec, InputGradient
from holoslide.streaming.receptive import Receptive
from holoslide.streaming.sources import Source
from holoslide.streaming.storage import Storage
from holoslide.streaming.tiled import Gradients, Segment, Tiling, backward_tiles, forward_tiles


class Chain:
    """Segments run one after another, whose maps at the borders between them are kept until `backward`.

    With one segment this is a local module of the paper. With all of a network's segments it is exact
    end-to-end training: the gradient crosses each border, halos summed, and so does that of the glass.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        tilings: Sequence[Tiling],
        storage: Storage,
        *,
        block: int = 1,
        everywhere: bool = False,
    ) -> None:
        """`block` and `everywhere` are the last map's, as in `GridSpec`."""
        self.segments, self.tilings, self.storage = list(segments), list(tilings), storage
        self._block, self._everywhere = block, everywhere
        self._sources: list[Source] = []
        self._output: FeatureMap | None = None

    def forward(
        self,
        source: Source,
        *,
        training: bool = False,
        input_grad: bool = False,
        wanted: Sequence[Receptive | None] = (),
    ) -> FeatureMap:
        """The last segment's map. When `training`, inner maps and graphs are kept for one `backward`, and with
        `input_grad` the graphs reach back to the source.

        `wanted` says for each segment's map which cells anybody will read (default: all), as in `GridSpec`.
        """
        self._sources = []
        last = len(self.segments) - 1
        for i, (segment, tiling) in enumerate(zip(self.segments, self.tilings, strict=True)):
            spec = GridSpec(
                tiling.side,
                block=self._block if i == last else 1,
                everywhere=self._everywhere and i == last,
                wanted=wanted[i] if wanted else None,
            )
            used = tiling if training else Tiling(tiling.side, tiling.batch)
            with torch.set_grad_enabled(training and torch.is_grad_enabled()):
                output = forward_tiles(
                    segment,
                    source,
                    tiling=used,
                    spec=spec,
                    storage=self.storage,
                    input_grad=input_grad or i > 0,
                )
            if training:
                self._sources.append(source)
            elif i > 0 and isinstance(source, FeatureMap):
                source.free()
            source = output
        self._output = output if training else None
        return output

    def backward(self, *grads: Gradients, into: InputGradient | None = None) -> None:
        """Add dL/d(parameters) of every segment to its module's `.grad`, and dL/d(source) to `into` where it is
        given; `grads` are dL/d(the last output), and add up.
        """
        if self._output is None:
            message = "Chain.backward: there is nothing to go back through; call forward with training=True"
            raise RuntimeError(message)
        output = self._output
        behind: GradientMap | None = None
        for i in reversed(range(len(self.segments))):
            source = self._sources[i]
            before = GradientMap(source) if i > 0 and isinstance(source, FeatureMap) else None
            following = grads if behind is None else (behind,)
            backward_tiles(self.segments[i], source, output, *following, into=before if i > 0 else into)
            if behind is not None:
                behind.free()
                output.free()
            behind = before
            if isinstance(source, FeatureMap):
                output = source
        self._sources, self._output = [], None
