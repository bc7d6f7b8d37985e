"""The verb verify: every byte of a data set, or of its copies in the cache."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import typer

from tiercache import config
from tiercache.cli.cache_verbs import CacheScope, data_set_url, open_existing_cache
from tiercache.cli.data_sets import OpenDataSet, open_data_set_store
from tiercache.cli.output import CORRUPT, PARTIAL, Output, count
from tiercache.errors import CorruptShard, StoreError
from tiercache.model import ShardInfo, format_bytes
from tiercache.shard.read.verify import Finding, ShardCheck, check_shards, finding_of, open_whole

if TYPE_CHECKING:
    from tiercache.cache import Entry
    from tiercache.cache.check import CheckProgress, CopyCheck
    from tiercache.store import Store


@dataclass(frozen=True, slots=True)
class ShardSample:
    """Shards of a data set to verify.

    Attributes:
        include: Globs over shard names, of which one must match; None: all names.
        exclude: Globs over shard names, of which none may match.
        fraction: Fraction of these shards that is verified, chosen at random, 0 to 1.
    """

    include: Sequence[str] | None
    exclude: Sequence[str] | None
    fraction: float


def verify_copies(output: Output, scope: CacheScope, jobs: int, *, repair: bool) -> None:
    """Verify copies in the cache and print each damaged one.

    Args:
        output: Output of the verb.
        scope: The copies. With repair, its storage options are those of the stores that copies are fetched from.
        jobs: Number of copies that are read at a time; 0: one per CPU.
        repair: Whether damaged copies are fetched again.

    Raises:
        typer.Exit: With CORRUPT if a damaged copy is still in the cache; with PARTIAL if one was removed but not
            repaired.
    """
    checked: list[CopyCheck] = []
    with open_existing_cache(scope.cache_dir, scope.cache_size) as cache:
        entries = scope.entries(cache)
        total_bytes = sum(entry.n_bytes for entry in entries)
        with output.byte_progress("verifying copies") as advance:

            def tell(progress: CheckProgress) -> None:
                checked.append(progress.last)
                advance(sum(one.n_bytes for one in checked), total_bytes)
                _print_copy(output, progress.last)

            for names, store in _batches(entries, scope, repair=repair):
                jobs = jobs or config.available_cpus()
                cache.verify(names=names, repair=repair, store=store, jobs=jobs, on_progress=tell)
    _finish_copies(output, checked, len(entries))


def _batches(entries: Sequence[Entry], scope: CacheScope, *, repair: bool) -> Iterator[tuple[list[str], Store | None]]:
    """Yield names of copies, each list with the store to fetch damaged ones from; None if they cannot be fetched."""
    if not repair:
        yield [entry.name for entry in entries], None
        return
    if scope.url is not None:
        with open_data_set_store(scope.url, scope.storage_options) as store:
            yield [entry.name for entry in entries], store
        return
    for url, group in groupby(sorted(entries, key=store_url), store_url):
        with ExitStack() as stack:
            source: Store | None = None  # the recorded URL contains no credentials, so the store may not open
            if url:
                with suppress(StoreError, ValueError, OSError):
                    source = stack.enter_context(open_data_set_store(url, scope.storage_options))
            yield [entry.name for entry in group], source


def store_url(entry: Entry) -> str:
    """Return the URL of the store that a copy came from, its data set or its object's folder; "" if unknown."""
    url = data_set_url(entry.source)
    return url if entry.dataset_id is not None or not url else url.rpartition("/")[0]


def _print_copy(output: Output, one: CopyCheck) -> None:
    if not one.where:
        return
    facts = {
        "source": one.source,
        "name": one.name,
        "state": one.state.value,
        "in_part": one.in_part,
        "where": list(one.where),
        "removed": one.removed,
        "repaired": one.repaired,
    }
    ending = ": repaired" if one.repaired else ": removed" if one.removed else ""
    output.event("copy", facts, f"{one.source or one.name}: {'; '.join(one.where)}{ending}")


def _finish_copies(output: Output, checked: Sequence[CopyCheck], n_asked: int) -> None:
    wrong = [one for one in checked if one.where]
    unknown = sum(one.state == "unknown" for one in checked)
    repaired, removed = sum(one.repaired for one in wrong), sum(one.removed for one in wrong)
    facts = {
        "copies": len(checked),
        "gone": n_asked - len(checked),
        "bytes": sum(one.n_bytes for one in checked),
        "damaged": len(wrong),
        "repaired": repaired,
        "removed": removed,
        "unknown": unknown,
    }
    said = f"{len(wrong):,} damaged" if wrong else "nothing is damaged"
    said += f", {repaired:,} of them repaired" if repaired else ""
    said += f", {removed - repaired:,} removed" if removed > repaired else ""
    said += f", {unknown:,} that could not be verified: no checksum is known for them" if unknown else ""
    output.summary(facts, f"checked {count(len(checked), 'copy', 'copies')}, {format_bytes(facts['bytes'])}: {said}")
    if removed < len(wrong):
        raise typer.Exit(CORRUPT)
    if repaired < len(wrong):
        raise typer.Exit(PARTIAL)


def verify_data_set(
    output: Output,
    url: str,
    at: int | None,
    sample: ShardSample,
    jobs: int,
    storage_options: Sequence[str] | None,
) -> None:
    """Verify the manifest, the segments and the sampled shards of one version, and print each damage.

    Raises:
        typer.Exit: With CORRUPT if something is damaged; with PARTIAL if a shard could not be read.
    """
    with open_data_set_store(url, storage_options) as store:
        try:
            data_set = OpenDataSet(store, *open_whole(store, at))
        except CorruptShard as error:
            _print_finding(output, finding_of(error))
            nothing = dict.fromkeys(("shards", "of", "bytes", "damaged", "unread"), 0)
            facts = {"version": at, **nothing, "findings": 1}
            output.summary(facts, "the data set cannot be opened: 1 finding")
            raise typer.Exit(CORRUPT) from None
        chosen = data_set.select(sample.include, sample.exclude)
        infos = [data_set.shards.info(i) for i in _sampled(chosen, sample.fraction)]
        checks = _check_all(output, data_set, infos, jobs or config.available_cpus())
    _finish(output, data_set, checks)


def _sampled(shards: Sequence[int], share: float) -> list[int]:
    """Return a random fraction of the shards, in order; at least one if there is one."""
    n = min(len(shards), max(1, round(share * len(shards))))
    return sorted(secrets.SystemRandom().sample(shards, n))


def _check_all(output: Output, data_set: OpenDataSet, infos: Sequence[ShardInfo], jobs: int) -> list[ShardCheck]:
    checks: list[ShardCheck] = []
    total_bytes = sum(info.n_bytes for info in infos)
    with output.byte_progress("verifying") as advance:
        for check in check_shards(data_set.store, data_set.version, infos, jobs=jobs):
            checks.append(check)
            advance(sum(c.info.n_bytes for c in checks), total_bytes)
            for finding in check.findings:
                _print_finding(output, finding)
            if check.error is not None:
                output.event("unread", {"shard": check.info.name, "message": check.error.message}, check.error.message)
    return checks


def _print_finding(output: Output, finding: Finding) -> None:
    places = [finding.part]
    places += [] if finding.block is None else [f"block {finding.block}"]
    places += [] if finding.column is None else [f"column {finding.column!r}"]
    output.event("finding", asdict(finding), f"{finding.url}: {', '.join(places)}: {finding.message}")


def _finish(output: Output, data_set: OpenDataSet, checks: Sequence[ShardCheck]) -> None:
    damaged = sum(bool(check.findings) for check in checks)
    unread = sum(check.error is not None for check in checks)
    n_bytes = sum(check.info.n_bytes for check in checks if check.error is None)
    facts = {
        "version": data_set.version.number,
        "shards": len(checks),
        "of": len(data_set.shards),
        "bytes": n_bytes,
        "damaged": damaged,
        "unread": unread,
        "findings": sum(len(check.findings) for check in checks),
    }
    said = f"{damaged} damaged" if damaged else "nothing is damaged"
    missed = f", {unread} could not be read" if unread else ""
    of = f" of {len(data_set.shards)}" if len(checks) < len(data_set.shards) else ""
    output.summary(facts, f"checked {count(len(checks), 'shard')}{of}, {format_bytes(n_bytes)}: {said}{missed}")
    if damaged or unread:
        raise typer.Exit(CORRUPT if damaged else PARTIAL)
