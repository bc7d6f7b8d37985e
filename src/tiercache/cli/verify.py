"""The verb verify: every byte of a data set, or of its copies in the cache."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from tiercache import config
from tiercache.cli.cache_verbs import data_set_filter, data_set_url, name_matches, open_existing_cache
from tiercache.cli.data_sets import OpenDataSet, open_data_set_store
from tiercache.cli.options import (
    CacheDir,
    CacheSize,
    Exclude,
    Include,
    Jobs,
    Json,
    Quiet,
    StorageOptions,
    Verbose,
    VersionNumber,
    parse_fraction,
)
from tiercache.cli.output import CORRUPT, PARTIAL, Output, count
from tiercache.errors import CorruptShard, StoreError
from tiercache.model import ShardInfo, format_bytes
from tiercache.shard.read.verify import Finding, ShardCheck, check_shards, finding_of, open_whole

if TYPE_CHECKING:
    from tiercache.cache import Cache, Entry
    from tiercache.cache.check import CheckProgress, CopyCheck
    from tiercache.store import Store


@dataclass(frozen=True, slots=True)
class CopyVerification:
    """The copies to verify, and how.

    Attributes:
        url: URL of the data set whose copies are verified; None: all copies.
        include: Globs over names inside the data set, of which one must match; None: all names.
        exclude: Globs over names inside the data set, of which none may match.
        repair: Whether damaged copies are fetched again.
        jobs: Number of copies that are read at a time.
        storage_options: KEY=VALUE options of the stores that damaged copies are fetched from.
    """

    url: str | None
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    repair: bool
    jobs: int
    storage_options: Sequence[str] | None


def verify_copies(output: Output, cache: Cache, asked: CopyVerification) -> None:
    """Verify the copies and print each damaged one.

    Raises:
        typer.Exit: With CORRUPT if a damaged copy is still in the cache; with PARTLY if one was removed but not
            repaired.
    """
    of_scope = data_set_filter(asked.url, asked.storage_options)
    entries = [e for e in cache.entries() if of_scope(e) and name_matches(e, asked.include, asked.exclude)]
    checked: list[CopyCheck] = []
    total_bytes = sum(entry.n_bytes for entry in entries)
    with output.byte_progress("verifying copies") as advance:

        def tell(progress: CheckProgress) -> None:
            checked.append(progress.last)
            advance(sum(one.n_bytes for one in checked), total_bytes)
            _print(output, progress.last)

        for names, store in _batches(entries, asked):
            cache.verify(names=names, repair=asked.repair, store=store, jobs=asked.jobs, on_progress=tell)
    _finish_copies(output, checked, len(entries))


def _batches(entries: Sequence[Entry], asked: CopyVerification) -> Iterator[tuple[list[str], Store | None]]:
    """Yield names of copies, each list with the store to fetch damaged ones from; None if they cannot be fetched."""
    if not asked.repair:
        yield [entry.name for entry in entries], None
        return
    if asked.url is not None:
        with open_data_set_store(asked.url, asked.storage_options) as store:
            yield [entry.name for entry in entries], store
        return
    for url, group in groupby(sorted(entries, key=store_url), store_url):
        with _source(url, asked.storage_options) as source:
            yield [entry.name for entry in group], source


def store_url(entry: Entry) -> str:
    """Return the URL of the store that a copy came from, its data set or its object's folder; "" if unknown."""
    url = data_set_url(entry.source)
    return url if entry.dataset_id is not None or not url else url.rpartition("/")[0]


@contextmanager
def _source(url: str, storage_options: Sequence[str] | None) -> Iterator[Store | None]:
    """Yield the store of a recorded URL, which contains no credentials; None if it cannot be opened."""
    with ExitStack() as stack:
        store = None
        if url:
            with suppress(StoreError, ValueError, OSError):
                store = stack.enter_context(open_data_set_store(url, storage_options))
        yield store


def _print(output: Output, one: CopyCheck) -> None:
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


MaybeUrl: TypeAlias = Annotated[
    str | None, typer.Argument(metavar="[URL]", help="Data set: a local path, or a URL such as s3://bucket/name.")
]


def verify(
    url: MaybeUrl = None,
    sample: Annotated[
        str | None,
        typer.Option(
            "--sample", metavar="SHARE", help="Check only this fraction of the shards, chosen at random, e.g. 5%."
        ),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    at: VersionNumber = None,
    cached: Annotated[
        bool,
        typer.Option(
            "--cached", help="Check the cached copies of the data set, not its store; without URL: all copies."
        ),
    ] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Like --cached, and fetch damaged copies again.")] = False,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    jobs: Jobs = 4,
    storage_option: StorageOptions = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - report_errors() reads it
) -> None:
    """Check every byte of a data set, or of copies in the cache.

    Of a data set, the manifest, the segments and the shards of one version are checked. The exit code is 4 if something
    is damaged and was not repaired.
    """
    output = Output(as_json, quiet)
    jobs = jobs or config.available_cpus()
    if cached or repair or cache_dir is not None:
        if sample is not None or at is not None:
            raise ValueError("--sample and --at apply to data sets, and cannot be given for copies in the cache")
        with open_existing_cache(cache_dir, cache_size) as cache:
            verify_copies(output, cache, CopyVerification(url, include, exclude, repair, jobs, storage_option))
        return
    if url is None:
        raise ValueError("verify needs a URL, or --cached, --repair or --cache DIR for copies in the cache")
    with open_data_set_store(url, storage_option) as store:
        try:
            data_set = OpenDataSet(store, *open_whole(store, at))
        except CorruptShard as error:
            _print_finding(output, finding_of(error))
            nothing = dict.fromkeys(("shards", "of", "bytes", "damaged", "unread"), 0)
            facts = {"version": at, **nothing, "findings": 1}
            output.summary(facts, "the data set cannot be opened: 1 finding")
            raise typer.Exit(CORRUPT) from None
        chosen = data_set.select(include, exclude)
        infos = [data_set.shards.info(i) for i in _sampled(chosen, 1.0 if sample is None else parse_fraction(sample))]
        checks = _check_all(output, data_set, infos, jobs)
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
