"""Simulation of caches for a training or a recorded trace: pure functions that build, replay and count reads."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from tiercache.cache.fetch.units import PIECE_BYTES
from tiercache.cache.simulate import Trace, bound, simulate
from tiercache.cli.training import Training, epoch_reads
from tiercache.prices import GB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class FetchPrices:
    """Prices of reading from the store.

    Attributes:
        egress: Dollars per GB of 2^30 bytes.
        request: Dollars per 1,000 requests.
    """

    egress: float = 0.0
    request: float = 0.0

    def dollars(self, n_bytes: float, n_requests: float) -> float:
        """Return the dollars for these bytes and requests."""
        return n_bytes / GB * self.egress + n_requests / 1000 * self.request


@dataclass(frozen=True, slots=True)
class Bandwidths:
    """Bandwidths of one node in bytes per second; None: unknown.

    Attributes:
        fetch: Bandwidth from the store to the node.
        read: Rate at which the node's training reads.
    """

    fetch: float | None = None
    read: float | None = None

    def epoch_s(self, fetched_bytes: float, read_bytes: float) -> float | None:
        """Return the seconds of a node's epoch: fetching and training overlap, so the slower one determines it."""
        pairs = ((fetched_bytes, self.fetch), (read_bytes, self.read))
        times = [n_bytes / rate for n_bytes, rate in pairs if rate is not None]
        return max(times) if times else None


@dataclass(frozen=True, slots=True)
class Cluster:
    """The machines that read.

    Attributes:
        nodes: Number of machines, each with its own cache; the ranks fill one node after the other.
        epochs: Number of epochs, counted from epoch 0.
    """

    nodes: int = 1
    epochs: int = 5

    def __post_init__(self) -> None:
        """Check the values. Raises ValueError."""
        if self.nodes < 1 or self.epochs < 1:
            raise ValueError(f"--nodes and --epochs must be 1 or more, got {self.nodes} and {self.epochs}")


@dataclass(frozen=True, slots=True, eq=False)
class NodeReads:
    """The reads of one node in order, and the epoch of each read; epoch 0 for all reads of a recorded trace."""

    trace: Trace
    epoch: NDArray[np.int64]


def training_reads(
    records: NDArray[np.int64], stored_bytes: NDArray[np.int64], training: Training, cluster: Cluster
) -> list[NodeReads]:
    """Return the reads of each node: a shard once per epoch for each local rank that reads it, by the ranks' clocks.

    Args:
        records: Records of each shard, int64[n_shards].
        stored_bytes: Bytes of each shard, int64[n_shards].
        training: Training that reads; its ranks and its epoch are ignored.
        cluster: Nodes and epochs.

    Raises:
        ValueError: The number of ranks is not a multiple of the number of nodes.
    """
    world_size = training.world_size
    if world_size % cluster.nodes:
        raise ValueError(f"{world_size} ranks cannot be divided evenly among {cluster.nodes} nodes")
    n_local = world_size // cluster.nodes
    epochs = [
        epoch_reads(records, stored_bytes, replace(training, epoch=epoch, ranks=tuple(range(world_size))))
        for epoch in range(cluster.epochs)
    ]
    accesses = []
    for node in range(cluster.nodes):
        began = dict.fromkeys(
            range(node * n_local, (node + 1) * n_local), 0
        )  # each rank's clock at the start of the epoch
        rows: list[NDArray[np.int64]] = []
        for epoch, reads in enumerate(epochs):
            mine = [(rank, reads[rank]) for rank in began]
            found = [_rows(rank, began[rank], each.shards, each.clock, epoch) for rank, each in mine]
            joined = np.concatenate(found, axis=1)
            rows.append(joined[:, np.argsort(joined[2] - joined[3], kind="stable")])
            for rank, each in mine:
                began[rank] += int(stored_bytes[each.shards].sum())
        shards, job, clock, _, epoch_of = np.concatenate(rows, axis=1)
        accesses.append(NodeReads(Trace(shards, stored_bytes[shards], job, clock), epoch_of))
    return accesses


def _rows(rank: int, began: int, shards: NDArray[np.int64], clock: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
    """Return rows of shard, job, clock, clock at the start of the epoch, and epoch: int64[5, m]."""
    m = len(shards)
    return np.stack([shards, np.full(m, rank), began + clock, np.full(m, began), np.full(m, epoch)])


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
        epoch_requests: Requests per epoch, of at most PIECE_BYTES each.
        dollars: Price of an epoch.
        epoch_s: Seconds of an epoch on the slowest node; None if no bandwidth is known.
    """

    policy: str
    size_bytes: int
    hit_ratio: float
    byte_hit_ratio: float
    first_bytes: int
    epoch_bytes: float
    epoch_requests: float
    dollars: float
    epoch_s: float | None


@dataclass(frozen=True, slots=True)
class SimulationCosts:
    """Prices and bandwidths that all cases share."""

    prices: FetchPrices = field(default_factory=FetchPrices)
    speeds: Bandwidths = field(default_factory=Bandwidths)


def simulate_case(
    accesses: Sequence[NodeReads], policy: str, size_bytes: int, question: SimulationCosts
) -> SimulationResult:
    """Replay every node's reads with one policy and one cache size. Raises ValueError for an unknown policy."""
    nodes = [_counted(access, policy, size_bytes) for access in accesses]
    total = _Counts(*(sum(column) for column in zip(*map(astuple, nodes), strict=True)))
    times = [question.speeds.epoch_s(node.epoch_bytes, node.read_bytes) for node in nodes]
    return SimulationResult(
        policy,
        size_bytes,
        hit_ratio=total.hits / max(total.accesses, 1),
        byte_hit_ratio=1 - total.epoch_bytes / total.read_bytes if total.read_bytes else 0.0,
        first_bytes=int(total.first_bytes),
        epoch_bytes=total.epoch_bytes,
        epoch_requests=total.requests,
        dollars=question.prices.dollars(total.epoch_bytes, total.requests),
        epoch_s=max((time_s for time_s in times if time_s is not None), default=None),
    )


@dataclass(frozen=True, slots=True)
class _Counts:
    """Averages of one node over the epochs after the first; first_bytes is of the first epoch."""

    hits: float
    accesses: float
    first_bytes: float
    epoch_bytes: float
    read_bytes: float
    requests: float


def _counted(access: NodeReads, policy: str, size_bytes: int) -> _Counts:
    trace = access.trace
    report = bound(trace, size_bytes) if policy == "bound" else simulate(trace, policy, size_bytes)
    fetched = trace.n_bytes - report.served
    n_epochs = int(access.epoch.max(initial=0)) + 1
    chosen = access.epoch > 0 if n_epochs > 1 else np.ones(len(trace), np.bool_)
    share = 1 / max(n_epochs - 1, 1)
    return _Counts(
        hits=int((fetched[chosen] == 0).sum()) * share,
        accesses=int(chosen.sum()) * share,
        first_bytes=int(fetched[access.epoch == 0].sum()),
        epoch_bytes=int(fetched[chosen].sum()) * share,
        read_bytes=int(trace.n_bytes[chosen].sum()) * share,
        requests=int((-(-fetched[chosen] // PIECE_BYTES)).sum()) * share,
    )


def trace_reads(trace: Trace) -> NodeReads:
    """Return a recorded trace as one epoch of one node."""
    return NodeReads(trace, np.zeros(len(trace), np.int64))


def distinct_bytes(accesses: Sequence[NodeReads]) -> int:
    """Return the bytes of all objects that are read, each object counted once."""
    names = np.concatenate([access.trace.names for access in accesses])
    n_bytes = np.concatenate([access.trace.n_bytes for access in accesses])
    return int(n_bytes[np.unique(names, return_index=True)[1]].sum())
