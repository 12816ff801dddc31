"""The report of a real run says what its folder holds: parts, decision, plan against measured, hashes, commands."""

import csv
import hashlib
import html
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from holoslide.config import RunConfig
from holoslide.inference.heatmap import Heatmap
from holoslide.inference.layers import layers_of
from holoslide.records import command_given, environment
from holoslide.slides.cohort import Cohort

# A slide that is shown with its maps, by name, and what was predicted of it.
SHOWN = r'<div class="slide-head">\s*<span class="id">(.*?)</span>.*?prediction <b>(.*?)</b>'


@pytest.fixture(scope="module")
def page(finished_run: Path) -> str:
    return (finished_run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def words(page: str) -> str:
    """All text of the page."""
    text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(text).split())


def test_every_part_is_there(page: str) -> None:
    found = re.findall(r'<section id="(\w+)">', page)
    assert found == [
        "cohort", "results", "decision", "calibration", "depth", "learning", "slides", "predictions", "run",
    ]  # fmt: skip


def test_threshold_and_temperature_are_said_to_come_from_validation(words: str, finished_run: Path) -> None:
    valid = len(Cohort.from_csv(finished_run / "cohort.csv").valid)
    assert "slides of the validation part" in words
    assert f"fitted on the {valid} validation slides" in words or "Not calibrated" in words


def test_the_data_are_named_by_their_hashes(words: str, finished_run: Path) -> None:
    cohort = Cohort.from_csv(finished_run / "cohort.csv")
    for row in cohort:
        assert row.path is not None
        digest = hashlib.sha256(row.path.read_bytes()).hexdigest()
        assert digest[:16] in words
        assert digest in (finished_run / "data.csv").read_text()


def test_what_it_took_stands_against_the_plan(words: str) -> None:
    assert re.search(r"Memory of the whole process – \d+ MiB|Memory of the whole process – [\d.]+ GiB", words)
    assert re.search(r"One epoch with its validation [\d.]+ \w+ .*?[\d.]+ \w+ .*?\d+ %", words)


def test_a_source_checkouts_commit_and_the_processors_model_are_on_record(words: str) -> None:
    facts = environment()
    repository = Path(__file__).resolve().parent.parent
    if (repository / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(repository), "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        assert facts["holoslide commit"].removesuffix(", with changes") == head
        assert f"holoslide commit {head}" in words
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    if names:
        assert f" {names[0].strip()} " in facts["processors"]


def test_the_command_is_the_same_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "holoslide", "--help"], capture_output=True, text=True, check=True
    )
    assert "train" in done.stdout
    for program in ("/somewhere/bin/holoslide", "/somewhere/holoslide/__main__.py"):
        monkeypatch.setattr(sys, "argv", [program, "train", "my slides.csv"])
        assert command_given() == "holoslide train 'my slides.csv'"
    monkeypatch.setattr(sys, "argv", ["/somewhere/mine/__main__.py", "x"])
    assert command_given() == "python /somewhere/mine/__main__.py x"


def test_the_command_given_trains_the_same_anew(page: str, finished_run: Path) -> None:
    commands = [html.unescape(found) for found in re.findall(r'<code class="command">(.*?)</code>', page)]
    again = shlex.split(commands[-1])
    assert again[:2] == ["holoslide", "train"]
    options = dict(zip(again[3::2], again[4::2], strict=True))
    assert RunConfig.load(Path(options["--config"])) == RunConfig.load(finished_run / "config.yaml")
    assert {row.slide_id: row.split for row in Cohort.from_csv(Path(again[2]))} == {
        row.slide_id: row.split for row in Cohort.from_csv(finished_run / "cohort.csv")
    }
    assert Path(options["--rasters"]).is_dir()


def test_what_the_maps_show_is_said_for_heads_that_classify_cells(words: str) -> None:
    assert "where each class weighs the cells by itself" in words
    assert "Attention is how much a cell counts" in words


def test_a_slides_evidence_and_constant_are_the_score_of_its_probability(
    page: str, words: str, finished_run: Path
) -> None:
    found = re.findall(SHOWN, page, flags=re.DOTALL)
    with (finished_run / "predictions.csv").open(encoding="utf-8") as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert found
    for slide_id, prediction in found:
        probability = float(rows[slide_id][f"p_{prediction}"])
        said = rf"With the constant [−+]?[\d.]+: ([−+][\d.]+), the log-odds of {prediction}\."
        scores = [float(text.replace("−", "-")) for text in re.findall(said, words)]
        assert any(
            abs(score - math.log(probability / (1 - probability))) < 0.01 * abs(score) + 1e-4
            for score in scores
        ), slide_id
    assert "Slide, as the network saw it" in words


def test_report_notebook_and_viewer_say_the_same_of_a_map(page: str, words: str, finished_run: Path) -> None:
    """The viewer's layers are `layers_of`; attention alone has one scale for all slides of a report."""
    found = re.findall(SHOWN, page, flags=re.DOTALL)
    assert found
    for slide_id, prediction in found:
        heatmap = Heatmap.load(finished_run / "heatmaps" / f"{slide_id}.npz")
        attention, *evidence = layers_of(heatmap, 2, last=True)
        shown = evidence[heatmap.classes.index(prediction)]
        ticks = " ".join(label for _, label in shown.scale.tick_places())
        assert f"{ticks} {shown.scale.unit} {shown.sums}" in words
        assert attention.sums in words
        for layer in (attention, *evidence):
            said = html.unescape(heatmap._repr_html_())
            assert all(
                part in said for part in (layer.scale.unit, layer.sums, *dict(layer.scale.ticks[:2]).values())
            )
            assert layer.facts()["sums"] == layer.sums
    assert "times the average cell's attention; one scale for all slides here" in words
