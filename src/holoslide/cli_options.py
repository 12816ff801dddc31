"""What several commands share: their options, and how bars, tables and slides that were left out are shown."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holoslide.errors import HoloslideError

if TYPE_CHECKING:
    from holoslide.config import RunConfig
    from holoslide.console import Bar
    from holoslide.prepared import Prepared
    from holoslide.slides.cohort import Cohort

USER_ERROR = 1
INTERRUPTED = 130  # as typer ends a command at Ctrl-C

TableArgument = Annotated[
    Path, typer.Argument(help="CSV: slide_id, patient_id, label[, split][, mpp][, path].")
]
SlidesOption = Annotated[Path | None, typer.Option("--slides", help="Folder of the slide files.")]
MasksOption = Annotated[
    Path | None,
    typer.Option(
        "--masks", help="Folder of your own tissue masks: <slide id>.geojson, .json, .png, .h5 or .pkl."
    ),
]
RastersOption = Annotated[
    Path | None,
    typer.Option("--rasters", help="Folder of prepared slides (default: rasters/ beside the table)."),
]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="One setting, part.key=value; repeatable.")
]
PresetOption = Annotated[str, typer.Option("--preset", help="Settings to start from: default, or paper.")]
WorkersOption = Annotated[
    int, typer.Option("--workers", min=0, help="Processes that open slides (0: one a core).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print data as JSON.")]
SlideMppOption = Annotated[
    float | None, typer.Option("--slide-mpp", help="Microns per pixel of the slides, where they do not say.")
]
ShardOption = Annotated[
    str | None,
    typer.Option("--shard", help="Only part i of n, i/n, counted from 1: for job arrays."),
]
ClusterOption = Annotated[
    str | None,
    typer.Option("--cluster", help="Address of a Dask scheduler (tcp://...) whose workers do the work."),
]
MppOption = Annotated[
    float | None, typer.Option("--mpp", help="Microns per pixel to prepare at (default 2.0).")
]


def with_masks(cohort: Cohort, masks: Path | None) -> Cohort:
    return cohort if masks is None else cohort.with_masks(masks)


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def report_left_out(prepared: Prepared, *, quiet: bool = False) -> None:
    name_left_out(prepared.left_out, quiet=quiet)


@contextmanager
def reasons_told(prepared: Prepared) -> Iterator[None]:
    """What goes wrong may be for want of slides that were left out: then they are named before it."""
    try:
        yield
    except HoloslideError:
        with suppress(typer.Exit):
            report_left_out(prepared)
        raise


def name_left_out(left_out: Sequence[tuple[str, str]], *, quiet: bool = False) -> None:
    """Name the slides that were not used, each with its reason, and let the exit code say so."""
    if not left_out:
        return
    if not quiet:
        typer.echo(f"{counted(len(left_out), 'slide')} left out:", err=True)
        for slide_id, reason in left_out:
            typer.echo(f"  {slide_id}: {reason}", err=True)
    raise typer.Exit(USER_ERROR)


def settings_of(config: Path | None, preset: str, sets: list[str] | None, mpp: float | None) -> RunConfig:
    from holoslide.config import RunConfig

    extra = [f"prepare.mpp={mpp}"] if mpp is not None else []
    settings = RunConfig.load(config, preset=preset, sets=[*(sets or []), *extra])
    for line in settings.idle(RunConfig.load(preset=preset)):
        say_once(f"note: {line}", err=True)
    return settings


def shard_of(text: str) -> tuple[int, int]:
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal()):
        raise typer.BadParameter(f"--shard {text}: write i/n, such as 1/20")
    return int(number), int(of)


def worker_count(count: int) -> int:
    """As given; 0 is one a core."""
    return count or os.cpu_count() or 1


def print_table(header: list[str], rows: list[list[str]]) -> None:
    from holoslide import console

    console.print_table(header, rows)


def say_once(text: str, *, err: bool = False) -> None:
    """A line that, of several processes that train together, the first says for all."""
    from holoslide.console import is_first_process

    if is_first_process():
        typer.echo(text, err=err)


def bar(what: str) -> Bar:
    from holoslide.console import Bar

    return Bar(what)
