"""The verbs that bring copies into the local cache: warm and pin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from tiercache import config
from tiercache.cache import Cache, CachedStore, WarmReport
from tiercache.cli.opening import OpenDataSet, open_data_set, opened_store
from tiercache.cli.options import (
    CacheDir,
    CacheSize,
    DryRun,
    Exclude,
    Include,
    Jobs,
    Json,
    Quiet,
    StorageOptions,
    Url,
    Verbose,
    Version,
    check_size,
    parse_share,
)
from tiercache.cli.output import Output, count
from tiercache.model import ShardIdentity, format_bytes
from tiercache.store import LocalStore, Store

Share = Annotated[str, typer.Option("--share", metavar="SHARE", help="Only so much of it, from the start: 25%.")]


def refuse_local(store: Store, folder: str | None) -> None:
    """Raise ValueError for a local folder, unless a cache was named: readers map its files where they are."""
    if isinstance(store, LocalStore) and folder is None:
        raise ValueError(
            f"{store.url}: a local folder is read in place; say --cache DIR to copy it to a cache all the same"
        )


@contextmanager
def opened_cache(folder: str | None, size: str | None) -> Iterator[Cache]:
    """The cache that the flags name, or else the configuration; closed at the end."""
    with Cache.default(path=folder, size=check_size("--cache-size", size)) as cache:
        yield cache


@dataclass(frozen=True, slots=True)
class _Asked:
    """What of which data set, as the flags say it."""

    url: str
    share: str
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    at: int | None
    storage_options: Sequence[str] | None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Objects that are to be in a cache: keys and identities."""

    cache: Cache
    store: CachedStore
    objects: list[tuple[str, ShardIdentity]]
    facts: dict[str, Any]
    text: str

    def missing(self) -> list[ShardIdentity]:
        """Those that are not in the cache."""
        names = {entry.name for entry in self.cache.entries()}
        named = ((identity, self.store.wanted(key, identity)) for key, identity in self.objects)
        return [identity for identity, wanted in named if wanted is not None and wanted.name not in names]

    def fetch(self, output: Output, doing: str, jobs: int) -> WarmReport:
        """Have all of them in the cache, with a bar that says what is being done."""
        jobs = jobs or config.available_cpus()
        with output.progress(doing) as advance:
            return self.cache.warm(
                self.store, self.objects, jobs=jobs, on_progress=lambda p: advance(p.bytes_done, p.bytes_wanted)
            )


@contextmanager
def _wanted(asked: _Asked, cache: Cache, cache_dir: str | None) -> Iterator[_Wanted]:
    """What is asked for, while the data set's store is open."""
    with opened_store(asked.url, asked.storage_options) as inner:
        refuse_local(inner, cache_dir)
        data_set = open_data_set(inner, asked.at)
        objects = wanted_of(data_set, parse_share(asked.share), asked.include, asked.exclude)
        n_bytes = sum(identity.n_bytes for _, identity in objects)
        facts: dict[str, Any] = {"url": inner.url, "objects": len(objects), "bytes": n_bytes}
        yield _Wanted(
            cache, cache.store(inner), objects, facts, f"{count(len(objects), 'object')}, {format_bytes(n_bytes)}"
        )


def wanted_of(
    data_set: OpenDataSet, share: float, include: Sequence[str] | None, exclude: Sequence[str] | None
) -> list[tuple[str, ShardIdentity]]:
    """Keys and identities of a data set's segments and of the first chosen shards, until share of their bytes."""
    dataset_id = data_set.version.dataset_id
    wanted = [(ref.key, ref.identity(dataset_id)) for ref in data_set.version.segments]
    infos = [data_set.shards.info(i) for i in data_set.select(include, exclude)]
    left_bytes = share * sum(info.n_bytes for info in infos)
    for info in infos:
        if left_bytes <= 0:
            break
        left_bytes -= info.n_bytes
        wanted.append((info.name, info.identity(dataset_id)))
    return wanted


def warm(
    url: Url,
    share: Share = "100%",
    include: Include = None,
    exclude: Exclude = None,
    at: Version = None,
    jobs: Jobs = 4,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    storage_option: StorageOptions = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - read where failures are reported
) -> None:
    """Fetch a data set, or a part of it, into the cache; ends well only when everything asked for is there."""
    output = Output(as_json, quiet)
    asked = _Asked(url, share, include, exclude, at, storage_option)
    with opened_cache(cache_dir, cache_size) as cache, _wanted(asked, cache, cache_dir) as wanted:
        if dry_run:
            missing = wanted.missing()
            missing_bytes = sum(identity.n_bytes for identity in missing)
            facts = wanted.facts | {"fetched": len(missing), "bytes_fetched": missing_bytes, "dry_run": True}
            output.summary(facts, f"would fetch {count(len(missing), 'object')}, {format_bytes(missing_bytes)}")
            return
        report = wanted.fetch(output, "warming", jobs)
        facts = wanted.facts | {"fetched": report.n_fetched, "bytes_fetched": report.bytes_fetched}
        fetched = f"{format_bytes(report.bytes_fetched)} of them fetched now"
        output.summary(facts, f"{wanted.text} are in the cache, {fetched}")


def pin(
    url: Url,
    share: Share = "100%",
    include: Include = None,
    exclude: Exclude = None,
    at: Version = None,
    jobs: Jobs = 4,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    storage_option: StorageOptions = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - read where failures are reported
) -> None:
    """Fetch a data set, or a part of it, into the cache, and hold it there until unpin."""
    output = Output(as_json, quiet)
    asked = _Asked(url, share, include, exclude, at, storage_option)
    with opened_cache(cache_dir, cache_size) as cache, _wanted(asked, cache, cache_dir) as wanted:
        if dry_run:
            output.summary(wanted.facts | {"dry_run": True}, f"would pin {wanted.text}")
            return
        report = wanted.fetch(output, "pinning", jobs)
        cache.pin(wanted.store, wanted.objects)
        output.summary(wanted.facts | {"bytes_fetched": report.bytes_fetched}, f"pinned {wanted.text}")
