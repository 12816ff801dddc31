"""Every example runs as a user would run it, and says what is so."""

import csv
import hashlib
import itertools
import re
import runpy
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy import ndimage

from holoslide import Cohort, LocalClassifier, heatmap, predict
from holoslide.geometry import Box
from holoslide.inference.heatmap import Heatmap
from holoslide.slides.reader import open_slide
from tests.conftest import SETTINGS

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
Example = Callable[..., str]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Example:
    """Runs an example in this process, which has its imports already; gives what it printed."""

    monkeypatch.setattr("os.cpu_count", lambda: 1)  # slides are prepared here, too, and not in processes

    def run(name: str | Path, *arguments: object) -> str:
        monkeypatch.setattr("sys.argv", [*map(str, (name, *arguments))])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SETTINGS))
    return path


@pytest.fixture
def slides(finished_run: Path) -> list[dict[str, str]]:
    """The rows of the drawn slides' table, with their paths."""
    with (finished_run / "cohort.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_train_on_a_folder(
    example: Example, config: Path, slides: list[dict[str, str]], tmp_path: Path
) -> None:
    for row in slides:
        target = tmp_path / "slides" / row["label"] / Path(row["path"]).name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(row["path"], target)
        (target.parent / ".DS_Store").touch()
    out = tmp_path / "run"
    printed = example("train_on_a_folder.py", tmp_path / "slides", "--out", out, "--config", config)
    assert printed.startswith("AUROC ")
    assert (out / "report.html").is_file()
    with (out / "cohort.csv").open(newline="") as file:
        labels = {row["slide_id"]: row["label"] for row in csv.DictReader(file)}
    assert labels == {row["slide_id"]: row["label"] for row in slides}


def test_change_the_backbone(example: Example, config: Path, finished_run: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load(config.read_text())
    settings["model"]["backbone"] = {"truncate": "features.denseblock1"}
    config.write_text(yaml.safe_dump(settings))
    options = ("--backbone", "densenet121", "--weights", "none", "--modules", 2, "--config", config)
    printed = example(
        "change_the_backbone.py", finished_run / "cohort.csv", "--out", tmp_path / "run", *options
    )
    assert printed.startswith("densenet121 in 2 modules, best after epoch 1")


def test_stream_your_own_module(example: Example) -> None:
    size, values, *gradients = example("stream_your_own_module.py", "--side", 301).splitlines()
    assert size == "output (8, 151, 121)"
    assert float(values.split()[-1]) < 1e-5
    assert [line.split()[0] for line in gradients] == ["weights'", "pixels'"]
    assert all(float(line.split()[4]) < 1e-5 for line in gradients)


def test_score_one_slide(example: Example, finished_run: Path, tmp_path: Path) -> None:
    slide = finished_run.parent / "slides" / "focus-003.tiff"
    printed = example("score_one_slide.py", finished_run, slide, "--heatmap", tmp_path / "h.npz")
    with (finished_run / "predictions.csv").open(newline="") as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert printed.split()[:2] == ["benign", f"{float(rows['focus-003']['p_benign']):.3f}"]
    assert Heatmap.load(tmp_path / "h.npz").classes == ("benign", "lesion")


def test_bring_clam_splits(
    example: Example, config: Path, slides: list[dict[str, str]], finished_run: Path, tmp_path: Path
) -> None:
    table, splits, out = tmp_path / "dataset.csv", tmp_path / "splits", tmp_path / "out"
    lines = [f"{row['patient_id']},{row['slide_id']},{row['label']}" for row in slides]
    table.write_text("\n".join(["case_id,slide_id,label", *lines]))
    splits.mkdir()
    benign, lesion = ([r["slide_id"] for r in slides if r["label"] == name] for name in ("benign", "lesion"))
    text = "train,val,test\n" + "".join(f"{a},{b},{c}\n" for a, _, b, c in (benign, lesion))
    text += "".join(f"{second},,\n" for _, second, _, _ in (benign, lesion))
    (splits / "splits_0.csv").write_text(
        "".join(f"{n or ''},{line}\n" for n, line in enumerate(text.splitlines()))
    )
    folder = finished_run.parent / "slides"
    options = ("--slides", folder, "--out", out, "--config", config)
    assert example("bring_clam_splits.py", table, splits, *options).startswith("fold 0: AUROC ")
    with (out / "fold_0.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["slide_id"]: row["Y"] for row in rows} == {benign[3]: "0", lesion[3]: "1"}
    assert list(rows[0]) == ["slide_id", "Y", "Y_hat", "p_0", "p_1"]


NORMAL, TUMOUR, NOT_LISTED = (230, 180, 200), (120, 40, 130), (0, 0, 0)


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    """A set of patches as the public one lies there, of one colour a class, and the example with a list of them.

    What the list leaves out is black.
    """
    shutil.copy(EXAMPLES / "tissue_slides.py", tmp_path)
    lines = ["patient,label,places"]
    for patient in range(10):
        for label, colour in enumerate((NORMAL, TUMOUR)):
            folder = tmp_path / "idc" / str(patient) / str(label)
            folder.mkdir(parents=True)
            for place, drawn in {"x1_y1": colour, "x51_y1": colour, "x1_y51": NOT_LISTED}.items():
                path = folder / f"{patient}_idx5_{place}_class{label}.png"
                Image.new("RGB", (50, 50), drawn).save(path)
            lines.append(f"{patient},{label},x1_y1 x51_y1")
    (tmp_path / "tissue_patches.csv").write_text("\n".join(lines))
    return tmp_path / "idc"


def test_tissue_slides_hold_their_burden_in_one_place(
    example: Example, patches: Path, tmp_path: Path
) -> None:
    script, given = tmp_path / "tissue_slides.py", (patches, "--burden", 0.25)
    printed = example(script, *given, "--out", tmp_path / "out")
    assert printed.startswith("20 slides of 10 patients in ")
    cohort = Cohort.from_csv(tmp_path / "out" / "slides.csv")
    assert Counter(row.label for row in cohort) == {"normal": 10, "tumour": 10}
    assert Counter(row.split for row in cohort) == {"train": 12, "valid": 4, "test": 4}
    for row in cohort:
        truth = np.asarray(Image.open(tmp_path / "out" / "truth" / f"{row.slide_id}.png")) > 0
        assert (ndimage.label(truth)[1], truth.any()) == ((1, True) if row.label == "tumour" else (0, False))
        with open_slide(row.path) as slide:
            assert (slide.mpp.y, slide.mpp.x) == pytest.approx((4, 4))
            pixels = slide.read(Box(0, 0, 1000, 1000), mpp=4)
        centres = pixels[25::50, 25::50].astype(int)
        tissue = np.abs(centres - (243, 243, 243)).max(axis=2) > 20
        for where, colour in ((truth, TUMOUR), (tissue & ~truth, NORMAL)):
            assert np.abs(centres[where] - colour).max(initial=0) <= 4
        assert ndimage.label(tissue)[1] == 1
        assert truth.sum() == (round(0.25 * tissue.sum()) if row.label == "tumour" else 0)
    example(script, *given, "--out", tmp_path / "again")
    example(script, *given, "--out", tmp_path / "other", "--seed", 1, "--each", 2)
    first, again, other = (
        [path.read_bytes() for path in sorted((tmp_path / name / "slides").iterdir())]
        for name in ("out", "again", "other")
    )
    assert first == again
    assert not set(first) & set(other)
    assert len(set(other)) == 40
    several = Cohort.from_csv(tmp_path / "other" / "slides.csv")
    assert set(Counter((row.patient_id, row.label) for row in several).values()) == {2}
    assert len({(row.patient_id, row.split) for row in several}) == 10


def test_tissue_slides_of_a_part_of_the_set_are_refused(
    example: Example, patches: Path, tmp_path: Path
) -> None:
    (patches / "7" / "1" / "7_idx5_x51_y1_class1.png").unlink()
    with pytest.raises(SystemExit, match="idc: holds no 7_idx5_x51_y1_class1"):
        example(tmp_path / "tissue_slides.py", patches, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.data
def test_tissue_slides_are_those_of_the_results(data_dir: Path) -> None:
    """The figures are of slides that another program laid out: the first patients' are held to it, bit for bit."""
    script = runpy.run_path(str(EXAMPLES / "tissue_slides.py"))
    patients = script["read_patches"](data_dir / "idc_patches" / "idc_patches_50px.zip")
    assert len(patients) == 165
    rng, digest = np.random.default_rng(0), hashlib.sha256()
    rng.permutation(len(patients))
    for pools in itertools.islice(patients.values(), 3):
        for burden in (0.0, 0.12):
            slide, focus = script["compose"](*pools, grid=20, burden=burden, rng=rng)
            for plane in (*script["pyramid"](slide), focus):
                digest.update(plane.tobytes())
    assert digest.hexdigest() == "a3dd4c5b48623cf469fd93d80612b198848f3fcc46dcbcd44ee7bf23ba81dade"


def test_every_example_has_its_test() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    names = [path.name for path in EXAMPLES.glob("*.py")]
    assert names
    assert [name for name in names if f'"{name}"' not in tests] == []


@pytest.mark.parametrize("page", ["README.md", "docs/_api.md"])
def test_a_pages_python_runs_as_it_stands(
    page: str,
    config: Path,
    slides: list[dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a folder with what the pages before it have the reader make: a table, slides, and settings."""
    code = re.search(r"```python\n(.*?)```", (EXAMPLES.parent / page).read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    (tmp_path / "slides").mkdir()
    for row in slides:
        shutil.copy(row["path"], tmp_path / "slides")
    shutil.copy(slides[0]["path"], tmp_path / "slides" / "0012.svs")
    columns = ("slide_id", "patient_id", "label", "split")
    lines = [columns, *([row[name] for name in columns] for row in slides)]
    (tmp_path / "slides.csv").write_text("\n".join(map(",".join, lines)))
    assert config == tmp_path / "run.yaml"
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    monkeypatch.chdir(tmp_path)
    exec(compile(code[1], page, "exec"), {})
    printed = capsys.readouterr().out
    assert printed.startswith("Metrics(classes=('benign', 'lesion')")
    assert ("'benign': 0." in printed) is ("score(" in code[1])


def test_from_python_a_path_may_be_a_text(finished_run: Path, tmp_path: Path) -> None:
    slide, out = finished_run.parent / "slides" / "focus-003.tiff", tmp_path / "scores.csv"
    assert predict(str(finished_run), [str(slide)], str(out), rasters=str(tmp_path / "rasters")) == 1
    assert out.read_text().splitlines()[1].startswith("focus-003,")
    LocalClassifier.load(str(finished_run / "best")).save(str(tmp_path / "model"))
    heatmap(str(finished_run), str(slide)).save(str(tmp_path / "heatmap.npz"))
    assert Heatmap.load(str(tmp_path / "heatmap.npz")).classes == ("benign", "lesion")
