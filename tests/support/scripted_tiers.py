"""Tiers whose listings a test sets, and an inventory that is read by names of groups and tiers."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiercache.model import ObjectInfo
from tiercache.store import MemoryStore
from tiercache.tier.inventory import Inventory, take_inventory
from tiercache.tier.journal import entry_table
from tiercache.tier.rules import load_rule_file
from tiercache.tier.stores import Stores

NOW_S = 2_000_000_000.0
OLD_S = NOW_S - 86_400.0
SETTLE_S = 600.0


class ListedStore(MemoryStore):
    """A store that lists the objects that a test adds; small objects may have content that can be read."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.infos: dict[str, ObjectInfo] = {}

    def add(self, key, n_bytes=100, *, modified_s=OLD_S, etag="*", **facts):
        etag = f'"{self.name}-{key}"' if etag == "*" else etag
        self.infos[key] = ObjectInfo(key, n_bytes, etag=etag, modified_s=modified_s, **facts)

    def text(self, key, body, **facts):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.put(key, data)
        self.add(key, len(data), **facts)

    def list(self, prefix=""):
        self.counters.add("requests")
        return iter([info for key, info in self.infos.items() if key.startswith(prefix)])


class ScriptedCatalog(dict):
    """A catalog: (tier, key) -> size, ETag, checksum, whether it is verified, first write time."""

    def checksums(self, tier, /):
        return entry_table([[(key, *known) for (of, key), known in self.items() if of == tier]])

    def open_moves(self, home, /, *states):
        return ()

    def verify(self, store, key, crc32c=7, *, verified=True, written_s=None):
        info = store.infos[key]
        self[store.name.rpartition("-")[2], key] = (info.n_bytes, info.etag, crc32c, verified, written_s)


@dataclass
class Tiers:
    folder: Path
    stores: dict[str, ListedStore]
    catalog: ScriptedCatalog
    rules: str = ""
    tables: str = (
        '[tiers.hot]\nurl = "memory://h"\n[tiers.standard]\nurl = "memory://s"\n[tiers.archive]\nurl = "memory://a"\n'
    )

    @property
    def hot(self):
        return self.stores["hot"]

    @property
    def standard(self):
        return self.stores["standard"]

    @property
    def archive(self):
        return self.stores["archive"]

    @property
    def file(self):
        path = self.folder / "tiercache.toml"
        path.write_text(self.tables + self.rules)
        return load_rule_file(path)

    def clear(self):
        for store in self.stores.values():
            store.delete([info.key for info in MemoryStore.list(store)])

    def take(self, now_s=NOW_S, **options) -> "InventoryByName":
        file = self.file
        given = {tier.name: options.pop(tier.name, self.stores[tier.name]) for tier in file.tiers}
        with Stores(file, stores=given) as stores:
            return InventoryByName(take_inventory(file, stores, self.catalog, now_s=now_s, **options))


class InventoryByName:
    def __init__(self, inventory: Inventory) -> None:
        self.inventory, self.snapshot, self.facts = inventory, inventory.snapshot, inventory.facts
        self.paths = self.snapshot.paths.to_pylist()

    def group(self, path):
        return self.paths.index(path)

    def copy(self, path, tier):
        snapshot = self.snapshot
        at = (snapshot.group == self.group(path)) & (snapshot.tier == snapshot.tiers.index(tier))
        (found,) = np.flatnonzero(at)
        return found

    def of(self, path, column):
        return getattr(self.snapshot, column)[self.group(path)].item()

    def has(self, path, tier, column):
        return getattr(self.snapshot, column)[self.copy(path, tier)].item()

    def objects(self, path, tier):
        table = self.inventory.objects_of(
            np.array([self.group(path)]), np.array([self.snapshot.tiers.index(tier)], np.int8)
        )
        return tuple(
            ObjectInfo(key, n_bytes, etag, crc32c=crc32c, modified_s=modified_s)
            for key, n_bytes, etag, modified_s, crc32c in table.named(0, 1)
        )


def scripted(folder, name):
    stores = {tier: ListedStore(f"{name}-{tier}") for tier in ("hot", "standard", "archive")}
    return Tiers(folder, stores, ScriptedCatalog())
