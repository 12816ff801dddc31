"""Who may ask, and how much: a gate before all that the viewer answers.

A page of any site that a reviewer has open can send requests to this machine. So: the Host header must be ours (a
name that was made to point here is not), what changes something must be JSON and come from our own page, answers
may be read by our own page only, and who comes from another machine must show the token.
"""

from __future__ import annotations

import hmac
import html
import ipaddress
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "holoslide_token"  # and the port: browsers do not keep those of one host apart
MAX_BODY_BYTES = 64 * 1024
MAX_PATH_BYTES = 2048
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address to listen on."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Refusal(Exception):  # noqa: N818 - an answer, not an error of ours
    """An HTTP status, and why."""

    status: int
    why: str


class Guard:
    """ASGI middleware; `token` None is for loopback alone. `host` is the address that is listened on."""

    def __init__(self, app: ASGIApp, *, host: str, token: str | None = None) -> None:
        self.app, self.token = app, token
        self.names = set(_LOOPBACK)
        if not is_loopback(host):
            self.names |= {host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer by itself what must not pass."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        try:
            self._check(scope, headers)
            if await self._let_in(scope, headers, send):
                return
            body = await _body(receive, headers) if scope["method"] == "POST" else b""
        except Refusal as refusal:
            as_page = "text/html" in headers.get("accept", "")
            await (_show if as_page else _answer)(send, refusal.status, refusal.why)
            return
        await self.app(scope, _replay(body), _with_headers(send))

    def _check(self, scope: Scope, headers: Mapping[str, str]) -> None:
        if scope["method"] not in ("GET", "HEAD", "POST"):
            raise Refusal(405, "this method is not known here")
        if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_PATH_BYTES:
            raise Refusal(414, "the address is too long")
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise Refusal(421, "the Host header is not this viewer's")
        if scope["method"] == "POST":
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
                raise Refusal(403, "only the viewer's own page may write")
            if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
                raise Refusal(403, "only the viewer's own page may write")
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise Refusal(415, "what is written must be application/json")

    def _is_ours(self, host: str) -> bool:
        """A name of ours; from other machines, who need the token, any plain address is, too."""
        try:
            parts = urlsplit(f"//{host}")
            name, _ = (parts.hostname or "").lower(), parts.port  # a port that is none is a ValueError, too
        except ValueError:
            return False
        if name in self.names:
            return True
        try:
            return self.token is not None and bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    async def _let_in(self, scope: Scope, headers: Mapping[str, str], send: Send) -> bool:
        """Refuse who has no token; give who brings it in the address a cookie, and say whether that was all."""
        if self.token is None:
            return False
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        name = _cookie_name(headers["host"])
        if given and _same(given, self.token):
            # Not Strict: a link in a mail or a chat could not be followed. Who writes is checked by `_check`.
            cookie = f"{name}={self.token}; Path=/; HttpOnly; SameSite=Lax"
            extra = [(b"location", b"/"), (b"set-cookie", cookie.encode("latin-1"))]
            await _answer(send, 303, "come in", extra)
            return True
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if any(_same(each, self.token) for each in (bearer, *_cookies(headers.get("cookie", ""), name))):
            return False
        why = "this viewer asks for a token: open the whole address that `holoslide serve` printed when it started"
        raise Refusal(401, f"{why}; if somebody else started it, ask them for that address")


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


def _cookie_name(host: str) -> str:
    """By the port that the browser sees, which a forwarded one is, too."""
    return f"{COOKIE}_{urlsplit(f'//{host}').port or 80}"


def _cookies(text: str, name: str) -> list[str]:
    """The values of all cookies of that name, whatever other programs have put beside them."""
    pairs = (each.partition("=") for each in text.split(";"))
    return [value.strip() for key, _, value in pairs if key.strip() == name]


async def _body(receive: Receive, headers: Mapping[str, str]) -> bytes:
    """The whole body, refused as soon as it is too large, whatever length was announced."""
    announced = headers.get("content-length", "0")
    if not announced.isdigit() or int(announced) > MAX_BODY_BYTES:
        raise Refusal(413, f"at most {MAX_BODY_BYTES} bytes can be written at once")
    parts: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "the connection was closed")
        parts.append(message.get("body", b""))
        if sum(map(len, parts)) > MAX_BODY_BYTES:
            raise Refusal(413, f"at most {MAX_BODY_BYTES} bytes can be written at once")
        more = message.get("more_body", False)
    return b"".join(parts)


def _replay(body: bytes) -> Receive:
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if sent:
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def _with_headers(send: Send) -> Send:
    extra = [(key.encode(), value.encode()) for key, value in HEADERS.items()]

    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return guarded


async def _answer(send: Send, status: int, why: str, extra: list[tuple[bytes, bytes]] | None = None) -> None:
    await _send(send, status, "application/json", json.dumps({"error": why}), extra)


async def _show(send: Send, status: int, why: str) -> None:
    """A refusal for who has opened the address in a browser."""
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>holoslide</title>'
        f"<h1>holoslide</h1><p>{html.escape(why[0].upper() + why[1:])}.</p></html>"
    )
    await _send(send, status, "text/html; charset=utf-8", page)


async def _send(
    send: Send, status: int, kind: str, text: str, extra: list[tuple[bytes, bytes]] | None = None
) -> None:
    headers = [(b"content-type", kind.encode()), (b"cache-control", b"no-store"), *(extra or [])]
    guarded = _with_headers(send)
    await guarded({"type": "http.response.start", "status": status, "headers": headers})
    await guarded({"type": "http.response.body", "body": text.encode()})
