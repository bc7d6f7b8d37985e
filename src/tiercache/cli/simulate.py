"""The verb simulate: replays a training or a trace in caches of several sizes and policies, as a table or a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tiercache.cache.evict.policy import POLICIES
from tiercache.cache.simulate import read_trace
from tiercache.cli.choosing import parse_group, parse_placement
from tiercache.cli.opening import open_data_set, open_data_set_store
from tiercache.cli.options import (
    BatchSize,
    Json,
    Placement,
    Quiet,
    ShuffleGroup,
    StorageOptions,
    Streams,
    Verbose,
    VersionNumber,
    parse_rate,
    parse_size,
)
from tiercache.cli.output import Output, count
from tiercache.cli.plot import PlotLine, check_plot, draw
from tiercache.cli.simulation import (
    Bandwidths,
    Cluster,
    FetchPrices,
    NodeReads,
    SimulationCosts,
    SimulationResult,
    distinct_bytes,
    simulate_case,
    trace_reads,
    training_reads,
)
from tiercache.cli.training import Training
from tiercache.model import format_bytes

SIZES = ("10%", "25%", "50%", "75%", "100%")


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
    url: Annotated[
        str | None,
        typer.Argument(metavar="[URL]", help="Data set that a training reads; only its list of shards is used."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Instead of a URL: a trace that TIERCACHE_CACHE_TRACE recorded."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option("--policy", metavar="NAME", help="Eviction policy to simulate; default: all. May be repeated."),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            "--size",
            metavar="SIZE",
            help="Cache size per node, e.g. 200GB, or 25% (of all data read). May be repeated.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="Seed of the training's shuffle, as in LoaderOptions(seed=N).")
    ] = 0,
    no_shuffle: Annotated[
        bool, typer.Option("--no-shuffle", help="Replay the stored order instead of a shuffled order.")
    ] = False,
    epochs: Annotated[int, typer.Option("--epochs", metavar="N", help="Number of epochs to replay.")] = 5,
    ranks: Annotated[
        int, typer.Option("--ranks", min=1, metavar="N", help="Number of ranks of the training, on all nodes together.")
    ] = 1,
    nodes: Annotated[int, typer.Option("--nodes", metavar="N", help="Number of machines; each has its own cache.")] = 1,
    streams: Streams = None,
    placement: Placement = None,
    shuffle_group: ShuffleGroup = None,
    batch_size: BatchSize = None,
    egress: Annotated[
        float, typer.Option("--egress", metavar="DOLLARS", help="Price of fetching 1 GB (2^30 bytes) from the store.")
    ] = 0,
    request: Annotated[
        float, typer.Option("--request", metavar="DOLLARS", help="Price of 1,000 requests to the store.")
    ] = 0,
    rate: Annotated[
        str | None, typer.Option("--rate", metavar="SIZE/s", help="Bandwidth from the store to one node, e.g. 1GB/s.")
    ] = None,
    train_rate: Annotated[
        str | None,
        typer.Option("--train-rate", metavar="SIZE/s", help="Rate at which one node's training reads, e.g. 500MB/s."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Also draw the results to FILE: .svg, .png or .pdf.")
    ] = None,
    at: VersionNumber = None,
    storage_option: StorageOptions = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,  # noqa: ARG001 - report_errors() reads it
) -> None:
    """Simulate caches of several sizes: hits, bytes, dollars, time.

    The read order of a training is replayed, or a recorded trace, with each eviction policy. No record is read, only
    the list of shards.
    """
    output = Output(as_json, quiet)
    policies, question = _policies(policy), _question(egress, request, rate, train_rate)
    check_plot(plot)
    if trace is not None and url is None:
        scene = _trace_replay(trace)
    elif url is not None and trace is None:
        training = Training(
            None if no_shuffle else seed,
            world_size=ranks,
            streams=streams,
            placement=parse_placement(placement),
            group_bytes=parse_group(shuffle_group),
            batch_size=batch_size,
        )
        scene = _training(url, at, storage_option, training, Cluster(nodes, epochs))
    else:
        raise ValueError("simulate takes a URL, or --trace FILE")
    data_bytes = distinct_bytes(scene.accesses)
    sizes = sorted({parse_size("--size", text, whole_bytes=data_bytes) for text in size or SIZES})
    cases = _run(output, scene, [(name, size_bytes) for name in policies for size_bytes in sizes], question)
    _print(output, cases, data_bytes, scene)
    facts = scene.facts | {"data_bytes": data_bytes, "cases": len(cases), "plot": None if plot is None else str(plot)}
    if plot is not None:
        draw(plot, _lines(cases), data_bytes=data_bytes, title=scene.text)
    output.summary(facts, scene.text + ("" if plot is None else f"; drawn in {plot}"))


def _run(
    output: Output, scene: _Replay, asked: Sequence[tuple[str, int]], question: SimulationCosts
) -> list[SimulationResult]:
    cases: list[SimulationResult] = []
    with output.count_progress("replaying") as advance:
        for policy, size_bytes in asked:
            cases.append(simulate_case(scene.accesses, policy, size_bytes, question))
            advance(len(cases), len(asked))
    return cases


def _question(egress: float, request: float, rate: str | None, train_rate: str | None) -> SimulationCosts:
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


def _training(
    url: str, at: int | None, storage_options: Sequence[str] | None, training: Training, cluster: Cluster
) -> _Replay:
    with open_data_set_store(url, storage_options) as store:
        data_set = open_data_set(store, at)
        shown = store.url
    shards = data_set.shards
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
