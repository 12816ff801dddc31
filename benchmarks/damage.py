"""Damage done to slides and rasters, and what comes of reading them: for `fuzz.py` and the tests."""

from __future__ import annotations

import importlib
import json
import random
import resource
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
from PIL import Image

from holoslide.errors import HoloslideError
from holoslide.geometry import Box
from holoslide.slides.prepare import PrepareConfig, PrepareJob, prepare_slide
from holoslide.slides.raster import Raster
from holoslide.slides.reader import open_slide

REPO = Path(__file__).resolve().parent.parent
LIBRARIES = ("tifffile", "imagecodecs", "PIL.ImageCms", "openslide", "pydicom", "wsidicom")
MEMORY_BYTES = 6 * 2**30  # of address space; a reader that asks for more is told so
RASTER = REPO / "tests" / "slides" / "golden" / "raster-v1.tif"
_ORDERS: tuple[Literal["little", "big"], ...] = ("little", "big")
EXTREMES = (0, 1, 2, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1)


def made_sources() -> dict[str, bytes]:
    """Small files of many kinds, by a name whose last word is the extension."""
    rng = np.random.default_rng(0)
    stain = np.array((190, 110, 160)) + rng.integers(-25, 25, (11, 14, 3))
    rgb = np.full((160, 208, 3), 243, np.uint8)
    rgb[24:112, 40:152] = np.kron(stain, np.ones((8, 8, 1))).astype(np.uint8)
    kinds: dict[str, dict[str, Any]] = {
        "tiled-jpeg.tif": {"tile": (64, 64), "compression": "jpeg"},
        "tiled-jp2k.tif": {"tile": (64, 64), "compression": "jpeg2000"},
        "tiled-lzw.tif": {"tile": (64, 64), "compression": "lzw", "predictor": True},
        "striped-deflate.tif": {"rowsperstrip": 16, "compression": "zlib"},
        "striped-raw.tif": {"rowsperstrip": 16},
        "planar.tif": {"planarconfig": "separate", "rowsperstrip": 32, "compression": "zlib"},
        "big.tif": {"bigtiff": True, "tile": (64, 64), "compression": "zlib"},
        "webp.tif": {"tile": (64, 64), "compression": "webp"},
        "ome.ome.tif": {"tile": (64, 64), "compression": "zlib", "ome": True},
    }
    sources = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, options in kinds.items():
            path = Path(folder) / name
            values = np.moveaxis(rgb, -1, 0) if name.startswith("planar") else rgb
            tifffile.imwrite(path, values, photometric="rgb", resolution=(2_500, 2_500),
                             resolutionunit="CENTIMETER", **options)  # fmt: skip
            sources[name] = path.read_bytes()
        path = Path(folder) / "pyramid.ome.tif"
        with tifffile.TiffWriter(path, ome=True) as tiff:
            tiff.write(rgb, subifds=2, tile=(64, 64), photometric="rgb", compression="jpeg")
            for step in (2, 4):
                tiff.write(
                    rgb[::step, ::step], subfiletype=1, tile=(64, 64), photometric="rgb", compression="jpeg"
                )
        sources[path.name] = path.read_bytes()
        for name in ("plain.png", "plain.jpg"):
            Image.fromarray(rgb).save(Path(folder) / name)
            sources[name] = (Path(folder) / name).read_bytes()
    return sources


def real_sources(folder: Path, *, largest_bytes: int) -> dict[str, bytes]:
    """The real slides below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.name: p.read_bytes() for p in files if p.stat().st_size <= largest_bytes}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A file with one to a few faults; most strike where the header and the directories are."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not out:
            break
        at = _place(out, rng)
        kind = rng.randrange(7)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.randrange(256)
        elif kind in (2, 3):
            width, order = rng.choice((2, 4, 8)), rng.choice(_ORDERS)
            value = rng.choice((*EXTREMES, rng.getrandbits(32))) % 2 ** (8 * width)
            out[at : at + width] = value.to_bytes(width, order)
        elif kind == 4:
            length = min(len(out) - at, rng.choice((4, 12, 100, 4000)))
            out[at : at + length] = bytes(length) if rng.random() < 0.5 else rng.randbytes(length)
        elif kind == 5:
            del out[at : at + rng.choice((1, 2, 12, 500))]
        elif rng.random() < 0.3:
            del out[rng.randrange(len(out)) :]
    return bytes(out)


def _place(data: bytearray, rng: random.Random) -> int:
    """Anywhere, near the start, or near a TIFF's first directory."""
    mark = bytes(data[:2])
    where = rng.random()
    if where < 0.2:
        return rng.randrange(len(data))
    if where < 0.6 and mark in (b"II", b"MM"):
        order: Literal["little", "big"] = "little" if mark == b"II" else "big"
        is_big = 43 in data[2:4]
        start = int.from_bytes(data[8:16] if is_big else data[4:8], order)
        if start < len(data):
            return min(len(data) - 1, start + rng.randrange(400))
    return rng.randrange(min(len(data), rng.choice((16, 400, 4000))))


def probe(work: tuple[Path, Path], beat: Callable[[], None], *, limit_memory: bool = True) -> tuple[str, str]:
    """What becomes of one file, in a worker: the kind of outcome, and its text."""
    path, scratch = work
    for name in LIBRARIES:  # a busy machine may take as long for them as a case may take
        importlib.import_module(name)
        beat()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if limit_memory and soft != MEMORY_BYTES:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, hard))
    try:
        if path.name.startswith("raster"):
            _try_raster(path)
        else:
            _try_slide(path, scratch)
    except HoloslideError as error:
        text = str(error)
        return ("refused" if "\n" not in text and text.isprintable() else "odd_messages"), text
    except MemoryError:
        return "too_large", ""
    except Exception:  # noqa: BLE001 - any that comes to here is what is looked for
        return "tracebacks", traceback.format_exc()
    return "read", ""


def _try_slide(path: Path, scratch: Path) -> None:
    with open_slide(path, fallback_mpp=0.5, icc=True) as slide:
        json.dumps(slide.facts())
        own = slide.require_mpp()
        slide.read(Box(0, 0, 70, 90), own.y)
        height, width = slide.shape_l0
        slide.read(Box.at(height // 2, width // 2, 60, 60), own.y * 2)
    mpp = max(own.y, own.x, 2.0)
    prepare_slide(PrepareJob(path.name, path, fallback_mpp=0.5), scratch, PrepareConfig(mpp=mpp))


def _try_raster(path: Path) -> None:
    with Raster.open(path) as raster:
        raster.read(Box(-5, -5, 200, 200))
        raster.thumbnail(100)
