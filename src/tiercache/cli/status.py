"""The verb status."""

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
from tiercache.cli.values import cut
from tiercache.cli.warm import existing_cache
from tiercache.model import format_bytes

# Facts that are printed as rows of their own, or one by one.
_ROWS = ("holders", "plans", "poisoned_now", "reports", "figures")


def status(
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - read where failures are reported
) -> None:
    """Say what the cache holds, by data set, who uses it, what was wrong in it, and how full it is."""
    output = Output(as_json, quiet)
    with existing_cache(cache_dir, cache_size) as cache:
        facts, entries = cache.status(), cache.entries()
    _print_data_sets(output, by_data_set(entries))
    _print_users(output, facts, {entry.name: entry.source for entry in entries})
    _print_wrong(output, facts)
    # What this process counted is nothing: it only looks. Of all processes it is what a person asks for.
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
    """Who holds copies, and who plans to read them; this process, which only looks, does not count."""
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
        {"process": str(h["pid"]), "holds": count(h["copies"], "copy", "copies"), "command": cut(h["command"])}
        for h in holders
    ]
    output.table("holder", holders, texts)
    for label in facts["plans"]:
        output.event("plan", {"owner": label}, f"plan of {label}")


def _print_wrong(output: Output, facts: Mapping[str, Any]) -> None:
    for name, poison in facts["poisoned_now"].items():
        text = f"poisoned: {poison['url']}: wrong at its source, so not cached for now"
        output.event("poisoned", {"name": name, **poison}, text)
    for report in facts["reports"]:
        verdict = report.get("verdict") or "waits to be fetched again, and compared"
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(report.get("when_s", 0)))
        text = f"quarantined {when}: {report.get('source') or report.get('name')}: {report.get('reason')}; {verdict}"
        output.event("quarantined", report, text)


def summary_of(facts: Mapping[str, Any]) -> str:
    """The last line for people: how full, how useful, what is wrong."""
    used, limit = facts["bytes_used"], facts["limit_bytes"]
    texts = [
        f"{facts['path']}: {format_bytes(used)} of {format_bytes(limit)}, {format_bytes(facts['pinned_bytes'])} pinned"
    ]
    if facts["reserved_bytes"]:
        texts.append(f"{format_bytes(facts['reserved_bytes'])} on the way")
    figures = facts["figures"]
    if facts["hit_ratio"] is not None:
        n_opens = figures["hits"] + figures["misses"]
        fetched = format_bytes(figures.get("bytes_fetched", 0))
        ahead = f"{figures['prefetched']:,} had it fetched ahead, " if figures.get("prefetched") else ""
        found = f"{facts['hit_ratio']:.1%} of {count(n_opens, 'open')} found their copy here"
        texts.append(f"{found}, {ahead}{fetched} fetched")
    texts += _nonzero(
        figures, {"evicted_early": "evicted too early", "quarantined": "quarantined", "poisoned": "poisoned"}
    )
    texts += [note for (name, value), note in _TROUBLES.items() if facts[name] == value]
    if facts["network_file_system"]:
        texts.append(f"it lies on {facts['network_file_system']}")
    return "; ".join(texts)


def _nonzero(figures: Mapping[str, int], names: Mapping[str, str]) -> Iterable[str]:
    return [f"{figures[name]:,} {text}" for name, text in names.items() if figures.get(name)]


_TROUBLES = {
    ("writable", False): "it cannot be written and only serves what it holds",
    ("bypassed", True): "its disk has failed and it is passed by for now",
}


def by_data_set(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """What each data set (or other source) has in the cache, by its URL."""
    groups: dict[str, dict[str, Any]] = {}
    for entry in entries:
        url = entry.source if entry.dataset_id is None else data_set_url(entry.source)
        group = groups.setdefault(url, {"url": url, "copies": 0, "parts": 0, "bytes": 0, "pinned_bytes": 0})
        group["parts" if entry.in_part else "copies"] += 1
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
