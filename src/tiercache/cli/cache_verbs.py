"""The verbs of the cache: warm, evict, pin, unpin, status; and verify, for data sets and their cached copies."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tiercache import config
from tiercache.cache import Cache, CachedStore, Entry, WarmReport
from tiercache.cli.data_sets import OpenDataSet, open_data_set, open_data_set_store, shorten
from tiercache.cli.options import check_size, parse_size
from tiercache.cli.output import CORRUPT, PARTIAL, Output, confirm, count
from tiercache.cli.selection import ShardSelection
from tiercache.errors import CorruptShard, StoreError
from tiercache.model import ByteRange, ShardIdentity, format_bytes
from tiercache.pack.files import selected
from tiercache.shard.read.source import column_ranges, fetch_footer
from tiercache.shard.read.verify import Finding, ShardCheck, check_shards, finding_of, open_whole
from tiercache.shard.versions.manifest import latest
from tiercache.store import LocalStore, Store, redact

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tiercache.cache.check import CheckProgress, CopyCheck
    from tiercache.cli.output import Advance


# Footers are a few KiB, so the time to read them is round trips.
FOOTER_THREADS = 16


def read_column_ranges(
    data_set: OpenDataSet, shards: NDArray[np.int64], columns: Sequence[str], advance: Advance
) -> Mapping[str, tuple[ByteRange, ...]]:
    """Return the ranges of the columns, by shard name; shards of which nearly all bytes are needed are left out.

    shards are the numbers of the shards, int64[m]. advance() gets the number of footers read, and their total.

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
class CopyRequest:
    """The part of a data set that warm or pin copies, and the cache; None: the newest version, all columns, default."""

    url: str
    choice: ShardSelection
    at: int | None
    columns: list[str] | None
    storage_options: Sequence[str] | None
    cache_dir: str | None
    cache_size: str | None


@dataclass(frozen=True, slots=True)
class _CopySet:
    """Objects to copy into a cache, and the byte ranges that suffice by key; other objects are copied as a whole."""

    cache: Cache
    store: CachedStore
    objects: list[tuple[str, ShardIdentity]]
    ranges: Mapping[str, Sequence[ByteRange]]

    def describe(self) -> tuple[dict[str, Any], str]:
        """Return the objects for JSON output and for people."""
        n_bytes = sum(
            sum(r.n_bytes for r in self.ranges[key]) if key in self.ranges else identity.n_bytes
            for key, identity in self.objects
        )
        in_part = f" ({len(self.ranges):,} of them in part)" if self.ranges else ""
        text = f"{count(len(self.objects), 'object')}{in_part}, {format_bytes(n_bytes)}"
        return {"url": self.store.url, "objects": len(self.objects), "bytes": n_bytes}, text

    def fetch(self, output: Output, label: str, jobs: int) -> WarmReport:
        """Copy all objects into the cache, with a progress bar."""
        with output.byte_progress(label) as advance:
            return self.cache.warm(
                self.store,
                self.objects,
                ranges=self.ranges,
                jobs=jobs or config.available_cpus(),
                on_progress=lambda p: advance(p.bytes_done, p.bytes_wanted),
            )


@contextmanager
def _open_copy_set(output: Output, request: CopyRequest) -> Iterator[_CopySet]:
    """Yield the selected objects, while the cache and the data set's store are open."""
    with (
        open_cache(request.cache_dir, request.cache_size) as cache,
        open_data_set_store(request.url, request.storage_options) as inner,
    ):
        if isinstance(inner, LocalStore) and request.cache_dir is None:
            raise ValueError(
                f"{inner.url}: a local folder is read in place and needs no cache; give --cache DIR to copy it anyway"
            )
        data_set = open_data_set(inner, request.at)
        shards = request.choice.shards(data_set.shards)
        dataset_id = data_set.version.dataset_id
        objects = [(ref.key, ref.identity(dataset_id)) for ref in data_set.version.segments]
        objects += data_set.shards.objects(dataset_id, shards)
        ranges: Mapping[str, Sequence[ByteRange]] = {}
        if request.columns is not None:
            with output.count_progress("reading footers") as advance:
                ranges = read_column_ranges(data_set, shards, request.columns, advance)
        yield _CopySet(cache, cache.store(inner), objects, ranges)


def warm(output: Output, request: CopyRequest, jobs: int, *, dry_run: bool) -> None:
    """Copy the selected objects into the cache, or print what would be fetched."""
    with _open_copy_set(output, request) as copies:
        facts, text = copies.describe()
        if dry_run:
            plan = copies.cache.plan_warm(copies.store, copies.objects, ranges=copies.ranges)
            n_missing = len(plan.missing)
            facts |= {"fetched": n_missing, "bytes_fetched": plan.missing_bytes, "fits": plan.fits, "dry_run": True}
            short = "" if plan.fits else "; the cache has not enough space for them"
            missing = f"{count(n_missing, 'object')}, {format_bytes(plan.missing_bytes)}"
            output.summary(facts, f"would fetch {missing}{short}")
            return
        report = copies.fetch(output, "warming", jobs)
        facts |= {"fetched": report.n_fetched, "bytes_fetched": report.bytes_fetched}
        fetched = f"{format_bytes(report.bytes_fetched)} of them fetched now"
        output.summary(facts, f"{text} are in the cache, {fetched}")


def pin(output: Output, request: CopyRequest, jobs: int, *, dry_run: bool) -> None:
    """Copy the selected objects into the cache and pin them, or print what would be pinned."""
    with _open_copy_set(output, request) as copies:
        facts, text = copies.describe()
        if dry_run:
            output.summary(facts | {"dry_run": True}, f"would pin {text}")
            return
        report = copies.fetch(output, "pinning", jobs)
        copies.cache.pin(copies.store, copies.objects)
        output.summary(facts | {"bytes_fetched": report.bytes_fetched}, f"pinned {text}")


# Facts that are printed as tables or lines of their own, and not in the summary.
_ROWS = ("holders", "plans", "poisoned_now", "figures")


def status(output: Output, cache_dir: str | None, cache_size: str | None) -> None:
    """Show what the cache holds, who uses it, and damage found in it."""
    with open_existing_cache(cache_dir, cache_size) as cache:
        facts, entries = cache.status(), cache.entries()
    groups = by_data_set(entries)
    has_parts = any(group["parts"] for group in groups)
    texts = [
        {"data set": group["url"] or "(unknown)", "copies": f"{group['copies']:,}"}
        | ({"in part": f"{group['parts']:,}"} if has_parts else {})
        | {"size": format_bytes(group["bytes"]), "pinned": format_bytes(group["pinned_bytes"])}
        for group in groups
    ]
    output.table("data_set", groups, texts)
    _print_holders(output, facts["holders"], {entry.name: entry.source for entry in entries})
    for label in facts["plans"]:
        output.event("plan", {"owner": label}, f"plan of {label}")
    for name, source in facts["poisoned_now"].items():
        text = f"{source['url']}: corrupt at its source, so not cached for now"
        output.event("poisoned", {"name": name, **source}, text)
    # The counters of this process are zero, because it only looks; "figures" sums the counters of all processes.
    shown = {name: value for name, value in facts.items() if name not in _ROWS} | facts["figures"]
    output.summary(shown, summary_of(facts))


def _print_holders(output: Output, holders: Sequence[Mapping[str, Any]], sources: Mapping[str, str]) -> None:
    """Print the processes that hold copies, except this one."""
    rows = [
        {
            "pid": holder["pid"],
            "command": holder["command"],
            "copies": len(holder["names"]),
            "sources": sorted(sources.get(name, "") for name in holder["names"]),
        }
        for holder in holders
        if holder["pid"] != os.getpid()
    ]
    texts = [
        {"process": str(h["pid"]), "holds": count(h["copies"], "copy", "copies"), "command": shorten(h["command"])}
        for h in rows
    ]
    output.table("holder", rows, texts)


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
    if figures.get("requests"):
        dollars = f" (${figures['nanodollars'] / 1e9:,.2f})" if figures.get("nanodollars") else ""
        texts.append(f"{count(figures['requests'], 'request')}{dollars}, {format_bytes(figures['bytes_read'])} read")
    names = {
        "retries": "retried",
        "hedges": "hedged",
        "throttled": "throttled",
        "evicted_early": "evicted too early",
        "quarantined": "corrupt and removed",
        "poisoned": "corrupt at their source",
    }
    texts += [f"{figures[name]:,} {text}" for name, text in names.items() if figures.get(name)]
    texts += [note for (name, value), note in _TROUBLES.items() if facts[name] == value]
    if facts["network_file_system"]:
        texts.append(f"the folder is on {facts['network_file_system']}")
    return "; ".join(texts)


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
class CacheScope:
    """Copies in a cache that a verb is about; url None: those of all data sets.

    include and exclude are globs over names inside the data set: one of include, and none of exclude, must match.
    """

    url: str | None = None
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    storage_options: Sequence[str] | None = None
    cache_dir: str | None = None
    cache_size: str | None = None

    def entries(self, cache: Cache) -> list[Entry]:
        """Return the entries of the copies, least recently used first.

        The data set's id finds copies from a mirror; its URL finds copies of a data set that no longer exists.
        """
        entries = [e for e in cache.entries() if name_matches(e, self.include, self.exclude)]
        if self.url is None:
            return entries
        with open_data_set_store(self.url, self.storage_options) as store:
            prefix, dataset_id = f"{redact(store.url)}/", _dataset_id(store)
        return [
            e for e in entries if e.source.startswith(prefix) or (dataset_id is not None and e.dataset_id == dataset_id)
        ]


@dataclass(frozen=True, slots=True)
class EvictLimits:
    """Limits of an eviction; None: no limit. target_size: Size of the cache at which it ends, e.g. "200GB" or "50%"."""

    older_than_s: float | None = None
    larger_than_bytes: int | None = None
    target_size: str | None = None

    def matches(self, entry: Entry, now_s: float) -> bool:
        """Return whether a copy is old and large enough. now_s: Time now, in seconds since the epoch."""
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


def evict(output: Output, scope: CacheScope, limits: EvictLimits, *, yes: bool, dry_run: bool) -> None:
    """Evict copies, or print what would be evicted.

    Raises:
        typer.Exit: With PARTIAL if copies that should have been evicted are in use.
    """
    with open_existing_cache(scope.cache_dir, scope.cache_size) as cache:
        target_bytes = None
        if limits.target_size is not None:
            target_bytes = parse_size("--target-size", limits.target_size, whole_bytes=cache.limit_bytes)
        now_s = time.time()
        found = [entry for entry in scope.entries(cache) if limits.matches(entry, now_s)]
        free = [entry for entry in found if not entry.pinned]
        n_pinned = len(found) - len(free)
        chosen = least_recently_used(free, cache.stats()["bytes_used"], target_bytes)
        n_bytes = sum(entry.n_bytes for entry in chosen)
        what = f"{count(len(chosen), 'copy', 'copies')}, {format_bytes(n_bytes)}"
        if dry_run:
            for entry in chosen:
                output.event("copy", entry_facts(entry), f"{entry.source or entry.name}  {format_bytes(entry.n_bytes)}")
            facts = {"copies": len(chosen), "bytes": n_bytes, "pinned": n_pinned, "dry_run": True}
            output.summary(facts, f"would evict {what}")
            return
        if chosen and not yes:
            confirm(f"Evict {what} from {cache.path}?", "nothing was evicted")
        if chosen:
            cache.evict({entry.name for entry in free}, target_bytes=target_bytes)
        here = {entry.name: entry.n_bytes for entry in cache.entries()}
    gone = [entry for entry in free if entry.name not in here]
    bytes_used = sum(here.values())
    n_left = 0 if target_bytes is not None and bytes_used <= target_bytes else len(free) - len(gone)
    gone_bytes = sum(entry.n_bytes for entry in gone)
    facts = {"copies": len(gone), "bytes": gone_bytes, "left": n_left, "pinned": n_pinned, "bytes_used": bytes_used}
    kept = f"; {count(n_left, 'copy', 'copies')} in use stayed" if n_left else ""
    kept += f"; {count(n_pinned, 'pinned copy', 'pinned copies')} stayed" if n_pinned else ""
    output.summary(facts, f"evicted {count(len(gone), 'copy', 'copies')}, {format_bytes(gone_bytes)}{kept}")
    if n_left:
        raise typer.Exit(PARTIAL)


def unpin(output: Output, scope: CacheScope, *, dry_run: bool) -> None:
    """Unpin copies, or print how many would be unpinned."""
    with open_existing_cache(scope.cache_dir, scope.cache_size) as cache:
        chosen = [entry.name for entry in scope.entries(cache) if entry.pinned]
        n = len(chosen) if dry_run else cache.unpin(chosen)
    facts = {"copies": n} | ({"dry_run": True} if dry_run else {})
    output.summary(facts, f"{'would unpin' if dry_run else 'unpinned'} {count(n, 'copy', 'copies')}")


def entry_facts(entry: Entry) -> dict[str, Any]:
    """Return an entry for JSON output."""
    names = ("source", "in_part", "pinned", "uses", "dataset_id", "shard_id")
    return {"bytes": entry.n_bytes} | {name: getattr(entry, name) for name in names}


def _dataset_id(store: Store) -> str | None:
    try:
        return latest(store).dataset_id
    except StoreError:
        return None


def name_matches(entry: Entry, include: Sequence[str] | None, exclude: Sequence[str] | None) -> bool:
    """Return whether the copy's path inside its data set matches the globs."""
    path = entry.source.removeprefix(data_set_url(entry.source)).lstrip("/")
    return selected(path, include or (), exclude or ())


def verify_cached(output: Output, scope: CacheScope, jobs: int, *, repair: bool) -> None:
    """Verify copies in the cache and print each corrupt one; with repair, fetch those again.

    Raises:
        typer.Exit: With CORRUPT if a corrupt copy is still in the cache; with PARTIAL if one was removed but not
            repaired.
    """
    checked: list[CopyCheck] = []
    with open_existing_cache(scope.cache_dir, scope.cache_size) as cache:
        entries = scope.entries(cache)
        total_bytes = sum(entry.n_bytes for entry in entries)
        with output.byte_progress("verifying copies") as advance:

            def on_progress(progress: CheckProgress) -> None:
                checked.append(progress.last)
                advance(sum(one.n_bytes for one in checked), total_bytes)
                _print_copy(output, progress.last)

            for names, store in _batches(entries, scope, repair=repair):
                jobs = jobs or config.available_cpus()
                cache.verify(names=names, repair=repair, store=store, jobs=jobs, on_progress=on_progress)
    wrong = [one for one in checked if one.where]
    unknown = sum(one.state == "unknown" for one in checked)
    repaired, removed = sum(one.repaired for one in wrong), sum(one.removed for one in wrong)
    facts = {"copies": len(checked), "gone": len(entries) - len(checked), "bytes": sum(one.n_bytes for one in checked)}
    facts |= {"damaged": len(wrong), "repaired": repaired, "removed": removed, "unknown": unknown}
    text = f"checked {count(len(checked), 'copy', 'copies')}, {format_bytes(facts['bytes'])}: "
    text += f"{len(wrong):,} corrupt" if wrong else "nothing is corrupt"
    text += f", {repaired:,} of them repaired" if repaired else ""
    text += f", {removed - repaired:,} removed" if removed > repaired else ""
    text += f", {unknown:,} that could not be verified: no checksum is known for them" if unknown else ""
    output.summary(facts, text)
    if repaired < len(wrong):
        raise typer.Exit(CORRUPT if removed < len(wrong) else PARTIAL)


def _batches(entries: Sequence[Entry], scope: CacheScope, *, repair: bool) -> Iterator[tuple[list[str], Store | None]]:
    """Yield names of copies, each list with the store to fetch corrupt ones from; None if they cannot be fetched."""
    if not repair:
        yield [entry.name for entry in entries], None
        return
    if scope.url is not None:
        with open_data_set_store(scope.url, scope.storage_options) as store:
            yield [entry.name for entry in entries], store
        return
    for url, group in groupby(sorted(entries, key=_store_url), _store_url):
        with ExitStack() as stack:
            source: Store | None = None  # the recorded URL contains no credentials, so the store may not open
            if url:
                with suppress(StoreError, ValueError, OSError):
                    source = stack.enter_context(open_data_set_store(url, scope.storage_options))
            yield [entry.name for entry in group], source


def _store_url(entry: Entry) -> str:
    """Return the URL of the store that a copy came from, its data set or its object's folder; "" if unknown."""
    url = data_set_url(entry.source)
    return url if entry.dataset_id is not None or not url else url.rpartition("/")[0]


def _print_copy(output: Output, one: CopyCheck) -> None:
    if one.where:
        facts = asdict(one)
        del facts["n_bytes"]
        ending = ": repaired" if one.repaired else ": removed" if one.removed else ""
        output.event("copy", facts, f"{one.source or one.name}: {'; '.join(one.where)}{ending}")


def verify_data_set(
    output: Output,
    url: str,
    at: int | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    fraction: float,
    jobs: int,
    storage_options: Sequence[str] | None,
) -> None:
    """Verify the manifest, the segments and a random fraction of the shards of one version, and print each damage.

    Raises:
        typer.Exit: With CORRUPT if something is corrupt; with PARTIAL if a shard could not be read.
    """
    checks: list[ShardCheck] = []
    with open_data_set_store(url, storage_options) as store:
        try:
            data_set = OpenDataSet(store, *open_whole(store, at))
        except CorruptShard as error:
            _print_finding(output, finding_of(error))
            nothing = dict.fromkeys(("shards", "of", "bytes", "damaged", "unread"), 0)
            facts = {"version": at, **nothing, "findings": 1}
            output.summary(facts, "the data set cannot be opened: 1 finding")
            raise typer.Exit(CORRUPT) from None
        numbers = data_set.select(include, exclude)
        if numbers:
            numbers = sorted(secrets.SystemRandom().sample(numbers, max(1, round(fraction * len(numbers)))))
        infos = [data_set.shards.info(i) for i in numbers]
        total_bytes = sum(info.n_bytes for info in infos)
        with output.byte_progress("verifying") as advance:
            for check in check_shards(store, data_set.version, infos, jobs=jobs or config.available_cpus()):
                checks.append(check)
                advance(sum(c.info.n_bytes for c in checks), total_bytes)
                for finding in check.findings:
                    _print_finding(output, finding)
                if check.error is not None:
                    message = check.error.message
                    output.event("unread", {"shard": check.info.name, "message": message}, message)
    damaged = sum(bool(check.findings) for check in checks)
    unread = sum(check.error is not None for check in checks)
    n_bytes = sum(check.info.n_bytes for check in checks if check.error is None)
    n_findings = sum(len(check.findings) for check in checks)
    facts = {"version": data_set.version.number, "shards": len(checks), "of": len(data_set.shards), "bytes": n_bytes}
    facts |= {"damaged": damaged, "unread": unread, "findings": n_findings}
    of = f" of {len(data_set.shards)}" if len(checks) < len(data_set.shards) else ""
    text = f"checked {count(len(checks), 'shard')}{of}, {format_bytes(n_bytes)}: "
    text += f"{damaged} corrupt" if damaged else "nothing is corrupt"
    text += f", {unread} could not be read" if unread else ""
    output.summary(facts, text)
    if damaged or unread:
        raise typer.Exit(CORRUPT if damaged else PARTIAL)


def _print_finding(output: Output, finding: Finding) -> None:
    places = [finding.part]
    places += [] if finding.block is None else [f"block {finding.block}"]
    places += [] if finding.column is None else [f"column {finding.column!r}"]
    output.event("finding", asdict(finding), f"{finding.url}: {', '.join(places)}: {finding.message}")
