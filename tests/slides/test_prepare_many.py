"""Preparing many slides: each has its outcome, in order, and what cannot be said of all is refused before any."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

from holoslide.errors import CohortError, ConfigError, SlideError
from holoslide.slides import prepare as prepare_module
from holoslide.slides.crew import Died
from holoslide.slides.prepare import PrepareConfig, PrepareJob, prepare
from tests.slides.drawn import blobs, paint, write_slide


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """900 x 1100 px at 1 um/px."""
    path = tmp_path_factory.mktemp("slides") / "one.tif"
    return write_slide(path, paint(blobs((900, 1100))), 1.0)


def test_results_come_in_the_order_of_the_jobs(slide: Path, tmp_path: Path) -> None:
    big = write_slide(tmp_path / "big.tif", paint(blobs((2500, 2500))), 1.0)
    text = tmp_path / "text.svs"
    text.write_text("no slide")
    jobs = [
        PrepareJob("big", big),
        PrepareJob("text", text),
        PrepareJob("one", slide),
        PrepareJob("-x\n", slide),
    ]
    seen: list[tuple[int, int, str]] = []
    results = prepare(
        jobs,
        tmp_path / "new" / "rasters",
        PrepareConfig(),
        workers=2,
        progress=lambda *news: seen.append(news),
    )
    assert [r.slide_id for r in results] == ["big", "text", "one", "-x\n"]
    assert [r.status for r in results] == ["made", "failed", "made", "made"]
    assert [done for done, _, _ in seen] == [1, 2, 3, 4]
    assert {total for _, total, _ in seen} == {4}
    assert "text: failed" in {note for _, _, note in seen}
    assert results[1].path is None
    assert str(text) in (results[1].reason or "")
    assert all(r.seconds > 0 for r in results)
    assert prepare([], tmp_path, PrepareConfig()) == []
    again = prepare(jobs, tmp_path / "new" / "rasters", PrepareConfig(), workers=2)
    assert [r.status for r in again] == ["reused", "failed", "reused", "reused"]


def test_two_slides_of_one_id_are_refused_before_anything_is_made(slide: Path, tmp_path: Path) -> None:
    with pytest.raises(CohortError, match="one: two slides have this id"):
        prepare([PrepareJob("one", slide)] * 2, tmp_path / "out", PrepareConfig())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("one", "other"), [("a1", "A1"), ("é", "e\u0301")])
def test_ids_that_would_be_one_file_are_refused_where_they_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: str, other: str
) -> None:
    """As on a Mac, where the second slide's raster took the place of the first one's."""
    jobs = [PrepareJob(each, tmp_path / "gone.svs") for each in (one, other)]
    assert [result.status for result in prepare(jobs, tmp_path, PrepareConfig())] == ["failed", "failed"]
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path.name.startswith("CASE-") or exists(path))
    with pytest.raises(
        CohortError, match=f"and {one} would be one file in .*, where case makes no difference"
    ):
        prepare(jobs, tmp_path, PrepareConfig())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_said_so(slide: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SlideError, match="the folder cannot be made"):
        prepare([PrepareJob("one", slide)], tmp_path / "file", PrepareConfig())
    with pytest.raises(ConfigError, match="0 processes can do nothing"):
        prepare([PrepareJob("one", slide)], tmp_path, PrepareConfig(), workers=0)


def test_a_slide_that_kills_its_reader_is_a_failed_slide(slide: Path, tmp_path: Path) -> None:
    with patch.object(prepare_module, "run_all", lambda *_args, **_more: iter([(0, Died("SIGSEGV", 0.5))])):
        (result,) = prepare([PrepareJob("one", slide)], tmp_path, PrepareConfig())
    assert result.status == "failed"
    assert (
        result.reason
        == f"{slide}: the process that read it died (SIGSEGV); leave the slide out, and report it"
    )
