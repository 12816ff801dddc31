"""The host: its cores, and its memory: how much is free, how the C library asks for it, and how it gives it back.

Tensors of many sizes follow each other here, and glibc keeps the pieces of each size: a training step of 600 MB of
tensors grew to 1 GB of resident memory, and a run of many slides to 1.4 times its plan. So where a plan is
followed, or maps go to a file, blocks of `_APART_BYTES` and more are each asked of the system and handed back at
once. That costs the zeroing of new pages; large pages, which `holoslide/__init__.py` asks PyTorch for, make it 8 %
of a step instead of 20 to 40 %.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_CGROUPS = (  # limit and use: version 2, version 1
    (_CGROUP / "memory.max", _CGROUP / "memory.current"),
    (_CGROUP / "memory/memory.limit_in_bytes", _CGROUP / "memory/memory.usage_in_bytes"),
)
_WORTH_HANDING_BACK = 2**26
_M_MMAP_THRESHOLD, _APART_BYTES = -3, 2**22  # malloc.h


def cores() -> int:
    """Processor cores that this process may use."""
    allowed = getattr(os, "sched_getaffinity", None)  # macOS has none
    return len(allowed(0)) if allowed is not None else os.cpu_count() or 1


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device now; a CPU's is what the machine, or the job's container, can still give."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = (
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    )  # where the system does not tell: macOS
    if _MEMINFO.exists():  # counts the cache that would make room, too
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
        free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), free)
    return min([free, *(_room(*files) for files in _CGROUPS)])


def hand_back_at_once() -> None:
    """From now on return large blocks to the machine when they are freed; for good, and only where glibc allows."""
    if _LIBC is not None:
        _LIBC.mallopt(_M_MMAP_THRESHOLD, _APART_BYTES)


def hand_back_freed(after_bytes: int | None = None) -> None:
    """Return freed memory to the machine: after a whole slide, or after work of so many bytes within one.

    Else what slides of many sizes leave behind adds up. Asking costs milliseconds, so small work within a slide
    does not ask. Only glibc can be asked.
    """
    small = after_bytes is not None and after_bytes < _WORTH_HANDING_BACK
    if not small and _LIBC is not None:
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


_LIBC = _glibc()
