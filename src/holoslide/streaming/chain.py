"""Several segments between two gradient barriers: streamed one at a time, trained end to end inside."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from holoslide.streaming.features import Batch, FeatureMap, GradientMap, GridSpec, Source
from holoslide.streaming.receptive import Receptive
from holoslide.streaming.storage import Storage
from holoslide.streaming.tiled import Pull, Segment, Tiling, backward_glass, backward_tiles, forward_tiles


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
        self, source: Source, *, training: bool = False, wanted: Sequence[Receptive | None] = ()
    ) -> FeatureMap:
        """The last segment's map. When `training`, inner maps and graphs are kept for one `backward`.

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
            output = forward_tiles(segment, source, spec, self.storage, tiling=used, input_grad=i > 0)
            if training:
                self._sources.append(source)
            elif i > 0 and isinstance(source, FeatureMap):
                source.free()
            source = output
        self._output = output if training else None
        return output

    def backward(self, pull: Pull) -> None:
        """Add dL/d(parameters) of every segment to its module's `.grad`; `pull` is about the last output."""
        assert self._output is not None, "backward needs a forward pass with training=True"
        output, grads = self._output, None
        for i in reversed(range(len(self.segments))):
            segment, source = self.segments[i], self._sources[i]
            into = GradientMap(source, self.storage) if i > 0 and isinstance(source, FeatureMap) else None
            if grads is not None and segment.border == "glass":
                glass = backward_glass(segment, source.glass.to(segment.dtype), grads.glass)
                if into is not None:
                    into.glass += glass
            backward_tiles(segment, source, output, pull if grads is None else _from(grads), into=into)
            if grads is not None:
                grads.free()
                output.free()
            grads = into
            if isinstance(source, FeatureMap):
                output = source
        self._sources, self._output = [], None


def _from(grads: GradientMap) -> Pull:
    def pull(batch: Batch, result: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [(result, grads.windows(batch.tiles, batch.boxes[0].shape))]

    return pull
