"""A viewer as it really runs, on a port of its own, and requests that reach it byte for byte."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from holoslide.runs import rasters_of
from holoslide.serve.server import make_viewer


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Served:
    """A running viewer."""

    url: str
    port: int

    def ask(
        self,
        path: str,
        *,
        method: str = "GET",
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send a request as it is written: a path is not tidied, and a Host header is not put right."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            given = {"Host": f"127.0.0.1:{self.port}", **(headers or {})}
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            if body is not None:
                given.setdefault("Content-Length", str(len(body)))
            for name, value in given.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def write(self, slide_id: str, sent: object, **headers: str) -> Answer:
        """Send a review as the page does."""
        body = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
        given = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        return self.ask(f"/api/slides/{slide_id}/reviews", method="POST", body=body, headers=given)


@contextmanager
def serving(run: Path, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[Served]:
    """Serve a run from a thread of this process, on any free port unless one is given."""
    viewer = make_viewer(run, host=host, port=port, rasters=rasters_of(run))
    thread = threading.Thread(target=viewer.run, daemon=True)
    thread.start()
    try:
        until = time.monotonic() + 60
        while not viewer.server.started:
            assert thread.is_alive(), "the viewer did not start"
            assert time.monotonic() < until, "the viewer did not start in a minute"
            time.sleep(0.02)
        yield Served(viewer.url, viewer.port)
    finally:
        viewer.server.should_exit = True
        thread.join(30)
