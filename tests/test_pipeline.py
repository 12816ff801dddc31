"""How a run scales its pixels, and that it stays with the slides as it first saw them."""

import csv
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from holoslide import fit
from holoslide.cli_options import settings_of
from holoslide.config import _SWITCHES, PRESETS, RunConfig, _paths
from holoslide.demo import demo_config
from holoslide.errors import CheckpointError, CohortError, ConfigError, SlideError
from holoslide.geometry import Box
from holoslide.models.classifier import LocalClassifier
from holoslide.models.options import InputConfig, StreamConfig
from holoslide.pipeline import normalisation, train
from holoslide.prepared import Prepared, prepare_cohort, refuse_copies
from holoslide.runs import read_json, repeats_of
from holoslide.slides.cohort import Cohort
from holoslide.slides.raster import Raster
from holoslide.training.progress import RunFacts, Silent
from tests.conftest import SETTINGS


@pytest.fixture
def rasters(finished_run: Path) -> list[Path]:
    return sorted((finished_run.parent / "rasters").glob("*.tif"))


def config_of(**backbone: object) -> RunConfig:
    return RunConfig.from_dict({"model": {"backbone": backbone}}, where="test")


def test_pretrained_weights_get_pixels_as_they_learned_them(rasters: list[Path]) -> None:
    found = normalisation(rasters, config_of())
    assert (found.mean, found.std) == (InputConfig().mean, InputConfig().std)


@pytest.mark.parametrize("backbone", [{"scale": "cohort"}, {"weights": "none"}])
def test_else_pixels_are_scaled_by_the_tissue_of_the_cohort(
    rasters: list[Path], backbone: dict[str, object]
) -> None:
    found = normalisation(rasters, config_of(**backbone))
    tissue = []
    for path in rasters:
        with Raster.open(path) as raster:
            inside = raster.mask.repeat(raster.mask_cell_px, 0).repeat(raster.mask_cell_px, 1)
            height, width = raster.shape_px
            tissue.append(raster.read(Box(0, 0, height, width))[inside[:height, :width]] / 255)
    pixels = np.concatenate(tissue)
    np.testing.assert_allclose(found.mean, pixels.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(found.std, pixels.std(axis=0), atol=0.01)


def test_yaml_is_read_as_it_stands(tmp_path: Path) -> None:
    """A part with nothing below it is its defaults; of two that have one name, neither wins."""
    settings = tmp_path / "run.yaml"
    settings.write_text("train:\n  # epochs: 3\nmodel: {modules: 2}\n")
    assert RunConfig.load(settings) == RunConfig.from_dict({"model": {"modules": 2}})
    settings.write_text("train: {epochs: 3}\nmodel: {modules: 1}\ntrain: {lr: 0.1}\n")
    with pytest.raises(ConfigError, match=r"run.yaml: is not YAML \(train is given twice"):
        RunConfig.load(settings)


@pytest.mark.parametrize(
    ("text", "part", "name", "value"),
    [
        ("train: {lr: 2e-5}", "train", "lr", 2e-5),
        ("train: {epochs: 1e1}", "train", "epochs", 10),
        ("train: {precision: 32}", "train", "precision", "32"),
        ("train: {milestones: [1e-1, '0.5']}", "train", "milestones", (0.1, 0.5)),
        ("augment: {small_px: 2e3}", "augment", "small_px", 2000),
        ("evaluate: {positive: '01'}", "evaluate", "positive", "01"),
        ("evaluate: {positive: 01}", "evaluate", "positive", "01"),
        ("train: {epochs: 010}", "train", "epochs", 10),
        ("evaluate: {positive: 1e5}", "evaluate", "positive", "1e5"),
        ("evaluate: {positive: '1.50'}", "evaluate", "positive", "1.50"),
        ("evaluate: {positive: 10000000000}", "evaluate", "positive", "10000000000"),
        ("train: {seed: 20261127123456}", "train", "seed", 20261127123456),
    ],
)
def test_a_value_is_what_its_setting_takes_wherever_it_is_given(
    tmp_path: Path, text: str, part: str, name: str, value: object
) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text(text)
    key, _, given = text.partition(": {")
    setting = f"{key}.{given[:-1].replace(': ', '=', 1)}"
    settings_too = tmp_path / "more.yaml"
    settings_too.write_text("train: {seed: 1}\nevaluate: {sensitivity: 0.9}\n")
    for found in (
        RunConfig.load(settings),
        RunConfig.load(sets=[setting]),
        RunConfig.load(settings_too, preset="paper", sets=[setting]),
    ):
        assert getattr(getattr(found, part), name) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {weight_decay: inf}", "train.weight_decay: is inf; give a finite number"),
        ("train: {milestones: [nan]}", "train.milestones: is nan; give a finite number"),
        ("train: {milestones: [true]}", "train.milestones: should be a number; it was True"),
        ("evaluate: {positive: no}", "evaluate.positive: should be text; it was False: put the word in quot"),
        ("evaluate: {positive: 1.0}", "evaluate.positive: should be text; it was 1.0: put the word in quot"),
        (
            "stream: {folder: 2026-01-01}",
            "stream.folder: should be text; it was 2026-01-01: put the word in quot",
        ),
        ("train: {devices: 1.5}", "train.devices: is 1.5; it takes: whole number or auto"),
        ("train: {milestones: 0.5}", "train.milestones: is 0.5; it takes: list of numbers"),
        ("train: {epochs: }", "train.epochs: is empty; it takes: whole number"),
        (
            "train: {devices: 100000000000000000000}",
            "devices: is 10{20}; give a whole number up to 2147483647",
        ),
        ("model: {heads: {kernel: 2147483648}}", "heads.kernel: is 2147483648; give a whole number up to 21"),
        ("train: {checkpoint_minutes: 1:30}", "train.checkpoint_minutes: is '1:30'; it takes: number"),
        ("epochs: 3", "there is no setting epochs; did you mean train.epochs?"),
        ("model: {name: resnet18}", "there is no setting model.name; did you mean model.backbone.name?"),
        ("? [train]\n: 1", "is not YAML"),
    ],
)
def test_what_is_no_value_of_its_setting_is_refused(tmp_path: Path, text: str, message: str) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text(text)
    with pytest.raises(ConfigError, match=message):
        RunConfig.load(settings)


def test_a_part_with_nothing_below_it_keeps_what_the_preset_has_in_it(tmp_path: Path) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text("train:\n  # epochs: 3\nmodel: {modules: 2, backbone: }\n")
    found, paper = RunConfig.load(settings, preset="paper", sets=["prepare="]), RunConfig.load(preset="paper")
    assert found.train == paper.train
    assert found.model == dataclasses.replace(paper.model, modules=2)


def test_what_is_wrong_is_said_to_be_where_it_was_given(tmp_path: Path) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text("train: {epochs: 3}")
    for setting, message in (
        ("train.epochz=4", "--set train.epochz=4: there is no setting"),
        ("train.epochs=x", "--set train.epochs=x: train.epochs: is 'x'"),
    ):
        with pytest.raises(ConfigError, match=message):
            RunConfig.load(settings, sets=[setting])


def test_of_two_that_have_one_name_neither_wins_in_a_setting_of_the_command() -> None:
    with pytest.raises(ConfigError, match="has no readable value"):
        RunConfig.load(sets=["train={lr: 1e-3, lr: 2e-3}"])


@pytest.mark.parametrize(
    ("sets", "notes"),
    [
        (["train.schedule=step", "train.gamma=0.5"], []),
        (["train.milestones=[0.5]"], ["train.milestones has no effect: train.schedule is cosine"]),
        (["stream.batch=4"], ["stream.batch has no effect: stream.tile_cells is null"]),
        (["stream.batch=1"], []),  # as it is anyway
        (
            ["stream.tile_cells=64", "stream.batch=4", "stream.memory_gib=2"],
            ["stream.memory_gib has no effect: stream.tile_cells is 64"],
        ),
        (
            ["prepare.tissue.skip_blur=false", "prepare.tissue.focus_mpp=1"],
            ["prepare.tissue.focus_mpp has no effect: prepare.tissue.skip_blur is false"],
        ),
        (
            ["model.modules=1", "model.reconstruction.alpha=0.5"],
            ["model.reconstruction.alpha has no effect: model.modules is 1"],
        ),
    ],
)
def test_a_setting_that_another_leaves_without_effect_is_noted(
    sets: list[str], notes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings_of(None, "default", sets, None)
    assert capsys.readouterr().err.splitlines() == [f"note: {note}" for note in notes]


def test_what_may_leave_settings_without_effect_is_settings() -> None:
    assert demo_config().idle(RunConfig()) == []
    assert [RunConfig.load(preset=preset).idle(RunConfig()) for preset in PRESETS] == [[]] * len(PRESETS)
    names = {name for (switch, _), keys in _SWITCHES.items() for name in (switch, *keys)}
    assert names <= set(_paths(RunConfig, ""))


def test_where_memory_would_overflow_to_is_looked_at_before_slides_are(
    finished_run: Path, tmp_path: Path
) -> None:
    """It was missed once a slide was too large for the memory, in the middle of a run."""
    cohort = Cohort.from_csv(finished_run / "cohort.csv")
    config = RunConfig(stream=StreamConfig(folder=str(tmp_path / "gone")))
    with pytest.raises(
        ConfigError, match=r"stream\.folder: .*gone is no folder that can be written into; make"
    ):
        fit(cohort, config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_papers_preset_is_the_papers_whatever_the_defaults_are() -> None:
    """Those of arXiv 2207.08267."""
    paper = RunConfig.load(preset="paper")
    model, given = paper.model, paper.train
    assert model.backbone.by_cohort
    assert (model.heads.pooling, model.heads.norm, model.heads.kernel) == ("gated", "slide", None)
    assert (model.border, model.pool, model.modules, model.reconstruction.share) == ("zeros", "all", 8, None)
    assert (given.epochs, given.lr, given.backbone_lr_ratio, given.accumulate) == (55, 2e-5, 0.5, 8)
    assert (given.schedule, given.heads_first, given.average) == ("step", 0, 0)


def test_slides_that_are_prepared_anew_are_not_mixed_into_a_run(finished_run: Path, tmp_path: Path) -> None:
    """Neither before or while it trains, by another command with other settings, nor when it is resumed."""
    rasters = tmp_path / "rasters"
    shutil.copytree(finished_run.parent / "rasters", rasters)
    cohort = Cohort.from_csv(finished_run / "cohort.csv")

    def prepared(quality: int) -> Prepared:
        config = RunConfig.from_dict({"prepare": {"mpp": 8.0, "jpeg_quality": quality}})
        return prepare_cohort(cohort, rasters, config.prepare, labels=True, workers=1)

    class Meanwhile(Silent):
        def started(self, facts: RunFacts) -> None:
            assert not prepared(80).left_out

    config = RunConfig.from_dict(SETTINGS)
    with pytest.raises(SlideError, match=r"it was prepared anew with other settings; give .* own --rasters"):
        train(prepared(90), config, tmp_path / "new", progress=Meanwhile())
    ready = prepared(90)
    assert not prepared(80).left_out
    with pytest.raises(SlideError, match=r"it was prepared anew with other settings; give .* own --rasters"):
        train(ready, config, tmp_path / "before")

    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    before = (run / "run.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"belongs to another run: slides\.train\.0 was .*, made as "):
        train(prepared(80), config, run, resume=True)
    assert (run / "run.json").read_bytes() == before


def test_a_file_that_two_patients_have_is_not_trained_on(finished_run: Path, tmp_path: Path) -> None:
    """Under another name, and maybe copied, it would be in the test part as well."""
    cohort, config = Cohort.from_csv(finished_run / "cohort.csv"), RunConfig.from_dict(SETTINGS)
    first, last = cohort.rows[0], cohort.rows[-1]
    assert first.path is not None
    copy = tmp_path / "again.tiff"
    shutil.copy(first.path, copy)

    def prepared(**changes: object) -> Prepared:
        rows = (*cohort.rows[:-1], dataclasses.replace(last, slide_id="again", path=copy, **changes))
        twice = dataclasses.replace(cohort, rows=rows)
        return prepare_cohort(twice, tmp_path / "rasters", config.prepare, labels=True, workers=1)

    said = rf"slide again of patient \S+ is the same file as slide {first.slide_id} of patient"
    with pytest.raises(CohortError, match=said):
        train(prepared(), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    refuse_copies(prepared(patient_id=first.patient_id))  # whose slides are all in one part


def test_a_model_that_is_given_has_its_heads_measured_once(finished_run: Path, tmp_path: Path) -> None:
    """Heads of norm "cohort" begin without statistics; a model that was trained already has its own."""
    cohort = Cohort.from_csv(finished_run / "cohort.csv")
    config = RunConfig.from_dict(SETTINGS)
    prepared = prepare_cohort(cohort, finished_run.parent / "rasters", config.prepare, labels=True, workers=1)
    heads = dataclasses.replace(config.model.heads, norm="cohort")
    model = LocalClassifier.from_config(
        dataclasses.replace(config.model, heads=heads), classes=cohort.classes
    )
    stems = [head.stem for head in model.heads]
    assert not any(stem.is_measured for stem in stems)
    train(prepared, config, tmp_path / "first", model=model)
    assert read_json(tmp_path / "first" / "run.json")["given_model"]
    assert not read_json(finished_run / "run.json")["given_model"]
    measured = [(stem.mean.clone(), stem.scale.clone()) for stem in stems]
    assert all(stem.is_measured for stem in stems)
    again = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1))
    train(prepared, again, tmp_path / "second", model=model)
    for stem, (mean, scale) in zip(stems, measured, strict=True):
        assert torch.equal(stem.mean, mean)
        assert torch.equal(stem.scale, scale)


def test_a_model_of_other_classes_is_refused(finished_run: Path, tmp_path: Path) -> None:
    """In another order, too: labels are numbers to a network, and each would stand for another word."""
    cohort, config = Cohort.from_csv(finished_run / "cohort.csv"), RunConfig.from_dict(SETTINGS)
    prepared = prepare_cohort(cohort, finished_run.parent / "rasters", config.prepare, labels=True, workers=1)
    model = LocalClassifier.from_config(config.model, classes=cohort.classes[::-1])
    with pytest.raises(
        ConfigError, match="model: has the classes lesion, benign, the table benign, lesion; make"
    ):
        train(prepared, config, tmp_path / "run", model=model)
    assert not (tmp_path / "run").exists()


def test_from_python_an_error_names_what_was_left_out(finished_run: Path, tmp_path: Path) -> None:
    """It may be for want of these that it came to it."""
    cohort = Cohort.from_csv(finished_run / "cohort.csv")
    trained = cohort.train.rows
    rows = [
        dataclasses.replace(row, path=tmp_path / "gone.tiff") if row in trained else row
        for row in cohort.rows
    ]
    with pytest.raises(CohortError, match="train: holds no slide that can be used") as caught:
        fit(
            dataclasses.replace(cohort, rows=tuple(rows)),
            RunConfig.from_dict(SETTINGS),
            out=tmp_path / "run",
            rasters=tmp_path / "rasters",
        )
    told = caught.value.__notes__
    assert len(told) == len(trained)
    assert told[0].startswith(f"left out: {trained[0].slide_id}: ")


def test_prepared_slides_below_the_slides_folder_are_not_taken_for_slides(
    finished_run: Path, tmp_path: Path
) -> None:
    """A table beside its slides has its rasters there, too, by default."""
    with (finished_run.parent / "slides.csv").open(encoding="utf-8") as file:
        names = [row["slide_id"] for row in csv.DictReader(file)]
    shutil.copytree(finished_run.parent / "slides", tmp_path, dirs_exist_ok=True)
    shutil.copytree(finished_run.parent / "rasters", tmp_path / "rasters")
    (tmp_path / "slides.csv").write_text("\n".join(["slide_id", *names]))
    cohort = Cohort.from_csv(tmp_path / "slides.csv", slides=tmp_path)
    assert [row.path.parent for row in cohort if row.path is not None] == [tmp_path] * len(names)


def test_a_damaged_record_of_a_run_is_said(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"runs": ')
    with pytest.raises(CheckpointError, match=r"metrics.json: is damaged \(.*\); delete it"):
        repeats_of(tmp_path)
