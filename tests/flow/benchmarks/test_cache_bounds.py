"""The benchmarks of the cache run, and what they are measured against is right."""

import importlib
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.flow.benchmarks.conftest import BENCHMARKS
from tests.support.warm_python import WarmPython


def run(python: WarmPython, script: str, folder: Path, *more: str) -> str:
    """What a benchmark prints."""
    done = python.run([script, "--quick", "--folder", str(folder), *more], cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.stress
def test_epochs_are_counted_beside_their_bounds_and_a_second_run_goes_on(
    tmp_path: Path, warm_python: WarmPython
) -> None:
    text = run(warm_python, "bench_cache_epochs.py", tmp_path, "--only", "one", "nodes", "jobs", "--policy", "plan")
    before = rows_of(tmp_path / "cache_epochs.jsonl")
    rows = [row["case"] | row["found"] for row in before]
    assert [row["part"] for row in rows] == ["one", "nodes", "jobs"]
    for row in rows[:2]:
        assert 0 < row["bound"] <= row["share"] < 1.2  # a footer counts for something in shards as small as these
    assert 0 < rows[2]["share"] < 2.4  # two jobs may fetch everything twice
    assert "### Bytes per epoch: one node, one rank" in text
    more = run(warm_python, "bench_cache_epochs.py", tmp_path, "--only", "one", "--resume")
    assert rows_of(tmp_path / "cache_epochs.jsonl")[:3] == before
    assert "| lru |" in more


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
