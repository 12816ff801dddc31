"""Cohorts: every tool's table read as what it says, and one clear line for what contradicts itself."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holoslide.errors import CohortError
from holoslide.slides.cohort import SPLITS, Cohort, SlideRow, SplitConfig
from tests.slides.tables import columns, read, touch, write

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


def test_patients_whose_ids_are_all_but_one_text_are_said(tmp_path):
    ids = ["P-001", "p-001", "M\u00fcller", "Mu\u0308ller", "7", "007", "P-002", "P-003"]
    text = "slide_id,patient_id,label\n" + "".join(f"s{i},{each},x\n" for i, each in enumerate(ids))
    (note,) = read(tmp_path, text).notes
    assert (note.severity, note.kind) == ("warning", "similar patients")
    assert note.what == (
        "patients P-001 and p-001, M\u00fcller and Mu\u0308ller, 7 and 007 are all but one text, "
        "and are taken for different ones"
    )
