"""The verbs warm and simulate, and the order in which a training reads shards, which both follow."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from tiercache import config
from tiercache.cache import Cache
from tiercache.cache.eviction import POLICIES, Trace
from tiercache.cache.eviction import simulate as simulate_cache
from tiercache.cli.common import (
    CacheDir,
    CacheSize,
    Columns,
    DryRun,
    EngineName,
    Exclude,
    Include,
    Jobs,
    Output,
    StorageOptions,
    Url,
    VersionNumber,
    argument,
    count,
    flag,
    option,
    parse_columns,
    parse_size,
    verb,
)
from tiercache.cli.data import OpenDataSet, open_data_set, open_data_set_store
from tiercache.load.epoch import OrderShare
from tiercache.load.loader_options import LoaderOptions
from tiercache.model import ByteRange, ShardIdentity, format_bytes
from tiercache.order.epoch_order import EpochOrder
from tiercache.order.rank_plan import RankPlan
from tiercache.order.window import DatasetSizes, OrderOptions
from tiercache.packer.files import selected
from tiercache.ray_tasks import call_in_ray, check_engine
from tiercache.shard.source import column_ranges, fetch_footer
from tiercache.store import LocalStore, Store
from tiercache.store.access import absolute_url
from tiercache.store.remote import call_threads

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.cache.many_copies import MissingCopies, WarmProgress, WarmReport
    from tiercache.order.window import BlockSizes
    from tiercache.shard.versions import ShardTable


# -- the order of a training -------------------------------------------------------------------------------------------

GROUP_BYTES = LoaderOptions().group_bytes  # that of a training with default options
_ALL_BYTES = 1 << 60

Placement: TypeAlias = Annotated[
    str | None,
    option(
        "--placement",
        "HOW",
        "The training's assignment of shards to ranks, as in LoaderOptions: sticky (default) or global.",
    ),
]


@dataclass(frozen=True, slots=True)
class Training:
    """A loader's order, and the ranks that read it."""

    seed: int
    epoch: int = 0
    ranks: tuple[int, ...] = (0,)
    world_size: int = 1
    placement: Literal["sticky", "global"] = "sticky"

    @property
    def options(self) -> OrderOptions:
        return OrderOptions(
            seed=self.seed,
            shuffle=True,
            group_bytes=GROUP_BYTES,
            window_bytes=None,
            streams=self.world_size,
            placement=self.placement,
        )


@dataclass(frozen=True, slots=True, eq=False)
class ReadOrder:
    """Shards in the order in which one reader first reads them in an epoch, and the bytes that it reads before each."""

    shards: NDArray[np.int64]
    clock: NDArray[np.int64]


def epoch_reads(
    records: NDArray[np.int64], stored_bytes: NDArray[np.int64], training: Training
) -> dict[int, ReadOrder]:
    """Return the reads of each of the training's ranks in its epoch. records, stored_bytes: Of each shard, int64[n]."""
    order = EpochOrder(DatasetSizes(records, stored_bytes, _no_footers), training.options, training.epoch)
    reads = {}
    for rank in training.ranks:
        plan = RankPlan(0, training.world_size, rank, order.n_streams, False, order.n_records, order.n_streams)
        share = OrderShare(order, plan, training.seed, training.epoch)
        shards = np.array(share.shards_ahead(0, 0, _ALL_BYTES), np.int64)
        reads[rank] = ReadOrder(shards, np.cumsum(stored_bytes[shards]) - stored_bytes[shards])
    return reads


def merge_reads(reads: Sequence[ReadOrder]) -> NDArray[np.int64]:
    """Return the shards in the order in which parallel readers first read them, without duplicates: int64[m]."""
    shards = np.concatenate([each.shards for each in reads])
    shards = shards[np.argsort(np.concatenate([each.clock for each in reads]), kind="stable")]
    return shards[np.sort(np.unique(shards, return_index=True)[1])]


def _no_footers(shards: Sequence[int]) -> Sequence[BlockSizes]:
    raise RuntimeError(f"bug: the order of shards read the footers of {list(shards)}")


_RANKS = re.compile(r"(\d+)(?:-(\d+))?/(\d+)")


def select_shards(
    table: ShardTable,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    training: Training | None = None,
    limit: str | None = None,
) -> NDArray[np.int64]:
    """Return the numbers of the selected shards, int64[m], in the order of the training, else the stored order.

    include and exclude are globs over shard names; limit, a size or a fraction, keeps the first of the selected bytes.
    """
    shards = np.arange(len(table), dtype=np.int64)
    if training is not None:
        shards = merge_reads(list(epoch_reads(table.n_records, table.n_bytes, training).values()))
    if include or exclude:
        names = table.names.to_pylist()
        shards = shards[np.array([selected(names[i], include or (), exclude or ()) for i in shards.tolist()], bool)]
    whole_bytes = int(table.n_bytes[shards].sum())
    wanted_bytes = whole_bytes if limit is None else parse_size("--limit", limit, whole_bytes=whole_bytes)
    before = np.cumsum(table.n_bytes[shards]) - table.n_bytes[shards]
    return shards[: int(np.searchsorted(before, wanted_bytes, side="left"))]


def parse_training(
    seed: int | None, ranks: Sequence[str] | None = None, placement: str | None = None
) -> Training | None:
    if seed is None:
        options = {"rank": ranks, "placement": placement}
        if flag := next((name for name, value in options.items() if value is not None), None):
            raise ValueError(f"--{flag} needs --seed: without it every rank reads all shards, in stored order")
        return None
    chosen, world_size = parse_ranks(ranks or ["0/1"])
    return Training(seed, 0, chosen, world_size, parse_placement(placement))


def parse_placement(text: str | None) -> Literal["sticky", "global"]:
    if text in (None, "sticky"):
        return "sticky"
    if text == "global":
        return "global"
    raise ValueError(f"--placement must be sticky or global, got {text!r}")


def parse_ranks(texts: Sequence[str]) -> tuple[tuple[int, ...], int]:
    """Return the ranks that "3/8" or "0-3/8" texts name, in their order, and the world size. Raises ValueError."""
    ranks: list[int] = []
    sizes: set[int] = set()
    for text in texts:
        match = _RANKS.fullmatch(text.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or not first <= last < int(match[3]):
            raise ValueError(f"--rank takes RANK/RANKS, e.g. 3/8 or 0-3/8, got {text!r}")
        ranks += range(first, last + 1)
        sizes.add(int(match[3]))
    if len(sizes) != 1:
        raise ValueError(f"--rank: all values must have the same number of ranks, got {sorted(sizes)}")
    return tuple(dict.fromkeys(ranks)), sizes.pop()


class NodeReads(NamedTuple):
    trace: Trace
    epoch: NDArray[np.int64]


def training_reads(
    records: NDArray[np.int64], stored_bytes: NDArray[np.int64], training: Training, *, nodes: int = 1, epochs: int = 5
) -> list[NodeReads]:
    """Return the reads of each node: a shard once per epoch for each local rank that reads it, by the ranks' clocks.

    The training's ranks and epoch are ignored: the ranks fill one node after the other, and epochs are counted from 0.
    """
    n_local, rest = divmod(training.world_size, nodes)
    if rest:
        raise ValueError(f"{training.world_size} ranks cannot be divided evenly among {nodes} nodes")
    ranks = tuple(range(training.world_size))
    reads = [epoch_reads(records, stored_bytes, replace(training, epoch=e, ranks=ranks)) for e in range(epochs)]
    found = []
    for node in range(nodes):
        began = dict.fromkeys(ranks[node * n_local : (node + 1) * n_local], 0)  # each rank's clock at the epoch's start
        columns: list[NDArray[np.int64]] = []
        for epoch, of_ranks in enumerate(reads):
            rows = []
            for rank in began:
                each = of_ranks[rank]
                parts = (each.shards, np.full(len(each.shards), rank), began[rank] + each.clock, each.clock)
                rows.append(np.stack([*parts, np.full(len(each.shards), epoch)]))
                began[rank] += int(stored_bytes[each.shards].sum())
            joined = np.concatenate(rows, axis=1)
            columns.append(joined[:, np.argsort(joined[3], kind="stable")])
        shards, job, clock, _, epoch_of = np.concatenate(columns, axis=1)
        found.append(NodeReads(Trace(shards, stored_bytes[shards], job, clock), epoch_of))
    return found


def simulate_case(nodes: Sequence[NodeReads], policy: str, size_bytes: int) -> dict[str, Any]:
    """Return the figures of one policy and one cache size per node, for all nodes together.

    Those per epoch are averages over the epochs after the first, or those of the only epoch.
    """
    totals = np.zeros(3)
    for trace, epoch in nodes:
        fetched = trace.n_bytes - simulate_cache(trace, policy, size_bytes)
        n_epochs = int(epoch.max(initial=0)) + 1
        counted = epoch > 0 if n_epochs > 1 else np.ones(len(trace), np.bool_)
        sums = [fetched[counted].sum(), trace.n_bytes[counted].sum()]
        totals += [*(np.array(sums) / max(n_epochs - 1, 1)), fetched[epoch == 0].sum()]
    epoch_bytes, read_bytes, first_bytes = totals.tolist()
    return {
        "policy": policy,
        "size_bytes": size_bytes,
        "byte_hit_ratio": 1 - epoch_bytes / read_bytes if read_bytes else 0.0,
        "first_bytes": int(first_bytes),
        "epoch_bytes": epoch_bytes,
    }


# -- warm --------------------------------------------------------------------------------------------------------------


@verb(after_ctrl_c="fetched shards stay in the cache; the same command continues from there")
def warm(
    output: Output,
    url: Url,
    limit: Annotated[
        str | None, option("--limit", "SIZE", "Fetch only the first of the selected bytes, e.g. 200GB or 25%.")
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    columns: Columns = None,
    seed: Annotated[
        int | None, option("--seed", "N", "Seed of the training's shuffle, as in LoaderOptions(seed=N).")
    ] = None,
    rank: Annotated[
        list[str] | None,
        option("--rank", "R/W", "Fetch only what these ranks read: RANK/RANKS, e.g. 3/8 or 0-3/8. May be repeated."),
    ] = None,
    placement: Placement = None,
    at: VersionNumber = None,
    pin: Annotated[bool, flag("--pin", "Pin the copies: only `tiercache evict --pinned` deletes them.")] = False,
    jobs: Jobs = 4,
    cache_dir: CacheDir = None,
    cache_size: CacheSize = None,
    engine: EngineName = "process",
    storage_option: StorageOptions = None,
    dry_run: DryRun = False,
) -> None:
    """Copy a data set, or a part of it, from its store into the cache.

    The exit code is 0 only if all of it is cached. With --seed, the shards are fetched in the order in which a training
    reads them: --rank selects the ranks, and --limit the amount. With --engine ray, each machine of a Ray cluster
    copies it into its own cache.
    """
    check_engine(engine)
    if engine == "ray" and dry_run:
        raise ValueError("--dry-run looks at the cache of this machine, and cannot be combined with --engine ray")
    if pin and columns is not None:
        raise ValueError("--pin keeps whole copies, and cannot be combined with --columns")
    training = parse_training(seed, rank, placement)
    names = parse_columns(columns)
    with open_data_set_store(url, storage_option) as store:
        if isinstance(store, LocalStore) and cache_dir is None:
            raise ValueError(
                f"{store.url}: a local folder is read in place and needs no cache; give --cache DIR to copy it anyway"
            )
        shown = store.url
        data_set = open_data_set(store, at)
        shards = select_shards(data_set.shards, include, exclude, training, limit)
        dataset_id = data_set.version.dataset_id
        objects = [(ref.key, ref.identity(dataset_id)) for ref in data_set.version.segments]
        objects += data_set.shards.objects(dataset_id, shards)
        ranges = {} if names is None else read_column_ranges(data_set, shards, names)
    n_bytes = sum(
        sum(r.n_bytes for r in ranges[key]) if key in ranges else identity.n_bytes for key, identity in objects
    )
    warming = _Warming(absolute_url(url), storage_option, cache_dir, cache_size, objects, ranges, jobs, pin)
    facts: dict[str, Any] = {"url": shown, "objects": len(objects), "bytes": n_bytes}
    in_part = f" ({len(ranges):,} of them in part)" if ranges else ""
    text = f"{count(len(objects), 'object')}{in_part}, {format_bytes(n_bytes)}"
    if dry_run:
        found = warming.find_missing()
        n_missing = len(found.missing)
        facts |= {"fetched": n_missing, "bytes_fetched": found.missing_bytes, "fits": found.fits, "dry_run": True}
        short = "" if found.fits else "; the cache has not enough space for them"
        missing = f"{count(n_missing, 'object')}, {format_bytes(found.missing_bytes)}"
        output.summary(facts, f"would fetch {missing}{f', and pin {text}' if pin else ''}{short}")
        return
    is_pinned = "pinned in" if pin else "in"
    if engine == "ray":
        n_machines = n_fetched = bytes_fetched = 0
        with closing(call_in_ray(_Warming.run_on, [warming], on_each_machine=True)) as results:
            for host, report in results:
                n_machines, n_fetched = n_machines + 1, n_fetched + report.n_fetched
                bytes_fetched += report.bytes_fetched
                one = {"host": host, "fetched": report.n_fetched, "bytes_fetched": report.bytes_fetched}
                output.event("machine", one, f"{host}: {format_bytes(report.bytes_fetched)} fetched")
        facts |= {"fetched": n_fetched, "bytes_fetched": bytes_fetched, "machines": n_machines}
        fetched = f"{format_bytes(bytes_fetched)} fetched now"
        output.summary(facts, f"{text} are {is_pinned} the caches of {count(n_machines, 'machine')}, {fetched}")
        return
    with output.byte_progress("warming") as advance:
        report = warming.run(lambda p: advance(p.bytes_done, p.bytes_wanted))
    facts |= {"fetched": report.n_fetched, "bytes_fetched": report.bytes_fetched}
    fetched = f"{format_bytes(report.bytes_fetched)} of them fetched now"
    output.summary(facts, f"{text} are {is_pinned} the cache, {fetched}")


@dataclass(frozen=True, slots=True)
class _Warming:
    """Objects, or ranges of them, for the cache of this machine, or of another one. Picklable."""

    url: str
    storage_options: Sequence[str] | None
    cache_dir: str | None
    cache_size: str | None
    objects: Sequence[tuple[str, ShardIdentity]]
    ranges: Mapping[str, Sequence[ByteRange]]
    jobs: int
    pin: bool

    @contextmanager
    def _opened(self) -> Iterator[tuple[Cache, Store]]:
        with (
            Cache.default(path=self.cache_dir, size=self.cache_size) as cache,
            open_data_set_store(self.url, self.storage_options) as inner,
        ):
            yield cache, cache.store(inner)

    def find_missing(self) -> MissingCopies:
        with self._opened() as (cache, store):
            return cache.find_missing(store, self.objects, ranges=self.ranges)

    def run(self, on_progress: Callable[[WarmProgress], None] | None = None) -> WarmReport:
        jobs = self.jobs or config.available_cpus()
        with self._opened() as (cache, store):
            report = cache.warm(store, self.objects, ranges=self.ranges, jobs=jobs, on_progress=on_progress)
            if self.pin:
                cache.pin(store, self.objects)
            return report

    def run_on(self) -> tuple[str, WarmReport]:
        return socket.gethostname(), self.run()


# Footers are a few KiB, so the time to read them is round trips.
FOOTER_THREADS = 16


def read_column_ranges(
    data_set: OpenDataSet, shards: NDArray[np.int64], columns: Sequence[str]
) -> Mapping[str, tuple[ByteRange, ...]]:
    """Return the ranges of the columns, by shard name; shards of which nearly all bytes are needed are left out.

    Raises SchemaError, StoreError, CorruptShard.
    """
    schema = data_set.version.schema
    numbers = [schema.index(name) for name in schema.select(columns).names]
    infos = [data_set.shards.info(i) for i in shards.tolist()]
    ranges: dict[str, tuple[ByteRange, ...]] = {}
    with call_threads(FOOTER_THREADS, "tiercache-footer") as pool:
        footers = pool.map(lambda info: fetch_footer(data_set.store, info.name, info), infos)
        for info, footer in zip(infos, footers, strict=True):
            found = column_ranges(footer, info, numbers)
            if found is not None:
                ranges[info.name] = found
    return ranges


# -- simulate ----------------------------------------------------------------------------------------------------------

SIZES = ("10%", "25%", "50%", "75%", "100%")


@verb(after_ctrl_c="nothing was changed; run the same command again")
def simulate(
    output: Output,
    url: Annotated[str, argument("URL", "Data set that a training reads; only its list of shards is used.")],
    size: Annotated[
        list[str] | None,
        option("--size", "SIZE", "Cache size per node, e.g. 200GB, or 25% (of all data read). May be repeated."),
    ] = None,
    seed: Annotated[int, option("--seed", "N", "Seed of the training's shuffle, as in LoaderOptions(seed=N).")] = 0,
    epochs: Annotated[int, option("--epochs", "N", "Number of epochs to replay.", min=1)] = 5,
    ranks: Annotated[int, option("--ranks", "N", "Number of ranks of the training, on all nodes together.", min=1)] = 1,
    nodes: Annotated[int, option("--nodes", "N", "Number of machines; each has its own cache.", min=1)] = 1,
    placement: Placement = None,
    storage_option: StorageOptions = None,
) -> None:
    """Simulate caches of several sizes: hits and bytes.

    The read order of a training is replayed with each eviction policy. No record is read, only the list of shards.
    Requests are not predicted.
    """
    training = Training(seed, world_size=ranks, placement=parse_placement(placement))
    with open_data_set_store(url, storage_option) as store:
        data_set = open_data_set(store)
        url = store.url
    shards = data_set.shards
    reads = training_reads(shards.n_records, shards.n_bytes, training, nodes=nodes, epochs=epochs)
    data_bytes = int(shards.n_bytes[np.unique(np.concatenate([node.trace.names for node in reads]))].sum())
    sizes_bytes = sorted({parse_size("--size", one, whole_bytes=data_bytes) for one in size or SIZES})
    rows = [
        simulate_case(reads, policy, size_bytes) | {"share": size_bytes / max(data_bytes, 1)}
        for policy in POLICIES
        for size_bytes in sizes_bytes
    ]
    texts = [
        {
            "policy": row["policy"],
            "cache": format_bytes(row["size_bytes"]),
            "of data": f"{row['share']:.0%}",
            "hits": f"{row['byte_hit_ratio']:.1%}",
            "fetched per epoch": format_bytes(row["epoch_bytes"]),
        }
        for row in rows
    ]
    output.table("case", rows, texts)
    facts: dict[str, Any] = {
        "url": url,
        "version": data_set.version.number,
        "shards": len(shards),
        "seed": seed,
        "epochs": epochs,
        "ranks": ranks,
        "nodes": nodes,
        "placement": training.placement,
        "data_bytes": data_bytes,
        "cases": len(rows),
    }
    readers = f"{count(ranks, 'rank')} on {count(nodes, 'node')}"
    n_bytes = format_bytes(int(shards.n_bytes.sum()))
    text = f"{url}: {count(len(shards), 'shard')}, {n_bytes}, read by {readers} in {count(epochs, 'epoch')}"
    output.summary(facts, text)
