"""What reviewers write is on the disk, whole, with who and when; nothing that was written is ever lost."""

import csv
import errno
import os
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from holoslide.errors import SlideError
from holoslide.serve.reviews import Reviews
from tests.serve.served import serving


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "reviews.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_review_is_written_with_who_and_when(run_copy: Path) -> None:
    note = 'two foci, "both" small;\nsecond line, ä <script>alert(1)</script> =1+1'
    with serving(run_copy) as served:
        answer = served.write("focus-001", {"reviewer": " Dr. A ", "label": "lesion", "note": note})
        assert answer.status == 201
        assert served.write("focus-001", {"reviewer": "B", "label": "", "note": "no"}).status == 201
        shown = served.ask("/api/slides/focus-001").json["reviews"]
        last = served.ask("/api/run").json["slides"][0]["reviews"]
        assert [(each["reviewer"], each["label"]) for each in last] == [("Dr. A", "lesion"), ("B", "")]
    first, second = rows(run_copy)
    assert first | {"time": ""} == {
        "time": "", "reviewer": "Dr. A", "slide_id": "focus-001", "label": "lesion", "note": note
    }  # fmt: skip
    assert abs((datetime.now(UTC) - datetime.fromisoformat(first["time"])).total_seconds()) < 300
    assert second["note"] == "no"
    assert shown == [first, second]
    with serving(run_copy) as served:  # another viewer, later
        assert served.ask("/api/slides/focus-001").json["reviews"] == shown


@pytest.mark.parametrize(
    "sent",
    [
        {"reviewer": "", "label": "", "note": ""},
        {"reviewer": "  ", "label": "", "note": ""},
        {"reviewer": "A", "label": "no class", "note": ""},
        {"reviewer": "A", "label": "", "note": "x" * 10_001},
        {"reviewer": "A" * 81, "label": "", "note": ""},
        {"reviewer": "A", "label": "", "note": "", "path": "/etc/passwd"},
        {"reviewer": ["A"], "label": "", "note": ""},
        [],
        b"not json",
    ],
)
def test_what_is_no_review_is_refused_with_a_reason(run_copy: Path, sent: object) -> None:
    with serving(run_copy) as served:
        answer = served.write("focus-001", sent)
        assert answer.status == 422
        assert answer.json["error"]
        assert served.write("none", {"reviewer": "A", "label": "", "note": ""}).status == 404
    assert not (run_copy / "reviews.csv").exists()


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    """Two viewers of one run, as two processes have them, and several threads in each."""
    viewers = [Reviews(tmp_path), Reviews(tmp_path)]

    def write(worker: int) -> None:
        for n in range(5):
            viewers[worker % 2].add(f"s{worker}", reviewer=f"r{worker}", label="", note=f"{n}")

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = Reviews(tmp_path).all()
    assert {slide: [r.note for r in reviews] for slide, reviews in found.items()} == {
        f"s{worker}": ["0", "1", "2", "3", "4"] for worker in range(6)
    }
    assert not list(tmp_path.glob("*.tmp"))


def test_a_file_system_without_locks_keeps_reviews(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", missing)
    Reviews(tmp_path).add("s", reviewer="A", label="", note="kept")
    assert [review.note for review in Reviews(tmp_path).of("s")] == ["kept"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reviews = Reviews(tmp_path)
    reviews.add("s", reviewer="A", label="", note="first")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            reviews.add("s", reviewer="A", label="", note="second")
    assert [review.note for review in Reviews(tmp_path).of("s")] == ["first"]
    reviews.add("s", reviewer="A", label="", note="third")
    assert [review.note for review in Reviews(tmp_path).of("s")] == ["first", "third"]


def test_a_disk_that_is_full_is_told_to_the_reviewer(run_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with serving(run_copy) as served, monkeypatch.context() as broken:
        broken.setattr("os.fsync", full)
        answer = served.write("focus-001", {"reviewer": "A", "label": "", "note": "n"})
    assert (answer.status, answer.json["error"]) == (507, "it cannot be written: No space left on device")


def test_another_file_of_that_name_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("mine\n1\n")
    with pytest.raises(SlideError, match="has not the columns"):
        Reviews(tmp_path)
    assert (tmp_path / "reviews.csv").read_text() == "mine\n1\n"


def test_of_each_reviewer_the_last_word_holds(run_copy: Path) -> None:
    """A note of another takes no correction back."""
    with serving(run_copy) as served:
        for reviewer, label in [("A", "lesion"), ("B", ""), ("A", ""), ("C", "lesion"), ("B", "benign")]:
            written = {"reviewer": reviewer, "label": label, "note": f"{reviewer} {label}"}
            assert served.write("focus-001", written).status == 201
        last = served.ask("/api/run").json["slides"][0]["reviews"]
    assert [(each["reviewer"], each["label"]) for each in last] == [
        ("A", ""),
        ("C", "lesion"),
        ("B", "benign"),
    ]


def test_what_excel_has_saved_is_read(run_copy: Path) -> None:
    with serving(run_copy) as served:
        assert served.write("focus-001", {"reviewer": "Ä", "label": "", "note": "first"}).status == 201
    path = run_copy / "reviews.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b'"', b"").replace(b"\n", b"\r\n"))
    with serving(run_copy) as served:
        assert served.write("focus-001", {"reviewer": "B", "label": "", "note": "second"}).status == 201
        shown = served.ask("/api/slides/focus-001").json["reviews"]
    assert [(each["reviewer"], each["note"]) for each in shown] == [("Ä", "first"), ("B", "second")]


@pytest.mark.parametrize(("cells", "count"), [("t,A,s,,note,more", 6), ("t,A,s", 3)])
def test_a_row_of_other_columns_is_refused_and_not_thrown_away(
    tmp_path: Path, cells: str, count: int
) -> None:
    text = f"time,reviewer,slide_id,label,note\nt,A,s,,fine\n{cells}\n"
    (tmp_path / "reviews.csv").write_text(text)
    with pytest.raises(SlideError, match=f"has {count} cells in line 3, not 5; put that line right"):
        Reviews(tmp_path)
    assert (tmp_path / "reviews.csv").read_text() == text


@pytest.mark.parametrize(
    "text", ["=1+1", "+1", "-2 foci", "@A", "\t=1", "'=1", "''-", "'quoted'", "＝1", "a=b"]
)
def test_no_note_or_name_is_a_formula_to_a_spreadsheet(tmp_path: Path, text: str) -> None:
    """And comes back as it was written, however often the file is."""
    for _ in range(3):
        Reviews(tmp_path).add("s", reviewer=text, label="", note=text)
    found = Reviews(tmp_path).of("s")
    assert {(review.reviewer, review.note) for review in found} == {(text, text)}
    for row in rows(tmp_path):
        for cell in (row["reviewer"], row["note"]):
            assert cell[0] not in "=+-@\t＝"


def test_a_note_of_any_line_ends_comes_back_and_breaks_no_table(run_copy: Path) -> None:
    sent = {"reviewer": "A", "label": "", "note": 'a\rb\r\nc\n"d",\te'}
    with serving(run_copy) as served:
        assert served.write("focus-001", sent).status == 201
        assert served.write("focus-002", {"reviewer": "A", "label": "", "note": "next"}).status == 201
        shown = served.ask("/api/slides/focus-001").json["reviews"]
    assert [review["note"] for review in shown] == ['a\nb\nc\n"d",\te']
    assert [row["note"] for row in rows(run_copy)] == ['a\nb\nc\n"d",\te', "next"]


def test_what_is_not_a_plain_sign_is_quoted_on_the_disk(tmp_path: Path) -> None:
    """Also where a caller has not tidied it: an unquoted CR ends a row for whoever reads the table."""
    Reviews(tmp_path).add("s", reviewer="A", label="", note="a\rb")
    assert [review.note for review in Reviews(tmp_path).of("s")] == ["a\rb"]
    assert b'"a\rb"' in (tmp_path / "reviews.csv").read_bytes()


@pytest.mark.parametrize(
    ("field", "text", "told"),
    [
        ("note", "a\x00b", "body.note: holds the control character U+0000; take it out"),
        ("note", "a\x1bb", "body.note: holds the control character U+001B; take it out"),
        ("note", "a\x85b", "body.note: holds the control character U+0085; take it out"),
        ("reviewer", "A\nB", "body.reviewer: holds the control character U+000A; take it out"),
        ("reviewer", "A\x00", "body.reviewer: holds the control character U+0000; take it out"),
        ("note", "a\ud800b", "body.note: "),
    ],
)
def test_control_characters_are_refused_by_name(run_copy: Path, field: str, text: str, told: str) -> None:
    with serving(run_copy) as served:
        answer = served.write("focus-001", {"reviewer": "A", "label": "", "note": "n"} | {field: text})
        assert answer.status == 422
        assert answer.json["error"].startswith(told)
        assert served.ask("/api/slides/focus-001").json["reviews"] == []
    assert not (run_copy / "reviews.csv").exists()
