"""The command line where no run is: on slides and tables alone, and what it says when it is stopped."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from holoslide.console import TrainingBar
from holoslide.training.progress import RunFacts, SlideDone
from tests.command import Command


def test_a_full_disk_is_one_line(tmp_path: Path, holoslide: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("holoslide.slides.cohort.Cohort.from_csv", full)
    assert holoslide("train", tmp_path / "slides.csv", "-o", tmp_path / "run") == 1
    assert holoslide.err == "holoslide: No space left on device; make room where the command writes\n"


def test_convert_makes_a_table_of_a_folder_for_each_class(tmp_path: Path, holoslide: Command) -> None:
    for name in ("slides/ill/a.svs", "slides/well/b.svs"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert holoslide("convert", tmp_path / "slides", "-o", tmp_path) == 0
    table = tmp_path / "slides.csv"
    assert "each file is taken for a patient of its own; mend patient_id" in holoslide.err
    assert table.read_text().splitlines()[1:] == [
        "a,a,ill,,,slides/ill/a.svs",
        "b,b,well,,,slides/well/b.svs",
    ]
    table.write_text(table.read_text().replace("a,a,ill", "a,P-001,ill"))
    assert holoslide("convert", tmp_path / "slides", "-o", tmp_path) == 1
    assert f"--out: is the folder of {table}, which may be written over" in holoslide.err
    assert "P-001" in table.read_text()
    assert holoslide("convert", tmp_path / "slides", "--label", "x") == 1
    assert "leave --slides, --label and --clini out" in holoslide.err


def test_a_missing_table_is_one_line(tmp_path: Path, holoslide: Command) -> None:
    assert holoslide("train", tmp_path / "none.csv", "-o", tmp_path / "run") == 1
    assert "none.csv" in holoslide.err
    assert holoslide.err.count("\n") == 1


def test_ctrl_c_is_one_line(tmp_path: Path, holoslide: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("holoslide.slides.cohort.Cohort.from_csv", interrupt)
    assert holoslide("train", tmp_path / "slides.csv", "-o", tmp_path / "run") == 130
    assert holoslide.err == "holoslide: stopped; train goes on with --resume, others are run again\n"
    assert holoslide.out == ""


def test_wrong_usage_is_exit_code_2(holoslide: Command) -> None:
    assert holoslide("train") == 2


def test_inspect_real_slides(data_dir: Path, holoslide: Command) -> None:
    wsi = data_dir / "wsi"
    good, bad = wsi / "CMU-1-Small-Region.svs", wsi / "broken.svs"
    assert holoslide("inspect", good, bad, "--json") == 1
    facts = {Path(fact["slide"]).name: fact for fact in json.loads(holoslide.out)}
    assert "error" in facts["broken.svs"]
    assert "error" not in facts["CMU-1-Small-Region.svs"]


def test_inspect_is_read_by_people(data_dir: Path, tmp_path: Path, holoslide: Command) -> None:
    wsi = data_dir / "wsi"
    odd = tmp_path / "two\nlines.svs"
    shutil.copy(wsi / "TCGA-CR-7395-01A-01-TS1.svs", odd)
    assert holoslide("inspect", wsi / "CMU-1-Small-Region.svs", odd) == 0
    said = [line.strip() for line in holoslide.out.splitlines()]
    assert "size: 2220 x 2967 px, 1.11 x 1.48 mm" in said
    assert "um per pixel: 0.499 (from: slide)" in said
    assert "levels: 4443 x 3567 px, 2221 x 1783 px" in said
    assert "um per pixel: not known: give it with --slide-mpp, or in the slide table's mpp column" in said
    assert sum("lines.svs" in line for line in said) == 1
    assert holoslide("inspect", odd, "--slide-mpp", 0.25) == 0
    assert "um per pixel: 0.25 (from: user)" in holoslide.out


def test_a_log_hears_of_a_long_epoch_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holoslide.console.LINE_S", 0.0)
    facts = RunFacts("cpu", "32", ranks=1, epoch=2, epochs=9, modules=2, peak_bytes=2**31, idle=3)
    with TrainingBar() as told:
        told.started(facts)
        told.slide_done(SlideDone("train", 3, 7, 40, "a", (0.69, 0.7), (), eta_s=4000.0))
        row = {"epoch": 3, "valid/loss_1": 0.6, "valid/auroc_1": 0.8, "seconds": 75.0}
        told.epoch_done(row | {"train/classification_1": 0.7}, is_best=True)
    assert capsys.readouterr().err.strip().splitlines() == [  # rich before 14.3 ends with an empty line
        "2 modules on cpu, precision 32, 1 process(es), epochs 3 to 9, at most 2.00 GiB for slides",
        "3 GPU(s) have nothing to do: a step has 1 slide(s), train.accumulate=4 gives each one",
        "epoch 3/9 train: 7 of 40, losses 0.69 0.70  left 1:06:40",
        "epoch 3/9  train 0.700  valid loss 0.600  AUROC 0.800  1:15  best",
    ]


def test_prepare_tells_of_slides_without_a_file(tmp_path: Path, holoslide: Command) -> None:
    table = tmp_path / "slides.csv"
    table.write_text("slide_id,path\ngone,gone.svs\nempty,empty.svs\n")
    (tmp_path / "empty.svs").touch()
    assert holoslide("prepare", table, "--workers", 1, "--json") == 1
    found = {each["slide_id"]: each for each in json.loads(holoslide.out)}
    assert {each["status"] for each in found.values()} == {"failed"}
    assert found["gone"]["reason"] == "there is no file gone.svs; mend its path"
    assert "is empty (0 bytes)" in found["empty"]["reason"]
    assert holoslide("prepare", table, "--workers", 1) == 1
    said = holoslide.out + holoslide.err
    assert said.count("is empty (0 bytes)") == 1
    assert "2 slides left out:" in said


def test_prepare_real_slides(data_dir: Path, tmp_path: Path, holoslide: Command) -> None:
    """The good ones are made, the slide without mpp says what to do and then works, the rest have a reason."""
    wsi = data_dir / "wsi"
    names = [
        "CMU-1-Small-Region.svs",
        "TCGA-CR-7395-01A-01-TS1.svs",
        "broken.svs",
        "multi-channel-z-series.ome.tif",
    ]
    out = tmp_path / "rasters"
    assert (
        holoslide("prepare", *(wsi / name for name in names), "--rasters", out, "--workers", 1, "--json") == 1
    )
    results = {row["slide_id"]: row for row in json.loads(holoslide.out)}
    status = [results[name.split(".")[0]]["status"] for name in names]
    assert status == ["made", "failed", "failed", "failed"]
    assert "--slide-mpp" in results["TCGA-CR-7395-01A-01-TS1"]["reason"]
    assert results["CMU-1-Small-Region"]["mpp"] == {"y": 0.499, "x": 0.499, "source": "slide"}
    command = ("prepare", wsi / names[1], "--slide-mpp", 0.5, "--rasters", out, "--workers", 1)
    assert holoslide(*command) == 0
    assert "made" in holoslide.out
    assert "0.5 (from: user)" in holoslide.out
    assert holoslide(*command) == 0
    assert "reused" in holoslide.out
