"""Checkpoints: whole or not at all, this version, this run, and no code in the file."""

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from holoslide import files
from holoslide.errors import CheckpointError
from holoslide.models.classifier import LocalClassifier
from holoslide.training import checkpoint
from holoslide.training.checkpoint import Checkpoint, Position
from tests.training import tiny

IDENTITY = {"train.lr": 0.1, "train.seed": 3}


def _checkpoint() -> Checkpoint:
    position = Position(2, 1, [[0.5, 0.25]], 1.5, [{"epoch": 1, "valid/auroc_1": float("inf")}])
    return Checkpoint(
        {"weight": torch.arange(3.0)}, {"weight": torch.ones(3)}, {"state": {0: {"step": torch.tensor(4.0)}}},
        position, IDENTITY,
    )  # fmt: skip


def test_reads_what_it_wrote(tmp_path):
    checkpoint.save(_checkpoint(), tmp_path / "a.ckpt")
    read = checkpoint.load(tmp_path / "a.ckpt", identity=IDENTITY)
    assert read.position == _checkpoint().position
    assert torch.equal(read.model["weight"], torch.arange(3.0))
    assert torch.equal(read.average["weight"], torch.ones(3))
    assert read.optimizer == _checkpoint().optimizer


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    files.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    files.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_of_two_who_write_one_file_at_once_the_later_waits(tmp_path):
    """They shared the temporary file: the first found it gone, renamed by the second."""
    path = tmp_path / "a"
    other = threading.Thread(target=files.write_text, args=("the other's", path))

    def slowly(file):
        other.start()
        file.write(b"one's")
        other.join(0.2)

    files.write_atomically(path, slowly)
    other.join()
    assert path.read_text() == "the other's"
    assert list(tmp_path.iterdir()) == [path]


class _FullDisk:
    """Takes so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 100, 2000])
def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays(tmp_path, monkeypatch, room):
    """torch raises a RuntimeError about positions in its archive."""
    path, save = tmp_path / "a.ckpt", torch.save
    checkpoint.save(_checkpoint(), path)
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", lambda content, file: save(content, _FullDisk(file, room)))
    with pytest.raises(
        CheckpointError, match=r"a\.ckpt: cannot be written \(.*No space left.*\); make room there"
    ):
        checkpoint.save(_checkpoint(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_at_the_best_model_is_one_line_and_the_old_one_stays(tmp_path, monkeypatch):
    model = tiny.model()
    checkpoint.replace_folder(tmp_path / "best", model.save)
    before = {path: path.read_bytes() for path in (tmp_path / "best").iterdir()}

    def full(state, path):
        Path(path).write_bytes(b"half of it")
        message = "Error while serializing: I/O error: No space left on device (os error 28)"
        raise SafetensorError(message)

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(
        CheckpointError, match=r"best: cannot be written \(.*No space left.*\); make room there"
    ):
        checkpoint.replace_folder(tmp_path / "best", model.save)
    assert {path: path.read_bytes() for path in (tmp_path / "best").iterdir()} == before


def test_a_full_disk_at_a_table_names_the_table(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*history\.csv'"):
        files.write_atomically(tmp_path / "history.csv", lambda file: _FullDisk(file, 3).write(b"epoch,lr"))
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_file_by_file_and_is_a_model_throughout(tmp_path, monkeypatch):
    model = tiny.model()
    checkpoint.replace_folder(tmp_path / "best", model.save)
    with torch.no_grad():
        model.heads[0].stem.weight.add_(1)
    replace, whole = Path.replace, []

    def watched(path, target):
        moved = replace(path, target)
        whole.append(LocalClassifier.load(tmp_path / "best"))
        return moved

    monkeypatch.setattr(Path, "replace", watched)
    checkpoint.replace_folder(tmp_path / "best", model.save)
    assert len(whole) == 2
    assert torch.equal(whole[-1].heads[0].stem.weight, model.heads[0].stem.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_refuses_a_damaged_file(tmp_path):
    path = tmp_path / "a.ckpt"
    checkpoint.save(_checkpoint(), path)
    whole = path.read_bytes()
    for content in (b"", b"not a checkpoint", b"hello world", b".", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a\.ckpt: cannot be read as a checkpoint"):
            checkpoint.load(path, identity=IDENTITY)


class _Attack:
    def __reduce__(self):
        return (Path.touch, (Path("attacked"),))


def test_runs_no_code_in_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "model": _Attack()}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path / "a.ckpt", identity=IDENTITY)
    assert not Path("attacked").exists()


def test_refuses_other_files_and_other_versions(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="is not a training checkpoint"):
        checkpoint.load(path, identity=IDENTITY)
    torch.save({"format": checkpoint.FORMAT, "version": 99}, path)
    with pytest.raises(CheckpointError, match=f"has version 99, this holoslide reads {checkpoint.VERSION}"):
        checkpoint.load(path, identity=IDENTITY)


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (IDENTITY | {"train.lr": 0.2}, "train.lr was 0.1, now it is 0.2; resume with the settings"),
        (IDENTITY | {"slides.train.0": "a"}, "slides.train.0 was nothing, now it is a"),
        ({"train.lr": 0.1}, "train.seed was 3, now it is nothing"),
    ],
)
def test_names_the_first_difference_to_another_run(tmp_path, identity, message):
    checkpoint.save(_checkpoint(), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path / "a.ckpt", identity=identity)


def test_describes_settings_of_any_make_in_plain_values():
    described = checkpoint.describe({"train": tiny.config(seed=5), "classes": ("a", "b"), "out": Path("x")})
    assert described["train.seed"] == 5
    assert described["classes.1"] == "b"
    assert described["out"] == "x"
