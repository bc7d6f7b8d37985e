"""The verb simulate: replays a training in caches of several sizes and policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tiercache.cache.eviction import POLICIES
from tiercache.cache.partial import REQUEST_BYTES
from tiercache.cache.simulate import Trace, bound
from tiercache.cache.simulate import simulate as simulate_cache
from tiercache.cli.common import Output, count, parse_size
from tiercache.cli.data import open_data_set, open_data_set_store
from tiercache.cli.selection import Training, epoch_reads
from tiercache.model import format_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray


class NodeReads(NamedTuple):
    """The reads of one node in order, and the epoch of each read."""

    trace: Trace
    epoch: NDArray[np.int64]


def training_reads(
    records: NDArray[np.int64], stored_bytes: NDArray[np.int64], training: Training, *, nodes: int = 1, epochs: int = 5
) -> list[NodeReads]:
    """Return the reads of each node: a shard once per epoch for each local rank that reads it, by the ranks' clocks.

    Args:
        records: Records of each shard, int64[n_shards].
        stored_bytes: Bytes of each shard, int64[n_shards].
        training: Training that reads; its ranks and its epoch are ignored.
        nodes: Number of machines, each with its own cache; the ranks fill one node after the other.
        epochs: Number of epochs, counted from epoch 0.

    Raises:
        ValueError: The number of ranks is not a multiple of the number of nodes, or a number is less than 1.
    """
    if nodes < 1 or epochs < 1:
        raise ValueError(f"--nodes and --epochs must be 1 or more, got {nodes} and {epochs}")
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


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """The result of one policy and one cache size per node, for all nodes together.

    Figures per epoch are averages over the epochs after the first, or those of the only epoch.

    Attributes:
        policy: Name in POLICIES, or "bound": the least that any cache can fetch.
        size_bytes: Size of each node's cache.
        hit_ratio: Fraction of an epoch's reads that are hits.
        byte_hit_ratio: Fraction of an epoch's bytes that are hits.
        first_bytes: Bytes fetched in the first epoch.
        epoch_bytes: Bytes fetched per epoch.
        epoch_requests: Requests per epoch, of at most REQUEST_BYTES each.
    """

    policy: str
    size_bytes: int
    hit_ratio: float
    byte_hit_ratio: float
    first_bytes: int
    epoch_bytes: float
    epoch_requests: float


def simulate_case(nodes: Sequence[NodeReads], policy: str, size_bytes: int) -> SimulationResult:
    """Replay every node's reads with one policy and one cache size. Raises ValueError for an unknown policy."""
    totals = np.zeros(6)
    for trace, epoch in nodes:
        report = bound(trace, size_bytes) if policy == "bound" else simulate_cache(trace, policy, size_bytes)
        fetched = trace.n_bytes - report.served
        n_epochs = int(epoch.max(initial=0)) + 1
        counted = epoch > 0 if n_epochs > 1 else np.ones(len(trace), np.bool_)
        epoch_bytes, read_bytes = fetched[counted].sum(), trace.n_bytes[counted].sum()
        requests = (-(-fetched[counted] // REQUEST_BYTES)).sum()
        sums = np.array([(fetched[counted] == 0).sum(), counted.sum(), epoch_bytes, read_bytes, requests])
        totals += [*(sums / max(n_epochs - 1, 1)), fetched[epoch == 0].sum()]
    n_hits, n_reads, epoch_bytes, read_bytes, requests, first_bytes = totals.tolist()
    return SimulationResult(
        policy,
        size_bytes,
        hit_ratio=n_hits / max(n_reads, 1),
        byte_hit_ratio=1 - epoch_bytes / read_bytes if read_bytes else 0.0,
        first_bytes=int(first_bytes),
        epoch_bytes=epoch_bytes,
        epoch_requests=requests,
    )


SIZES = ("10%", "25%", "50%", "75%", "100%")


@dataclass(frozen=True, slots=True)
class TrainingReplay:
    """A training to replay, see training_reads(), and the data set; at: its version number, None: the newest."""

    url: str
    at: int | None
    storage_options: Sequence[str] | None
    training: Training
    nodes: int
    epochs: int


def simulate(
    output: Output, replay: TrainingReplay, policies: Sequence[str] | None, sizes: Sequence[str] | None
) -> None:
    """Replay a training in caches of several sizes and print a row for each.

    Args:
        output: Output of the verb.
        replay: Training.
        policies: Names of eviction policies; None: all, and the bound.
        sizes: Cache sizes per node, e.g. "200GB" or "25%"; None: SIZES.
    """
    unknown = [name for name in policies or () if name not in (*POLICIES, "bound")]
    if unknown:
        raise ValueError(f"--policy must be one of {', '.join(POLICIES)} or bound, got {unknown[0]!r}")
    with open_data_set_store(replay.url, replay.storage_options) as store:
        data_set = open_data_set(store, replay.at)
        url = store.url
    shards, training = data_set.shards, replay.training
    nodes = training_reads(shards.n_records, shards.n_bytes, training, nodes=replay.nodes, epochs=replay.epochs)
    read = np.unique(np.concatenate([node.trace.names for node in nodes]))
    data_bytes = int(shards.n_bytes[read].sum())
    sizes_bytes = sorted({parse_size("--size", size, whole_bytes=data_bytes) for size in sizes or SIZES})
    names = list(dict.fromkeys(policies)) if policies else [*POLICIES, "bound"]
    cases = [(name, size_bytes) for name in names for size_bytes in sizes_bytes]
    results: list[SimulationResult] = []
    with output.count_progress("replaying") as advance:
        for policy, size_bytes in cases:
            results.append(simulate_case(nodes, policy, size_bytes))
            advance(len(results), len(cases))
    rows = [asdict(result) | {"share": result.size_bytes / max(data_bytes, 1)} for result in results]
    texts = [
        {
            "policy": result.policy,
            "cache": format_bytes(result.size_bytes),
            "of data": f"{result.size_bytes / max(data_bytes, 1):.0%}",
            "hits": f"{result.byte_hit_ratio:.1%}",
            "fetched per epoch": format_bytes(result.epoch_bytes),
            "requests": f"{result.epoch_requests:,.0f}",
        }
        for result in results
    ]
    output.table("case", rows, texts)
    facts: dict[str, Any] = {
        "url": url,
        "version": data_set.version.number,
        "shards": len(shards),
        "accesses": sum(len(node.trace) for node in nodes),
        "seed": training.seed,
        "epochs": replay.epochs,
        "ranks": training.world_size,
        "nodes": replay.nodes,
        "placement": training.placement,
        "data_bytes": data_bytes,
        "cases": len(results),
    }
    readers = f"{count(training.world_size, 'rank')} on {count(replay.nodes, 'node')}"
    size = f"{count(len(shards), 'shard')}, {format_bytes(int(shards.n_bytes.sum()))}"
    output.summary(facts, f"{url}: {size}, read by {readers} in {count(replay.epochs, 'epoch')}")
