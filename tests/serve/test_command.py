"""`holoslide serve` as a user starts and stops it."""

import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from holoslide import cli
from holoslide.errors import ConfigError
from holoslide.serve.server import make_viewer


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def command(run: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "holoslide", "serve", str(run), "--port", str(port)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def serving(run: Path, port: int) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command at work, and the line that it says."""
    piped = subprocess.PIPE
    with subprocess.Popen(command(run, port), stdout=piped, stderr=piped, text=True) as viewer:
        assert viewer.stdout is not None
        yield viewer, viewer.stdout.readline()


def test_it_serves_what_it_says_and_stops_when_it_is_told(finished_run: Path) -> None:
    port = free_port()
    with serving(finished_run, port) as (viewer, line):
        assert line == f"the viewer is at http://127.0.0.1:{port}/ (stop it with Ctrl+C)\n"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as page:
            assert b"<title>holoslide</title>" in page.read()
        viewer.send_signal(signal.SIGINT)
        out, err = viewer.communicate(timeout=60)
        assert (viewer.returncode, out, err) == (0, "", "")


def test_who_will_not_wait_ends_it_without_a_traceback(finished_run: Path) -> None:
    """A second Ctrl-C, while it waits for what a browser still sends, ended in uvicorn's."""
    port = free_port()
    with serving(finished_run, port) as (viewer, _):
        with socket.create_connection(("127.0.0.1", port)) as browser:
            browser.settimeout(30)
            browser.sendall(
                b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\nExpect: 100-continue\r\n\r\n"
            )
            assert browser.recv(100).startswith(b"HTTP/1.1 100 ")  # now it waits for what comes
            viewer.send_signal(signal.SIGINT)
            with suppress(ConnectionError):
                while True:  # until it has heard the first: two at once are one
                    socket.create_connection(("127.0.0.1", port)).close()
            viewer.send_signal(signal.SIGINT)
            out, err = viewer.communicate(timeout=60)
        assert (viewer.returncode, out, err.count("\n")) == (130, "", 1)
        assert err.startswith("holoslide: stopped; ")


def test_a_port_in_use_is_one_line_and_no_address_is_given(
    finished_run: Path, taken: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", command(finished_run, taken)[2:])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    told = (
        f"holoslide: --port {taken}: is in use on 127.0.0.1, perhaps by another viewer; "
        f"stop that one, or give another, such as --port {taken + 1}\n"
    )
    assert (stop.value.code, *capsys.readouterr()) == (1, "", told)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_an_address_that_is_not_of_this_machine_is_refused(finished_run: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=rf"--host {host}: .*such as 127\.0\.0\.1"):
        make_viewer(finished_run, host=host, port=0)
