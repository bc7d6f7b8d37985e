"""The verb status."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tiercache.cache import Entry
from tiercache.cli.options import (
    CacheDir,
    CacheSize,
    Json,
    Quiet,
    Verbose,
)
from tiercache.cli.output import Output
from tiercache.cli.warm import opened_cache
from tiercache.model import format_bytes


def status(
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - read where failures are reported
) -> None:
    """Say what the cache holds, by data set, and how full it is."""
    output = Output(as_json, quiet)
    with opened_cache(cache_dir, cache_size) as cache:
        facts, groups = cache.status(), by_data_set(cache.entries())
    texts = [
        {
            "data set": group["url"] or "(unknown)",
            "copies": f"{group['copies']:,}",
            "size": format_bytes(group["bytes"]),
            "pinned": format_bytes(group["pinned_bytes"]),
        }
        for group in groups
    ]
    output.table("data_set", groups, texts)
    used, limit = facts["bytes_used"], facts["limit_bytes"]
    text = (
        f"{facts['path']}: {format_bytes(used)} of {format_bytes(limit)}, {format_bytes(facts['pinned_bytes'])} pinned"
    )
    notes = [note for name, note in _TROUBLES.items() if facts[name[0]] == name[1]]
    output.summary(facts, "; ".join([text, *notes]))


_TROUBLES = {
    ("writable", False): "it cannot be written and only serves what it holds",
    ("bypassed", True): "its disk has failed and it is passed by for now",
}


def by_data_set(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """What each data set (or other source) has in the cache, by its URL."""
    groups: dict[str, dict[str, Any]] = {}
    for entry in entries:
        url = entry.source if entry.dataset_id is None else data_set_url(entry.source)
        group = groups.setdefault(url, {"url": url, "copies": 0, "bytes": 0, "pinned_bytes": 0})
        group["copies"] += 1
        group["bytes"] += entry.n_bytes
        group["pinned_bytes"] += entry.n_bytes if entry.pinned else 0
    return [groups[url] for url in sorted(groups)]


def data_set_url(source: str) -> str:
    """URL of the data set that an object's URL lies in."""
    for folder in ("/shards/", "/_tiercache/"):
        head, found, _ = source.rpartition(folder)
        if found:
            return head
    return source
