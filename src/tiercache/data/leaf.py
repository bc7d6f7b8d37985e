"""The leaves of `Records`: what it needs of a version of a data set, of columns side by side, and of packed rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    from tiercache.cache import Cache, WarmProgress
    from tiercache.model import CloseListener, PublishedPlan, ReadingPlan, SourcePart
    from tiercache.order import BlockSizes
    from tiercache.shard.format.statistics import Statistics
    from tiercache.shard.read.blocks import Blocks
    from tiercache.shard.read.values import ColumnValues
    from tiercache.shard.schema import Schema
    from tiercache.shard.versions.segments import ShardTable
    from tiercache.store import Store


@dataclass(frozen=True, slots=True, eq=False)
class ShardSizes:
    """Shards as far as `Records` must know them. Attributes as those of `ShardTable`."""

    n_records: NDArray[np.int64]
    n_bytes: NDArray[np.int64]
    first_record: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.n_records)


class LeafSpec(Protocol):
    """Small picklable description of a leaf."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the served columns, in order."""

    @property
    def versions(self) -> tuple[int, ...]:
        """Number of each version that is read."""

    def open(self) -> Leaf:
        """Open the leaf."""


class Leaf(Protocol):
    """Records in shards and blocks: an `OpenedVersion`, a `ZippedVersion` or a `PackedVersion`.

    All methods may be called from any thread. Shards are given by their numbers in `table`. `OpenedVersion` says what
    the methods raise.
    """

    stored_schema: Schema

    @property
    def table(self) -> ShardTable | ShardSizes:
        """The shards."""

    @property
    def schema(self) -> Schema:
        """Served columns, in order."""

    @property
    def spec(self) -> LeafSpec:
        """Description that opens the leaf again."""

    @property
    def parts(self) -> list[SourcePart]:
        """The versions that are read, as a state names them."""

    @property
    def url(self) -> str:
        """URL of the first data set, without credentials."""

    @property
    def inner(self) -> Store:
        """Store of the first data set."""

    @property
    def cache(self) -> Cache | None:
        """Cache of the first data set."""

    @property
    def has_cache(self) -> bool:
        """Whether records are read through a cache."""

    @property
    def can_prefetch(self) -> bool:
        """Whether prefetch() can fetch anything."""

    @property
    def sends_requests(self) -> bool:
        """Whether load() sends requests to a store, because there is no cache."""

    @property
    def fill_ratio(self) -> float | None:
        """Share of the positions of packed rows that hold stored tokens; None if records are no packed rows."""

    @property
    def is_drawn(self) -> bool:
        """Whether records differ between epochs."""

    def for_epoch(self, seed: int, epoch: int, /) -> Leaf:
        """Return the records as an epoch of a run serves them."""

    def statistics(self, shard: int, /) -> Statistics:
        """Return what is known of each column of a shard, {} if nothing is."""

    def block_sizes(self, shards: Sequence[int], /) -> list[BlockSizes]:
        """Return the block sizes of each of these shards."""

    def load(self, shard: int, blocks: Sequence[int], /) -> Blocks:
        """Return blocks of a shard in memory, with the served columns."""

    def arrays(self, shard: int, block: int, /) -> list[pa.Array]:
        """Return a block as Arrow arrays of the served columns, completely checked."""

    def record(self, number: int, /) -> dict[str, Any] | None:
        """Return a record by column; None if it is not mapped: then call values()."""

    def values(self, records: NDArray[np.int64], /) -> list[ColumnValues]:
        """Return the values of records by column."""

    def publish(self, plan: ReadingPlan, /) -> PublishedPlan | None:
        """Tell the cache when shards are read, until the result is closed; None: there is no cache."""

    def prefetch(self, shards: Sequence[int], /) -> None:
        """Start to fetch these shards to this machine, in this order; return at once."""

    def prefetch_blocks(self, shard: int, blocks: Sequence[int], /) -> None:
        """Start to fetch blocks of a shard before all that prefetch() was asked for; return at once."""

    def is_mapped(self, shard: int, /) -> bool:
        """Whether load() of any block of the shard only maps it, as far as is known without looking."""

    def is_local(self, shard: int, /) -> bool:
        """Whether the served columns of the shard are on this machine."""

    def remove_if_corrupt(self, shard: int, /) -> bool:
        """Remove a shard's local copies that are corrupt; return whether there were any."""

    def prepare_reading(self, shards: NDArray[np.int64], /) -> None:
        """Check that a run can read these shards."""

    def warm(
        self, shards: Sequence[int], /, *, jobs: int, on_progress: Callable[[WarmProgress], None] | None = None
    ) -> None:
        """Fetch the served columns of shards into the cache."""

    def figures(self) -> Mapping[str, float]:
        """Return the counters of this process."""

    def on_close(self, keeper: CloseListener, /) -> None:
        """Call keeper.on_source_closed() when the leaf is closed. The keeper is referenced weakly."""

    def close(self) -> None:
        """Release shards and connections. The leaf may be read again afterwards."""

    def at_versions(self, numbers: Sequence[int], /) -> Leaf:
        """Return the same records of other versions, one for each of `parts`."""

    def with_columns(self, columns: Sequence[str], /) -> Leaf:
        """Return the same records with other columns."""

    def for_scan(self, columns: Sequence[str], /) -> Leaf:
        """Return the same as with_columns(), for a single pass that does not fill the cache."""
