"""The verb simulate: replays a training or a trace in caches of several sizes and policies, as a table or a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tiercache.cache.partial import REQUEST_BYTES
from tiercache.cache.policy import POLICIES
from tiercache.cache.simulate import Trace, bound, read_trace
from tiercache.cache.simulate import simulate as simulate_cache
from tiercache.cli.common import Output, count, errors_name, parse_size
from tiercache.cli.data import open_data_set, open_data_set_store
from tiercache.cli.selection import Training, epoch_reads
from tiercache.distribution import install_command
from tiercache.errors import TierCacheError
from tiercache.model import format_bytes, parse_bytes
from tiercache.prices import GB

if TYPE_CHECKING:
    from types import ModuleType

    from numpy.typing import NDArray


class NodeReads(NamedTuple):
    """The reads of one node in order, and the epoch of each read; epoch 0 for all reads of a recorded trace."""

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
    """Prices and bandwidths that all cases share.

    Attributes:
        egress: Dollars per GB of 2^30 bytes.
        request: Dollars per 1,000 requests.
        fetch_rate: Bytes per second from the store to a node; None: unknown.
        read_rate: Bytes per second that the training of a node reads; None: unknown.
    """

    egress: float = 0.0
    request: float = 0.0
    fetch_rate: float | None = None
    read_rate: float | None = None

    def epoch_s(self, fetched_bytes: float, read_bytes: float) -> float | None:
        """Return the seconds of a node's epoch: fetching and training overlap, so the slower one determines it."""
        pairs = ((fetched_bytes, self.fetch_rate), (read_bytes, self.read_rate))
        return max((n_bytes / rate for n_bytes, rate in pairs if rate is not None), default=None)


def simulate_case(nodes: Sequence[NodeReads], policy: str, size_bytes: int, costs: SimulationCosts) -> SimulationResult:
    """Replay every node's reads with one policy and one cache size. Raises ValueError for an unknown policy."""
    totals, times = np.zeros(6), []
    for trace, epoch in nodes:
        report = bound(trace, size_bytes) if policy == "bound" else simulate_cache(trace, policy, size_bytes)
        fetched = trace.n_bytes - report.served
        n_epochs = int(epoch.max(initial=0)) + 1
        counted = epoch > 0 if n_epochs > 1 else np.ones(len(trace), np.bool_)
        epoch_bytes, read_bytes = fetched[counted].sum(), trace.n_bytes[counted].sum()
        requests = (-(-fetched[counted] // REQUEST_BYTES)).sum()
        sums = np.array([(fetched[counted] == 0).sum(), counted.sum(), epoch_bytes, read_bytes, requests])
        averages = sums / max(n_epochs - 1, 1)
        totals += [*averages, fetched[epoch == 0].sum()]
        times.append(costs.epoch_s(float(averages[2]), float(averages[3])))
    n_hits, n_reads, epoch_bytes, read_bytes, requests, first_bytes = totals.tolist()
    return SimulationResult(
        policy,
        size_bytes,
        hit_ratio=n_hits / max(n_reads, 1),
        byte_hit_ratio=1 - epoch_bytes / read_bytes if read_bytes else 0.0,
        first_bytes=int(first_bytes),
        epoch_bytes=epoch_bytes,
        epoch_requests=requests,
        dollars=epoch_bytes / GB * costs.egress + requests / 1000 * costs.request,
        epoch_s=max((time_s for time_s in times if time_s is not None), default=None),
    )


def distinct_bytes(nodes: Sequence[NodeReads]) -> int:
    """Return the bytes of all objects that are read, each object counted once."""
    names = np.concatenate([node.trace.names for node in nodes])
    n_bytes = np.concatenate([node.trace.n_bytes for node in nodes])
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


def load_matplotlib() -> ModuleType:
    """Return the module matplotlib.figure. Raises TierCacheError if it is not installed."""
    try:
        return import_module("matplotlib.figure")
    except ImportError as error:
        raise TierCacheError(
            f"--plot draws with matplotlib, which cannot be imported ({error}): {install_command('plot')}"
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


def draw(path: Path, results: Sequence[SimulationResult], *, data_bytes: int, title: str) -> None:
    """Write a plot of the bytes fetched per epoch and of the hit ratio, over cache size, with a line for each policy.

    A dotted line shows data_bytes, the bytes of all data that is read. Raises OSError if the file cannot be written.
    """
    figure = load_matplotlib().Figure(figsize=(9.0, 3.8), layout="constrained")
    figure.suptitle(title, fontsize=11)
    fetched, hits = figure.subplots(1, 2)
    most_bytes = max(1, *(result.size_bytes for result in results)) if results else max(data_bytes, 1)
    unit_name = format_bytes(most_bytes).split()[1]
    unit = 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(unit_name)
    for policy in dict.fromkeys(result.policy for result in results):
        mine = [result for result in results if result.policy == policy]
        sizes = [result.size_bytes / unit for result in mine]
        look = {"label": policy, "markersize": 4} | _LOOKS.get(policy, {"marker": "x"})
        fetched.plot(sizes, [result.epoch_bytes / unit for result in mine], **look)
        hits.plot(sizes, [100 * result.byte_hit_ratio for result in mine], **look)
    for axes, label in ((fetched, f"fetched per epoch, {unit_name}"), (hits, "hit ratio, %")):
        axes.set_xlabel(f"cache size per node, {unit_name}")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.axvline(data_bytes / unit, color="0.6", linestyle=":", linewidth=1)
    hits.set_ylim(-2, 102)
    fetched.legend(frameon=False)
    figure.savefig(path, dpi=150)


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
    if isinstance(replay, Path):
        trace = read_trace(replay)
        nodes = [NodeReads(trace, np.zeros(len(trace), np.int64))]
        facts: dict[str, Any] = {"trace": str(replay), "accesses": len(trace)}
        text = f"{count(len(trace), 'open')} of {format_bytes(distinct_bytes(nodes))}, from {replay}"
    else:
        nodes, facts, text = _replay_training(replay)
    data_bytes = distinct_bytes(nodes)
    sizes_bytes = sorted({parse_size("--size", size, whole_bytes=data_bytes) for size in sizes or SIZES})
    cases = [(name, size_bytes) for name in policies for size_bytes in sizes_bytes]
    results: list[SimulationResult] = []
    with output.count_progress("replaying") as advance:
        for policy, size_bytes in cases:
            results.append(simulate_case(nodes, policy, size_bytes, costs))
            advance(len(results), len(cases))
    _print(output, results, data_bytes, "fetched" if isinstance(replay, Path) else "fetched per epoch")
    if plot is not None:
        draw(plot, results, data_bytes=data_bytes, title=text)
    facts |= {"data_bytes": data_bytes, "cases": len(results), "plot": None if plot is None else str(plot)}
    output.summary(facts, text + ("" if plot is None else f"; drawn in {plot}"))


def parse_costs(egress: float, request: float, rate: str | None, train_rate: str | None) -> SimulationCosts:
    """Return the prices and bandwidths that the options name. Raises ValueError."""
    if min(egress, request) < 0 or not math.isfinite(egress + request):
        raise ValueError(f"--egress and --request must be dollars, 0 or more, got {egress} and {request}")
    fetch = None if rate is None else parse_rate("--rate", rate)
    read = None if train_rate is None else parse_rate("--train-rate", train_rate)
    return SimulationCosts(egress, request, fetch, read)


def parse_rate(option: str, text: str) -> int:
    """Return the bytes per second that "200MB/s" or "200MB" names."""
    with errors_name(option):
        rate = parse_bytes(text.strip().removesuffix("/s"))
    if rate < 1:
        raise ValueError(f"{option} must be at least 1 byte per second, got {text!r}")
    return rate


def _policies(names: Sequence[str] | None) -> list[str]:
    """Return the policies without duplicates; None: all policies, then the bound."""
    unknown = [name for name in names or () if name not in (*POLICIES, "bound")]
    if unknown:
        raise ValueError(f"--policy must be one of {', '.join(POLICIES)} or bound, got {unknown[0]!r}")
    return list(dict.fromkeys(names)) if names else [*POLICIES, "bound"]


def _replay_training(replay: TrainingReplay) -> tuple[list[NodeReads], dict[str, Any], str]:
    """Return the reads of each node, and a summary of them for JSON and for people."""
    with open_data_set_store(replay.url, replay.storage_options) as store:
        data_set = open_data_set(store, replay.at)
        url = store.url
    shards, training = data_set.shards, replay.training
    nodes = training_reads(shards.n_records, shards.n_bytes, training, nodes=replay.nodes, epochs=replay.epochs)
    facts = {
        "url": url,
        "version": data_set.version.number,
        "shards": len(shards),
        "accesses": sum(len(node.trace) for node in nodes),
        "seed": training.seed,
        "epochs": replay.epochs,
        "ranks": training.world_size,
        "nodes": replay.nodes,
        "placement": training.placement,
    }
    readers = f"{count(training.world_size, 'rank')} on {count(replay.nodes, 'node')}"
    size = f"{count(len(shards), 'shard')}, {format_bytes(int(shards.n_bytes.sum()))}"
    return nodes, facts, f"{url}: {size}, read by {readers} in {count(replay.epochs, 'epoch')}"


def _print(output: Output, results: Sequence[SimulationResult], data_bytes: int, fetched: str) -> None:
    rows = [asdict(result) | {"share": result.size_bytes / max(data_bytes, 1)} for result in results]
    has_dollars = any(result.dollars for result in results)
    has_times = any(result.epoch_s is not None for result in results)
    texts = []
    for result, row in zip(results, rows, strict=True):
        text = {
            "policy": result.policy,
            "cache": format_bytes(result.size_bytes),
            "of data": f"{row['share']:.0%}",
            "hits": f"{result.byte_hit_ratio:.1%}",
            fetched: format_bytes(result.epoch_bytes),
        }
        if has_dollars:
            text["dollars"] = f"{result.dollars:,.2f}"
        if has_times:
            text["time"] = "" if result.epoch_s is None else _time_text(result.epoch_s)
        texts.append(text)
    output.table("case", rows, texts)


def _time_text(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
