"""Cohorts: every tool's table read as what it says, splits by patient, and one clear line for what contradicts."""

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holoslide.errors import CohortError, ConfigError
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


def study(patients: dict[str, list[str]], *, slides_each: int = 1) -> Cohort:
    """A cohort of patients with the labels of their slides."""
    rows = [
        SlideRow(f"{patient}-{i}-{j}", patient, label)
        for patient, labels in patients.items()
        for i, label in enumerate(labels)
        for j in range(slides_each)
    ]
    return Cohort.from_rows(rows)


def balanced(**counts: int) -> dict[str, list[str]]:
    return {f"{label}{i}": [label] for label, count in counts.items() for i in range(count)}


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
    with pytest.raises(CohortError, match="any of the columns category, site could be the label"):
        read(tmp_path, "patient,slide,category,site\n1,s1,cancer,UK\n")
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
    cohort = read(tmp_path, "slide_id\n-a b\ne\u0301\nlink\n", slides=slides, require_files=True)
    assert [row.path.name for row in cohort] == ["-a b.svs", "é.svs", "link.svs"]


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
    assert columns(cohort, "slide_id", "patient_id", "label", "mpp", "path") == [
        ("a", "a", None, 0.5, slides / "a.ome.tif"),
        ("b", "b", None, 0.5, slides / "sub/b.svs"),
        ("gone", "gone", None, 0.5, None),
    ]
    (finding,) = cohort.usable(labels=False)[1]
    assert (finding.slide_id, finding.message) == ("gone", "there is no file gone.svs; mend its path")
    with pytest.raises(CohortError, match=r"slide a is there already, as .*a\.ome\.tif; keep one of them"):
        Cohort.from_files(["a.ome.tif", "sub/a.svs"])


def test_microns_per_pixel_for_slides_whose_table_has_none(tmp_path):
    cohort = read(tmp_path, "slide_id,mpp\na,0.2525\nb,\n")
    assert columns(cohort.with_mpp(0.5), "mpp") == [(0.2525,), (0.5,)]
    with pytest.raises(CohortError, match="nan um per pixel cannot be; give a positive number"):
        cohort.with_mpp(float("nan"))


# --- Writing


TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["C", "Z"]) | st.sampled_from(',;"'),
    min_size=1,
    max_size=6,
).filter(lambda text: text.casefold() not in {"na", "n/a", "nan", "null", "<na>", "#n/a"})
IDS = TEXT.filter(lambda text: not set("/\\") & set(text) and text[0] != "." and "." not in text)


@settings(deadline=None, max_examples=200)
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


# --- Splits


def test_parts_keep_all_classes_and_a_patient_in_two_is_refused_even_later(tmp_path):
    text = "slide_id,patient_id,label,split\na,p,0,train\nb,q,1,test\nc,p,1,valid\n"
    cohort = read(tmp_path, text, require_splits=False)
    with pytest.raises(CohortError, match="patient p is in train"):
        _ = cohort.train
    with pytest.raises(CohortError, match="patient p is in train"):
        cohort.with_splits(SplitConfig())
    cohort = read(tmp_path, text.replace("valid", "train"))
    assert columns(cohort.train, "slide_id") == [("a",), ("c",)]
    assert columns(cohort.test, "slide_id") == [("b",)]
    assert len(cohort.valid) == 0
    assert cohort.test.classes == ("0", "1")


def test_the_draw_is_the_same_on_any_machine_and_stays_so():
    drawn = study(balanced(x=6, y=5)).with_splits(SplitConfig(seed=3))
    parts = {part: [row.patient_id for row in drawn.part(part)] for part in SPLITS}
    assert parts == {
        "train": ["x2", "x3", "x4", "x5", "y0", "y2", "y3"],
        "valid": ["x1", "y4"],
        "test": ["x0", "y1"],
    }


def test_seeds_differ():
    cohort = study(balanced(x=20, y=20))
    parts = {tuple(row.split for row in cohort.with_splits(SplitConfig(seed=seed))) for seed in range(20)}
    assert len(parts) == 20


def test_no_patient_is_favoured():
    cohort = study(balanced(x=10, y=10))
    draws = [cohort.with_splits(SplitConfig(0.5, 0.25, 0.25, seed=seed)) for seed in range(400)]
    in_train = Counter(row.slide_id for drawn in draws for row in drawn.train)
    assert min(in_train.values()) > 160
    assert max(in_train.values()) < 240


@settings(deadline=None, max_examples=200)
@given(
    counts=st.lists(st.integers(3, 30), min_size=1, max_size=4),
    slides_each=st.integers(1, 3),
    train=st.integers(1, 18),
    valid=st.integers(1, 18),
    seed=st.integers(0, 5),
    order=st.randoms(use_true_random=False),
)
def test_every_class_gets_its_shares_by_patient_in_any_order_of_rows(
    counts, slides_each, train, valid, seed, order
):
    test = max(1, 20 - train - valid)
    total = train + valid + test
    config = SplitConfig(train / total, valid / total, 1 - train / total - valid / total, seed)
    cohort = study(balanced(**dict(zip("abcd", counts, strict=False))), slides_each=slides_each)
    drawn = cohort.with_splits(config)
    drawn.refuse_split_patients()
    for name, count in zip("abcd", counts, strict=False):
        for part, share in (("train", config.train), ("valid", config.valid), ("test", config.test)):
            patients = {row.patient_id for row in drawn.part(part) if row.label == name}
            assert patients
            assert abs(len(patients) - count * share) < 2  # whole patients, and one at least elsewhere
    rows = list(cohort.rows)
    order.shuffle(rows)
    again = Cohort.from_rows(rows).with_splits(config)
    assert {row.slide_id: row.split for row in again} == {row.slide_id: row.split for row in drawn}


def test_remainders_do_not_all_fall_to_one_part():
    counts = {f"class{i}": 10 for i in range(10)}  # 7, 1.5 and 1.5 of each
    drawn = study(balanced(**counts)).with_splits(SplitConfig())
    assert [len(drawn.part(part)) for part in SPLITS] == [70, 15, 15]


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_patients_of_several_classes_stay_whole_and_every_class_is_everywhere(data):
    label_sets = st.sets(st.sampled_from("abc"), min_size=1, max_size=3)
    patients = {f"p{i}": sorted(data.draw(label_sets)) for i in range(data.draw(st.integers(12, 40)))}
    patients |= {f"{name}{i}": [name] for name in "abc" for i in range(3)}
    drawn = study(patients).with_splits(SplitConfig(seed=data.draw(st.integers(0, 3))))
    drawn.refuse_split_patients()
    for part in SPLITS:
        assert {row.label for row in drawn.part(part)} == set("abc")


def test_classes_too_small_to_be_everywhere_are_refused():
    with pytest.raises(
        CohortError, match="cohort: class rare has 2 patients, too few for 3 parts; add patients"
    ):
        study(balanced(often=20, rare=2)).with_splits(SplitConfig())
    drawn = study(balanced(often=20, rare=2)).with_splits(SplitConfig(0.8, 0.2, 0))
    assert {row.label for row in drawn.valid} == {"often", "rare"}
    assert len(drawn.test) == 0
    with pytest.raises(CohortError, match="holds no slide with a label; a split is drawn by the labels"):
        Cohort.from_rows([SlideRow("a", "a")]).with_splits(SplitConfig())


def test_what_cannot_be_drawn_for_patients_of_several_classes_is_refused():
    # Each pair of classes shares a patient: three patients a class, but never all three parts for each (Fano).
    lines = ["abc", "ade", "afg", "bdf", "beg", "cdg", "cef"]
    holders = {p: [line for line in lines if p in line] for p in "abcdefg"}  # patient p has classes `lines`
    with pytest.raises(
        CohortError, match=r"is left without a patient in .*: patients have slides of several"
    ):
        study(holders).with_splits(SplitConfig(0.34, 0.33, 0.33))


def test_a_whole_split_column_stays_as_it_is(tmp_path):
    text = "slide_id,label,split\na,0,train\nb,1,valid\nc,0,test\nd,,\n"
    cohort = read(tmp_path, text)
    assert cohort.has_splits
    assert cohort.with_splits(SplitConfig()) == cohort
    assert not read(tmp_path, text.replace("b,1,valid", "b,1,")).has_splits
    assert not read(tmp_path, "slide_id,split\na,train\n").has_splits


def test_a_test_set_is_kept_and_the_rest_is_drawn():
    rows = [SlideRow(f"t{i}", f"t{i}", "xy"[i % 2], "test") for i in range(6)]
    rows += [SlideRow(f"s{i}", f"s{i}", "xy"[i % 2]) for i in range(20)]
    rows += [SlideRow("more", "t0", "x"), SlideRow("unlabelled", "s0")]
    drawn = Cohort.from_rows(rows).with_splits(SplitConfig(0.6, 0.2, 0.2))
    assert [len(drawn.part(part)) for part in SPLITS] == [15, 5, 7]  # 7.5 and 2.5 of either class
    assert {row.slide_id for row in drawn.test} == {f"t{i}" for i in range(6)} | {"more"}
    assert next(row.split for row in drawn if row.slide_id == "unlabelled") is None
    (note,) = drawn.notes
    assert str(note).startswith(
        "cohort: names only test; of the other patients 15 into train and 5 into valid"
    )


def test_gaps_in_a_split_column_with_all_parts_are_refused(tmp_path):
    text = "slide_id,label,split\na,0,train\nb,1,valid\nc,0,test\nd,1,\ne,1,\n"
    cohort = read(tmp_path, text)
    with pytest.raises(
        CohortError, match=r"row 5: 2 slides have no split \(d, e\), others have; fill the column"
    ):
        cohort.with_splits(SplitConfig())


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ((0.7, 0.2, 0.2), "split: train, valid and test sum to 1.1; give shares that sum to 1"),
        ((-0.1, 0.6, 0.5), r"split\.train: is -0\.1; give 0 or more"),
        ((0.5, float("nan"), 0.5), r"split\.valid: is nan"),
        ((0, 0.5, 0.5), r"split\.train: is 0; give more than 0"),
    ],
)
def test_shares_that_are_none(shares, message):
    with pytest.raises(ConfigError, match=message):
        SplitConfig(*shares)


def test_clams_split_files(tmp_path):
    rows = [SlideRow(name, name, "x") for name in ("s1", "s2", "s3", "s4")]
    cohort = Cohort.from_rows(rows)
    lists = write(tmp_path, ",train,val,test\n0,s1,s3,s9\n1,s2.svs,,\n2,,,s4\n", "splits_0.csv")
    flags = write(
        tmp_path, ",train,val,test\ns1,True,False,False\ns2,True,False,False\ns3,False,True,False\n"
        "s4,False,False,True\ns9,False,False,True\n", "splits_0_bool.csv",
    )  # fmt: skip
    for path in (lists, flags):
        split = cohort.with_clam_split(path)
        assert columns(split, "split") == [("train",), ("train",), ("valid",), ("test",)]
        (note,) = split.notes
        assert "1 of its slides are not in cohort (s9)" in str(note)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",train,val,test\n0,s1,s1,s2\n", r"splits_0\.csv, row 2: slide s1 is in train and in valid"),
        (
            ",train,val,test\n0,s1,s2,3.0\n",
            r"none of its 1 test slides \(3\.0\) is in cohort; write slide ids",
        ),
        (",train,val\n0,s1,s2\n", r"has 0 columns of test slides, among .*; give CLAM's train, val and test"),
        (",train,val,test\n0,s1,,s2\n1,,s1b,\n", r"patient p1 is in train \(slide s1\) and in valid"),
        ("train,val,test\nTrue,False,False\n", "has no ids before its True and False"),
    ],
)
def test_clam_split_files_that_contradict_themselves(tmp_path, text, message):
    cohort = Cohort.from_rows(
        [SlideRow("s1", "p1", "x"), SlideRow("s1b", "p1", "x"), SlideRow("s2", "p2", "x")]
    )
    with pytest.raises(CohortError, match=message):
        cohort.with_clam_split(write(tmp_path, text, "splits_0.csv"))


# --- Weights


def test_class_weights_are_inverse_to_frequency_with_mean_one_over_slides():
    cohort = study(balanced(x=6, y=3, z=1))
    weights = cohort.class_weights()
    assert weights == pytest.approx((10 / 18, 10 / 9, 10 / 3))
    assert sum(weights[cohort.classes.index(row.label)] for row in cohort) / len(cohort) == pytest.approx(1)
    lacking = Cohort((SlideRow("a", "a", "x"),), ("x", "y"))
    with pytest.raises(CohortError, match="cohort: holds no slide of class y; train without class weights"):
        lacking.class_weights()
