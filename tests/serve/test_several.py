"""A folder of several runs in the viewer: each slide with the run that tested it."""

import json
import shutil
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from holoslide import cli
from holoslide.inference.heatmap import Heatmap
from holoslide.runs import repeats_of
from holoslide.serve.run import RunView
from tests.serve.served import serving
from tests.serve.several import make_folds, make_seeds, read_rows


@pytest.fixture
def folds_run(run_copy: Path, tmp_path: Path) -> Path:
    return make_folds(run_copy, tmp_path / "folds")


@pytest.fixture
def seeds_run(run_copy: Path, tmp_path: Path) -> Path:
    return make_seeds(run_copy, tmp_path / "seeds")


def test_each_slide_is_shown_with_the_fold_that_tested_it(folds_run: Path) -> None:
    path = folds_run / "fold-2" / "heatmaps" / "focus-002.npz"
    own = Heatmap.load(path)
    own.evidence_LHW[1] += 5.0  # as no other fold has it
    own.save(path)
    with serving(folds_run) as served:
        run = served.ask("/api/run").json
        assert (run["modules"], run["repeats"], run["classes"]) == (2, "2 folds", ["benign", "lesion"])
        assert [slide["split"] for slide in run["slides"]] == ["fold-1", "fold-2"] * 4
        assert all(slide["heatmap"] and slide["p"] for slide in run["slides"])
        for slide in run["slides"]:
            facts = served.ask(f"/api/slides/{quote(slide['id'])}").json
            assert facts["run"] == slide["split"]
            assert facts["words"] == f"Tested by {slide['split']}, which has not seen this patient."
            assert len(facts["layers"]) == 6
            assert [module["module"] for module in facts["modules"]] == [1, 2]
            assert served.ask(f"/api/slides/{slide['id']}/outline").json
        raw = np.frombuffer(served.ask("/api/slides/focus-002/layers/evidence-2-1.f32").body, "<f4")
    np.testing.assert_allclose(raw, (own.evidence_LHW[1] - own.evidence_LHW[0]).ravel(), rtol=1e-5)


def test_what_a_fold_says_of_its_own_training_slides_is_not_shown(folds_run: Path, run_copy: Path) -> None:
    """After `holoslide evaluate folds/fold-1 --split all`."""
    for name in ("predictions.csv", "predictions_modules.csv"):
        shutil.copy(run_copy / name, folds_run / "fold-1" / name)
    with serving(folds_run) as served:
        assert served.ask("/api/slides/focus-002").json["run"] == "fold-2"


def test_seeds_are_shown_by_their_mean_and_one_seeds_layers(seeds_run: Path) -> None:
    tested = [row["slide_id"] for row in read_rows(seeds_run / "predictions.csv")]
    with serving(seeds_run) as served:
        run = served.ask("/api/run").json
        assert (run["modules"], run["repeats"]) == (2, "2 seeds")
        lines = {slide["id"]: slide for slide in run["slides"]}
        assert all(lines[slide]["p"] == [0.5, 0.5] for slide in tested)
        facts = served.ask(f"/api/slides/{tested[0]}").json
        assert (facts["run"], facts["mean_of"], len(facts["layers"])) == ("seed-5", 2, 6)
        assert facts["words"] == (
            "The answer is the mean of 2 seeds; layers and modules are those of seed-5."
        )
        other = next(slide for slide in lines if slide not in tested)
        unscored = served.ask(f"/api/slides/{other}").json
        assert (lines[other]["p"], unscored["layers"], unscored["words"]) == (None, [], None)
        assert unscored["advice"] == (
            "run holoslide evaluate on seed-5 with --split all, then holoslide serve on seed-5/all."
        )


def test_the_runs_are_those_of_the_last_training(folds_run: Path) -> None:
    """In their order, without what an earlier `--folds 12` left; and already before all are done."""
    for n in (10, 11):
        shutil.copytree(folds_run / "fold-2", folds_run / f"fold-{n}")
    assert [run.name for run in repeats_of(folds_run)] == ["fold-1", "fold-2"]
    (folds_run / "metrics.json").unlink()
    assert [run.name for run in repeats_of(folds_run)] == ["fold-1", "fold-2", "fold-10", "fold-11"]
    assert repeats_of(folds_run / "fold-1") == []


def test_evaluate_asks_for_one_of_the_runs_before_it_prepares_anything(
    folds_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["holoslide", "evaluate", str(folds_run)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    one = folds_run / "fold-1"
    told = f"{folds_run}: holds 2 runs, and no model of its own; give one of them, such as {one}"
    assert capsys.readouterr().err.splitlines() == [f"holoslide: {told}"]


def test_probabilities_after_the_temperature_are_told_from_those_as_predicted(run_copy: Path) -> None:
    path, slide_id = run_copy / "metrics.json", read_rows(run_copy / "predictions.csv")[0]["slide_id"]
    assert RunView(run_copy).source(slide_id)["words"] is None
    path.write_text(json.dumps(json.loads(path.read_text()) | {"calibrated": True}))
    said = RunView(run_copy).source(slide_id)["words"]
    assert (
        said == "In the list, probabilities are after the temperature; here, and in the maps, as predicted."
    )
