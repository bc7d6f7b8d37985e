"""The verb simulate: replays a training or a trace in caches of several sizes and policies, as a table or a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache.cache.evict.policy import POLICIES
from tiercache.cache.fetch.units import PIECE_BYTES
from tiercache.cache.simulate import Trace, bound, read_trace
from tiercache.cache.simulate import simulate as simulate_cache
from tiercache.cli.data_sets import open_data_set, open_data_set_store
from tiercache.cli.options import parse_rate, parse_size
from tiercache.cli.output import Output, count
from tiercache.cli.selection import Training, epoch_reads
from tiercache.errors import TierCacheError
from tiercache.model import format_bytes
from tiercache.prices import GB

if TYPE_CHECKING:
    from types import ModuleType

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
    report = bound(trace, size_bytes) if policy == "bound" else simulate_cache(trace, policy, size_bytes)
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


FORMATS = (".svg", ".png", ".pdf")
# Colours of the Okabe-Ito palette, which colour-blind readers can distinguish, and markers for greyscale prints.
_LOOKS: dict[str, dict[str, Any]] = {
    "plan": {"color": "#0072B2", "marker": "o"},
    "resident": {"color": "#D55E00", "marker": "s"},
    "s3fifo": {"color": "#009E73", "marker": "^"},
    "lru": {"color": "#CC79A7", "marker": "D"},
    "bound": {"color": "0.25", "linestyle": "--", "zorder": 3},
}


@dataclass(frozen=True, slots=True)
class PlotLine:
    """Results of one policy; the sequences have one element per cache size, sizes ascending.

    Attributes:
        policy: Name of the policy.
        sizes_bytes: Cache sizes.
        hit_ratios: Hit ratios, 0 to 1.
        bytes_per_epoch: Bytes fetched per epoch.
    """

    policy: str
    sizes_bytes: Sequence[int]
    hit_ratios: Sequence[float]
    bytes_per_epoch: Sequence[float]


def load_matplotlib() -> ModuleType:
    """Return the module matplotlib.figure. Raises TierCacheError if it is not installed."""
    try:
        return import_module("matplotlib.figure")
    except ImportError as error:
        raise TierCacheError(
            f"--plot draws with matplotlib, which cannot be imported ({error}): pip install 'tiercache[plot]'"
        ) from error


def check_plot(path: Path | None) -> None:
    """Check that a plot can be drawn, before anything is computed for it.

    Raises:
        ValueError: The file type is not supported, or the folder does not exist.
        TierCacheError: matplotlib is not installed.
    """
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--plot takes a file name that ends in {', '.join(FORMATS)}, got {str(path)!r}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot: the folder {path.absolute().parent} does not exist")
    load_matplotlib()


def draw(path: Path, lines: Sequence[PlotLine], *, data_bytes: int, title: str) -> None:
    """Write a plot of the bytes fetched per epoch and of the hit ratio, over cache size.

    Args:
        path: File to write; its suffix selects the format.
        lines: Results, one per policy.
        data_bytes: Bytes of all data that is read; drawn as a dotted line.
        title: Title of the plot.

    Raises:
        ValueError, TierCacheError: See check_plot().
        OSError: The file cannot be written.
    """
    figure = load_matplotlib().Figure(figsize=(9.0, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    fetched, hits = figure.subplots(1, 2)
    most = max((line.sizes_bytes[-1] for line in lines if line.sizes_bytes), default=data_bytes)
    unit, name = _unit(max(most, 1))
    for line in lines:
        sizes = [size / unit for size in line.sizes_bytes]
        look = {"label": line.policy, "markersize": 4} | _LOOKS.get(line.policy, {"marker": "x"})
        fetched.plot(sizes, [n / unit for n in line.bytes_per_epoch], **look)
        hits.plot(sizes, [100 * ratio for ratio in line.hit_ratios], **look)
    _label(fetched, f"fetched per epoch, {name}", name)
    _label(hits, "hit ratio, %", name)
    hits.set_ylim(-2, 102)
    for axes in (fetched, hits):
        axes.axvline(data_bytes / unit, color="0.6", linestyle=":", linewidth=1)
    fetched.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _label(axes: Any, y: str, unit: str) -> None:
    axes.set_xlabel(f"cache size per node, {unit}")
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _unit(n_bytes: int) -> tuple[int, str]:
    """Return the bytes and the name of the unit in which format_bytes() formats a size."""
    name = format_bytes(n_bytes).split()[1]
    return 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(name), name


SIZES = ("10%", "25%", "50%", "75%", "100%")


@dataclass(frozen=True, slots=True)
class TrainingReplay:
    """A training to replay.

    Attributes:
        url: URL of the data set that it reads.
        at: Version number; None: the newest.
        storage_options: KEY=VALUE options of the data set's store.
        training: Training; its ranks and its epoch are ignored.
        cluster: Nodes and epochs.
    """

    url: str
    at: int | None
    storage_options: Sequence[str] | None
    training: Training
    cluster: Cluster


@dataclass(frozen=True, slots=True)
class _Replay:
    """The reads to replay.

    Attributes:
        accesses: Reads of each node.
        facts: Summary of the reads, for JSON.
        text: Summary of the reads, for people.
        is_training: Whether the reads have epochs, unlike those of a recorded trace.
    """

    accesses: Sequence[NodeReads]
    facts: dict[str, Any]
    text: str
    is_training: bool


def simulate(
    output: Output,
    replay: TrainingReplay | Path,
    policies: Sequence[str] | None,
    sizes: Sequence[str] | None,
    costs: SimulationCosts,
    plot: Path | None,
) -> None:
    """Replay reads in caches of several sizes and print a row for each.

    Args:
        output: Output of the verb.
        replay: Training, or the file of a recorded trace.
        policies: Names of eviction policies; None: all.
        sizes: Cache sizes per node, e.g. "200GB" or "25%"; None: SIZES.
        costs: Prices and bandwidths.
        plot: File to draw to; None: no plot.
    """
    policies = _policies(policies)
    check_plot(plot)
    scene = _trace_replay(replay) if isinstance(replay, Path) else _training_replay(replay)
    data_bytes = distinct_bytes(scene.accesses)
    sizes_bytes = sorted({parse_size("--size", text, whole_bytes=data_bytes) for text in sizes or SIZES})
    asked = [(name, size_bytes) for name in policies for size_bytes in sizes_bytes]
    cases: list[SimulationResult] = []
    with output.count_progress("replaying") as advance:
        for policy, size_bytes in asked:
            cases.append(simulate_case(scene.accesses, policy, size_bytes, costs))
            advance(len(cases), len(asked))
    _print(output, cases, data_bytes, scene)
    facts = scene.facts | {"data_bytes": data_bytes, "cases": len(cases), "plot": None if plot is None else str(plot)}
    if plot is not None:
        draw(plot, _lines(cases), data_bytes=data_bytes, title=scene.text)
    output.summary(facts, scene.text + ("" if plot is None else f"; drawn in {plot}"))


def parse_costs(egress: float, request: float, rate: str | None, train_rate: str | None) -> SimulationCosts:
    """Return the prices and bandwidths that the options name. Raises ValueError."""
    if min(egress, request) < 0 or not math.isfinite(egress + request):
        raise ValueError(f"--egress and --request must be dollars, 0 or more, got {egress} and {request}")
    fetch = None if rate is None else parse_rate("--rate", rate)
    read = None if train_rate is None else parse_rate("--train-rate", train_rate)
    return SimulationCosts(FetchPrices(egress, request), Bandwidths(fetch, read))


def _policies(names: Sequence[str] | None) -> list[str]:
    """Return the policies without duplicates; None: all policies, then the bound."""
    unknown = [name for name in names or () if name not in (*POLICIES, "bound")]
    if unknown:
        raise ValueError(f"--policy must be one of {', '.join(POLICIES)} or bound, got {unknown[0]!r}")
    return list(dict.fromkeys(names)) if names else [*POLICIES, "bound"]


def _trace_replay(path: Path) -> _Replay:
    trace = read_trace(path)
    access = trace_reads(trace)
    facts = {"trace": str(path), "accesses": len(trace)}
    n_bytes = distinct_bytes([access])
    return _Replay([access], facts, f"{count(len(trace), 'open')} of {format_bytes(n_bytes)}, from {path}", False)


def _training_replay(replay: TrainingReplay) -> _Replay:
    with open_data_set_store(replay.url, replay.storage_options) as store:
        data_set = open_data_set(store, replay.at)
        shown = store.url
    shards, training, cluster = data_set.shards, replay.training, replay.cluster
    accesses = training_reads(shards.n_records, shards.n_bytes, training, cluster)
    facts = {
        "url": shown,
        "version": data_set.version.number,
        "shards": len(shards),
        "accesses": sum(len(access.trace) for access in accesses),
        "seed": training.seed,
        "epochs": cluster.epochs,
        "ranks": training.world_size,
        "nodes": cluster.nodes,
        "placement": training.placement,
    }
    who = f"{count(training.world_size, 'rank')} on {count(cluster.nodes, 'node')}"
    size = f"{count(len(shards), 'shard')}, {format_bytes(int(shards.n_bytes.sum()))}"
    return _Replay(accesses, facts, f"{shown}: {size}, read by {who} in {count(cluster.epochs, 'epoch')}", True)


def _print(output: Output, cases: Sequence[SimulationResult], data_bytes: int, scene: _Replay) -> None:
    rows = [asdict(case) | {"share": case.size_bytes / max(data_bytes, 1)} for case in cases]
    has_dollars, has_times = any(case.dollars for case in cases), any(case.epoch_s is not None for case in cases)
    fetched = "fetched per epoch" if scene.is_training else "fetched"
    texts = []
    for case, row in zip(cases, rows, strict=True):
        text = {
            "policy": case.policy,
            "cache": format_bytes(case.size_bytes),
            "of data": f"{row['share']:.0%}",
            "hits": f"{case.byte_hit_ratio:.1%}",
            fetched: format_bytes(case.epoch_bytes),
        }
        if has_dollars:
            text["dollars"] = f"{case.dollars:,.2f}"
        if has_times:
            text["time"] = "" if case.epoch_s is None else _time_text(case.epoch_s)
        texts.append(text)
    output.table("case", rows, texts)


def _time_text(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _lines(cases: Sequence[SimulationResult]) -> list[PlotLine]:
    found = []
    for policy in dict.fromkeys(case.policy for case in cases):
        mine = [case for case in cases if case.policy == policy]
        found.append(
            PlotLine(
                policy,
                [case.size_bytes for case in mine],
                [case.byte_hit_ratio for case in mine],
                [case.epoch_bytes for case in mine],
            )
        )
    return found
