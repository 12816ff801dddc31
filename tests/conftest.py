"""What all tests share: where the real data is, and quiet, few-threaded numerics."""

import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command import Command

if "PYTEST_XDIST_WORKER" in os.environ:  # the tests side by side fill the processor; each with one thread
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REPO = Path(__file__).resolve().parent.parent

SETTINGS = {
    "prepare": {"mpp": 8.0},
    "model": {
        "backbone": {"name": "resnet18", "weights": "none", "truncate": "layer1"},
        "modules": 2,
        "heads": {"kernel": 3},
        "reconstruction": {"side": 8, "patches": 2},
    },
    "train": {"epochs": 1, "lr": 1e-3, "accumulate": 2, "precision": "32"},
}


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two modules on eight small drawn slides; its table and slides lie beside it.

    It holds what all eight come to, as if all were its test part, for two are few to look at. Tests that write into
    a run take `run_copy`.
    """
    from holoslide.config import RunConfig
    from holoslide.pipeline import train
    from holoslide.prepared import prepare_cohort
    from holoslide.results import evaluate_run
    from holoslide.slides.cohort import Cohort
    from holoslide.slides.phantom import PhantomConfig, write_phantoms

    folder = tmp_path_factory.mktemp("finished")
    drawn = PhantomConfig(least_um=1500, most_um=1700, mpp=2.0)
    table = write_phantoms(folder, task="focus", slides=8, config=drawn)
    config = RunConfig.from_dict(SETTINGS, where="tests")
    prepared = prepare_cohort(
        Cohort.from_csv(table).with_splits(config.split),
        folder / "rasters",
        config.prepare,
        labels=True,
        workers=1,
    )
    train(prepared, config, folder / "run")
    found = evaluate_run(folder / "run", prepared, split="all").report.parent
    for name in ("predictions.csv", "predictions_modules.csv", "metrics.json", "report.html", "heatmaps"):
        (found / name).rename(folder / "run" / name)
    shutil.rmtree(found)
    return folder / "run"


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A run's folder to write into: the tables and heatmaps without the model."""
    copy = tmp_path / "run"
    shutil.copytree(finished_run, copy, ignore=shutil.ignore_patterns("best", "last.ckpt", "tensorboard"))
    return copy


@pytest.fixture
def holoslide(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real slides, tissue and weights; a test that needs it is skipped where it is absent."""
    folder = Path(os.environ.get("HOLOSLIDE_TEST_DATA", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real test data is absent: {folder} (set HOLOSLIDE_TEST_DATA)")
    return folder


CLUSTER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=True, dashboard_address=None) as cluster:
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()
"""


QUIET = {  # what a cluster watches of itself takes a tenth of a core
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    "DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL": "1s",
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL": "10s",
}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """The address of a scheduler, in processes of its own."""
    script = tmp_path / "cluster.py"
    script.write_text(CLUSTER)
    process = subprocess.Popen(
        [sys.executable, script], env=os.environ | QUIET,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A real browser without a window.

    Tests that need one are skipped where there is none, and fail where HOLOSLIDE_REQUIRE_BROWSER is set.
    """
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        lacking = pytest.fail if os.environ.get("HOLOSLIDE_REQUIRE_BROWSER") else pytest.skip
        lacking("no chromium on this machine")
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many slides' heatmaps are held each time that a slide is about to be scored."""
    from holoslide.predictions import Predictor

    held: list[weakref.ref[Any]] = []
    counts: list[int] = []
    score = Predictor.score

    def counted(*arguments: Any) -> Any:
        counts.append(sum(each() is not None for each in held))
        one = score(*arguments)
        held.append(weakref.ref(one.heatmap.attention_HW))
        return one

    monkeypatch.setattr(Predictor, "score", counted)
    return counts
