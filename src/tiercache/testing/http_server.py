"""A small HTTP server on loopback that serves a dict of objects by ranges and misbehaves as scripted."""

from __future__ import annotations

import hashlib
import re
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Literal
from urllib.parse import unquote, urlsplit

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True, slots=True)
class Misbehave:
    """What happens to one request.

    kind, of which "status", "silence", "drop" and "lost_answer" suit any method, the others only GET:

    - "status": an answer of that status, with body and header; the request takes no effect
    - "reset": the connection is reset after n_bytes of the body (None: half of it)
    - "short": the connection is closed in order after n_bytes
    - "stall": what follows n_bytes comes only when release() is called or the server stops
    - "silence": not even the head of an answer comes before release() is called or the server stops
    - "whole": 200 and the whole object where a range was asked for
    - "replace": the object is replaced first, by body or by itself reversed, then served
    - "drop": no effect and no answer
    - "lost_answer": the request takes effect, but the connection is reset in place of an answer (PUT, DELETE)
    """

    kind: Literal["status", "reset", "short", "stall", "silence", "whole", "replace", "drop", "lost_answer"]
    status: int = 503
    n_bytes: int | None = None
    body: bytes | None = None
    header: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """A request that was served. n_bytes: of the body that was sent; headers: of the request, in lower case.

    body: of a POST.
    """

    method: str
    path: str
    range: str | None
    if_match: str | None
    status: int
    n_bytes: int
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)


class HttpFaultServer:
    """`with HttpFaultServer({"a": b"..."}) as server:` serves server.url + "/a".

    GET and HEAD with ranges, ETag and If-Match; PUT with If-None-Match: *; DELETE; POST as scripted. objects may be
    changed at any time. next() scripts the coming requests in order, when() all that match. log and
    n_bytes_sent tell what was asked and sent. Each request has a thread; the lock guards script and log.
    """

    def __init__(self, objects: dict[str, bytes] | None = None, *, tls: ssl.SSLContext | None = None) -> None:
        """objects: by their paths; tls: serve https by it."""
        self._tls = tls
        self.objects: dict[str, bytes] = {} if objects is None else objects
        self.log: list[Seen] = []
        self._lock = Lock()
        self._script: deque[Misbehave | None] = deque()
        self._rule: Callable[[str, str], Misbehave | None] = lambda _method, _path: None
        self._released = Event()
        self._server: _Server | None = None

    def __enter__(self) -> HttpFaultServer:
        self._released.clear()
        self._server = _Server(self)
        if self._tls is not None:
            self._server.socket = self._tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = Thread(target=self._server.serve_forever, args=(0.02,), name="http-fault-server", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._released.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.close_connections()
            self._server.server_close()
            self._thread.join()
            self._server = None

    @property
    def url(self) -> str:
        """Its address, without a slash at the end."""
        if self._server is None:
            raise ValueError("the server runs inside `with` only")
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self._server.server_port}"

    @property
    def n_bytes_sent(self) -> int:
        """Bytes of all bodies."""
        with self._lock:
            return sum(seen.n_bytes for seen in self.log)

    def next(self, *script: Misbehave | None) -> None:
        """Let the next requests misbehave in this order; None: behave."""
        with self._lock:
            self._script.extend(script)

    def when(self, rule: Callable[[str, str], Misbehave | None]) -> None:
        """Ask rule(method, path) about every request that next() does not speak of."""
        self._rule = rule

    def release(self) -> None:
        """End all stalls."""
        self._released.set()

    def etag(self, key: str) -> str:
        """The ETag of an object as it is now."""
        return _etag(self.objects[key])

    def take(self, method: str, path: str) -> Misbehave | None:
        """What shall happen to this request. For the request's thread."""
        with self._lock:
            if self._script:
                return self._script.popleft()
        return self._rule(method, path)

    def note(self, seen: Seen) -> None:
        """Add to the log. For the request's thread."""
        with self._lock:
            self.log.append(seen)

    def wait_released(self) -> None:
        """Stall. For the request's thread."""
        self._released.wait(60.0)


def _etag(data: bytes) -> str:
    return f'"{hashlib.blake2b(data, digest_size=8).hexdigest()}"'


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True
    request_queue_size = 128

    def __init__(self, owner: HttpFaultServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.owner = owner
        self._connections: set[socket.socket] = set()

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """End idle keep-alive connections, which would keep their threads."""
        for connection in [*self._connections]:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the client was quicker


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the acknowledgement of its head
    server: _Server
    _posted = b""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Keep quiet."""

    def do_GET(self) -> None:
        """Serve an object."""
        self._serve(with_body=True)

    def do_HEAD(self) -> None:
        """Describe an object."""
        self._serve(with_body=False)

    def do_PUT(self) -> None:
        """Keep an object."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        objects = self.server.owner.objects
        fault = self.server.owner.take(self.command, self.path)
        if not self._is_prevented(fault):
            if self.headers.get("If-None-Match") == "*" and self._key in objects:
                self._answer(HTTPStatus.PRECONDITION_FAILED, b"", {}, with_body=True)
                return
            objects[self._key] = body
            self._confirm(fault, HTTPStatus.OK, {"ETag": _etag(body)})

    def do_POST(self) -> None:
        """Answer as scripted."""
        self._posted = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self._is_prevented(self.server.owner.take(self.command, self.path)):
            self._answer(HTTPStatus.NOT_IMPLEMENTED, b"", {}, with_body=True)

    def do_DELETE(self) -> None:
        """Forget an object."""
        fault = self.server.owner.take(self.command, self.path)
        if not self._is_prevented(fault):
            self.server.owner.objects.pop(self._key, None)
            self._confirm(fault, HTTPStatus.NO_CONTENT, {})

    def _is_prevented(self, fault: Misbehave | None) -> bool:
        if fault is not None and fault.kind == "status":
            self._answer(fault.status, fault.body or b"", dict(fault.header), with_body=True)
        elif fault is not None and fault.kind == "silence":
            self.server.owner.wait_released()
            self._reset()
        elif fault is not None and fault.kind == "drop":
            self._reset()
        else:
            return False
        return True

    def _confirm(self, fault: Misbehave | None, status: int, header: dict[str, str]) -> None:
        if fault is not None and fault.kind == "lost_answer":
            self._note(status, 0)
            self._reset()
        else:
            self._answer(status, b"", header, with_body=True)

    @property
    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/")

    def _serve(self, *, with_body: bool) -> None:
        owner = self.server.owner
        key = self._key
        fault = owner.take(self.command, self.path)
        if fault is not None and fault.kind == "silence":
            self._note(0, 0)
            owner.wait_released()
        if fault is not None and fault.kind in ("drop", "silence"):
            self._reset()
            return
        if fault is not None and fault.kind == "replace":
            owner.objects[key] = owner.objects[key][::-1] if fault.body is None else fault.body
        if fault is not None and fault.kind == "status":
            self._answer(fault.status, fault.body or b"", dict(fault.header), with_body=with_body)
            return
        status, body, header = self._content(owner.objects.get(key), ranged=fault is None or fault.kind != "whole")
        if fault is not None and fault.kind in ("reset", "short", "stall") and with_body:
            self._break_off(fault, status, body, header)
        else:
            self._answer(status, body, header, with_body=with_body)

    def _content(self, data: bytes | None, *, ranged: bool) -> tuple[int, bytes, dict[str, str]]:
        if data is None:
            return HTTPStatus.NOT_FOUND, b"no such object", {}
        etag = _etag(data)
        header = {"ETag": etag, "Accept-Ranges": "bytes", "Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT"}
        if self.headers.get("If-Match") not in (None, "*", etag):
            return HTTPStatus.PRECONDITION_FAILED, b"changed", header
        match = _RANGE.fullmatch(self.headers.get("Range") or "") if ranged else None
        if match is None:
            return HTTPStatus.OK, data, header
        if match[1]:
            start, end = int(match[1]), min(int(match[2]) + 1, len(data)) if match[2] else len(data)
        else:
            start, end = max(len(data) - int(match[2] or 0), 0), len(data)
        if start >= end:
            return HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", {"Content-Range": f"bytes */{len(data)}"}
        return HTTPStatus.PARTIAL_CONTENT, data[start:end], header | {
            "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"
        }  # fmt: skip

    def _answer(self, status: int, body: bytes, header: dict[str, str], *, with_body: bool) -> None:
        self._note(status, len(body) if with_body else 0)
        self._head(status, len(body), header)
        if with_body:
            self._send(body)

    def _break_off(self, fault: Misbehave, status: int, body: bytes, header: dict[str, str]) -> None:
        n_bytes = len(body) // 2 if fault.n_bytes is None else min(fault.n_bytes, len(body))
        self._note(status, n_bytes)
        self._head(status, len(body), header)
        self._send(body[:n_bytes])
        if fault.kind == "stall":
            self.server.owner.wait_released()
            self._send(body[n_bytes:])
        if fault.kind == "reset":
            self._reset()
        self.close_connection = True

    def _head(self, status: int, n_bytes: int, header: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in header.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(n_bytes))
        self.end_headers()

    def _send(self, body: bytes) -> None:
        try:
            self.wfile.write(body)
            self.wfile.flush()
        except OSError:
            self.close_connection = True  # the client went away

    def _reset(self) -> None:
        # Closing with a zero linger time sends RST in place of FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _note(self, status: int, n_bytes: int) -> None:
        wanted, if_match = self.headers.get("Range"), self.headers.get("If-Match")
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.command, self.path, wanted, if_match, int(status), n_bytes, headers, self._posted)
        self.server.owner.note(seen)
        self._posted = b""
