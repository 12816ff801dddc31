"""Who makes a raster: one writer at a time, on one machine or several, whatever becomes of the others."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO
from unittest.mock import patch

import pytest
from benchmarks.kill import contents

from holoslide import files
from holoslide.slides import claim
from holoslide.slides import prepare as prepare_module
from holoslide.slides.prepare import PrepareConfig, PrepareJob, prepare_slide
from tests.slides.drawn import blobs, paint, write_slide


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 x 600 px at 1 um/px."""
    path = tmp_path_factory.mktemp("slides") / "one.tif"
    return write_slide(path, paint(blobs((500, 600), reach=0.4)), 1.0)


HOLDER = """
import sys, time
from pathlib import Path
from holoslide.slides.claim import claimed
with claimed(Path(sys.argv[1]), lambda: None):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(target: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that holds the claim of a raster."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, target, str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_raster_that_another_process_writes_is_waited_for(slide: Path, tmp_path: Path) -> None:
    beats: list[float] = []
    with holder(tmp_path / "one.tif", 3.0):
        result = prepare_slide(
            PrepareJob("one", slide), tmp_path, PrepareConfig(), beat=lambda: beats.append(time.monotonic())
        )
    assert result.status == "made"
    assert result.seconds > 1.0
    assert len(beats) > 2  # it said that it is alive while it waited


def test_the_claim_of_a_killed_process_is_taken_over_at_once(slide: Path, tmp_path: Path) -> None:
    with holder(tmp_path / "one.tif", 600) as process:
        process.kill()
    (tmp_path / ".one.tif.part").write_bytes(b"half a raster" * 1000)
    result = prepare_slide(PrepareJob("one", slide), tmp_path, PrepareConfig())
    assert (result.status, result.seconds < 20) == ("made", True)
    before = contents(tmp_path)
    assert sorted(before) == [".one.tif.source", "one.tif"]
    (tmp_path / ".one.tif.part").write_bytes(b"half a raster")
    assert prepare_slide(PrepareJob("one", slide), tmp_path, PrepareConfig()).status == "reused"
    assert contents(tmp_path) == before


def test_a_claim_of_another_machine_lasts_as_long_as_it_is_touched(slide: Path, tmp_path: Path) -> None:
    """Its kernel's locks may not reach this one: the file is all that is known of the other machine."""
    other, started = tmp_path / ".one.tif.lock", time.monotonic()
    other.write_bytes(b"another machine")

    def live() -> None:
        if time.monotonic() < started + 2.5:
            os.utime(other)

    with patch.object(claim, "LEASE_S", 1.0):
        result = prepare_slide(PrepareJob("one", slide), tmp_path, PrepareConfig(), beat=live)
    assert result.status == "made"
    assert 3.4 < result.seconds < 60
    assert sorted(contents(tmp_path)) == [".one.tif.source", "one.tif"]


def test_a_file_system_without_locks_serves(slide: Path, tmp_path: Path) -> None:
    missing = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    with patch.object(files.fcntl, "flock", side_effect=missing):
        assert prepare_slide(PrepareJob("one", slide), tmp_path, PrepareConfig()).status == "made"
        (tmp_path / ".one.tif.lock").write_bytes(b"another machine")
        with patch.object(claim, "LEASE_S", 1.0):
            result = prepare_slide(PrepareJob("one", slide), tmp_path, PrepareConfig(jpeg_quality=91))
    assert (result.status, result.seconds > 1.0) == ("made", True)


def overtake(file: IO[bytes], target: Path) -> None:
    file.write(b"late")
    claim.part_of(target).unlink()
    claim.part_of(target).write_bytes(b"the other's")


def test_who_lost_the_claim_gives_way(slide: Path, tmp_path: Path) -> None:
    """A writer that slept too long finds its unfinished file replaced, and leaves the new one alone."""
    target = tmp_path / "one.tif"
    with pytest.raises(claim.LostClaim), claim.unfinished(target) as file:
        overtake(file, target)
    assert contents(tmp_path) == {".one.tif.part": b"the other's"}


def test_who_lost_the_claim_begins_anew(slide: Path, tmp_path: Path) -> None:
    late = iter([claim.LostClaim])

    def refuse_changed(*_: object) -> None:
        for error in late:
            raise error

    with patch.object(prepare_module, "_refuse_changed", refuse_changed):
        assert prepare_slide(PrepareJob("one", slide), tmp_path, PrepareConfig()).status == "made"
    assert sorted(contents(tmp_path)) == [".one.tif.source", "one.tif"]
