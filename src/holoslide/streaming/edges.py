"""Whether a border of zeros is exact: windows end where the map ends, so that the layers' own padding acts there.

That gives what the whole map gives as long as padding is made of what a window holds. A layer that mirrors more
than it reaches reads cells further in; one that pads by the map's own side, or joins its ends, sees another map.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from holoslide.errors import NotLocal
from holoslide.geometry import Box
from holoslide.streaming.probe import Known, Link, field_of, found_once, label
from holoslide.streaming.receptive import Receptive
from holoslide.streaming.trials import copy_of, least_side, shape_twin, tiles_hold, trial_map, varied

_PLACES = (0, 1, 2, -3, -2, -1)  # along both axes, of tiles of one cell

_known: Known[bool] = {}


def refuse_at_edges(module: nn.Module, channels: int, chain: Sequence[Link]) -> None:
    """Raise `NotLocal`, by its name, for a link that is not exact at a map's edge, unless the whole module is.

    `chain` are the module's links: padding and the convolution that reads it may be two of them.
    """
    seen = channels
    for link in chain:
        if not _exact(link.module, seen, link.field):
            if len(chain) > 1 and _exact(module, channels, field_of(chain)):
                return
            raise NotLocal(
                label(link.module, link.name),
                "gives a window at the map's edge other values than the whole map",
                "stream it with the border of glass, or choose another padding",
            )
        seen = link.out_channels


def _exact(module: nn.Module, channels: int, field: Receptive) -> bool:
    return found_once(_known, module, channels, lambda: _try(module, channels, field))


def _try(module: nn.Module, channels: int, field: Receptive) -> bool:
    twin, stride = varied(copy_of(module).double().cpu()), field.stride
    least = (field.margin_before + field.margin_after + len(_PLACES)) * stride
    side = least_side(shape_twin(module), channels, least)
    for shape in {(side, side), (side + stride - 1, side + min(1, stride - 1))}:
        whole = trial_map(channels, *shape)
        try:
            made = twin(whole.clone()).detach()
        except RuntimeError:  # it takes none but whole strides, whatever the border
            continue
        for place in _PLACES:
            tile = Box.at(place % made.shape[2], place % made.shape[3], 1, 1)
            try:
                if not tiles_hold(twin, (whole, made), [tile], field, clip=True):
                    return False
            except RuntimeError:  # a window is too small to be padded
                return False
    return True
