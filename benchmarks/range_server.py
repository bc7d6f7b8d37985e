"""A plain HTTP server of a folder's files with byte ranges, in a process of its own; responses may be delayed.

`python range_server.py FOLDER DELAY_S SLOW_SHARE WIRE_BYTES_PER_S` prints its port. Bodies are sent by sendfile(2), so
that the server takes little of the processor that the clients under measurement need.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Self
from urllib.parse import unquote

SLOW_S = 2.0
_PACKET_BYTES = 64 << 10  # what the wire carries at a time


class Wire:
    """A network of a limited bandwidth, which all connections share. bytes_per_s: 0 for no limit."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s, self._lock, self._free_s = bytes_per_s, Lock(), 0.0

    def carry(self, n_bytes: int) -> None:
        """Wait until the wire has carried n_bytes."""
        if self._bytes_per_s:
            with self._lock:
                self._free_s = max(self._free_s, time.monotonic()) + n_bytes / self._bytes_per_s
                left_s = self._free_s - time.monotonic()
            if left_s > 0:
                time.sleep(left_s)


class RangeServer:
    """The server as a context manager. url: Its address, without a slash at the end.

    Args:
        folder: Folder that is served.
        delay_s: Time between a request and its response, in seconds.
        slow_share: Share of the requests, chosen at random, that take SLOW_S longer.
        wire_bytes_per_s: Bandwidth of all bodies together; 0: no limit.
    """

    def __init__(
        self, folder: Path, delay_s: float = 0.0, slow_share: float = 0.0, wire_bytes_per_s: float = 0.0
    ) -> None:
        figures = (str(figure) for figure in (delay_s, slow_share, wire_bytes_per_s))
        self._arguments = [sys.executable, __file__, str(folder), *figures]
        self.url = ""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._arguments, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512


def serve(folder: Path, delay_s: float, slow_share: float, wire_bytes_per_s: float) -> None:
    """Serve until the process is killed."""
    root, draws, wire = folder.resolve(), random.Random(7), Wire(wire_bytes_per_s)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            """Discard the message."""

        def do_HEAD(self) -> None:
            """Send the header of a file."""
            self._send(with_body=False)

        def do_GET(self) -> None:
            """Send a file or a range of it."""
            self._send(with_body=True)

        def _send(self, *, with_body: bool) -> None:
            wait_s = delay_s + (SLOW_S if draws.random() < slow_share else 0.0)
            if wait_s:
                time.sleep(wait_s)
            path = root / unquote(self.path).lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                start, end, wanted = 0, size, self.headers.get("Range")
                if wanted is not None:
                    first, _, last = wanted.removeprefix("bytes=").partition("-")
                    start = int(first) if first else max(size - int(last), 0)
                    end = min(int(last) + 1, size) if first and last else size
                self.send_response(206 if wanted else 200)
                self.send_header("ETag", f'"{os.fstat(file.fileno()).st_mtime_ns:x}-{size:x}"')
                self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
                self.send_header("Accept-Ranges", "bytes")
                self.send_header("Content-Length", str(end - start))
                if wanted:
                    self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
                self.end_headers()
                try:
                    while with_body and start < end:
                        length = min(end - start, _PACKET_BYTES) if wire_bytes_per_s else end - start
                        n_sent = os.sendfile(self.connection.fileno(), file.fileno(), start, length)
                        wire.carry(n_sent)
                        start += n_sent
                except OSError:
                    self.close_connection = True  # the client closed the connection

    server = _Server(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), *map(float, sys.argv[2:5]))
