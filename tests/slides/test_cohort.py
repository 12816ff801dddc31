"""Cohorts: every tool's table read as what it says, and one clear line for what contradicts itself."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holoslide.errors import CohortError
from holoslide.slides.cohort import SPLITS, Cohort, SlideRow, SplitConfig


def write(folder: Path, text: str | bytes, name: str = "slides.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(folder: Path, text: str | bytes, **options) -> Cohort:
    return Cohort.from_csv(write(folder, text), **options)


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / "wsi" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder / "wsi"


def columns(cohort: Cohort, *names: str) -> list[tuple]:
    return [tuple(getattr(row, name) for name in names) for row in cohort]


# --- Dialects


def test_our_own_table(tmp_path):
    slides = touch(tmp_path, "007.svs", "deep/008.tiff")
    text = (
        "slide_id,patient_id,label,split,mpp,path\n007,01,1,train,0.2525,\n008,02,0,test,,wsi/deep/008.tiff\n"
    )
    cohort = read(tmp_path, text, slides=slides, require_files=True)
    assert columns(cohort, "slide_id", "patient_id", "label", "split", "mpp", "row") == [
        ("007", "01", "1", "train", 0.2525, 2),
        ("008", "02", "0", "test", None, 3),
    ]
    assert [row.path for row in cohort] == [slides / "007.svs", slides / "deep/008.tiff"]
    assert cohort.classes == ("0", "1")
    assert not cohort.notes


def test_the_papers_table_has_file_names_and_types(tmp_path):
    slides = touch(tmp_path, "a.b-1.svs", "c.SVS")
    cohort = read(
        tmp_path,
        "slide_id,label,type\na.b-1.svs,LUAD,train\nc.SVS,LUSC,valid\nd.svs,LUSC,test\n",
        slides=slides,
    )
    assert columns(cohort, "slide_id", "patient_id", "split") == [
        ("a.b-1", "a.b-1", "train"),
        ("c", "c", "valid"),
        ("d", "d", "test"),
    ]
    assert [row.path and row.path.name for row in cohort] == ["a.b-1.svs", "c.SVS", None]
    (note,) = cohort.notes
    assert note.kind == "no patient"
    assert "3 slides have no patient (a.b-1, c, d): each is taken for a patient of its own" in str(note)


def test_clams_table(tmp_path):
    cohort = read(
        tmp_path, "case_id,slide_id,label\npatient_0,TCGA-05.ABC,tumor\npatient_1,TCGA-06.DEF,normal\n"
    )
    assert columns(cohort, "slide_id", "patient_id", "label") == [
        ("TCGA-05.ABC", "patient_0", "tumor"),
        ("TCGA-06.DEF", "patient_1", "normal"),
    ]


def test_stamps_two_tables(tmp_path):
    clini = write(
        tmp_path, "PATIENT,AGE,isMSIH\nP1,60,MSIH\nP2,61,nonMSIH\nP3,62,\nP4,63,MSIH\n", "clini.csv"
    )
    table = "FILENAME,PATIENT\ns1.svs,P1\ns1b.h5,P1\ns2.svs,P2\ns3.svs,P3\ns5.svs,P5\n"
    cohort = read(tmp_path, table, clini=clini, label="isMSIH")
    assert columns(cohort, "slide_id", "patient_id", "label") == [
        ("s1", "P1", "MSIH"),
        ("s1b", "P1", "MSIH"),
        ("s2", "P2", "nonMSIH"),
        ("s3", "P3", None),
        ("s5", "P5", None),
    ]
    (note,) = cohort.notes
    assert note.kind == "label without a slide"
    assert "1 of its patients have no slide" in str(note)
    assert "(P4)" in str(note)


def test_stamps_only_other_column_is_the_label_and_many_must_be_told_apart(tmp_path):
    one = write(tmp_path, "PATIENT,KRAS\nP1,mut\nP2,wt\n", "one.csv")
    many = write(tmp_path, "PATIENT,KRAS,AGE\nP1,mut,60\n", "many.csv")
    table = "PATIENT,FILENAME\nP1,s1.svs\nP2,s2.svs\n"
    assert columns(read(tmp_path, table, clini=one), "label") == [("mut",), ("wt",)]
    with pytest.raises(
        CohortError, match=r"many\.csv: any of the columns KRAS, AGE could be the label; name it"
    ):
        read(tmp_path, table, clini=many)
    with pytest.raises(CohortError, match=r"many\.csv: has no column BRAF; it has PATIENT, KRAS, AGE"):
        read(tmp_path, table, clini=many, label="BRAF")
    with pytest.raises(CohortError, match=r"many\.csv: has no column KRASS; did you mean KRAS\?"):
        read(tmp_path, table, clini=many, label="KRASS")
    assert columns(read(tmp_path, table), "label") == [(None,), (None,)]  # without its clini table


def test_a_clini_table_in_place_of_the_slides_and_one_that_contradicts_itself(tmp_path):
    clini = write(tmp_path, "PATIENT,KRAS\nP1,mut\n\nP1,wt\n", "clini.csv")
    with pytest.raises(
        CohortError, match=r"clini\.csv: has patients, and no column of slides; give a slide tab"
    ):
        Cohort.from_csv(clini)
    with pytest.raises(CohortError, match=r"clini\.csv, row 4: patient P1 has label wt, and mut in row 2"):
        read(tmp_path, "PATIENT,FILENAME\nP1,s1.svs\n", clini=clini)
    with pytest.raises(CohortError, match=r"slides\.csv: has labels, and the clini table too"):
        read(tmp_path, "PATIENT,FILENAME,label\nP1,s1.svs,x\n", clini=clini)
    with pytest.raises(CohortError, match=r"slides\.csv: has no column of patients"):
        read(tmp_path, "FILENAME\ns1.svs\n", clini=clini)


def test_slideflows_table(tmp_path):
    cohort = read(tmp_path, "patient,slide,category\n1,s1,cancer\n2,s2,benign\n")
    assert columns(cohort, "slide_id", "patient_id", "label") == [
        ("s1", "1", "cancer"),
        ("s2", "2", "benign"),
    ]
    with pytest.raises(CohortError, match="any of the columns category, grade could be the label"):
        read(tmp_path, "patient,slide,category,grade\n1,s1,cancer,3\n")
    placed = read(tmp_path, "patient,slide,category,site\n1,s1,cancer,UK\n")
    assert columns(placed, "label", "site") == [("cancer", "UK")]
    chosen = read(tmp_path, "patient,slide,category,site\n1,s1,cancer,UK\n", label="site")
    assert chosen.classes == ("UK",)
    assert read(tmp_path, "patient,slide\n1,s1\n").classes == ()


def test_tridents_table_is_without_labels(tmp_path):
    slides = touch(tmp_path, "sub/a.svs", "b.svs", "other/a.svs")
    cohort = read(tmp_path, "wsi,mpp\nsub/a.svs,0.2525\nb.svs,0.265\n", slides=slides)
    assert columns(cohort, "slide_id", "label", "mpp") == [("a", None, 0.2525), ("b", None, 0.265)]
    assert [row.path for row in cohort] == [slides / "sub/a.svs", slides / "b.svs"]
    assert columns(read(tmp_path, "wsi\na.svs\n"), "slide_id") == [("a",)]


def test_a_type_that_is_no_split_is_no_split(tmp_path):
    cohort = read(tmp_path, "slide_id,label,type\na,0,biopsy\nb,1,resection\n")
    assert columns(cohort, "split") == [(None,), (None,)]
    chosen = read(tmp_path, "slide_id,type\na,biopsy\nb,resection\n", label="type")
    assert chosen.classes == ("biopsy", "resection")
    with pytest.raises(
        CohortError, match=r"slides\.csv, row 3: there is no split 'tset'; write train, valid or"
    ):
        read(tmp_path, "slide_id,label,type\na,0,train\nb,1,tset\n")


@pytest.mark.parametrize(
    ("word", "split"),
    [
        ("train", "train"), ("Training", "train"), ("val", "valid"), ("VALID", "valid"),
        ("validation", "valid"), ("test", "test"), ("testing", "test"), ("", None), ("NA", None),
    ],
)  # fmt: skip
def test_words_for_splits(tmp_path, word, split):
    assert columns(read(tmp_path, f"slide_id,split\na,{word}\nb,train\n"), "split")[0] == (split,)


# --- Files as people make them


def rendered(separator: str, newline: str, encoding: str, quote: str) -> bytes:
    rows = [
        ["Slide ID", " patient_id", "label ", "mpp", "remark"],
        ["007", "0012", "LUAD", "", "x"],
        ["", "", "", "", ""],
        [" 008 ", "0013", "1", "", "x"],
    ]
    lines = [separator.join(f"{quote}{value}{quote}" for value in row) for row in rows]
    return (newline.join([*lines[:2], "", *lines[2:]]) + newline).encode(encoding)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_any_separator_line_end_mark_and_quotes(tmp_path, separator, newline, encoding, quote):
    cohort = read(tmp_path, rendered(separator, newline, encoding, quote))
    assert columns(cohort, "slide_id", "patient_id", "label", "row") == [
        ("007", "0012", "LUAD", 2),
        ("008", "0013", "1", 5),
    ]


def test_values_stay_text(tmp_path):
    text = "slide_id,patient_id,label\n0001,1e5,1\n0002,00.10,0\n0003,3,\n"
    cohort = read(tmp_path, text)
    assert columns(cohort, "slide_id", "patient_id", "label") == [
        ("0001", "1e5", "1"),
        ("0002", "00.10", "0"),
        ("0003", "3", None),
    ]
    assert cohort.classes == ("0", "1")
    assert read(tmp_path, "slide_id,label\na,10\nb,9\nc,2\n").classes == ("2", "9", "10")
    assert read(tmp_path, "slide_id,label\na,b\nb,B\nc,10\n").classes == ("10", "B", "b")


def test_separators_and_quotes_inside_values(tmp_path):
    cohort = read(tmp_path, 'slide_id, label ,note\na, "lung, left" ,"5"" core"\n"b" ,kidney,\n')
    assert columns(cohort, "slide_id", "label") == [("a", "lung, left"), ("b", "kidney")]


def test_excels_separator_line_and_decimal_comma(tmp_path):
    cohort = read(tmp_path, "sep=;\nslide_id;mpp\na;0,2525\n")
    assert columns(cohort, "slide_id", "mpp", "row") == [("a", 0.2525, 3)]


@pytest.mark.parametrize("word", ["", "NA", "nan", "N/A", "#N/A", "null", " "])
def test_labels_that_are_not_known(tmp_path, word):
    cohort = read(tmp_path, f"slide_id,label\na,{word}\nb,None\n")
    assert columns(cohort, "label") == [(None,), ("None",)]


def test_unknown_columns_are_left_alone_and_nearly_known_ones_are_asked_about(tmp_path):
    cohort = read(tmp_path, ",slide_id,patient_id,age,lable,Unnamed: 0\n0,a,1,60,x,0\n")
    (note,) = cohort.notes
    assert str(note).endswith("slides.csv: column lable is not used; did you mean label?")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide_id,slide,label\na,b,0\n", "columns slide_id, slide all give the slide; rename or remove"),
        ("slide_id,Label,label\na,b,0\n", "columns Label, label all give the label"),
        ("slide_id,case_id,patient_id\na,b,0\n", "columns case_id, patient_id all give the patient"),
        ("slide_id,type,split\na,train,test\n", "columns type, split all give the split"),
        ("name,label\na,0\n", "has no column of slide ids, only name, label; name one slide_id"),
        ("slide_id,label\n", "holds no slide; give a row for each"),
        ("", "is empty; give a table"),
        ("\n , \n", "is empty; give a table"),
        ("slide_id,label\na,0\n,1\n", "row 3: has no slide id; fill it in"),
        ("slide_id,label\na\n", "row 2: has 1 values, the header has 2"),
        ("slide_id,label\na,0,1\n", "row 2: has 3 values, the header has 2; quote a value"),
        ("slide_id,label,x\na,0,\nb,1,\"oh\nc,0,\n", "row 3: opens a quotation mark that is never closed"),
        ("slide_id,mpp\na,0.25\nb,-1\n", "row 3: '-1' cannot be microns per pixel"),
        ("slide_id,mpp\na,inf\n", "row 2: 'inf' cannot be microns per pixel"),
        ('slide_id,mpp\na,"0,25"\n', "row 2: '0,25' cannot be microns per pixel"),
        ("slide_id,label\na,lu\u200bad\n", r"row 2: 'lu\u200bad' holds a character that cannot be seen"),
        ("slide_id,label\nS12/7,0\n", "row 2, S12/7: cannot be a file's name; give the slide another id"),
        ("slide_id,label\n..,0\n", "row 2, ..: cannot be a file's name"),
        ("slide_id,label\na,0\n\na,0\n", "row 4: slide a stands in row 2 already; keep one"),
        ("slide_id,label\na,x\na,y\n", "row 3: slide a stands in row 2 already, there with label x, here with y"),
        ("slide_id,patient_id\na,x\na,y\n", "row 3: slide a stands in row 2 already, there of patient x, here"),
        ("slide_id,label\na.svs,0\na.tif,0\n", "row 3: slide a stands in row 2 already"),
        (
            "slide_id,patient_id,split\na,p,train\nb,q,train\nc,p,val\n",
            "row 4: patient p is in train (slide a) and in valid (slide c); put all slides",
        ),
        (b"slide_id,label\na,\xe9\n", "row 2: is not UTF-8; save it as CSV (UTF-8)"),
        (b"PK\x03\x04xxxx", "is a spreadsheet file, not text; save it as CSV"),
        (b"slide_id\na\0b\n", "is not text"),
    ],
)  # fmt: skip
def test_one_clear_line_with_table_and_row(tmp_path, text, message):
    with pytest.raises(CohortError) as caught:
        read(tmp_path, text)
    line = str(caught.value)
    assert message in line
    assert line.startswith(str(tmp_path / "slides.csv"))
    assert line.count("slides.csv") == 1
    assert "\n" not in line


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(CohortError, match=r"none\.csv: cannot be read \(No such file or directory\); check"):
        Cohort.from_csv(tmp_path / "none.csv")
    with pytest.raises(CohortError, match=r"none: is no folder; give the folder of the slide files"):
        read(tmp_path, "slide_id\na\n", slides=tmp_path / "none")


def test_ten_thousand_rows(tmp_path):
    lines = [f"{i:06},{i // 2},{'ab'[i // 2 % 2]}" for i in range(10_000)]
    cohort = read(tmp_path, "slide_id,patient_id,label\n" + "\n".join(lines))
    drawn = cohort.with_splits(SplitConfig())
    assert [len(drawn.part(part)) for part in SPLITS] == [7000, 1500, 1500]


# --- Files of slides


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


# --- Writing


TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["C", "Z"]) | st.sampled_from(',;"'),
    min_size=1,
    max_size=6,
).filter(lambda text: text.casefold() not in {"na", "n/a", "nan", "null", "<na>", "#n/a"})
IDS = TEXT.filter(lambda text: not set("/\\") & set(text) and text[0] != "." and "." not in text)


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_what_is_written_is_read_back_the_same(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("table")
    slides = touch(folder, "a.svs")
    paths = st.sampled_from([None, slides / "a.svs", Path(__file__)])
    rows = [
        SlideRow(
            slide_id,
            data.draw(TEXT),
            data.draw(st.none() | TEXT),
            None,
            data.draw(st.none() | st.floats(1e-3, 1e3)),
            data.draw(paths),
        )
        for slide_id in data.draw(st.lists(IDS, min_size=1, max_size=5, unique=True))
    ]
    cohort = Cohort.from_rows(rows)
    if data.draw(st.booleans()):
        splits = {row.patient_id: data.draw(st.sampled_from(SPLITS)) for row in rows}
        cohort = Cohort.from_rows(
            SlideRow(r.slide_id, r.patient_id, r.label, splits[r.patient_id], r.mpp, r.path) for r in rows
        )
    cohort.to_csv(folder / "again.csv")
    assert Cohort.from_csv(folder / "again.csv") == cohort


def test_paths_beside_the_table_are_written_so_that_both_can_move(tmp_path):
    slides = touch(tmp_path, "a.svs")
    read(tmp_path, "slide_id\na\n", slides=slides).to_csv(tmp_path / "out.csv")
    assert (
        tmp_path / "out.csv"
    ).read_text() == "slide_id,patient_id,label,split,mpp,path\na,a,,,,wsi/a.svs\n"


def test_rows_that_no_table_could_hold_are_refused():
    for row, message in (
        (("a", "p", " x"), "' x' is no value in a slide table"),
        (("a", "p", "NaN"), "'NaN' is no value"),
        (("a\nb", "p", None), "holds a character that cannot be seen"),
        (("../a", "p", None), "cannot be a file's name"),
    ):
        with pytest.raises(CohortError, match=message):
            SlideRow(*row)
    with pytest.raises(CohortError, match="slide a: label z is none of the classes; classes: x, y"):
        Cohort((SlideRow("a", "p", "z"),), ("x", "y"))


def test_masks_and_sites_come_back_from_a_written_table(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.png").touch()
    cohort = read(tmp_path, "slide_id,patient_id,label,mask,site\na,1,x,m/a.png,north\nb,2,y,,south\n")
    assert columns(cohort, "mask", "site") == [(tmp_path / "m" / "a.png", "north"), (None, "south")]
    cohort.to_csv(tmp_path / "again.csv")
    text = (tmp_path / "again.csv").read_text()
    assert text.splitlines()[:2] == [
        "slide_id,patient_id,label,split,mpp,path,mask,site",
        "a,1,x,,,,m/a.png,north",
    ]
    assert Cohort.from_csv(tmp_path / "again.csv").rows == cohort.rows


def test_files_without_a_row_are_said(tmp_path):
    slides = touch(tmp_path, "a.svs", "b.svs", "thumb.png", "dicom/1.dcm", "dicom/2.dcm", "other/c.ndpi")
    cohort = read(tmp_path, "slide_id,patient_id\na,1\ndicom,2\n", slides=slides)
    assert [(f.kind, f.what.partition(" (")[2]) for f in cohort.notes] == [
        ("file without a row", "b.svs, other/c.ndpi)")
    ]
