"""Cross-validation and seeds from the command line: every patient tested once, one report of all runs."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from holoslide import cli
from holoslide.errors import CohortError, ConfigError
from holoslide.repeated import folds
from holoslide.slides.cohort import Cohort, SlideRow
from holoslide.slides.phantom import PhantomConfig, write_phantoms
from holoslide.slides.splits import SplitConfig

SETTINGS = """
prepare: {mpp: 8.0}
model:
  backbone: {name: resnet18, weights: none, truncate: layer1}
  modules: 1
  heads: {kernel: 3}
train: {epochs: 1, accumulate: 2}
"""


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def patients(count: int) -> Cohort:
    rows = [
        SlideRow(f"s{n}{part}", f"p{n}", "ab"[n % 2], split="train")
        for n in range(count)
        for part in "xy"[: 1 + n % 3 % 2]
    ]
    return Cohort.from_rows(rows)


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
        command = ["holoslide", "train", table, "--config", table.parent / "run.yaml", "-o", out]
        monkeypatch.setattr("sys.argv", [*map(str, command), *arguments, "--workers", "1"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert isinstance(stop.value.code, int)
        return Done(stop.value.code, *capsys.readouterr())

    return run


def test_folds_give_one_report_and_go_on_where_they_were_stopped(
    table: Path, train: Train, tmp_path: Path
) -> None:
    out = tmp_path / "folds"
    done = train(out, "--folds", "2")
    assert done.code == 0, done.err
    slides = {row["slide_id"] for row in rows_of(table)}
    together = rows_of(out / "predictions.csv")
    assert {row["slide_id"] for row in together} == slides
    assert len(together) == len(slides)
    each = [rows_of(out / f"fold-{n}" / "predictions.csv") for n in (1, 2)]
    assert together == [*each[0], *each[1]]
    found = json.loads((out / "metrics.json").read_text())
    assert found["together"]["slides"]["slides"] == len(slides)
    assert set(found["runs"]) == {"fold-1", "fold-2"}
    page = (out / "report.html").read_text()
    assert "2 folds" in page
    assert "fold-2" in page

    before = (out / "fold-1" / "last.ckpt").stat().st_mtime_ns
    (out / "fold-2" / "metrics.json").unlink()
    again = train(out, "--folds", "2", "--resume")
    assert again.code == 0, again.err
    assert "fold-1: done before" in again.out
    assert (out / "fold-1" / "last.ckpt").stat().st_mtime_ns == before
    assert rows_of(out / "predictions.csv") == together


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
    assert "2 seeds" in (out / "report.html").read_text()


def test_folds_and_seeds_exclude_each_other(train: Train, tmp_path: Path) -> None:
    refused = train(tmp_path / "x", "--folds", "2", "--seeds", "2")
    assert refused.code == 1
    assert "give one of them" in refused.err
    assert len(refused.err.strip().splitlines()) == 1
