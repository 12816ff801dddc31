"""How fast the viewer is: tiles a second, and how long until the first picture of a slide.

    python -m benchmarks.viewer RUN NAME --full

`holoslide serve RUN` in a process of its own, and on the same cores clients with a connection each.

tiles_s_cold         tiles a second with `--clients` clients, each tile asked for once: decoded, cut, compressed.
tiles_s_warm         the same tiles again.
first_server_s       from the first request to the coarsest tile of a slide that was not opened before: page, list
                     of slides, facts, tile; median over slides.
first_browser_s      in Chromium, from the address to all that is in sight drawn, in a context without a cache;
                     median over slides. `_again_s` from one slide to the next within the page.

Goals: 60 tiles a second, and the first picture within a second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from threading import local
from typing import Any

from benchmarks.common import Figure, Options, Result, main

Ask = Callable[[str], bytes]


@contextmanager
def served(run: Path) -> Iterator[int]:
    """The viewer of a run, in a process of its own; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "holoslide", "serve", str(run), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 60
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None, "the viewer did not start"
                assert time.monotonic() < until, "the viewer did not start in a minute"
                time.sleep(0.05)
            yield port
        finally:
            process.terminate()


def client(port: int) -> Ask:
    """Asks over one connection for each thread."""
    mine = local()

    def ask(path: str) -> bytes:
        if not hasattr(mine, "connection"):
            mine.connection = HTTPConnection("127.0.0.1", port, timeout=60)
        mine.connection.request("GET", path)
        answer = mine.connection.getresponse()
        body: bytes = answer.read()
        assert answer.status == 200, f"{path}: {answer.status}"
        return body

    return ask


def first_pictures(ask: Ask, slides: list[str]) -> list[float]:
    """Seconds for each of some slides, which the server opens for it."""
    seconds = []
    for slide in slides:
        started = time.perf_counter()
        ask("/")
        ask("/api/run")
        ask(f"/api/slides/{slide}")
        ask(f"/api/slides/{slide}/thumbnail.jpg")
        seconds.append(time.perf_counter() - started)
    return seconds


def tile_paths(ask: Ask, slide: str, side: int) -> list[str]:
    """All tiles of a slide, finest first."""
    picture: dict[str, Any] = json.loads(ask(f"/api/slides/{slide}"))["picture"]
    paths = []
    for z in range(picture["levels"]):
        height, width = (max(1, -(-picture[key] // 2**z)) for key in ("height", "width"))
        paths += [
            f"/api/slides/{slide}/tiles/{z}/{y}/{x}.jpg"
            for y in range(-(-height // side))
            for x in range(-(-width // side))
        ]
    return paths


def rate(ask: Ask, paths: list[str], clients: int) -> float:
    """Tiles a second."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(ask, paths))
    return len(paths) / (time.perf_counter() - started)


def in_browser(port: int, slides: list[str]) -> dict[str, Figure]:
    """Seconds to the first picture in Chromium; nothing where there is none."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        return {"first_browser_s": None, "first_browser_again_s": None}
    from playwright.sync_api import sync_playwright

    first, again = list[float](), list[float]()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for slide, following in pairwise(slides):
            context = browser.new_context(viewport={"width": 1440, "height": 900})
            page = context.new_page()
            for name, into in ((slide, first), (following, again)):
                started = time.perf_counter()
                page.goto(f"http://127.0.0.1:{port}/#slide={name}")
                page.wait_for_function(
                    "name => document.querySelector('#slide-title')?.textContent === name &&"
                    " document.querySelector('canvas[data-ready=yes]')",
                    arg=name,
                )
                into.append(time.perf_counter() - started)
            context.close()
        browser.close()
    return {
        "first_browser_s": round(statistics.median(first), 3),
        "first_browser_again_s": round(statistics.median(again), 3),
    }


def measure(options: Options) -> Result:
    """The rates and the waits."""
    values = options.values
    with served(Path(values["run"])) as port:
        ask = client(port)
        overview = json.loads(ask("/api/run"))
        slides = [line["id"] for line in overview["slides"]]
        some = slides[: 4 if options.quick else 12]
        first = first_pictures(ask, some)
        paths = [path for slide in some for path in tile_paths(ask, slide, overview["tile_px"])]
        paths = paths[: 400 if options.quick else 4000]
        cold, warm = (rate(ask, paths, values["clients"]) for _ in range(2))
    with served(Path(values["run"])) as port:
        browser = in_browser(port, some)
    figures: dict[str, Figure] = {
        "tiles_s_cold": round(cold, 1),
        "tiles_s_warm": round(warm, 1),
        "first_server_s": round(statistics.median(first), 3),
        **browser,
        "tiles": len(paths),
    }
    return Result(
        figures=figures,
        configuration={"clients": values["clients"], "slides": len(some)},
        variant=values["name"],
    )


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("name", help="goes into the name of the result file")
    parser.add_argument("--clients", type=int, default=8, metavar="N", help="at a time (8)")


if __name__ == "__main__":
    main("viewer", __doc__, measure, add_arguments=_arguments)
