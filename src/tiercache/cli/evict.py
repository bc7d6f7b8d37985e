"""The verbs that let cached copies go: evict and unpin."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from tiercache.cache import Entry
from tiercache.cli.failures import PARTLY
from tiercache.cli.opening import opened_store
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
)
from tiercache.cli.output import Output, count
from tiercache.cli.status import data_set_url
from tiercache.cli.warm import opened_cache
from tiercache.errors import StoreError
from tiercache.model import format_bytes
from tiercache.pack.files import selected
from tiercache.shard.manifest import latest
from tiercache.store import Store, redact


def evict(
    url: Annotated[str | None, typer.Argument(metavar="[URL]", help="The data set whose copies go.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Instead of a URL: all copies.")] = False,
    include: Include = None,
    exclude: Exclude = None,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    storage_option: StorageOptions = None,
    yes: Yes = False,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - read where failures are reported
) -> None:
    """Delete cached copies. Pinned ones, and those that are being read, stay; a store is never touched."""
    output = Output(as_json, quiet)
    if everything == (url is not None):
        raise ValueError("evict takes a URL or --all")
    with opened_cache(cache_dir, cache_size) as cache:
        of_scope = _scope(url, storage_option)
        found = [e for e in cache.entries() if of_scope(e) and _passes(e, include, exclude)]
        chosen = [entry for entry in found if not entry.pinned]
        n_pinned = len(found) - len(chosen)
        n_bytes = sum(entry.n_bytes for entry in chosen)
        what = f"{count(len(chosen), 'copy', 'copies')}, {format_bytes(n_bytes)}"
        if dry_run:
            facts: dict[str, Any] = {"copies": len(chosen), "bytes": n_bytes, "pinned": n_pinned, "dry_run": True}
            for entry in chosen:
                output.event("copy", entry_facts(entry), f"{entry.source or entry.name}  {format_bytes(entry.n_bytes)}")
            output.summary(facts, f"would evict {what}")
            return
        if chosen and not yes:
            _ask(f"Evict {what} from {cache.path}?")
        freed_bytes = cache.evict([entry.name for entry in chosen])
        names = {entry.name for entry in chosen}
        left = sum(entry.name in names for entry in cache.entries())
        facts = {"copies": len(chosen) - left, "bytes": freed_bytes, "left": left, "pinned": n_pinned}
        kept = f"; {count(left, 'copy', 'copies')} in use stayed" if left else ""
        kept += f"; {count(n_pinned, 'pinned copy', 'pinned copies')} stayed" if n_pinned else ""
        gone = f"{count(len(chosen) - left, 'copy', 'copies')}, {format_bytes(freed_bytes)}"
        output.summary(facts, f"evicted {gone}{kept}")
    if left:
        raise typer.Exit(PARTLY)


def unpin(
    url: Annotated[str | None, typer.Argument(metavar="[URL]", help="The data set whose copies are let go.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Instead of a URL: all pinned copies.")] = False,
    include: Include = None,
    exclude: Exclude = None,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    storage_option: StorageOptions = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - read where failures are reported
) -> None:
    """Let pinned copies go: they stay in the cache until their room is needed."""
    output = Output(as_json, quiet)
    if everything == (url is not None):
        raise ValueError("unpin takes a URL or --all")
    with opened_cache(cache_dir, cache_size) as cache:
        of_scope = _scope(url, storage_option)
        chosen = [e.name for e in cache.entries() if of_scope(e) and e.pinned and _passes(e, include, exclude)]
        n = len(chosen) if dry_run else cache.unpin(chosen)
        facts = {"copies": n} | ({"dry_run": True} if dry_run else {})
        output.summary(facts, f"{'would unpin' if dry_run else 'unpinned'} {count(n, 'copy', 'copies')}")


def entry_facts(entry: Entry) -> dict[str, Any]:
    """An entry as JSON has it."""
    return {
        "source": entry.source,
        "bytes": entry.n_bytes,
        "pinned": entry.pinned,
        "uses": entry.uses,
        "dataset_id": entry.dataset_id,
        "shard_id": entry.shard_id,
    }


def _scope(url: str | None, storage_options: Sequence[str] | None) -> Callable[[Entry], bool]:
    """Whether an entry belongs to the data set at url: by its id where that can be asked for, else by its source.

    A copy of the same data set that came from a mirror is found by the id; a data set that is gone, by the URL.
    """
    if url is None:
        return lambda _entry: True
    with opened_store(url, storage_options) as store:
        prefix = f"{redact(store.url)}/"
        dataset_id = _dataset_id(store)
    return lambda e: (dataset_id is not None and e.dataset_id == dataset_id) or e.source.startswith(prefix)


def _dataset_id(store: Store) -> str | None:
    try:
        return latest(store).dataset_id
    except StoreError:
        return None


def _passes(entry: Entry, include: Sequence[str] | None, exclude: Sequence[str] | None) -> bool:
    path = entry.source.removeprefix(data_set_url(entry.source)).lstrip("/")
    return selected(path, include or (), exclude or ())


def _ask(question: str) -> None:
    """Go on only if a person at the terminal agrees. Raises ValueError where there is nobody to ask."""
    if not sys.stdin.isatty():
        raise ValueError("nobody to ask: standard input is not a terminal; say --yes")
    if not typer.confirm(question, err=True):
        typer.echo("tiercache: nothing was evicted", err=True)
        raise typer.Exit(1)
