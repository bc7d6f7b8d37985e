"""One version of a data set, open for reading: store, cache, segments and shards joined.

What the loader knows a data set by.
"""

from __future__ import annotations

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary, ref

import numpy as np
import pyarrow as pa

from tiercache.access import Access, Opener
from tiercache.cache import CachedStore
from tiercache.cache.copy_names import CopyNames
from tiercache.cache.place import Place, announce
from tiercache.errors import CorruptShard
from tiercache.model import ByteRange, Keeper, Part, ReadingPlan, ShardIdentity
from tiercache.order import BlockTable
from tiercache.shard import readers
from tiercache.shard.cast import served_columns
from tiercache.shard.footers import Footers
from tiercache.shard.joining import arrow_join, join, none_of
from tiercache.shard.manifest import latest, list_versions, read_shards, read_version
from tiercache.shard.mapped import MappedRecords
from tiercache.shard.opening import read_footer_alone
from tiercache.shard.projection import column_ranges
from tiercache.shard.segments import as_arrow
from tiercache.shard.statistics import parse_statistics
from tiercache.store import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from tiercache.cache import WarmProgress
    from tiercache.model import Following
    from tiercache.shard.blocks import Blocks
    from tiercache.shard.layout import Footer
    from tiercache.shard.reader import ShardReader
    from tiercache.shard.segments import ShardTable
    from tiercache.shard.statistics import Facts
    from tiercache.shard.types import Schema
    from tiercache.shard.values import ColumnValues
    from tiercache.shard.versions import Version

# Footers of a group are read side by side: their time is round trips.
FOOTER_THREADS = 16
# Block tables are some KiB each; a group has a few dozen shards.
MAX_TABLES = 4096

T = TypeVar("T")

logger = logging.getLogger("tiercache")


@dataclass(frozen=True, slots=True)
class Stored:
    """What an opened version is made of: place, number, and names of the columns in order."""

    place: Place
    version: int
    columns: tuple[str, ...]

    @property
    def versions(self) -> tuple[int, ...]:
        """As views.Plan.versions."""
        return (self.version,)

    def open(self, opened: dict[int, Any]) -> OpenedVersion:
        """As views.Plan.open."""
        found: OpenedVersion | None = opened.get(id(self))
        if found is None:
            found = opened[id(self)] = OpenedVersion(self.place, self.version, self.columns)
        return found


class OpenedVersion:
    """One version of a data set with a choice of columns; implements load.source.Source and views.Readable.

    Safe from any thread; after a fork the child opens its own shards. Nothing of a shard is read before it is asked
    for.
    """

    def __init__(self, place: Place, version: int | None, columns: Sequence[str] | None) -> None:
        self.place = place
        self.access = access = Access(place)
        self.inner, self.cache, self.store = access.inner, access.cache, access.store
        self.manifest: Version = latest(self.store) if version is None else read_version(self.store, version)
        self.stored_schema: Schema = self.manifest.schema
        self.table: ShardTable = read_shards(self.store, self.manifest)
        self.n_records = int(self.table.first_record[-1])
        self._names = CopyNames(self.manifest, self.table)
        # Of this version and others, with any columns, while somebody has them: joined views of one share what is open.
        self._kin: WeakValueDictionary[tuple[Any, ...], OpenedVersion] = WeakValueDictionary()
        self._keepers: list[ref[Keeper]] = []
        if self.cache is not None:
            announce(self.url, self.dataset_id, np.asarray(self.table.n_bytes), self.cache)
        self._serve(self.stored_schema.names if columns is None else columns)

    def _serve(self, columns: Sequence[str], open_shard: Callable[..., ShardReader] = Opener.open) -> None:
        self._schema = self.stored_schema.select(columns)
        self._tables: dict[int, BlockTable] = {}
        self._ranges: dict[int, tuple[ByteRange, ...] | None] = {}  # of the served columns, where they are known
        self.stored_columns = tuple(self.stored_schema.index(name) for name in self._schema.names)
        self.plan = Stored(self.place, self.version, self._schema.names)
        self._served = served_columns(self._schema, self.place.casts)
        self._mapped = MappedRecords(
            self.stored_schema, self.stored_columns, self.table.first_record, self.url, self._served
        )
        # A function of its own, not a method: a cycle would keep descriptors open until the collector comes by.
        how = {"verify": self.place.verify, "served": self._served}
        self._footers = Footers()
        opener = Opener(self.store, self.access.tiers, self.table, self.dataset_id, self._footers)
        self._readers = readers.Readers(partial(open_shard, opener, **how), self._mapped)

    @property
    def url(self) -> str:
        """The data set's, without credentials."""
        return self.inner.url

    @property
    def dataset_id(self) -> str:
        """Of the data set, the same for all its versions."""
        return self.manifest.dataset_id

    @property
    def version(self) -> int:
        """The version's number."""
        return self.manifest.number

    @property
    def fingerprint(self) -> str:
        """Of the version's contents; what resume checks against."""
        return self.manifest.fingerprint

    @property
    def schema(self) -> Schema:
        """The columns that are served, in order, as they are stored: what is cast has another dtype when it is read."""
        return self._schema

    @property
    def parts(self) -> tuple[Part, ...]:
        """This one: a version, of which all records are read."""
        return (Part(self.dataset_id, self.version, self.fingerprint),)

    @property
    def listed(self) -> None:
        """Records are served in stored order."""

    @property
    def mixture(self) -> None:
        """Nothing is mixed."""

    @property
    def shard_records(self) -> NDArray[np.int64]:
        """Records of each shard, int64[n_shards]."""
        return self.table.n_records

    @property
    def shard_bytes(self) -> NDArray[np.int64]:
        """Stored bytes of each shard, int64[n_shards]."""
        return self.table.n_bytes

    @property
    def first_record(self) -> NDArray[np.int64]:
        """Number of each shard's first record, and of all records; int64[n_shards + 1]."""
        return self.table.first_record

    @property
    def is_in_stored_order(self) -> bool:
        """Records are served as they are stored."""
        return True

    @property
    def leaves(self) -> tuple[OpenedVersion, ...]:
        """This one."""
        return (self,)

    def versions(self) -> list[int]:
        """Numbers of all versions there are, oldest first."""
        return list_versions(self.inner)

    def statistics(self, shard: int) -> Facts:
        """See Readable.statistics."""
        text = self.table.arrow["statistics"][shard].as_py()
        try:
            return parse_statistics(text, self.stored_schema, int(self.table.n_records[shard]))
        except ValueError as error:
            ends = np.cumsum([segment.n_shards for segment in self.manifest.segments])
            segment = self.manifest.segments[int(np.searchsorted(ends, shard, side="right"))]
            name = self.table.names[shard].as_py()
            url = f"{self.store.url}/{segment.key}"
            raise CorruptShard(f"its row of shard {name!r}: {error}", url=url, part="segment") from error

    def identity(self, shard: int) -> ShardIdentity:
        """What the cache keeps the shard's copy by."""
        return self.table.info(shard).identity(self.dataset_id)

    def block_tables(self, shards: Sequence[int]) -> list[BlockTable]:
        """The blocks of each of these shards, from their footers, read side by side. Raises as `load`."""
        tables = self._tables  # which another thread may replace
        missing = [shard for shard in dict.fromkeys(shards) if shard not in tables]
        if len(tables) + len(missing) > MAX_TABLES:
            self._tables = tables = {shard: tables[shard] for shard in shards if shard in tables}
            self._ranges = {shard: self._ranges.get(shard) for shard in tables}
        with ThreadPoolExecutor(min(FOOTER_THREADS, max(len(missing), 1)), "tiercache-footer") as pool:
            tables.update(zip(missing, pool.map(self._read_table, missing), strict=True))
        return [tables[shard] for shard in shards]

    @property
    def is_whole(self) -> bool:
        """See Source.is_whole."""
        return True

    def stored_rows(
        self,
        shards: NDArray[np.int32],  # noqa: ARG002 -- of Source
        blocks: NDArray[np.int32],  # noqa: ARG002
        block: NDArray[np.uint32],  # noqa: ARG002
        row: NDArray[np.uint32],
    ) -> NDArray[np.uint32]:
        """The rows themselves: all of a block's rows are read."""
        return row

    def load(self, shard: int, blocks: Sequence[int]) -> Blocks:
        """Blocks of a shard in memory, the columns that are served.

        Raises:
            NotFound, StoreError: the store.
            CorruptShard: damaged bytes, which fetching them again did not cure.
        """
        return self._read(shard, lambda reader: reader.load(blocks, self.stored_columns))

    def arrays(self, shard: int, block: int) -> list[pa.Array]:
        """A block as Arrow arrays, the columns that are served, wholly checked. Raises as `load`."""

        def read(reader: ShardReader) -> list[pa.Array]:
            loaded = reader.load([block], self.stored_columns)
            return [loaded.array(0, column) for column in self.stored_columns]

        return self._read(shard, read)

    def record(self, number: int) -> dict[str, Any] | None:
        """A record by its number in the data set: a value by column; None: it is not mapped, ask with `values`.

        Raises IndexError for one that is not there.
        """
        return self._mapped.record(number)

    def values(self, records: NDArray[np.int64]) -> list[ColumnValues]:
        """Values of records by their numbers in the data set, int64[n], by column.

        Of all shards at once where they are mapped, else shard by shard. Raises as `load`, and IndexError for a record
        that is not there.
        """
        if not len(records):
            return none_of(self._schema, self._served)
        found = self.take_mapped(records)
        if found is not None:
            return found
        shards, places = self._by_shard(records)
        within = [records[where] - self.first_record[shard] for shard, where in zip(shards, places, strict=True)]
        return join(self._take_all(shards, within), places)

    def take_arrow(self, records: NDArray[np.int64]) -> list[pa.Array]:
        """As `values`, as Arrow arrays. Each block is read once."""
        taken: list[list[pa.Array]] = []
        order: list[NDArray[np.int64]] = []
        for shard, where in zip(*self._by_shard(records), strict=True):
            rows = records[where] - self.first_record[shard]
            ends = np.cumsum(self.block_tables([shard])[0].records)
            of_block = np.searchsorted(ends, rows, side="right")
            for block in np.unique(of_block).tolist():
                mine = np.flatnonzero(of_block == block)
                within = pa.array(rows[mine] - (ends[block - 1] if block else 0))
                taken.append([array.take(within) for array in self.arrays(shard, block)])
                order.append(where[mine])
        return arrow_join(taken, order, self._schema)

    def _by_shard(self, records: NDArray[np.int64]) -> tuple[list[int], list[NDArray[np.int64]]]:
        """The shards that have these records, and which of the records each has."""
        shards = np.searchsorted(self.first_record, records, side="right") - 1
        asked: list[int] = np.unique(shards).tolist()
        return asked, [np.flatnonzero(shards == shard) for shard in asked]

    def take_mapped(self, records: NDArray[np.int64]) -> list[ColumnValues] | None:
        """None: not all of them can be had from mapped shards; ask shard by shard."""
        found = self._mapped.take(records)
        if found is None:
            shards = np.unique(np.searchsorted(self.table.first_record, records, side="right") - 1)
            # More than can be open at once would push each other out.
            if len(shards) <= self._readers.capacity and all(map(self._readers.map, shards.tolist())):
                found = self._mapped.take(records)
        return found

    def _take_all(self, shards: Sequence[int], rows: Sequence[NDArray[np.int64]]) -> list[list[ColumnValues]]:
        """Values of some rows of each of these shards, by column."""
        if len(shards) < 2 or isinstance(self.inner, LocalStore):
            return [self._take(shard, within) for shard, within in zip(shards, rows, strict=True)]
        # Their time is round trips, as that of footers.
        with ThreadPoolExecutor(min(FOOTER_THREADS, len(shards)), "tiercache-records") as pool:
            return list(pool.map(self._take, shards, rows))

    @property
    def is_cached(self) -> bool:
        """Whether it is read through a cache."""
        return isinstance(self.store, CachedStore)

    def publish(self, plan: ReadingPlan) -> Following | None:
        """See Source. The segments, which are mapped, are in use as long as it is."""
        if not isinstance(self.store, CachedStore) or self.cache is None:
            return None
        # Asked first: of a cache that is being closed it raises, and then nothing must have been published.
        has_room = int(self.table.n_bytes.sum()) <= self.cache.limit_bytes
        following = self.store.publish(*self._names.planned(plan))
        return following if has_room else readers.Letting(following, self._readers, plan)

    @property
    def is_fetched(self) -> bool:
        """See Source.is_fetched."""
        return self.access.fetcher is not None

    def prefetch(self, shards: Sequence[int]) -> None:
        """Start fetching what is served of these shards and is not here."""
        fetcher = self.access.fetcher
        if fetcher is None:
            return
        # One that is open asks for what it needs. If it was refused it is read by ranges to its end: fetched as a whole
        # where there is room by now, what was read of it would come twice.
        coming = [shard for shard in dict.fromkeys(shards) if shard not in self._readers]
        objects = self.table.objects(self.dataset_id, np.array(coming, np.int64))
        for shard, (key, identity) in zip(coming, objects, strict=True):
            if self.access.is_worth_fetching(key, identity):
                fetcher.fetch_ahead(key, identity, self._ranges.get(shard))

    def is_at_hand(self, shard: int) -> bool:
        """Whether the shard is open, and what is served of it lies in a mapping as it is."""
        return shard in self._readers and self._readers.get(shard).stays_mapped(self.stored_columns)

    def heal(self, shard: int) -> bool:
        """Drop a shard's copy from the cache if it is not what the source sent; True: it was, load it again."""
        key, identity = self._object(shard)
        healed = self.access.distrust(key, identity)
        self._readers.drop(shard)  # also if the copy is right: it may not be the one that was opened, but a newer one
        if healed:
            logger.warning("%s: the local copy of %s was damaged and is fetched again", self.url, key)
        return healed

    def is_near(self, shard: int) -> bool:
        """Whether what is served of the shard lies on this machine: in a local folder, or in the cache."""
        key, identity = self._object(shard)
        is_open = self.is_cached and self.is_at_hand(shard)
        return is_open or self.access.is_near(key, identity, self._ranges.get(shard))

    def make_ready(self, shards: NDArray[np.int64]) -> None:
        """See Source."""
        keys = self.table.names.take(as_arrow(shards))
        reads_all = len(shards) == len(self.table)
        self.access.make_ready(keys, lambda i: self.identity(int(shards[i])), reads_all=reads_all)

    def at_versions(self, versions: Sequence[int]) -> OpenedVersion:
        """The same choice of another version. Raises NotFound, SchemaError (a column is not there)."""
        (number,) = versions
        names = self._schema.names
        return self._shared((number, names), lambda: OpenedVersion(self.place, number, names))

    def with_columns(self, columns: Sequence[str]) -> OpenedVersion:
        """The same version with other columns, shards of its own. Raises SchemaError (a column is not there)."""
        return self._served_otherwise(columns, Opener.open)

    def scanning(self, columns: Sequence[str]) -> OpenedVersion:
        """As `with_columns`, to be read once: what the cache has not is read past it, for it would push others out."""
        return self._served_otherwise(columns, Opener.open_past_cache)

    def _served_otherwise(self, columns: Sequence[str], open_shard: Callable[..., ShardReader]) -> OpenedVersion:
        def make() -> OpenedVersion:
            other = copy.copy(self)
            other._serve(columns, open_shard)  # noqa: SLF001 -- of this class
            return other

        return self._shared((tuple(columns), open_shard), make)

    def _shared(self, key: tuple[Any, ...], make: Callable[[], OpenedVersion]) -> OpenedVersion:
        """What somebody has by this key already, or a new one."""
        found = self._kin.get(key)
        return self._kin.setdefault(key, make()) if found is None else found

    def warm(
        self, shards: Sequence[int], *, jobs: int, on_progress: Callable[[WarmProgress], None] | None = None
    ) -> None:
        """Bring what is served of shards into the cache; nothing to do for a local folder.

        Raises CacheFull, StoreError, CorruptShard.
        """
        if self.cache is not None:
            wanted = self.table.objects(self.dataset_id, np.array(shards, np.int64))
            ranges = self._ranges_of(shards)
            self.cache.warm(self.store, wanted, jobs=jobs, ranges=ranges, on_progress=on_progress)

    def figures(self) -> dict[str, float]:
        """requests, bytes_fetched, cache_hits, cache_misses so far, of this process."""
        return self.access.figures()

    def close(self) -> None:
        """Give shards and connections back; shards in use stay good until they are dropped."""
        for (
            keeper
        ) in self._keepers:  # first: what reads ahead would open shards, and begin anew at a store that was closed
            found = keeper()
            if found is not None:
                found.forget()
        self._readers.clear()
        self.access.close()

    def when_closed(self, keeper: Keeper) -> None:
        """See Source. Of two threads that call it at once one may go unheard: its keeper then keeps until it goes."""
        self._keepers = [*(known for known in self._keepers if known() is not None), ref(keeper)]

    def _take(self, shard: int, rows: NDArray[np.int64]) -> list[ColumnValues]:
        return self._read(shard, lambda reader: reader.take(rows, self.stored_columns))

    def _read_table(self, shard: int) -> BlockTable:
        footer = self._footer(shard)
        if self.is_cached:
            self._ranges[shard] = column_ranges(footer, self.table.info(shard), self.stored_columns)
        return BlockTable(footer.block_records.astype(np.int64), footer.block_raw_bytes.astype(np.int64))

    def _footer(self, shard: int) -> Footer:
        if isinstance(self.store, CachedStore) and shard not in self._readers:
            info = self.table.info(shard)
            if not self.store.is_here(info.name, self.identity(shard), [ByteRange(info.footer_offset, info.n_bytes)]):
                # A group's order needs all its footers: some KiB each now, not each shard whole before the first batch.
                footer = read_footer_alone(self.access.placed.by_ranges, info.name, info)
                self._footers.put(shard, footer)
                return footer
        return self._read(shard, lambda reader: reader.footer)

    def _ranges_of(self, shards: Sequence[int]) -> dict[str, tuple[ByteRange, ...]]:
        """What is served of shards, by key, where that is less than all; a request for each footer not known yet."""
        found: dict[str, tuple[ByteRange, ...]] = {}
        is_all = len(self.stored_columns) == len(self.stored_schema)
        for first in range(0, 0 if is_all else len(shards), MAX_TABLES):
            some = shards[first : first + MAX_TABLES]
            self.block_tables(some)
            known = [(shard, self._ranges.get(shard)) for shard in some]
            found |= {self.table.info(shard).name: ranges for shard, ranges in known if ranges is not None}
        return found

    def _object(self, shard: int) -> tuple[str, ShardIdentity]:
        return self.table.objects(self.dataset_id, np.array([shard], np.int64))[0]

    def _read(self, shard: int, read: Callable[[ShardReader], T]) -> T:
        """What read gives; once more where the cache's copy was to blame, or may be another than the one read."""
        try:
            return read(self._readers.get(shard))
        except CorruptShard:
            if not self.heal(shard) and self.cache is None:
                raise  # nobody replaces what was read
        return read(self._readers.get(shard))
