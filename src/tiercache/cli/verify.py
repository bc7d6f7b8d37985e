"""The verb verify: every byte of a data set, or of its copies in the cache."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, TypeAlias

import typer

from tiercache import config
from tiercache.cli.copies import CopyVerification, verify_copies
from tiercache.cli.failures import CORRUPT, PARTIAL
from tiercache.cli.opening import OpenDataSet, open_data_set_store
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
from tiercache.cli.output import Output, count
from tiercache.cli.warm import open_existing_cache
from tiercache.errors import CorruptShard
from tiercache.model import ShardInfo, format_bytes
from tiercache.shard.read.verify import Finding, ShardCheck, check_shards, finding_of, open_whole

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
