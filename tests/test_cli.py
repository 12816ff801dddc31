"""The command line, as a user meets it: the whole way on small slides, and one clear line for what is wrong."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from holoslide import cli
from holoslide.files import write_rows
from holoslide.predictions import Prediction, Predictor
from holoslide.slides.phantom import PhantomConfig, write_phantoms
from holoslide.training.loop import FitResult
from tests.command import Command, rows_of

SETTINGS = """
prepare: {mpp: 8.0}
model:
  backbone: {name: resnet18, weights: none, truncate: layer1}
  modules: 2
  heads: {kernel: 3}
  reconstruction: {side: 8, patches: 2}
train: {epochs: 2, lr: 1.0e-3, accumulate: 3, precision: "32"}
"""


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve small drawn slides; the folder also holds the settings."""
    folder = tmp_path_factory.mktemp("cohort")
    write_phantoms(
        folder, task="focus", slides=12, config=PhantomConfig(least_um=1800, most_um=2000, mpp=2.0)
    )
    (folder / "run.yaml").write_text(SETTINGS)
    return folder


@pytest.fixture(scope="module")
def run(cohort: Path) -> Path:
    """A finished run, trained from the command line with one slide that cannot be read."""
    folder = cohort / "run"
    rows = rows_of(cohort / "slides.csv")
    broken = cohort / "slides" / "broken.tiff"
    broken.write_bytes(b"not an image")
    rows.append({**rows[0], "slide_id": "broken", "patient_id": "broken", "path": "slides/broken.tiff"})
    with (cohort / "with_broken.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    table, settings = cohort / "with_broken.csv", cohort / "run.yaml"
    arguments = ["train", table, "--config", settings, "-o", folder, "--workers", 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["holoslide", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == 1, "a slide that cannot be used must show in the exit code"
    return folder


def test_train_writes_all_it_promises(run: Path, cohort: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {
        "config.yaml", "cohort.csv", "left_out.csv", "run.json", "best", "last.ckpt", "history.csv", "tensorboard",
        "predictions.csv", "predictions_modules.csv", "metrics.json", "heatmaps", "report.html",
    } <= names  # fmt: skip
    left_out = rows_of(run / "left_out.csv")
    assert [row["slide_id"] for row in left_out] == ["broken"]
    assert "broken.tiff" in left_out[0]["reason"]
    report = (run / "report.html").read_text()
    assert "broken" in report
    assert "No patient is in two parts; the parts were given by the table." in report


def test_of_several_processes_only_the_first_ends_with_what_was_left_out(
    run: Path, cohort: Path, tmp_path: Path, holoslide: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another that ends with any code but 0 has the first one killed, while it writes the report."""
    done = FitResult(run / "best", run / "last.ckpt", [], 1, rank=1)
    monkeypatch.setattr("holoslide.pipeline.train", lambda *_, **__: done)
    table, settings = cohort / "with_broken.csv", cohort / "run.yaml"
    assert holoslide("train", table, "--config", settings, "-o", tmp_path / "run", "--workers", 1) == 0
    assert holoslide.out == ""
    assert "left out:" not in holoslide.err


@pytest.mark.usefixtures("run")
def test_where_the_slides_left_are_too_few_it_is_said_why(
    cohort: Path, tmp_path: Path, holoslide: Command
) -> None:
    """A whole part was left out: that the table has none was all that was said."""
    rows = rows_of(cohort / "with_broken.csv")
    for row in rows:
        row["path"] = str(
            cohort / "slides" / ("broken.tiff" if row["split"] == "train" else Path(row["path"]).name)
        )
    table, given = tmp_path / "slides.csv", ("--config", cohort / "run.yaml")
    write_rows(rows, table)
    assert holoslide("train", table, *given, "-o", tmp_path / "run", "--workers", 1) == 1
    reason = f"{cohort / 'slides' / 'broken.tiff'}: is not a slide in any known format"
    assert reason in holoslide.err
    assert "holoslide: train: holds no slide that can be used; " in holoslide.err.splitlines()[-1]
    assert holoslide("plan", cohort / "with_broken.csv", *given) == 1
    assert "1 slide left out:\n  broken: " in holoslide.err
    assert holoslide("plan", cohort / "with_broken.csv", *given, "--json") == 1
    assert len(json.loads(holoslide.out)) == 2


@pytest.mark.usefixtures("run")
def test_that_no_test_slide_can_be_used_is_said_before_training(
    cohort: Path, tmp_path: Path, holoslide: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was said once all epochs were over."""
    rows = rows_of(cohort / "with_broken.csv")
    for row in rows:
        row["path"] = str(
            cohort / "slides" / ("broken.tiff" if row["split"] == "test" else Path(row["path"]).name)
        )
    write_rows(rows, tmp_path / "slides.csv")
    monkeypatch.setattr("holoslide.pipeline.train", lambda *_, **__: pytest.fail("it trained"))
    given = ("--config", cohort / "run.yaml", "--rasters", cohort / "rasters", "--workers", 1)
    for more in ((), ("--seeds", 2)):
        assert holoslide("train", tmp_path / "slides.csv", *given, "-o", tmp_path / "run", *more) == 1
        assert "broken.tiff: is not a slide in any known format" in holoslide.err
        assert holoslide.err.splitlines()[-1].startswith(
            "holoslide: test: holds no slide that can be used; mend "
        )


def test_without_test_slides_there_is_a_model(cohort: Path, tmp_path: Path, holoslide: Command) -> None:
    rows = [row for row in rows_of(cohort / "slides.csv") if row["split"] != "test"]
    for row in rows:
        row["path"] = str(cohort / row["path"])
    with (tmp_path / "slides.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    quick = ("--set", "train.epochs=1", "--set", "model.modules=1", "--rasters", cohort / "rasters")
    command = (
        "train",
        tmp_path / "slides.csv",
        "--config",
        cohort / "run.yaml",
        *quick,
        "-o",
        tmp_path / "run",
    )
    assert holoslide(*command, "--seeds", 2) == 1
    assert "slides.csv: has no test slides to judge by; give it some, or train once" in holoslide.err
    assert not (tmp_path / "run").exists()
    assert holoslide(*command) == 0
    assert holoslide.out.endswith(
        "nothing was tested: the table has no test slides; `holoslide evaluate` takes others\n"
    )
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "report.html").exists()


def test_only_test_slides_are_tested(run: Path, cohort: Path) -> None:
    parts = {row["slide_id"]: row["split"] for row in rows_of(cohort / "slides.csv")}
    predictions = rows_of(run / "predictions.csv")
    assert {parts[row["slide_id"]] for row in predictions} == {"test"}
    assert len(predictions) == sum(part == "test" for part in parts.values())
    classes = [key for key in predictions[0] if key.startswith("p_")]
    for row in predictions:
        assert sum(float(row[key]) for key in classes) == pytest.approx(1, abs=1e-5)
    modules = {row["module"] for row in rows_of(run / "predictions_modules.csv")}
    assert modules == {"1", "2"}
    metrics = json.loads((run / "metrics.json").read_text())
    assert len(metrics["modules"]) == 2
    assert metrics["slides"]["slides"] == len(predictions)


def test_heatmaps_of_every_module_agree_with_its_predictions(run: Path) -> None:
    """Evidence and bias add up to what the table says, here as log-odds, which a common shift leaves alone."""
    rows = rows_of(run / "predictions_modules.csv")
    assert {row["module"] for row in rows} == {"1", "2"}
    for row in rows:
        folder = run / "heatmaps" / "module-1" if row["module"] == "1" else run / "heatmaps"
        data = np.load(folder / f"{row['slide_id']}.npz")
        assert np.nansum(data["attention"], dtype=float) == pytest.approx(1, abs=1e-5)
        logits = np.nansum(data["evidence"], axis=(1, 2), dtype=float) + data["bias"]
        first, second = (float(row[f"p_{name}"]) for name in data["classes"])
        assert logits[0] - logits[1] == pytest.approx(np.log(first / second), abs=1e-5)
    for row in rows_of(run / "predictions.csv"):
        picture = np.asarray(Image.open(run / "heatmaps" / f"{row['slide_id']}-attention.png"))
        assert picture.shape[2] == 3


def test_predict_scores_new_slides(run: Path, cohort: Path, tmp_path: Path, holoslide: Command) -> None:
    first = rows_of(run / "predictions.csv")[0]
    slide = tmp_path / f"{first['slide_id']}.tiff"
    shutil.copy(cohort / "slides" / slide.name, slide)
    out = tmp_path / "predictions.csv"
    assert holoslide("predict", run, slide, "-o", out, "--workers", 1) == 0
    again = rows_of(out)[0]
    assert again["label"] == ""
    for key in first:
        if key.startswith("p_"):
            assert float(again[key]) == pytest.approx(float(first[key]), abs=1e-4)


def test_predict_in_shards_and_on_a_cluster(
    run: Path, cohort: Path, cluster: str, tmp_path: Path, holoslide: Command
) -> None:
    """Both score each slide once, as one process does; the cluster's workers keep going past a bad slide."""
    table, rasters = cohort / "five.csv", cohort / "rasters"
    write_rows(rows_of(cohort / "slides.csv")[:4] + rows_of(cohort / "with_broken.csv")[-1:], table)
    given = ["predict", run, table, "--rasters", rasters, "--workers", 1, "-o", tmp_path / "p.csv"]
    for shard in ("1/2", "2/2"):
        assert holoslide(*given, "--shard", shard) == (shard == "1/2")  # five slides, the last is broken
    shards = [rows_of(tmp_path / f"p-{number}-of-2.csv") for number in (1, 2)]
    assert [len(rows) for rows in shards] == [2, 2]
    assert holoslide(*given, "--cluster", cluster, "--heatmaps", tmp_path / "maps") == 1
    assert "broken.tiff: " in holoslide.err
    by_cluster = {row["slide_id"]: row for row in rows_of(tmp_path / "p.csv")}
    assert len(by_cluster) == 4
    for row in [*shards[0], *shards[1]]:
        other = by_cluster.pop(row["slide_id"])
        for key, value in row.items():
            if key.startswith("p_"):
                assert float(value) == pytest.approx(float(other[key]), abs=1e-4)
    assert not by_cluster
    assert len(list((tmp_path / "maps").glob("*.npz"))) == 4
    assert holoslide(*given, "--shard", "3/2") == 1
    assert "there is no shard 3 of 2; count from 1 to 2" in holoslide.err


def test_evaluate_another_split(run: Path, tmp_path: Path, holoslide: Command) -> None:
    names = json.loads((run / "metrics.json").read_text())["slides"]["classes"]
    command = ("evaluate", run, "--split", "valid", "-o", tmp_path, "--json", "--positive")
    assert holoslide(*command, names[0]) in (0, 1)
    found = json.loads(holoslide.out)
    assert found["slides"]["slides"] >= 1
    assert found["positive"] == {"class": names[0], "how": "chosen by evaluate.positive"}
    assert found["slides"]["positive"] == names[0]
    assert holoslide(*command, "nobody") == 1
    assert f"evaluate.positive: 'nobody' is no class; choose one of {', '.join(names)}" in holoslide.err


def test_another_table_is_measured_as_it_is_and_in_a_folder_of_its_own(
    run: Path, cohort: Path, tmp_path: Path, holoslide: Command
) -> None:
    """No split is drawn for it, and the run's own results stay."""
    rows = rows_of(cohort / "slides.csv")
    chosen = [next(row for row in rows if row["label"] == label) for label in ("benign", "lesion")]
    table, before = tmp_path / "two.csv", (run / "predictions.csv").read_bytes()

    def write(labels: list[str]) -> None:
        lines = [f"{row['slide_id']},{label}" for row, label in zip(chosen, labels, strict=True)]
        table.write_text("\n".join(["slide_id,label", *lines]))

    write(["benign", "lesion"])
    given = ("evaluate", run, table, "--slides", cohort / "slides", "--rasters", cohort / "rasters")
    assert holoslide(*given) == 1
    assert "--out: is missing" in holoslide.err
    assert holoslide(*given, "-o", tmp_path / "two") == 0, holoslide.err
    assert [row["slide_id"] for row in rows_of(tmp_path / "two" / "predictions.csv")] == [
        row["slide_id"] for row in chosen
    ]
    assert (run / "predictions.csv").read_bytes() == before
    write(["benign", "Lesion"])
    assert holoslide(*given, "-o", tmp_path / "three") == 1
    assert "Lesion is no class of the model; it knows benign, lesion" in holoslide.err
    assert not (tmp_path / "three").exists()


def test_a_slide_that_memory_does_not_do_for_is_listed(
    run: Path, cohort: Path, tmp_path: Path, holoslide: Command
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("last.ckpt", "tensorboard", "heatmaps"))
    settings = copy / "config.yaml"
    settings.write_text(settings.read_text().replace("memory_gib: null", "memory_gib: 0.05"))
    table = cohort / "slides.csv"
    given = ("predict", copy, table, "--rasters", cohort / "rasters", "-o", tmp_path / "p.csv")
    assert holoslide(*given, "--workers", 1) == 1
    assert "cannot be run (" in holoslide.err
    assert "at its smallest tiles" in holoslide.err
    assert not rows_of(tmp_path / "p.csv")


def test_a_stopped_prediction_loses_no_slide_that_was_scored(
    run: Path, cohort: Path, tmp_path: Path, holoslide: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    score, table = Predictor.score, tmp_path / "p.csv"

    def stopped_at_the_third(*arguments: Any) -> Prediction:
        if len(rows_of(tmp_path / "p.partial.csv")) == 2:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(Predictor, "score", stopped_at_the_third)
    given = ("predict", run, cohort / "slides.csv", "--rasters", cohort / "rasters", "-o", table)
    assert holoslide(*given, "--workers", 1) == 130
    assert len(rows_of(tmp_path / "p.partial.csv")) == 2
    assert not table.exists()


def test_a_finished_run_is_not_overwritten(run: Path, cohort: Path, holoslide: Command) -> None:
    """Nor are the records of how it was made, by a command that is refused."""
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    given = ("train", cohort / "slides.csv", "--config", cohort / "run.yaml", "-o", run, "--workers", 1)
    assert holoslide(*given) == 1
    assert "holds a run already" in holoslide.err
    assert holoslide(*given, "--resume", "--set", "train.lr=0.5") == 1
    assert "belongs to another run" in holoslide.err
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("more", [(), ("--resume",)])
def test_a_run_of_other_preparation_is_refused_before_its_slides_are_prepared_anew(
    run: Path, cohort: Path, holoslide: Command, more: tuple[str, ...]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (cohort / "rasters").iterdir()}
    given = ("train", cohort / "slides.csv", "--config", cohort / "run.yaml", "-o", run, "--workers", 1)
    assert holoslide(*given, *more, "--set", "prepare.jpeg_quality=80") == 1
    assert holoslide.err == (
        f"holoslide: {run}: belongs to another run: prepare.jpeg_quality was 90, now it is 80; resume with the "
        "settings and slides it was made with, or train into another folder\n"
    )
    assert {path.name: path.stat().st_mtime_ns for path in (cohort / "rasters").iterdir()} == before


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "model.backbone.name=resnet81",
            "resnet81: is not a network in torchvision nor in timm; choose resnet18",
        ),
        ("model.backbone.weights=nowhere.pth", "nowhere.pth: there is no such file of weights"),
        ("model.modules=40", "model.modules: 40 is out of range"),
        ("evaluate.positive=nobody", "evaluate.positive: 'nobody' is no class"),
        ("train.devices=2000", "train.devices: "),
        ("train.nodes=4", "train.accumulate: is 3, too few slides in a step for 4 processes; give 4 or more"),
        ("stream.folder=/no/where", "stream.folder: /no/where is no folder"),
    ],
)
def test_what_training_would_refuse_is_said_before_hours_of_preparing(
    cohort: Path, tmp_path: Path, holoslide: Command, setting: str, said: str
) -> None:
    given = ("train", cohort / "slides.csv", "--config", cohort / "run.yaml", "-o", tmp_path / "run")
    more = ("--set", "train.accelerator=cuda") if "devices" in setting else ()
    assert holoslide(*given, "--rasters", tmp_path / "rasters", *more, "--set", setting) == 1
    assert said in holoslide.err
    assert not any(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_line(
    run: Path, cohort: Path, tmp_path: Path, holoslide: Command
) -> None:
    (tmp_path / "taken").write_text("a file")
    assert holoslide("heatmap", run, cohort / "slides.csv", "-o", tmp_path / "taken") == 1
    assert holoslide.err.splitlines()[-1].startswith(f"holoslide: {tmp_path / 'taken'}: ")


def test_convert_writes_over_no_table_that_it_reads(cohort: Path, tmp_path: Path, holoslide: Command) -> None:
    table = tmp_path / "slides.csv"
    table.write_text("slide_id,patient_id,label,note\na,1,x,keep me\nb,2,y,\n")
    before = table.read_bytes()
    assert holoslide("convert", table, "-o", tmp_path) == 1
    assert f"--out: is the folder of {table}" in holoslide.err
    assert table.read_bytes() == before


def test_plan_announces_memory(cohort: Path, holoslide: Command) -> None:
    command = ("plan", cohort / "slides.csv", "--config", cohort / "run.yaml", "--memory", 2, "--json")
    assert holoslide(*command) == 0
    plans = json.loads(holoslide.out)
    assert [p["purpose"] for p in plans] == ["training", "validation"]
    assert 0 < plans[1]["peak_bytes"] < plans[0]["peak_bytes"] < 2 * 2**30


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "2", "LOCAL_RANK": "0"}, False),  # torchrun, the second machine
        ({"LOCAL_RANK": "1"}, False),  # Fabric
        ({"SLURM_PROCID": "1"}, False),
    ],
)
def test_of_several_processes_the_first_says_what_is_true_of_all(
    cohort: Path,
    holoslide: Command,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    *,
    says: bool,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    table = cohort / "unnamed.csv"
    header, first, *others = (cohort / "slides.csv").read_text(encoding="utf-8").splitlines()
    slide_id, _, *rest = first.split(",")  # of no patient: that is noted
    table.write_text("\n".join([header, ",".join([slide_id, "", *rest]), *others]), encoding="utf-8")
    assert holoslide("plan", table, "--config", cohort / "run.yaml") == 0, holoslide.err
    assert ("note: " in holoslide.err) == says
    assert ("slides ready in" in holoslide.err) == says


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("train.epoch=3", "there is no setting train.epoch; did you mean train.epochs?"),
        ("train.epochs=many", "train.epochs"),
        ("epochs", "is not a setting; write --set part.key=value"),
        ("model.border=grass", "model.border"),
        ("train.lr=.nan", "train.lr: is nan; give a finite number"),
        ("stream.memory_gib=0", "stream.memory_gib"),
        ("stream.memory_gib=inf", "stream.memory_gib: is inf; give a finite number"),
        ("train.seed=2026-13-45", "has no readable value"),
        ("train.seed=99999999999999999999", "train.seed"),
        ("prepare.mpp=true", "prepare.mpp: should be a number; it was True"),
        ("prepare=3", "prepare is a part, and was given 3; name a setting of it: prepare."),
        ("stream.folder=/nowhere", "stream.folder: /nowhere is no folder that can be written into; make it"),
    ],
)
def test_wrong_settings_are_one_line(
    cohort: Path, tmp_path: Path, holoslide: Command, setting: str, line: str
) -> None:
    assert holoslide("train", cohort / "slides.csv", "-o", tmp_path / "run", "--set", setting) == 1
    assert line in holoslide.err
    assert holoslide.err.count("\n") == 1


def test_a_log_hears_of_a_long_job_now_and_then(
    cohort: Path, holoslide: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no terminal is, there is no bar, but a line a minute."""
    monkeypatch.setattr("holoslide.console.LINE_S", 0.0)
    holoslide("audit", cohort / "slides.csv", "--workers", 1)
    assert re.search(r"^opening slides: 3 of 12, left \d+:\d\d", holoslide.err, re.MULTILINE)


def test_audit_finds_the_broken_slide(cohort: Path, run: Path, holoslide: Command) -> None:
    assert holoslide("audit", cohort / "with_broken.csv", "--json") == 1
    findings = json.loads(holoslide.out)["findings"]
    assert any(f["where"] == "broken" and f["severity"] == "error" for f in findings)
