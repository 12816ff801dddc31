"""The whole job from Python: functions that do the same as the commands of their names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from holoslide.config import RunConfig
from holoslide.errors import CohortError, HoloslideError
from holoslide.evaluated import place_of
from holoslide.inference.heatmap import Heatmap
from holoslide.inference.show import table_html
from holoslide.models.classifier import LocalClassifier
from holoslide.pipeline import refuse_unfit
from holoslide.pipeline import train as train_run
from holoslide.predictions import Prediction, Predictor, predict_cohort
from holoslide.prepared import Prepared, cohort_of, default_rasters, prepare_cohort
from holoslide.results import Evaluation, evaluate_run
from holoslide.runs import rasters_of
from holoslide.slides.cohort import Cohort
from holoslide.training.progress import Progress

SCORED = "scored"  # not "rasters": in a run's folder those are of its own slides, whose names others may bear


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run: its `folder`, the `best` model's directory and epoch, and the slides `left_out`."""

    folder: Path
    best: Path
    best_epoch: int
    left_out: tuple[tuple[str, str], ...]

    def _repr_html_(self) -> str:
        """What a notebook shows: where the run is, and how good the model is, as far as it was evaluated."""
        facts = [("folder", str(self.folder)), ("best epoch", str(self.best_epoch))]
        facts += [("left out", f"{slide_id}: {reason}") for slide_id, reason in self.left_out]
        path = self.folder / "metrics.json"
        if not path.is_file():
            return table_html(f"Run {self.folder.name}", [*facts, ("metrics", "not evaluated yet")], [])
        written = json.loads(path.read_text(encoding="utf-8"))
        measured = written["slides"]
        facts += [("slides", f"{measured['slides']}, part: {written.get('split', 'not said')}")]
        facts += [("report", str(self.folder / "report.html"))]
        rows = [
            [name.replace("_", " "), f"{m['value']:.3f}", _interval(m)]
            for name, m in measured.items()
            if isinstance(m, dict) and m.get("value") is not None
        ]
        return table_html(f"Run {self.folder.name}", facts, [["measure", "value", "95 % interval"], *rows])


def fit(
    cohort: Cohort,
    config: RunConfig | None = None,
    *,
    out: str | Path,
    model: LocalClassifier | None = None,
    rasters: str | Path | None = None,
    workers: int = 0,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Prepare the slides that are not prepared, and train; the test part is not looked at.

    `model` is trained in place (default: the configuration's); `rasters` is the folder of prepared slides
    (default: in `out`). Slides that cannot be used are in `left_out`. Raises `HoloslideError`, whose notes name
    them where that may be why.
    """
    config, out = config or RunConfig(), Path(out)
    refuse_unfit(cohort, config, out, model=model)
    folder = Path(rasters) if rasters is not None else out / "rasters"
    given, cohort = cohort, cohort.with_splits(config.split)
    splits = cohort.how_split(given, config.split)
    prepared = prepare_cohort(cohort, folder, config.prepare, labels=True, workers=workers)
    with _reasons_told(prepared):
        result = train_run(
            prepared, config, out, model=model, splits=splits, resume=resume, progress=progress
        )
    return Run(out, result.best, result.best_epoch, tuple(prepared.left_out))


def evaluate(
    run: Run | str | Path, cohort: Cohort | None = None, *, split: str = "test", out: str | Path | None = None
) -> Evaluation:
    """Measure a run on a part of a cohort (default: its own), and write its report.

    The run's folder is for its test part; another part goes to `<run>/<split>`, unless `out` is given, and another
    cohort to `out`, with its prepared slides; `ConfigError` without one.
    """
    folder = run.folder if isinstance(run, Run) else Path(run)
    table = None if cohort is None else cohort.name
    place = place_of(folder, split, Path(out) if out is not None else None, table=table)
    # Slides of another cohort may bear the names of the run's own, whose place they must not take.
    home = folder if cohort is None else place
    cohort = cohort or Cohort.from_csv(folder / "cohort.csv")
    prepared = _prepare(cohort, Predictor(folder), rasters_of(home) or home / "rasters")
    with _reasons_told(prepared):
        return evaluate_run(folder, prepared, split=split, table=table, out=place)


def predict(
    run: Run | str | Path,
    slides: Cohort | Sequence[str | Path],
    out: str | Path,
    *,
    mpp: float | None = None,
    rasters: str | Path | None = None,
) -> int:
    """Score slides into a table; gives how many were scored. Raises `CohortError` if some could not be.

    They are prepared in `rasters` (default: for files as `default_rasters` says, as by the command; for a cohort
    a folder `scored` beside the table).
    """
    folder = run.folder if isinstance(run, Run) else Path(run)
    predictor = Predictor(folder)
    if isinstance(slides, Cohort):
        cohort, home = slides, Path(out).parent / SCORED
    else:
        paths = [Path(slide) for slide in slides]
        cohort, home = cohort_of(paths, mpp=mpp), default_rasters(next(iter(paths), Path(out)))
    prepared = _prepare(cohort, predictor, home if rasters is None else Path(rasters))
    count = predict_cohort(predictor, prepared, Path(out))
    if prepared.left_out:
        slide_id, reason = prepared.left_out[0]
        what = f"{len(prepared.left_out)} slides were left out, {slide_id} first ({reason})"
        raise CohortError(out, what, "the table has the others" if count else "none was scored")
    return count


def heatmap(
    run: Run | str | Path,
    slide: str | Path,
    *,
    mpp: float | None = None,
    rasters: str | Path | None = None,
) -> Heatmap:
    """The last head's attention and evidence on one slide, in register with level 0; the rest as `score`."""
    return score(run, slide, mpp=mpp, rasters=rasters).heatmap


def score(
    run: Run | str | Path,
    slide: str | Path,
    *,
    mpp: float | None = None,
    rasters: str | Path | None = None,
) -> Prediction:
    """One slide's prediction, `probabilities` by class, and the heatmaps of all heads, from one pass.

    `mpp`: the slide's microns per pixel, where it does not say. One of the run's own slides is scored as the run
    has it prepared; another is prepared in `rasters` (default: a folder `scored`, of the run or, of a model by
    itself, beside the slide). Raises `CohortError` if it cannot be used, or has the name of another slide there.
    """
    folder = run.folder if isinstance(run, Run) else Path(run)
    predictor = Predictor(folder)
    cohort, home = _alone(folder, Path(slide), mpp=mpp)
    prepared = _prepare(cohort, predictor, home if rasters is None else Path(rasters))
    for slide_id, reason in prepared.left_out:
        raise CohortError(slide_id, reason, "choose another slide")
    row = cohort.rows[0]
    return predictor.score(row, prepared.rasters[row.slide_id], prepared.recipes.get(row.slide_id))


@contextmanager
def _reasons_told(prepared: Prepared) -> Iterator[None]:
    """What goes wrong may be for want of slides that were left out: then the error's notes name them."""
    try:
        yield
    except HoloslideError as error:
        for slide_id, reason in prepared.left_out:
            error.add_note(f"left out: {slide_id}: {reason}")
        raise


def _alone(run: Path, slide: Path, *, mpp: float | None) -> tuple[Cohort, Path]:
    """A slide, and the folder for its raster: that of the run's own slides for one of them alone."""
    if mpp is None and (rasters := rasters_of(run)) is not None:
        table, file = Cohort.from_csv(run / "cohort.csv"), slide.resolve()
        rows = [row for row in table if row.path is not None and row.path.resolve() == file]
        if rows:
            return Cohort.from_rows(rows[:1]), rasters
    return cohort_of([slide], mpp=mpp), (run if run.is_dir() else slide.parent) / SCORED


def _interval(measure: dict[str, float | None]) -> str:
    low, high = measure["low"], measure["high"]
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _prepare(cohort: Cohort, predictor: Predictor, folder: Path) -> Prepared:
    return prepare_cohort(cohort, folder, predictor.prepare_config())
