"""Audit: each planted fault is found, once, and nothing is said of sound slides."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from holoslide.slides.audit import audit, audit_slides
from holoslide.slides.cohort import Cohort, SlideRow
from holoslide.slides.facts import Mpp

HEADER = "slide_id,patient_id,label,split\n"


def table(folder: Path, text: str, **options) -> Cohort:
    path = folder / "slides.csv"
    path.write_text(text)
    return Cohort.from_csv(path, require_splits=False, **options)


def files(folder: Path, *names: str) -> Path:
    (folder / "wsi").mkdir(exist_ok=True)
    for name in names:
        (folder / "wsi" / name).write_text(name)
    return folder / "wsi"


def sound(count: int = 6) -> list[str]:
    """Rows of s0, s1, ...: two classes, two slides in every part."""
    return [f"s{i},p{i},{'xy'[i % 2]},{('train', 'valid', 'test')[i // 2 % 3]}" for i in range(count)]


def kinds(cohort: Cohort) -> list[tuple[str, str, str]]:
    return [(finding.severity, finding.kind, finding.where) for finding in audit(cohort)]


def test_a_sound_cohort_has_no_findings(tmp_path):
    slides = files(tmp_path, *(f"s{i}.svs" for i in range(6)))
    assert audit(table(tmp_path, HEADER + "\n".join(sound()), slides=slides)) == []


def test_each_planted_fault_is_found_and_errors_come_first(tmp_path):
    slides = files(tmp_path, *(f"s{i}.svs" for i in range(12)), "s7.tif")
    (slides / "s12.svs").symlink_to(slides / "s11.svs")
    rows = [
        *sound(),
        "s6,p6,x,test",
        "s7,p7,y,train",  # two files
        "s8,p8,,train",  # no label
        "s9,p9,x,",  # no split
        "s10,p0,y,valid",  # p0 is in train, with label x
        "s11,p11,x,train",
        "s12,p12,y,test",  # the file of s11
        "s13,p13,y,train",  # no file
        "s14,p14,X,valid",  # a class like x
    ]
    (slides / "s14.svs").write_text("s14")
    cohort = table(tmp_path, HEADER + "\n".join(rows), slides=slides)
    assert kinds(cohort) == [
        ("error", "ambiguous file", "s7"),
        ("error", "missing file", "s13"),
        ("error", "same file twice", "s11"),
        ("error", "patient in two splits", "p0"),
        ("error", "small class", "X"),
        ("warning", "no label", "s8"),
        ("warning", "similar classes", "X"),
        ("warning", "conflicting labels", "p0"),
        ("warning", "no split", "s9"),
        ("warning", "small class", "X"),
    ]
    lines = [str(finding) for finding in audit(cohort)]
    assert lines[2].startswith(f"s11: slides s11, s12 are one file, {slides / 's11.svs'}; keep one of them")
    assert lines[3] == (
        "p0: is a patient in train and valid (slides s0, s10); put all slides of a patient into one split"
    )
    assert lines[6] == "X: classes X, x are all but one text; write them the same, if they are one"
    assert (
        lines[7] == "p0: is a patient with slides of x and y; mend the labels, unless each is its slide's own"
    )
    assert [finding.row for finding in audit(cohort)][:4] == [9, 15, 14, 12]
    assert (
        json.loads(json.dumps([finding.to_dict() for finding in audit(cohort)]))[0]["kind"]
        == "ambiguous file"
    )


def test_classes_too_small_for_a_split_that_is_still_to_be_drawn(tmp_path):
    slides = files(tmp_path, "a.svs", "b.svs", "c.svs", "d.svs", "e.svs")
    text = "slide_id,patient_id,label\na,1,x\nb,2,x\nc,3,x\nd,4,y\ne,5,y\nf,6,y\n"
    found = audit(table(tmp_path, text, slides=slides))  # f has no file, so y has two patients
    assert [finding.kind for finding in found] == ["missing file", "small class"]
    assert str(found[1]) == (
        "y: is a class of 2 patients, too few for train, valid and test; add patients, or leave the class out"
    )


def test_one_line_where_all_slides_lack_the_same(tmp_path):
    cohort = table(tmp_path, "wsi\na.svs\nb.svs\n")
    assert [(severity, kind) for severity, kind, _ in kinds(cohort)] == [
        ("error", "missing file"),
        ("warning", "no patient"),
        ("warning", "no label"),
    ]
    one = table(tmp_path, "slide_id,patient_id,label\na,1,x\nb,2,x\n")
    assert ("error", "few classes", str(tmp_path / "slides.csv")) in kinds(one)


@pytest.mark.parametrize(
    ("names", "alike"),
    [("LUAD luad", True), ("1 1.0", True), ("stage_I stageI", True), ("HER2+ HER2-", False), ("1 -1", False)],
)
def test_classes_that_are_all_but_one_text(names, alike):
    rows = [SlideRow(f"{name}{i}", f"{name}{i}", name) for name in names.split() for i in range(3)]
    assert any(finding.kind == "similar classes" for finding in audit(Cohort.from_rows(rows))) == alike


def picture(path: Path, *, mpp: float | None = 2.0, seed: int = 0) -> Path:
    """A slide of nothing but grainy tissue, 0.24 mm2."""
    grain = np.random.default_rng(seed).normal(0, 30, (300, 200, 3))
    pixels = np.clip(np.array([180, 100, 150]) + grain, 0, 255).astype(np.uint8)
    if path.suffix == ".png":
        Image.fromarray(pixels).save(path)
    else:
        resolution = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": 3}
        tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb", **resolution)
    return path


def test_slides_are_opened_and_each_fault_is_named(tmp_path):
    slides = tmp_path / "wsi"
    slides.mkdir()
    picture(slides / "good.tif")
    picture(slides / "nompp.tif", mpp=None, seed=1)
    picture(slides / "given.png", seed=2)
    cut = picture(slides / "cut.tif", seed=3)
    cut.write_bytes(cut.read_bytes()[:-40_000])
    (slides / "text.svs").write_text("no slide")
    (slides / "empty.svs").touch()
    text = "slide_id,mpp\ngood,\nnompp,\ngiven,2\ncut,\ntext,\nempty,\nabsent,\n"
    seen = []
    cohort = table(tmp_path, text, slides=slides)
    found, surveys = audit_slides(
        cohort, progress=lambda done, total, slide_id: seen.append((done, total, slide_id))
    )
    assert [(f.kind, f.where, f.row) for f in found] == [
        ("no mpp", "nompp", 3),
        ("unreadable", "cut", 5),
        ("unreadable", "text", 6),
        ("unreadable", "empty", 7),
    ]
    assert all(finding.severity == "error" for finding in found)
    assert str(found[0]) == (
        "nompp: nompp.tif does not tell its microns per pixel;"
        " give it in the table's mpp column, or with --slide-mpp"
    )
    assert "text.svs is not a slide in any known format" in str(found[2])
    assert seen == [(n + 1, 6, row.slide_id) for n, row in enumerate(cohort) if row.path is not None]
    assert [each.slide_id for each in surveys] == [row.slide_id for row in cohort if row.path is not None]
    assert surveys[0].mpp == Mpp(2.0, 2.0, "resolution tags")
    assert surveys[1].areas is None
    assert surveys[1].picture is not None  # it can be shown, though nobody knows how large it is


def test_a_table_that_contradicts_its_files_resolution_is_said(tmp_path):
    slides = tmp_path / "wsi"
    slides.mkdir()
    picture(slides / "a.tif")
    picture(slides / "b.tif", seed=1)
    picture(slides / "c.tif", mpp=None, seed=2)
    found, _ = audit_slides(table(tmp_path, "slide_id,mpp\na,1\nb,2.02\nc,1\n", slides=slides))
    assert [(f.severity, f.kind, f.where, f.row) for f in found if f.kind != "little tissue"] == [
        ("warning", "mpp out of line", "a", 2)
    ]
    assert found[0].what == ("the table gives 1 um per pixel, which is used, a.tif 2 (from: resolution tags)")


def test_a_slide_that_vanishes_after_it_was_opened_takes_no_other_finding_with_it(tmp_path):
    slides = tmp_path / "wsi"
    slides.mkdir()
    picture(slides / "one.tif")
    picture(slides / "two.tif")
    cohort = table(tmp_path, "slide_id\none\ntwo\n", slides=slides)
    found, _ = audit_slides(cohort, progress=lambda *_: (slides / "one.tif").unlink(missing_ok=True))
    assert "same pixels twice" in {finding.kind for finding in found}


def test_a_name_of_several_lines_is_one_in_a_finding(tmp_path):
    picture(tmp_path / "two\nlines.tif", mpp=None)
    cohort = Cohort.from_files([tmp_path / "two\nlines.tif", tmp_path / "gone\n.tif"])
    found = [*audit(cohort), *audit_slides(cohort)[0]]
    assert {finding.kind for finding in found} >= {"no mpp", "missing file"}
    assert not any("\n" in str(finding) for finding in found)


@pytest.mark.data
def test_real_slides(data_dir):
    wsi = data_dir / "wsi"
    names = [
        "CMU-1-Small-Region.svs",
        "TCGA-CR-7395-01A-01-TS1.svs",
        "multiframe_camelyon_challenge_image.dcm",
    ]
    names += ["broken.svs", "multi-channel-z-series.ome.tif", "openslide-python-fixtures/unreadable.svs"]
    rows = [SlideRow(Path(name).name, "p", path=wsi / name) for name in names]
    assert [(f.kind, f.where) for f in audit_slides(Cohort.from_rows(rows))[0]] == [
        ("no mpp", "TCGA-CR-7395-01A-01-TS1.svs"),
        ("unreadable", "broken.svs"),
        ("unreadable", "multi-channel-z-series.ome.tif"),
        ("unreadable", "unreadable.svs"),
    ]
