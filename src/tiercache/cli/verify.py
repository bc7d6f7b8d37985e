"""The verb verify: every byte of a data set, or of its copies in the cache."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

import typer

from tiercache import config
from tiercache.cli.cache_verbs import CacheScope, data_set_url, open_existing_cache
from tiercache.cli.data_sets import OpenDataSet, open_data_set_store
from tiercache.cli.output import CORRUPT, PARTIAL, Output, count
from tiercache.errors import CorruptShard, StoreError
from tiercache.model import format_bytes
from tiercache.shard.read.verify import Finding, ShardCheck, check_shards, finding_of, open_whole

if TYPE_CHECKING:
    from tiercache.cache import Entry
    from tiercache.cache.check import CheckProgress, CopyCheck
    from tiercache.store import Store


def verify_copies(output: Output, scope: CacheScope, jobs: int, *, repair: bool) -> None:
    """Verify copies in the cache and print each damaged one; with repair, fetch those again.

    Raises:
        typer.Exit: With CORRUPT if a damaged copy is still in the cache; with PARTIAL if one was removed but not
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
    text += f"{len(wrong):,} damaged" if wrong else "nothing is damaged"
    text += f", {repaired:,} of them repaired" if repaired else ""
    text += f", {removed - repaired:,} removed" if removed > repaired else ""
    text += f", {unknown:,} that could not be verified: no checksum is known for them" if unknown else ""
    output.summary(facts, text)
    if repaired < len(wrong):
        raise typer.Exit(CORRUPT if removed < len(wrong) else PARTIAL)


def _batches(entries: Sequence[Entry], scope: CacheScope, *, repair: bool) -> Iterator[tuple[list[str], Store | None]]:
    """Yield names of copies, each list with the store to fetch damaged ones from; None if they cannot be fetched."""
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
        typer.Exit: With CORRUPT if something is damaged; with PARTIAL if a shard could not be read.
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
    text += f"{damaged} damaged" if damaged else "nothing is damaged"
    text += f", {unread} could not be read" if unread else ""
    output.summary(facts, text)
    if damaged or unread:
        raise typer.Exit(CORRUPT if damaged else PARTIAL)


def _print_finding(output: Output, finding: Finding) -> None:
    places = [finding.part]
    places += [] if finding.block is None else [f"block {finding.block}"]
    places += [] if finding.column is None else [f"column {finding.column!r}"]
    output.event("finding", asdict(finding), f"{finding.url}: {', '.join(places)}: {finding.message}")
