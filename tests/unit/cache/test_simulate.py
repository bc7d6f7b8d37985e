"""The simulator agrees with brute force."""

from functools import cache
from itertools import combinations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tiercache.cache.eviction import POLICIES, Trace, simulate


def trace_of(names, n_bytes=1):
    """A trace of one job, whose clock advances by the bytes that it reads."""
    names = np.asarray(names, np.int64)
    n_bytes = np.broadcast_to(np.asarray(n_bytes, np.int64), names.shape)
    return Trace(names, n_bytes, np.zeros_like(names), np.cumsum(n_bytes) - n_bytes)


def fetched(trace, policy, size):
    return int((trace.n_bytes - simulate(trace, policy, size)).sum())


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(0, 8))
def test_lru_equals_an_ordered_dict(names, size):
    held, hits = {}, []
    for name in names:
        hits.append(name in held)
        held.pop(name, None)
        held[name] = None
        if len(held) > size:
            del held[next(iter(held))]
    assert (simulate(trace_of(names), "lru", size) > 0).tolist() == hits


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


@given(tiny_traces, st.integers(0, 4))
def test_plan_equals_the_brute_force_optimum(names, size):
    best = fewest_fetched(tuple(names), (1,) * 5, size)
    assert fetched(trace_of(names), "plan", size) == best


@given(tiny_traces, st.tuples(*[st.integers(1, 5)] * 5), st.integers(0, 12))
def test_no_policy_fetches_less_than_the_brute_force_optimum(names, sizes, size):
    trace = trace_of(names, [sizes[name] for name in names])
    least = fewest_fetched(tuple(names), sizes, size)
    for policy in POLICIES:
        assert fetched(trace, policy, size) >= least


def test_an_object_larger_than_the_cache_is_not_admitted_and_evicts_nothing():
    trace = trace_of([0, 1, 0, 1, 0], [4, 99, 4, 99, 4])
    for policy in POLICIES:
        assert simulate(trace, policy, 10).tolist() == [0, 0, 4, 0, 4]
