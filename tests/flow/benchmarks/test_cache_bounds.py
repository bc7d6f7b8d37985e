"""The benchmarks of the cache run, and what they are measured against is right."""

import importlib
import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from hypothesis import given
from hypothesis import strategies as st
from tests.flow.benchmarks.conftest import BENCHMARKS


def test_the_bound_is_computed_from_the_shards_that_the_loader_reads(
    bench: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    data, jobs, bounds = (bench(f"cachebench.{name}") for name in ("data", "jobs", "bounds"))
    packed = data.pack(tmp_path, "main", data.Sizes(12, 64 << 10))
    with data.serving(packed) as served:
        job = jobs.Job(
            (served.url(packed),), str(tmp_path / "cache"), packed.budget(1.0), "lru", 0, rank=1, world_size=2
        )
        job = replace(job, placement="global", group_bytes=128 << 10, window_bytes=64 << 10)
        shards, coming = bounds.orders(packed, job, 2)
        found = jobs.run(job)
        taken = served.taken()
    assert found["n_records"] == found["n_distinct"] == packed.n_records // 2
    read, ahead = ({f"/main/{packed.names[shard]}" for shard in one} for one in (shards, coming))
    # The beginning of the next epoch is made ready while this one ends.
    assert read <= {key for key in taken if key} <= read | ahead


@given(
    epochs=st.lists(st.permutations(range(5)), min_size=1, max_size=3),
    capacity=st.integers(0, 5),
)
def test_min_misses_no_more_than_any_choice_of_what_to_keep(epochs: list[list[int]], capacity: int) -> None:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        bounds = importlib.import_module("cachebench.bounds")
    finally:
        sys.path.remove(str(BENCHMARKS))
    trace = [shard for epoch in epochs for shard in epoch]
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for shard in trace:
        reached: dict[frozenset[int], int] = {}
        for held, missed in best.items():
            cost, have = missed + (shard not in held), held | {shard}
            for n in range(min(capacity, len(have)) + 1):
                for kept in itertools.combinations(sorted(have), n):
                    key = frozenset(kept)
                    reached[key] = min(reached.get(key, cost), cost)
        best = reached
    assert sum(bounds.min_misses(epochs, capacity)) == min(best.values())
