"""Start the viewer: on loopback, unless told otherwise, and then with a token."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from holoslide.errors import ConfigError
from holoslide.serve.app import make_app
from holoslide.serve.guard import Guard, is_loopback
from holoslide.serve.run import LiveRun

MAX_CONNECTIONS = 256


class _Server(uvicorn.Server):
    """Says when it serves, and on a second Ctrl-C waits for nobody."""

    ready: Callable[[], None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.ready is not None:
            self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self.force_exit:
            # What is cut off would be told as an error of the app.
            logging.getLogger("uvicorn.error").disabled = True
            asyncio.get_running_loop().call_soon_threadsafe(self._cut_off)  # and wakes it

    def _cut_off(self) -> None:
        """Since Python 3.12 asyncio's server, which uvicorn closes last, waits for every connection."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


@dataclass(frozen=True, slots=True)
class Viewer:
    """A viewer that holds its port; `url` is what to open, with the token where one is needed."""

    url: str
    port: int
    server: _Server
    listener: socket.socket

    def run(self, ready: Callable[[], None] | None = None) -> None:
        """Serve until interrupted; `ready` is called as soon as the page can be fetched.

        Raises KeyboardInterrupt where a second one cut off what the first still waited for.
        """
        self.server.ready = ready
        with self.listener:
            with suppress(KeyboardInterrupt):  # uvicorn shuts down in order, then raises it again
                self.server.run(sockets=[self.listener])
            if self.server.force_exit:
                raise KeyboardInterrupt


def make_viewer(
    run: Path, *, host: str = "127.0.0.1", port: int = 8765, rasters: Path | None = None
) -> Viewer:
    """A viewer of a run's folder; port 0 is any that is free. ConfigError where nobody can listen there.

    A host that other machines can reach gets a token, new at each start.
    """
    token = None if is_loopback(host) else secrets.token_urlsafe(24)
    app = Guard(make_app(LiveRun(run, rasters)), host=host, token=token)
    listener = _listen(host, port)
    port = listener.getsockname()[1]
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", access_log=False, server_header=False,
        limit_concurrency=MAX_CONNECTIONS, timeout_keep_alive=30,
        lifespan="off",  # the app has none, and a second Ctrl-C would end it in a traceback
    )  # fmt: skip
    shown = _shown(host)
    url = f"http://{shown}:{port}/" + (f"?token={token}" if token else "")
    return Viewer(url, port, _Server(config), listener)


def _shown(host: str) -> str:
    """A host as it stands in an address; who listens everywhere is found by this machine's name."""
    try:
        everywhere = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        everywhere = False
    if everywhere:
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        what = f"is no address of this machine ({error.strerror})"
        raise ConfigError(f"--host {host}", what, "give one, such as 127.0.0.1") from error
    family, *_, address = min(found, key=lambda each: each[0] != socket.AF_INET)  # localhost may be both
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise _refused(host, port, error) from error


def _refused(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        what = f"is in use on {host}, perhaps by another viewer"
        return ConfigError(
            f"--port {port}", what, f"stop that one, or give another, such as --port {port + 1}"
        )
    if error.errno == errno.EACCES:
        return ConfigError(f"--port {port}", "is not yours to listen on", "give one from 1024 on")
    what = f"cannot be listened on ({os.strerror(error.errno or 0)})"
    return ConfigError(f"--host {host}", what, "give an address of this machine, such as 127.0.0.1")
