"""What the loader needs of a data set: a small Protocol, so that load/ knows neither stores nor caches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tiercache.order import BlockTable
    from tiercache.shard.blocks import Blocks
    from tiercache.shard.types import Schema


@runtime_checkable
class Source(Protocol):
    """One version of a data set, as the native path reads it. Methods may be called from any thread."""

    @property
    def url(self) -> str:
        """The data set's, without credentials."""

    @property
    def dataset_id(self) -> str:
        """Of the data set, the same for all its versions."""

    @property
    def version(self) -> int:
        """The version's number."""

    @property
    def fingerprint(self) -> str:
        """Of the version's contents."""

    @property
    def schema(self) -> Schema:
        """The columns that are served, in order."""

    @property
    def stored_columns(self) -> tuple[int, ...]:
        """Their indices in the shards' own schema."""

    @property
    def shard_records(self) -> NDArray[np.int64]:
        """Records of each shard, int64[n_shards]."""

    @property
    def shard_bytes(self) -> NDArray[np.int64]:
        """Stored bytes of each shard, int64[n_shards]."""

    def block_tables(self, shards: Sequence[int]) -> Sequence[BlockTable]:
        """The blocks of each of these shards, from their footers, read side by side."""

    def load(self, shard: int, blocks: Sequence[int]) -> Blocks:
        """Blocks of a shard in memory, the columns that are served. The source keeps the shard open for some time."""

    def prefetch(self, shards: Sequence[int]) -> None:
        """Start bringing these shards near, in this order; returns at once."""

    def is_at_hand(self, shard: int) -> bool:
        """Whether load() of any of its blocks neither reads, fetches nor decodes, as far as that is known by now."""

    def heal(self, shard: int) -> bool:
        """Hear that what load() gave of a shard is damaged. True: a local copy was to blame and is gone: load again.

        False: by now there is none, or it is right. In any case load() reads anew what is there.
        """

    def at_version(self, number: int) -> Source:
        """The same choice of another version."""

    def figures(self) -> Mapping[str, float]:
        """requests, bytes_fetched, cache_hits, cache_misses so far, of this process."""
