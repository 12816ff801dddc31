"""Bridges: the tables, splits and patches of other tools, in and out, from Python and from the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from holoslide import cli
from holoslide.errors import CohortError, ConfigError, SlideError
from holoslide.slides.bridges import TOOLS, write_as
from holoslide.slides.cohort import Cohort, SlideRow
from holoslide.slides.coords import read_patches
from holoslide.slides.folds import with_split_file
from holoslide.slides.outlines import Frame, find_outline, read_outline
from holoslide.slides.prepare import PrepareConfig, PrepareJob, prepare_slide
from holoslide.slides.raster import Raster
from tests.slides.drawn import paint, write_slide


def study(folder: Path) -> Cohort:
    """Twelve slides of ten patients, 0 and 1 before their ids, with files, in three parts."""
    parts = ("train", "train", "train", "valid", "test")
    rows = []
    for number in range(12):
        patient = number % 10
        path = folder / "slides" / f"00{number}.svs"
        path.parent.mkdir(exist_ok=True)
        path.touch()
        rows.append(
            SlideRow(f"00{number}", f"p{patient}", "xy"[patient % 2], parts[patient // 2], 0.25, path)
        )
    return Cohort.from_rows(rows)


def facts(cohort: Cohort, *names: str) -> set[tuple[object, ...]]:
    return {tuple(getattr(row, name) for name in ("slide_id", *names)) for row in cohort}


def rows_of(path: Path, separator: str = ",") -> list[list[str]]:
    return list(csv.reader(path.read_text(encoding="utf-8").splitlines(), delimiter=separator))


# --- There and back ---------------------------------------------------------------------------------------------


def test_what_is_written_for_a_tool_is_read_back_the_same(tmp_path: Path) -> None:
    cohort = study(tmp_path)
    folder = tmp_path / "slides"
    for tool in TOOLS:
        write_as(tool, cohort, tmp_path / tool, slides=folder)
    everything = ("patient_id", "label", "split", "path")
    ours = Cohort.from_csv(tmp_path / "holoslide" / "slides.csv", slides=folder)
    assert facts(ours, *everything, "mpp") == facts(cohort, *everything, "mpp")
    papers = Cohort.from_csv(tmp_path / "paper" / "slides.csv", slides=folder)
    assert facts(papers, "label", "split", "path") == facts(cohort, "label", "split", "path")
    for name in ("splits_0.csv", "splits_0_bool.csv"):
        clams = Cohort.from_csv(tmp_path / "clam" / "dataset.csv", slides=folder)
        assert facts(with_split_file(clams, tmp_path / "clam" / name), *everything) == facts(
            cohort, *everything
        )
    flow = Cohort.from_csv(tmp_path / "slideflow" / "annotations.csv", slides=folder)
    assert facts(with_split_file(flow, tmp_path / "slideflow" / "splits.json"), *everything) == facts(
        cohort, *everything
    )
    tridents = Cohort.from_csv(tmp_path / "trident" / "wsi.csv", slides=folder)
    assert facts(tridents, "mpp", "path") == facts(cohort, "mpp", "path")
    bench = Cohort.from_csv(tmp_path / "trident" / "splits.tsv", slides=folder)
    assert facts(with_split_file(bench, tmp_path / "trident" / "splits.tsv"), *everything) == facts(
        cohort, *everything
    )


def test_stamp_has_no_valid_part_and_one_is_drawn_from_its_train_part(tmp_path: Path) -> None:
    cohort = study(tmp_path)
    write_as("stamp", cohort, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "splits.json").read_text()) == {
        "splits": [{"train_patients": [f"p{i}" for i in range(8)], "test_patients": ["p8", "p9"]}]
    }
    back = Cohort.from_csv(tmp_path / "out" / "slide.csv", clini=tmp_path / "out" / "clini.csv")
    assert facts(back, "patient_id", "label") == facts(cohort, "patient_id", "label")
    split = with_split_file(back, tmp_path / "out" / "splits.json")
    assert {row.slide_id for row in split.test} == {row.slide_id for row in cohort.test}
    assert len({row.patient_id for row in split.valid}) == 2
    assert {row.label for row in split.valid} == {"x", "y"}
    assert "names no valid part; 2 of the 8 patients of its train part were drawn" in str(split.notes[-1])


def test_stamps_features_are_named_as_it_names_them(tmp_path: Path) -> None:
    """By the slide's path below the folder of slides, with another suffix; what is not found, by its id."""
    paths = [tmp_path / "wsi" / "A" / "a.b.svs", tmp_path / "wsi" / "c.ome.tif", None]
    ids = ["a.b", "c", "d.e"]
    rows = [SlideRow(name, f"p{name}", "x", path=path) for name, path in zip(ids, paths, strict=True)]
    write_as("stamp", Cohort.from_rows(rows), tmp_path / "out", slides=tmp_path / "wsi")
    assert [row[1] for row in rows_of(tmp_path / "out" / "slide.csv")] == [
        "FILENAME", "A/a.b.h5", "c.ome.h5", "d.e.h5"
    ]  # fmt: skip
    assert [row.slide_id for row in Cohort.from_csv(tmp_path / "out" / "slide.csv")] == ids


# --- Splits as the tools write them ------------------------------------------------------------------------------


def test_slideflows_folds(tmp_path: Path) -> None:
    cohort = study(tmp_path)
    plans = [
        {"strategy": "fixed", "patients": {}, "id": 0,
         "tfrecords": {"training": ["000", "0010", "001", "0011"], "validation": ["002"]}},
        {"strategy": "k-fold", "patients": {}, "id": 1,
         "tfrecords": {"k-fold-1": ["/data/000.tfrecords", "0010"], "k-fold-2": ["001", "0011"],
                       "k-fold-10": ["003.tfrecords"]}},
    ]  # fmt: skip
    path = tmp_path / "splits.json"
    path.write_text(json.dumps(plans))

    def parts(fold: int) -> dict[str, str]:
        split = with_split_file(cohort, path, fold=fold)
        return {row.slide_id: row.split for row in split if row.split not in ("test", None)}

    assert parts(0) == dict.fromkeys(("000", "001", "0010", "0011"), "train") | {"002": "valid"}
    assert parts(1) == dict.fromkeys(("001", "003", "0011"), "train") | dict.fromkeys(
        ("000", "0010"), "valid"
    )
    assert parts(3) == dict.fromkeys(("000", "001", "0010", "0011"), "train") | {"003": "valid"}
    assert {row.slide_id for row in with_split_file(cohort, path).test} == {"008", "009"}  # as it was
    with pytest.raises(CohortError, match=r"splits\.json: has no fold 4; count from 0: it has 4"):
        with_split_file(cohort, path, fold=4)


def test_patho_benchs_folds(tmp_path: Path) -> None:
    rows = [["case_id", "slide_id", "grade", "fold_0", "fold_1"]]
    rows += [[f"p{i}", f"00{i}", str(i % 2), "train", ("test", "train")[i > 4]] for i in range(10)]
    rows[9][3] = rows[10][3] = "test"
    path = tmp_path / "k=all.tsv"
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    cohort = Cohort.from_csv(path, label="grade")
    assert cohort.classes == ("0", "1")
    assert {r.slide_id for r in with_split_file(cohort, path).test} == {"008", "009"}
    second = with_split_file(cohort, path, fold=1)
    assert {r.slide_id for r in second.test} == {f"00{i}" for i in range(5)}
    assert len(second.train) + len(second.valid) == 5
    with pytest.raises(CohortError, match=r"k=all\.tsv: has no fold 2; count from 0: it has 2"):
        with_split_file(cohort, path, fold=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"is neither STAMP's nor Slideflow's file of splits \(.*\); give the splits\.json"),
        ('{"splits": [{"train_patients": ["p0"]}]}', "is neither STAMP's nor Slideflow's"),
        ('{"splits": [{"train_patients": [1], "test_patients": []}]}', "1 is no id in quotation marks"),
        (
            '{"splits": [{"train_patients": ["p0"], "test_patients": ["p0"]}]}',
            "patient p0 is in train and in test; keep one of them",
        ),
        (
            '{"splits": [{"train_patients": ["q"], "test_patients": ["p0"]}]}',
            r"none of its 1 train patients \(q\) is in cohort; write ids as text",
        ),
        ('[{"strategy": "fixed", "tfrecords": {"training": ["000"], "validation": ["0010"]}}]',
         r"patient p0 is in train \(slide 000\) and in valid"),
    ],
)  # fmt: skip
def test_splits_that_contradict_themselves(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "splits.json"
    path.write_text(text)
    with pytest.raises(CohortError, match=message) as caught:
        with_split_file(study(tmp_path), path)
    assert "\n" not in str(caught.value)


# --- What another tool's tables cannot say ------------------------------------------------------------------------


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    cohort = study(tmp_path)
    with pytest.raises(ConfigError, match="--to: there is no tool qupath; choose one of holoslide, paper"):
        write_as("qupath", cohort, tmp_path)
    partly = Cohort.from_rows([SlideRow("a", "a", "x", "train"), SlideRow("b", "b", "x")])
    for tool in ("paper", "clam", "stamp", "slideflow"):
        with pytest.raises(CohortError, match="cohort, slide b: 1 slides have no split, others have"):
            write_as(tool, partly, tmp_path / tool)
    two = Cohort.from_rows([SlideRow("a", "p", "x"), SlideRow("b", "p", "y")])
    with pytest.raises(CohortError, match="patient p has slides labelled x, and y here"):
        write_as("stamp", two, tmp_path)
    for tool in ("paper", "trident"):
        with pytest.raises(CohortError, match=r"slide a has no file: no folder .*; .* give --slides"):
            write_as(tool, two, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CohortError, match="file: cannot be written"):
        write_as("clam", two, tmp_path / "file")
    with pytest.raises(CohortError, match="holds no slide with a label; add labels"):
        write_as("clam", Cohort.from_rows([SlideRow("a", "p")]), tmp_path)


def test_convert_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort = study(tmp_path)
    write_as("stamp", cohort, tmp_path / "stamp")

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["holoslide", "convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    stamp, slides = tmp_path / "stamp", tmp_path / "slides"
    given = [stamp / "slide.csv", "--clini", stamp / "clini.csv", "--splits", stamp / "splits.json"]
    assert run(*given, "--slides", slides, "-o", tmp_path / "ours") == 0
    said = capsys.readouterr()
    assert said.out == f"12 slides: {tmp_path / 'ours' / 'slides.csv'}\n"
    assert "names no valid part" in said.err
    ours = Cohort.from_csv(tmp_path / "ours" / "slides.csv")
    assert facts(ours.test, "label", "path") == facts(cohort.test, "label", "path")
    assert run(tmp_path / "ours" / "slides.csv", "--to", "clam", "-o", tmp_path / "clam") == 0
    assert rows_of(tmp_path / "clam" / "splits_0.csv")[0] == ["", "train", "val", "test"]
    assert rows_of(tmp_path / "clam" / "splits_0_bool.csv")[9][1:] == ["False", "False", "True"]
    capsys.readouterr()
    partly = tmp_path / "partly.csv"
    partly.write_text("slide_id,patient_id,label\na,p,x\nb,q,\n")
    assert run(partly, "--to", "clam", "-o", tmp_path / "two") == 1
    said = capsys.readouterr()
    assert said.out == f"1 slide: {tmp_path / 'two' / 'dataset.csv'}\n"
    assert said.err == "1 slide left out:\n  b: has no label; add it, or use the slide to predict\n"
    assert run(tmp_path / "ours" / "slides.csv", "--to", "qupath") == 1
    assert capsys.readouterr().err == (
        "holoslide: --to: there is no tool qupath; choose one of holoslide, paper, clam, stamp, slideflow, "
        "trident\n"
    )


# --- Places of patches --------------------------------------------------------------------------------------------

FRAME = Frame((40, 60), (0, 0), (16.0, 16.0), (640, 960), (0.5, 0.5))
CORNERS = np.array([(128, 64), (192, 64), (128, 128), (640, 448)])


def patches(
    path: Path, corners: np.ndarray, on_file: dict[str, object] | None = None, **said: object
) -> Path:
    with h5py.File(path, "w") as file:
        found = file.create_dataset("coords", data=corners)
        found.attrs.update(said)
        file.attrs.update(on_file or {})
    return path


def covered(side: float) -> np.ndarray:
    truth = np.zeros(FRAME.shape, bool)
    cells = round(side / 16)
    for x, y in CORNERS // 16:
        truth[y : y + cells, x : x + cells] = True
    return truth


def test_patches_of_every_tool_are_tissue(tmp_path: Path) -> None:
    trident = patches(
        tmp_path / "007_patches.h5", CORNERS, patch_size=256, patch_size_level0=64, overlap=0, name="007",
        level0_magnification=40, target_magnification=10,
    )  # fmt: skip
    clam = patches(
        tmp_path / "clam.h5", CORNERS, patch_size=16, patch_level=1, downsample=(4.0, 4.0), name="clam",
        level_dim=(240, 160), downsampled_level_dim=(240, 160), save_path="patches",
    )  # fmt: skip
    stamp = patches(
        tmp_path / "stamp.h5", CORNERS * 0.5, {"unit": "um", "tile_size_um": 32.0, "tile_size_px": 224}
    )
    first = [
        patches(tmp_path / f"stamp1-{n}.h5", CORNERS * 0.5, said)
        for n, said in enumerate([{"tile_size_um": 32.0}, {"unit": "um", "tile_size": 32.0}])
    ]
    bare = patches(tmp_path / "bare.h5", CORNERS)  # on a grid of 64
    for path in (trident, clam, stamp, *first, bare):
        assert (read_outline(path, FRAME) == covered(64)).all(), path.name
    assert find_outline(tmp_path, "007") == trident
    beyond = patches(tmp_path / "pad.h5", np.array([(896, 576)]), patch_size=512, patch_level=0)
    assert read_outline(beyond, FRAME).sum() == 16  # what is padded is not the slide's


@pytest.mark.parametrize("said", [{}, {"tile_size": 224, "unit": "px"}])
def test_patches_of_the_first_stamp_are_in_its_own_pixels(tmp_path: Path, said: dict[str, object]) -> None:
    """Which are of 256 / 224 um, whatever the slide's are; 512 of its level-0 pixels are one patch."""
    corners = np.array([(224, 0), (448, 0), (224, 224)])
    bare = read_patches(patches(tmp_path / "old.h5", corners, said))
    assert (bare.corners.tolist(), bare.side, bare.is_um) == (corners.tolist(), 224.0, False)  # any tool's
    with h5py.File(tmp_path / "old.h5", "a") as file:
        file["feats"] = np.zeros((3, 8), np.float16)
    found = read_patches(tmp_path / "old.h5")
    assert (found.corners.tolist(), found.side, found.is_um) == (
        [[256, 0], [512, 0], [256, 256]],
        256.0,
        True,
    )
    level0 = read_patches(patches(tmp_path / "new.h5", corners, patch_size=224, patch_level=0))
    assert (level0.corners.tolist(), level0.side, level0.is_um) == (corners.tolist(), 224.0, False)


@pytest.mark.parametrize(
    ("corners", "message"),
    [
        (np.array([(0, 0), (64, 65)]), "does not say how large its patches are; add the attribute"),
        (np.array([(64, 64)]), "does not say how large its patches are"),
        (np.zeros((0, 2)), "holds no patch"),
        (np.zeros((3, 4)), r"holds coords of shape \(3, 4\), not \(n, 2\)"),
        (np.array([(0, 0), (64, 0), (6400, 64)]), "reaches x 0 to 6464"),
    ],
)
def test_patches_that_are_none(tmp_path: Path, corners: np.ndarray, message: str) -> None:
    with pytest.raises(SlideError, match=rf"some\.h5: {message}"):
        read_outline(patches(tmp_path / "some.h5", corners), FRAME)


def test_files_without_patches(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("no H5")
    with pytest.raises(SlideError, match=r"text\.h5: is no H5 file with coords"):
        read_outline(tmp_path / "text.h5", FRAME)
    with h5py.File(tmp_path / "features.h5", "w") as file:
        file["features"] = np.zeros((3, 8))
    with pytest.raises(SlideError, match=r"features\.h5: is no H5 file with coords"):
        read_outline(tmp_path / "features.h5", FRAME)


def test_a_raster_from_tridents_patches(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "one.tif", paint(np.ones((640, 960), bool)), 1.0)
    mask = patches(tmp_path / "one_patches.h5", CORNERS, patch_size_level0=64)
    (tmp_path / "out").mkdir()
    job = PrepareJob("one", slide, mask=mask)
    result = prepare_slide(job, tmp_path / "out", PrepareConfig(mpp=2.0, mask_cell_um=16))
    assert result.path is not None
    with Raster.open(result.path) as raster:
        assert raster.origin_l0 == (64, 128)
        assert raster.mask.sum() == 4 * 16


@pytest.mark.data
def test_the_patches_of_a_real_file(data_dir: Path) -> None:
    """Of TCGA-AD-6964: no attributes; 777 patches on a grid of 512 level-0 pixels."""
    path = data_dir / "interop" / "mopadi_TCGA-AD-6964_features_coords.h5"
    found = read_patches(path)
    assert (len(found.corners), found.side, found.is_um) == (777, 512.0, False)
    width, height = (found.corners.max(axis=0) + 2048).astype(int).tolist()
    frame = Frame((height // 64, width // 64), (0, 0), (64.0, 64.0), (height, width))
    assert read_outline(path, frame).sum() == 777 * 64
    with pytest.raises(SlideError, match="is no H5 file with coords"):
        read_patches(data_dir / "interop" / "mopadi_TCGA-3X-AAVA_features.h5")
