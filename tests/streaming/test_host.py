"""What the C library keeps of freed memory goes back to the machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from holoslide.streaming import host

# 300 MB in blocks below the size that is always handed back, each with something behind it that stays.
FREED_IN_PIECES = """
from holoslide.streaming.host import hand_back_at_once, hand_back_freed
from holoslide.training.history import resident_bytes
hand_back_at_once()
blocks, kept = [], []
for _ in range(300):
    blocks.append(b"x" * 10**6)
    kept.append(b"x" * 10**5)
most = resident_bytes()
blocks.clear()
hand_back_freed(10**6)
print(most - resident_bytes())
hand_back_freed()
print(most - resident_bytes())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="another OpenMP has other words for it")
@pytest.mark.parametrize(("given", "turns"), [({}, "0"), ({"GOMP_SPINCOUNT": "300000"}, "300000")])
def test_waiting_threads_leave_their_cores_to_others_unless_told(given: dict[str, str], turns: str) -> None:
    """By what OpenMP itself says of how long a thread goes round before it sleeps."""
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    found = subprocess.run(
        [sys.executable, "-c", "import holoslide, torch"], env=kept | given | {"OMP_DISPLAY_ENV": "verbose"},
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{turns}'" in found.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc can be asked")
def test_freed_memory_goes_back_after_a_slide_and_not_after_every_trifle():
    found = subprocess.run(
        [sys.executable, "-c", FREED_IN_PIECES], capture_output=True, text=True, check=True, timeout=300
    )
    after_a_trifle, after_a_slide = map(int, found.stdout.split())
    assert after_a_trifle < 100e6
    assert after_a_slide > 250e6


def test_free_memory_is_known_where_the_system_does_not_tell_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on macOS, which has no /proc and does not count free pages: half of all there is."""
    ask, half = os.sysconf, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    monkeypatch.setattr(host, "_MEMINFO", tmp_path / "none")
    monkeypatch.setattr(os, "sysconf", lambda name: ask({"SC_AVPHYS_PAGES": "unknown"}.get(name, name)))
    assert 0 < host.free_bytes(torch.device("cpu")) <= half
