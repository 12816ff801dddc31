"""What the tests of the slide reader share: an oracle of its averages, and simple files."""

from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from holoslide.geometry import Box
from holoslide.slides.facts import GLASS

EXACT = 0.52  # half a grey level of rounding, and the 0.02 that the docstring of area_average allows


# --- An oracle anyone can check by reading: float64, dense weights, straight from the pixels of one level.


def overlap(edges: NDArray[np.floating], length: int) -> NDArray[np.float64]:
    """How much of each of `length` pixels lies between neighbouring edges, (n, length)."""
    pixel = np.arange(length)
    inside = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    return np.maximum(inside, 0.0)


def averaged(
    image: NDArray[np.uint8], y: NDArray[np.floating], x: NDArray[np.floating]
) -> NDArray[np.float64]:
    """The mean colour between edges of an image that lies on glass, not rounded."""
    rows, columns = overlap(y, image.shape[0]), overlap(x, image.shape[1])
    sums = np.einsum("iy,yxc,jx->ijc", rows, image.astype(np.float64), columns, optimize=True)
    area = np.outer(np.diff(y), np.diff(x))
    outside = area - np.outer(rows.sum(1), columns.sum(1))
    return (sums + outside[..., None] * np.array(GLASS)) / area[..., None]


def expected(
    image: NDArray[np.uint8],
    box: Box,
    factor: tuple[float, float],
    origin: tuple[int, int],
    down: float = 1.0,
) -> NDArray[np.float64]:
    """What `Reader.read` should give, before rounding, from the pixels of a level downsampled by `down`."""
    y = (origin[0] + np.arange(box.top, box.bottom + 1) * factor[0]) / down
    x = (origin[1] + np.arange(box.left, box.right + 1) * factor[1]) / down
    return averaged(image, y, x)


# --- Slides to read.


def noise(height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(height * 10_007 + width).integers(
        0, 256, (height, width, channels), np.uint8
    )


def per_cm(um: float) -> float:
    return 10_000 / um


KINDS: dict[str, dict[str, Any]] = {
    "tiled-jpeg": {"tile": (64, 64), "compression": "jpeg"},
    "tiled-deflate": {"tile": (32, 48), "compression": "deflate", "predictor": True},
    "striped-lzw": {"rowsperstrip": 7, "compression": "lzw"},
    "one-strip": {"compression": "deflate"},
    "raw": {},
    "bigtiff": {"bigtiff": True, "tile": (64, 64), "compression": "zstd"},
    "big-endian": {"byteorder": ">", "rowsperstrip": 16},
    "planar": {"planarconfig": "separate", "rowsperstrip": 9, "compression": "deflate"},
    "planar-tiled": {"planarconfig": "separate", "tile": (32, 32), "compression": "deflate"},
    "planar-raw": {"planarconfig": "separate"},
}


def write_ome(path: Path, *, metadata: dict[str, Any], levels: int = 3) -> NDArray[np.uint8]:
    image = noise(300, 420)
    with tifffile.TiffWriter(path, ome=True) as writer:
        options: dict[str, Any] = {"photometric": "rgb", "tile": (64, 64), "compression": "deflate"}
        writer.write(image, subifds=levels - 1, metadata={"axes": "YXS", **metadata}, **options)
        for level in range(1, levels):
            writer.write(image[:: 2**level, :: 2**level], subfiletype=1, **options)
    return image
