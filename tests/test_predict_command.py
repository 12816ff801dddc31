"""`holoslide predict` where two commands meet, and where there is nothing to score."""

from pathlib import Path

import pytest

from holoslide import predict
from holoslide.errors import CohortError
from holoslide.files import lock
from tests.command import exit_code


def test_of_two_that_write_one_table_the_second_is_refused(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both wrote into one partial table, and the second ended in that it was gone."""
    beside, out = finished_run.parent, tmp_path / "p.csv"
    given = ["predict", finished_run, beside / "slides.csv", "--rasters", beside / "rasters", "-o", out]
    with (tmp_path / "p.partial.csv").open("w", encoding="utf-8") as file:
        file.write("slide_id\nof the first\n")
        file.flush()
        assert lock(file)
        assert exit_code(monkeypatch, *given, "--workers", 1) == 1
        assert f"{out}: is being written by another command; give each its own" in capsys.readouterr().err
        assert "of the first" in (tmp_path / "p.partial.csv").read_text(encoding="utf-8")
    assert not out.exists()
    assert exit_code(monkeypatch, *given, "--workers", 1) == 0, "one that was killed is in nobody's way"
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


def test_a_mistyped_folder_is_not_made(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        exit_code(monkeypatch, "predict", finished_run, tmp_path / "nwe" / "*.tiff", "-o", tmp_path / "p.csv")
        == 1
    )
    assert "there is no file" in capsys.readouterr().err
    assert not (tmp_path / "nwe").exists()


def test_nothing_scored_takes_the_place_of_no_results(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A night's table was replaced by an empty one, by a command whose slides could not be read."""
    (tmp_path / "broken.tiff").write_bytes(b"not an image")
    given = ["predict", finished_run, tmp_path / "broken.tiff", "--workers", 1, "-o", tmp_path / "p.csv"]
    assert exit_code(monkeypatch, *given) == 1
    assert capsys.readouterr().out == f"0 slides scored: {tmp_path / 'p.csv'}\n"
    assert (tmp_path / "p.csv").read_text() == "slide_id\n"
    (tmp_path / "p.csv").write_text("slide_id,p_benign\nof the night before,0.5\n")
    assert exit_code(monkeypatch, *given) == 1
    assert capsys.readouterr().out == f"0 slides scored: {tmp_path / 'p.csv'} stays as it was\n"
    assert "of the night before" in (tmp_path / "p.csv").read_text()
    with pytest.raises(CohortError, match=r"1 slides were left out, broken first \(.*; none was scored"):
        predict(finished_run, [tmp_path / "broken.tiff"], tmp_path / "p.csv")
    assert "of the night before" in (tmp_path / "p.csv").read_text()
    (tmp_path / "predictions.csv").write_text("slide_id\nof the night before\n")
    asked = ("export", finished_run, tmp_path / "broken.tiff", "--to", "csv", "--workers", 1, "-o", tmp_path)
    assert exit_code(monkeypatch, *asked) == 1
    assert "of the night before" in (tmp_path / "predictions.csv").read_text()
