"""Slow and lossy networks for tests and benchmarks: a proxy that delays, and a network of its own for a process."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import time
from queue import SimpleQueue
from threading import Event, Lock, Thread
from urllib.parse import urlsplit

from tests.support import ROOT

_CLONE_NEWNET = 0x40000000
_CHUNK_BYTES = 64 << 10


class DelayingProxy:
    """A TCP proxy on loopback that delays all bytes, for machines without network namespaces.

    `with DelayingProxy(server.url, delay_s=0.01) as proxy:` serves proxy.url. Three threads for each connection.

    Args:
        url: HTTP address of the server.
        delay_s: Seconds by which each direction is delayed: half of the added round-trip time.
        bytes_per_s: Limit of each direction of each connection, in bytes per second; None: no limit.
    """

    def __init__(self, url: str, *, delay_s: float, bytes_per_s: float | None = None) -> None:
        parts = urlsplit(url)
        self._target = parts.hostname or "127.0.0.1", parts.port or 80
        self._delay_s, self._bytes_per_s = delay_s, bytes_per_s
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._lock, self._closed = Lock(), Event()
        self._sockets: list[socket.socket] = []
        self._threads: list[Thread] = []

    @property
    def url(self) -> str:
        """HTTP address of the proxy."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> DelayingProxy:
        self._start(self._accept)
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        with self._lock:
            for one in self._sockets:
                _shut(one)
        for thread in self._threads:
            thread.join()
        self._listener.close()
        for one in self._sockets:
            one.close()

    def _start(self, run, *arguments) -> None:
        thread = Thread(target=run, args=arguments, name="delaying-proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                near = self._listener.accept()[0]
            except OSError:
                return
            try:
                far = socket.create_connection(self._target)
            except OSError:
                near.close()
                continue
            with self._lock:
                self._sockets += [near, far]
            for source, sink in ((near, far), (far, near)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                queue: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
                self._start(self._receive, source, queue)
                self._start(self._send, sink, queue)

    def _receive(self, source: socket.socket, queue: SimpleQueue[tuple[float, bytes]]) -> None:
        free_s = 0.0  # when the line has sent all bytes before
        data = b"-"
        while data:
            try:
                data = source.recv(_CHUNK_BYTES)
            except OSError:
                data = b""
            now_s = time.monotonic()
            free_s = max(free_s, now_s) + (len(data) / self._bytes_per_s if self._bytes_per_s else 0.0)
            queue.put((free_s + self._delay_s, data))

    def _send(self, sink: socket.socket, queue: SimpleQueue[tuple[float, bytes]]) -> None:
        while True:
            due_s, data = queue.get()
            self._closed.wait(max(due_s - time.monotonic(), 0.0))
            try:
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
            except OSError:
                return


def _shut(one: socket.socket) -> None:
    try:
        one.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # closed by its peer


def enter_network(*, delay_s: float = 0.0, loss: float = 0.0, bytes_per_s: float | None = None) -> None:
    """Move the calling thread, and the threads that it starts later, into a network of its own.

    Only its loopback device exists, with packets of 1,500 bytes, which tc delays and drops. Needs root and a kernel
    with network namespaces; delay and loss also need its module netem: see why_no_network().

    Args:
        delay_s: Seconds by which each packet is delayed: half of the round-trip time.
        loss: Share of the packets that is dropped, from 0 to 1.
        bytes_per_s: Rate of the device in bytes per second; None: no limit.

    Raises:
        OSError: The kernel does not allow it.
        subprocess.CalledProcessError: ip or tc failed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    commands = ["ip link set lo mtu 1500 up"]
    rate = "" if bytes_per_s is None else f" rate {bytes_per_s * 8:.0f}bit"
    if delay_s or loss:
        lost = f" loss {loss:.4%}" if loss else ""
        commands.append(f"tc qdisc add dev lo root netem limit 100000 delay {delay_s * 1e6:.0f}us{lost}{rate}")
    elif rate:
        commands.append(f"tc qdisc add dev lo root tbf{rate} burst 64kb latency 400ms")
    for command in commands:
        subprocess.run(command.split(), check=True, capture_output=True)


def why_no_network(**network: float) -> str:
    """Return why enter_network() with these arguments does not work here; "" if it does."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("tc") or not shutil.which("ip"):
        return "ip and tc are not installed (Debian: iproute2)"
    program = (
        "import subprocess, sys\n"
        "from tests.support.network import enter_network\n"
        "try:\n"
        f"    enter_network(**{network!r})\n"
        "except subprocess.CalledProcessError as error:\n"
        "    sys.exit(f'{error.cmd}: {error.stderr.decode()}')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    return "" if done.returncode == 0 else f"this machine has no such network: {done.stderr.strip()[-200:]}"
