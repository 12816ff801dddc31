"""The commands that show a run to others: `export` for other programs, `serve` for people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holoslide.cli_options import (
    MasksOption,
    RastersOption,
    SlideMppOption,
    SlidesOption,
    WorkersOption,
    report_left_out,
    with_masks,
)


def export(
    run: Annotated[Path, typer.Argument(help="A run's folder, a saved model's, or hub:owner/name.")],
    sources: Annotated[
        list[Path] | None,
        typer.Argument(help="A slide table (CSV), or slide files (default: the run's own table)."),
    ] = None,
    to: Annotated[
        str, typer.Option("--to", help="Any of geojson, ome-tiff, h5, csv, onnx, model; comma between.")
    ] = "geojson,ome-tiff,h5,csv",
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write into.")] = Path("export"),
    share: Annotated[
        float, typer.Option("--share", help="Hot regions hold this share of the evidence (geojson).")
    ] = 0.5,
    crop: Annotated[
        bool,
        typer.Option(
            "--crop/--no-crop",
            help="Show the scanned part of a slide, or all of it, as QuPath does with its own --no-crop "
            "(geojson, ome-tiff).",
        ),
    ] = True,
    slides: SlidesOption = None,
    masks: MasksOption = None,
    rasters: RastersOption = None,
    slide_mpp: SlideMppOption = None,
    workers: WorkersOption = 0,
) -> None:
    """Write files for QuPath (geojson, ome-tiff), CLAM (h5, csv) and others (onnx, model)."""
    from holoslide.console import Bar
    from holoslide.exports import OF_MODEL, OF_SLIDES, checked_kinds, export_model, export_slides
    from holoslide.inference.export import checked_share
    from holoslide.predictions import Predictor
    from holoslide.prepared import cohort_of, default_rasters, prepare_cohort
    from holoslide.runs import rasters_of

    kinds, share = checked_kinds(to), checked_share(share)
    predictor = Predictor(run)
    if set(kinds) & set(OF_MODEL):
        for path in export_model(predictor, run, out, kinds):
            typer.echo(str(path))
    if not set(kinds) & set(OF_SLIDES):
        return
    tables = sources or [run / "cohort.csv"]
    cohort = with_masks(cohort_of(tables, slides=slides, mpp=slide_mpp), masks)
    folder = rasters or (None if sources else rasters_of(run)) or default_rasters(tables[0])
    with Bar("preparing") as advance:
        prepared = prepare_cohort(
            cohort, folder, predictor.prepare_config(), workers=workers, progress=advance
        )
    with Bar("exporting") as advance:
        count = export_slides(predictor, prepared, out, kinds, share=share, crop=crop, progress=advance)
    typer.echo(f"{count} slides exported: {out}")
    report_left_out(prepared)


def serve(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; other machines' need a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 8765,
    rasters: RastersOption = None,
) -> None:
    """Look at a run in a browser: slides, predictions, heatmaps; write notes and corrected labels."""
    from holoslide.runs import rasters_of
    from holoslide.serve.server import make_viewer

    viewer = make_viewer(run, host=host, port=port, rasters=rasters or rasters_of(run))
    viewer.run(ready=lambda: typer.echo(f"the viewer is at {viewer.url} (stop it with Ctrl+C)"))
