"""Cross-validation and seeds from the command line: every patient tested once, one report of all runs."""

import json
import re
import shutil
import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from holoslide import cli
from holoslide.config import RunConfig
from holoslide.errors import CohortError, ConfigError
from holoslide.prepared import Prepared
from holoslide.repeated import folds, train_folds
from holoslide.runs import rasters_of
from holoslide.serve.run import RunView
from holoslide.slides.cohort import Cohort, SlideRow
from holoslide.slides.phantom import PhantomConfig, write_phantoms
from holoslide.slides.splits import SplitConfig
from holoslide.training.loop import FitResult
from tests.command import rows_of, words_of

SETTINGS = """
prepare: {mpp: 8.0}
model:
  backbone: {name: resnet18, weights: none, truncate: layer1}
  modules: 1
  heads: {kernel: 3}
train: {epochs: 1, accumulate: 2}
"""

BENIGN = ("--set", "evaluate.positive=benign")


def patients(count: int) -> Cohort:
    rows = [
        SlideRow(f"s{n}{part}", f"p{n}", "ab"[n % 2], split="train")
        for n in range(count)
        for part in "xy"[: 1 + n % 3 % 2]
    ]
    return Cohort.from_rows(rows)


def assert_spread(words: str, found: dict[str, Any]) -> None:
    """The page's mean and standard deviation are those of the runs' own values."""
    for name, key in (("AUROC", "auroc"), ("Accuracy", "accuracy"), ("F1", "macro_f1")):
        values = [run[key]["value"] for run in found["runs"].values()]
        mean, deviation = statistics.fmean(values), statistics.stdev(values)
        assert f" {name} {mean:.3f} {deviation:.3f} {min(values):.3f} to {max(values):.3f}" in words


def assert_all_of_benign(together: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    for found in (together["together"], *runs):
        assert found["positive"] == {"class": "benign", "how": "chosen by evaluate.positive"}
        assert found["slides"]["positive"] == "benign"
        assert found["decision"]["positive"] == "benign"
        assert found["calibration"]["before"]["of"] == "benign"
        assert found["slides"]["auprc"] == found["slides"]["per_class"][0]["auprc"]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_each_patient_is_tested_once_and_never_where_it_was_learnt(count: int) -> None:
    cohort = patients(23)
    drawn = folds(cohort, count, SplitConfig())
    assert len(drawn) == count
    tested = [row.slide_id for fold in drawn for row in fold.test]
    assert sorted(tested) == sorted(row.slide_id for row in cohort)
    for fold in drawn:
        fold.refuse_split_patients()
        assert len(fold) == len(cohort)
        for part in (fold.train, fold.valid, fold.test):
            assert {row.label for row in part} == {"a", "b"}
    assert [fold.rows for fold in drawn] == [fold.rows for fold in folds(cohort, count, SplitConfig())]


def test_too_few_folds_or_patients_are_refused() -> None:
    with pytest.raises(ConfigError, match="--folds: is 1"):
        folds(patients(23), 1, SplitConfig())
    with pytest.raises(CohortError, match="class"):
        folds(patients(6), 4, SplitConfig())


@pytest.mark.parametrize(("rank", "done"), [(0, ["train"] * 2 + ["test"] * 2), (1, ["train"] * 2)])
def test_of_several_processes_the_first_alone_tests_when_all_have_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, done: list[str]
) -> None:
    """All that test at once write the same files; and those that wait for one that tests give up in time."""
    said: list[str] = []

    def train(prepared: Prepared, config: RunConfig, out: Path, **_: object) -> FitResult:
        said.append("train")
        return FitResult(out / "best", out / "last.ckpt", [], 1, rank=rank, ranks=2)

    here = SimpleNamespace(is_global_zero=rank == 0)
    monkeypatch.setattr("holoslide.repeated.launch", lambda *_, **__: here)
    monkeypatch.setattr("holoslide.repeated.train", train)
    monkeypatch.setattr("holoslide.repeated.evaluate_run", lambda *_, **__: said.append("test"))
    prepared = Prepared(patients(23), {}, [], [])
    result = None
    with suppress(FileNotFoundError):  # nothing was written that a report could be made of
        result = train_folds(prepared, RunConfig(), tmp_path / "run", 2, announce=lambda _: None)
    assert said == done
    assert result is None
    written = {path.name for path in (tmp_path / "run").glob("*")}
    assert written == ({"config.yaml", "cohort.csv"} if rank == 0 else set())


def test_of_several_processes_the_first_alone_reports_on_runs_that_are_done(
    folded_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no training then that could say which process this is."""
    before = {path: path.stat().st_mtime_ns for path in folded_copy.rglob("*")}
    monkeypatch.setattr("holoslide.repeated.launch", lambda *_, **__: SimpleNamespace(is_global_zero=False))
    config = RunConfig.load(folded_copy / "config.yaml")
    cohort, folder = Cohort.from_csv(folded_copy / "cohort.csv"), rasters_of(folded_copy)
    assert folder is not None
    prepared = Prepared(cohort, {row.slide_id: folder / f"{row.slide_id}.tif" for row in cohort}, [], [])
    assert train_folds(prepared, config, folded_copy, 2, resume=True, announce=lambda _: None) is None
    assert {path: path.stat().st_mtime_ns for path in folded_copy.rglob("*")} == before


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repeated")
    config = PhantomConfig(least_um=1600, most_um=1800, mpp=4.0)
    write_phantoms(folder, task="focus", slides=12, config=config)
    (folder / "run.yaml").write_text(SETTINGS)
    return folder / "slides.csv"


@dataclass
class Done:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


Train = Callable[..., Done]


@pytest.fixture
def train(table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Train:
    def run(out: Path, *arguments: str) -> Done:
        code = trained(monkeypatch, table, out, *arguments)
        return Done(code, *capsys.readouterr())

    return run


def trained(patch: pytest.MonkeyPatch, table: Path, out: Path, *arguments: str) -> int:
    command = ["holoslide", "train", table, "--config", table.parent / "run.yaml", "-o", out]
    patch.setattr("sys.argv", [*map(str, command), *arguments, "--workers", "1"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture(scope="module")
def folded(table: Path) -> Path:
    """Two folds, done; tests that write take a copy."""
    out = table.parent / "folded"
    with pytest.MonkeyPatch.context() as patch:
        assert trained(patch, table, out, "--folds", "2", *BENIGN) == 0
    return out


@pytest.fixture
def folded_copy(folded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folded, tmp_path / "folds")


def test_folds_give_one_report(table: Path, folded: Path) -> None:
    out = folded
    slides = {row["slide_id"] for row in rows_of(table)}
    together = rows_of(out / "predictions.csv")
    assert {row["slide_id"] for row in together} == slides
    assert len(together) == len(slides)
    each = [rows_of(out / f"fold-{n}" / "predictions.csv") for n in (1, 2)]
    assert together == [*each[0], *each[1]]
    found = json.loads((out / "metrics.json").read_text())
    assert found["together"]["slides"]["slides"] == len(slides)
    assert set(found["runs"]) == {"fold-1", "fold-2"}
    assert_all_of_benign(
        found, [json.loads((out / f"fold-{n}" / "metrics.json").read_text()) for n in (1, 2)]
    )
    words = words_of(out / "report.html")
    assert "dot: the decisions of all runs, each by its own threshold" in words
    assert "fold-2" in words
    assert "2 networks of 1 module were trained, one a fold" in words
    assert "The folds share no patient: drawn by patient, with seed 0." in words
    assert "The positive class is benign (chosen by evaluate.positive)" in words
    assert_spread(words, found)
    scoring = [
        json.loads((out / f"fold-{n}" / "metrics.json").read_text())["scoring_seconds"] for n in (1, 2)
    ]
    assert f"scoring, all runs {sum(scoring):.1f} s" in words
    assert re.search(r"Memory of the whole process, of any run at most – [\d.]+ [MG]iB", words)
    assert re.search(r"One epoch with its validation, mean of the runs [\d.]+ s [\d.]+ s", words)
    assert f"--rasters {table.parent.resolve() / 'rasters'} --folds 2 --out again" in words
    assert "thin: each of 2 runs; thick: their mean" in words
    view = RunView(out, rasters_of(out))
    shown = {line["id"]: line for line in view.slides()}
    assert shown.keys() == slides
    for line in shown.values():
        assert line["heatmap"]
        assert line["p"] is not None
        assert view.source(line["id"])["run"] == line["split"]
        assert view.outline(line["id"])


def test_the_report_of_folds_has_the_very_values_that_each_fold_measured(folded: Path) -> None:
    together = json.loads((folded / "metrics.json").read_text())["runs"]
    for name, found in together.items():
        assert found == json.loads((folded / name / "metrics.json").read_text())["slides"]


def test_folds_go_on_where_they_were_stopped(train: Train, folded_copy: Path) -> None:
    out, together = folded_copy, rows_of(folded_copy / "predictions.csv")
    before = (out / "fold-1" / "last.ckpt").stat().st_mtime_ns
    (out / "fold-2" / "metrics.json").unlink()
    again = train(out, "--folds", "2", "--resume", *BENIGN)
    assert again.code == 0, again.err
    assert "fold-1: done before" in again.out
    assert (out / "fold-1" / "last.ckpt").stat().st_mtime_ns == before
    assert rows_of(out / "predictions.csv") == together


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--folds 2", "folds: holds a run already; resume it, or train into another folder"),
        ("--folds 2 --resume --set train.lr=0.5", "fold-1: belongs to another run: train.lr was "),
        ("--folds 2 --resume --set split.seed=9", "fold-1: belongs to another run: slides."),
        ("--folds 3 --resume", "fold-1: belongs to another run: slides."),
        ("--seeds 2 --resume", "folds: holds fold-1; train seeds into another folder"),
        ("--set train.epochs=1", "folds: holds fold-1; train into another folder"),
    ],
)
def test_runs_that_are_there_are_not_written_over_nor_taken_for_others(
    arguments: str, said: str, train: Train, folded_copy: Path
) -> None:
    before = {path: path.stat().st_mtime_ns for path in folded_copy.rglob("*")}
    refused = train(folded_copy, *arguments.split(), *BENIGN)
    assert refused.code == 1
    assert said in refused.err.strip().splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in folded_copy.rglob("*")} == before


def test_folds_of_other_preparation_are_refused_before_their_slides_are_prepared_anew(
    train: Train, table: Path, folded_copy: Path
) -> None:
    (folded_copy / "report.html").unlink()  # as if stopped before it
    (folded_copy / "fold-1" / "last.ckpt").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in (table.parent / "rasters").iterdir()}
    refused = train(folded_copy, "--folds", "2", "--resume", "--set", "prepare.mpp=7", *BENIGN)
    assert "fold-1: belongs to another run: prepare.mpp was 8.0, now it is 7.0" in refused.err
    assert len(refused.err.splitlines()) == 1
    assert {path.name: path.stat().st_mtime_ns for path in (table.parent / "rasters").iterdir()} == before


def test_a_fold_that_was_stopped_at_its_report_gets_one(train: Train, folded_copy: Path) -> None:
    (folded_copy / "fold-1" / "report.html").unlink()
    again = train(folded_copy, "--folds", "2", "--resume", *BENIGN)
    assert again.code == 0, again.err
    assert "fold-1: done before" not in again.out
    assert "fold-2: done before" in again.out
    assert (folded_copy / "fold-1" / "report.html").exists()


def test_folds_that_are_done_are_told_from_others_without_their_checkpoints(
    train: Train, folded_copy: Path
) -> None:
    for n in (1, 2):
        (folded_copy / f"fold-{n}" / "last.ckpt").unlink()
    refused = train(folded_copy, "--folds", "2", "--resume", "--set", "train.lr=0.5", *BENIGN)
    assert refused.code == 1
    assert "fold-1: belongs to another run: train.lr was " in refused.err
    refused = train(folded_copy, "--folds", "2", *BENIGN)
    assert refused.code == 1
    assert "folds: holds a run already" in refused.err


def test_a_slide_that_a_fold_could_not_score_is_named_when_the_folds_go_on(
    train: Train, folded_copy: Path
) -> None:
    path = folded_copy / "fold-1" / "predictions_modules.csv"
    header, lost, *rest = path.read_text().splitlines()
    path.write_text("\n".join([header, *rest]))
    slide_id = lost.split(",")[1]
    done = train(folded_copy, "--folds", "2", "--resume", *BENIGN)
    line = f"{slide_id}: was not scored; fold-1/report.html says why"
    assert done.code == 1
    assert line in done.err
    assert line.replace(":", "") in words_of(folded_copy / "report.html")


def test_seeds_are_judged_by_their_mean(train: Train, tmp_path: Path) -> None:
    out = tmp_path / "seeds"
    done = train(out, "--seeds", "2", "--set", "train.seed=5")
    assert done.code == 0, done.err
    each = [rows_of(out / f"seed-{n}" / "predictions.csv") for n in (5, 6)]
    assert [row["slide_id"] for row in each[0]] == [row["slide_id"] for row in each[1]]
    mean = np.mean([[float(row["p_lesion"]) for row in rows] for rows in each], axis=0)
    together = [float(row["p_lesion"]) for row in rows_of(out / "predictions.csv")]
    np.testing.assert_allclose(together, mean, atol=2e-6)
    assert any(a["p_lesion"] != b["p_lesion"] for a, b in zip(*each, strict=True))
    words = words_of(out / "report.html")
    assert "2 seeds" in words
    assert "the maps are those of the first (seed-5) alone" in words
    assert_spread(words, json.loads((out / "metrics.json").read_text()))
    assert "--seeds 2" in words
    for report in (out, out / "seed-5"):
        said = words_of(report / "report.html")
        assert "No patient is in two parts; the parts were given by the table." in said
    view = RunView(out)
    for row, line in ((row, view.source(row["slide_id"])) for row in each[0]):
        assert (line["run"], line["mean_of"]) == ("seed-5", 2)
        assert view.layers(row["slide_id"])


def test_a_positive_class_that_is_none_is_refused_before_the_training(train: Train, tmp_path: Path) -> None:
    for arguments in ([], ["--seeds", "2"]):
        out = tmp_path / f"run{len(arguments)}"
        refused = train(out, *arguments, "--set", "evaluate.positive=cancer")
        assert refused.code == 1
        last = refused.err.strip().splitlines()[-1]
        assert last == "holoslide: evaluate.positive: 'cancer' is no class; choose one of benign, lesion"
        assert not out.exists()


def test_folds_and_seeds_exclude_each_other(train: Train, tmp_path: Path) -> None:
    refused = train(tmp_path / "x", "--folds", "2", "--seeds", "2")
    assert refused.code == 1
    assert "give one of them" in refused.err
    assert len(refused.err.strip().splitlines()) == 1
