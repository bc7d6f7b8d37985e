"""What the loader needs of a data set: a small Protocol, so that load/ knows neither stores nor caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from tiercache.model import Following, Keeper, Part, ReadingPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.order import BlockTable
    from tiercache.shard.blocks import Blocks
    from tiercache.shard.types import Schema

__all__ = ["Keeper", "Part", "Source", "make_ready"]


@runtime_checkable
class Source(Protocol):
    """Records as the native path reads them: one version of a data set, a view of it, or several joined.

    Shards of joined data sets are numbered one after the other; those of a view keep their numbers, and count only the
    view's own records. Methods may be called from any thread.
    """

    @property
    def url(self) -> str:
        """The data set's, without credentials; of several the first one's."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """What is read, by data set, in the order in which their shards are numbered."""

    @property
    def schema(self) -> Schema:
        """The columns that are served, in order."""

    @property
    def shard_records(self) -> NDArray[np.int64]:
        """Records of each shard, int64[n_shards]; of a view those that it selects."""

    @property
    def shard_bytes(self) -> NDArray[np.int64]:
        """Stored bytes of each shard, int64[n_shards], whatever is selected."""

    @property
    def listed(self) -> NDArray[np.int64] | None:
        """Where the records are not served in stored order, or more than once: which ones, in served order.

        int64[n], numbers of the records that shard_records and block_tables count, in stored order. None: each once, in
        stored order.
        """

    @property
    def mixture(self) -> Any:
        """How parts are mixed (order.MixtureSpec); None: they follow one another."""

    @property
    def is_cached(self) -> bool:
        """Whether any of it is read through a cache, which publish() tells what comes."""

    def publish(self, plan: ReadingPlan) -> Following | None:
        """Let the cache know when shards are read, until what this gives is closed; None: there is no cache.

        Raises:
            OSError: the plan cannot be written.
        """

    def block_tables(self, shards: Sequence[int]) -> Sequence[BlockTable]:
        """The blocks of each of these shards, from their footers, read side by side.

        records: of a view those that it selects; raw_bytes: of the whole block.
        """

    @property
    def is_whole(self) -> bool:
        """Whether nothing is selected: stored_rows() gives every row back."""

    def stored_rows(
        self, shards: NDArray[np.int32], blocks: NDArray[np.int32], block: NDArray[np.uint32], row: NDArray[np.uint32]
    ) -> NDArray[np.uint32]:
        """Where rows of a view lie in their stored blocks; a source that selects nothing gives `row` back.

        Args:
            shards, blocks: int32[k], of each of k blocks its shard, and its number there.
            block: uint32[n], which of the k blocks each row is of.
            row: uint32[n], its number among the rows of the block that the view selects.

        Returns:
            uint32[n], its number among all rows of the stored block.
        """

    def load(self, shard: int, blocks: Sequence[int]) -> Blocks:
        """Blocks of a shard in memory, the columns that are served. The source keeps the shard open for some time.

        `Blocks.columns` are the served columns in their order, by the numbers that they have in that shard's schema.
        """

    def make_ready(self, shards: NDArray[np.int64]) -> None:
        """Hear that a run begins that reads these shards, int64[m], and see that it can.

        Raises:
            ArchivedShards: some must be restored first; names them all.
            StoreError: where they lie cannot be found out.
        """

    def prefetch(self, shards: Sequence[int]) -> None:
        """Start bringing these shards near, in this order; returns at once."""

    @property
    def is_fetched(self) -> bool:
        """Whether prefetch() may bring anything: else nobody need find out what to ask it for."""

    def is_at_hand(self, shard: int) -> bool:
        """Whether load() of any of its blocks neither reads, fetches nor decodes, as far as that is known by now."""

    def is_near(self, shard: int) -> bool:
        """Whether load() of any of its blocks fetches nothing over a network: it lies on this machine, whole."""

    def heal(self, shard: int) -> bool:
        """Hear that what load() gave of a shard is damaged. True: a local copy was to blame and is gone: load again.

        False: by now there is none, or it is right. In any case load() reads anew what is there.
        """

    def when_closed(self, keeper: Keeper) -> None:
        """Call keeper.forget() when this is closed, unless the keeper has gone: it is referred to weakly."""

    def at_versions(self, versions: Sequence[int]) -> Source:
        """The same choice, selected and joined in the same way, of other versions: one for each of `parts`.

        Raises:
            NotFound: there is no such version.
        """

    def figures(self) -> Mapping[str, float]:
        """requests, bytes_fetched, cache_hits, cache_misses so far, of this process."""


def make_ready(source: Source) -> None:
    """See that a run of a source can begin, whatever its order: all shards that have records. As Source.make_ready."""
    source.make_ready(np.flatnonzero(source.shard_records))
