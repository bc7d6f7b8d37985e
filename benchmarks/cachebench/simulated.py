"""The simulator's result for the trace that jobs left in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tiercache.cache.simulate import Trace, bound, read_trace, simulate

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def shares_of_trace(
    path: Path, epochs: Sequence[dict[str, Any]], n_cold: int, sizes: tuple[int, int], policy: str
) -> dict[str, Any]:
    """Return the share that should have been fetched in an epoch.

    Args:
        path: Path of the trace.
        epochs: Results of each epoch's processes, in the order of the jobs; their pids assign the trace's entries.
        n_cold: Number of epochs that are not measured.
        sizes: Bytes of the data sets, and of the cache.
        policy: Policy of the run.
    """
    job_of, epoch_of = {}, {}
    for number, epoch in enumerate(epochs):
        for job, rank in enumerate(epoch["ranks"]):
            job_of[rank["pid"]], epoch_of[rank["pid"]] = job, number
    trace = read_trace(path)
    least = trace.n_bytes.max() // 2  # Lists of shards are copies too.
    _, first = np.unique(np.stack([trace.job, trace.names]), axis=1, return_index=True)
    kept = np.sort(first)[trace.n_bytes[np.sort(first)] > least]
    pids = trace.job[kept]
    jobs = np.array([job_of[pid] for pid in pids.tolist()])
    measured = np.array([epoch_of[pid] for pid in pids.tolist()]) >= n_cold
    merged = Trace.of(trace.names[kept], trace.n_bytes[kept], jobs)
    n_bytes, cache_bytes = sizes
    n_epochs = len(epochs) - n_cold

    def share(report: Any) -> float:
        return float((merged.n_bytes - report.served)[measured].sum() / n_epochs / n_bytes)

    return {
        "bound": share(bound(merged, cache_bytes)),
        "bound_of": "any",
        "simulated": {
            name: share(simulate(merged, name, cache_bytes)) for name in ("plan", "resident", "s3fifo", "lru")
        },
        "note": f"simulator: {share(simulate(merged, policy, cache_bytes)):.3f}",
    }
