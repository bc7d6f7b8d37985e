"""`tiercache serve`: nginx sends the complete copies of a cache to other machines, and `PeerService` all else.

nginx passes each request for a copy to `PeerService` through a Unix socket. The service knows the names of all shards
and segments of the data sets that it was started with. It hands a complete copy over to nginx, which sends the file,
and fetches what is not complete through this machine's cache: under a lease, so that eviction cannot take the copy
away, and one fetch for all who request it. No other name is answered, and no request can name a store or a key. A
reader that got corrupt bytes may ask the service to verify its copy.
"""

from __future__ import annotations

import logging
import os
import pwd
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from ctypes import CDLL
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from pathlib import Path
from threading import BoundedSemaphore, Lock, Thread
from typing import Any

import numpy as np

from tiercache.cache.cache import Cache, CachedStore
from tiercache.cache.copy_file import read_all
from tiercache.cache.fetch import CopyLease
from tiercache.cache.names import NameTable, name_of_identity, names_of
from tiercache.errors import NotFound, TierCacheError
from tiercache.model import ByteRange, ShardIdentity
from tiercache.peers.readers import DEFAULT_PORT, OWN_REQUEST, READER_HEADER, check_token
from tiercache.shard.versions import ShardTable, Version, latest, read_segments, read_version
from tiercache.store import Store
from tiercache.waiting import SYSTEM_CLOCK, Clock, wait_for

logger = logging.getLogger("tiercache")

# A name that no known version has is looked up in newer versions at most this often.
REFRESH_EVERY_S = 2.0
# Versions before the newest that are searched for a name.
MOST_VERSIONS = 100
# Reading the names of a million shards takes seconds. A reader waits less than its own limit, and then asks elsewhere.
LOAD_WAIT_S = 5.0
# Bytes that are sent as soon as they have come: a reader that gets nothing for 10 s gives up.
PIECE_BYTES = 512 << 10
FETCH_DEADLINE_S = 60.0
MOST_REQUESTS = 512  # at once, each with a piece in memory; further ones are told to ask elsewhere
REQUEST_TIMEOUT_S = 30.0  # longest time in which nginx sends a request, or takes a piece
START_S = 15.0
JOIN_S = 10.0

_COPY = re.compile(r"/(copies|suspects)/([0-9a-f]{40})")
_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{1,18})")
_PATH = re.compile(r"/[^\0-\x1f\x7f\"'\\${};#]*")
_LISTEN = re.compile(r"[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]")


# -- what is served ----------------------------------------------------------------------------------------------------


class Refusal(Exception):
    """A request is answered with a status alone, such as 404: no data set has the name; 503: ask another machine."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _SegmentNames:
    def __init__(self, table: ShardTable, dataset_id: str) -> None:
        self._table, self._dataset_id = table, dataset_id
        names = NameTable.of(names_of(dataset_id, *table.identities(np.arange(len(table)))))
        self._rows = names.order()
        self._names = names.take(self._rows)

    def find(self, name: str) -> tuple[str, ShardIdentity] | None:
        row = int(self._names.rows_of(NameTable.of_texts([name]))[0]) if len(self._names) else -1
        if row < 0:
            return None
        (found,) = self._table.objects(self._dataset_id, self._rows[row : row + 1])
        return found


class ServedDataSet:
    """The shards and segments of a data set that may be served, by the names of their copies. Safe from any thread."""

    def __init__(self, store: CachedStore, versions: Store | None = None, clock: Clock = SYSTEM_CLOCK) -> None:
        """Read nothing yet. versions: Store of versions and segments, which may read from peers; None: the same."""
        self.store = store
        self._versions = store if versions is None else versions
        self._clock, self._lock = clock, Lock()
        self._segments: dict[str, tuple[str, ShardIdentity]] = {}  # by the name of the segment's copy
        self._shards: dict[str, _SegmentNames] = {}  # by the segment's file name
        self._newest = self._oldest = 0
        self._fingerprint = ""  # of the newest version
        self._parent: int | None = None  # of the oldest version that is known
        self._refresh_at_s = -np.inf

    def find(self, name: str) -> tuple[str, ShardIdentity] | None:
        """Return key and identity of the object whose copy has this name.

        None: The data set has none. Raises StoreError, CorruptShard; or Refusal if it may have it: its versions were
            read a moment ago, or are still being read after LOAD_WAIT_S.
        """
        found = self.find_known(name)
        if found is not None:
            return found
        if not self._lock.acquire(timeout=LOAD_WAIT_S):
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE)
        try:
            found = self.find_known(name)
            if found is not None:
                return found
            if self._clock.monotonic() < self._refresh_at_s:
                raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE)
            return self._find_in_versions(name)
        finally:
            self._lock.release()

    def find_known(self, name: str) -> tuple[str, ShardIdentity] | None:
        found = self._segments.get(name)
        for segment in list(self._shards.values()) if found is None else ():
            found = segment.find(name)
            if found is not None:
                break
        return found

    def _find_in_versions(self, name: str) -> tuple[str, ShardIdentity] | None:
        try:
            newest = latest(self._versions)
            if newest.fingerprint != self._fingerprint:
                self._add(newest)
                self._newest, self._fingerprint = newest.number, newest.fingerprint
            found = self.find_known(name)
            while found is None and self._parent is not None and self._newest - self._parent <= MOST_VERSIONS:
                try:
                    self._add(read_version(self._versions, self._parent))
                except NotFound:  # deleted: its own parent is unknown, so each older number may be a version
                    self._parent = self._parent - 1 if self._parent > 1 else None
                found = self.find_known(name)
        finally:  # also after an error: names that nobody knows must not be many questions to a store that fails
            self._refresh_at_s = self._clock.monotonic() + REFRESH_EVERY_S
        return found

    def _add(self, version: Version) -> None:
        # Segments are served by their names before this machine has them: it may be their owner.
        objects = [(ref.key, ref.identity(version.dataset_id)) for ref in version.segments]
        self._segments |= {name_of_identity(identity): (key, identity) for key, identity in objects}
        for ref in version.segments:
            if ref.name not in self._shards:
                (rows,) = read_segments(self._versions, version.dataset_id, [ref])
                self._shards[ref.name] = _SegmentNames(ShardTable([rows]), version.dataset_id)
        if not self._oldest or version.number < self._oldest:
            self._oldest, self._parent = version.number, version.parent


class PeerService:
    """Answers what nginx cannot: copies that are not complete. Safe from any thread."""

    def __init__(
        self, stores: Sequence[CachedStore], versions: Sequence[Store] | None = None, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        """Read nothing yet. stores: Data sets through this machine's cache, which must read from no peers.

        versions: Stores from which their versions and segments are read, in the same order.
        """
        pairs = zip(stores, stores if versions is None else versions, strict=True)
        self.data_sets = [ServedDataSet(store, of_versions, clock) for store, of_versions in pairs]
        self._verifying = Lock()

    def open(self, name: str) -> tuple[CopyLease, CachedStore, str, ShardIdentity]:
        """Return a lease on the copy with this name, its store, key and identity; the caller closes the lease.

        Raises Refusal (no data set has it, or the cache has no space for it), StoreError, CorruptShard.
        """
        store, key, identity = self._find(name)
        spec = store.spec_of(key, identity)
        lease = None if spec is None or spec.name != name else store.open_copy(spec)
        if lease is None:
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE)
        return lease, store, key, identity

    def verify(self, name: str) -> None:
        """Compare a complete copy with its checksum, and remove it if it is corrupt. Raises as open()."""
        store, key, identity = self._find(name)
        with self._verifying:  # many readers may have got the same bytes
            # The units of a partial copy are compared with their checksums whenever they are read.
            if store.is_cached(key, identity) and store.remove_if_corrupt(key, identity):
                logger.warning(
                    "%s/%s: the copy in this cache was corrupt; what is wrong of it was removed", store.url, key
                )

    def _find(self, name: str) -> tuple[CachedStore, str, ShardIdentity]:
        for data_set in self.data_sets:
            if (known := data_set.find_known(name)) is not None:
                return data_set.store, *known
        failure: Exception = Refusal(HTTPStatus.NOT_FOUND)
        for data_set in self.data_sets:
            try:
                if (found := data_set.find(name)) is not None:
                    return data_set.store, *found
            except (TierCacheError, Refusal) as error:  # another data set may have it
                failure = error
        raise failure


# -- the server on a Unix socket ---------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    server: _UnixServer
    protocol_version = "HTTP/1.1"
    timeout = REQUEST_TIMEOUT_S
    server_version, sys_version = "tiercache", ""

    def do_GET(self) -> None:
        self.close_connection = True
        if not self.server.slots.acquire(blocking=False):
            self._send(HTTPStatus.SERVICE_UNAVAILABLE)
            return
        try:
            self._answer()
        except Refusal as refusal:
            self._send(refusal.status)
        except NotFound:  # at the origin: NOT_FOUND would mean that no data set has the name
            self._send(HTTPStatus.SERVICE_UNAVAILABLE)
        except TierCacheError:
            self._send(HTTPStatus.BAD_GATEWAY)
        except OSError:
            pass  # nginx has closed the connection, or a file cannot be read: the body ends early
        finally:
            self.server.slots.release()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
        """Log nothing: nginx does."""

    def _answer(self) -> None:
        copy = _COPY.fullmatch(self.path)
        if self.headers.get(READER_HEADER) == self.server.reader_id:
            raise Refusal(OWN_REQUEST)
        if copy is None:
            raise Refusal(HTTPStatus.NOT_FOUND)
        what, name = copy.groups()
        if what == "suspects":
            self._send(HTTPStatus.OK)  # first: nobody waits for the check
            with suppress(TierCacheError, Refusal):
                self.server.service.verify(name)
            return
        lease, store, key, identity = self.server.service.open(name)
        with lease:
            if lease.n_descriptors == 1:  # complete: nginx sends the file, if it has not been evicted by then
                self.send_response(HTTPStatus.OK)
                self.send_header("X-Accel-Redirect", f"/complete/{name}")
                self._send_headers(0)
                return
            span = self._span(lease.n_bytes)
            starts = range(span.start, span.end, PIECE_BYTES)
            pieces = [ByteRange(start, min(start + PIECE_BYTES, span.end)) for start in starts]
            lease.prefetch([span])
            # The first piece comes before the status, which can then still say that nothing will come.
            first = _read(lease, pieces[0]) if pieces else b""
            if first is None:
                store.remove_if_corrupt(key, identity)
                raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE)
            is_whole = "Range" not in self.headers
            self.send_response(HTTPStatus.OK if is_whole else HTTPStatus.PARTIAL_CONTENT)
            if not is_whole:
                self.send_header("Content-Range", f"bytes {span.start}-{span.end - 1}/{lease.n_bytes}")
            self.send_header("Accept-Ranges", "bytes")
            self._send_headers(span.n_bytes)
            with suppress(TierCacheError):  # the body ends early, which the reader notices
                for piece in pieces:
                    data = first if piece is pieces[0] else _read(lease, piece)
                    if data is None:
                        return  # the same
                    self.wfile.write(data)

    def _span(self, n_bytes: int) -> ByteRange:
        text = self.headers.get("Range")
        if text is None:
            return ByteRange(0, n_bytes)
        match = _RANGE.fullmatch(text)
        if match is None or not int(match[1]) <= int(match[2]):
            raise Refusal(HTTPStatus.BAD_REQUEST)
        if int(match[1]) >= n_bytes:
            raise Refusal(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
        return ByteRange(int(match[1]), min(int(match[2]) + 1, n_bytes))

    def _send(self, status: int) -> None:
        with suppress(OSError):  # nginx has closed the connection
            self.send_response(status)
            self._send_headers(0)

    def _send_headers(self, n_bytes: int) -> None:
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(n_bytes))
        self.send_header("Connection", "close")
        self.end_headers()


def _read(lease: CopyLease, span: ByteRange) -> bytearray | None:
    """Return a piece of a copy, once it has come; None: it will not come, or is corrupt. Raises StoreError."""
    if not lease.wait([span], deadline_s=FETCH_DEADLINE_S):
        return None
    data = bytearray(span.n_bytes)
    view = memoryview(data)
    is_read = lease.read([(span, view)]) or (lease.n_descriptors == 1 and read_all(lease.fd, view, span.start))
    return data if is_read else None


class _UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    request_queue_size = 1024

    def __init__(self, path: str, service: PeerService, reader_id: str) -> None:
        self.service, self.reader_id = service, reader_id
        self.slots = BoundedSemaphore(MOST_REQUESTS)
        super().__init__(path, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a connection that nginx has closed."""


@contextmanager
def run_service(cache: Cache, service: PeerService, path: Path) -> Iterator[None]:
    """Answer requests on a Unix socket while the block runs. At the end the cache is closed."""
    server = _UnixServer(str(path), service, cache.folder_id)
    thread = Thread(target=server.serve_forever, name="tiercache-serve", kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        cache.close()  # first: it ends the fetches for which requests wait
        thread.join(JOIN_S)
        server.server_close()
        path.unlink(missing_ok=True)


# -- nginx -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How nginx serves a cache. reader_id: Id of the cache folder, whose own readers are refused."""

    root: Path
    socket: Path
    reader_id: str
    address: str = "0.0.0.0"  # noqa: S104 - other machines are to reach it
    port: int = DEFAULT_PORT
    token: str | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def __post_init__(self) -> None:
        """Check that all values can stand in nginx's configuration. Raises ValueError."""
        for path in (self.root, self.socket, self.tls_cert, self.tls_key):
            if path is not None and not _PATH.fullmatch(str(path)):
                raise ValueError(f"nginx cannot be configured with the path {str(path)!r}: an absolute path is needed")
        if not _LISTEN.fullmatch(self.address):
            raise ValueError(f"not an address to listen on: {self.address!r}")
        if not 0 < self.port < 65536:
            raise ValueError(f"a port is from 1 to 65535, got {self.port}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS needs a certificate and its key (--tls-cert and --tls-key)")
        if self.token is not None:
            check_token(self.token)


def nginx_config(options: ServerOptions, folder: Path, user: str | None = None) -> str:
    """Return the configuration of an nginx in the foreground. user: User of its workers if root starts it."""
    lines = {"user": [] if user is None else [f"user {user};"], "tls": [], "refusals": []}
    if options.tls_cert is not None:
        lines["tls"] = [f'ssl_certificate "{options.tls_cert}";', f'ssl_certificate_key "{options.tls_key}";']
    if options.token is not None:
        lines["refusals"].append(f'if ($http_authorization != "Bearer {options.token}") {{ return 401; }}')
    if options.reader_id:
        header = READER_HEADER.lower().replace("-", "_")
        lines["refusals"].append(f'if ($http_{header} = "{options.reader_id}") {{ return {OWN_REQUEST}; }}')
    ssl = "" if options.tls_cert is None else " ssl"
    values = {name: " ".join(some) for name, some in lines.items()} | {
        "listen": f"{options.address}:{options.port}{ssl}",
        "root": options.root,
        "socket": options.socket,
        "folder": folder,
        "read_timeout": f"{FETCH_DEADLINE_S:.0f}s",
    }
    text = files("tiercache").joinpath("peers/nginx.conf").read_text(encoding="utf-8")
    return re.sub("@([a-z_]+)@", lambda found: str(values[found[1]]), text)


@contextmanager
def run_nginx(options: ServerOptions) -> Iterator[subprocess.Popen[bytes]]:
    """Run nginx while the block runs, and yield its process once it answers.

    Raises FileNotFoundError if nginx is not installed, and RuntimeError if it ended, or did not answer within START_S.
    """
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/sbin")
    if program is None:
        raise FileNotFoundError("nginx is not installed: install the package nginx-light or nginx")
    user = pwd.getpwuid(0).pw_name if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="tiercache-serve-") as text:
        folder = Path(text)
        file = folder / "nginx.conf"
        file.touch(mode=0o600)
        file.write_text(nginx_config(options, folder, user), encoding="utf-8")
        process = subprocess.Popen(
            [program, "-e", "stderr", "-p", str(folder), "-c", str(file)], preexec_fn=_end_with_parent
        )
        try:
            if not wait_for(lambda: process.poll() is not None or _answers(options), START_S):
                raise RuntimeError(f"nginx did not answer on port {options.port} within {START_S:g} s")
            if process.poll() is not None:
                raise RuntimeError(f"nginx could not start on port {options.port}; its messages are above")
            yield process
        finally:
            process.terminate()
            process.wait()


def _answers(options: ServerOptions) -> bool:
    host = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(options.address, options.address.strip("[]"))  # noqa: S104
    with suppress(OSError), closing(socket.create_connection((host, options.port), 1.0)):
        return True
    return False


_libc = CDLL(None)  # loaded before the fork: the loader's lock may be held by another thread


def _end_with_parent() -> None:
    """In the child before exec: let the kernel end nginx when the process that started it is killed."""
    _libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextmanager
def serve(cache: Cache, service: PeerService, options: ServerOptions) -> Iterator[subprocess.Popen[bytes]]:
    """Serve a cache, which must read from no peers, while the block runs, and then close it; yield nginx's process."""
    with run_service(cache, service, options.socket), run_nginx(options) as process:
        yield process
