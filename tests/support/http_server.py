"""An HTTP and S3 server on loopback, with byte ranges and faults: scripted ones, by a rule, or random from a seed."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import ssl
import struct
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from threading import Event, Lock, Thread
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tiercache.store import Store, open_store

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_LONGEST_STALL_S = 60.0
_DRIP_PIECES = 16
_PRIME = 7919
_DRIP_PAUSE_S = 0.02


@dataclass(frozen=True, slots=True)
class HttpFault:
    """A fault of one request.

    Attributes:
        kind: Kind of the fault. "status", "silence", "drop" and "lost_answer" apply to any method, "unconditional" to
            PUT, and the others to GET:

            - "status": the response has this status, body and header; the request has no effect
            - "drop": no effect and no response; the connection is reset
            - "silence": no response before pause_s, release() or the server's stop, then as "drop"
            - "lost_answer": the request takes effect, but the connection is reset instead of a response (PUT, DELETE)
            - "unconditional": a PUT is executed without its condition
            - "reset": the connection is reset after n_bytes of the body
            - "short": the connection is closed in order after n_bytes
            - "stall": the bytes after n_bytes are sent after pause_s, release() or the server's stop
            - "drip": the body is sent in pieces of n_bytes, with pause_s before each
            - "wrong_length": the range in the response ends n_bytes before the requested end, and so does the body
            - "wrong_bytes": one bit of the body is inverted, another one in each response
            - "etag": the response has another ETag than the object
            - "whole": status 200 and the whole object, although a range was requested
            - "replace": the object is first replaced by body or by its own reverse, then served
        status: Status of the response, for "status".
        n_bytes: Number of bytes, as the kind says. None: half of the body; for "drip" a sixteenth.
        body: Body of the response ("status"), or the new object ("replace").
        header: Header fields of the response with a "status", such as Retry-After.
        pause_s: Seconds of a pause. None: 60 s, or 0.02 s for "drip".
    """

    kind: Literal[
        "status", "drop", "silence", "lost_answer", "unconditional", "reset", "short", "stall", "drip",
        "wrong_length", "wrong_bytes", "etag", "whole", "replace",
    ]  # fmt: skip
    status: int = 503
    n_bytes: int | None = None
    body: bytes | None = None
    header: tuple[tuple[str, str], ...] = ()
    pause_s: float | None = None


class RandomFaults:
    """A rule for HttpFaultServer.when(): requests go wrong with this probability, each by one of some faults.

    Which requests go wrong, and how, follows from the seed and the number of the request. Safe for threads. keys: Of
    the paths that are counted, without the leading slash; None: all.
    """

    def __init__(
        self, faults: Sequence[HttpFault], rate: float, *, seed: int, keys: Callable[[str], bool] | None = None
    ) -> None:
        self._faults, self._rate, self._keys = tuple(faults), rate, keys
        self._random, self._lock = Random(seed), Lock()
        self.n_requests = self.n_faults = 0

    def __call__(self, _method: str, path: str) -> HttpFault | None:
        if self._keys is not None and not self._keys(path.lstrip("/")):
            return None
        with self._lock:
            self.n_requests += 1
            draw, fault = self._random.random(), self._random.choice(self._faults)
            if draw >= self._rate:
                return None
            self.n_faults += 1
            return fault


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """A request that was served. status: 0 without a response. headers: With names in lower case."""

    method: str
    path: str
    range: str | None
    if_match: str | None
    status: int
    n_bytes: int
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)


class HttpFaultServer:
    """A server whose requests go wrong as told.

    `with HttpFaultServer({"a": b"..."}) as server:` serves server.url + "/a". It serves GET and HEAD with Range, ETag
    and If-Match; PUT with If-None-Match: *; DELETE; S3's listing of a bucket (ListObjectsV2); and POST as scripted. As
    an S3 server (endpoint=server.url), the first segment of a path is the bucket; signatures are not checked. next()
    scripts the next requests in order, when() all requests by a rule, such as RandomFaults. Each request has a thread;
    the lock guards script and log.

    objects: By path, and may be changed at any time; given as a dict, or as a folder or a Store that is copied. tls:
    Context for https. log: The requests, in order.
    """

    def __init__(
        self,
        objects: dict[str, bytes] | str | os.PathLike[str] | Store | None = None,
        *,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._tls = tls
        if objects is not None and not isinstance(objects, dict):
            store = objects if isinstance(objects, Store) else open_store(objects)
            objects = {info.key: store.get(info.key) for info in store.list()}
        self.objects: dict[str, bytes] = {} if objects is None else objects
        self._etags: dict[str, tuple[bytes, str]] = {}
        self.log: list[RecordedRequest] = []
        self._lock = Lock()
        self._script: deque[HttpFault | None] = deque()
        self._rule: Callable[[str, str], HttpFault | None] = lambda _method, _path: None
        self._admission: Callable[[str, Mapping[str, str]], HttpFault | None] = lambda _path, _headers: None
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

    @property
    def n_connections(self) -> int:
        """Return the number of connections that neither side is known to have closed."""
        return 0 if self._server is None else self._server.n_connections

    def next(self, *script: HttpFault | None) -> None:
        """Script the next requests in this order; None: no fault."""
        with self._lock:
            self._script.extend(script)

    def when(self, rule: Callable[[str, str], HttpFault | None]) -> None:
        """Call rule(method, path) for every request that next() does not cover; its result is the fault, or None."""
        self._rule = rule

    def admit(self, rule: Callable[[str, Mapping[str, str]], HttpFault | None]) -> None:
        """Call rule(path, headers) for every request first; its result is the fault, or None.

        For a server that demands credentials, or that gives them. The names of the headers are in lower case.
        """
        self._admission = rule

    def release(self) -> None:
        """End all stalls."""
        self._released.set()

    def etag(self, key: str, data: bytes | None = None) -> str:
        data = self.objects[key] if data is None else data
        hashed, etag = self._etags.get(key, (None, ""))
        if hashed is not data:  # hashing a large object for each request would cost more than serving it
            etag = f'"{hashlib.blake2b(data, digest_size=8).hexdigest()}"'
            self._etags[key] = data, etag
        return etag

    def write(self, key: str, data: bytes, *, if_absent: bool) -> bool:
        """Write an object; return False if it must not be replaced."""
        with self._lock:
            if if_absent and key in self.objects:
                return False
            self.objects[key] = data
            return True

    def take(self, method: str, path: str, headers: Mapping[str, str]) -> HttpFault | None:
        """Return the fault of this request."""
        if (fault := self._admission(path, headers)) is not None:
            return fault
        with self._lock:
            if self._script:
                return self._script.popleft()
        return self._rule(method, path)

    def note(self, seen: RecordedRequest) -> None:
        with self._lock:
            self.log.append(seen)

    def wait_released(self, pause_s: float | None) -> None:
        """Stall for pause_s, or until release()."""
        self._released.wait(_LONGEST_STALL_S if pause_s is None else pause_s)


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

    def handle_error(self, request: object, client_address: object) -> None:
        """Report the error of a request's thread, unless the client has closed the connection."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @property
    def n_connections(self) -> int:
        return len(self._connections)

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
        pass

    def do_GET(self) -> None:
        self._serve(with_body=True)

    def do_HEAD(self) -> None:
        self._serve(with_body=False)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        owner = self.server.owner
        fault = owner.take(self.command, self.path, self._headers)
        if not self._is_prevented(fault):
            is_conditional = fault is None or fault.kind != "unconditional"
            if not owner.write(self._key, body, if_absent=is_conditional and self.headers.get("If-None-Match") == "*"):
                self._answer(HTTPStatus.PRECONDITION_FAILED, b"", {}, with_body=True)
                return
            self._confirm(fault, HTTPStatus.OK, {"ETag": owner.etag(self._key)})

    def do_POST(self) -> None:
        self._posted = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self._is_prevented(self.server.owner.take(self.command, self.path, self._headers)):
            self._answer(HTTPStatus.NOT_IMPLEMENTED, b"", {}, with_body=True)

    def do_DELETE(self) -> None:
        fault = self.server.owner.take(self.command, self.path, self._headers)
        if not self._is_prevented(fault):
            self.server.owner.objects.pop(self._key, None)
            self._confirm(fault, HTTPStatus.NO_CONTENT, {})

    def _is_prevented(self, fault: HttpFault | None) -> bool:
        if fault is not None and fault.kind == "status":
            self._answer(fault.status, fault.body or b"", dict(fault.header), with_body=True)
        elif fault is not None and fault.kind == "silence":
            self._note(0, 0)
            self.server.owner.wait_released(fault.pause_s)
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
    def _headers(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self.headers.items()}

    @property
    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).lstrip("/")

    def _serve(self, *, with_body: bool) -> None:
        owner, key = self.server.owner, self._key
        fault = owner.take(self.command, self.path, self._headers)
        if fault is not None and fault.kind == "status":
            self._answer(fault.status, fault.body or b"", dict(fault.header), with_body=with_body)
            return
        if self._is_prevented(fault):
            return
        if fault is not None and fault.kind == "replace":
            owner.write(key, owner.objects[key][::-1] if fault.body is None else fault.body, if_absent=False)
        query = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        if "list-type" in query:
            self._answer(HTTPStatus.OK, self._listing(key, query), {}, with_body=with_body)
            return
        status, body, header = self._content(key, fault)
        if fault is None or not with_body or not self._send_wrongly(fault, status, body, header):
            self._answer(status, body, header, with_body=with_body)

    def _listing(self, bucket: str, query: Mapping[str, list[str]]) -> bytes:
        """Return S3's listing of the bucket, in one page."""
        bucket, after = bucket.strip("/"), query.get("start-after", [""])[0]
        prefix = f"{bucket}/{query.get('prefix', [''])[0]}"
        objects = sorted(self.server.owner.objects.copy().items())
        found = [(key.partition("/")[2], len(data)) for key, data in objects if key.startswith(prefix)]
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2025-01-01T00:00:00.000Z</LastModified>"
            f"<Size>{n_bytes}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for key, n_bytes in found
            if key > after
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode()

    def _content(self, key: str, fault: HttpFault | None) -> tuple[int, bytes, dict[str, str]]:
        data = self.server.owner.objects.get(key)
        if data is None:
            return HTTPStatus.NOT_FOUND, b"no such object", {}
        object_etag = self.server.owner.etag(key, data)
        kind, n_bytes = (None, 0) if fault is None else (fault.kind, fault.n_bytes)
        etag = f'"swapped-{object_etag.strip(chr(34))}"' if kind == "etag" else object_etag
        header = {"ETag": etag, "Accept-Ranges": "bytes", "Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT"}
        if self.headers.get("If-Match") not in (None, "*", object_etag):
            return HTTPStatus.PRECONDITION_FAILED, b"changed", header
        match = _RANGE.fullmatch(self.headers.get("Range") or "") if kind != "whole" else None
        if match is None:
            start, end = 0, len(data)
        elif match[1]:
            start, end = int(match[1]), min(int(match[2]) + 1, len(data)) if match[2] else len(data)
        else:
            start, end = max(len(data) - int(match[2] or 0), 0), len(data)
        if match is not None and start >= end:
            return HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", {"Content-Range": f"bytes */{len(data)}"}
        if kind == "wrong_length":
            end = max(end - ((end - start) // 2 if n_bytes is None else n_bytes), start + 1)
        body = data[start:end]
        if kind == "wrong_bytes" and body:
            at = len(self.server.owner.log) * _PRIME % len(body)  # other bytes in each response
            body = body[:at] + bytes((body[at] ^ 1,)) + body[at + 1 :]
        if match is None:
            return HTTPStatus.OK, body, header
        return HTTPStatus.PARTIAL_CONTENT, body, header | {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}

    def _answer(self, status: int, body: bytes, header: dict[str, str], *, with_body: bool) -> None:
        self._note(status, len(body) if with_body else 0)
        self._head(status, len(body), header)
        if with_body:
            self._send(body)

    def _send_wrongly(self, fault: HttpFault, status: int, body: bytes, header: dict[str, str]) -> bool:
        """Send the response with a fault of its transfer; return False if the fault is none of these."""
        n_bytes = len(body) // 2 if fault.n_bytes is None else fault.n_bytes
        if fault.kind in ("reset", "short", "stall"):
            first, rest = body[:n_bytes], body[n_bytes:]
        elif fault.kind == "drip":
            self._note(status, len(body))
            self._head(status, len(body), header)
            step = max(len(body) // _DRIP_PIECES if fault.n_bytes is None else n_bytes, 1)
            for start in range(0, len(body), step):
                self.server.owner.wait_released(_DRIP_PAUSE_S if fault.pause_s is None else fault.pause_s)
                if not self._send(body[start : start + step]):
                    break
            return True
        else:
            return False
        self._note(status, len(first))
        self._head(status, len(body), header)
        self._send(first)
        if fault.kind == "stall":
            self.server.owner.wait_released(fault.pause_s)
            self._send(rest)
        if fault.kind == "reset":
            self._reset()
        self.close_connection = True
        return True

    def _head(self, status: int, n_bytes: int, header: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in header.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(n_bytes))
        self.end_headers()

    def _send(self, body: bytes) -> bool:
        try:
            self.wfile.write(body)
            self.wfile.flush()
        except OSError:
            self.close_connection = True  # the client closed the connection
            return False
        return True

    def _reset(self) -> None:
        # Closing with a linger time of zero sends RST instead of FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def _note(self, status: int, n_bytes: int) -> None:
        wanted, if_match = self.headers.get("Range"), self.headers.get("If-Match")
        seen = RecordedRequest(
            self.command, self.path, wanted, if_match, int(status), n_bytes, self._headers, self._posted
        )
        self.server.owner.note(seen)
        self._posted = b""
