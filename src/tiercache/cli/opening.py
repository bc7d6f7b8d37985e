"""Opening of the data set that a URL names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

from tiercache.cli.options import parse_storage_options
from tiercache.pack.files import selected
from tiercache.shard.versions.manifest import Version, latest, read_shards, read_version
from tiercache.shard.versions.segments import ShardTable
from tiercache.store import Store, open_store
from tiercache.tier.placement.redirecting_store import follow_placement


@dataclass(frozen=True)
class OpenDataSet:
    """A version of a data set with its shard table, and the store that holds it."""

    store: Store
    version: Version
    shards: ShardTable

    def select(self, include: Sequence[str] | None, exclude: Sequence[str] | None = None) -> list[int]:
        """Return the numbers of the shards whose names match the globs."""
        names = self.shards.names.to_pylist()
        return [i for i, name in enumerate(names) if selected(name, include or (), exclude or ())]


@contextmanager
def open_data_set_store(url: str, storage_options: Sequence[str] | None) -> Iterator[Store]:
    """Yield the store of a data set's URL, and close it at the end. It finds shards that were moved to other tiers."""
    options = parse_storage_options(storage_options)
    with closing(follow_placement(open_store(url, **options), options)) as store:
        yield store


def open_data_set(store: Store, number: int | None = None) -> OpenDataSet:
    """Return the version of the data set in store with this number; None: the newest.

    Raises:
        NotFound, StoreError: The version or a segment cannot be read.
        CorruptShard: The version or a segment is damaged.
    """
    version = latest(store) if number is None else read_version(store, number)
    return OpenDataSet(store, version, read_shards(store, version))
