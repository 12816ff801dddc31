"""A new user's first hour: the demo, and then README's commands on slides in a folder, in its order."""

import csv
import functools
import re
import shlex
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from holoslide import cli
from holoslide.serve.server import Viewer
from holoslide.slides.phantom import PhantomConfig, write_phantoms

REPO = Path(__file__).resolve().parent.parent
TINY = PhantomConfig(least_um=1500, most_um=1700, mpp=2.0)
COLUMNS = ("slide_id", "patient_id", "label", "split")  # the run goes on with its own parts
CHEAPER = ("prepare.mpp=8", "train.epochs=1", "model.backbone.truncate=layer1")


def holoslide(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["holoslide", *map(str, arguments)])
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # slides are drawn and prepared here, and not in processes
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def commands(page: Path) -> list[list[str]]:
    """The words of every `holoslide` command in a page's shell blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    return [each[1:] for each in words if each[:1] == ["holoslide"]]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder: eight slides of a quarter of the usual size, one epoch."""
    folder = tmp_path_factory.mktemp("first") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("holoslide.demo.write_phantoms", functools.partial(write_phantoms, config=TINY))
        sets = [word for one in CHEAPER for word in ("--set", one)]
        assert holoslide(patch, "demo", "--out", folder, "--slides", 8, *sets) == 0
    return folder


def test_the_demo_ends_with_a_report(demo: Path) -> None:
    with (demo / "slides.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    report = (demo / "run" / "report.html").read_text(encoding="utf-8")
    tested = [row["slide_id"] for row in rows if row["split"] == "test"]
    assert tested
    assert all(name in report for name in tested)
    assert {path.stem for path in (demo / "run" / "heatmaps").glob("*-???.npz")} == set(tested)


def test_other_slides_than_are_there_are_not_taken_for_them(
    demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert holoslide(monkeypatch, "demo", "--out", demo, "--slides", 8, "--task", "arrangement") == 1
    assert 'holds slides of {"task": "focus"' in capsys.readouterr().err


def test_a_mistake_in_a_setting_is_said_before_slides_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert holoslide(monkeypatch, "demo", "--out", tmp_path, "--set", "train.epoch=1") == 1
    assert capsys.readouterr().err.endswith("did you mean train.epochs?\n")
    assert not (tmp_path / "slides.csv").exists()


def test_readme_leads_from_a_folder_of_slides_to_report_and_viewer(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its commands as they stand, in order; `train` alone is told of cheap settings, and to go on with a run."""
    monkeypatch.chdir(tmp_path)
    first = next((demo / "slides").glob("*.tiff"))
    shutil.copytree(demo / "slides", "slides")
    with (demo / "slides.csv").open(newline="", encoding="utf-8") as file:
        table = [",".join(row[key] for key in COLUMNS) for row in csv.DictReader(file)]
    Path("slides.csv").write_text("\n".join([",".join(COLUMNS), *table]))
    Path("new").mkdir()
    for name in ("slides/0012.svs", "new/0099.svs"):
        shutil.copy(first, name)
    shutil.copytree(demo / "run", "runs/first")
    shutil.copytree(demo / "rasters", "rasters")

    def run(viewer: Viewer, ready: Callable[[], None]) -> None:
        viewer.listener.close()
        ready()

    monkeypatch.setattr(Viewer, "run", run)
    text = (REPO / "README.md").read_text(encoding="utf-8")
    section = tmp_path / "section.md"
    section.write_text(re.search(r"^## Your slides\n.*?(?=^## )", text, re.DOTALL | re.MULTILINE)[0])
    done = commands(section)
    assert [words[0] for words in done] == ["inspect", "audit", "train", "predict", "serve"]
    for name, *words in done:
        words = [str(p) for word in words for p in (sorted(Path().glob(word)) if "*" in word else [word])]
        if name == "train":
            sets = [word for one in CHEAPER for word in ("--set", one)]
            words += ["--config", str(demo / "run.yaml"), *sets, "--resume"]
        if name == "serve":
            words += ["--port", str(free_port())]
        assert holoslide(monkeypatch, name, *words) == 0, name
    assert "the viewer is at http://127.0.0.1" in capsys.readouterr().out
    assert "runs/first/report.html" in text
    assert Path("runs/first/report.html").is_file()
    assert "0099" in Path("predictions.csv").read_text()
    assert {path.name for path in Path("heatmaps").glob("*.png")} == {
        "0099-attention.png",
        "0099-evidence.png",
    }


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{path.name}" for path in (REPO / "docs").glob("*.md"))]
)
def test_every_command_that_a_page_gives_is_one(page: str) -> None:
    known = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for name, *words in commands(REPO / page):
        known[name].make_context(name, words)  # raises for an option that is none, or an argument too few
