"""Files that were damaged: pixels or one line, whatever is in them. `benchmarks/fuzz.py` does thousands."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.damage import RASTER, made_sources, probe, real_sources
from benchmarks.fuzz import fuzz

BUSY_S = 240.0  # on a machine with much else to do, importing a library takes longer than any slide


def test_whole_files_are_read(tmp_path: Path) -> None:
    """Else the damaged ones would prove nothing."""
    for name, data in {**made_sources(), "raster.tif": RASTER.read_bytes()}.items():
        path = tmp_path / name
        path.write_bytes(data)
        assert probe((path, tmp_path), lambda: None, limit_memory=False) == ("read", "")


def test_damaged_files_of_many_kinds() -> None:
    sources = {**made_sources(), "raster.tif": RASTER.read_bytes()}
    found, bad, _ = fuzz(sources, 300, seed=1, limit_s=BUSY_S)
    assert bad == []
    assert found.total() == 300
    assert found["read"] > 30  # not all damage is deadly


@pytest.mark.data
def test_damaged_real_files(data_dir: Path) -> None:
    sources = real_sources(data_dir / "wsi", largest_bytes=2**17)
    assert len(sources) >= 6
    found, bad, _ = fuzz(sources, 60, seed=2, limit_s=BUSY_S)
    assert bad == []
    assert found.total() == 60
