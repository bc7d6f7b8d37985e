"""Checks a whole data set: a version, its segments, and every byte of its shards, several shards at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from tiercache.errors import CorruptShard, NotFound, StoreError
from tiercache.model import ShardInfo
from tiercache.shard.manifest import latest, read_shards, read_version
from tiercache.shard.segments import ShardTable
from tiercache.shard.verify import Finding, finding_of, verify_shard
from tiercache.shard.versions import Version
from tiercache.store.contract import Store


@dataclass(frozen=True, slots=True)
class ShardCheck:
    """What was found in a shard. error: why it could not be read, which says nothing about its bytes."""

    info: ShardInfo
    findings: tuple[Finding, ...] = ()
    error: StoreError | None = None


def verify_dataset(store: Store, number: int | None = None, *, jobs: int = 4) -> Iterator[Finding]:
    """Yield all that is wrong with a version (the newest) of the data set in store; nothing if it is whole.

    Raises:
        NotFound: no data set, or no such version.
        StoreError: the store failed.
    """
    try:
        version, shards = open_whole(store, number)
    except CorruptShard as error:
        yield finding_of(error)
        return
    for check in check_shards(store, version, list(shards.infos()), jobs=jobs):
        if check.error is not None:
            raise check.error
        yield from check.findings


def open_whole(store: Store, number: int | None) -> tuple[Version, ShardTable]:
    """A version (the newest) and its shards, for checking: here a segment that is missing is damage too.

    Raises:
        CorruptShard: the version or a segment is damaged, or a segment is missing.
        NotFound: no data set, or no such version.
        StoreError: the store failed.
    """
    version = latest(store) if number is None else read_version(store, number)
    try:
        return version, read_shards(store, version)
    except NotFound as error:
        raise CorruptShard("it is missing", url=error.url, part="segment") from error


def check_shards(store: Store, version: Version, infos: Sequence[ShardInfo], *, jobs: int) -> Iterator[ShardCheck]:
    """Check some of a version's shards, jobs at a time, and yield each as it is done. Left early, it starts no more."""
    with ThreadPoolExecutor(jobs, "tiercache-verify") as pool:
        try:
            for future in as_completed([pool.submit(_check, store, version, info) for info in infos]):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _check(store: Store, version: Version, info: ShardInfo) -> ShardCheck:
    """A shard that is missing is damage; one that the store cannot give now is not."""
    try:
        return ShardCheck(info, tuple(verify_shard(store, info.name, info, info.identity(version.dataset_id))))
    except NotFound:
        return ShardCheck(info, (Finding(f"{store.url}/{info.name}", "file", "it is missing"),))
    except StoreError as error:
        return ShardCheck(info, error=error)
