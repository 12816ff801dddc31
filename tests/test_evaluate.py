"""Where an evaluation goes, and what its report and the model's card say it is of."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from holoslide.api import Run, evaluate
from holoslide.config import RunConfig
from holoslide.errors import CheckpointError
from holoslide.evaluated import LOCK
from holoslide.files import lock, write_rows
from holoslide.inference.card import model_card
from holoslide.inference.heatmap import Heatmap, heatmap_paths
from holoslide.models.classifier import LocalClassifier
from holoslide.predictions import Predictor, predict_cohort, predict_one, predictions_of
from holoslide.prepared import prepare_cohort
from holoslide.runs import rasters_of
from holoslide.serve.run import RunView
from holoslide.slides.cohort import Cohort
from tests.command import exit_code, words_of
from tests.command import rows_of as rows

KEPT = ("report.html", "metrics.json", "predictions.csv", "predictions_modules.csv", "cohort.csv", "run.json")


def holoslide(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:  # also for fixtures of the module
        return exit_code(patch, *arguments)


@pytest.fixture(scope="module")
def run(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was evaluated on its test part, then on all its slides."""
    copy = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(finished_run, copy, ignore=shutil.ignore_patterns("last.ckpt", "tensorboard", "heatmaps"))
    assert holoslide("evaluate", copy) == 0
    for name in KEPT:
        shutil.copy(copy / name, copy / f"first-{name}")
    assert holoslide("evaluate", copy, "--split", "all") == 0
    return copy


def test_of_two_that_write_one_folder_the_second_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One's predictions might have stood beside the other's metrics."""
    before = {name: (run / name).read_bytes() for name in KEPT}
    with (run / LOCK).open("wb") as file:
        assert lock(file)
        assert holoslide("evaluate", run, "--workers", 1) == 1
    assert f"{run}: is being evaluated into by another command; wait until it is" in capsys.readouterr().err
    assert {name: (run / name).read_bytes() for name in KEPT} == before


@pytest.fixture(scope="module")
def other(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the run came to on another hospital's table, which has no splits.

    One slide is new, one was trained with, one has no label, one no file.
    """
    folder = tmp_path_factory.mktemp("other")
    cohort = Cohort.from_csv(finished_run / "cohort.csv")
    new = next(row for row in cohort.test if row.label == "benign")
    learnt = next(row for row in cohort.train if row.label == "lesion")
    lines = ["slide_id,patient_id,label,path"]
    for number, (row, label) in enumerate([(new, "benign"), (learnt, "lesion"), (new, "")], start=1):
        assert row.path is not None
        shutil.copy(row.path, folder / f"theirs-{number}.tiff")
        lines.append(f"theirs-{number},p{number},{label},theirs-{number}.tiff")
    (folder / "theirs.csv").write_text("\n".join([*lines, "lost,p4,lesion,lost.tiff"]))
    command = ("evaluate", finished_run, folder / "theirs.csv", "-o", folder / "out", "--workers", 1)
    assert holoslide(*command) == 1  # for slides were left out
    return folder / "out"


# --- Another part than the test part ------------------------------------------------------------------------------


def test_what_the_test_part_came_to_is_never_replaced(run: Path) -> None:
    for name in KEPT:
        assert (run / name).read_bytes() == (run / f"first-{name}").read_bytes(), name
    tested = {row.slide_id for row in Cohort.from_csv(run / "cohort.csv").test}
    assert {row["slide_id"] for row in rows(run / "predictions.csv")} == tested
    assert len(rows(run / "all" / "predictions.csv")) == 8
    assert "Results on all slides Among these are the slides of training" in words_of(
        run / "all" / "report.html"
    )


def test_the_viewer_opens_what_all_slides_came_to(run: Path) -> None:
    view = RunView(run / "all", rasters_of(run / "all"))
    lines = view.slides()
    assert [line["id"] for line in lines] == [row["slide_id"] for row in rows(run / "cohort.csv")]
    for line in lines:
        assert line["heatmap"]
        assert line["p"]
        assert line["split"]
        assert len(view.layers(line["id"]).by_name) == 6  # two modules, each with attention and two classes
        assert view.outline(line["id"])


@pytest.mark.parametrize(
    "arguments", [("--split", "all", "-o", "{run}"), ("{run}/cohort.csv", "-o", "{run}"), ("-o", "{mine}")]
)
def test_a_folder_with_a_run_or_a_table_of_its_own_is_refused(
    run: Path, tmp_path: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cohort.csv").write_text("slide_id\nmine\n")
    given = [each.format(run=run, mine=tmp_path) for each in arguments]
    assert holoslide("evaluate", run, *given) == 1
    assert capsys.readouterr().err == (
        f"holoslide: --out: {given[-1]} holds a run, or a table of its own, which this would replace; "
        "give another folder\n"
    )


def test_threshold_and_temperature_are_not_said_to_come_from_elsewhere(run: Path) -> None:
    own, every = (words_of(folder / "report.html") for folder in (run, run / "all"))
    assert "The threshold comes from those alone, never from the slides here." in own
    assert "The threshold comes from those alone" not in every
    assert "Those are among the slides here, which flatters" in every


def test_threshold_and_temperature_follow_the_table_when_it_is_corrected(
    finished_run: Path, tmp_path: Path
) -> None:
    """The model's answers are kept; labels, patients and the part itself are the table's to say."""
    copy, own = tmp_path / "run", rasters_of(finished_run)
    shutil.copytree(finished_run, copy, ignore=shutil.ignore_patterns("last.ckpt", "tensorboard", "heatmaps"))
    assert own is not None
    before = validation_said(finished_run)
    said = {one["slide_id"]: one["probabilities"] for one in before}
    before[0] |= {"raster": "another", "probabilities": [0.5, 0.5]}  # of the slide as it was once prepared
    kept_json = json.loads((copy / "validation.json").read_text()) | {"slides": before}
    (copy / "validation.json").write_text(json.dumps(kept_json))
    table = rows(copy / "cohort.csv")
    kept, moved = (next(row for row in table if row["split"] == part) for part in ("valid", "train"))
    kept["label"], kept["patient_id"] = "lesion", "shared"  # it was benign
    moved["split"], moved["patient_id"] = "valid", "shared"
    write_rows(table, copy / "cohort.csv")
    assert holoslide("evaluate", copy, "--rasters", own, "--sensitivity", 1) == 0
    now = {one["slide_id"]: one["probabilities"] for one in validation_said(copy)}
    assert now.keys() == {*said, moved["slide_id"]}
    assert {slide: now[slide] for slide in said} == said
    found = json.loads((copy / "metrics.json").read_text())
    labels = {row["slide_id"]: row["label"] for row in table if row["split"] == "valid"}
    lesions = [now[slide][1] for slide, label in labels.items() if label == "lesion"]
    assert found["decision"]["threshold"]["value"] == min(lesions)
    assert found["decision"]["threshold"]["positives"] == len(lesions) == 3
    temperature = found["calibration"]["temperature"]
    assert (temperature["slides"], temperature["patients"]) == (3, 2)
    words = words_of(copy / "report.html")  # which was evaluated before, at another sensitivity
    assert "The threshold comes from those alone, never from the slides here." in words
    assert "before these slides were looked at" not in words


def validation_said(run: Path) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = json.loads((run / "validation.json").read_text())["slides"]
    return said


def test_a_page_names_the_command_that_made_it_beside_the_one_that_trained(run: Path) -> None:
    trained = json.loads((run / "run.json").read_text())["command"]
    words = words_of(run / "all" / "report.html")
    assert f". holoslide evaluate {run} --split all The command that trained the network" in words
    assert f" {trained} The same network anew" in words


# --- Another cohort -----------------------------------------------------------------------------------------------


def test_a_report_of_another_cohort_is_of_that_cohort(other: Path, finished_run: Path) -> None:
    words, table = words_of(other / "report.html"), other.parent / "theirs.csv"
    assert f"Here it is measured on another cohort, {table}. Of 1 epoch" in words
    assert f"Results on all slides of {table}" in words
    assert "4 slides found, 2 slides of 2 patients scored. Not scored: " in words
    assert "Part benign lesion All slides Patients all 1 (1) 1 (1) 2 2 Left out: 2" in words
    assert "lost " in words[words.index("Left out: 2") :]
    assert f"given in {Path.cwd()} . holoslide evaluate {finished_run} {table} -o {other}" in words
    assert "The data: 2 slides" in words
    for number in (1, 2):
        digest = hashlib.sha256((other.parent / f"theirs-{number}.tiff").read_bytes()).hexdigest()
        assert f"theirs-{number} – 2 " in words
        assert digest[:16] in words
        assert digest in (other / "data.csv").read_text()
    assert " focus-00" not in words  # the slides of the training


def test_slides_of_another_cohort_do_not_take_the_place_of_the_runs_own(
    finished_run: Path, tmp_path: Path
) -> None:
    own = rasters_of(finished_run)
    assert own is not None
    before = {path.name: path.stat().st_mtime_ns for path in own.iterdir()}
    first, second, *_ = Cohort.from_csv(finished_run / "cohort.csv").rows
    swapped = Cohort.from_rows(
        [dataclasses.replace(first, path=second.path), dataclasses.replace(second, path=first.path)]
    )
    evaluate(finished_run, swapped, split="all", out=tmp_path / "other")
    assert {path.name: path.stat().st_mtime_ns for path in own.iterdir()} == before
    assert len(list((tmp_path / "other" / "rasters").glob("*.tif"))) == 2


def test_slides_that_training_had_are_known_by_their_files(other: Path) -> None:
    words = words_of(other / "report.html")
    assert (
        "1 slide of these is a file of the network's own training or validation part, which flatters" in words
    )
    assert "never from the slides here" not in words


def test_the_viewer_opens_what_another_cohort_came_to(other: Path) -> None:
    view = RunView(other, rasters_of(other))
    assert [line["id"] for line in view.slides()] == ["theirs-1", "theirs-2"]
    for line in view.slides():
        assert line["heatmap"]
        assert line["file"]
        assert len(view.layers(line["id"]).by_name) == 6
        assert view.outline(line["id"])


# --- What is said of results elsewhere ----------------------------------------------------------------------------


def test_a_card_has_results_of_the_test_part_or_none(run: Path, other: Path) -> None:
    model = LocalClassifier.load(run / "best")
    card = model_card(model, title="it", run=run)
    assert f"Results on the test part\n\nOf {len(rows(run / 'predictions.csv'))} slides" in card
    for folder in (run / "all", other):
        assert "None: the run's folder holds no results of its test part" in model_card(
            model, title="it", run=folder
        )
        assert "| auroc |" not in model_card(model, title="it", run=folder)


def test_metrics_say_what_they_are_of_and_so_does_a_notebook(run: Path, other: Path) -> None:
    found = [json.loads((folder / "metrics.json").read_text()) for folder in (run, run / "all", other)]
    assert [one["split"] for one in found] == ["test", "all", "all"]
    assert [one["table"] for one in found] == [None, None, str(other.parent / "theirs.csv")]
    slides = len(rows(run / "predictions.csv"))
    assert f"{slides}, part: test" in Run(run, run / "best", 1, ())._repr_html_()


# --- Files of a slide ---------------------------------------------------------------------------------------------


def test_a_slide_named_like_another_ones_module_keeps_its_heatmaps(
    finished_run: Path, tmp_path: Path
) -> None:
    slides = finished_run.parent / "slides"
    for source, name in (("focus-001", "a"), ("focus-002", "a.module-1")):
        shutil.copy(slides / f"{source}.tiff", tmp_path / f"{name}.tiff")
    given = (tmp_path / "a.tiff", tmp_path / "a.module-1.tiff", "-o", tmp_path / "maps", "--workers", 1)
    assert holoslide("heatmap", finished_run, *given) == 0
    for source, name in (("focus-001", "a"), ("focus-002", "a.module-1")):
        wanted = heatmap_paths(finished_run / "heatmaps", source, 2)
        for one, expected in zip(heatmap_paths(tmp_path / "maps", name, 2), wanted, strict=True):
            shapes = [Heatmap.load(path).attention_HW.shape for path in (one, expected)]
            assert shapes[0] == shapes[1]
            assert Heatmap.load(one).bias_L == pytest.approx(Heatmap.load(expected).bias_L)


def test_the_heatmaps_of_slides_that_are_drawn_are_let_go(
    finished_run: Path, tmp_path: Path, alive: list[int]
) -> None:
    given = ("--split", "all", "-o", tmp_path / "all", "--workers", 1)
    assert holoslide("evaluate", finished_run, *given) == 0
    assert len(alive) == 8
    assert max(alive) <= 1


def test_a_network_without_barriers_is_not_said_to_be_trained_module_by_module(
    finished_run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished_run, copy, ignore=shutil.ignore_patterns("last.ckpt", "tensorboard", "heatmaps"))
    card = copy / "best" / "model.yaml"
    text = card.read_text()
    assert "\n  barrier_every: 1\n" in text
    assert "cut into 2 locally trained modules" in model_card(LocalClassifier.load(copy / "best"), title="a")
    card.write_text(text.replace("\n  barrier_every: 1\n", "\n  barrier_every: 2\n"))
    assert "cut into 2 modules, gradient barriers: none" in model_card(
        LocalClassifier.load(copy / "best"), title="a"
    )
    assert holoslide("evaluate", copy) == 0
    assert "no gradient barrier is between them" in words_of(copy / "report.html")


def test_the_model_of_a_run_by_itself_is_prepared_for_as_the_run_is(finished_run: Path) -> None:
    assert Predictor(finished_run / "best").config == Predictor(finished_run).config != RunConfig()


def test_a_raster_that_another_command_made_anew_meanwhile_is_not_scored(
    finished_run: Path, tmp_path: Path
) -> None:
    """As two models that want other rasters have it in one folder, or two slides of one name, one being deleted."""
    predictor, cohort = Predictor(finished_run), Cohort.from_csv(finished_run / "cohort.csv")
    first, second = (dataclasses.replace(cohort, rows=rows) for rows in (cohort.rows[:1], cohort.rows[1:2]))
    namesake = dataclasses.replace(second.rows[0], slide_id=first.rows[0].slide_id)
    prepared = prepare_cohort(first, tmp_path / "rasters", predictor.prepare_config(), workers=1)
    prepared.rasters[namesake.slide_id].unlink()
    prepare_cohort(
        dataclasses.replace(second, rows=(namesake,)),
        tmp_path / "rasters",
        predictor.prepare_config(),
        workers=1,
    )
    assert predict_cohort(predictor, prepared, tmp_path / "predictions.csv") == 0
    ((slide_id, reason),) = prepared.left_out
    assert slide_id == namesake.slide_id
    assert "was prepared anew meanwhile, with other settings or from another file" in reason


def test_a_clusters_worker_does_not_take_another_model_for_the_one_it_keeps(
    finished_run: Path, tmp_path: Path
) -> None:
    """A worker outlives a command, and the folder may be trained into again meanwhile."""
    copy, folder = tmp_path / "run", rasters_of(finished_run)
    assert folder is not None
    shutil.copytree(finished_run / "best", copy / "best")
    row = Cohort.from_csv(finished_run / "cohort.csv").test.rows[0]
    raster, first = folder / f"{row.slide_id}.tif", Predictor(copy)
    before = predict_one(copy, first.weights_sha256(), row, raster, None)
    with torch.no_grad():
        for parameter in first.model.heads.parameters():
            parameter.add_(0.1)
    first.model.save(copy / "best")
    second = Predictor(copy)
    (expected,) = predictions_of([second.score(row, raster)])
    after = predict_one(copy, second.weights_sha256(), row, raster, None)
    assert after == expected.row(second.model.classes) != before
    with pytest.raises(CheckpointError, match="holds another model than where the work comes from"):
        predict_one(copy, "0" * 64, row, raster, None)
