"""Machines of a job for tests: each has a cache folder, a port and, if it serves, an nginx in front of it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np

import tiercache as tc
from tiercache.peers.server import PeerService, ServerOptions, serve
from tiercache.store import Store, open_store

MACHINE_FIGURES = ("peer_requests", "peer_bytes", "peer_failures")


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def data_set_objects(folder: Path, n_records: int = 600, name: str = "ds") -> dict[str, bytes]:
    """The objects of a data set of some shards of random bytes, by the path at which a server has them."""
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (n_records, 4096), np.uint8)
    schema = {"id": "int64", "data": "bytes"}
    with tc.Writer(folder / name, schema=schema, shard_size="256KiB", block_size="32KiB", compression="none") as writer:
        for i in range(n_records):
            writer.write({"id": i, "data": data[i].tobytes()})
    files = [path for path in (folder / name).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Machine:
    """A machine with a cache folder and a port.

    Attributes:
        url: URL of its server.
    """

    def __init__(self, folder: Path, data_sets: list[str], **options) -> None:
        self.folder, self._data_sets, self._options = folder, data_sets, options
        self.port = free_port()
        self.url = f"{'https' if 'tls_cert' in options else 'http'}://127.0.0.1:{self.port}"
        self._running = ExitStack()
        self._nginx = None

    def open_cache(self, **options) -> tc.Cache:
        """Open the folder's cache, as another process of the machine would."""
        return tc.Cache(self.folder / "cache", **{"size": "64MB", "min_free": "0%"} | options)

    @contextlib.contextmanager
    def run(self, peers: list[str] | None = None) -> Iterator[Machine]:
        """Serve while the block runs."""
        self.start(peers)
        try:
            yield self
        finally:
            self.stop()

    def start(self, peers: list[str] | None = None) -> None:
        """Start the server, which reads versions and segments from these peers."""
        cache = self.open_cache()
        others = self._running.enter_context(self.open_cache(peers=peers))
        stores: list[Store] = [self._running.enter_context(closing(open_store(url))) for url in self._data_sets]
        service = PeerService(list(map(cache.store, stores)), list(map(others.store, stores)))
        socket_path = self.folder / "s"
        options = ServerOptions(
            cache.path, socket_path, cache.folder_id, address="127.0.0.1", port=self.port, **self._options
        )
        self._nginx = self._running.enter_context(serve(cache, service, options))

    def stop(self) -> None:
        """Stop the server in order."""
        self._running.close()

    def kill(self) -> None:
        """Kill nginx and its worker processes at once: open connections break, new ones are refused."""
        pid = self._nginx.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for one in [pid, *map(int, children)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
        self.stop()


def read_all_records(url: str, cache: tc.Cache, order: np.ndarray | None = None) -> list[bytes]:
    """The records of a data set in its order, read through a cache in another order, if one is given."""
    with closing(tc.Dataset(url, cache=cache)) as dataset:
        numbers = np.arange(len(dataset)) if order is None else order
        found: list[bytes] = [b""] * len(dataset)
        for some in np.array_split(numbers, 20):
            batch = dataset[some.tolist()]
            assert list(batch["id"]) == some.tolist()
            for number, data in zip(some.tolist(), batch["data"], strict=True):
                found[number] = bytes(data)
        return found
