"""Who may ask the viewer, and for what: only itself, only so much, and never a file by its path."""

import http.client
import json
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.serve.served import Served, serving

TRAVERSALS = [
    "/static/../app.py",
    "/static/..%2fapp.py",
    "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
    "/static/%2e%2e%2fapp.py",
    "/static/..%252fapp.py",
    "/static/..%5capp.py",
    "/static//etc/passwd",
    "/../../../../etc/passwd",
    "//etc/passwd",
    "/api/slides/..%2f..%2fcohort.csv",
    "/api/slides/%2e%2e/outline",
    "/api/slides/..%2fheatmaps%2ffocus-001/outline",
    "/api/slides/%2fetc%2fpasswd/tiles/0/0/0.jpg",
    "/api/slides/focus-001/layers/..%2f..%2fattention-1.png",
    "/api/slides/focus-001/layers/%2e%2e/%2e%2e/cohort.csv",
    "/api/slides/focus-001/tiles/0/0/..%2f..%2f0.jpg",
    "/api/slides/focus-001%00/outline",
    "/api/slides/focus-001/layers/attention-1%00.png",
]


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_path_of_a_request_reaches_the_file_system(viewer: Served, path: str) -> None:
    answer = viewer.ask(path)
    assert answer.status in (404, 422)
    assert set(answer.json) <= {"error", "detail"}
    assert b"root:" not in answer.body
    assert b"slide_id" not in answer.body


def test_the_tables_and_the_model_are_not_served(viewer: Served) -> None:
    for name in ("cohort.csv", "reviews.csv", "best/model.safetensors", "run.json", "static/app.py", "docs"):
        assert viewer.ask(f"/{name}").status == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1", "10.0.0.7"]
)
def test_another_name_for_this_machine_is_refused(viewer: Served, host: str) -> None:
    """What a page of another site can do: point its own name to 127.0.0.1."""
    assert viewer.ask("/api/run", headers={"Host": host}).status == 421


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:1234", "[::1]:80"])
def test_loopback_by_any_of_its_names_is_let_in(viewer: Served, host: str) -> None:
    assert viewer.ask("/api/run", headers={"Host": host}).status == 200


def test_every_answer_forbids_foreign_script_and_frames(viewer: Served) -> None:
    for path in ("/", "/api/run", "/nothing"):
        headers = viewer.ask(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers


REVIEW = {"reviewer": "A", "label": "", "note": "n"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_only_the_viewers_own_page_writes(run_copy: Path, headers: dict[str, str], status: int) -> None:
    with serving(run_copy) as served:
        assert served.write("focus-001", REVIEW, **headers).status == status
        assert not (run_copy / "reviews.csv").exists()


def test_a_request_can_only_be_so_large(viewer: Served) -> None:
    assert viewer.write("focus-001", b"x" * 70_000).status == 413
    assert viewer.write("focus-001", b"{}", Content_Length="99999999999").status == 413
    assert viewer.write("focus-001", b"{}", Content_Length="-1").status in (400, 413)
    assert viewer.ask("/api/run?" + "a" * 4000).status == 414
    assert viewer.ask("/api/run", method="DELETE").status == 405


def test_a_body_without_a_length_can_only_be_so_large(viewer: Served) -> None:
    with socket.create_connection(("127.0.0.1", viewer.port), timeout=30) as line:
        line.sendall(
            b"POST /api/slides/focus-001/reviews HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(10):
            line.sendall(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
        assert b" 413 " in line.recv(100)


def test_an_address_that_others_reach_needs_the_token(finished_run: Path) -> None:
    with serving(finished_run, host="0.0.0.0") as served:
        token = urlsplit(served.url).query.removeprefix("token=")
        assert len(token) >= 32
        assert urlsplit(served.url).hostname == socket.gethostname().lower()  # not 0.0.0.0, which is nowhere
        name = f"holoslide_token_{served.port}"
        assert served.ask("/").status == 401
        assert served.ask("/api/run", headers={"Cookie": f"{name}=wrong"}).status == 401
        assert served.ask("/?token=wrong").status == 401
        assert served.ask("/?token=%ff%fe").status == 401
        entered = served.ask(f"/?token={token}")
        assert (entered.status, entered.headers["location"]) == (303, "/")
        cookie = entered.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Lax" in cookie
        pair = cookie.partition(";")[0]
        assert pair == f"{name}={token}"
        for given in (pair, f"odd[1]=a b; {pair}", f'x="; {name}=old; {pair}; y={{"a": 1}}'):
            assert served.ask("/api/run", headers={"Cookie": given}).status == 200, given
        assert served.ask("/api/run", headers={"Authorization": f"Bearer {token}"}).status == 200
        foreign = {"Authorization": f"Bearer {token}", "Host": "evil.example"}
        assert served.ask("/api/run", headers=foreign).status == 421


def test_two_viewers_of_one_host_do_not_log_each_other_out(finished_run: Path) -> None:
    with serving(finished_run, host="0.0.0.0") as one, serving(finished_run, host="0.0.0.0") as other:
        entered = [each.ask(f"/?{urlsplit(each.url).query}").headers["set-cookie"] for each in (one, other)]
        jar = dict(cookie.partition(";")[0].split("=") for cookie in entered)  # as a browser keeps them
        cookies = "; ".join(f"{name}={value}" for name, value in jar.items())
        assert [each.ask("/api/run", headers={"Cookie": cookies}).status for each in (one, other)] == [
            200,
            200,
        ]


def test_a_browser_without_the_token_is_told_what_to_do(finished_run: Path) -> None:
    with serving(finished_run, host="0.0.0.0") as served:
        page = served.ask("/", headers={"Accept": "text/html,*/*;q=0.8"})
        assert (page.status, page.headers["content-type"]) == (401, "text/html; charset=utf-8")
        assert b"<p>This viewer asks for a token: open the whole address that" in page.body
        assert "asks for a token" in served.ask("/api/run").json["error"]


@pytest.mark.parametrize("host", ["127.0.0.1:99999", "127.0.0.1:x"])
def test_a_host_whose_port_is_none_is_refused(viewer: Served, host: str) -> None:
    assert viewer.ask("/api/run", headers={"Host": host}).status == 421


def test_loopback_needs_no_token(viewer: Served) -> None:
    assert "token" not in viewer.url
    assert viewer.ask("/").status == 200


def test_the_viewer_starts_without_torch() -> None:
    """What would keep a user waiting for ten seconds."""
    code = "import sys, holoslide.serve.server; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"import json; {code}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    loaded = set(json.loads(done.stdout))
    assert "holoslide.serve.app" in loaded
    assert {"torch", "timm", "torchvision"}.isdisjoint(loaded)


def test_a_broken_request_does_not_stop_the_viewer(viewer: Served) -> None:
    with socket.create_connection(("127.0.0.1", viewer.port), timeout=30) as line:
        line.sendall(b"\x00\xff nonsense\r\n\r\n")
        line.recv(100)
    assert viewer.ask("/").status == http.client.OK
