"""Where feature maps live: on the device while a byte budget lasts, then in host memory, then in a file."""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from holoslide.errors import MemoryPlanError
from holoslide.streaming.host import hand_back_at_once

# Of pinned memory: PyTorch rounds each request up to a power of two, and hands what was freed on to requests of
# that size alone. So maps are cut into blocks just under one power, whatever the slide: little is wasted, and the
# next slide, of another size, need not ask the system, which is slow.
_BLOCK_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class StorageConfig:
    """Byte budgets of the tiers; on a CPU the device *is* the host, and only `device_bytes` counts.

    `folder` is where the overflow file goes (default: the system's temporary folder).
    """

    device_bytes: int = 2**31
    host_bytes: int = 0
    folder: str | None = None


class Storage:
    """Hands out arrays of equal tiles under the budgets, and gets the room back when they are freed."""

    def __init__(self, config: StorageConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self._left = {
            "device": config.device_bytes,
            "host": config.host_bytes if device.type != "cpu" else 0,
        }

    def array(
        self, count: int, shape: tuple[int, ...], dtype: torch.dtype, *, zero: bool = False
    ) -> TileArray:
        """Room for `count` tiles of `shape`, as many as fit in the fastest tier, the rest further down."""
        tile_bytes = math.prod(shape) * dtype.itemsize
        counts, rest = {}, count
        for tier, left in self._left.items():
            counts[tier] = min(rest, left // tile_bytes) if tile_bytes else rest
            self._left[tier] -= counts[tier] * tile_bytes
            rest -= counts[tier]
        return TileArray(self, counts, rest, shape, dtype, zero=zero)

    def afford(self, size_bytes: int, count: int) -> int:
        """How many of `count` graphs of a size fit in what is left of the device's budget; takes that room."""
        fit = count if size_bytes == 0 else max(0, min(count, self._left["device"] // size_bytes))
        self._left["device"] -= fit * size_bytes
        return fit

    def give_back(self, tier: str, size_bytes: int) -> None:
        """Called for an array, or graphs, that are freed."""
        self._left[tier] += size_bytes


class TileArray:
    """`count` tensors of one shape, numbered from 0; those past the memory budgets are in a file."""

    def __init__(
        self,
        storage: Storage,
        counts: dict[str, int],
        in_file: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        zero: bool,
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self._folder = storage.config.folder
        self._count = sum(counts.values()) + in_file
        self._tile_bytes = math.prod(shape) * dtype.itemsize
        make = torch.zeros if zero else torch.empty
        self._device = make((counts["device"], *shape), dtype=dtype, device=storage.device)
        self._in_host, self._per_block = counts["host"], max(1, _BLOCK_BYTES // max(1, self._tile_bytes))
        pinned = storage.device.type == "cuda"
        self._host = [
            make((min(self._per_block, self._in_host - first), *shape), dtype=dtype, pin_memory=pinned)
            for first in range(0, self._in_host, self._per_block)
        ]
        self._file = -1
        if in_file:
            hand_back_at_once()  # memory is short: the resident set must be what tensors take
            self._file = _unlinked_file(storage.config.folder)
            os.ftruncate(self._file, in_file * self._tile_bytes)  # a sparse file reads as zeros
        sizes = {tier: count * self._tile_bytes for tier, count in counts.items()}
        # Also where nobody calls `free`: an array that an error left behind must not keep its room.
        self._release = weakref.finalize(self, _release, storage, sizes, self._file)

    @property
    def size_bytes(self) -> int:
        """Of all tiles, wherever they are."""
        return self._count * self._tile_bytes

    @property
    def in_file(self) -> bool:
        """Whether any tile is in the file."""
        return self._file >= 0

    def get(self, index: int, rows: slice = slice(None)) -> Tensor:
        """Rows of a tile: a view where it is in memory, a copy where it is in the file."""
        if index < len(self._device):
            return self._device[index, rows]
        if index < self._in_memory:
            block, place = divmod(index - len(self._device), self._per_block)
            return self._host[block][place, rows]
        start, stop, _ = rows.indices(self.shape[0])
        out = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        view = _bytes(out)
        position, done = self._position(index) + start * (self._tile_bytes // self.shape[0]), 0
        while done < len(view):
            read = os.preadv(self._file, [view[done:]], position + done)
            if read == 0:
                message = "the overflow file of feature maps ended early"
                raise OSError(message)
            done += read
        return out

    def put(self, index: int, tile: Tensor) -> None:
        """Write a tile, or its first rows and columns where it is smaller than the array's shape."""
        height, width = tile.shape[:2]
        if index < self._in_memory:
            self.get(index)[:height, :width].copy_(tile)
            return
        if tile.shape != self.shape:
            whole = torch.zeros(self.shape, dtype=self.dtype)
            whole[:height, :width] = tile
            tile = whole
        view, done = _bytes(tile.detach().to("cpu", self.dtype).contiguous()), 0
        while done < len(view):
            try:
                done += os.pwrite(self._file, view[done:], self._position(index) + done)
            except OSError as error:
                raise _no_room(self._folder, error) from error

    def add(self, index: int, rows: slice, columns: slice, values: Tensor) -> None:
        """Add values (h, w, C) to a part of a tile."""
        tile = self.get(index)
        tile[rows, columns].add_(values.to(tile.device))  # `+=` would copy the sum onto itself
        if index >= self._in_memory:
            self.put(index, tile)

    def free(self) -> None:
        """Give the room back; the array must not be used again."""
        self._release()
        self._device = self._device[:0].clone()
        self._host, self._in_host = [], 0
        self._file = -1

    @property
    def _in_memory(self) -> int:
        """How many tiles are not in the file."""
        return len(self._device) + self._in_host

    def _position(self, index: int) -> int:
        return (index - self._in_memory) * self._tile_bytes


def _unlinked_file(folder: str | None) -> int:
    """A file without a name: it vanishes with the process, whatever ends it."""
    try:
        handle, name = tempfile.mkstemp(prefix="holoslide-features-", dir=folder)
    except OSError as error:
        raise _no_room(folder, error) from error
    Path(name).unlink()
    return handle


def _no_room(folder: str | None, error: OSError) -> MemoryPlanError:
    return MemoryPlanError(
        folder or tempfile.gettempdir(),
        f"cannot hold the feature maps that do not fit in memory ({error.strerror})",
        "name a folder with room (stream.folder), or allow more memory (stream.memory_gib)",
    )


def _release(storage: Storage, sizes: dict[str, int], file: int) -> None:
    for tier, size_bytes in sizes.items():
        storage.give_back(tier, size_bytes)
    if file >= 0:
        os.close(file)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, of any dtype (NumPy has no bfloat16)."""
    return tensor.view(torch.uint8).numpy().data.cast("B")
