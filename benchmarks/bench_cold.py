"""The first epoch from a store: through the cache to disk and past it, in order and shuffled, beside plain clients.

    python benchmarks/bench_cold.py [--folder DIR] [--megabytes 1024] [--delays 0 0.02 0.05] [--repetitions 5]
                                    [--wires 0 125] [--quick]

A server process of its own serves the data set's files by HTTP ranges (range_server.py). The plain clients read the
same bytes in ranges of 8 MiB by 16 threads: obstore, and a plain socket. Ways of one repetition are interleaved, and
each begins with an empty cache. A row has the throughput, its share of the faster plain client's in the same
repetition, the processor seconds per GB of this process, and their ratio to those of the plain client that takes least.
The last rows have a server that delays 1 % of the responses by 2 s. All of this is measured for each bandwidth of the
network (--wires, in MB/s, 0: no limit); the rows of a limited one have the share of it that each way reaches.

The rows of "waits" have a consumer that takes half of a limited network's bandwidth: the time to its first batch, and
the longest and the sum of its later waits, for records of 300 KB and of 4 KB. --only waits measures only these.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import socket
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import numpy as np
import obstore
import obstore.store

import tiercache as tc
from range_server import RangeServer
from rows import OUT, spread, table, write_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

RANGE_BYTES = 8 << 20
N_THREADS = 16
RECORD_BYTES = 64 << 10
BATCH_SIZE = 64
PLAIN = ("obstore", "socket")
WAIT_RECORD_BYTES = (300_000, 4096)
WAIT_BATCH_BYTES = 4 << 20
WAIT_TITLES = ("case", "first batch s", "longest wait s", "all waits s")
TITLES = ("case", "MB/s", "of the fastest plain", "of the wire", "CPU s/GB", "of the least plain")


@dataclass(frozen=True, slots=True)
class Data:
    """The data set that is read.

    Attributes:
        folder: Folder that the server serves; the data set is its folder "data".
        n_records: Number of records.
        objects: Path below the folder, and size, of each shard.
    """

    folder: Path
    n_records: int
    objects: tuple[tuple[str, int], ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(size for _, size in self.objects)

    def ranges(self) -> Iterator[tuple[int, str, int, int]]:
        """Yield number and path of a shard with start and end of each range."""
        for number, (path, size) in enumerate(self.objects):
            for start in range(0, size, RANGE_BYTES):
                yield number, path, start, min(start + RANGE_BYTES, size)


def make_data(folder: Path, megabytes: int, record_bytes: int = RECORD_BYTES) -> Data:
    """Write a data set of random records."""
    shutil.rmtree(folder, ignore_errors=True)
    n_records = max((megabytes << 20) // record_bytes, BATCH_SIZE)
    rng = np.random.default_rng(1)
    with tc.Writer(str(folder / "data")) as writer:
        for start in range(0, n_records, 256):
            n = min(256, n_records - start)
            writer.write_batch(
                {"id": np.arange(start, start + n), "value": rng.integers(0, 256, (n, record_bytes), np.uint8)}
            )
    shards = sorted((folder / "data").rglob("shards/*"))
    return Data(folder, n_records, tuple((str(p.relative_to(folder)), p.stat().st_size) for p in shards if p.is_file()))


class Sink:
    """Where a plain client puts bytes: the files of a folder, or memory that is dropped."""

    def __init__(self, data: Data, folder: Path | None) -> None:
        flags = os.O_RDWR | os.O_CREAT
        self._fds = [os.open(folder / str(i), flags, 0o600) for i in range(len(data.objects))] if folder else []

    def put(self, number: int, offset: int, piece: Any) -> None:
        """Write a piece."""
        if self._fds:
            os.pwrite(self._fds[number], piece, offset)

    def close(self) -> None:
        """Close the files."""
        for fd in self._fds:
            os.close(fd)


def read_by_obstore(data: Data, url: str, sink: Sink) -> None:
    """Read all ranges by obstore."""
    store = obstore.store.HTTPStore(url, client_options={"allow_http": True})

    def read(job: tuple[int, str, int, int]) -> None:
        number, path, start, end = job
        sink.put(number, start, memoryview(obstore.get_range(store, path, start=start, end=end)))

    with ThreadPoolExecutor(N_THREADS) as pool:
        list(pool.map(read, data.ranges()))


def read_by_socket(data: Data, url: str, sink: Sink) -> None:
    """Read all ranges by plain sockets, one for each thread."""
    server, local, opened = urlsplit(url), threading.local(), []

    def connection() -> tuple[socket.socket, bytearray]:
        if not hasattr(local, "connection"):
            local.connection = socket.create_connection((server.hostname or "", server.port or 80))
            local.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            local.buffer = bytearray(1 << 20)
            opened.append(local.connection)
        return local.connection, local.buffer

    def read(job: tuple[int, str, int, int]) -> None:
        number, path, position, end = job
        wire, buffer = connection()
        wire.sendall(f"GET /{path} HTTP/1.1\r\nHost: x\r\nRange: bytes={position}-{end - 1}\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += wire.recv(4096)
        piece = memoryview(head.split(b"\r\n\r\n", 1)[1])
        while True:
            sink.put(number, position, piece)
            position += len(piece)
            if position == end:
                return
            piece = memoryview(buffer)[: wire.recv_into(buffer, min(len(buffer), end - position))]

    with ThreadPoolExecutor(N_THREADS) as pool:
        list(pool.map(read, data.ranges()))
    for wire in opened:
        wire.close()


def read_by_loader(data: Data, url: str, cache: tc.Cache | Literal[False], *, shuffle: bool) -> None:
    """Serve one epoch. Raises RuntimeError if records are missing."""
    dataset = tc.Dataset(f"{url}/data", cache=cache)
    n_seen = 0
    for batch in tc.DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=shuffle):
        n_seen += len(batch["id"])
    dataset.close()
    if n_seen != data.n_records:
        raise RuntimeError(f"{n_seen} of {data.n_records} records were served")


def ways(data: Data, url: str, target: Path) -> dict[str, Callable[[], None]]:
    """Return the ways to read the data set, by case; the part after the comma says where the bytes go."""

    def plain(read: Callable[[Data, str, Sink], None], folder: Path | None) -> None:
        sink = Sink(data, folder)
        read(data, url, sink)
        sink.close()

    def cached(*, shuffle: bool) -> None:
        with tc.Cache(target / "cache", size=4 * data.n_bytes) as cache:
            read_by_loader(data, url, cache, shuffle=shuffle)

    return {
        "obstore, to disk": lambda: plain(read_by_obstore, target),
        "socket, to disk": lambda: plain(read_by_socket, target),
        "in order, to disk": lambda: cached(shuffle=False),
        "shuffled, to disk": lambda: cached(shuffle=True),
        "obstore, to memory": lambda: plain(read_by_obstore, None),
        "socket, to memory": lambda: plain(read_by_socket, None),
        "in order, to memory": lambda: read_by_loader(data, url, False, shuffle=False),
        "shuffled, to memory": lambda: read_by_loader(data, url, False, shuffle=True),
    }


def cpu_s() -> float:
    """Return the processor seconds of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@dataclass(frozen=True, slots=True)
class Network:
    """How the server answers. See RangeServer."""

    delay_s: float
    slow_share: float = 0.0
    wire_bytes_per_s: float = 0.0

    def __str__(self) -> str:
        slow = f", {self.slow_share:.0%} of the responses 2 s later" if self.slow_share else ""
        wire = f", {self.wire_bytes_per_s / 1e6:.0f} MB/s" if self.wire_bytes_per_s else ""
        return f"{self.delay_s * 1e3:.0f} ms{wire}{slow}"


def measure(data: Data, target: Path, network: Network, repetitions: int) -> list[dict[str, Any]]:
    """Return a row for each way to read from a server over this network."""
    rates: dict[str, list[float]] = defaultdict(list)
    costs: dict[str, list[float]] = defaultdict(list)
    shares: dict[str, list[float]] = defaultdict(list)
    ratios: dict[str, list[float]] = defaultdict(list)
    with RangeServer(data.folder, network.delay_s, network.slow_share, network.wire_bytes_per_s) as server:
        ways(data, server.url, target)["in order, to memory"]()  # the first epoch of a process imports libraries
        for _ in range(repetitions):
            for case, read in ways(data, server.url, target).items():
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir(parents=True)
                before_s, start_s = cpu_s(), time.perf_counter()
                read()
                rates[case].append(data.n_bytes / (time.perf_counter() - start_s))
                costs[case].append((cpu_s() - before_s) / (data.n_bytes / 1e9))
            for case in rates:
                where = case.partition(", ")[2]
                plain = [f"{name}, {where}" for name in PLAIN]
                shares[case].append(rates[case][-1] / max(rates[name][-1] for name in plain))
                ratios[case].append(costs[case][-1] / max(min(costs[name][-1] for name in plain), 1e-9))
    return [
        {
            "benchmark": "cold",
            "case": case,
            **asdict(network),
            "n_bytes": data.n_bytes,
            "bytes_per_s": spread(rates[case]),
            "of_fastest_plain": spread(shares[case]),
            "cpu_s_per_gb": spread(costs[case]),
            "cpu_of_least_plain": spread(ratios[case]),
        }
        for case in rates
    ]


def waits_of(data: Data, url: str, cache: tc.Cache | Literal[False], rate: float, *, shuffle: bool) -> list[float]:
    """Return the waits of an epoch for each batch, in seconds; the consumer takes `rate` bytes a second."""
    dataset = tc.Dataset(f"{url}/data", cache=cache)
    record_bytes = data.n_bytes // data.n_records
    batch_size = max(WAIT_BATCH_BYTES // record_bytes, 1)
    waits = []
    start_s = time.perf_counter()
    for batch in tc.DataLoader(dataset, batch_size=batch_size, shuffle=shuffle):
        waits.append(time.perf_counter() - start_s)
        time.sleep(len(batch["id"]) * record_bytes / rate)
        start_s = time.perf_counter()
    dataset.close()
    return waits


def measure_waits(data: Data, target: Path, network: Network, repetitions: int) -> list[dict[str, Any]]:
    """Return a row for each order, with and without a cache: the waits of a consumer of half the bandwidth."""
    rate = network.wire_bytes_per_s / 2 or 1e12
    found: dict[str, list[list[float]]] = defaultdict(list)
    with RangeServer(data.folder, network.delay_s, network.slow_share, network.wire_bytes_per_s) as server:
        waits_of(data, server.url, False, 1e12, shuffle=False)  # the first epoch of a process imports libraries
        for _ in range(repetitions):
            for order, where in product(("in order", "shuffled"), ("to disk", "to memory")):
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir(parents=True)
                with tc.Cache(target / "cache", size=4 * data.n_bytes) as cache:
                    used = cache if where == "to disk" else False
                    waits = waits_of(data, server.url, used, rate, shuffle=order == "shuffled")
                found[f"{order}, {where}"].append(waits)
    return [
        {
            "benchmark": "cold waits",
            "case": case,
            **asdict(network),
            "n_bytes": data.n_bytes,
            "record_bytes": data.n_bytes // data.n_records,
            "first_batch_s": spread([waits[0] for waits in runs]),
            "longest_wait_s": spread([max(waits[1:], default=0.0) for waits in runs]),
            "all_waits_s": spread([sum(waits[1:]) for waits in runs]),
        }
        for case, runs in found.items()
    ]


def text_of_waits(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of the waits."""
    names = ("first_batch_s", "longest_wait_s", "all_waits_s")
    return table(WAIT_TITLES, [[row["case"], *(f"{row[name]['median']:.2f}" for name in names)] for row in rows])


def text_of(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table of the rows of one server."""
    lines = [
        [
            row["case"],
            f"{row['bytes_per_s']['median'] / 1e6:,.0f}",
            f"{row['of_fastest_plain']['median']:.2f}",
            f"{row['bytes_per_s']['median'] / wire:.2f}" if (wire := row["wire_bytes_per_s"]) else "",
            f"{row['cpu_s_per_gb']['median']:.2f}",
            f"{row['cpu_of_least_plain']['median']:.2f}",
        ]
        for row in rows
    ]
    return table(TITLES, lines)


def main(given: list[str] | None = None) -> None:
    """Measure, print tables, write the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=OUT / "cold", help="Folder for data, cache and rows.")
    parser.add_argument("--megabytes", type=int, default=1024)
    parser.add_argument("--delays", type=float, nargs="+", default=[0.0, 0.02, 0.05], help="Latencies in seconds.")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--wires", type=float, nargs="+", default=[0.0, 125.0], help="Bandwidths of the network in MB/s; 0: no limit."
    )
    parser.add_argument("--only", choices=["waits", "epochs"], help="Measure only a part.")
    parser.add_argument("--quick", action="store_true", help="Smoke test: little data, and no meaningful figures.")
    asked = parser.parse_args(given)
    megabytes, repetitions = (8, 1) if asked.quick else (asked.megabytes, asked.repetitions)
    answers = [*((delay_s, 0.0) for delay_s in asked.delays), (asked.delays[-1], 0.01)]
    networks = [Network(*answer, wire * 1e6) for wire in asked.wires for answer in answers]
    networks = [Network(0.0)] if asked.quick else networks
    folder, target, rows = asked.folder / "data", asked.folder / "target", []
    try:
        data = make_data(folder, megabytes)
        for network in networks if asked.only != "waits" else []:
            found = measure(data, target, network, repetitions)
            print(f"{network}\n{text_of(found)}\n", flush=True)
            rows += found
        limited = [Network(0.0, 0.0, wire * 1e6) for wire in asked.wires if wire]
        limited = [Network(0.0)] if asked.quick else limited
        for record_bytes in WAIT_RECORD_BYTES if asked.only != "epochs" else ():
            data = make_data(folder, min(megabytes, 600), record_bytes)
            for network in limited:
                found = measure_waits(data, target, network, repetitions)
                print(f"{network}, records of {record_bytes} bytes\n{text_of_waits(found)}\n", flush=True)
                rows += found
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(target, ignore_errors=True)
    write_rows(asked.folder / "cold.jsonl", rows)
    print(f"rows: {asked.folder / 'cold.jsonl'}")


if __name__ == "__main__":
    main()
