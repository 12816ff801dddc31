"""The viewer's server: a few addresses, each looked up in a table; nothing of a request ever becomes a path.

| address | answer |
| --- | --- |
| `/`, `/static/<name>` | the page and its parts, from a fixed list |
| `/api/run` | the run, its classes and modules, all slides with their last review |
| `/api/slides/<id>` | size, um per pixel, layers, probabilities by module, reviews |
| `/api/slides/<id>/tiles/<z>/<y>/<x>.jpg` | the slide itself |
| `/api/slides/<id>/layers/<name>.png`, `.f32` | a layer's colours, and its raw scores |
| `/api/slides/<id>/outline` | the tissue |
| `POST /api/slides/<id>/reviews` | a note and a corrected label |
"""

from __future__ import annotations

import unicodedata
from dataclasses import asdict
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints
from pydantic_core import PydanticCustomError

from holoslide.errors import HoloslideError
from holoslide.inference.layers import Layer
from holoslide.serve.reviews import Review, Reviews
from holoslide.serve.run import RunView
from holoslide.serve.tiles import TILE_PX, Tile, TileStore

STATIC = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "deepzoom.js": "text/javascript; charset=utf-8",
    "pane.js": "text/javascript; charset=utf-8",
    "list.js": "text/javascript; charset=utf-8",
    "review.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_KEEP = {"cache-control": "private, max-age=3600"}  # tiles do not change while a run is looked at
_FRESH = {"cache-control": "no-store"}


def _one_line(text: str) -> str:
    return _plain(text, allowed="")


def _lines(text: str) -> str:
    """Lines end in LF, whatever the reviewer's system ends them in."""
    return _plain(text.replace("\r\n", "\n").replace("\r", "\n"), allowed="\n\t")


def _plain(text: str, *, allowed: str) -> str:
    """Refuse what no keyboard writes, and other programs read a table wrongly by."""
    wrong = next((sign for sign in text if unicodedata.category(sign) == "Cc" and sign not in allowed), None)
    if wrong is not None:
        code = f"U+{ord(wrong):04X}"
        raise PydanticCustomError(
            "control", "holds the control character {code}; take it out", {"code": code}
        )
    return text


class ReviewIn(BaseModel):
    """What a reviewer sends."""

    model_config = ConfigDict(extra="forbid")

    reviewer: Annotated[
        str,
        StringConstraints(strip_whitespace=True, min_length=1, max_length=80),
        AfterValidator(_one_line),
    ]
    label: Annotated[str, StringConstraints(max_length=200)] = ""
    note: Annotated[str, StringConstraints(max_length=10_000), AfterValidator(_lines)] = ""


def make_app(run: RunView) -> FastAPI:
    """The viewer of a run, without the gate before it: see `guard.py`. SlideError for unreadable reviews."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    files = {row.slide_id: (row.path, row.mpp) for row in run.rows.values() if row.path is not None}
    tiles, reviews = TileStore(files), Reviews(run.folder)
    _serve_page(app)
    _serve_facts(app, run, tiles, reviews)
    _serve_tiles(app, run, tiles)
    _serve_layers(app, run)
    _take_reviews(app, run, reviews)
    _tell_errors(app)
    return app


def _serve_page(app: FastAPI) -> None:
    pages = {name: _static(name) for name in STATIC}

    @app.get("/")
    def page() -> Response:
        return Response(pages["index.html"], media_type=STATIC["index.html"], headers=_FRESH)

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in pages:
            raise HTTPException(404, "there is no such file")
        return Response(pages[name], media_type=STATIC[name], headers=_FRESH)


def _serve_facts(app: FastAPI, run: RunView, tiles: TileStore, reviews: Reviews) -> None:
    @app.get("/api/run")
    def overview() -> Response:
        written = reviews.all()
        slides = [{**line, "review": _last(written.get(line["id"], []))} for line in run.slides()]
        facts = {
            "name": run.folder.resolve().name,
            "key": run.key,
            "classes": run.classes,
            "modules": run.modules,
            "repeats": run.repeats and f"{len(run.trainings)} {run.repeats}",
            "tile_px": TILE_PX,
            "slides": slides,
        }
        return JSONResponse(facts, headers=_FRESH)

    @app.get("/api/slides/{slide_id}")
    def slide(slide_id: str) -> Response:
        _known(run, slide_id)
        facts: dict[str, Any] = {"id": slide_id, "error": None, "picture": None}
        try:
            facts["picture"] = _picture(tiles, slide_id)
        except HoloslideError as error:  # the page shows it in the picture's place
            facts["error"] = str(error)
        except KeyError:
            facts["error"] = (
                f"{slide_id}: its file is not where it was; mend the path in the run's cohort.csv"
            )
        facts["layers"] = [layer.facts() for layer in run.layers(slide_id).values()]
        facts["modules"] = run.probabilities(slide_id)
        facts |= run.source(slide_id)
        facts["reviews"] = [asdict(review) for review in reviews.of(slide_id)]
        return JSONResponse(facts, headers=_FRESH)


def _serve_tiles(app: FastAPI, run: RunView, tiles: TileStore) -> None:
    def jpeg(slide_id: str, wanted: Tile | None) -> Response:
        """Without a tile, the one that shows the whole slide."""
        _known(run, slide_id)
        if run.rows[slide_id].path is None:
            raise HTTPException(404, "the slide's file is missing")
        one = wanted or Tile(tiles.slide(slide_id).levels - 1, 0, 0)
        return Response(tiles.jpeg(slide_id, one), media_type="image/jpeg", headers=_KEEP)

    @app.get("/api/slides/{slide_id}/tiles/{z}/{y}/{x}.jpg")
    def tile(slide_id: str, z: int, y: int, x: int) -> Response:
        return jpeg(slide_id, Tile(z, y, x))

    @app.get("/api/slides/{slide_id}/thumbnail.jpg")
    def thumbnail(slide_id: str) -> Response:
        return jpeg(slide_id, None)


def _serve_layers(app: FastAPI, run: RunView) -> None:
    @app.get("/api/slides/{slide_id}/legends/{name}.png")
    def legend(slide_id: str, name: str) -> Response:
        return Response(_layer(run, slide_id, name).legend_png(), media_type="image/png", headers=_KEEP)

    @app.get("/api/slides/{slide_id}/layers/{name}.png")
    def layer_picture(slide_id: str, name: str) -> Response:
        return Response(_layer(run, slide_id, name).png(), media_type="image/png", headers=_KEEP)

    @app.get("/api/slides/{slide_id}/layers/{name}.f32")
    def layer_values(slide_id: str, name: str) -> Response:
        content = _layer(run, slide_id, name).raw()
        return Response(content, media_type="application/octet-stream", headers=_KEEP)

    @app.get("/api/slides/{slide_id}/outline")
    def outline(slide_id: str) -> Response:
        _known(run, slide_id)
        return JSONResponse(run.outline(slide_id), headers=_KEEP)


def _take_reviews(app: FastAPI, run: RunView, reviews: Reviews) -> None:
    @app.post("/api/slides/{slide_id}/reviews")
    def review(slide_id: str, sent: ReviewIn) -> Response:
        _known(run, slide_id)
        if sent.label and sent.label not in run.classes:
            raise HTTPException(422, "the label is no class of this run")
        try:
            added = reviews.add(slide_id, reviewer=sent.reviewer, label=sent.label, note=sent.note)
        except OSError as error:
            raise HTTPException(507, f"it cannot be written: {error.strerror}") from error
        return JSONResponse(asdict(added), status_code=201, headers=_FRESH)


def _tell_errors(app: FastAPI) -> None:
    @app.exception_handler(HoloslideError)
    async def wrong(_: Request, error: HoloslideError) -> Response:
        return JSONResponse({"error": str(error)}, status_code=404, headers=_FRESH)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, status_code=error.status_code, headers=_FRESH)

    @app.exception_handler(RequestValidationError)
    async def unfit(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        why = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
        return JSONResponse({"error": why}, status_code=422, headers=_FRESH)


def _static(name: str) -> bytes:
    return resources.files("holoslide.serve").joinpath("static", name).read_bytes()


def _known(run: RunView, slide_id: str) -> None:
    if slide_id not in run.rows:
        raise HTTPException(404, "this run has no such slide")


def _layer(run: RunView, slide_id: str, name: str) -> Layer:
    _known(run, slide_id)
    layers = run.layers(slide_id)
    if name not in layers:
        raise HTTPException(404, "this slide has no such layer")
    return layers[name]


def _last(written: list[Review]) -> dict[str, str] | None:
    return asdict(written[-1]) if written else None


def _picture(tiles: TileStore, slide_id: str) -> dict[str, Any]:
    """What the page needs to draw the slide; its pixels are square, those of level 0 need not be."""
    slide = tiles.slide(slide_id)
    return {
        "height": slide.shape[0],
        "width": slide.shape[1],
        "levels": slide.levels,
        "mpp": slide.base_mpp,
        "height_l0": slide.shape_l0[0],
        "width_l0": slide.shape_l0[1],
        "px_per_l0": [slide.mpp_yx[0] / slide.base_mpp, slide.mpp_yx[1] / slide.base_mpp],
    }
