"""The verbs warm and pin, which copy data sets into the local cache, and the opening of the cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tiercache import config
from tiercache.cache import Cache, CachedStore, WarmReport
from tiercache.cli.choosing import AmountOptions, ShardSelection, TrainingOptions, read_names
from tiercache.cli.opening import open_data_set, open_data_set_store
from tiercache.cli.options import (
    BatchSize,
    CacheDir,
    CacheSize,
    Columns,
    DryRun,
    Exclude,
    FilesFrom,
    Include,
    Jobs,
    Json,
    Placement,
    Quiet,
    Seed,
    ShuffleGroup,
    StorageOptions,
    Streams,
    Url,
    Verbose,
    VersionNumber,
    check_size,
    parse_columns,
)
from tiercache.cli.output import Output, count
from tiercache.cli.projection import read_column_ranges
from tiercache.model import ByteRange, ShardIdentity, format_bytes
from tiercache.store import LocalStore, Store

Share = Annotated[
    str | None,
    typer.Option(
        "--share",
        metavar="SHARE",
        help="Fetch only this fraction of the selected bytes, from the first shard on, e.g. 25%.",
    ),
]
First = Annotated[
    str | None,
    typer.Option(
        "--first",
        metavar="SIZE",
        help="Fetch only this many of the selected bytes, from the first shard on, e.g. 200GB.",
    ),
]
Minutes = Annotated[
    float | None,
    typer.Option("--minutes", metavar="N", help="Fetch only what a training reads in N minutes at --rate."),
]
Rate = Annotated[
    str | None,
    typer.Option(
        "--rate", metavar="SIZE/s", help="Rate at which the training reads stored bytes, e.g. 500MB/s; for --minutes."
    ),
]
Epoch = Annotated[
    int | None, typer.Option("--epoch", min=0, metavar="N", help="Epoch of the training, counted from 0; default: 0.")
]
Rank = Annotated[
    list[str] | None,
    typer.Option(
        "--rank",
        metavar="R/W",
        help="Fetch only what these ranks read: RANK/RANKS, e.g. 3/8 or 0-3/8. May be repeated.",
    ),
]


def refuse_local(store: Store, folder: str | None) -> None:
    """Raise ValueError for a local data set, whose files readers map in place, unless a cache folder was named."""
    if isinstance(store, LocalStore) and folder is None:
        raise ValueError(
            f"{store.url}: a local folder is read in place and needs no cache; give --cache DIR to copy it anyway"
        )


@contextmanager
def open_existing_cache(folder: str | None, size: str | None) -> Iterator[Cache]:
    """Open a cache that exists, as open_cache() does.

    Raises:
        FileNotFoundError: The folder does not exist. It is not created.
    """
    path = Path(config.load(cache_dir=folder).cache_dir).expanduser().absolute()
    if not path.is_dir():
        raise FileNotFoundError(
            f"there is no cache at {path}: a job that reads from a store, or `tiercache warm`, creates one; to name "
            "another folder, use --cache or TIERCACHE_CACHE_DIR"
        )
    with open_cache(folder, size) as cache:
        yield cache


@contextmanager
def open_cache(folder: str | None, size: str | None) -> Iterator[Cache]:
    """Yield the cache that the options or the configuration name, and close it at the end."""
    with Cache.default(path=folder, size=check_size("--cache-size", size)) as cache:
        yield cache


@dataclass(frozen=True, slots=True)
class _CopyRequest:
    """The part of a data set that the options select. columns: Names of columns; None: all."""

    url: str
    choice: ShardSelection
    at: int | None
    columns: list[str] | None
    storage_options: Sequence[str] | None


@dataclass(frozen=True, slots=True)
class _CopySet:
    """Objects to copy into a cache.

    Attributes:
        cache: The cache.
        store: Store of the data set, read through the cache.
        objects: Keys and identities of the objects.
        ranges: Byte ranges to copy, by key; an object that is not in ranges is copied as a whole.
    """

    cache: Cache
    store: CachedStore
    objects: list[tuple[str, ShardIdentity]]
    ranges: Mapping[str, Sequence[ByteRange]]

    @property
    def facts(self) -> dict[str, Any]:
        """Return the objects for JSON output."""
        return {"url": self.store.url, "objects": len(self.objects), "bytes": self._n_bytes}

    @property
    def text(self) -> str:
        """Return the objects for people."""
        parts = f" ({len(self.ranges):,} of them in part)" if self.ranges else ""
        return f"{count(len(self.objects), 'object')}{parts}, {format_bytes(self._n_bytes)}"

    @property
    def _n_bytes(self) -> int:
        return sum(
            sum(r.n_bytes for r in self.ranges[key]) if key in self.ranges else identity.n_bytes
            for key, identity in self.objects
        )

    def fetch(self, output: Output, doing: str, jobs: int) -> WarmReport:
        """Copy all objects into the cache, with a progress bar labelled doing."""
        jobs = jobs or config.available_cpus()
        with output.byte_progress(doing) as advance:
            return self.cache.warm(
                self.store,
                self.objects,
                ranges=self.ranges,
                jobs=jobs,
                on_progress=lambda p: advance(p.bytes_done, p.bytes_wanted),
            )


@contextmanager
def _open_copy_set(asked: _CopyRequest, cache: Cache, cache_dir: str | None, output: Output) -> Iterator[_CopySet]:
    """Yield the selected objects, while the data set's store is open."""
    with open_data_set_store(asked.url, asked.storage_options) as inner:
        refuse_local(inner, cache_dir)
        data_set = open_data_set(inner, asked.at)
        shards = asked.choice.shards(data_set.shards)
        dataset_id = data_set.version.dataset_id
        objects = [(ref.key, ref.identity(dataset_id)) for ref in data_set.version.segments]
        objects += data_set.shards.objects(dataset_id, shards)
        ranges: Mapping[str, Sequence[ByteRange]] = {}
        if asked.columns is not None:
            with output.count_progress("reading footers") as advance:
                ranges = read_column_ranges(data_set, shards, asked.columns, advance)
        yield _CopySet(cache, cache.store(inner), objects, ranges)


def warm(
    url: Url,
    share: Share = None,
    first: First = None,
    minutes: Minutes = None,
    rate: Rate = None,
    include: Include = None,
    exclude: Exclude = None,
    files_from: FilesFrom = None,
    columns: Columns = None,
    seed: Seed = None,
    epoch: Epoch = None,
    rank: Rank = None,
    streams: Streams = None,
    placement: Placement = None,
    shuffle_group: ShuffleGroup = None,
    batch_size: BatchSize = None,
    at: VersionNumber = None,
    jobs: Jobs = 4,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    storage_option: StorageOptions = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - report_errors() reads it
) -> None:
    """Copy a data set, or a part of it, from its store into the cache.

    The exit code is 0 only if all of it is cached. With --seed, the shards are fetched in the order in which a training
    reads them: --rank selects the ranks, and --first or --minutes the amount.
    """
    output = Output(as_json, quiet)
    order = TrainingOptions(seed, epoch, rank, streams, placement, shuffle_group, batch_size).training()
    part, size = AmountOptions(share, first, minutes, rate).limits()
    choice = ShardSelection(include, exclude, read_names(files_from), order, part, size)
    asked = _CopyRequest(url, choice, at, parse_columns(columns), storage_option)
    with open_cache(cache_dir, cache_size) as cache, _open_copy_set(asked, cache, cache_dir, output) as wanted:
        if dry_run:
            plan = cache.plan_warm(wanted.store, wanted.objects, ranges=wanted.ranges)
            facts = {"fetched": len(plan.missing), "bytes_fetched": plan.missing_bytes, "fits": plan.fits}
            short = "" if plan.fits else "; the cache has not enough space for them"
            missing = f"{count(len(plan.missing), 'object')}, {format_bytes(plan.missing_bytes)}"
            output.summary(wanted.facts | facts | {"dry_run": True}, f"would fetch {missing}{short}")
            return
        report = wanted.fetch(output, "warming", jobs)
        facts = wanted.facts | {"fetched": report.n_fetched, "bytes_fetched": report.bytes_fetched}
        fetched = f"{format_bytes(report.bytes_fetched)} of them fetched now"
        output.summary(facts, f"{wanted.text} are in the cache, {fetched}")


def pin(
    url: Url,
    share: Share = None,
    first: First = None,
    include: Include = None,
    exclude: Exclude = None,
    files_from: FilesFrom = None,
    at: VersionNumber = None,
    jobs: Jobs = 4,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    storage_option: StorageOptions = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - report_errors() reads it
) -> None:
    """Copy a data set into the cache, and keep the copies until unpin.

    Pinned copies are not evicted. --share, --first, --include, --exclude and --files-from select a part of the data
    set.
    """
    output = Output(as_json, quiet)
    part, size = AmountOptions(share, first).limits()
    choice = ShardSelection(include, exclude, read_names(files_from), fraction=part, limit_bytes=size)
    asked = _CopyRequest(url, choice, at, None, storage_option)
    with open_cache(cache_dir, cache_size) as cache, _open_copy_set(asked, cache, cache_dir, output) as wanted:
        if dry_run:
            output.summary(wanted.facts | {"dry_run": True}, f"would pin {wanted.text}")
            return
        report = wanted.fetch(output, "pinning", jobs)
        cache.pin(wanted.store, wanted.objects)
        output.summary(wanted.facts | {"bytes_fetched": report.bytes_fetched}, f"pinned {wanted.text}")
