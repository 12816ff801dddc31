"""Bars and tables on a terminal, and lines in a log, for the command line alone."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

LINE_S = 60.0  # between two lines of progress where there is no terminal: a night's log stays short


class _Log:
    """Progress where there is no terminal to draw a bar on: a line now and then."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = time.monotonic()

    def __call__(self, line: str) -> None:
        if not self._console.is_terminal and time.monotonic() - self._last >= LINE_S:
            self._last = time.monotonic()
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def is_first_process() -> bool:
    """Whether this is the first of those that torchrun, Slurm or Fabric started, or the only one.

    Known before they meet; in the order in which Fabric looks.
    """
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"))
    return next((rank for rank in ranks if rank is not None), "0") == "0"


class Bar:
    """A progress bar on standard error, advanced by being called with (done, total, note).

    Of several processes that train together the first has one.
    """

    def __init__(self, what: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        console = Console(stderr=True, quiet=not is_first_process())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task(what, total=None, note="")
        self._what, self._log, self._began = what, _Log(console), time.monotonic()

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total` pieces are done; `note` is the last."""
        self._progress.update(self._task, completed=done, total=total, note=note)
        left_s = (time.monotonic() - self._began) / max(1, done) * (total - done)
        self._log(f"{self._what}: {done} of {total}, left {_duration(left_s)}  {note}".rstrip())


class TrainingBar:
    """A run's progress: the losses of all K modules while an epoch lasts, and a line for each epoch."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=None, note="")
        self._log = _Log(self._console)
        self._epochs = 0

    def __enter__(self) -> TrainingBar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def started(self, facts: Any) -> None:
        """As `holoslide.training.progress.Progress`."""
        self._epochs = facts.epochs
        memory = f", at most {facts.peak_bytes / 2**30:.2f} GiB for slides" if facts.peak_bytes else ""
        self._console.print(
            f"{facts.modules} modules on {facts.device}, precision {facts.precision}, "
            f"{facts.ranks} process(es), epochs {facts.epoch + 1} to {facts.epochs}{memory}",
            soft_wrap=True,
        )
        if facts.idle:
            self._console.print(
                f"{facts.idle} GPU(s) have nothing to do: a step has {facts.ranks} slide(s), "
                f"train.accumulate={facts.ranks + facts.idle} gives each one",
                soft_wrap=True,
            )

    def slide_done(self, slide: Any) -> None:
        """As `holoslide.training.progress.Progress`."""
        losses = " ".join(f"{loss:.2f}" for loss in slide.classification)
        what = f"epoch {slide.epoch}/{self._epochs} {slide.phase}"
        note = f"losses {losses}  left {_duration(slide.eta_s)}"
        self._progress.update(
            self._task, description=what, completed=slide.done, total=slide.total, note=note
        )
        self._log(f"{what}: {slide.done} of {slide.total}, {note}")

    def epoch_done(self, row: dict[str, float], *, is_best: bool) -> None:
        """As `holoslide.training.progress.Progress`."""
        last = max(int(key.rpartition("_")[2]) for key in row if key.startswith("valid/loss_"))
        train = " ".join(f"{row[f'train/classification_{k}']:.3f}" for k in range(1, last + 1))
        self._console.print(
            f"epoch {int(row['epoch'])}/{self._epochs}  train {train}  valid loss {row[f'valid/loss_{last}']:.3f}  "
            f"AUROC {row[f'valid/auroc_{last}']:.3f}  {_duration(row['seconds'])}{'  best' if is_best else ''}",
            highlight=False,
            soft_wrap=True,
        )


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """A plain table on standard output; wide where nobody's terminal sets a limit."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # as it stands: neither markup, nor :100: for a picture
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
