"""The reading order of shards: a permutation whose runs are spread over the stored order."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.order.epoch_order import derive_key, permutation, stratified_permutation


def keys(seed: int) -> tuple[bytes, bytes]:
    return derive_key(seed, "shards"), derive_key(seed, "strata")


@given(st.integers(0, 2**64), st.integers(0, 400), st.integers(1, 500))
def test_a_stratified_permutation_is_a_permutation(seed: int, n: int, n_run: int) -> None:
    order = stratified_permutation(*keys(seed), n, n_run)
    assert np.array_equal(np.sort(order), np.arange(n))
    if n_run >= n:
        assert np.array_equal(order, permutation(keys(seed)[0], n))


@given(st.integers(0, 2**64), st.integers(1, 12), st.integers(2, 30), st.data())
def test_any_run_has_one_item_of_each_stratum_wherever_it_begins(
    seed: int, n_rounds: int, n_run: int, data: st.DataObject
) -> None:
    n = n_rounds * n_run
    start = data.draw(st.integers(0, n - n_run))
    run = stratified_permutation(*keys(seed), n, n_run)[start : start + n_run]
    assert sorted((run // n_rounds).tolist()) == list(range(n_run))


@given(st.integers(0, 2**64), st.integers(1, 200), st.integers(1, 30), st.data())
def test_any_run_is_spread_where_strata_differ_in_length_too(
    seed: int, n: int, n_run: int, data: st.DataObject
) -> None:
    """Whatever the run, in each piece of the stored order it has its share of items, to two."""
    n_run = min(n, n_run)
    start = data.draw(st.integers(0, n - n_run))
    run = np.sort(stratified_permutation(*keys(seed), n, n_run)[start : start + n_run])
    rest = n - n // n_run * n_run  # items of the round that has too few for all strata
    touches_it = rest and (start + n_run > n - rest or start < rest)
    if not touches_it:
        assert np.abs((run + 0.5) * n_run / n - (np.arange(n_run) + 0.5)).max() <= 1 + n_run / n


def places(n: int, n_run: int, trials: int = 4000) -> np.ndarray:
    """int[n, n]: how often each item (column) comes at each place (row), with many keys."""
    counts = np.zeros((n, n), np.int64)
    for seed in range(trials):
        counts[np.arange(n), stratified_permutation(*keys(seed), n, n_run)] += 1
    return counts


def test_each_item_is_at_each_position_equally_often() -> None:
    counts = places(24, 6)
    expected = counts.sum() / counts.size
    assert np.abs(counts - expected).max() < 6 * math.sqrt(expected)


@pytest.mark.parametrize(("n", "n_run"), [(12, 8), (29, 6), (50, 32)])
def test_no_item_comes_earlier_than_others_where_strata_differ_in_length(n: int, n_run: int) -> None:
    counts = places(n, n_run)
    mean = np.arange(n) @ counts / counts[0].sum()
    assert np.abs(mean - (n - 1) / 2).max() < 5 * math.sqrt((n * n - 1) / 12 / counts[0].sum())
