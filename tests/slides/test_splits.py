"""Splits: by patient, every class everywhere, the same on any machine; from the table, drawn, or CLAM's."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holoslide.errors import CohortError, ConfigError
from holoslide.slides.cohort import SPLITS, Cohort, SlideRow, SplitConfig
from holoslide.slides.folds import with_split_file
from tests.slides.test_cohort import columns, read, write


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


@settings(deadline=None, max_examples=80)
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


def test_patients_of_several_classes_that_fit_only_in_some_draws_are_fitted():
    patients = {
        "p0": "d",
        "p1": "bcd",
        "p2": "abc",
        "p3": "abd",
        "p4": "c",
        "p5": "ab",
    }  # the first draw fails
    drawn = study({patient: list(labels) for patient, labels in patients.items()}).with_splits(SplitConfig())
    for part in SPLITS:
        assert {row.label for row in drawn.part(part)} == set("abcd")


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
    assert cohort.with_splits(SplitConfig()) == cohort


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
        split = with_split_file(cohort, path)
        assert columns(split, "split") == [("train",), ("train",), ("valid",), ("test",)]
        (note,) = split.notes
        assert "1 of its slides are not in cohort (s9)" in str(note)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (",train,val,test\n0,s1,s1,s2\n", r"splits_0\.csv, row 2: slide s1 is in train and in valid"),
        (
            ",train,val,test\n0,s1,s2,3.0\n",
            r"none of its 1 test slides \(3\.0\) is in cohort; write ids",
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
        with_split_file(cohort, write(tmp_path, text, "splits_0.csv"))


# --- Weights


def test_class_weights_are_inverse_to_frequency_with_mean_one_over_slides():
    cohort = study(balanced(x=6, y=3, z=1))
    weights = cohort.class_weights()
    assert weights == pytest.approx((10 / 18, 10 / 9, 10 / 3))
    assert sum(weights[cohort.classes.index(row.label)] for row in cohort) / len(cohort) == pytest.approx(1)
    lacking = Cohort((SlideRow("a", "a", "x"),), ("x", "y"))
    with pytest.raises(CohortError, match="cohort: holds no slide of class y; train without class weights"):
        lacking.class_weights()
