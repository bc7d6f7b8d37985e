"""Opens what a URL names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

from tiercache.cli.options import parse_storage_options
from tiercache.pack.files import selected
from tiercache.shard.manifest import latest, read_shards, read_version
from tiercache.shard.segments import ShardTable
from tiercache.shard.versions import Version
from tiercache.store import Store, open_store
from tiercache.tier.placed import placed


@dataclass(frozen=True)
class OpenDataSet:
    """A version of a data set, and the store that it is in."""

    store: Store
    version: Version
    shards: ShardTable

    def select(self, include: Sequence[str] | None, exclude: Sequence[str] | None = None) -> list[int]:
        """Numbers of the shards whose names pass the globs."""
        names = self.shards.names.to_pylist()
        return [i for i, name in enumerate(names) if selected(name, include or (), exclude or ())]


@contextmanager
def opened_store(url: str, storage_options: Sequence[str] | None) -> Iterator[Store]:
    """The store of a data set's URL, which finds shards that were moved to another tier; closed at the end."""
    options = parse_storage_options(storage_options)
    with closing(placed(open_store(url, **options), options)) as store:
        yield store


def open_data_set(store: Store, number: int | None = None) -> OpenDataSet:
    """A version of the data set in store, None for the newest. Raises NotFound, CorruptShard, StoreError."""
    version = latest(store) if number is None else read_version(store, number)
    return OpenDataSet(store, version, read_shards(store, version))
