"""The loader's interface to a data set, a Protocol, and the error that names a record of it.

load/ knows neither stores nor caches, only this Protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from tiercache.errors import CorruptShard, TierCacheError
from tiercache.model import CloseListener, PublishedPlan, ReadingPlan, SourcePart

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.load.output_spec import OutputSpec
    from tiercache.order import BlockTable
    from tiercache.shard.read.blocks import Blocks
    from tiercache.shard.schema import Schema


__all__ = ["CloseListener", "Source", "SourcePart"]


@dataclass(frozen=True, slots=True)
class NativeAccess:
    """What a tiercache data set gives to the loader, by its method `__tiercache__`.

    Attributes:
        source: The records that are read.
        output_spec: Layouts, fill values, casts and decoders of the columns.
        is_plain: Whether records are served as stored: no transform, and no subclass that overrides record access.
        with_source: Function that returns the same data set over another source.
    """

    source: Source
    output_spec: OutputSpec
    is_plain: bool
    with_source: Callable[[Any], Any]


@runtime_checkable
class NativeDataset(Protocol):
    """A data set that the loader reads by its native path: `tiercache.Dataset`."""

    def __len__(self) -> int: ...

    def __tiercache__(self) -> NativeAccess:
        """Return what the loader reads."""


def native_access(dataset: object) -> NativeAccess | None:
    """Return the access to a tiercache data set; None for any other data set."""
    return dataset.__tiercache__() if isinstance(dataset, NativeDataset) else None


@runtime_checkable
class Source(Protocol):
    """The records that the native path reads: one version of a data set, a view of it, or several data sets joined.

    The shards of joined data sets are numbered one data set after the other. The shards of a view keep their numbers
    and count only the view's own records. All methods may be called from any thread.
    """

    @property
    def url(self) -> str:
        """URL of the data set, without credentials; of several data sets that of the first."""

    @property
    def parts(self) -> tuple[SourcePart, ...]:
        """The data sets that are read, in the order in which their shards are numbered."""

    @property
    def schema(self) -> Schema:
        """The columns that are served, in order."""

    @property
    def shard_records(self) -> NDArray[np.int64]:
        """Number of records of each shard, int64[n_shards]; in a view the records that it selects."""

    @property
    def shard_bytes(self) -> NDArray[np.int64]:
        """Stored bytes of each shard, int64[n_shards], whatever is selected."""

    @property
    def record_order(self) -> NDArray[np.int64] | None:
        """Record numbers in served order, int64[n], if records are reordered or repeated.

        The numbers count the records of shard_records and block_tables in stored order. None: each record once, in
        stored order.
        """

    @property
    def mixture(self) -> Any:
        """The mixture of the parts (order.MixtureSpec); None: the parts follow one another."""

    @property
    def has_cache(self) -> bool:
        """Whether a cache is in use for any part; publish() gives that cache the read plan."""

    def publish(self, plan: ReadingPlan) -> PublishedPlan | None:
        """Tell the cache when shards are read, until the returned object is closed; None: there is no cache.

        Raises:
            OSError: The plan cannot be written.
        """

    def block_tables(self, shards: Sequence[int]) -> Sequence[BlockTable]:
        """Return the block table of each of these shards, from their footers, which are read concurrently.

        records: of a view those that it selects; raw_bytes: of the whole block.
        """

    @property
    def selects_all(self) -> bool:
        """Whether all records are selected, so that stored_rows() returns each row unchanged."""

    def stored_rows(
        self, shards: NDArray[np.int32], blocks: NDArray[np.int32], block: NDArray[np.uint32], row: NDArray[np.uint32]
    ) -> NDArray[np.uint32]:
        """Return the stored row numbers of rows of a view; a source that selects all records returns `row`.

        Args:
            shards, blocks: int32[k], the shard of each of k blocks, and the block's number in that shard.
            block: uint32[n], for each row the index of its block among the k blocks.
            row: uint32[n], number of each row among the rows of its block that the view selects.

        Returns:
            uint32[n], number of each row among all rows of the stored block.
        """

    def load(self, shard: int, blocks: Sequence[int]) -> Blocks:
        """Load the served columns of some blocks of a shard. The source keeps the shard open for some time.

        `Blocks.columns` lists the served columns, in order, by their numbers in that shard's schema.
        """

    def prepare_reading(self, shards: NDArray[np.int64]) -> None:
        """Check that a run can read these shards, int64[m]. The engine calls it before the first epoch.

        Raises:
            ArchivedShards: Some shards must be restored first; the error names all of them.
            StoreError: Their location cannot be determined.
        """

    def prefetch(self, shards: Sequence[int]) -> None:
        """Start to fetch these shards to this machine, in this order; returns at once."""

    @property
    def can_prefetch(self) -> bool:
        """Whether prefetch() can fetch anything; if not, no caller needs to compute the shards for it."""

    def is_mapped(self, shard: int) -> bool:
        """Whether load() of any block of the shard only maps it: it neither reads, fetches nor decodes.

        The answer is what the source knows now, without looking.
        """

    def is_local(self, shard: int) -> bool:
        """Whether the whole shard is on this machine, so that load() of any of its blocks needs no network."""

    def discard_corrupt_copy(self, shard: int) -> bool:
        """Verify the local copy of a shard after load() returned corrupt data; load() reads anew afterwards.

        Returns:
            True: a local copy was corrupt and was removed, so load the blocks again. False: there is no local copy, or
            it is right.
        """

    def on_close(self, keeper: CloseListener) -> None:
        """Call keeper.on_source_closed() when this source is closed. The keeper is referenced weakly."""

    def at_versions(self, versions: Sequence[int]) -> Source:
        """Return the same source, selected and joined in the same way, at other versions: one per entry of `parts`.

        Raises:
            NotFound: There is no such version.
        """

    def figures(self) -> Mapping[str, float]:
        """Return requests, bytes_fetched, cache_hits and cache_misses of this process so far."""


def record_number(source: Source, shard: int, block: int, row: int) -> int:
    """Return the number, in stored order, of the record in a row of a block of a shard. May read a footer."""
    before = source.block_tables([shard])[0].records[:block].sum() + source.shard_records[:shard].sum()
    return int(before) + row


def image_decode_error(source: Source, column: str, record: int, reason: str) -> CorruptShard:
    """Return the error of an image that cannot be decoded: url, block, column, record and the decoder's message."""
    ends = np.cumsum(source.shard_records)
    shard = int(np.searchsorted(ends, record, side="right"))
    within = record - int(ends[shard] - source.shard_records[shard])
    block_ends = np.cumsum(source.block_tables([shard])[0].records)
    block = int(np.searchsorted(block_ends, within, side="right"))
    try:
        url = source.load(shard, [block]).url
    except TierCacheError:  # The shard can no longer be read; the image's error is the one to report.
        url = source.url
    message = f"record {record}: the image cannot be decoded: {reason}"
    return CorruptShard(message, url=url, block=block, column=column, record=record)
