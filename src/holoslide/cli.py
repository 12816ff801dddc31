"""The `holoslide` command: thin; only the files `cli*.py` print. Heavy imports wait until a command needs them."""

from __future__ import annotations

import errno
import json
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holoslide.cli_options import (
    INTERRUPTED,
    USER_ERROR,
    ClusterOption,
    ConfigOption,
    JsonOption,
    MasksOption,
    PresetOption,
    RastersOption,
    SetOption,
    ShardOption,
    SlideMppOption,
    SlidesOption,
    TableArgument,
    WorkersOption,
    bar,
    print_table,
    reasons_told,
    report_left_out,
    say_once,
    settings_of,
    shard_of,
    with_masks,
)
from holoslide.cli_share import export, serve
from holoslide.cli_slides import audit, convert, inspect, prepare
from holoslide.errors import ConfigError, HoloslideError

if TYPE_CHECKING:
    from holoslide.config import RunConfig
    from holoslide.console import TrainingBar
    from holoslide.prepared import Prepared
    from holoslide.repeated import Repeated
    from holoslide.results import Evaluation
    from holoslide.slides.cohort import Cohort

app = typer.Typer(
    name="holoslide",
    help="Train a neural network on entire pathology slides, from one label per slide.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


app.command()(inspect)
app.command()(audit)
app.command()(convert)
app.command()(prepare)


@app.command()
def plan(
    table: TableArgument,
    slides: SlidesOption = None,
    masks: MasksOption = None,
    rasters: RastersOption = None,
    config: ConfigOption = None,
    preset: PresetOption = "default",
    sets: SetOption = None,
    memory: Annotated[float | None, typer.Option("--memory", help="Budget in GiB.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what training and validation will need for the largest slide of a cohort: memory and time."""
    from holoslide.pipeline import plan_cohort
    from holoslide.prepared import default_rasters

    sets = [*(sets or []), *([f"stream.memory_gib={memory}"] if memory is not None else [])]
    settings = settings_of(config, preset, sets, None)
    cohort, _ = _cohort_to_train(table, slides, masks, settings)
    prepared = _prepared(cohort, rasters or default_rasters(table), settings, workers=0)
    with reasons_told(prepared):
        plans = plan_cohort(prepared, settings)
    if as_json:
        typer.echo(json.dumps([p.facts() for p in plans], indent=2))
    for one in [] if as_json else plans:
        typer.echo(f"\n{one.purpose}: largest slide {one.slide_id}, {one.plan.peak_bytes / 2**30:.2f} GiB at most, "
                   f"{one.plan.file_bytes / 2**30:.2f} GiB in a file, about {one.plan.seconds:.1f} s")  # fmt: skip
        rows = [
            [
                s.name,
                str(s.tiling.side),
                str(s.tiles),
                f"{s.work_bytes / 2**20:.0f}",
                f"{s.map_bytes / 2**20:.0f}",
            ]
            for s in one.plan.stages
        ]
        print_table(["segment", "tile side (cells)", "tiles", "working MiB", "map MiB"], rows)
    report_left_out(prepared, quiet=as_json)


@app.command()
def train(
    table: TableArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="The run's folder.")],
    slides: SlidesOption = None,
    masks: MasksOption = None,
    rasters: RastersOption = None,
    config: ConfigOption = None,
    preset: PresetOption = "default",
    sets: SetOption = None,
    workers: WorkersOption = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run was interrupted.")] = False,
    folds: Annotated[
        int | None, typer.Option("--folds", help="Cross-validate by patient: as many runs, one report.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", help="The same parts with as many seeds, one report.")
    ] = None,
) -> None:
    """Train on a cohort, preparing first what is not prepared; then test once, and write the report."""
    from holoslide.pipeline import refuse_lost_test, refuse_unfit
    from holoslide.pipeline import train as train_run
    from holoslide.prepared import default_rasters
    from holoslide.results import evaluate_run

    if folds is not None and seeds is not None:
        raise ConfigError("--folds and --seeds", "were both given", "give one of them")
    settings = settings_of(config, preset, sets, None)
    cohort, splits = _cohort_to_train(table, slides, masks, settings)
    refuse_unfit(cohort, settings, out)
    prepared = _prepared(cohort, rasters or default_rasters(table), settings, workers=workers)
    if folds is None:
        with reasons_told(prepared):
            refuse_lost_test(cohort, prepared)
    if folds is not None or seeds is not None:
        from holoslide.repeated import train_folds, train_seeds

        if folds is not None:
            several = partial(train_folds, prepared, settings, out, folds)
        else:
            assert seeds is not None
            several = partial(train_seeds, prepared, settings, out, seeds, splits=splits)
        _train_repeatedly(several, prepared, resume=resume)
        return
    with reasons_told(prepared), _training_bar() as progress:
        result = train_run(prepared, settings, out, splits=splits, resume=resume, progress=progress)
    if result.rank != 0:
        return  # with exit code 0: for any other, Fabric kills rank 0, which tests and writes the report
    typer.echo(f"best epoch {result.best_epoch}, model in {result.best}")
    if cohort.test:
        with reasons_told(prepared), bar("testing") as advance:
            evaluation = evaluate_run(out, prepared, progress=advance)
        _print_evaluation(evaluation)
    else:
        typer.echo("nothing was tested: the table has no test slides; `holoslide evaluate` takes others")
    report_left_out(prepared)


def _train_repeatedly(several: Callable[..., Repeated | None], prepared: Prepared, *, resume: bool) -> None:
    with reasons_told(prepared), _training_bar() as progress:
        found = several(resume=resume, announce=say_once, progress=progress)
    if found is None:
        return  # as above: rank 0 says the rest
    print_table(["measure", "mean", "s.d.", "of each run"], found.rows())
    typer.echo(f"report: {found.report}")
    report_left_out(prepared)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    table: Annotated[
        Path | None, typer.Argument(help="Another slide table (default: the run's own).")
    ] = None,
    slides: SlidesOption = None,
    masks: MasksOption = None,
    rasters: RastersOption = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split", help="train, valid, test or all (default: test; all where a table has no splits)."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder (default: RUN, or RUN/SPLIT if not test; another table needs one)."
        ),
    ] = None,
    sensitivity: Annotated[
        float | None, typer.Option("--sensitivity", help="Decide at this one (two classes; default 0.95).")
    ] = None,
    positive: Annotated[
        str | None,
        typer.Option("--positive", help="The class to find (two classes; default: the last by name)."),
    ] = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Write probabilities after the temperature, not raw ones.")
    ] = False,
    workers: WorkersOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure a trained model on labelled slides, with intervals over patients, and write the report."""
    from holoslide.config import RunConfig
    from holoslide.evaluated import place_of
    from holoslide.prepared import default_rasters
    from holoslide.results import evaluate_run
    from holoslide.runs import model_of, rasters_of
    from holoslide.slides.cohort import Cohort

    model_of(run)  # before a cohort is prepared for nothing
    sets = [f"evaluate.sensitivity={sensitivity}"] if sensitivity is not None else []
    sets += [f"evaluate.positive={json.dumps(positive)}"] if positive is not None else []
    settings = RunConfig.load(run / "config.yaml", sets=sets)
    cohort = Cohort.from_csv(table or run / "cohort.csv", slides=slides)
    split = split or ("test" if any(row.split for row in cohort) else "all")
    another = None if table is None else cohort.name
    out = place_of(run, split, out, table=another)  # refused before the slides are prepared
    own = rasters_of(run) or run / "rasters"
    folder = rasters or (own if table is None else default_rasters(table))
    prepared = _prepared(with_masks(cohort, masks), folder, settings, workers=workers)
    with reasons_told(prepared), bar("evaluating") as advance:
        evaluation = evaluate_run(
            run,
            prepared,
            split=split,
            table=another,
            out=out,
            calibrated=calibrated,
            asked=settings.evaluate,
            progress=advance,
        )
    if as_json:
        typer.echo(json.dumps(evaluation.to_dict(), indent=2))
    else:
        _print_evaluation(evaluation)
    report_left_out(prepared, quiet=as_json)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a saved model's.")],
    sources: Annotated[list[Path], typer.Argument(help="A slide table (CSV), or slide files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The table to write.")] = Path("predictions.csv"),
    slides: SlidesOption = None,
    masks: MasksOption = None,
    rasters: RastersOption = None,
    slide_mpp: SlideMppOption = None,
    heatmaps: Annotated[
        Path | None, typer.Option("--heatmaps", help="Write heatmaps into this folder.")
    ] = None,
    workers: WorkersOption = 0,
    cluster: ClusterOption = None,
    shard: ShardOption = None,
) -> None:
    """Score new slides, labelled or not, into a table; with --shard 2/20, into predictions-2-of-20.csv."""
    from holoslide.predictions import Predictor, predict_cohort
    from holoslide.prepared import cohort_of, default_rasters, prepare_cohort

    predictor = Predictor(run)
    cohort = with_masks(cohort_of(sources, slides=slides, mpp=slide_mpp), masks)
    if shard is not None:
        number, of = shard_of(shard)
        cohort, out = cohort.shard(number, of), out.with_stem(f"{out.stem}-{number}-of-{of}")
    folder, is_there = rasters or default_rasters(sources[0]), out.exists()
    with bar("preparing") as advance:
        prepared = prepare_cohort(
            cohort, folder, predictor.prepare_config(), workers=workers, cluster=cluster, progress=advance
        )
    with bar("scoring") as advance:
        count = predict_cohort(predictor, prepared, out, heatmaps=heatmaps, cluster=cluster, progress=advance)
    typer.echo(f"{count} slides scored: {out}" + " stays as it was" * (is_there and not count))
    report_left_out(prepared)


@app.command()
def heatmap(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a saved model's.")],
    sources: Annotated[list[Path], typer.Argument(help="A slide table (CSV), or slide files.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write into.")] = Path("heatmaps"),
    slides: SlidesOption = None,
    masks: MasksOption = None,
    rasters: RastersOption = None,
    slide_mpp: SlideMppOption = None,
    workers: WorkersOption = 0,
) -> None:
    """Draw where a model looks and what speaks for each class: PNG over the slide, and the raw scores."""
    out.mkdir(parents=True, exist_ok=True)
    predict(run, sources, out / "predictions.csv", slides, masks, rasters, slide_mpp, out, workers)


app.command()(export)
app.command()(serve)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for slides, run and report.")] = Path(
        "demo"
    ),
    task: Annotated[str, typer.Option("--task", help="focus or arrangement.")] = "focus",
    slides: Annotated[int, typer.Option("--slides", help="How many slides to draw.")] = 96,
    seed: Annotated[int, typer.Option("--seed", help="Other seeds draw other slides.")] = 0,
    sets: SetOption = None,
) -> None:
    """Draw synthetic slides, train on them, test, and write the report: the whole job in minutes."""
    from holoslide.config import RunConfig
    from holoslide.demo import demo_config, draw_demo

    out.mkdir(parents=True, exist_ok=True)
    config, run = out / "run.yaml", out / "run"
    config.write_text(demo_config().to_yaml(), encoding="utf-8")
    RunConfig.load(config, sets=sets or [])  # a mistake in --set is said before anything is drawn
    with bar("drawing slides") as advance:
        table = draw_demo(out, task=task, slides=slides, seed=seed, progress=advance)
    command = ["holoslide", "train", table, "--config", config, "--out", run, "--resume"]
    command += [word for one in sets or [] for word in ("--set", one)]
    typer.echo(shlex.join(map(str, command)))
    train(table, run, config=config, sets=sets, resume=True)
    typer.echo(f"open {run / 'report.html'} in a browser; heatmaps are in {run / 'heatmaps'}")


# --- What commands share ------------------------------------------------------------------------------------------


def _cohort_to_train(
    table: Path, slides: Path | None, masks: Path | None, settings: RunConfig
) -> tuple[Cohort, str]:
    """A table's cohort, with splits drawn that it does not name, and how they came about.

    What a person should know of it is said.
    """
    from holoslide.slides.cohort import Cohort

    given = Cohort.from_csv(table, slides=slides)
    cohort = given.with_splits(settings.split)
    for note in cohort.notes:
        say_once(f"note: {note}", err=True)
    return with_masks(cohort, masks), cohort.how_split(given, settings.split)


def _prepared(cohort: Cohort, folder: Path, settings: RunConfig, *, workers: int) -> Prepared:
    """The labelled slides of a cohort with their rasters."""
    from holoslide.prepared import prepare_cohort

    with bar("preparing") as advance:
        prepared = prepare_cohort(
            cohort, folder, settings.prepare, labels=True, workers=workers, progress=advance
        )
    made = sum(r.status == "made" for r in prepared.results)
    ready, left_out = len(prepared.rasters), len(prepared.left_out)
    say_once(f"{ready} slides ready in {folder} ({made} made), {left_out} left out", err=True)
    return prepared


def _print_evaluation(evaluation: Evaluation) -> None:
    print_table(["measure", "value", "95 % interval"], evaluation.rows())
    typer.echo(f"report: {evaluation.report}")


def _training_bar() -> TrainingBar:
    from holoslide.console import TrainingBar

    return TrainingBar()


def main() -> None:
    """Run the command; a user's error is one line, and exit code 1. Ctrl-C is one line, and 130."""
    try:
        app()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            typer.echo("holoslide: stopped; train goes on with --resume, others are run again", err=True)
        raise
    except HoloslideError as error:
        typer.echo(f"holoslide: {error}", err=True)
        sys.exit(USER_ERROR)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if is_full and error.filename is None:  # a write does not know its file
            typer.echo(f"holoslide: {error.strerror}; make room where the command writes", err=True)
            sys.exit(USER_ERROR)
        if error.filename is None:
            raise
        what = f"{error.filename}: {error.strerror}"
        typer.echo(f"holoslide: {what}; give another path, or make this one usable", err=True)
        sys.exit(USER_ERROR)
