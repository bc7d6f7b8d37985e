"""The verbs evict, status and serve of the cache; and verify, for data sets and their cached copies."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from tiercache import config
from tiercache.cache import Cache, Entry
from tiercache.cli.common import (
    CORRUPT,
    FAILED,
    PARTIAL,
    CacheDir,
    CacheSize,
    DryRun,
    EngineName,
    Exclude,
    Include,
    Jobs,
    Output,
    StorageOptions,
    VersionNumber,
    Yes,
    argument,
    confirm,
    count,
    flag,
    option,
    parse_size,
    verb,
)
from tiercache.cli.data import OpenDataSet, open_data_set_store, shorten
from tiercache.errors import CorruptShard, StoreError
from tiercache.images.decoder import image_checker
from tiercache.model import ShardInfo, format_bytes
from tiercache.packer.files import selected
from tiercache.peers import server
from tiercache.peers.server import PeerService, ServerOptions
from tiercache.ray_tasks import call_in_ray, check_engine
from tiercache.shard.verify import Finding, ShardCheck, check_shards, finding_of, open_whole
from tiercache.shard.versions import Version, latest
from tiercache.store import Store, redact
from tiercache.store.access import absolute_url

if TYPE_CHECKING:
    from tiercache.cache.many_copies import CopyCheck


@contextmanager
def open_existing_cache(folder: str | None, size: str | None) -> Iterator[Cache]:
    """Open a cache that exists; FileNotFoundError if its folder does not, which is not created."""
    path = Path(config.read_settings(cache_dir=folder).cache_dir).expanduser().absolute()
    if not path.is_dir():
        raise FileNotFoundError(
            f"there is no cache at {path}: a job that reads from a store, or `tiercache warm`, creates one; to name "
            "another folder, use --cache or TIERCACHE_CACHE_DIR"
        )
    with Cache.default(path=folder, size=size) as cache:
        yield cache


# Facts that are printed as tables or lines of their own, and not in the summary.
_ROWS = ("holders", "plans", "figures")


@verb(after_ctrl_c="nothing was changed; run the same command again")
def status(output: Output, cache_dir: CacheDir = None, cache_size: CacheSize = None) -> None:
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
    holders = [holder for holder in facts["holders"] if holder["pid"] != os.getpid()]
    texts = [{"process": str(holder["pid"]), "command": shorten(holder["command"])} for holder in holders]
    output.table("holder", holders, texts)
    for label in facts["plans"]:
        output.event("plan", {"owner": label}, f"plan of {label}")
    # The counters of this process are zero, because it only looks; "figures" sums the counters of all processes.
    shown = {name: value for name, value in facts.items() if name not in _ROWS} | facts["figures"]
    output.summary(shown, summary_of(facts))


def summary_of(facts: Mapping[str, Any]) -> str:
    used, limit = facts["bytes_used"], facts["limit_bytes"]
    texts = [
        f"{facts['path']}: {format_bytes(used)} of {format_bytes(limit)}, {format_bytes(facts['pinned_bytes'])} pinned"
    ]
    if facts["reserved_bytes"]:
        texts.append(f"{format_bytes(facts['reserved_bytes'])} being fetched")
    figures = facts["figures"]
    if facts["hit_ratio"] is not None:
        read = format_bytes(figures["bytes_hit"] + figures["bytes_missed"])
        texts.append(
            f"{facts['hit_ratio']:.1%} of {read} read came from the cache, "
            f"{format_bytes(figures.get('bytes_fetched', 0))} fetched"
        )
    names = {"quarantined": "corrupt and removed", "poisoned": "corrupt at their source"}
    texts += [f"{figures[name]:,} {text}" for name, text in names.items() if figures.get(name)]
    return "; ".join(texts)


def by_data_set(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for entry in entries:
        url = entry.source if entry.dataset_id is None else data_set_url(entry.source)
        group = groups.setdefault(url, {"url": url, "copies": 0, "parts": 0, "bytes": 0, "pinned_bytes": 0})
        group["parts" if entry.in_part else "copies"] += 1
        group["bytes"] += entry.n_bytes
        group["pinned_bytes"] += entry.n_bytes if entry.pinned else 0
    return [groups[url] for url in sorted(groups)]


def data_set_url(source: str) -> str:
    for folder in ("/shards/", "/_tiercache/"):
        head, found, _ = source.rpartition(folder)
        if found:
            return head
    return source


@dataclass(frozen=True, slots=True)
class Scope:
    """Shards or copies that a verb is about: of a data set (None: of all), by globs over names inside the data set."""

    url: str | None = None
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    storage_options: Sequence[str] | None = None

    def entries(self, cache: Cache) -> list[Entry]:
        """Return the entries of the copies, least recently used first.

        The data set's id finds copies from a mirror; its URL finds copies of a data set that no longer exists.
        """
        entries = [
            e
            for e in cache.entries()
            if selected(
                e.source.removeprefix(data_set_url(e.source)).lstrip("/"), self.include or (), self.exclude or ()
            )
        ]
        if self.url is None:
            return entries
        with open_data_set_store(self.url, self.storage_options) as store:
            prefix, dataset_id = f"{redact(store.url)}/", None
            with suppress(StoreError):
                dataset_id = latest(store).dataset_id
        return [
            e for e in entries if e.source.startswith(prefix) or (dataset_id is not None and e.dataset_id == dataset_id)
        ]


def least_recently_used(entries: Sequence[Entry], used_bytes: int, target_bytes: int | None) -> list[Entry]:
    if target_bytes is None:
        return list(entries)
    chosen = []
    for entry in entries:
        if used_bytes <= target_bytes:
            break
        chosen.append(entry)
        used_bytes -= entry.n_bytes
    return chosen


@verb(
    after_ctrl_c="evicted copies are gone from the cache, nothing else changed; the same command continues from there"
)
def evict(
    output: Output,
    url: Annotated[str | None, argument("[URL]", "Data set whose cached copies are deleted.")] = None,
    everything: Annotated[bool, flag("--all", "Instead of a URL: delete copies of all data sets.")] = False,
    include: Include = None,
    exclude: Exclude = None,
    target_size: Annotated[
        str | None,
        option(
            "--target-size", "SIZE", "Evict until the cache holds at most SIZE, e.g. 200GB, or 50% (of its size limit)."
        ),
    ] = None,
    pinned: Annotated[bool, flag("--pinned", "Delete pinned copies too.")] = False,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    storage_option: StorageOptions = None,
    yes: Yes = False,
    dry_run: DryRun = False,
) -> None:
    """Delete cached copies, least recently used first.

    Copies in use stay, and pinned ones unless --pinned is given. The store is never changed: deleted copies can be
    fetched again. The exit code is 3 if copies that should have been deleted are in use.
    """
    if everything == (url is not None):
        raise ValueError("evict takes a URL or --all")
    scope = Scope(url, include, exclude, storage_option)
    with open_existing_cache(cache_dir, cache_size) as cache:
        target_bytes = None
        if target_size is not None:
            target_bytes = parse_size("--target-size", target_size, whole_bytes=cache.limit_bytes)
        found = scope.entries(cache)
        free = [entry for entry in found if pinned or not entry.pinned]
        n_pinned = len(found) - len(free)
        chosen = least_recently_used(free, cache.stats()["bytes_used"], target_bytes)
        n_bytes = sum(entry.n_bytes for entry in chosen)
        what = f"{count(len(chosen), 'copy', 'copies')}, {format_bytes(n_bytes)}"
        if dry_run:
            for entry in chosen:
                names = ("source", "in_part", "pinned", "dataset_id", "shard_id")
                facts = {"bytes": entry.n_bytes} | {name: getattr(entry, name) for name in names}
                output.event("copy", facts, f"{entry.source or entry.name}  {format_bytes(entry.n_bytes)}")
            facts = {"copies": len(chosen), "bytes": n_bytes, "pinned": n_pinned, "dry_run": True}
            output.summary(facts, f"would evict {what}")
            return
        if chosen and not yes:
            confirm(f"Evict {what} from {cache.path}?", "nothing was evicted")
        if chosen:
            cache.unpin({entry.name for entry in chosen if entry.pinned})
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


@verb(after_ctrl_c="repaired copies stay repaired, nothing else was changed; run the same command again")
def verify(
    output: Output,
    url: Annotated[str | None, argument("[URL]", "Data set: a local path, or a URL such as s3://bucket/name.")] = None,
    sample: Annotated[
        str | None,
        option("--sample", "SHARE", "Check only some of the shards, chosen at random, e.g. 5%; a number: so many."),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    at: VersionNumber = None,
    decode: Annotated[bool, flag("--decode", "Also decode each image of a data set.")] = False,
    cached: Annotated[
        bool,
        flag("--cached", "Check the cached copies of the data set, not its store; without URL: all copies."),
    ] = False,
    repair: Annotated[
        bool, flag("--repair", "Like --cached, and remove what is wrong of them, to be fetched again.")
    ] = False,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    jobs: Jobs = 4,
    engine: EngineName = "process",
    storage_option: StorageOptions = None,
) -> None:
    """Check every byte of a data set, or of copies in the cache.

    Of a data set, the manifest, the segments and the shards of one version are checked. The exit code is 4 if something
    is corrupt and was not removed. With --engine ray, tasks on a Ray cluster check shards of a data set, -j in each.
    """
    jobs = jobs or config.available_cpus()
    check_engine(engine)
    scope = Scope(url, include, exclude, storage_option)
    if cached or repair or cache_dir is not None:
        if sample is not None or at is not None or decode or engine == "ray":
            raise ValueError(
                "--sample, --at, --decode and --engine ray apply to data sets, and cannot be given for copies in the "
                "cache"
            )
        with open_existing_cache(cache_dir, cache_size) as cache:
            _verify_cached(output, cache, scope, jobs, repair=repair)
    elif url is None:
        raise ValueError("verify needs a URL, or --cached, --repair or --cache DIR for copies in the cache")
    else:
        with open_data_set_store(url, storage_option) as store:
            check: _Checks = partial(check_shards, jobs=jobs, images=image_checker if decode else None)
            if engine == "ray":
                check = partial(_check_in_ray, absolute_url(url), storage_option, check, jobs)
            _verify_data_set(output, store, at, scope, sample, check)


_Checks: TypeAlias = Callable[[Store, Version, Sequence[ShardInfo]], Iterator[ShardCheck]]


def _check_in_ray(
    url: str,
    storage_options: Sequence[str] | None,
    check: _Checks,
    jobs: int,
    _store: Store,
    version: Version,
    infos: Sequence[ShardInfo],
) -> Iterator[ShardCheck]:
    """Verify shards in tasks of Ray, `jobs` in each."""
    tasks = [infos[i : i + jobs] for i in range(0, len(infos), jobs)]
    with closing(call_in_ray(partial(_check_task, url, storage_options, check, version), tasks)) as results:
        for checks in results:
            yield from checks


def _check_task(
    url: str, storage_options: Sequence[str] | None, check: _Checks, version: Version, infos: Sequence[ShardInfo]
) -> list[ShardCheck]:
    with open_data_set_store(url, storage_options) as store:
        return list(check(store, version, infos))


def _verify_cached(output: Output, cache: Cache, scope: Scope, jobs: int, *, repair: bool) -> None:
    """Verify copies in the cache and print each corrupt one; with repair, remove those. Exits with CORRUPT."""
    checked: list[CopyCheck] = []
    entries = scope.entries(cache)
    total_bytes = sum(entry.n_bytes for entry in entries)
    with output.byte_progress("verifying copies") as advance:

        def on_progress(one: CopyCheck) -> None:
            checked.append(one)
            advance(sum(one.n_bytes for one in checked), total_bytes)
            if one.where:
                text = f"{one.source or one.name}: {'; '.join(one.where)}{': removed' if one.removed else ''}"
                output.event("copy", {n: value for n, value in asdict(one).items() if n != "n_bytes"}, text)

        cache.verify(names=[entry.name for entry in entries], repair=repair, jobs=jobs, on_progress=on_progress)
    wrong = [one for one in checked if one.where]
    unknown = sum(one.state == "unknown" for one in checked)
    removed = sum(one.removed for one in wrong)
    facts = {"copies": len(checked), "gone": len(entries) - len(checked), "bytes": sum(one.n_bytes for one in checked)}
    facts |= {"damaged": len(wrong), "removed": removed, "unknown": unknown}
    text = f"checked {count(len(checked), 'copy', 'copies')}, {format_bytes(facts['bytes'])}: "
    text += f"{len(wrong):,} corrupt" if wrong else "nothing is corrupt"
    text += f", {removed:,} of them removed" if removed else ""
    text += f", {unknown:,} that could not be verified: no checksum is known for them" if unknown else ""
    output.summary(facts, text)
    if removed < len(wrong):
        raise typer.Exit(CORRUPT)


def _verify_data_set(
    output: Output,
    store: Store,
    at: str | None,
    scope: Scope,
    sample: str | None,
    check_shards_of: _Checks,
) -> None:
    """Verify manifest, segments and a random fraction of the shards. Exits with CORRUPT or PARTIAL."""
    checks: list[ShardCheck] = []
    try:
        data_set = OpenDataSet(store, *open_whole(store, at))
    except CorruptShard as error:
        _print_finding(output, finding_of(error))
        nothing = dict.fromkeys(("shards", "of", "bytes", "damaged", "unread"), 0)
        facts = {"version": int(at) if at is not None and at.isdecimal() else at, **nothing, "findings": 1}
        output.summary(facts, "the data set cannot be opened: 1 finding")
        raise typer.Exit(CORRUPT) from None
    numbers = data_set.select(scope.include, scope.exclude)
    if numbers and sample is not None:
        n_sampled = min(parse_size("--sample", sample, whole_bytes=len(numbers)), len(numbers))
        numbers = sorted(secrets.SystemRandom().sample(numbers, max(1, n_sampled)))
    infos = [data_set.shards.info(i) for i in numbers]
    total_bytes = sum(info.n_bytes for info in infos)
    with output.byte_progress("verifying") as advance:
        for check in check_shards_of(store, data_set.version, infos):
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


@verb(after_ctrl_c="the copies stay in the cache, and readers go to the stores until the command runs again")
def serve(
    output: Output,
    urls: Annotated[
        list[str] | None,
        argument("DATASET...", "Data sets that other machines may read: URLs as the job's machines open them."),
    ] = None,
    address: Annotated[
        str, option("--address", "ADDRESS", "Address to listen on, e.g. that of the cluster's private network.")
    ] = "0.0.0.0",  # noqa: S104 - other machines are to reach it
    port: Annotated[int, option("--port", "N", "Port to listen on.", min=1, max=65535)] = 9740,
    token: Annotated[
        str | None,
        option(
            "--token",
            "TOKEN",
            "Token that requests must have; default: peers_token (TIERCACHE_PEERS_TOKEN), which no list of processes "
            "shows.",
        ),
    ] = None,
    tls_cert: Annotated[Path | None, option("--tls-cert", "FILE", "Certificate of the server, for TLS (PEM).")] = None,
    tls_key: Annotated[Path | None, option("--tls-key", "FILE", "Key of the certificate (PEM).")] = None,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    storage_option: StorageOptions = None,
) -> None:
    """Serve this machine's cache to the other machines of a job.

    nginx serves complete copies. A copy that the cache lacks is fetched from the data set's store once, for all
    machines that request it. Runs until SIGTERM or Ctrl-C. See docs/guide/peers.md.
    """
    if not urls:
        raise ValueError("serve needs at least one DATASET: only what is named is fetched for other machines")
    token = config.read_settings().peers_token if token is None else token
    cert, key = (None if path is None else path.absolute() for path in (tls_cert, tls_key))
    with ExitStack() as stack:
        cache = stack.enter_context(Cache.default(path=cache_dir, size=cache_size, peers=False))
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tiercache-socket-"))
        options = ServerOptions(
            cache.path,
            Path(folder, "service").absolute(),
            cache.folder_id,
            address,
            port,
            token,
            tls_cert=cert,
            tls_key=key,
        )
        reading = stack.enter_context(Cache.default(path=cache_dir, size=cache_size))
        stores = [stack.enter_context(open_data_set_store(url, storage_option)) for url in urls]
        for store in stores:
            latest(store)  # a server of no data set would be noticed by nobody: its peers read from the store
        service = PeerService(list(map(cache.store, stores)), list(map(reading.store, stores)))
        facts = {"urls": [store.url for store in stores], "cache": str(cache.path), "data_sets": len(stores)}
        what = f"{count(len(stores), 'data set')} from the cache in {cache.path}"
        with server.serve(cache, service, options) as process:
            where = f"{address}:{port}"
            signal.signal(signal.SIGTERM, lambda *_: sys.exit())
            output.event("serving", facts | {"address": where}, f"serving {what} on {where}")
            process.wait()
            typer.echo(f"tiercache: nginx ended with status {process.returncode}", err=True)
            raise typer.Exit(FAILED)
