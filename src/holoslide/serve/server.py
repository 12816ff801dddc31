"""Start the viewer: on loopback, unless told otherwise, and then with a token."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from holoslide.serve.app import make_app
from holoslide.serve.guard import Guard, is_loopback
from holoslide.serve.run import RunView

MAX_CONNECTIONS = 256


@dataclass(frozen=True, slots=True)
class Viewer:
    """A viewer that is ready to run; `url` is what to open, with the token where one is needed."""

    url: str
    server: uvicorn.Server

    def run(self) -> None:
        """Serve until interrupted."""
        self.server.run()


def make_viewer(
    run: Path, *, host: str = "127.0.0.1", port: int = 8765, rasters: Path | None = None
) -> Viewer:
    """A viewer of a run's folder. A host that other machines can reach gets a token, new at each start."""
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    app = Guard(make_app(RunView(run, rasters)), host=host, token=token)
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", access_log=False, server_header=False,
        limit_concurrency=MAX_CONNECTIONS, timeout_keep_alive=30,
    )  # fmt: skip
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
    return Viewer(url, uvicorn.Server(config))
