"""The reading order of shards: a permutation whose runs are spread over the stored order."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tiercache.order import derive_key
from tiercache.order.keys import permutation
from tiercache.order.spread import spread


def keys(seed: int) -> tuple[bytes, bytes]:
    return derive_key(seed, "shards"), derive_key(seed, "strata")


@given(st.integers(0, 2**64), st.integers(0, 400), st.integers(1, 500))
def test_it_is_a_permutation(seed: int, n: int, n_run: int) -> None:
    order = spread(*keys(seed), n, n_run)
    assert np.array_equal(np.sort(order), np.arange(n))
    if n_run >= n:
        assert np.array_equal(order, permutation(keys(seed)[0], n))


@given(st.integers(0, 2**64), st.integers(1, 12), st.integers(2, 30), st.data())
def test_any_run_has_one_item_of_each_stratum_wherever_it_begins(
    seed: int, n_rounds: int, n_run: int, data: st.DataObject
) -> None:
    n = n_rounds * n_run
    start = data.draw(st.integers(0, n - n_run))
    run = spread(*keys(seed), n, n_run)[start : start + n_run]
    assert sorted((run // n_rounds).tolist()) == list(range(n_run))


def test_each_item_comes_at_each_place_equally_often() -> None:
    """Also where strata are of two lengths: which are longer is drawn. Places after the last whole round are few."""
    for n, n_run in ((24, 6), (25, 6), (29, 6)):
        trials, counts = 4000, np.zeros((n, n))
        for seed in range(trials):
            counts[np.arange(n), spread(*keys(seed), n, n_run)] += 1
        expected = trials / n
        assert np.abs(counts[:24] - expected).max() < 6 * math.sqrt(expected)
