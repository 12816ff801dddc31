"""The commands about slides alone, before a network comes in: `inspect`, `audit`, `convert`, `prepare`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holoslide.cli_options import (
    USER_ERROR,
    ClusterOption,
    ConfigOption,
    JsonOption,
    MasksOption,
    MppOption,
    RastersOption,
    SetOption,
    ShardOption,
    SlideMppOption,
    SlidesOption,
    TableArgument,
    WorkersOption,
    bar,
    counted,
    name_left_out,
    print_table,
    report_left_out,
    settings_of,
    shard_of,
    with_masks,
    worker_count,
)
from holoslide.errors import ConfigError

if TYPE_CHECKING:
    from holoslide.slides.survey import Survey


def inspect(
    slides: Annotated[list[Path], typer.Argument(help="Slide files.")],
    slide_mpp: SlideMppOption = None,
    as_json: JsonOption = False,
) -> None:
    """Tell what slide files are: size, levels, resolution and where it is known from."""
    from holoslide.slides.inspect import described, inspect_slides

    facts = inspect_slides(slides, fallback_mpp=slide_mpp, workers=worker_count(0))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        typer.echo("\n".join(line for fact in facts for line in described(fact)))
    if any("error" in fact for fact in facts):
        raise typer.Exit(USER_ERROR)


def audit(
    table: TableArgument,
    slides: SlidesOption = None,
    masks: MasksOption = None,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="Write a contact sheet of all slides: one HTML page.")
    ] = None,
    open_files: Annotated[bool, typer.Option("--open/--table-only", help="Open each slide, too.")] = True,
    slide_mpp: SlideMppOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    workers: WorkersOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Look for what is wrong with a cohort before anything is trained."""
    from holoslide.slides.audit import audit as audit_table
    from holoslide.slides.audit import audit_slides
    from holoslide.slides.cohort import Cohort
    from holoslide.slides.sheet import write_sheet

    if sheet is not None and not open_files:
        raise typer.BadParameter("a contact sheet needs the slides opened: leave --table-only out")
    cohort = with_masks(Cohort.from_csv(table, slides=slides, require_splits=False), masks)
    cohort = cohort if slide_mpp is None else cohort.with_mpp(slide_mpp)
    findings = audit_table(cohort)
    surveys: list[Survey] = []
    if open_files:
        is_set = config is not None or sets  # else the settings, which take torch to load, are the usual ones
        tissue = settings_of(config, "default", sets, None).prepare.tissue if is_set else None
        with bar("opening slides") as advance:
            found, surveys = audit_slides(
                cohort, tissue=tissue, workers=worker_count(workers), progress=advance
            )
        findings = sorted([*findings, *found], key=lambda finding: finding.severity == "warning")  # stable
    if sheet is not None:
        write_sheet(sheet, cohort, findings, surveys, command=shlex.join(["holoslide", *sys.argv[1:]]))
    if as_json:
        facts = {"findings": [f.to_dict() for f in findings], "slides": [s.to_dict() for s in surveys]}
        typer.echo(json.dumps(facts, indent=2))
    else:
        rows = [[f.severity, f.kind, f.where, f.what, f.remedy] for f in findings]
        print_table(["severity", "kind", "where", "finding", "what to do"], rows)
        counts = f"{counted(len(cohort), 'slide')}, {counted(len(findings), 'finding')}"
        typer.echo(f"{counts}{f': {sheet}' if sheet else ''}")
    if any(f.severity == "error" for f in findings):
        raise typer.Exit(USER_ERROR)


def convert(
    table: Annotated[
        Path, typer.Argument(help="A slide table (CSV), or a folder with a folder of slides for each class.")
    ],
    to: Annotated[
        str, typer.Option("--to", help="holoslide, paper, clam, stamp, slideflow or trident.")
    ] = "holoslide",
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write into.")] = Path("converted"),
    slides: SlidesOption = None,
    clini: Annotated[
        Path | None, typer.Option("--clini", help="STAMP's table of patients and labels.")
    ] = None,
    label: Annotated[str | None, typer.Option("--label", help="The column that is the label.")] = None,
    splits: Annotated[
        Path | None, typer.Option("--splits", help="Splits of CLAM, Patho-Bench, STAMP or Slideflow.")
    ] = None,
    fold: Annotated[int, typer.Option("--fold", help="Which fold of --splits, counted from 0.")] = 0,
) -> None:
    """Write a slide table: from another tool's table and splits, from a folder, or from ours for another tool."""
    from holoslide.slides.bridges import usable_by, write_as
    from holoslide.slides.cohort import Cohort
    from holoslide.slides.folds import with_split_file

    if not table.is_dir():
        cohort = Cohort.from_csv(table, slides=slides, label=label, clini=clini)
    elif slides or label or clini:
        raise ConfigError(
            str(table), "has its files and labels by itself", "leave --slides, --label and --clini out"
        )
    else:
        cohort = Cohort.from_folder(table)
    cohort = cohort if splits is None else with_split_file(cohort, splits, fold=fold)
    for source in filter(None, (out / "slides.csv" if table.is_dir() else table, clini, splits)):
        if source.exists() and source.resolve().parent == out.resolve():
            raise ConfigError(
                "--out", f"is the folder of {source}, which may be written over", "give another"
            )
    written = write_as(to, cohort, out, slides=slides)
    for note in cohort.notes:
        typer.echo(str(note), err=True)
    usable, unusable = usable_by(to, cohort)
    typer.echo(f"{counted(len(usable), 'slide')}: {', '.join(map(str, written))}")
    name_left_out([(each.where, f"{each.what}; {each.remedy}") for each in unusable])


def prepare(
    sources: Annotated[list[Path], typer.Argument(help="A slide table (CSV), or slide files.")],
    slides: SlidesOption = None,
    masks: MasksOption = None,
    rasters: RastersOption = None,
    mpp: MppOption = None,
    slide_mpp: SlideMppOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    workers: WorkersOption = 0,
    shard: ShardOption = None,
    stall: Annotated[
        float, typer.Option("--stall", help="Give up a slide that gets no further for so many seconds.")
    ] = 600.0,
    cluster: ClusterOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the tissue of slides and write each as one file at the resolution to train at."""
    from holoslide.prepared import cohort_of, default_rasters, prepare_cohort

    settings = settings_of(config, "default", sets, mpp)
    cohort = with_masks(cohort_of(sources, slides=slides, mpp=slide_mpp), masks)
    cohort = cohort if shard is None else cohort.shard(*shard_of(shard))
    folder = rasters or default_rasters(sources[0])
    with bar("preparing") as advance:
        prepared = prepare_cohort(
            cohort,
            folder,
            settings.prepare,
            workers=workers,
            stall_s=stall,
            cluster=cluster,
            progress=advance,
        )
    if as_json:
        typer.echo(json.dumps(prepared.outcomes(), indent=2))
    else:
        rows = [[r.slide_id, r.status, f"{r.seconds:.1f}", str(r.mpp or "")] for r in prepared.results]
        print_table(["slide", "status", "seconds", "um per pixel of the slide"], rows)
    report_left_out(prepared, quiet=as_json)
