"""What a cache would do for a training or for a recorded trace: traces made, replayed, counted. Pure."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from tiercache.cache.replay import Trace, bound, replay
from tiercache.cache.units import PIECE_BYTES
from tiercache.cli.training import Training, epoch_reads
from tiercache.prices import GB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Prices:
    """What fetching costs. egress: dollars a GB of 2^30 bytes; request: dollars for 1,000 requests."""

    egress: float = 0.0
    request: float = 0.0

    def dollars(self, n_bytes: float, n_requests: float) -> float:
        """Of so many bytes and requests."""
        return n_bytes / GB * self.egress + n_requests / 1000 * self.request


@dataclass(frozen=True, slots=True)
class Speeds:
    """Bytes a second of one node, None: not known. fetch: what the store gives it; read: what its training reads."""

    fetch: float | None = None
    read: float | None = None

    def epoch_s(self, fetched_bytes: float, read_bytes: float) -> float | None:
        """How long a node's epoch takes: fetching and training go on side by side, and the slower one holds it up."""
        pairs = ((fetched_bytes, self.fetch), (read_bytes, self.read))
        times = [n_bytes / rate for n_bytes, rate in pairs if rate is not None]
        return max(times) if times else None


@dataclass(frozen=True, slots=True)
class Cluster:
    """Who reads. nodes: machines with a cache each, on which ranks stand node by node; epochs: from 0 on."""

    nodes: int = 1
    epochs: int = 5

    def __post_init__(self) -> None:
        """Check the values. Raises ValueError."""
        if self.nodes < 1 or self.epochs < 1:
            raise ValueError(f"--nodes and --epochs are 1 or more, got {self.nodes} and {self.epochs}")


@dataclass(frozen=True, slots=True, eq=False)
class Access:
    """One node's accesses in order, and the epoch of each; epoch 0 for all of a recorded trace."""

    trace: Trace
    epoch: NDArray[np.int64]


def training_accesses(
    records: NDArray[np.int64], stored_bytes: NDArray[np.int64], training: Training, cluster: Cluster
) -> list[Access]:
    """What each node reads in some epochs: a shard once for each of its ranks that reads it, in order of their clocks.

    Args:
        records, stored_bytes: of each shard, int64[n_shards].
        training: its ranks and its epoch do not count.
        cluster: see there.

    Raises:
        ValueError: the nodes do not share the ranks evenly.
    """
    world_size = training.world_size
    if world_size % cluster.nodes:
        raise ValueError(f"{world_size} ranks cannot be shared evenly by {cluster.nodes} nodes")
    n_local = world_size // cluster.nodes
    epochs = [
        epoch_reads(records, stored_bytes, replace(training, epoch=epoch, ranks=tuple(range(world_size))))
        for epoch in range(cluster.epochs)
    ]
    accesses = []
    for node in range(cluster.nodes):
        began = dict.fromkeys(range(node * n_local, (node + 1) * n_local), 0)  # each rank's clock when an epoch begins
        rows: list[NDArray[np.int64]] = []
        for epoch, reads in enumerate(epochs):
            mine = [(rank, reads[rank]) for rank in began]
            found = [_rows(rank, began[rank], each.shards, each.clock, epoch) for rank, each in mine]
            joined = np.concatenate(found, axis=1)
            rows.append(joined[:, np.argsort(joined[2] - joined[3], kind="stable")])
            for rank, each in mine:
                began[rank] += int(stored_bytes[each.shards].sum())
        shards, job, clock, _, epoch_of = np.concatenate(rows, axis=1)
        accesses.append(Access(Trace(shards, stored_bytes[shards], job, clock), epoch_of))
    return accesses


def _rows(rank: int, began: int, shards: NDArray[np.int64], clock: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
    """Rows of shard, job, clock, the clock at the epoch's begin, and epoch: int64[5, m]."""
    m = len(shards)
    return np.stack([shards, np.full(m, rank), began + clock, np.full(m, began), np.full(m, epoch)])


@dataclass(frozen=True, slots=True)
class Case:
    """A policy and a cache's size on each node, and what came of it, all nodes together.

    What is said of an epoch is said of one after the first, on average; where there is one only, of that.

    Attributes:
        policy: a name of POLICIES, or "bound": the least that any cache can fetch.
        hit_ratio: of an epoch's accesses; byte_hit_ratio: of its bytes.
        first_bytes, epoch_bytes: fetched in the first epoch, and in an epoch.
        epoch_requests: of at most PIECE_BYTES each.
        dollars: of an epoch.
        epoch_s: its length, that of the slowest node; None where no speed is known.
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
class Question:
    """What is asked of every case."""

    prices: Prices = field(default_factory=Prices)
    speeds: Speeds = field(default_factory=Speeds)


def run_case(accesses: Sequence[Access], policy: str, size_bytes: int, question: Question) -> Case:
    """Replay every node's accesses with one policy and size. Raises ValueError for an unknown policy."""
    nodes = [_counted(access, policy, size_bytes) for access in accesses]
    total = _Counts(*(sum(column) for column in zip(*map(astuple, nodes), strict=True)))
    times = [question.speeds.epoch_s(node.epoch_bytes, node.read_bytes) for node in nodes]
    return Case(
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
    """Of one node's epoch after the first, but for first_bytes."""

    hits: float
    accesses: float
    first_bytes: float
    epoch_bytes: float
    read_bytes: float
    requests: float


def _counted(access: Access, policy: str, size_bytes: int) -> _Counts:
    trace = access.trace
    report = bound(trace, size_bytes) if policy == "bound" else replay(trace, policy, size_bytes)
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


def recorded(trace: Trace) -> Access:
    """A recorded trace, as one epoch of one node."""
    return Access(trace, np.zeros(len(trace), np.int64))


def distinct_bytes(accesses: Sequence[Access]) -> int:
    """Bytes of all objects that are read, each once."""
    names = np.concatenate([access.trace.names for access in accesses])
    n_bytes = np.concatenate([access.trace.n_bytes for access in accesses])
    return int(n_bytes[np.unique(names, return_index=True)[1]].sum())
