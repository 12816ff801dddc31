"""The results page and the summary say what the result files say, and nothing else."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks.results_page import PAGE, PICTURE, page
from benchmarks.results_tables import RUN, layouts
from benchmarks.settings import SETTINGS, Setting, changed
from benchmarks.summary import GOALS, Found, Goal, by_layout, newest, value_of

from holoslide.config import RunConfig

REPO = Path(__file__).resolve().parent.parent


def test_the_page_is_what_the_files_make() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(newest()), "run python -m benchmarks.results_page"
    assert PICTURE.exists()


MOVED = {"stream.border": "model.border", "stream.pool": "model.pool"}  # since the first of them were made


def test_each_goal_is_a_figure_of_its_file() -> None:
    results = newest()
    wrong = [
        goal.name
        for goal in GOALS
        if goal.file in results and not isinstance(results[goal.file].figures.get(goal.key), int | float)
    ]
    assert wrong == []
    assert len({goal.name for goal in GOALS}) == len(GOALS)


def test_the_newest_full_result_counts(tmp_path: Path) -> None:
    for name, value in (
        ("a-b-2026-01-02", 1), ("a-b-2026-01-03", 2), ("a-b-2026-01-04-quick", 3), ("c-2026-01-01-quick", 4),
    ):  # fmt: skip
        record = {"figures": {"x": value}, "date": "", "command": ""}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    found = newest(tmp_path)
    assert {stem: one.figures["x"] for stem, one in found.items()} == {"a-b": 2, "c": 4}


def test_the_published_runs_are_made_by_the_settings_that_readme_names() -> None:
    published = re.compile(r"run_record-tissue-slides(-seed\d|-layout\d)?")
    stems = [stem for stem in newest() if published.fullmatch(stem)]
    assert len(stems) >= 3
    for stem in stems:
        assert_made_by(stem, SETTINGS["former"])


def test_the_runs_by_layout_are_made_by_the_settings_that_the_table_names() -> None:
    found = [(stem, match["setting"]) for stem in newest() if (match := RUN.fullmatch(stem))]
    assert len(found) > 10
    for stem, name in found:
        assert_made_by(stem, SETTINGS[name.removesuffix("-cpu")])


@pytest.mark.parametrize("seed", ["", "-seed1", "-seed2"])
def test_the_published_arrangement_runs_are_made_by_their_example(seed: str) -> None:
    assert_made_by(f"run_record-arrangement{seed}", Setting(""), example="arrangement.yaml")


def assert_made_by(stem: str, setting: Setting, *, example: str = "tissue.yaml") -> None:
    record = json.loads(newest()[stem].path.read_text(encoding="utf-8"))
    then = {MOVED.get(key, key): value for key, value in _flat(record["configuration"]["config"])}
    config = RunConfig.load(REPO / "examples" / example, sets=setting.sets)
    now = dict(_flat(yaml.safe_load(config.to_yaml())))
    given = {"model.backbone.weights", "stream.memory_gib", "train.seed"}  # on the command line
    assert {key: now.get(key) for key in then.keys() - given} == {
        key: then[key] for key in then.keys() - given
    }, stem


def _flat(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def test_seeds_of_one_setting_count_by_their_mean() -> None:
    goal = Goal("tissue", "", "run-tissue", "auroc")
    names = {"run-tissue": 0.9, "run-tissue-seed1": 0.8, "run-tissue-seed2": 0.7, "run-tissue-other": 0.1}
    results = {name: Found({"auroc": value}, Path(name), "", "") for name, value in names.items()}
    assert by_layout(goal, results) == {0: pytest.approx(0.8)}
    assert value_of(goal, results) == pytest.approx(0.8)
    assert value_of(goal, {}) is None
    ahead = Goal("ahead", "", "run-tissue", "auroc", less=("run-tissue-other", "auroc"))
    assert value_of(ahead, results) == pytest.approx(0.7)


def test_layouts_count_alike_however_many_seeds_they_have_and_are_held_to_their_own_opponents() -> None:
    values = {
        "ours": 0.9,
        "ours-seed1": 0.7,
        "ours-layout1": 1.0,
        "ours-layout2": 0.3,
        "mil": 0.5,
        "mil-layout1": 0.7,
    }
    results = {name: Found({"auroc": value}, Path(name), "", "") for name, value in values.items()}
    goal = Goal("ours", "", "ours", "auroc")
    assert value_of(goal, results) == pytest.approx((0.8 + 1.0 + 0.3) / 3)
    lead = Goal("lead", "", "ours", "auroc", less=("mil", "auroc"))
    assert value_of(lead, results) == pytest.approx((0.3 + 0.3) / 2), "layout 2 has no opponent"


def test_the_summary_names_all_and_invents_none() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.summary", "--json"],
        cwd=REPO, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    results = newest()
    assert json.loads(done.stdout) == {goal.name: value_of(goal, results) for goal in GOALS}


def test_settings_by_layout_have_their_mean_where_all_were_run(tmp_path: Path) -> None:
    values = {"small-lesions-layout0": 0.5, "small-lesions-layout1": 0.6, "small-lesions-layout2": 0.9,
              "small-lesions-k1-layout1": 0.7}  # fmt: skip
    results = {
        f"run_record-tissue-06-{name}": Found({"slides_auroc": value}, tmp_path / f"{name}.json", "", "")
        for name, value in values.items()
    }
    rows = [row.split(" | ") for row in layouts(results).splitlines() if row.startswith("| 0.06")]
    assert [row[-1].strip("| ") for row in rows] == ["0.667", ""]
    assert [bool(cell) for cell in rows[1][2:5]] == [False, True, False]
    goal = Goal("tissue", "", "run_record-tissue-06-small-lesions", "slides_auroc")
    assert by_layout(goal, results) == {0: 0.5, 1: 0.6, 2: 0.9}
    assert layouts({}) == ""


def test_a_setting_may_take_fewer_training_patients_and_turn_their_labels(tmp_path: Path) -> None:
    parts = ["train"] * 10 + ["valid"] * 2 + ["test"] * 2
    rows = [
        {"slide_id": f"{i}-{label}", "patient_id": f"p{i}", "label": label, "split": part, "path": "a.tiff"}
        for i, part in enumerate(parts)
        for label in ("normal", "tumour")
    ]
    with (tmp_path / "slides.csv").open("w", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0])
        writer.writeheader()
        writer.writerows(rows)

    def made(setting: Setting) -> list[dict[str, str]]:
        table = changed(setting, tmp_path / "slides.csv", tmp_path / "changed.csv")
        with table.open(newline="") as lines:
            return list(csv.DictReader(lines))

    assert made(Setting("as it is")) == rows
    half = made(Setting("half", patients=0.5))
    assert len({row["patient_id"] for row in half if row["split"] == "train"}) == 5
    assert [row["slide_id"] for row in half[-8:]] == [row["slide_id"] for row in rows[-8:]]
    assert len(half) == 2 * 5 + 8
    turned = made(Setting("turned", noise=0.1))
    wrong = [new["split"] for new, old in zip(turned, rows, strict=True) if new["label"] != old["label"]]
    assert wrong == ["train", "train"]
    assert {row["path"] for row in turned} == {str(tmp_path / "a.tiff")}
