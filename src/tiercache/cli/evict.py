"""The verbs evict and unpin, and the matching of cached copies against a verb's options."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from tiercache.cache import Cache, Entry
from tiercache.cli.failures import PARTIAL
from tiercache.cli.opening import open_data_set_store
from tiercache.cli.options import (
    CacheDir,
    CacheSize,
    DryRun,
    Exclude,
    Include,
    Json,
    Quiet,
    StorageOptions,
    Verbose,
    Yes,
    parse_age,
    parse_size,
)
from tiercache.cli.output import Output, count
from tiercache.cli.status import data_set_url
from tiercache.cli.warm import open_existing_cache
from tiercache.errors import StoreError
from tiercache.model import format_bytes
from tiercache.pack.files import selected
from tiercache.shard.versions.manifest import latest
from tiercache.store import Store, redact


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
