"""Checkpoints that survive a kill at any moment, and refuse to go on with another run.

A checkpoint is taken right after an optimiser step, when no gradient is pending. All draws are functions of
(seed, epoch, slide), so weights, their average, optimiser and position are all there is to keep.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from holoslide.errors import CheckpointError
from holoslide.files import UNREADABLE, lock, sync, write_atomically
from holoslide.slides.facts import one_line

FORMAT = "holoslide training checkpoint"
VERSION = 2
LOCK = ".train.lock"  # in the run's folder; it stays there, and counts while a process holds it

Plain = str | int | float | bool | None
Identity = dict[str, Plain]
"""What makes a run the same run: its settings and its slides, by dotted name."""


@dataclass
class Position:
    """How far a run has come.

    `epoch` epochs are done, and `group` optimiser steps of the next; `losses` are those of the slides of that
    next epoch so far, a row for each, and `seconds` the time they took.
    """

    epoch: int = 0
    group: int = 0
    losses: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def next_epoch(self) -> None:
        """Count the epoch under way as done."""
        self.epoch, self.group, self.losses, self.seconds = self.epoch + 1, 0, [], 0.0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Everything needed to go on: state dicts of model, averaged weights and optimiser, and the position."""

    model: dict[str, Any]
    average: dict[str, Any]
    optimizer: dict[str, Any]
    position: Position
    identity: Identity


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write it whole or not at all. Raises `CheckpointError` where the disk does not take it."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "model": checkpoint.model,
        "average": checkpoint.average,
        "optimizer": checkpoint.optimizer,
        "position": dataclasses.asdict(checkpoint.position),
        "identity": checkpoint.identity,
    }
    with _written(path):
        write_atomically(path, lambda file: torch.save(content, file))


def load(path: Path, *, identity: Identity) -> Checkpoint:
    """Read it, as the run that `identity` describes.

    No code in the file is run. Raises `CheckpointError` if it is damaged, of another version, or another run's.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise CheckpointError(path, "cannot be read as a checkpoint", "delete it and train anew") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(path, "is not a training checkpoint", "give the folder of a training run")
    if content["version"] != VERSION:
        raise CheckpointError(
            path,
            f"has version {content['version']}, this holoslide reads {VERSION}",
            "resume with the holoslide that wrote it, or train anew",
        )
    refuse_other_run(path, content["identity"], identity)
    position = Position(**content["position"])
    states = (content["model"], content["average"], content["optimizer"])
    return Checkpoint(*states, position, content["identity"])


def refuse_other_run(path: Path, then: Identity, now: Identity) -> None:
    """Raise `CheckpointError`, with the first difference, if what lies at `path` is not what is to go on."""
    for name in [*now, *then]:
        if name not in then or name not in now or then[name] != now[name]:
            was, is_now = then.get(name, "nothing"), now.get(name, "nothing")
            raise CheckpointError(
                path,
                f"belongs to another run: {name} was {was}, now it is {is_now}",
                "resume with the settings and slides it was made with, or train into another folder",
            )


def describe(value: object, name: str = "") -> Identity:
    """Settings as dotted names and plain values, whatever dataclasses, tables and lists they are made of.

    >>> describe({"train": {"lr": 0.1, "devices": [0, 1]}})
    {'train.lr': 0.1, 'train.devices.0': 0, 'train.devices.1': 1}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, Sequence) and not isinstance(value, str):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return {name: value if value is None or isinstance(value, str | int | float) else str(value)}
    prefix = f"{name}." if name else ""
    return {k: v for key, item in items for k, v in describe(item, prefix + key).items()}


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes from training into a folder meanwhile, which is made; a lock dies with its holder.

    Raises `CheckpointError` where there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("wb") as file:
        if not lock(file):
            remedy = "wait until it is done, or train into another folder"
            raise CheckpointError(folder, "is trained into by another process", remedy)
        yield


# --- Files that are never seen half written ---------------------------------------------------------------------


def replace_folder(folder: Path, save: Callable[[Path], object]) -> None:
    """Let `save` fill a temporary folder and move its files, one by one, over those of `folder`.

    For a model directory: only the weights differ from one epoch to the next, so it is whole at any moment.
    Raises `CheckpointError` where the disk does not take it.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with _written(folder):
        save(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(temporary.iterdir(), key=lambda p: p.suffix == ".safetensors"):  # weights last
            sync(path)
            path.replace(folder / path.name)
        temporary.rmdir()
        sync(folder)


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Of a disk that is full, safetensors tells in an error of its own, and torch in one about something else."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError | SafetensorError):
            raise
        what = f"cannot be written ({one_line(cause)})"
        raise CheckpointError(path, what, "make room there, and resume") from error
