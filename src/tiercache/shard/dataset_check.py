"""Verifies a data set: a version, its segments, and every byte of its shards, with several shards in parallel."""

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
    """Result of the verification of a shard.

    Attributes:
        findings: Damage that was found.
        error: Error of the store, because of which the shard could not be verified; None if it was read.
    """

    info: ShardInfo
    findings: tuple[Finding, ...] = ()
    error: StoreError | None = None


def verify_dataset(store: Store, number: int | None = None, *, jobs: int = 4) -> Iterator[Finding]:
    """Yield all damage of a version of the data set in a store; nothing if the version is intact.

    Args:
        store: Store of the data set.
        number: Number of the version; None for the newest.
        jobs: Number of shards that are verified in parallel.

    Raises:
        NotFound: There is no data set, or no such version.
        StoreError: The store failed.
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
    """Return a version (None: the newest) and its shards. A missing segment counts as damage.

    Raises:
        CorruptShard: The version or a segment is damaged, or a segment is missing.
        NotFound: There is no data set, or no such version.
        StoreError: The store failed.
    """
    version = latest(store) if number is None else read_version(store, number)
    try:
        return version, read_shards(store, version)
    except NotFound as error:
        raise CorruptShard("it is missing", url=error.url, part="segment") from error


def check_shards(store: Store, version: Version, infos: Sequence[ShardInfo], *, jobs: int) -> Iterator[ShardCheck]:
    """Verify some shards of a version, `jobs` in parallel, and yield each result as soon as it is known.

    If the caller closes the generator early, no further shard is started.
    """
    with ThreadPoolExecutor(jobs, "tiercache-verify") as pool:
        try:
            for future in as_completed([pool.submit(_check, store, version, info) for info in infos]):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _check(store: Store, version: Version, info: ShardInfo) -> ShardCheck:
    """Verify a shard. A missing shard is damage; a shard that the store fails to deliver is an error."""
    try:
        return ShardCheck(info, tuple(verify_shard(store, info.name, info, info.identity(version.dataset_id))))
    except NotFound:
        return ShardCheck(info, (Finding(f"{store.url}/{info.name}", "file", "it is missing"),))
    except StoreError as error:
        return ShardCheck(info, error=error)
