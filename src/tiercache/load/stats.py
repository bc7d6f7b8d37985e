"""The counters of a loader as a dict, with its bottleneck."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tiercache._native.ring import held_bytes
from tiercache.load.batch import lent_bytes
from tiercache.model import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tiercache.stats import WaitHistogram

# Below this share of the wall time, the loader does not make the consumer wait.
WAITING_SHARE = 0.05


def summarise(
    counters: Mapping[str, float], waits: WaitHistogram, fetched: Mapping[str, float], *, threads: int
) -> dict[str, Any]:
    """Return the dict of `DataLoader.stats()`."""
    wall_s = counters.get("wall_s", 0.0)
    wait = waits.snapshot()
    share = min(1.0, wait["total"] / wall_s) if wall_s else 0.0
    looked_up = fetched.get("cache_hits", 0) + fetched.get("cache_misses", 0)
    stages = {
        "plan_s": counters.get("plan_s", 0.0),
        "load_s": counters.get("load_s", 0.0),
        "gather_s": counters.get("gather_ns", 0.0) / 1e9,
    }
    if "decode_ns" in counters:
        stages["decode_s"] = counters["decode_ns"] / 1e9
    return {
        "samples": int(counters.get("samples", 0)),
        "batches": int(counters.get("batches", 0)),
        "bytes_served": int(counters.get("bytes_served", 0)),
        "bytes_fetched": int(fetched.get("bytes_fetched", 0)),
        "requests": int(fetched.get("requests", 0)),
        "cache_hits": int(fetched.get("cache_hits", 0)),
        "cache_misses": int(fetched.get("cache_misses", 0)),
        "hit_ratio": fetched.get("cache_hits", 0) / looked_up if looked_up else None,
        "padded": int(counters.get("padded", 0)),
        "skipped": int(counters.get("skipped", 0)),
        "held_bytes": held_bytes() + lent_bytes(),
        "wait_s": {"p50": wait["p50"], "p95": wait["p95"], "p99": wait["p99"], "share": share},
        "stages": stages,
        "threads": threads,
        "bottleneck": _verdict(share, stages, fetched, threads),
    }


def _verdict(share: float, stages: Mapping[str, float], fetched: Mapping[str, float], threads: int) -> str:
    waited = f"waited {share:.1%} of the time"
    if share < WAITING_SHARE:
        return f"consumer ({waited} for data)"
    busiest = max(stages, key=lambda name: stages[name] / (threads if name in ("gather_s", "decode_s") else 1))
    if busiest == "decode_s":
        return f"decode ({waited}; {threads} threads decode images; store smaller images, or give more threads)"
    if busiest == "gather_s":
        return f"gather ({waited}; {threads} threads copy and check; serve fewer columns or give more threads)"
    if busiest == "plan_s":
        return f"plan ({waited} for the order; a smaller shuffle_window_bytes is computed sooner)"
    if fetched.get("bytes_fetched", 0):
        rate = format_bytes(fetched["bytes_fetched"] / max(stages["load_s"], 1e-9))
        return f"fetch ({waited}; {rate}/s from the store; warm the cache first)"
    return f"load ({waited} for blocks to be opened and decoded; columns stored raw need no decoding)"
