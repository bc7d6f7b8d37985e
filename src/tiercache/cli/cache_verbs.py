"""The verbs of the local cache: warm, pin, unpin, evict and status."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tiercache import config
from tiercache.cache import Cache, CachedStore, Entry, WarmReport
from tiercache.cli.data_sets import open_data_set, open_data_set_store, shorten
from tiercache.cli.options import (
    BatchSize,
    CacheDir,
    CacheSize,
    Columns,
    DryRun,
    Exclude,
    FilesFrom,
    Include,
    Jobs,
    Json,
    Placement,
    Quiet,
    Seed,
    ShuffleGroup,
    StorageOptions,
    Streams,
    Url,
    Verbose,
    VersionNumber,
    Yes,
    check_size,
    parse_age,
    parse_columns,
    parse_size,
)
from tiercache.cli.output import PARTIAL, Output, count
from tiercache.cli.selection import AmountOptions, ShardSelection, TrainingOptions, read_names
from tiercache.errors import StoreError
from tiercache.model import ByteRange, ShardIdentity, format_bytes
from tiercache.pack.files import selected
from tiercache.shard.read.source import column_ranges, fetch_footer
from tiercache.shard.versions.manifest import latest
from tiercache.store import LocalStore, Store, redact

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tiercache.cli.data_sets import OpenDataSet
    from tiercache.cli.output import Advance


# Footers are a few KiB, so the time to read them is round trips.
FOOTER_THREADS = 16


def read_column_ranges(
    data_set: OpenDataSet, shards: NDArray[np.int64], columns: Sequence[str], advance: Advance
) -> Mapping[str, tuple[ByteRange, ...]]:
    """Return the ranges of the columns, by shard name; shards of which nearly all bytes are needed are left out.

    Args:
        data_set: Version whose shards are read.
        shards: Numbers of the shards, int64[m].
        columns: Names of the columns.
        advance: Called with the number of footers read, and their total.

    Raises:
        SchemaError: There is no such column.
        NotFound, StoreError, CorruptShard: A footer cannot be read.
    """
    schema = data_set.version.schema
    numbers = [schema.index(name) for name in schema.select(columns).names]
    infos = [data_set.shards.info(i) for i in shards.tolist()]
    ranges: dict[str, tuple[ByteRange, ...]] = {}
    with ThreadPoolExecutor(FOOTER_THREADS, "tiercache-footer") as pool:
        footers = pool.map(lambda info: fetch_footer(data_set.store, info.name, info), infos)
        for n_done, (info, footer) in enumerate(zip(infos, footers, strict=True), start=1):
            found = column_ranges(footer, info, numbers)
            if found is not None:
                ranges[info.name] = found
            advance(n_done, len(infos))
    return ranges


Share = Annotated[
    str | None,
    typer.Option(
        "--share",
        metavar="SHARE",
        help="Fetch only this fraction of the selected bytes, from the first shard on, e.g. 25%.",
    ),
]
First = Annotated[
    str | None,
    typer.Option(
        "--first",
        metavar="SIZE",
        help="Fetch only this many of the selected bytes, from the first shard on, e.g. 200GB.",
    ),
]
Minutes = Annotated[
    float | None,
    typer.Option("--minutes", metavar="N", help="Fetch only what a training reads in N minutes at --rate."),
]
Rate = Annotated[
    str | None,
    typer.Option(
        "--rate", metavar="SIZE/s", help="Rate at which the training reads stored bytes, e.g. 500MB/s; for --minutes."
    ),
]
Epoch = Annotated[
    int | None, typer.Option("--epoch", min=0, metavar="N", help="Epoch of the training, counted from 0; default: 0.")
]
Rank = Annotated[
    list[str] | None,
    typer.Option(
        "--rank",
        metavar="R/W",
        help="Fetch only what these ranks read: RANK/RANKS, e.g. 3/8 or 0-3/8. May be repeated.",
    ),
]


def refuse_local(store: Store, folder: str | None) -> None:
    """Raise ValueError for a local data set, whose files readers map in place, unless a cache folder was named."""
    if isinstance(store, LocalStore) and folder is None:
        raise ValueError(
            f"{store.url}: a local folder is read in place and needs no cache; give --cache DIR to copy it anyway"
        )


@contextmanager
def open_existing_cache(folder: str | None, size: str | None) -> Iterator[Cache]:
    """Open a cache that exists, as open_cache() does.

    Raises:
        FileNotFoundError: The folder does not exist. It is not created.
    """
    path = Path(config.load(cache_dir=folder).cache_dir).expanduser().absolute()
    if not path.is_dir():
        raise FileNotFoundError(
            f"there is no cache at {path}: a job that reads from a store, or `tiercache warm`, creates one; to name "
            "another folder, use --cache or TIERCACHE_CACHE_DIR"
        )
    with open_cache(folder, size) as cache:
        yield cache


@contextmanager
def open_cache(folder: str | None, size: str | None) -> Iterator[Cache]:
    """Yield the cache that the options or the configuration name, and close it at the end."""
    with Cache.default(path=folder, size=check_size("--cache-size", size)) as cache:
        yield cache


@dataclass(frozen=True, slots=True)
class _CopyRequest:
    """The part of a data set that the options select. columns: Names of columns; None: all."""

    url: str
    choice: ShardSelection
    at: int | None
    columns: list[str] | None
    storage_options: Sequence[str] | None


@dataclass(frozen=True, slots=True)
class _CopySet:
    """Objects to copy into a cache.

    Attributes:
        cache: The cache.
        store: Store of the data set, read through the cache.
        objects: Keys and identities of the objects.
        ranges: Byte ranges to copy, by key; an object that is not in ranges is copied as a whole.
    """

    cache: Cache
    store: CachedStore
    objects: list[tuple[str, ShardIdentity]]
    ranges: Mapping[str, Sequence[ByteRange]]

    @property
    def facts(self) -> dict[str, Any]:
        """Return the objects for JSON output."""
        return {"url": self.store.url, "objects": len(self.objects), "bytes": self._n_bytes}

    @property
    def text(self) -> str:
        """Return the objects for people."""
        parts = f" ({len(self.ranges):,} of them in part)" if self.ranges else ""
        return f"{count(len(self.objects), 'object')}{parts}, {format_bytes(self._n_bytes)}"

    @property
    def _n_bytes(self) -> int:
        return sum(
            sum(r.n_bytes for r in self.ranges[key]) if key in self.ranges else identity.n_bytes
            for key, identity in self.objects
        )

    def fetch(self, output: Output, doing: str, jobs: int) -> WarmReport:
        """Copy all objects into the cache, with a progress bar labelled doing."""
        jobs = jobs or config.available_cpus()
        with output.byte_progress(doing) as advance:
            return self.cache.warm(
                self.store,
                self.objects,
                ranges=self.ranges,
                jobs=jobs,
                on_progress=lambda p: advance(p.bytes_done, p.bytes_wanted),
            )


@contextmanager
def _open_copy_set(asked: _CopyRequest, cache: Cache, cache_dir: str | None, output: Output) -> Iterator[_CopySet]:
    """Yield the selected objects, while the data set's store is open."""
    with open_data_set_store(asked.url, asked.storage_options) as inner:
        refuse_local(inner, cache_dir)
        data_set = open_data_set(inner, asked.at)
        shards = asked.choice.shards(data_set.shards)
        dataset_id = data_set.version.dataset_id
        objects = [(ref.key, ref.identity(dataset_id)) for ref in data_set.version.segments]
        objects += data_set.shards.objects(dataset_id, shards)
        ranges: Mapping[str, Sequence[ByteRange]] = {}
        if asked.columns is not None:
            with output.count_progress("reading footers") as advance:
                ranges = read_column_ranges(data_set, shards, asked.columns, advance)
        yield _CopySet(cache, cache.store(inner), objects, ranges)


def warm(
    url: Url,
    share: Share = None,
    first: First = None,
    minutes: Minutes = None,
    rate: Rate = None,
    include: Include = None,
    exclude: Exclude = None,
    files_from: FilesFrom = None,
    columns: Columns = None,
    seed: Seed = None,
    epoch: Epoch = None,
    rank: Rank = None,
    streams: Streams = None,
    placement: Placement = None,
    shuffle_group: ShuffleGroup = None,
    batch_size: BatchSize = None,
    at: VersionNumber = None,
    jobs: Jobs = 4,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    storage_option: StorageOptions = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - report_errors() reads it
) -> None:
    """Copy a data set, or a part of it, from its store into the cache.

    The exit code is 0 only if all of it is cached. With --seed, the shards are fetched in the order in which a training
    reads them: --rank selects the ranks, and --first or --minutes the amount.
    """
    output = Output(as_json, quiet)
    order = TrainingOptions(seed, epoch, rank, streams, placement, shuffle_group, batch_size).training()
    part, size = AmountOptions(share, first, minutes, rate).limits()
    choice = ShardSelection(include, exclude, read_names(files_from), order, part, size)
    asked = _CopyRequest(url, choice, at, parse_columns(columns), storage_option)
    with open_cache(cache_dir, cache_size) as cache, _open_copy_set(asked, cache, cache_dir, output) as wanted:
        if dry_run:
            plan = cache.plan_warm(wanted.store, wanted.objects, ranges=wanted.ranges)
            facts = {"fetched": len(plan.missing), "bytes_fetched": plan.missing_bytes, "fits": plan.fits}
            short = "" if plan.fits else "; the cache has not enough space for them"
            missing = f"{count(len(plan.missing), 'object')}, {format_bytes(plan.missing_bytes)}"
            output.summary(wanted.facts | facts | {"dry_run": True}, f"would fetch {missing}{short}")
            return
        report = wanted.fetch(output, "warming", jobs)
        facts = wanted.facts | {"fetched": report.n_fetched, "bytes_fetched": report.bytes_fetched}
        fetched = f"{format_bytes(report.bytes_fetched)} of them fetched now"
        output.summary(facts, f"{wanted.text} are in the cache, {fetched}")


def pin(
    url: Url,
    share: Share = None,
    first: First = None,
    include: Include = None,
    exclude: Exclude = None,
    files_from: FilesFrom = None,
    at: VersionNumber = None,
    jobs: Jobs = 4,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    storage_option: StorageOptions = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - report_errors() reads it
) -> None:
    """Copy a data set into the cache, and keep the copies until unpin.

    Pinned copies are not evicted. --share, --first, --include, --exclude and --files-from select a part of the data
    set.
    """
    output = Output(as_json, quiet)
    part, size = AmountOptions(share, first).limits()
    choice = ShardSelection(include, exclude, read_names(files_from), fraction=part, limit_bytes=size)
    asked = _CopyRequest(url, choice, at, None, storage_option)
    with open_cache(cache_dir, cache_size) as cache, _open_copy_set(asked, cache, cache_dir, output) as wanted:
        if dry_run:
            output.summary(wanted.facts | {"dry_run": True}, f"would pin {wanted.text}")
            return
        report = wanted.fetch(output, "pinning", jobs)
        cache.pin(wanted.store, wanted.objects)
        output.summary(wanted.facts | {"bytes_fetched": report.bytes_fetched}, f"pinned {wanted.text}")


# Facts that are printed as tables or lines of their own, and not in the summary.
_ROWS = ("holders", "plans", "poisoned_now", "reports", "figures")


def status(
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - report_errors() reads it
) -> None:
    """Show what the cache holds, who uses it, and damage found in it."""
    output = Output(as_json, quiet)
    with open_existing_cache(cache_dir, cache_size) as cache:
        facts, entries = cache.status(), cache.entries()
    _print_data_sets(output, by_data_set(entries))
    _print_users(output, facts, {entry.name: entry.source for entry in entries})
    _print_wrong(output, facts)
    # The counters of this process are zero, because it only looks; "figures" sums the counters of all processes.
    shown = {name: value for name, value in facts.items() if name not in _ROWS} | facts["figures"]
    output.summary(shown, summary_of(facts))


def _print_data_sets(output: Output, groups: Sequence[Mapping[str, Any]]) -> None:
    has_parts = any(group["parts"] for group in groups)
    texts = [
        {"data set": group["url"] or "(unknown)", "copies": f"{group['copies']:,}"}
        | ({"in part": f"{group['parts']:,}"} if has_parts else {})
        | {"size": format_bytes(group["bytes"]), "pinned": format_bytes(group["pinned_bytes"])}
        for group in groups
    ]
    output.table("data_set", groups, texts)


def _print_users(output: Output, facts: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Print the processes that hold copies, except this one, and the jobs that have published read plans."""
    holders = [
        {
            "pid": holder["pid"],
            "command": holder["command"],
            "copies": len(holder["names"]),
            "sources": sorted(sources.get(name, "") for name in holder["names"]),
        }
        for holder in facts["holders"]
        if holder["pid"] != os.getpid()
    ]
    texts = [
        {"process": str(h["pid"]), "holds": count(h["copies"], "copy", "copies"), "command": shorten(h["command"])}
        for h in holders
    ]
    output.table("holder", holders, texts)
    for label in facts["plans"]:
        output.event("plan", {"owner": label}, f"plan of {label}")


def _print_wrong(output: Output, facts: Mapping[str, Any]) -> None:
    for name, poison in facts["poisoned_now"].items():
        text = f"poisoned: {poison['url']}: damaged in its store, so not cached for now"
        output.event("poisoned", {"name": name, **poison}, text)


def summary_of(facts: Mapping[str, Any]) -> str:
    """Return the last line for people: size, hit ratio, and what is wrong."""
    used, limit = facts["bytes_used"], facts["limit_bytes"]
    texts = [
        f"{facts['path']}: {format_bytes(used)} of {format_bytes(limit)}, {format_bytes(facts['pinned_bytes'])} pinned"
    ]
    if facts["reserved_bytes"]:
        texts.append(f"{format_bytes(facts['reserved_bytes'])} being fetched")
    figures = facts["figures"]
    if facts["hit_ratio"] is not None:
        n_opens = figures["hits"] + figures["misses"]
        fetched = format_bytes(figures.get("bytes_fetched", 0))
        ahead = f"{figures['prefetched']:,} prefetched, " if figures.get("prefetched") else ""
        found = f"{facts['hit_ratio']:.1%} of {count(n_opens, 'open')} were hits"
        texts.append(f"{found}, {ahead}{fetched} fetched")
    texts += _nonzero(
        figures, {"evicted_early": "evicted too early", "quarantined": "quarantined", "poisoned": "poisoned"}
    )
    texts += [note for (name, value), note in _TROUBLES.items() if facts[name] == value]
    if facts["network_file_system"]:
        texts.append(f"the folder is on {facts['network_file_system']}")
    return "; ".join(texts)


def _nonzero(figures: Mapping[str, int], names: Mapping[str, str]) -> Iterable[str]:
    return [f"{figures[name]:,} {text}" for name, text in names.items() if figures.get(name)]


_TROUBLES = {
    ("writable", False): "the folder is read-only, so the cache only serves the copies that it holds",
    ("bypassed", True): "the cache is bypassed for now, because its disk failed",
}


def by_data_set(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return what each data set (or other source) has in the cache, ordered by URL."""
    groups: dict[str, dict[str, Any]] = {}
    for entry in entries:
        url = entry.source if entry.dataset_id is None else data_set_url(entry.source)
        group = groups.setdefault(url, {"url": url, "copies": 0, "parts": 0, "bytes": 0, "pinned_bytes": 0})
        group["parts" if entry.in_part else "copies"] += 1
        group["bytes"] += entry.n_bytes
        group["pinned_bytes"] += entry.n_bytes if entry.pinned else 0
    return [groups[url] for url in sorted(groups)]


def data_set_url(source: str) -> str:
    """Return the URL of the data set that contains the object at a URL."""
    for folder in ("/shards/", "/_tiercache/"):
        head, found, _ = source.rpartition(folder)
        if found:
            return head
    return source


@dataclass(frozen=True, slots=True)
class EvictionFilter:
    """The copies that evict selects; a copy must pass all conditions.

    Attributes:
        of_scope: Whether a copy belongs to the data set that the verb is about.
        include: Globs over names inside the data set, of which one must match; None: all names.
        exclude: Globs over names inside the data set, of which none may match.
        older_than_s: Seconds since the last use that a copy must exceed.
        larger_than_bytes: Bytes that a copy's size must exceed.
    """

    in_data_set: Callable[[Entry], bool] = lambda _entry: True
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    older_than_s: float | None = None
    larger_than_bytes: int | None = None

    def matches(self, entry: Entry, now_s: float) -> bool:
        """Return whether the copy passes all conditions, pinned or not. now_s: Time now, in seconds since the epoch."""
        if not self.in_data_set(entry) or not name_matches(entry, self.include, self.exclude):
            return False
        if self.larger_than_bytes is not None and entry.n_bytes <= self.larger_than_bytes:
            return False
        return self.older_than_s is None or now_s - entry.used_s > self.older_than_s


def least_recently_used(entries: Sequence[Entry], used_bytes: int, target_bytes: int | None) -> list[Entry]:
    """Return the least recently used entries whose eviction leaves at most target_bytes in use; None: all entries."""
    if target_bytes is None:
        return list(entries)
    chosen = []
    for entry in entries:
        if used_bytes <= target_bytes:
            break
        chosen.append(entry)
        used_bytes -= entry.n_bytes
    return chosen


def evict(
    url: Annotated[
        str | None, typer.Argument(metavar="[URL]", help="Data set whose cached copies are deleted.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Instead of a URL: delete copies of all data sets.")
    ] = False,
    include: Include = None,
    exclude: Exclude = None,
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", metavar="AGE", help="Only copies that were not read for this time, e.g. 7d."),
    ] = None,
    larger_than: Annotated[
        str | None, typer.Option("--larger-than", metavar="SIZE", help="Only copies larger than this, e.g. 100MB.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="SIZE",
            help="Evict until the cache holds at most SIZE, e.g. 200GB, or 50% (of its size limit).",
        ),
    ] = None,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    storage_option: StorageOptions = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - report_errors() reads it
) -> None:
    """Delete cached copies, least recently used first.

    Pinned copies and copies in use stay. The store is never changed: deleted copies can be fetched again.
    """
    output = Output(as_json, quiet)
    if everything == (url is not None):
        raise ValueError("evict takes a URL or --all")
    doomed = EvictionFilter(
        include=include,
        exclude=exclude,
        older_than_s=None if older_than is None else parse_age("--older-than", older_than),
        larger_than_bytes=None if larger_than is None else parse_size("--larger-than", larger_than),
    )
    with open_existing_cache(cache_dir, cache_size) as cache:
        target_bytes = None if to is None else parse_size("--to", to, whole_bytes=cache.limit_bytes)
        doomed = replace(doomed, in_data_set=data_set_filter(url, storage_option))
        left = _evict(output, cache, doomed, target_bytes, _EvictOptions(yes, dry_run))
    if left:
        raise typer.Exit(PARTIAL)


@dataclass(frozen=True, slots=True)
class _EvictOptions:
    yes: bool
    dry_run: bool


def _evict(
    output: Output, cache: Cache, doomed: EvictionFilter, target_bytes: int | None, manner: _EvictOptions
) -> int:
    """Evict, or print what would be evicted; return how many copies should have been evicted but are in use."""
    now_s = time.time()
    found = [entry for entry in cache.entries() if doomed.matches(entry, now_s)]
    free = [entry for entry in found if not entry.pinned]
    chosen = least_recently_used(free, cache.stats()["bytes_used"], target_bytes)
    n_pinned, n_bytes = len(found) - len(free), sum(entry.n_bytes for entry in chosen)
    what = f"{count(len(chosen), 'copy', 'copies')}, {format_bytes(n_bytes)}"
    if manner.dry_run:
        facts: dict[str, Any] = {"copies": len(chosen), "bytes": n_bytes, "pinned": n_pinned, "dry_run": True}
        for entry in chosen:
            output.event("copy", entry_facts(entry), f"{entry.source or entry.name}  {format_bytes(entry.n_bytes)}")
        output.summary(facts, f"would evict {what}")
        return 0
    if chosen and not manner.yes:
        _ask(f"Evict {what} from {cache.path}?")
    names = {entry.name for entry in free}
    if chosen:
        cache.evict(names, target_bytes=target_bytes)
    here = {entry.name: entry.n_bytes for entry in cache.entries()}
    gone = [entry for entry in free if entry.name not in here]
    left = _left(free, gone, here, target_bytes)
    facts = {
        "copies": len(gone),
        "bytes": sum(entry.n_bytes for entry in gone),
        "left": left,
        "pinned": n_pinned,
        "bytes_used": sum(here.values()),
    }
    kept = f"; {count(left, 'copy', 'copies')} in use stayed" if left else ""
    kept += f"; {count(n_pinned, 'pinned copy', 'pinned copies')} stayed" if n_pinned else ""
    output.summary(facts, f"evicted {count(len(gone), 'copy', 'copies')}, {format_bytes(facts['bytes'])}{kept}")
    return left


def _left(free: Sequence[Entry], gone: Sequence[Entry], here: Mapping[str, int], target_bytes: int | None) -> int:
    """Return the number of copies that stayed although they were selected; 0 if the target size was reached."""
    if target_bytes is not None and sum(here.values()) <= target_bytes:
        return 0
    return len(free) - len(gone)


def unpin(
    url: Annotated[str | None, typer.Argument(metavar="[URL]", help="Data set whose copies are unpinned.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Instead of a URL: unpin all copies.")] = False,
    include: Include = None,
    exclude: Exclude = None,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    storage_option: StorageOptions = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - report_errors() reads it
) -> None:
    """Unpin cached copies, so that eviction may delete them."""
    output = Output(as_json, quiet)
    if everything == (url is not None):
        raise ValueError("unpin takes a URL or --all")
    with open_existing_cache(cache_dir, cache_size) as cache:
        of_scope = data_set_filter(url, storage_option)
        chosen = [e.name for e in cache.entries() if of_scope(e) and e.pinned and name_matches(e, include, exclude)]
        n = len(chosen) if dry_run else cache.unpin(chosen)
        facts = {"copies": n} | ({"dry_run": True} if dry_run else {})
        output.summary(facts, f"{'would unpin' if dry_run else 'unpinned'} {count(n, 'copy', 'copies')}")


def entry_facts(entry: Entry) -> dict[str, Any]:
    """Return an entry for JSON output."""
    return {
        "source": entry.source,
        "bytes": entry.n_bytes,
        "in_part": entry.in_part,
        "pinned": entry.pinned,
        "uses": entry.uses,
        "dataset_id": entry.dataset_id,
        "shard_id": entry.shard_id,
    }


def data_set_filter(url: str | None, storage_options: Sequence[str] | None) -> Callable[[Entry], bool]:
    """Return a predicate: whether an entry belongs to the data set at url, by data set id or by source URL.

    The id finds copies of the same data set that came from a mirror. The source URL finds copies of a data set that no
    longer exists.
    """
    if url is None:
        return lambda _entry: True
    with open_data_set_store(url, storage_options) as store:
        prefix = f"{redact(store.url)}/"
        dataset_id = _dataset_id(store)
    return lambda e: (dataset_id is not None and e.dataset_id == dataset_id) or e.source.startswith(prefix)


def _dataset_id(store: Store) -> str | None:
    try:
        return latest(store).dataset_id
    except StoreError:
        return None


def name_matches(entry: Entry, include: Sequence[str] | None, exclude: Sequence[str] | None) -> bool:
    """Return whether the copy's path inside its data set matches the globs."""
    path = entry.source.removeprefix(data_set_url(entry.source)).lstrip("/")
    return selected(path, include or (), exclude or ())


def _ask(question: str) -> None:
    """Ask at the terminal whether to continue, and exit if not. Raises ValueError if standard input is no terminal."""
    if not sys.stdin.isatty():
        raise ValueError("cannot ask for confirmation, because standard input is not a terminal; give --yes")
    if not typer.confirm(question, err=True):
        typer.echo("tiercache: nothing was evicted", err=True)
        raise typer.Exit(1)
