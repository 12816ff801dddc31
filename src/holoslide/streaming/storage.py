"""Where feature maps live: on the device while a byte budget lasts, then in host memory, then in a file."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_CGROUPS = (  # limit and use: version 2, version 1
    (_CGROUP / "memory.max", _CGROUP / "memory.current"),
    (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),
)
_WORTH_HANDING_BACK = 2**26


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
        """Called by an array that is freed."""
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
        self._storage, self._counts = storage, counts
        self._count = sum(counts.values()) + in_file
        self._tile_bytes = math.prod(shape) * dtype.itemsize
        make = torch.zeros if zero else torch.empty
        self._device = make((counts["device"], *shape), dtype=dtype, device=storage.device)
        self._host = make(
            (counts["host"], *shape),
            dtype=dtype,
            pin_memory=counts["host"] > 0 and storage.device.type == "cuda",
        )
        self._file = -1
        if in_file:
            self._file = _unlinked_file(storage.config.folder)
            os.ftruncate(self._file, in_file * self._tile_bytes)  # a sparse file reads as zeros

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
        if index < len(self._device) + len(self._host):
            return self._host[index - len(self._device), rows]
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
        if index < len(self._device) + len(self._host):
            self.get(index)[:height, :width].copy_(tile)
            return
        if tile.shape != self.shape:
            whole = torch.zeros(self.shape, dtype=self.dtype)
            whole[:height, :width] = tile
            tile = whole
        view, done = _bytes(tile.detach().to("cpu", self.dtype).contiguous()), 0
        while done < len(view):
            done += os.pwrite(self._file, view[done:], self._position(index) + done)

    def add(self, index: int, rows: slice, columns: slice, values: Tensor) -> None:
        """Add values (h, w, C) to a part of a tile."""
        tile = self.get(index)
        tile[rows, columns] += values.to(tile.device)
        if index >= len(self._device) + len(self._host):
            self.put(index, tile)

    def free(self) -> None:
        """Give the room back; the array must not be used again."""
        for tier, count in self._counts.items():
            self._storage.give_back(tier, count * self._tile_bytes)
        self._counts = {}
        self._device = self._device[:0].clone()
        self._host = self._host[:0].clone()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _position(self, index: int) -> int:
        return (index - len(self._device) - len(self._host)) * self._tile_bytes


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device now; a CPU's is what the machine, or the job's container, can still give."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _MEMINFO.exists():  # counts the cache that would make room, too
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), free)
    return min([free, *(_room(*files) for files in _CGROUPS)])


def hand_back_freed(after_bytes: int) -> None:
    """After work of that size on a CPU, return freed memory to the machine, so that the peak stays what it was.

    The C library keeps what tensors of one size leave behind, and the next module's are of other sizes. Asking
    costs milliseconds, so small work does not. Only glibc can be asked.
    """
    if after_bytes >= _WORTH_HANDING_BACK and _LIBC is not None:
        _LIBC.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None


def _room(limit: Path, used: Path) -> int:
    """What a control group may still take, without bound where there is none."""
    try:
        most, now = limit.read_text(encoding="ascii").strip(), used.read_text(encoding="ascii")
    except OSError:
        return sys.maxsize
    return max(0, int(most) - int(now)) if most.isdigit() else sys.maxsize


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, of any dtype (NumPy has no bfloat16)."""
    return tensor.view(torch.uint8).numpy().data.cast("B")


def _unlinked_file(folder: str | None) -> int:
    """A file without a name: it vanishes with the process, whatever ends it."""
    handle, name = tempfile.mkstemp(prefix="holoslide-features-", dir=folder)
    Path(name).unlink()
    return handle


_LIBC = _glibc()
