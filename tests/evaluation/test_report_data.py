"""The data of a report: rows read as they were meant, patients counted once, slides chosen for a reason."""

from holoslide.evaluation.report import CohortPart, EpochRecord, PredictionRow, choose_slides


def test_modules_of_a_history_are_in_the_order_of_their_numbers() -> None:
    row = {"epoch": 4.0} | {f"valid/loss_{k}": float(k) for k in (10, 9, 1, 2, 3, 4, 5, 6, 7, 8)}
    assert EpochRecord.from_row(row).valid_losses == tuple(map(float, range(1, 11)))


def test_slides_are_chosen_once_and_the_right_ones_take_turns() -> None:
    def row(name: str, label: str | None, tumour: float) -> PredictionRow:
        return PredictionRow(name, name, label, "tumour" if tumour > 0.5 else "normal", (1 - tumour, tumour))

    rows = [row(f"right tumour {i}", "tumour", 0.99 - i / 100) for i in range(4)]
    rows += [row("right normal", "normal", 0.2), row("close", "tumour", 0.52), row("unlabelled", None, 0.57)]
    rows += [
        row("a bit wrong", "tumour", 0.4),
        row("very wrong", "normal", 0.95),
        row("wrong", "tumour", 0.3),
    ]
    assert choose_slides(rows, each=2) == {
        "very wrong": "worst",
        "wrong": "worst",
        "close": "uncertain",
        "unlabelled": "uncertain",
        "right tumour 0": "best",
        "right normal": "best",
    }
    assert list(choose_slides(rows, each=1)) == ["very wrong", "close", "right tumour 0"]
    assert choose_slides([]) == {}


def test_a_patient_with_both_labels_counts_in_both_classes_and_once_in_all() -> None:
    part = CohortPart.count("test", [("p", "a"), ("p", "b"), ("q", "a"), ("r", None)])
    assert (part.slides, part.patients, part.by_class) == (4, 3, {"a": (2, 2), "b": (1, 1)})


def test_a_table_keeps_apart_what_the_network_tells_apart() -> None:
    sure = [PredictionRow("s", "p", None, "b", (odds, 1 - odds)) for odds in (3e-7, 4e-7, 1e-12)]
    written = [row.row(("a", "b")) for row in sure]
    assert [(float(row["p_a"]), float(row["p_b"])) for row in written] == [row.probabilities for row in sure]
