"""What a run gives to other programs: files for each slide, and the model by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from holoslide.errors import ConfigError, SlideError
from holoslide.inference.card import escaped, model_card
from holoslide.inference.export import Exported, write_geojson, write_h5
from holoslide.inference.export_onnx import export_onnx
from holoslide.inference.export_tiff import write_ome_tiff
from holoslide.predictions import Prediction, Predictor, predictions_of, write_scored
from holoslide.prepared import Advance, Prepared
from holoslide.runs import read_json
from holoslide.slides.raster import Raster

OF_SLIDES = ("geojson", "ome-tiff", "h5", "csv")
OF_MODEL = ("onnx", "model")
_Writer = tuple[str, Callable[[Path, Exported], None]]
_WRITERS: dict[str, _Writer] = {
    "ome-tiff": ("-heatmap.ome.tif", write_ome_tiff),
    "h5": (".h5", write_h5),
}


def checked_kinds(to: str) -> list[str]:
    """The kinds of file that a comma-separated list names; ConfigError for another."""
    kinds = [kind.strip() for kind in to.split(",") if kind.strip()]
    known = (*OF_SLIDES, *OF_MODEL)
    for kind in kinds:
        if kind not in known:
            raise ConfigError(f"--to {to}", f"{kind} is no export", f"choose among {', '.join(known)}")
    if not kinds:
        raise ConfigError("--to", "names nothing", f"choose among {', '.join(known)}")
    return kinds


def export_model(predictor: Predictor, run: Path, out: Path, kinds: Sequence[str]) -> list[Path]:
    """The model as ONNX, or as a folder that a hub takes: weights, settings and a card."""
    out.mkdir(parents=True, exist_ok=True)
    judged = judgement_of(run)
    card = model_card(predictor.model, title=run.resolve().name, run=run if run.is_dir() else None)
    card += _judged(judged)
    written = []
    if "model" in kinds:
        folder = out / "model"
        predictor.model.save(folder)
        (folder / "config.yaml").write_text(predictor.config.to_yaml(), encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")
        written.append(folder)
    if "onnx" in kinds:
        written.append(export_onnx(predictor.model, out, card=card, more=judged))
    return written


def judgement_of(run: Path) -> dict[str, Any]:
    """What a run's validation slides told of its model, as far as the run's last evaluation has it.

    `temperature`; and, to decide between two classes, `positive`, `threshold` and `sensitivity`.
    """
    measured = read_json(run / "metrics.json")
    temperature = ((measured.get("calibration") or {}).get("temperature") or {}).get("value")
    judged = {} if temperature is None else {"temperature": temperature}
    if decision := measured.get("decision"):
        threshold = decision["threshold"]["value"]
        judged |= {
            "positive": decision["positive"],
            "threshold": threshold,
            "sensitivity": decision["wanted"],
        }
    return judged


def _judged(judged: Mapping[str, Any]) -> str:
    lines = []
    if "threshold" in judged:
        line = "A slide is called {positive} where its raw probability is {threshold!r} or more, which finds "
        line += "{sensitivity:g} or more of such validation slides."
        lines.append(line.format_map({**judged, "positive": escaped(judged["positive"])}))
    if "temperature" in judged:
        line = "Logits divided by {temperature!r} are calibrated on the validation slides."
        lines.append(line.format_map(judged))
    return "\n## Decision and temperature\n\n" + "\n".join(lines) + "\n" if lines else ""


def export_slides(
    predictor: Predictor,
    prepared: Prepared,
    out: Path,
    kinds: Sequence[str],
    *,
    share: float = 0.5,
    crop: bool = True,
    progress: Advance | None = None,
) -> int:
    """Score slides and write the files of each; gives how many. A slide that fails is added to those left out.

    `share` decides the hot regions, see `write_geojson`. What QuPath reads shows the part of a slide that was
    scanned, as QuPath does, or with `crop` off the whole slide. Heatmaps are let go once their files are
    written.
    """
    out.mkdir(parents=True, exist_ok=True)
    classes, model = predictor.model.classes, predictor.weights_sha256()
    table: list[dict[str, str]] = []
    clams: list[dict[str, str]] = []
    for done, row in enumerate(prepared.cohort, start=1):
        try:
            one = predictor.score(row, prepared.rasters[row.slide_id], prepared.recipes.get(row.slide_id))
            _write_files(one, out, kinds, share=share, crop=crop, model=model)
            table += [each.row(classes) for each in predictions_of([one])]
            clams += clam_table([one], classes)
        except SlideError as error:
            prepared.left_out.append((row.slide_id, str(error)))
        if progress is not None:
            progress(done, len(prepared.cohort), row.slide_id)
    if "csv" in kinds:
        write_scored(table, out / "predictions.csv")
        write_scored(clams, out / "predictions-clam.csv")
    return len(table)


def clam_table(scored: Sequence[Prediction], classes: Sequence[str]) -> list[dict[str, str]]:
    """Rows as in CLAM's fold files, `slide_id, Y, Y_hat, p_0, p_1...`: classes by number; Y empty if not known."""
    rows = []
    for one in scored:
        label, probabilities = one.row.label or "", one.scores.probabilities[-1]
        rows.append(
            {
                "slide_id": one.row.slide_id,
                "Y": str(list(classes).index(label)) if label in classes else "",
                "Y_hat": str(int(probabilities.argmax())),
                **{f"p_{k}": repr(float(p)) for k, p in enumerate(probabilities)},
            }
        )
    return rows


def _write_files(
    one: Prediction, out: Path, kinds: Sequence[str], *, share: float, crop: bool, model: str
) -> None:
    with Raster.open(one.raster) as raster:
        slide = Exported.of(one.heatmap, raster.record, one.prediction, crop=crop, model=model)
    writers: dict[str, _Writer] = {**_WRITERS, "geojson": (".geojson", partial(write_geojson, share=share))}
    for kind in kinds:
        if kind in writers:
            suffix, write = writers[kind]
            write(out / f"{slide.slide_id}{suffix}", slide)
