"""Where the shards of records are: caches and stores of the versions that are read, and plans to read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache.model import NEVER, PublishedPlan, ReadingPlan

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.cache import WarmProgress
    from tiercache.data.opened_version import OpenedVersion
    from tiercache.data.records import Leaf
    from tiercache.model import CloseListener

    ShardsOfLeaf = tuple[Leaf, NDArray[np.int64], NDArray[np.int64]]
    ShardsOfVersion = tuple[OpenedVersion, NDArray[np.int64], NDArray[np.int64]]


def distinct(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sorted distinct numbers of shards or leaves. The first np.unique() of a process takes 6 ms."""
    return np.flatnonzero(np.bincount(numbers))


class Storage:
    """The stored shards of `Records`, whose shard numbers the methods take. Safe from any thread.

    Attributes:
        versions: The stored versions, each once.
    """

    def __init__(
        self, leaves: tuple[Leaf, ...], leaf_shards: NDArray[np.int64], shard_records: NDArray[np.int64]
    ) -> None:
        self._leaves, self._leaf_shards, self._shard_records = leaves, leaf_shards, shard_records
        self.versions = tuple({id(leaf.stored): leaf.stored for leaf in leaves}.values())

    @property
    def has_cache(self) -> bool:
        """Whether a cache is in use for any version; publish() gives that cache the reading plan."""
        return any(version.stores.has_cache for version in self.versions)

    @property
    def can_prefetch(self) -> bool:
        """Whether prefetch() can fetch anything; if not, no caller needs to compute the shards for it."""
        return any(version.stores.fetcher is not None for version in self.versions)

    @property
    def sends_requests(self) -> bool:
        """Whether Records.load() sends requests to a store, because there is no cache."""
        return any(version.stores.sends_requests for version in self.versions)

    def locate(self, shard: int) -> tuple[Leaf, int]:
        """Return the leaf that has a shard, and the shard's number there."""
        leaf = int(self._leaf_shards.searchsorted(shard, side="right")) - 1
        return self._leaves[leaf], int(shard - self._leaf_shards[leaf])

    def by_leaf(self, shards: Any) -> list[ShardsOfLeaf]:
        """Return (leaf, indices of its shards, their numbers there) for each leaf that has any of the shards."""
        shards = np.asarray(shards, np.int64)
        leaves = np.searchsorted(self._leaf_shards, shards, side="right") - 1
        found = []
        for leaf in distinct(leaves).tolist():
            where = np.flatnonzero(leaves == leaf)
            found.append((self._leaves[leaf], where, shards[where] - self._leaf_shards[leaf]))
        return found

    def _by_version(self, shards: Any) -> list[ShardsOfVersion]:
        """Return the same with the leaves of each stored version joined: a number there may then be repeated."""
        by_version: dict[int, list[ShardsOfLeaf]] = {}
        for group in self.by_leaf(shards):
            by_version.setdefault(id(group[0].stored), []).append(group)
        return [
            (groups[0][0].stored, np.concatenate([g[1] for g in groups]), np.concatenate([g[2] for g in groups]))
            for groups in by_version.values()
        ]

    def is_mapped(self, shard: int) -> bool:
        """Whether Records.load() of any block of the shard only maps it, as far as is known without looking."""
        leaf, number = self.locate(shard)
        return leaf.is_mapped(number)

    def is_local(self, shard: int) -> bool:
        """Whether the served columns of the shard are on this machine, so that load() needs no network."""
        leaf, number = self.locate(shard)
        return leaf.stored.is_local(number)

    def remove_if_corrupt(self, shard: int) -> bool:
        leaf, number = self.locate(shard)
        return leaf.stored.remove_if_corrupt(number)

    def publish(self, plan: ReadingPlan) -> PublishedPlan | None:
        """Tell the caches when shards are read, until the returned object is closed; None: there is no cache.

        All leaves of a version share one plan, because there may be many. Raises OSError if it cannot be written.
        """
        if len(self._leaves) == 1:
            return self.versions[0].publish(plan)
        found: list[PublishedPlan] = []
        try:
            for version, where, shards in self._by_version(plan.shards):
                one = version.publish(plan_of(plan, where, shards))
                if one is not None:
                    found.append(one)
        except BaseException:  # the plans published so far have no other owner that could withdraw them
            PublishedPlans(tuple(found)).close()
            raise
        return PublishedPlans(tuple(found))

    def prepare_reading(self, shards: NDArray[np.int64]) -> None:
        """Check that a run can read these shards, int64[m]. The engine calls it before the first epoch.

        Raises ArchivedShards, which names all shards that must be restored first; or StoreError if their location is
        unknown.
        """
        for version, _, numbers in self._by_version(shards[self._shard_records[shards] > 0]):
            version.prepare_reading(distinct(numbers))

    def prefetch(self, shards: Sequence[int]) -> None:
        """Start to fetch these shards to this machine, in this order; returns at once."""
        for leaf, _, numbers in self.by_leaf([shard for shard in shards if self._shard_records[shard]]):
            leaf.stored.prefetch(numbers.tolist())

    def prefetch_blocks(self, shard: int, blocks: Sequence[int]) -> None:
        """Start to fetch blocks that are loaded next, before all that prefetch() was asked for; returns at once.

        A shard that the cache does not admit is skipped.
        """
        leaf, number = self.locate(shard)
        leaf.prefetch_blocks(number, blocks)

    def warm(self, *, jobs: int, on_progress: Callable[[WarmProgress], None] | None = None) -> None:
        """Fetch the served columns of all shards with selected records into the cache. See Dataset.warm."""
        for leaf, _, numbers in self.by_leaf(np.flatnonzero(self._shard_records)):
            leaf.stored.warm(numbers.tolist(), jobs=jobs, on_progress=on_progress)

    def figures(self) -> Mapping[str, float]:
        """Return the sums of VersionStores.figures(); a shared cache counts once."""
        sums: dict[str, float] = {}
        caches: set[int] = set()
        for version in self.versions:
            for name, figure in version.stores.figures().items():
                if not (name.startswith("cache_") and id(version.cache) in caches):
                    sums[name] = sums.get(name, 0) + figure
            caches.add(id(version.cache))
        return sums

    def on_close(self, keeper: CloseListener) -> None:
        """Call keeper.on_source_closed() when a version is closed. The keeper is referenced weakly."""
        for version in self.versions:
            version.on_close(keeper)

    def close(self) -> None:
        """Release shards and connections. The records may be read again afterwards."""
        for version in self.versions:
            version.close()


@dataclass(frozen=True, slots=True)
class PublishedPlans:
    """Several published plans as one (`model.PublishedPlan`)."""

    every: tuple[PublishedPlan, ...]

    def advance(self, clock: int) -> None:
        """See PublishedPlan.advance; advances all of them."""
        for one in self.every:
            one.advance(clock)

    def close(self) -> None:
        """See PublishedPlan.close; closes all of them, even if one raises."""
        with ExitStack() as closing:
            for one in reversed(self.every):
                closing.callback(one.close)


def plan_of(plan: ReadingPlan, where: NDArray[np.int64], numbers: NDArray[np.int64]) -> ReadingPlan:
    """Return the rows of a plan at `where` for one version, with its shard numbers. The clock stays that of the job.

    A shard that several rows name is in use from its first to its last use.
    """
    shards, at = np.unique(numbers, return_inverse=True)
    first, first_later = np.full(len(shards), NEVER), np.full(len(shards), NEVER)
    last = np.full(len(shards), -1, np.int64)
    np.minimum.at(first, at, plan.first[where])
    np.minimum.at(first_later, at, plan.first_later[where])
    np.maximum.at(last, at, np.where(plan.last[where] == NEVER, -1, plan.last[where]))
    last = np.where(first == NEVER, NEVER, last)
    return replace(plan, shards=shards, first=first, last=last, first_later=first_later)
