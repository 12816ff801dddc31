"""Cohorts: slide files are found, or stay as rows with their reason; a folder for each class is a cohort."""

import os
import re
import shutil
from pathlib import Path

import pytest

from holoslide.errors import CohortError
from holoslide.slides.cohort import Cohort
from tests.slides.tables import columns, read, touch


def test_a_slide_is_found_by_its_id_anywhere_below_the_folder(tmp_path):
    slides = touch(
        tmp_path, "x/a.SVS", "b.ome.tif", "b.xml", "c.svs", "c.png", "only.jpg", "d.mrxs", "d/Data0.dat",
        "e/1.dcm", "e/2.dcm", "._a.svs",
    )  # fmt: skip
    cohort = read(tmp_path, "slide_id\na\nb\nc\nd\ne\nonly\n", slides=slides, require_files=True)
    found = [row.path.relative_to(slides).as_posix() for row in cohort]
    assert found == ["x/a.SVS", "b.ome.tif", "c.svs", "d.mrxs", "e/1.dcm", "only.jpg"]


def test_a_slide_that_is_a_folder_is_found_by_its_id_and_by_its_path(tmp_path):
    slides = touch(
        tmp_path, "a.ome.zarr/zarr.json", "a.ome.zarr/0/c/0/b.tif", "sub/b.zarr/.zgroup", "c/IM1", "d/x"
    )
    head = bytes(128) + b"DICM" + b"\x20\x00\x0e\x00UI\x08\x001.2.345."
    (slides / "c" / "IM1").write_bytes(head)
    (slides / "c" / "IM2").write_bytes(head)
    (slides / "c" / "DICOMDIR").touch()
    expected = ["a.ome.zarr", "sub/b.zarr", "c/IM1"]
    for text in ("slide_id\na\nb\nc\n", "slide_id,path\na,wsi/a.ome.zarr\nb,wsi/sub/b.zarr\nc,wsi/c\n"):
        cohort = read(tmp_path, text, slides=slides, require_files=True)
        assert [row.path.relative_to(slides).as_posix() for row in cohort] == expected
        assert not [note for note in cohort.notes if note.kind == "file without a row"]
    cohort = read(tmp_path, "slide_id\na\nd\n", slides=slides)
    assert "no file d.* under" in cohort.rows[1].fault.what
    assert "1 slide file under" in "".join(note.what for note in cohort.notes)
    (slides / "c" / "IM2").write_bytes(head.replace(b"345", b"346"))
    cohort = read(tmp_path, "slide_id\nc\n", slides=slides)
    assert cohort.rows[0].path == slides / "c", "of two series: opening it says so"


def test_missing_and_ambiguous_files_stay_as_rows_with_their_reason(tmp_path):
    slides = touch(tmp_path, "a.svs", "sub/a.tif", "c.long-name.svs", "d.svs")
    text = "slide_id,label,path\na,0,\nb,0,\nc,1,\nd,1,\ne,1,wsi/e.svs\nf.svs,1,\n"
    cohort = read(tmp_path, text, slides=slides)
    assert len(cohort) == 6
    kept, findings = cohort.usable()
    assert columns(kept, "slide_id") == [("d",)]
    assert kept.classes == ("0", "1")
    assert [(f.kind, f.severity, f.where, f.row) for f in findings] == [
        ("ambiguous file", "error", "a", 2),
        ("missing file", "error", "b", 3),
        ("missing file", "error", "c", 4),
        ("missing file", "error", "e", 6),
        ("missing file", "error", "f", 7),
    ]
    assert findings[0].what == "2 files could be it (a.svs, sub/a.tif)"
    assert findings[1].what == f"no file b.* under {slides}"
    assert findings[2].remedy == "did you mean c.long-name.svs?"
    assert findings[3].what == "there is no file wsi/e.svs"
    assert findings[4].what == f"no file f.svs under {slides}"
    with pytest.raises(
        CohortError, match=r"row 2: slide a has no file: 2 files could .* \(5 slides have none\)"
    ):
        read(tmp_path, text, slides=slides, require_files=True)


def test_a_prepared_slide_is_never_taken_for_the_slide_that_is_missing(tmp_path):
    slides = touch(tmp_path, "a.svs")
    (slides / "rasters").mkdir()
    for name in ("a", "b", "c"):
        shutil.copy(Path(__file__).parent / "golden" / "raster-v2.tif", slides / "rasters" / f"{name}.tif")
    cohort = read(tmp_path, "slide_id,path\na,\nb,\nd,rasters/c.tif\n", slides=slides)
    assert [row.path for row in cohort] == [slides / "a.svs", None, None]
    assert [row.fault and row.fault.what for row in cohort][1:] == [
        f"no file b.* under {slides}, only a prepared slide, rasters/b.tif",
        "rasters/c.tif is a prepared slide, not the slide itself",
    ]
    assert [note for note in cohort.notes if note.kind == "file without a row"] == []
    assert Cohort.from_files([slides / "rasters" / "a.tif"]).rows[0].path is None


def test_a_file_is_not_taken_from_another_folder_than_the_one_that_is_named_with_it(tmp_path):
    slides = touch(tmp_path, "A/x.svs", "B/1.svs", "A/old/2.svs", "B/2.svs")
    cohort = read(tmp_path, "slide_id\nA/1.svs\nA/2.svs\n/mnt/wsi/x.svs\n", slides=slides)
    assert [row.path for row in cohort] == [None, slides / "A/old/2.svs", slides / "A/x.svs"]
    assert cohort.rows[0].fault.what == f"no file A/1.svs under {slides}"


def test_the_files_of_one_dicom_slide_are_not_so_many_slides(tmp_path):
    """As dcm/*.dcm names them: levels, label and overview."""
    head = bytes(128) + b"DICM" + b"\x20\x00\x0e\x00UI\x08\x001.2.345"
    for name, series in (("1", b"."), ("2", b"."), ("3", b"6")):
        (tmp_path / f"{name}.dcm").write_bytes(head + series)
    cohort = Cohort.from_files([tmp_path / f"{name}.dcm" for name in "123"])
    assert [row.path and row.path.name for row in cohort] == ["1.dcm", None, "3.dcm"]
    assert "2.dcm is of the same DICOM slide as" in cohort.rows[1].fault.what


def test_usable_asks_only_for_what_is_needed(tmp_path):
    slides = touch(tmp_path, "a.svs", "b.svs")
    cohort = read(tmp_path, "slide_id,label\na,\nb,0\nc,1\n", slides=slides)

    def left(**needs: bool) -> list[str]:
        kept, findings = cohort.usable(**needs)
        assert len(kept) + len(findings) == len(cohort)
        return [row.slide_id for row in kept]

    assert left() == ["b"]
    assert left(labels=False) == ["a", "b"]
    assert left(files=False) == ["b", "c"]
    nowhere = read(tmp_path, "slide_id,label\na,0\n")
    assert str(nowhere.usable()[1][0]).startswith(
        "a: no folder of slides was given; give one, or a path column"
    )


def test_paths_are_of_the_table_then_of_the_slides_folder(tmp_path):
    slides = touch(tmp_path, "a.svs", "sub/b.svs", "parts/1.dcm")
    (folder,) = Cohort.from_files([slides / "sub"]).usable(labels=False)[1]
    assert str(folder) == f"sub: {slides / 'sub'} is a folder, and no slide; name the files in it"
    text = f"slide_id,path\na,{slides}/a.svs\nb,sub\\b.svs\nc,wsi/parts\n"
    cohort = read(tmp_path, text, slides=slides)
    assert [row.path for row in cohort] == [slides / "a.svs", slides / "sub/b.svs", slides / "parts/1.dcm"]


def test_links_and_names_of_any_kind(tmp_path):
    slides = touch(tmp_path, "-a b.svs", "é.svs", "real.svs")
    (slides / "link.svs").symlink_to(slides / "real.svs")
    (slides / "round").symlink_to(slides, target_is_directory=True)
    (slides / "broken.svs").symlink_to(slides / "gone")
    touch(tmp_path / "archive", "far.svs")
    (slides / "elsewhere").symlink_to(tmp_path / "archive", target_is_directory=True)
    cohort = read(tmp_path, "slide_id\n-a b\ne\u0301\nlink\nfar\nbroken\n", slides=slides)
    assert [row.path and row.path.name for row in cohort][:4] == ["-a b.svs", "é.svs", "link.svs", "far.svs"]
    (finding,) = cohort.usable(labels=False)[1]
    assert finding.what == f"{slides / 'broken.svs'} is there, but cannot be read, or is a link to nothing"


def test_a_folder_that_cannot_be_read_is_said_so(tmp_path, monkeypatch):
    slides, scandir = touch(tmp_path, "locked/a.svs"), os.scandir

    def locked(place):
        if str(place).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", locked)  # root, as whom tests may run, reads every folder
    with pytest.raises(CohortError, match="locked: cannot be read"):
        read(tmp_path, "slide_id\na\n", slides=slides)


def test_files_by_themselves_are_a_cohort_without_labels(tmp_path, monkeypatch):
    slides = touch(tmp_path, "a.ome.tif", "sub/b.svs", "sub/a.svs")
    monkeypatch.chdir(slides)
    cohort = Cohort.from_files(["a.ome.tif", slides / "sub/b.svs", "gone.svs"], mpp=0.5)
    assert columns(cohort, "slide_id", "patient_id", "label", "fallback_mpp", "path") == [
        ("a", "a", None, 0.5, slides / "a.ome.tif"),
        ("b", "b", None, 0.5, slides / "sub/b.svs"),
        ("gone", "gone", None, 0.5, None),
    ]
    (finding,) = cohort.usable(labels=False)[1]
    assert (finding.slide_id, finding.what) == ("gone", "there is no file gone.svs")
    with pytest.raises(CohortError, match=r"slide a is there already, as .*a\.ome\.tif; keep one of them"):
        Cohort.from_files(["a.ome.tif", "sub/a.svs"])


def test_a_folder_for_each_class_is_a_cohort(tmp_path):
    litter = (
        "ill/.DS_Store",
        "ill/Thumbs.db",
        "ill/a/Slidedat.ini",
        "ill/a/Data0000.dat",
        "ill/._b.svs",
        "notes.txt",
    )
    slides = touch(tmp_path, "ill/a.mrxs", "ill/more/b.svs", "ill/b-thumb.png", "well/c.ome.tif", *litter)
    series = slides / "well" / "d"
    series.mkdir()
    for name in ("1.dcm", "2.dcm"):
        (series / name).write_bytes(bytes(128) + b"DICM" + b"\x20\x00\x0e\x00UI\x06\x001.2.34")
    cohort = Cohort.from_folder(slides)
    assert columns(cohort, "slide_id", "patient_id", "label", "path") == [
        ("a", "a", "ill", slides / "ill/a.mrxs"),
        ("b", "b", "ill", slides / "ill/more/b.svs"),
        ("c", "c", "well", slides / "well/c.ome.tif"),
        ("d", "d", "well", series / "1.dcm"),
    ]
    passed_over, patients = cohort.notes
    assert "b-thumb.png" in passed_over.what
    assert patients.what == "each file is taken for a patient of its own"


def test_slides_of_a_kind_that_is_not_read_are_named(tmp_path):
    cohort = Cohort.from_folder(touch(tmp_path, "ill/a.svs", "ill/b.isyntax", "well/c.tf2", "well/D.JP2"))
    assert columns(cohort, "slide_id", "label") == [("a", "ill"), ("c", "well")]
    note = cohort.notes[0]
    assert re.search(r"ill/b.isyntax, .*well/D.JP2: of a kind that is not read", note.what)
    assert "pyramidal TIFF" in note.remedy
    found = read(tmp_path, "slide_id\na\nb\n", slides=tmp_path / "wsi").rows[1].fault
    assert "b.isyntax is of a kind that is not read" in str(found)


def test_pictures_are_slides_where_there_is_nothing_else(tmp_path):
    cohort = Cohort.from_folder(touch(tmp_path, "ill/a.png", "well/b.jpg"))
    assert columns(cohort, "slide_id", "label") == [("a", "ill"), ("b", "well")]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("a.svs",), "a.svs: is in no folder of a class; put it into one, or elsewhere"),
        (("ill/notes.txt",), "wsi: holds no slide; sort the slides into a folder for each class"),
        (
            ("ill/a.svs", "well/a.svs"),
            "slide a is there already, as .*ill/a.svs, there with label ill",
        ),
    ],
)
def test_a_folder_that_says_no_class_is_refused(tmp_path, names, said):
    with pytest.raises(CohortError, match=said):
        Cohort.from_folder(touch(tmp_path, *names))


def test_microns_per_pixel_for_slides_whose_table_has_none(tmp_path):
    cohort = read(tmp_path, "slide_id,mpp\na,0.2525\nb,\n")
    assert columns(cohort.with_mpp(0.5), "mpp", "fallback_mpp") == [(0.2525, 0.5), (None, 0.5)]
    with pytest.raises(CohortError, match="nan um per pixel cannot be; give a positive number"):
        cohort.with_mpp(float("nan"))
