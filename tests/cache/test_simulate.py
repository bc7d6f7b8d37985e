"""The simulator agrees with libcachesim, with brute force, and with the policies."""

from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tiercache.cache import simulate as simulate_module
from tiercache.cache.accounts import GHOSTS_SHARE
from tiercache.cache.policy import POLICIES, UNPLANNED, CopyTable, SpaceRequest, lru, plan, s3fifo
from tiercache.cache.simulate import Trace, Tracer, bound, next_positions, read_trace, simulate, trace_of_plans
from tiercache.model import NEVER, ReadingPlan

# -- another simulator -------------------------------------------------------------------------------------------------


def make_trace(kind, seed):
    rng = np.random.default_rng(seed)
    if kind == "random":
        return rng.integers(0, 300, 6000)
    if kind == "zipf":
        return rng.zipf(1.2, 6000) % 1000
    return np.concatenate([rng.permutation(200) for _ in range(25)])


# Theirs never admits to the small queue what is as large as all of it, so that queue must hold two objects here.
@pytest.mark.parametrize("size", [20, 37, 50, 150])
@pytest.mark.parametrize("kind", ["random", "zipf", "scans"])
@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_lru_and_s3fifo_agree_with_libcachesim(policy, kind, size):
    lcs = pytest.importorskip("libcachesim", reason="libcachesim has no wheel for this platform")
    names = make_trace(kind, size)
    theirs = {"lru": lcs.LRU, "s3fifo": lcs.S3FIFO}[policy](cache_size=size)
    expected = []
    for i, (name, at) in enumerate(zip(names.tolist(), next_positions(names).tolist(), strict=True)):
        request = lcs.Request()
        request.obj_id, request.obj_size, request.clock_time = name + 1, 1, i
        request.next_access_vtime = at if at != NEVER else (1 << 63) - 1
        expected.append(theirs.get(request))
    assert (simulate(Trace.of(names), policy, size).served > 0).tolist() == expected


# -- brute force -------------------------------------------------------------------------------------------------------


def fewest_fetched(names, sizes, size):
    """Bytes that must be fetched at least, by trying after every access every set of what was there and what came."""

    @cache
    def from_here(i, held):
        if i == len(names):
            return 0
        there = held | {names[i]}
        choices = [
            frozenset(kept)
            for n in range(len(there) + 1)
            for kept in combinations(sorted(there), n)
            if sum(sizes[name] for name in kept) <= size
        ]
        fetched = 0 if names[i] in held else sizes[names[i]]
        return fetched + min(from_here(i + 1, kept) for kept in choices)

    return from_here(0, frozenset())


tiny_traces = st.lists(st.integers(0, 4), max_size=9)


@settings(max_examples=25, deadline=None)
@given(tiny_traces, st.integers(0, 4))
def test_plan_and_bound_equal_the_brute_force_optimum(names, size):
    best = fewest_fetched(tuple(names), (1,) * 5, size)
    trace = Trace.of(np.array(names, np.int64))
    assert simulate(trace, "plan", size).bytes_fetched == best
    assert bound(trace, size).bytes_fetched == best


@settings(max_examples=25, deadline=None)
@given(tiny_traces, st.tuples(*[st.integers(1, 5)] * 5), st.integers(0, 12))
def test_no_policy_fetches_less_than_the_bound(names, sizes, size):
    trace = Trace.of(np.array(names, np.int64), np.array([sizes[name] for name in names], np.int64))
    least = bound(trace, size).bytes_fetched
    assert least <= fewest_fetched(tuple(names), sizes, size)
    for policy in POLICIES:
        assert simulate(trace, policy, size).bytes_fetched >= least


# -- the policies as the cache asks them -------------------------------------------------------------------------------


class Asked:
    """A cache that makes every decision from a snapshot of all that it holds, as the evictor does."""

    def __init__(self, trace, policy, size):
        self.trace, self.policy, self.size = trace, policy, size
        self.next_at = next_positions(trace.names)
        self.rows, self.ghosts, self.clock, self.n_evicted = {}, {}, 0, 0

    def tick(self):
        self.clock += 1
        return self.clock

    def hits(self):
        return [self.access(i, name, n) for i, (name, n) in enumerate(zip(*self.columns(), strict=True))]

    def columns(self):
        return self.trace.names.tolist(), self.trace.n_bytes.tolist()

    def access(self, i, name, n_bytes):
        if name in self.rows:
            row = self.rows[name]
            row["last_use"], row["freq"] = self.tick(), min(row["freq"] + 1, 3)
            row["next"] = self.next_at[i]
            return True
        was_ghost = self.ghosts.pop(name, None) is not None
        need = sum(row["n"] for row in self.rows.values()) + n_bytes - self.size
        if n_bytes <= self.size and self.make_room(i, need):
            now = self.tick()
            self.rows[name] = {
                "n": n_bytes, "last_use": now, "main": was_ghost, "freq": 0, "turn": now, "next": self.next_at[i]
            }  # fmt: skip
        return False

    def snapshot(self, i):
        rows = self.rows.values()
        next_use = [row["next"] if row["next"] == NEVER else row["next"] - i for row in rows]
        return CopyTable(
            *(np.array([row[c] for row in rows], np.int64) for c in ("n", "last_use")),
            np.array([row["main"] for row in rows], np.bool_),
            *(np.array([row[c] for row in rows], np.int64) for c in ("freq", "turn")),
            np.zeros(len(rows), np.bool_),
            np.array(next_use, np.int64),
            self.size,
            self.n_evicted > 0,
        )

    def make_room(self, i, need):
        names = list(self.rows)
        at = self.next_at[i]
        distance = NEVER if at == NEVER else int(at - i)
        decision = self.policy(self.snapshot(i), SpaceRequest(need, use_after_next=distance))
        for move in decision.moves:
            self.rows[names[move.row]] |= {"main": move.main, "freq": move.freq, "turn": self.tick()}
        for row in decision.victims:
            gone = self.rows.pop(names[row])
            self.n_evicted += 1
            if not gone["main"]:
                self.ghosts[names[row]] = gone["n"]
                while sum(self.ghosts.values()) > int(self.size * GHOSTS_SHARE):
                    del self.ghosts[next(iter(self.ghosts))]
        return decision.admit


@settings(max_examples=25, deadline=None)
@example(plan, [0, 5, 1, 2, 2, 0], [1, 1, 2, 1, 1, 3] + [1] * 7, 5)  # two copies that are not used again
@given(
    policy=st.sampled_from([lru, s3fifo, plan]),
    names=st.lists(st.integers(0, 12), max_size=60),
    sizes=st.lists(st.integers(1, 4), min_size=13, max_size=13),
    size=st.integers(0, 40),
)
def test_the_simulator_decides_like_the_policies(policy, names, sizes, size):
    trace = Trace.of(np.array(names, np.int64), np.array([sizes[name] for name in names], np.int64))
    report = simulate(trace, policy.__name__, size)
    asked = Asked(trace, policy, size)
    assert (report.served > 0).tolist() == asked.hits()
    assert report.evicted == asked.n_evicted


# -- what the policies are good for ------------------------------------------------------------------------------------


def scans(n_shards, n_epochs, seed):
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(n_shards) for _ in range(n_epochs)])


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75])
def test_resident_hits_more_than_lru_on_scans(share):
    names = scans(400, 6, seed=1)
    size = int(400 * share)
    trace = Trace.of(names)
    after_first = slice(400, None)
    resident = (simulate(trace, "resident", size).served[after_first] > 0).mean()
    lru_ratio = (simulate(trace, "lru", size).served[after_first] > 0).mean()
    assert resident == share
    assert lru_ratio == pytest.approx(share + (1 - share) * np.log(1 - share), abs=0.02)


def two_jobs(n_shards, n_epochs, seed):
    """Two jobs on one data set, each in its own order, taking turns."""
    orders = np.stack([scans(n_shards, n_epochs, seed), scans(n_shards, n_epochs, seed + 1000)], axis=1)
    return Trace.of(orders.reshape(-1), 1, np.tile([0, 1], len(orders)))


def mixture(n_shards, n_epochs, seed):
    """One job that reads a quarter of the data set three times as often as the rest."""
    rng = np.random.default_rng(seed)
    often, rest = np.arange(n_shards // 4), np.arange(n_shards // 4, n_shards)
    epochs = [np.concatenate([rng.permutation(often) for _ in range(3)] + [rest]) for _ in range(n_epochs)]
    return Trace.of(np.concatenate([rng.permutation(epoch) for epoch in epochs]))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("make", [two_jobs, mixture], ids=lambda make: make.__name__)
def test_plan_lies_between_the_bound_and_resident(make, share):
    trace = make(120, 8, seed=3)
    size = int(120 * share)
    by = {policy: simulate(trace, policy, size).bytes_fetched for policy in ("plan", "resident", "lru")}
    least = bound(trace, size).bytes_fetched
    assert least <= by["plan"] < by["lru"]
    if make is two_jobs:
        assert by["plan"] < 0.9 * by["resident"]
    else:
        assert by["plan"] == least <= by["resident"], "one job has one clock: then plan is MIN"


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 30), st.integers(1, 4), st.integers(0, 1 << 20), st.floats(0.0, 1.0))
def test_plan_is_not_worse_than_resident_for_concurrent_jobs(n_shards, n_epochs, seed, share):
    trace = two_jobs(n_shards, n_epochs, seed)
    size = int(n_shards * share)
    assert simulate(trace, "plan", size).bytes_fetched <= simulate(trace, "resident", size).bytes_fetched


def test_a_single_job_gives_the_same_hits_by_clock_and_by_position():
    """Several jobs are asked for by their clocks, one alone by the order of its accesses."""
    trace = Trace.of(scans(50, 6, seed=5), 7)
    for size in (35, 140, 315):
        hit = bytearray(len(trace))
        n_evicted = simulate_module._plan_of_jobs(trace, size, hit)
        report = simulate(trace, "plan", size)
        assert list(hit) == (report.served > 0).tolist()
        assert n_evicted == report.evicted


# -- traces ------------------------------------------------------------------------------------------------------------


def test_a_trace_of_plans_merges_jobs_by_their_clocks():
    def epoch(first, last, then):
        return ReadingPlan("x", np.arange(2), np.array(first), np.array(last), np.array(then))

    a = [epoch([0, 10], [10, 25], [25, 30]), epoch([0, NEVER], [10, NEVER], [NEVER, NEVER])]
    b = [epoch([15, 0], [25, 15], [NEVER, NEVER])]
    trace = trace_of_plans([a, b], np.array([10, 15]))
    assert trace.names.tolist() == [0, 1, 1, 0, 0]
    assert trace.job.tolist() == [0, 1, 0, 1, 0]
    assert trace.clock.tolist() == [0, 0, 10, 15, 25]
    assert trace.n_bytes.tolist() == [10, 15, 15, 10, 10]
    assert len(trace_of_plans([], np.array([10, 15]))) == 0


def test_a_trace_file_can_be_read_without_its_cut_last_line(tmp_path):
    path = tmp_path / "trace"
    for name, n_bytes in (("aa", 5), ("bb", 7), ("aa", 5)):
        tracer = Tracer(path)
        tracer.add(name, n_bytes, hit=False)
        tracer.close()
    with path.open("a") as file:
        file.write("17.5 12 cc")
    trace = read_trace(path)
    assert trace.names.tolist() == [0, 1, 0]
    assert trace.n_bytes.tolist() == [5, 7, 5]
    assert trace.clock.tolist() == [0, 5, 12]
    assert len(set(trace.job.tolist())) == 1
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("line", ["17.5 12 aa", "soon 12 aa 5 1", "17.5 12 aa five 1", ""])
def test_an_invalid_line_of_a_trace_is_an_error_that_names_it(tmp_path, line):
    path = tmp_path / "trace"
    path.write_text(f"17.5 12 aa 5 1\n{line}\n")
    with pytest.raises(ValueError, match=r"trace, line 2: .*seconds process name bytes hit"):
        read_trace(path)


def test_an_empty_trace_has_an_empty_report(tmp_path):
    path = tmp_path / "trace"
    path.write_text("")
    for policy in POLICIES:
        report = simulate(read_trace(path), policy, 10)
        assert (report.hits, report.misses, report.hit_ratio, report.byte_hit_ratio) == (0, 0, 0.0, 0.0)
    assert bound(read_trace(path), 10).bytes_fetched == 0


def test_unknown_policies_and_columns_of_different_length_are_errors():
    with pytest.raises(ValueError, match=r"no policy is called 'best'; there are lru, plan"):
        simulate(Trace.of(np.arange(3)), "best", 1)
    with pytest.raises(ValueError, match="same length"):
        Trace(*(np.arange(n) for n in (3, 3, 3, 2)))


def test_an_object_larger_than_the_cache_is_not_admitted_and_evicts_nothing():
    names, sizes = np.array([0, 1, 0, 1, 0]), np.array([4, 99, 4, 99, 4])
    for policy in POLICIES:
        report = simulate(Trace.of(names, sizes), policy, 10)
        assert (report.hits, report.evicted, report.bytes_fetched) == (2, 0, 4 + 2 * 99)


def test_next_use_is_unplanned_only_without_a_plan():
    assert UNPLANNED > NEVER
