"""A packed data set whose shards move between stores as the mover moves them: copy, placement, deletion."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tests.support.http_server import HttpFaultServer
from tests.support.records import SCHEMA, check_batch, make_columns

import tiercache as tc
from tiercache.shard import versions as manifest
from tiercache.store import LocalFolder, MemoryStore, Store, placement_log
from tiercache.store.contract import WrapperStore
from tiercache.store.placement_log import PlacementRow

N = 400

T = TypeVar("T")


class Moved:
    """A data set of N records in `home`, copied there from `folder`. folder: None: it is in `home` already."""

    def __init__(self, folder: Path | None, home: Store) -> None:
        self.store = home
        if folder is not None:
            self._pack(folder)
        version = manifest.latest(home)
        self.infos = list(manifest.read_shards(home, version).infos())
        self.dataset_id = version.dataset_id

    def _pack(self, folder: Path) -> None:
        packed, home = LocalFolder(folder), self.store
        if not (folder / "_tiercache").exists():
            with tc.Writer(folder, schema=SCHEMA, shard_size="8KiB", block_size="1KiB") as writer:
                for first in range(0, N, 64):
                    writer.write_batch(make_columns(min(64, N - first), first))
        if packed.url != home.url:
            for info in packed.list():
                home.put(info.key, packed.get(info.key))

    @property
    def keys(self) -> list[str]:
        """Names of its shards, in order."""
        return [info.name for info in self.infos]

    def move(self, keys: list[str], dst: Store, *, drop: bool = True, src: Store | None = None, **row: Any) -> None:
        """Move shards to the folder that dst is, and say so. src: where they lie; None: at home."""
        source = self.store if src is None else src
        changes: dict[str, PlacementRow | None] = {}
        for info in self.infos:
            if info.name in keys:
                dst.put(info.name, source.get(info.name))
                how = {"n_bytes": info.n_bytes, "crc32c": info.crc32c, **row}
                changes[info.name] = None if dst.url == self.store.url else PlacementRow(info.name, dst.url, **how)
        placement_log.commit_placement(self.store, changes)
        if drop:
            source.delete(keys)

    def adopt(self) -> None:
        """Let tiers look after it."""
        placement_log.start_tracking(self.store)


def by_loader(dataset: tc.Dataset, **how: Any) -> list[int]:
    """Ids of an epoch, every column checked."""
    loader = tc.DataLoader(dataset, batch_size=16, **{"shuffle": True, **how})
    return sorted(i for batch in loader for i in check_batch(batch))


def by_record(dataset: tc.Dataset, **_: Any) -> list[int]:
    """Ids of all records, one by one and by batches of numbers."""
    singles = [int(dataset[i]["id"]) for i in range(0, N, 7)]
    assert singles == list(range(0, N, 7))
    return sorted(check_batch_of(dataset[np.arange(N)]))


def by_arrow(dataset: tc.Dataset, **_: Any) -> list[int]:
    """Ids of all records as Arrow batches."""
    return sorted(i for batch in dataset.to_arrow(64) for i in batch.column("id").to_pylist())


def check_batch_of(batch: dict[str, Any]) -> list[int]:
    """As check_batch, of a data set's own batch."""
    ids: list[int] = check_batch(batch)
    return ids


WAYS = {"loader": by_loader, "records": by_record, "arrow": by_arrow}


class ServedStore(WrapperStore):
    """A folder of an HTTP server as its owner sees it, who writes what the server's readers cannot. Closes nothing."""

    def __init__(self, server: HttpFaultServer, folder: str) -> None:
        super().__init__(MemoryStore(f"served-{secrets.token_hex(8)}", folder))
        self._server, self._folder = server, folder
        for key, data in server.objects.items():
            if key.startswith(f"{folder}/"):
                self.inner.put(key.removeprefix(f"{folder}/"), data)
        self.url = f"{server.url}/{folder}"

    def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
        """Make the call; what it has changed is served."""
        answer = call()
        if verb in ("put", "put_if_absent", "delete"):
            for name in [one for one in self._server.objects if one.startswith(f"{self._folder}/")]:
                del self._server.objects[name]
            for info in self.inner.list():
                self._server.objects[f"{self._folder}/{info.key}"] = self.inner.get(info.key)
        return answer

    def forget(self) -> None:
        """Drop what is in memory."""
        self.inner.delete([info.key for info in self.inner.list()])
