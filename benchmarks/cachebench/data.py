"""The data set of the cache benchmarks, and a server on loopback that counts the bytes fetched from it."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

import tiercache as tc
from support import HttpFaultServer, S3Server
from tiercache.cache.folder import charge_bytes
from tiercache.shard.versions import latest, read_shards
from tiercache.store import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

RECORD_BYTES = 4096
BLOCK_BYTES = 256 << 10


@dataclass(frozen=True)
class Sizes:
    """Size of a data set. shard_bytes: Approximate size of a shard's records."""

    n_shards: int
    shard_bytes: int

    @property
    def n_records(self) -> int:
        """Number of records of all shards."""
        return self.n_shards * (self.shard_bytes // RECORD_BYTES)


@dataclass(frozen=True)
class Packed:
    """A packed data set.

    names, shard_records, shard_bytes: Key, records and bytes of each shard, int64[n_shards]. segment_bytes: Size of the
    lists of shards.
    """

    folder: Path
    name: str
    n_records: int
    names: tuple[str, ...]
    shard_records: NDArray[np.int64]
    shard_bytes: NDArray[np.int64]
    segment_bytes: int

    @property
    def n_bytes(self) -> int:
        """Total size of the shards in bytes."""
        return int(self.shard_bytes.sum())

    def budget(self, share: float) -> int:
        """Return the cache size that holds a share of the shards, including file-system blocks and catalog entries.

        A shard of 128 MiB takes 0.003 % more than its bytes, one of 1 MiB 0.6 %; the bounds do not count this overhead.
        """
        shards = sum(charge_bytes(int(n)) for n in self.shard_bytes)
        return int(shards * share) + charge_bytes(self.segment_bytes)


def pack(folder: Path, name: str, sizes: Sizes) -> Packed:
    """Pack numbered records of random bytes, or reuse those of an earlier run."""
    digest = hashlib.sha256(f"{name} {sizes} {Path(__file__).read_text()}".encode()).hexdigest()[:12]
    place = folder / f"data-{name}-{digest}"
    if not (place / "_tiercache" / "latest").exists():
        shutil.rmtree(place, ignore_errors=True)
        _write(place, sizes)
    store = open_store(str(place))
    version = latest(store)
    table = read_shards(store, version)
    segment_bytes = sum(segment.n_bytes for segment in version.segments)
    return Packed(
        place, name, version.n_records, tuple(table.names.to_pylist()), table.n_records, table.n_bytes, segment_bytes
    )


def _write(place: Path, sizes: Sizes) -> None:
    per_shard = sizes.shard_bytes // RECORD_BYTES
    random = np.random.default_rng(7)
    schema = {"id": "int64", "content": tc.Tensor("uint8", (RECORD_BYTES - 8,))}
    options = {"shard_size": sizes.shard_bytes, "block_size": min(BLOCK_BYTES, sizes.shard_bytes)}
    with tc.Writer(place, schema=schema, compression="none", **options) as writer:
        for shard in range(sizes.n_shards):
            ids = np.arange(shard * per_shard, (shard + 1) * per_shard)
            writer.write_batch({"id": ids, "content": random.integers(0, 256, (per_shard, RECORD_BYTES - 8), np.uint8)})


class Served(Protocol):
    """Data sets behind a server."""

    @property
    def storage_options(self) -> dict[str, Any]:
        """Options that a store needs to reach them."""

    def url(self, packed: Packed) -> str:
        """Return the URL of a data set."""

    def taken(self) -> dict[str, int]:
        """Return the bytes sent since the last call, by shard key, others under "". Empty if they are not counted."""


class ServedByHttp:
    """Data sets behind an HTTP server that counts the bytes of responses by object."""

    storage_options: ClassVar[dict[str, Any]] = {}

    def __init__(self, server: HttpFaultServer) -> None:
        self._server = server

    def url(self, packed: Packed) -> str:
        """See Served.url."""
        return f"{self._server.url}/{packed.name}"

    def taken(self) -> dict[str, int]:
        """See Served.taken."""
        found: dict[str, int] = {}
        log, self._server.log = self._server.log, []
        for seen in log:
            key = seen.path if seen.path.endswith(".tcs") else ""
            found[key] = found.get(key, 0) + seen.n_bytes
        return found


@contextmanager
def serving(*packed: Packed) -> Iterator[Served]:
    """Serve data sets from memory."""
    objects = {
        f"{one.name}/{path.relative_to(one.folder).as_posix()}": path.read_bytes()
        for one in packed
        for path in one.folder.rglob("*")
        if path.is_file()
    }
    with HttpFaultServer(objects) as server:
        yield ServedByHttp(server)


class ServedByS3:
    """Data sets in a bucket of a real S3 server, which does not count bytes."""

    def __init__(self, server: S3Server) -> None:
        self._server, self.storage_options = server, server.storage_options

    def url(self, packed: Packed) -> str:
        """See Served.url."""
        return f"{self._server.url}/{packed.name}"

    def taken(self) -> dict[str, int]:
        """See Served.taken."""
        return {}


@contextmanager
def serving_s3(*packed: Packed) -> Iterator[Served]:
    """Serve data sets from SeaweedFS."""
    with S3Server() as server:
        served = ServedByS3(server)
        for one in packed:
            store = open_store(served.url(one), **server.storage_options)
            for path in one.folder.rglob("*"):
                if path.is_file():
                    store.put(path.relative_to(one.folder).as_posix(), path.read_bytes())
        yield served
