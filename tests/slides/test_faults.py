"""What may go wrong while slides are prepared: each fault is one clear line for its slide, and the rest is done."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from benchmarks import kill
from benchmarks.kill import contents

from holoslide import cli
from holoslide.console import print_table
from holoslide.errors import ConfigError, SlideError
from holoslide.slides import claim
from holoslide.slides import inspect as inspect_module
from holoslide.slides import prepare as prepare_module
from holoslide.slides.crew import Died, run_all
from holoslide.slides.inspect import inspect_slides
from holoslide.slides.prepare import PrepareConfig, PrepareJob, PrepareResult, prepare, prepare_slide
from holoslide.slides.source import note_of, slide_sha256, stamp_of
from tests.slides.drawn import blobs, paint, write_slide
from tests.slides.errands import errand


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 x 600 px at 1 um/px."""
    path = tmp_path_factory.mktemp("slides") / "one.tif"
    return write_slide(path, paint(blobs((500, 600), reach=0.4)), 1.0)


def copied(slide: Path, path: Path) -> Path:
    """A slide of one's own, written long ago."""
    path.write_bytes(slide.read_bytes())
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return path


# --- Workers -------------------------------------------------------------------------------------------------


def test_a_process_that_dies_fails_its_own_work_alone() -> None:
    work = ["1", "exit", "2", "crash", "crash after the answer", "3"]
    for workers in (1, 3):
        outcomes = dict(run_all(errand, work, workers=workers))
        assert (outcomes[0], outcomes[2], outcomes[4], outcomes[5]) == (2, 4, -2, 6)
        assert isinstance(outcomes[1], Died)
        assert outcomes[1].how == "exit code 3"
        assert isinstance(outcomes[3], Died)
        assert outcomes[3].how == "SIGSEGV"


def test_a_process_that_hangs_is_ended_and_one_that_gets_on_is_not() -> None:
    started = time.monotonic()
    outcomes = dict(run_all(errand, ["hang", "slow", "1"], workers=2, limit_s=2.5))
    assert isinstance(outcomes[0], Died)
    assert outcomes[0].how == "it got no further for 2.5 s"
    assert (outcomes[1], outcomes[2]) == (-1, 2)  # -1 took longer than the limit, and said that it got on
    assert time.monotonic() - started < 60


def test_who_stops_listening_ends_the_workers() -> None:
    outcomes = run_all(errand, ["1", "hang", "hang"], workers=3)
    assert next(outcomes) == (0, 2)
    started = time.monotonic()
    outcomes.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 20


def test_the_callers_script_needs_no_guard(slide: Path, tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom holoslide.slides.prepare import *\n"
        "from holoslide.slides.prepare import PrepareJob, PrepareConfig, prepare\n"
        "(r,) = prepare([PrepareJob('x', Path(sys.argv[1]))], Path(sys.argv[2]), PrepareConfig())\n"
        "print(r.status)\n"
    )
    done = subprocess.run(
        [sys.executable, script, slide, tmp_path / "out"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "made\n"


# --- The slide ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["vanishes", "is cut short", "is written to"])
def test_a_slide_that_changes_while_it_is_read(slide: Path, tmp_path: Path, fault: str) -> None:
    path = copied(slide, tmp_path / "one.tif")
    out = tmp_path / "out"
    out.mkdir()

    def strike() -> None:
        if fault == "vanishes":
            path.unlink(missing_ok=True)
        elif fault == "is cut short":
            os.truncate(path, 5000)
        else:
            os.utime(path)

    with pytest.raises(SlideError, match=r"one\.tif: (cannot be read|changed|pixels cannot)") as caught:
        prepare_slide(PrepareJob("one", path), out, PrepareConfig(), beat=strike)
    assert "\n" not in str(caught.value)
    assert list(out.iterdir()) == []


def test_bad_slides_of_all_kinds_fail_alone(slide: Path, tmp_path: Path) -> None:
    bad = {
        "empty": b"",
        "text": b"no slide",
        "cut": slide.read_bytes()[:9000],
        "head": slide.read_bytes()[:100],
        "zeros": bytes(50_000),
    }
    jobs = []
    for name, data in bad.items():
        (tmp_path / f"{name}.svs").write_bytes(data)
        jobs.append(PrepareJob(name, tmp_path / f"{name}.svs"))
    (tmp_path / "gone.svs").symlink_to(tmp_path / "nowhere")
    jobs.append(PrepareJob("gone", tmp_path / "gone.svs"))
    (tmp_path / "round.svs").symlink_to(tmp_path / "round.svs")
    jobs.append(PrepareJob("round", tmp_path / "round.svs"))
    (tmp_path / "folder.svs").mkdir()
    jobs.append(PrepareJob("folder", tmp_path / "folder.svs"))
    os.mkfifo(tmp_path / "pipe.svs")  # opening it would wait for ever
    jobs.append(PrepareJob("pipe", tmp_path / "pipe.svs"))
    good = [
        tmp_path / "a link.svs",
        tmp_path / "-x.tif",
        tmp_path / "日本 é.tif",
        tmp_path / "two\nlines.tif",
    ]
    good[0].symlink_to(slide)
    for path in good[1:]:
        copied(slide, path)
    jobs += [PrepareJob(f"good{n}", path) for n, path in enumerate(good)]
    results = prepare(jobs, tmp_path / "out", PrepareConfig(), workers=2)
    assert {r.slide_id for r in results if r.status == "made"} == {"good0", "good1", "good2", "good3"}
    for result in results[: len(jobs) - 4]:
        assert result.status == "failed"
        assert result.reason is not None
        assert "\n" not in result.reason
        assert f"{result.slide_id}.svs: " in result.reason
        assert "; " in result.reason


class Prepare:
    """`holoslide prepare`, as from a shell in a folder: gives the exit code, and keeps what it said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys, self.err = monkeypatch, capsys, ""

    def __call__(self, folder: Path, *arguments: object) -> object:
        self._monkeypatch.chdir(folder)
        self._monkeypatch.setattr("sys.argv", ["holoslide", "prepare", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        self.err = self._capsys.readouterr().err
        return stop.value.code


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Prepare:
    return Prepare(monkeypatch, capsys)


def test_files_of_odd_names_from_the_command_line(slide: Path, tmp_path: Path, command: Prepare) -> None:
    names = [
        "-x.tif",
        "--help.tif",
        "with  spaces.tif",
        "日本 é.tif",
        "two\nlines.tif",
        "'quoted\".tif",
        "a;b$c.tif",
    ]
    for name in names:
        copied(slide, tmp_path / name)
    (tmp_path / "link.tif").symlink_to("with  spaces.tif")
    (tmp_path / "empty 日本.svs").touch()
    given = ["--rasters", "out", "--workers", 1, "--", *names, "link.tif", "empty 日本.svs"]
    assert command(tmp_path, *given) == 1
    assert len(list((tmp_path / "out").glob("*.tif"))) == 8
    (line,) = [line for line in command.err.splitlines() if line.startswith("  empty")]
    assert "empty 日本.svs: is empty" in line
    assert "Traceback" not in command.err


def test_a_spreadsheet_in_place_of_a_table_is_not_taken_for_a_slide(tmp_path: Path, command: Prepare) -> None:
    (tmp_path / "slides.xlsx").write_bytes(b"PK\x03\x04 and so on")
    assert command(tmp_path, "slides.xlsx") == 1
    assert command.err == "holoslide: slides.xlsx: is a spreadsheet file, not text; save it as CSV (UTF-8)\n"


def test_names_are_printed_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["S20:100:1", "[bold]x[/bold]", "a\\[b"]
    print_table(["slide"], [[name] for name in names])
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == ["slide", *names]


def test_ten_thousand_rows(slide: Path, tmp_path: Path, command: Prepare) -> None:
    """Of which three have a file: those are made, and each of the rest is one line."""
    for number in (1, 5000, 9999):
        copied(slide, tmp_path / f"s{number}.tif")
    rows = "".join(f"s{number},p{number},x,s{number}.tif\n" for number in range(10_000))
    (tmp_path / "slides.csv").write_text(f"slide_id,patient_id,label,path\n{rows}")
    assert command(tmp_path, "slides.csv", "--workers", 1) == 1
    assert sorted(path.name for path in (tmp_path / "rasters").glob("*.tif")) == [
        "s1.tif",
        "s5000.tif",
        "s9999.tif",
    ]
    missing = [line for line in command.err.splitlines() if "there is no file" in line]
    assert len(missing) == 9997


def test_a_raster_never_takes_the_place_of_its_slide(slide: Path, tmp_path: Path) -> None:
    path = copied(slide, tmp_path / "one.tif")
    with pytest.raises(SlideError, match=r"one\.tif: is a slide, and its raster would take its place"):
        prepare_slide(PrepareJob("one", path), tmp_path, PrepareConfig())
    assert contents(tmp_path) == {"one.tif": slide.read_bytes()}


# --- The folder that is written to --------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_folder_that_takes_no_files(slide: Path, tmp_path: Path, code: int, call: str) -> None:
    """Each failure of the system when the lease or the raster is written."""
    real = os.open

    def refuse(path: object, flags: int, *more: object, **options: object) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise OSError(code, os.strerror(code), path)
        return real(path, flags, *more, **options)  # type: ignore[arg-type]

    failure = OSError(code, os.strerror(code))
    replaced = (
        patch("os.open", refuse) if call == "open" else patch.object(claim.os, "fsync", side_effect=failure)
    )
    started = time.monotonic()
    with (
        replaced,
        pytest.raises(SlideError, match=r"one\.tif: cannot be written \(.*\); make room there"),
    ):
        prepare_slide(PrepareJob("one", slide), tmp_path, PrepareConfig())
    assert time.monotonic() - started < 30
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_halfway(tmp_path: Path) -> None:
    """By a limit that the system sets to the size of files: one raster's writes fail, the other's do not."""
    big = write_slide(tmp_path / "big.tif", paint(blobs((1500, 1500), reach=0.9)), 1.0)
    small = write_slide(tmp_path / "small.tif", paint(blobs((300, 300), reach=0.4)), 1.0)
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from holoslide.slides.prepare import PrepareConfig, PrepareJob, prepare\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "jobs = [PrepareJob(Path(p).stem, Path(p)) for p in sys.argv[2:]]\n"
        "for r in prepare(jobs, Path(sys.argv[1]), PrepareConfig()): print(r.status, r.reason)\n"
    )
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", script, out, big, small], capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    assert first.startswith(f"failed {out / 'big.tif'}: cannot be written (File too large); make room")
    assert second == "made None"
    assert sorted(path.name for path in out.iterdir()) == [".small.tif.source", "small.tif"]
    assert done.stderr == ""


# --- Made already, or by another ----------------------------------------------------------------------------


def test_a_slide_is_hashed_once(slide: Path, tmp_path: Path) -> None:
    path, out = copied(slide, tmp_path / "one.tif"), tmp_path / "out"
    out.mkdir()
    job = PrepareJob("one", path)
    first = prepare_slide(job, out, PrepareConfig())
    assert first.path is not None
    with patch.object(prepare_module, "slide_sha256", side_effect=AssertionError("hashed again")):
        assert prepare_slide(job, out, PrepareConfig()).status == "reused"
        assert prepare_slide(job, out, PrepareConfig(jpeg_quality=91)).status == "made"
        os.utime(path, (1_700_000_005, 1_700_000_005))
        with pytest.raises(AssertionError, match="hashed again"):
            prepare_slide(job, out, PrepareConfig())
    before = contents(out)
    assert prepare_slide(job, out, PrepareConfig(jpeg_quality=91)).status == "reused"  # the same pixels
    assert contents(out)["one.tif"] == before["one.tif"]
    note_of(out / "one.tif").write_bytes(b"\xff{")
    assert prepare_slide(job, out, PrepareConfig(jpeg_quality=91)).status == "reused"


def test_a_slide_that_was_just_written_is_not_trusted_by_its_time(slide: Path, tmp_path: Path) -> None:
    path, out = copied(slide, tmp_path / "one.tif"), tmp_path / "out"
    out.mkdir()
    now = time.time()
    os.utime(path, (now, now))
    job = PrepareJob("one", path)
    assert prepare_slide(job, out, PrepareConfig()).status == "made"
    other = write_slide(tmp_path / "other.tif", paint(blobs((500, 600), seed=4, reach=0.4)), 1.0).read_bytes()
    size = max(len(other), path.stat().st_size)
    path.write_bytes(other.ljust(size, b"\0"))
    os.utime(path, (now, now))
    assert prepare_slide(job, out, PrepareConfig()).status == "made"


def test_another_slide_of_the_name_neither_passes_for_the_first_nor_takes_its_place(
    slide: Path, tmp_path: Path
) -> None:
    """It lies in another folder, and is as large and as old to the nanosecond, as copies from an archive can be."""
    for name in ("a", "b", "c", "out"):
        (tmp_path / name).mkdir()
    first = copied(slide, tmp_path / "a" / "one.tif")
    second = write_slide(tmp_path / "b" / "one.tif", paint(blobs((500, 600), seed=4, reach=0.4)), 1.0)
    size = max(path.stat().st_size for path in (first, second))
    for path in (first, second):
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        os.utime(path, (1_700_000_000, 1_700_000_000))
    out = tmp_path / "out"
    assert prepare_slide(PrepareJob("one", first), out, PrepareConfig()).status == "made"
    before = contents(out)
    with pytest.raises(SlideError) as refused:
        prepare_slide(PrepareJob("one", second), out, PrepareConfig())
    assert str(refused.value) == (
        f"{out / 'one.tif'}: is the raster of another slide of this name, {first}; give another folder for the "
        "rasters, or delete it"
    )
    assert contents(out) == before
    copy = copied(first, tmp_path / "c" / "one.tif")
    assert prepare_slide(PrepareJob("one", copy), out, PrepareConfig()).status == "reused"
    copy.write_bytes(second.read_bytes())  # the same slide's file, changed: that is no other slide
    assert prepare_slide(PrepareJob("one", copy), out, PrepareConfig()).status == "made"


def test_a_slide_of_several_files_is_hashed_with_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "s.mrxs").write_bytes(b"head")
    alone = slide_sha256(tmp_path / "s.mrxs")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "Data0001.dat").write_bytes(b"pixels")
    both, stamp = slide_sha256(tmp_path / "s.mrxs"), stamp_of(tmp_path / "s.mrxs")
    (tmp_path / "s" / "Data0001.dat").write_bytes(b"others")
    assert len({alone, both, slide_sha256(tmp_path / "s.mrxs")}) == 3
    assert stamp_of(tmp_path / "s.mrxs") != stamp

    def dicom(name: str, series: bytes, more: bytes = b"") -> Path:
        tag = b"\x20\x00\x0e\x00UI" + len(series).to_bytes(2, "little") + series
        (tmp_path / name).write_bytes(bytes(128) + b"DICM" + tag + more)
        return tmp_path / name

    one = dicom("1.dcm", b"1.2.3.4.5")
    dicom("2.dcm", b"1.2.3.4.5")
    dicom("other.dcm", b"1.2.3.4.6")
    before = slide_sha256(one)
    dicom("other.dcm", b"1.2.3.4.6", b"changed")
    assert slide_sha256(one) == before
    dicom("2.dcm", b"1.2.3.4.5", b"changed")
    assert slide_sha256(one) != before


def test_killed_at_any_moment_a_last_run_ends_with_the_same_files(tmp_path: Path) -> None:
    """Struck with a slide in the making and at random moments; `benchmarks/kill.py` does it 50 times."""
    rgb = paint(blobs((1300, 1500), reach=0.4))
    slides = [write_slide(tmp_path / f"s{n}.tif", rgb[:, 40 * n :], 1.0) for n in range(3)]
    for path in slides:
        os.utime(path, (1_700_000_000, 1_700_000_000))
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    kill.undisturbed(whole, slides)
    torn = kill.strike(disturbed, slides, 4, seed=5, longest_s=0.3)
    assert torn >= 2
    assert "failed" not in kill.undisturbed(disturbed, slides)
    assert contents(disturbed) == contents(whole)
    assert sorted(contents(disturbed)) == [
        ".s0.tif.source",
        ".s1.tif.source",
        ".s2.tif.source",
        "s0.tif",
        "s1.tif",
        "s2.tif",
    ]


def test_two_runs_at_once_share_the_work(tmp_path: Path) -> None:
    rgb = paint(blobs((900, 900), reach=0.5))
    slides = [write_slide(tmp_path / f"s{n}.tif", rgb[:, 40 * n :], 1.0) for n in range(4)]
    command = [sys.executable, "-c", kill.RUN, tmp_path / "out", *slides]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    lines = [line.split()[:2] for text in said for line in text.splitlines()]
    assert len(lines) == 8
    assert sum(status == "made" for _, status in lines) == 4
    assert sum(status == "reused" for _, status in lines) == 4


def test_a_result_names_what_killed_its_reader(slide: Path, tmp_path: Path) -> None:
    died = Died("it got no further for 600 s", 600.0)
    with patch.object(prepare_module, "run_all", lambda *_args, **_more: iter([(0, died)])):
        (result,) = prepare([PrepareJob("one", slide)], tmp_path, PrepareConfig())
    reason = f"{slide}: the process that read it died ({died.how}); leave the slide out, and report it"
    assert result == PrepareResult("one", "failed", None, reason, 600.0)


def test_a_file_that_kills_who_opens_it_is_one_line_of_inspect(slide: Path) -> None:
    died = Died("SIGSEGV", 0.5)
    with patch.object(inspect_module, "run_all", lambda *_args, **_more: iter([(0, died)])):
        (facts,) = inspect_slides([slide])
    said = f"{slide}: the process that opened it died (SIGSEGV); leave the slide out, and report it"
    assert facts == {"slide": str(slide), "error": said}


def test_a_patient_in_two_splits_is_no_matter_to_prepare(
    slide: Path, tmp_path: Path, command: Prepare
) -> None:
    copied(slide, tmp_path / "a.tif")
    copied(slide, tmp_path / "b.tif")
    table = "slide_id,patient_id,split,path\na,p,train,a.tif\nb,p,test,b.tif\n"
    (tmp_path / "slides.csv").write_text(table)
    assert command(tmp_path, "slides.csv", "--workers", 1) == 0
    assert len(list((tmp_path / "rasters").glob("*.tif"))) == 2


def test_fewer_than_no_workers_is_wrong_usage(tmp_path: Path, command: Prepare) -> None:
    assert command(tmp_path, "slides.csv", "--workers", -1) == 2
    assert "--workers" in command.err
    with pytest.raises(ConfigError, match="0 processes can do nothing; give 1 or more"):
        list(run_all(errand, ["1"], workers=0))
