"""The tier planner: seconds and memory to plan moves of many objects under many rules.

    python benchmarks/bench_tier_plan.py [--objects 1000000] [--rules 20] [--only mixed all none] [--repetitions 3]

mixed: shards, files and checkpoints, of which some move and some are rejected, with one tier over its watermark. all:
every object moves. none: no rule matches, which is the largest cost of matching. Each case runs in a process of its
own: `peak_bytes` is the peak memory of the process, including Python, numpy and Arrow; `made_bytes` is what planning
adds to the snapshot; `cpu_s` is the processor time. The rows are written to tier_plan.jsonl. --quick uses small data.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cases import Bench, mib, peak_bytes
from rows import spread
from tiercache.keep import KeepList
from tiercache.tier.policy import decide
from tiercache.tier.rules import Rule, RuleFile, Tier
from tiercache.tier.snapshot import CHECKPOINT, FILE, NO_RUN, NO_STEP, READABLE, SHARD, Snapshot
from tiercache.tier.text_columns import first_match

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CASES = ("mixed", "all", "none")
NOW_S, DAY_S = 1_790_000_000.0, 86_400.0
GB = 10**9
LIMIT_S, LIMIT_BYTES = 10.0, 1 << 30
TIERS = (
    Tier(name="hot", url="/nvme/train", capacity="1TB"),
    Tier(name="standard", url="s3://bucket/train", prices="aws:us-east-1:STANDARD"),
    Tier(
        name="archive",
        url="s3://cold/train",
        storage_class="GLACIER_IR",
        prices="aws:us-east-1:GLACIER_IR",
    ),
)


def made_file(case: str, n_rules: int) -> RuleFile:
    """Return rules of every kind; the last one matches everything that the others leave."""
    if case == "none":
        rules = [
            Rule(name=f"r{i}", match=(f"**/run-{i}x/**/*.pt", f"datasets/**/part-{i}-?.bin"), to="archive", after_s=0.0)
            for i in range(n_rules)
        ]
    else:
        idle_s = 0.0 if case == "all" else 30 * DAY_S
        rules = [
            Rule(
                name=f"r{i}",
                match=(f"datasets/set-{i}/**", f"**/team-{i}/*.bin", f"**/team-{i}/*.npz"),
                exclude=("**/*.keep",),
                to="archive",
                idle_s=idle_s,
            )
            for i in range(n_rules - 2)
        ]
        keep = {"hot": KeepList(last=2), "standard": KeepList(last=10, every_steps=5000)}
        ckpt = Rule(name="ckpt", match=("checkpoints/**",), keep=keep, then="archive", after_s=14 * DAY_S)
        rest = Rule(name="rest", match=("**",), to="archive", idle_s=idle_s)
        rules += [ckpt, rest] if case == "mixed" else [rest, rest]
    return RuleFile(path=Path("tiercache.toml"), sha256="0" * 64, tiers=TIERS, rules=tuple(rules))


def made_paths(n: int) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Return paths, kinds, steps and runs: 60% shards, 30% files, 10% checkpoints."""
    kind = np.array([SHARD] * 6 + [FILE] * 3 + [CHECKPOINT], np.uint8)[np.arange(n) % 10]
    paths, step, run = [], np.full(n, NO_STEP, np.int64), np.full(n, NO_RUN, np.int32)
    for i, of_kind in enumerate(kind.tolist()):
        if of_kind == SHARD:
            paths.append(f"datasets/set-{i % 40}/shards/{i:08d}-{i * 2654435761 % 2**32:08x}.tcs")
        elif of_kind == FILE:
            paths.append(f"users/team-{i % 50}/results/{i // 1000}/file-{i}.{('bin', 'csv', 'npz')[i % 3]}")
        else:
            run[i], step[i] = i // 1000, i % 1000 // 10 * 500
            paths.append(f"checkpoints/run-{run[i]}/step-{step[i]}")
    return paths, kind, step, run


def made_snapshot(n: int) -> Snapshot:
    """Return a snapshot of n groups, each in one or two tiers, of all ages."""
    random = np.random.default_rng(0)
    paths, kind, step, run = made_paths(n)
    created = NOW_S - random.uniform(0, 400, n) * DAY_S
    also_hot = random.random(n) < 0.2
    group = np.concatenate([np.flatnonzero(also_hot), np.arange(n)])
    tier = np.concatenate([np.zeros(int(also_hot.sum())), random.choice([0, 1, 1, 1, 2], n)]).astype(np.int8)
    keep = np.unique(group * 4 + tier)
    group, tier = (keep // 4).astype(np.int32), (keep % 4).astype(np.int8)
    m = len(group)
    n_bytes = random.integers(10_000, 200_000_000, n)[group]
    return Snapshot(
        now_s=NOW_S,
        tiers=tuple(tier.name for tier in TIERS),
        classes=("",),
        paths=pa.array(paths),
        kind=kind,
        step=step,
        run=run,
        complete=np.ones(n, np.bool_),
        created_s=created,
        last_use_s=created + random.random(n) * (NOW_S - created),
        uses_tracked_since_s=np.full(n, -np.inf),
        unreported=random.random(n) < 0.01,
        in_use=random.random(n) < 0.01,
        metrics={"val_loss": np.where(kind == CHECKPOINT, random.random(n), np.nan)},
        unread=np.zeros(n, np.bool_),
        group=group,
        tier=tier,
        n_objects=np.ones(m, np.int32),
        n_bytes=n_bytes,
        smallest_bytes=n_bytes,
        modified_s=created[group],
        storage_class=np.zeros(m, np.int16),
        state=np.full(m, READABLE, np.uint8),
        whole=np.ones(m, np.bool_),
        verified=random.random(m) < 0.8,
        links={},
    )


def measure(case: str, options: Mapping[str, int]) -> dict[str, Any]:
    """Measure one case in this process."""
    n, n_rules, repetitions = (options[name] for name in ("objects", "rules", "repetitions"))
    snapshot, file = made_snapshot(n), made_file(case, n_rules)
    prices = [tier.known_prices for tier in TIERS]
    before, times, processor, matching = peak_bytes(), [], [], []
    for _ in range(repetitions):
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        decided = decide(snapshot, file, prices, capacity_bytes=[1000 * GB, None, None])
        times.append(time.perf_counter() - start_s)
        processor.append(time.process_time() - start_cpu_s)
        found = {"moves": len(decided.moves), "refusals": len(decided.refusals)}
        del decided
        start_s = time.perf_counter()
        first_match(snapshot.paths, [(rule.match, rule.exclude) for rule in file.rules])
        matching.append(time.perf_counter() - start_s)
    peak = peak_bytes()
    return {
        "benchmark": "tier_plan",
        "case": case,
        "objects": n,
        "rules": n_rules,
        **found,
        "seconds": spread(times),
        "cpu_s": spread(processor),
        "matching_s": spread(matching),
        "peak_bytes": peak,
        "made_bytes": peak - before,
        "within": max(times) < LIMIT_S and peak < LIMIT_BYTES,
    }


def cells(row: Mapping[str, Any]) -> Sequence[str]:
    """Return the printed cells of a row."""
    counts = [f"{row[name]:,}" for name in ("objects", "rules", "moves", "refusals")]
    times = [f"{row[name]['median']:.2f}" for name in ("seconds", "cpu_s", "matching_s")]
    return [*counts, *times, mib(row["peak_bytes"]), mib(row["made_bytes"])]


BENCH = Bench(
    name="tier_plan",
    script=__file__,
    doc=str(__doc__),
    cases=CASES,
    options={"objects": 1_000_000, "rules": 20, "repetitions": 3},
    measure=measure,
    titles=["objects", "rules", "moves", "refused", "s", "CPU s", "of it matching", "peak MiB", "made MiB"],
    cells=cells,
)

if __name__ == "__main__":
    BENCH.main()
