"""Who may ask: the token, the checks that every request passes before any route sees it, and limits on the patient.

Any web page that a user has open can send requests to a port of the same machine, and a name that it controls can be
made to point there. So nothing is answered but to the exact Host, from the page itself or from no page at all, and,
apart from the page's own files, with the token. The token travels in a header and never in a cookie: a browser does not
add it by itself.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import re
import secrets
import stat
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]

TOKEN_FILE = ".token"
TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
MAX_BODY_BYTES = 64 * 1024
MAX_HEADER_BYTES = 16 * 1024
MAX_CONNECTIONS = 256
HEADER_SECONDS = 10.0  # for a request line and headers
BODY_SECONDS = 10.0
REQUEST_SECONDS = 60.0  # for all of a request, the client's reading of the answer included
STUCK_SECONDS = 10.0  # a WebSocket client that does not read for so long is cut off and may come back
PROTOCOL = "dashboard.v1"  # what a WebSocket client may name besides its token, and is then the answer

HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),  # styles: the charts set theirs from script; nothing remote is allowed anyway
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
]


def make_token(runs_dir: Path) -> str:
    """The token of a directory of runs, made where there is none. Raises ValueError for one that others could read."""
    path = runs_dir / TOKEN_FILE
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        return read_token(path)
    token = secrets.token_urlsafe(32)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(token + "\n")
    return token


def read_token(path: Path) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
            raise ValueError(f"{path} is not a file of this user: delete it")
        if found.st_mode & 0o077:
            raise ValueError(f"{path} may be read by others: delete it, and the next start makes a new one")
        token = file.read(200).decode("ascii", "replace").strip()
    if not TOKEN.fullmatch(token):
        raise ValueError(f"{path} holds no token: delete it, and the next start makes a new one")
    return token


class Gate:
    """The outermost layer of the app: refuses whatever is not allowed, limits bodies, and adds the security headers."""

    def __init__(self, app: App, token: str, port: int, public: Iterable[str]):
        """`public`: the paths that are answered without the token, to GET and HEAD."""
        self.app, self.token, self.public = app, token.encode(), frozenset(public)
        self.hosts = {f"{name}:{port}".encode() for name in ("127.0.0.1", "localhost")}
        if port == 80:
            self.hosts |= {b"127.0.0.1", b"localhost"}

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Any, receive: Receive, send: Send) -> None:
        private = scope["path"] not in self.public

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower(), value) for name, value in message.get("headers", [])]
                names = {name for name, _ in own}
                extra = [*HEADERS, *([(b"cache-control", b"no-store")] if b"cache-control" not in names else [])]
                message = {**message, "headers": [*own, *extra]}
            await send(message)

        refusal = _too_long(scope) or self._foreign(scope["headers"])
        if not refusal and (private or scope["method"] not in ("GET", "HEAD")):
            refusal = self._unknown(_values(scope["headers"], b"authorization"))
        if not refusal and scope["method"] in ("TRACE", "CONNECT"):
            refusal = (405, "this method is not answered")
        if not refusal:
            refusal = _bad_body(scope["method"], scope["headers"])
        body = b""
        if not refusal:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    body = await _read_body(receive)
            except ValueError:
                refusal = (413, f"a body has at most {MAX_BODY_BYTES} bytes")
            except TimeoutError:
                refusal = (408, "the body took too long")
            except ConnectionError:
                return
        if refusal:
            await _refuse(send_with_headers, *refusal)
            return
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_body() -> Message:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, receive_body, send_with_headers)

    async def _websocket(self, scope: Any, receive: Receive, send: Send) -> None:
        offered = [name.encode("latin-1", "replace") for name in scope.get("subprotocols", [])]
        bearers = [b"Bearer " + name.removeprefix(b"bearer.") for name in offered if name.startswith(b"bearer.")]
        refusal = _too_long(scope) or self._foreign(scope["headers"]) or self._unknown(bearers)
        if refusal:
            await receive()  # websocket.connect
            await send({"type": "websocket.close", "code": 4403})  # before it is accepted: an answer 403
            return
        scope["subprotocol"] = PROTOCOL if PROTOCOL.encode() in offered else f"bearer.{self.token.decode()}"
        await self.app(scope, receive, send)

    def _foreign(self, headers: list[tuple[bytes, bytes]]) -> tuple[int, str] | None:
        """What is wrong with where a request goes or comes from."""
        hosts = _values(headers, b"host")
        if len(hosts) != 1 or hosts[0] not in self.hosts:
            return 403, "this Host is not served"
        origins, sites = _values(headers, b"origin"), _values(headers, b"sec-fetch-site")
        if any(origin != b"http://" + hosts[0] for origin in origins):
            return 403, "requests of other pages are not answered"
        if any(site not in (b"same-origin", b"none") for site in sites):
            return 403, "requests of other pages are not answered"
        return None

    def _unknown(self, credentials: list[bytes]) -> tuple[int, str] | None:
        """What is wrong with who asks."""
        if len(credentials) != 1 or not hmac.compare_digest(credentials[0], b"Bearer " + self.token):
            return 401, "the token is missing or wrong; it is in the address that the server printed at its start"
        return None


def _values(headers: list[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for key, value in headers if key.lower() == name]


def _too_long(scope: Any) -> tuple[int, str] | None:
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    size += sum(len(name) + len(value) for name, value in scope["headers"])
    return (431, f"a request has at most {MAX_HEADER_BYTES} bytes before its body") if size > MAX_HEADER_BYTES else None


def _bad_body(method: str, headers: list[tuple[bytes, bytes]]) -> tuple[int, str] | None:
    lengths, types = _values(headers, b"content-length"), _values(headers, b"content-type")
    if any(not length.isdigit() or len(length) > 9 or int(length) > MAX_BODY_BYTES for length in lengths):
        return 413, f"a body has at most {MAX_BODY_BYTES} bytes"
    has_body = bool(_values(headers, b"transfer-encoding")) or any(int(length) for length in lengths)
    if has_body and method in ("GET", "HEAD"):
        return 413, f"{method} has no body"
    if has_body and [kind.split(b";")[0].strip().lower() for kind in types] != [b"application/json"]:
        return 415, "a body must be application/json"
    return None


async def _read_body(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise ValueError
        if not message.get("more_body", False):
            return bytes(body)


async def _refuse(send: Send, status: int, why: str) -> None:
    """Answer and end the connection, so that nobody goes on sending what is not read."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": why.encode() + b"\n"})


class BoundedHttp(H11Protocol):
    """HTTP with an end to patience: for the headers, for a whole request, and to the number of connections."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        self._wait(HEADER_SECONDS)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        if self._deadline is None:
            self._wait(HEADER_SECONDS)
        super().data_received(data)
        if self.cycle is not before and not self.cycle.response_complete:
            self._wait(REQUEST_SECONDS)

    def on_response_complete(self) -> None:
        before = self.cycle
        self._wait(REQUEST_SECONDS if self.flow.write_paused else None)  # what is sent may still have to be read
        super().on_response_complete()
        if self.cycle is not before and not self.cycle.response_complete:
            self._wait(REQUEST_SECONDS)

    def handle_websocket_upgrade(self, event: Any) -> None:
        self._wait(None)
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait(None)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait(REQUEST_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.cycle is None or self.cycle.response_complete:
            self._wait(None)

    def _wait(self, seconds: float | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """A WebSocket whose client is cut off when it does not read what it asked for."""

    _stuck: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stuck = self.loop.call_later(STUCK_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._let_go()

    def connection_lost(self, exc: Exception | None) -> None:
        self._let_go()
        super().connection_lost(exc)

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.transport.abort()

    def _let_go(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None
