"""An HTTP server on loopback that serves a dict of objects, with byte ranges and scripted faults."""

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
class HttpFault:
    """A scripted fault of one request.

    Attributes:
        kind: Kind of the fault. "status", "silence", "drop" and "lost_answer" apply to any method, the others to GET:

            - "status": the response has this status, body and header; the request has no effect
            - "reset": the connection is reset after n_bytes of the body (None: half of it)
            - "short": the connection is closed in order after n_bytes
            - "stall": the bytes after n_bytes are sent after release() or when the server stops
            - "silence": no response before release() or the server's stop
            - "whole": status 200 and the whole object, although a range was requested
            - "replace": the object is first replaced by body or by its own reverse, then served
            - "drop": no effect and no response
            - "lost_answer": the request takes effect, but the connection is reset instead of a response (PUT, DELETE)
        status: Status of the response, for "status".
        n_bytes: Bytes of the body that are sent.
        body: Body of the response, or the new object.
        header: Header fields of the response.
    """

    kind: Literal["status", "reset", "short", "stall", "silence", "whole", "replace", "drop", "lost_answer"]
    status: int = 503
    n_bytes: int | None = None
    body: bytes | None = None
    header: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """A request that was served.

    Attributes:
        method: Method of the request.
        path: Path of the request.
        range: Range field of the request; None without one.
        if_match: If-Match field of the request; None without one.
        status: Status of the response; 0 without a response.
        n_bytes: Bytes of the response body that were sent.
        headers: Header fields of the request, with names in lower case.
        body: Body of a POST request.
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
    """A server whose requests go wrong as scripted.

    `with HttpFaultServer({"a": b"..."}) as server:` serves server.url + "/a". It serves GET and HEAD with Range, ETag
    and If-Match; PUT with If-None-Match: *; DELETE; and POST as scripted. next() scripts the next requests in order,
    when() all requests that match a rule. Each request has a thread; the lock guards script and log.

    Attributes:
        objects: Objects by path; may be changed at any time.
        log: The requests, in order.
    """

    def __init__(self, objects: dict[str, bytes] | None = None, *, tls: ssl.SSLContext | None = None) -> None:
        """Prepare the server.

        Args:
            objects: Objects by path.
            tls: TLS context for https; None: http.
        """
        self._tls = tls
        self.objects: dict[str, bytes] = {} if objects is None else objects
        self.log: list[RecordedRequest] = []
        self._lock = Lock()
        self._script: deque[HttpFault | None] = deque()
        self._rule: Callable[[str, str], HttpFault | None] = lambda _method, _path: None
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
        """Return the server's address, without a slash at the end."""
        if self._server is None:
            raise ValueError("the server runs only inside its `with` block")
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self._server.server_port}"

    @property
    def n_bytes_sent(self) -> int:
        """Return the number of bytes of all response bodies."""
        with self._lock:
            return sum(seen.n_bytes for seen in self.log)

    def next(self, *script: HttpFault | None) -> None:
        """Script the next requests in this order; None: no fault."""
        with self._lock:
            self._script.extend(script)

    def when(self, rule: Callable[[str, str], HttpFault | None]) -> None:
        """Call rule(method, path) for every request that next() does not cover; its result is the fault, or None."""
        self._rule = rule

    def release(self) -> None:
        """End all stalls."""
        self._released.set()

    def etag(self, key: str) -> str:
        """Return the current ETag of an object."""
        return _etag(self.objects[key])

    def take(self, method: str, path: str) -> HttpFault | None:
        """Return the fault of this request. Called by the request's thread."""
        with self._lock:
            if self._script:
                return self._script.popleft()
        return self._rule(method, path)

    def note(self, seen: RecordedRequest) -> None:
        """Add a request to the log. Called by the request's thread."""
        with self._lock:
            self.log.append(seen)

    def wait_released(self) -> None:
        """Stall until release(). Called by the request's thread."""
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
        """Close idle keep-alive connections, which would keep their threads alive."""
        for connection in [*self._connections]:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the client closed it first


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise a body waits 40 ms for the acknowledgement of its header
    server: _Server
    _posted = b""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Discard the message."""

    def do_GET(self) -> None:
        """Send an object."""
        self._serve(with_body=True)

    def do_HEAD(self) -> None:
        """Send an object's header."""
        self._serve(with_body=False)

    def do_PUT(self) -> None:
        """Store an object."""
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
        """Respond as scripted."""
        self._posted = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self._is_prevented(self.server.owner.take(self.command, self.path)):
            self._answer(HTTPStatus.NOT_IMPLEMENTED, b"", {}, with_body=True)

    def do_DELETE(self) -> None:
        """Delete an object."""
        fault = self.server.owner.take(self.command, self.path)
        if not self._is_prevented(fault):
            self.server.owner.objects.pop(self._key, None)
            self._confirm(fault, HTTPStatus.NO_CONTENT, {})

    def _is_prevented(self, fault: HttpFault | None) -> bool:
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

    def _confirm(self, fault: HttpFault | None, status: int, header: dict[str, str]) -> None:
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

    def _break_off(self, fault: HttpFault, status: int, body: bytes, header: dict[str, str]) -> None:
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
            self.close_connection = True  # the client closed the connection

    def _reset(self) -> None:
        # Closing with a linger time of zero sends RST instead of FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _note(self, status: int, n_bytes: int) -> None:
        wanted, if_match = self.headers.get("Range"), self.headers.get("If-Match")
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = RecordedRequest(self.command, self.path, wanted, if_match, int(status), n_bytes, headers, self._posted)
        self.server.owner.note(seen)
        self._posted = b""
