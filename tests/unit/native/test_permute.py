"""The keyed permutation: a bijection for every n, stable between releases, and as random as a shuffle."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tiercache._native.permute import MAX_N, RowFinder, invert_one, permute, permute_at, permute_one
from tiercache.order.epoch_order import derive_key

WORDS = st.integers(0, 2**64 - 1)
KEYS = st.one_of(st.binary(min_size=16, max_size=16), st.tuples(WORDS, WORDS))

# Written once: runs in progress resume by these values, so a change here breaks users.
GOLDEN = [
    (b"\0" * 16, 10, 0, [8, 5, 1, 3, 4, 7, 0, 9, 2, 6]),
    ((1, 2), 1000, 0, [571, 73, 249, 555, 340, 85, 909, 165, 0, 543]),
    ((1, 2), 1000, 990, [106, 405, 809, 448, 483, 973, 663, 869, 764, 738]),
    ((2**64 - 1, 2**63), 2**63, 0, [2524054120276314227, 4410559446340574125, 1239285910318666810]),
    ((2**64 - 1, 2**63), 2**63, 2**63 - 3, [7544619841469163714, 459705393954161000, 8249038996470584617]),
]


def shuffled(key: tuple[int, int] | bytes, n: int, start: int = 0, m: int | None = None) -> np.ndarray:
    out = np.empty(n if m is None else m, np.uint64)
    permute(key, n, start, out)
    return out


LIMIT = 4.5  # standard deviations: one true shuffle in 150,000 is further off


def test_permutations_never_change() -> None:
    for key, n, start, expected in GOLDEN:
        assert shuffled(key, n, start, len(expected)).tolist() == expected
    key = bytes(range(16))  # equals its two little-endian words
    words = (int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little"))
    assert np.array_equal(shuffled(key, 5000), shuffled(words, 5000))


def test_the_permutation_of_every_small_n_is_a_bijection() -> None:
    for n in [*range(1, 600), *range(1000, 1050), 4095, 4096, 4097]:
        assert np.array_equal(np.sort(shuffled((n, 1), n)), np.arange(n))


@given(KEYS, st.integers(1, MAX_N), st.data())
@example((0, 0), MAX_N, None)
@example((0, 0), MAX_N - 1, None)
def test_records_are_in_range_and_invert_to_their_positions(
    key: tuple[int, int] | bytes, n: int, data: st.DataObject | None
) -> None:
    position = n - 1 if data is None else data.draw(st.integers(0, n - 1))
    record = permute_one(key, n, position)
    assert 0 <= record < n
    assert invert_one(key, n, record) == position


def test_sizes_around_squares_products_and_powers_invert_to_their_positions() -> None:
    """Where the two halves change size or just fit: from 1 to 2^63, first, last and some positions between."""
    roots = [2**k for k in range(1, 32)] + [3**k for k in range(1, 20)] + [10**k for k in range(1, 10)]
    sizes = {n + d for r in roots for n in (r * r, r * (r + 1), 2 * r) for d in (-1, 0, 1)} | {MAX_N - 1, MAX_N}
    random = np.random.default_rng(0)
    for n in sorted(n for n in sizes if 1 <= n <= MAX_N):
        key = (n, n ^ 12345)
        for position in {0, n - 1, n // 2, *random.integers(0, n, 12).tolist()}:
            record = permute_one(key, n, position)
            assert 0 <= record < n
            assert invert_one(key, n, record) == position


@given(KEYS, st.integers(1, MAX_N), st.data())
def test_a_range_equals_its_positions_one_by_one(key: tuple[int, int] | bytes, n: int, data: st.DataObject) -> None:
    m = data.draw(st.integers(0, min(n, 40)))
    start = data.draw(st.integers(0, n - m))
    assert shuffled(key, n, start, m).tolist() == [permute_one(key, n, start + i) for i in range(m)]


def test_arguments_out_of_range_raise_an_error() -> None:
    for key, n, start, m in (
        ((0, 0), 0, 0, 0),
        ((0, 0), MAX_N + 1, 0, 1),
        ((0, 0), 10, 5, 6),
        ((0, 0), 10, -1, 2),
        (b"short", 10, 0, 1),
    ):
        with pytest.raises(ValueError, match=r"needs|not inside|16 bytes"):
            permute(key, n, start, np.empty(m, np.uint64))
    frozen = np.empty(4, np.uint64)
    frozen.flags.writeable = False
    for out in (np.empty(4, np.int32), np.empty(8, np.uint64)[::2], frozen):
        with pytest.raises(ValueError, match=r"Buffer dtype|not C.?contiguous|contiguous|read-only"):
            permute((0, 0), 4, 0, out)
    for position in (-1, 10, 2**62):
        with pytest.raises(ValueError, match=r"not inside \[0, 10\)"):
            permute_at(b"k" * 16, 10, np.array([3, position]), np.empty(2, np.int64))
    with pytest.raises(ValueError, match="one length"):
        permute_at(b"k" * 16, 10, np.array([3, 4]), np.empty(3, np.int64))


def unlike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two orders of the same n have no more to do with each other than two shuffles."""
    agreeing = np.count_nonzero(one == other)
    return bool(agreeing < 12 and abs(np.corrcoef(one, other)[0, 1]) < LIMIT / math.sqrt(len(one)))


def test_neighbouring_seeds_and_epochs_give_orders_that_have_nothing_in_common() -> None:
    n = 20_000
    orders = [shuffled(derive_key(seed, "rows", epoch, 0), n) for seed in range(6) for epoch in range(6)]
    orders.append(shuffled(derive_key(-1, "rows", 0, 0), n))
    for one, other in itertools.combinations(orders, 2):
        assert unlike(one, other)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any), st.one_of(st.none(), KEYS), st.data())
def test_rows_are_found_in_the_blocks_that_hold_them_counted_from_each_row_start(
    records: list[int], key: tuple[int, int] | bytes | None, data: st.DataObject
) -> None:
    first = np.concatenate([[0], np.cumsum(records)]).astype(np.int64)
    n, n_blocks = int(first[-1]), len(records)
    starts = data.draw(st.none() | st.lists(st.integers(0, 2**31), min_size=n_blocks, max_size=n_blocks))
    lo = data.draw(st.integers(0, n))
    hi = data.draw(st.integers(lo, n))
    block, row = np.empty(hi - lo, np.uint32), np.empty(hi - lo, np.uint32)
    finder = RowFinder(first, key, None if starts is None else np.array(starts, np.uint32))
    finder.find(lo, block, row)
    expected = np.arange(lo, hi) if key is None else shuffled(key, n, lo, hi - lo).astype(np.int64)
    assert np.array_equal(block, np.searchsorted(first, expected, side="right") - 1)
    assert np.array_equal(row, expected - first[block] + np.array(starts or [0] * n_blocks)[block])
    assert (finder.n_rows, finder.n_blocks) == (n, n_blocks)


@pytest.mark.parametrize("start", [0, 2**32 - 5, 2**32 - 1, 2**32, 2**33 - 12])
def test_rows_are_found_in_blocks_of_the_maximum_size(start: int) -> None:
    most = 2**32 - 1
    first = np.array([0, 0, most, most, 2 * most, 2 * most + 4, 2 * most + 4], np.int64)
    block, row = np.empty(10, np.uint32), np.empty(10, np.uint32)
    RowFinder(first, None).find(start, block, row)
    expected = np.arange(start, start + 10)
    assert np.array_equal(block, np.searchsorted(first, expected, side="right") - 1)
    assert np.array_equal(row, expected - first[block])


def test_invalid_rows_and_positions_of_a_finder_raise_an_error() -> None:
    for first in ([0], [0, 0], [1, 2], [0, 5, 3], [0, -1, 4], [0, 2**32, 2**32 + 1]):
        with pytest.raises(ValueError, match=r"first must be|rows; a block"):
            RowFinder(np.array(first, np.int64), None)
    with pytest.raises(ValueError, match="a number for each of 2 blocks, got 3"):
        RowFinder(np.array([0, 4, 8], np.int64), None, np.zeros(3, np.uint32))
    finder = RowFinder(np.array([0, 4], np.int64), None)
    for start, m_block, m_row in ((0, 5, 5), (4, 1, 1), (-1, 1, 1), (0, 2, 3)):
        with pytest.raises(ValueError, match=r"not inside|one length"):
            finder.find(start, np.empty(m_block, np.uint32), np.empty(m_row, np.uint32))


@given(key=KEYS, n=st.integers(1, 3000), data=st.data())
def test_records_at_any_positions_are_those_of_the_whole_permutation(key, n, data):
    positions = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=50)), np.int64)
    expected = shuffled(key, n)[positions].tolist()
    out = np.empty(len(positions), np.int64)
    permute_at(key, n, positions, out)
    assert out.tolist() == expected
    permute_at(key, n, positions, positions)  # in place
    assert positions.tolist() == expected
