"""The verb status, and the grouping of cached copies by data set."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tiercache.cache import Entry
from tiercache.cli.options import (
    CacheDir,
    CacheSize,
    Json,
    Quiet,
    Verbose,
)
from tiercache.cli.output import Output, count
from tiercache.cli.values import shorten
from tiercache.cli.warm import open_existing_cache
from tiercache.model import format_bytes

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
    for report in facts["reports"]:
        verdict = report.get("verdict") or "not yet fetched again for comparison"
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(report.get("when_s", 0)))
        text = f"quarantined {when}: {report.get('source') or report.get('name')}: {report.get('reason')}; {verdict}"
        output.event("quarantined", report, text)


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
