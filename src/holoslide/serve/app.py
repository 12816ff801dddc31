"""The viewer's server: a few addresses, each looked up in a table; nothing of a request ever becomes a path.

| address | answer |
| --- | --- |
| `/`, `/static/<name>` | the page and its parts, from a fixed list |
| `/api/run` | the run, its classes and modules, all slides with each reviewer's last word, those left out |
| `/api/slides/<id>` | size, um per pixel, layers, probabilities by module, reviews |
| `/api/slides/<id>/tiles/<z>/<y>/<x>.jpg` | the slide itself |
| `/api/slides/<id>/layers/<name>.png`, `.f32` | a layer's colours, and its raw scores |
| `/api/slides/<id>/outline` | the tissue |
| `POST /api/slides/<id>/reviews` | a note and a corrected label |

A run may be evaluated again, and another be served at the same address, while a page is open. So each request of
the page names the state of the run that it shows, as `?run=`, and is refused when that is another; and what the
browser keeps, it asks about before it shows it again.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Hashable
from dataclasses import asdict
from importlib import metadata, resources
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, StringConstraints
from pydantic_core import PydanticCustomError

from holoslide.errors import HoloslideError, SlideError
from holoslide.inference.layers import Layer
from holoslide.serve.reviews import Reviews, latest
from holoslide.serve.run import LiveRun, RunView
from holoslide.serve.tiles import TILE_PX, Source, Tile, TileStore

STATIC = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "ask.js": "text/javascript; charset=utf-8",
    "deepzoom.js": "text/javascript; charset=utf-8",
    "pane.js": "text/javascript; charset=utf-8",
    "list.js": "text/javascript; charset=utf-8",
    "review.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
_VERSION = metadata.version("holoslide")  # another may draw otherwise
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


def make_app(run: LiveRun) -> FastAPI:
    """The viewer of a run, without the gate before it: see `guard.py`. SlideError for unreadable reviews."""

    def same_run(asked: Annotated[str, Query(alias="run")] = "") -> None:
        if asked and asked != run.now().state:
            raise HTTPException(409, "the run has changed since this page was opened: reload the page")

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(same_run)])
    tiles, reviews = TileStore(), Reviews(run.folder)
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


def _serve_facts(app: FastAPI, run: LiveRun, tiles: TileStore, reviews: Reviews) -> None:
    @app.get("/api/run")
    def overview() -> Response:
        view, written = run.now(), reviews.all()
        lines = view.slides()
        for line in lines:
            line["reviews"] = [asdict(review) for review in latest(written.get(line["id"], []))]
        facts = {
            "name": view.folder.resolve().name,
            "key": view.key,
            "state": view.state,
            "classes": view.classes,
            "modules": view.modules,
            "repeats": view.repeats and f"{len(view.trainings)} {view.repeats}",
            "tile_px": TILE_PX,
            "slides": lines,
            "left_out": [{"id": slide_id, "reason": reason} for slide_id, reason in view.left_out.items()],
        }
        return JSONResponse(facts, headers=_FRESH)

    @app.get("/api/slides/{slide_id}")
    def slide(slide_id: str) -> Response:
        view = _with_slide(run, slide_id)
        facts: dict[str, Any] = {"id": slide_id, "error": None, "picture": None}
        try:
            facts["picture"] = _picture(tiles, _source(view, slide_id))
        except HoloslideError as error:  # the page shows it in the picture's place
            facts["error"] = str(error)
        layers = view.layers(slide_id)
        facts["layers"] = [layer.facts() for layer in layers.by_name.values()]
        facts["faults"] = layers.faults
        facts["modules"] = view.probabilities(slide_id)
        facts |= view.source(slide_id)
        facts["reviews"] = [asdict(review) for review in reviews.of(slide_id)]
        return JSONResponse(facts, headers=_FRESH)


def _serve_tiles(app: FastAPI, run: LiveRun, tiles: TileStore) -> None:
    def jpeg(request: Request, slide_id: str, wanted: Tile | None) -> Response:
        """Without a tile, the one that shows the whole slide."""
        source = _source(_with_slide(run, slide_id), slide_id)

        def make() -> bytes:
            return tiles.jpeg(source, wanted or Tile(tiles.slide(source).levels - 1, 0, 0))

        return _kept(request, source, make, "image/jpeg")

    @app.get("/api/slides/{slide_id}/tiles/{z}/{y}/{x}.jpg")
    def tile(request: Request, slide_id: str, z: int, y: int, x: int) -> Response:
        return jpeg(request, slide_id, Tile(z, y, x))

    @app.get("/api/slides/{slide_id}/thumbnail.jpg")
    def thumbnail(request: Request, slide_id: str) -> Response:
        return jpeg(request, slide_id, None)


def _serve_layers(app: FastAPI, run: LiveRun) -> None:
    def of_layer(
        request: Request, slide_id: str, name: str, make: Callable[[Layer], bytes], kind: str
    ) -> Response:
        view = _with_slide(run, slide_id)
        layer = view.layers(slide_id).by_name.get(name)
        if layer is None:
            raise HTTPException(404, "this slide has no such layer")
        stamp = view.key, view.layers_stamp(slide_id)
        return _kept(request, stamp, lambda: make(layer), kind)

    @app.get("/api/slides/{slide_id}/legends/{name}.png")
    def legend(request: Request, slide_id: str, name: str) -> Response:
        return of_layer(request, slide_id, name, Layer.legend_png, "image/png")

    @app.get("/api/slides/{slide_id}/layers/{name}.png")
    def layer_picture(request: Request, slide_id: str, name: str) -> Response:
        return of_layer(request, slide_id, name, Layer.png, "image/png")

    @app.get("/api/slides/{slide_id}/layers/{name}.f32")
    def layer_values(request: Request, slide_id: str, name: str) -> Response:
        return of_layer(request, slide_id, name, Layer.raw, "application/octet-stream")

    @app.get("/api/slides/{slide_id}/outline")
    def outline(request: Request, slide_id: str) -> Response:
        view = _with_slide(run, slide_id)
        stamp = str(view.rasters), view.outline_stamp(slide_id)
        return _kept(request, stamp, lambda: json.dumps(view.outline(slide_id)).encode(), "application/json")


def _take_reviews(app: FastAPI, run: LiveRun, reviews: Reviews) -> None:
    @app.post("/api/slides/{slide_id}/reviews")
    def review(slide_id: str, sent: ReviewIn) -> Response:
        view = _with_slide(run, slide_id)
        if sent.label and sent.label not in view.classes:
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


def _with_slide(run: LiveRun, slide_id: str) -> RunView:
    """The run as it is now, which must have the slide."""
    view = run.now()
    if slide_id not in view.rows:
        raise HTTPException(404, "this run has no such slide")
    return view


def _source(view: RunView, slide_id: str) -> Source:
    row = view.rows[slide_id]
    source = None if row.path is None else Source.of(row.path, row.mpp)
    if source is None:
        raise SlideError(slide_id, "its file is not where it was", "mend the path in the run's cohort.csv")
    return source


def _kept(request: Request, stamp: Hashable, make: Callable[[], bytes], kind: str) -> Response:
    """What the browser keeps, and asks about each time; `make` it where the browser's has another stamp."""
    tag = f'"{hashlib.sha256(repr((_VERSION, request.url.path, stamp)).encode()).hexdigest()[:32]}"'
    headers = {"cache-control": "private, no-cache", "etag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(make(), media_type=kind, headers=headers)


def _picture(tiles: TileStore, source: Source) -> dict[str, Any]:
    """What the page needs to draw the slide; its pixels are square, those of level 0 need not be."""
    slide = tiles.slide(source)
    return {
        "height": slide.shape[0],
        "width": slide.shape[1],
        "levels": slide.levels,
        "mpp": slide.base_mpp,
        "height_l0": slide.shape_l0[0],
        "width_l0": slide.shape_l0[1],
        "px_per_l0": [slide.mpp_yx[0] / slide.base_mpp, slide.mpp_yx[1] / slide.base_mpp],
    }
