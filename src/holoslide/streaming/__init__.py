"""Run a module over a map of any size tile by tile, forwards and backwards, exactly.

The names below are the public interface, for any module of yours; each is imported when it is first used.
`forward_tiles` gives a module's output as a `FeatureMap`, `backward_tiles` adds to the module's `.grad`: both what
the module would give on the whole map. Several segments that are trained end to end are a `Chain`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holoslide.streaming.chain import Chain
    from holoslide.streaming.features import FeatureMap, GradientMap, TensorGradient
    from holoslide.streaming.sources import TensorSource
    from holoslide.streaming.storage import Storage, StorageConfig
    from holoslide.streaming.tiled import OutputGradient, Segment, Tiling, backward_tiles, forward_tiles
    from holoslide.streaming.tissue import Tissue

__all__ = [
    "Chain",
    "FeatureMap",
    "GradientMap",
    "OutputGradient",
    "Segment",
    "Storage",
    "StorageConfig",
    "TensorGradient",
    "TensorSource",
    "Tiling",
    "Tissue",
    "backward_tiles",
    "forward_tiles",
]

_HOMES = {
    "Chain": "chain",
    "FeatureMap": "features",
    "GradientMap": "features",
    "OutputGradient": "tiled",
    "Segment": "tiled",
    "Storage": "storage",
    "StorageConfig": "storage",
    "TensorGradient": "features",
    "TensorSource": "sources",
    "Tiling": "tiled",
    "Tissue": "tissue",
    "backward_tiles": "tiled",
    "forward_tiles": "tiled",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        message = f"module 'holoslide.streaming' has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(f"holoslide.streaming.{_HOMES[name]}"), name)
