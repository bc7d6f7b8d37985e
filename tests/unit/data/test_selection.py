"""Selections compared with plain lists of numbers."""

from __future__ import annotations

import pickle

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tiercache.data.records import Selection
from tiercache.order.explicit import PermutedOrder

N = 60
NUMBERS = st.lists(st.integers(0, N - 1), max_size=80)
SPAN = st.tuples(st.integers(0, N), st.integers(0, N)).map(lambda ends: list(range(*sorted(ends))))
ANY = st.one_of(NUMBERS, NUMBERS.map(sorted), SPAN, NUMBERS.map(lambda numbers: sorted(set(numbers))))


def selection(numbers: list[int]) -> Selection:
    return Selection.of(np.array(numbers, np.int64))


def served(chosen: Selection) -> list[int]:
    return chosen.numbers(np.arange(len(chosen))).tolist()


@given(numbers=ANY)
def test_a_selection_serves_its_numbers_in_their_order(numbers):
    chosen = selection(numbers)
    assert served(chosen) == [chosen.number(place) for place in range(len(numbers))] == numbers
    assert len(chosen) == len(numbers)
    assert chosen.stored_numbers(np.arange(len(chosen))).tolist() == sorted(numbers)
    assert chosen.stop == max(numbers, default=-1) + 1
    assert chosen.is_all(N) == (numbers == list(range(N)))


@given(numbers=ANY, below=st.lists(st.integers(0, N + 5), max_size=20))
def test_numbers_below_any_number_are_counted(numbers, below):
    found = selection(numbers).n_below(np.array(below, np.int64)).tolist()
    assert found == [sum(number < limit for number in numbers) for limit in below]


@given(numbers=ANY, data=st.data())
def test_selections_compose(numbers, data):
    if not numbers:
        return
    places = data.draw(st.one_of(st.lists(st.integers(0, len(numbers) - 1)), st.just(list(range(len(numbers) // 2)))))
    whole = selection(numbers)
    chosen = whole.compose(selection(places))
    assert served(chosen) == [numbers[place] for place in places]
    if len(set(numbers)) == len(numbers):  # of repeated numbers, several orders of places serve the same
        assert chosen.digest == selection([numbers[place] for place in places]).digest


@given(a=ANY, b=ANY)
def test_digests_are_equal_only_for_equal_numbers_in_equal_order(a, b):
    assert (selection(a).digest == selection(b).digest) == (a == b)


def test_a_range_costs_the_same_whatever_its_length():
    assert Selection.span(5, 10**15).n_bytes == Selection.span(5, 6).n_bytes == 24
    assert served(Selection.span(7, 7)) == served(Selection.span(7, 3)) == []
    assert Selection.span(3, 10**15).compose(Selection.span(10**6, 10**14)).n_bytes == 24


def test_adjacent_runs_are_merged():
    joined = Selection.of_runs(np.array([0, 4, 9]), np.array([4, 2, 1]))
    assert served(joined) == [0, 1, 2, 3, 4, 5, 9]
    assert joined.starts.tolist() == [0, 9]


def test_the_order_of_a_hundred_million_records_takes_no_memory():
    n = 10**8
    every = Selection.span(0, n)
    shuffled = Selection(every.starts, every.first, PermutedOrder(b"k" * 16, n))
    composed = every.compose(shuffled)
    assert isinstance(composed.order, PermutedOrder)
    assert composed.n_bytes == every.n_bytes < 100
    assert len(pickle.dumps(composed)) < 500
    assert pickle.loads(pickle.dumps(composed)).digest == composed.digest
    first = composed.numbers(np.arange(1000))
    assert len(np.unique(first)) == 1000
    assert [composed.number(place) for place in range(5)] == first[:5].tolist()
    assert np.array_equal(composed.order[5:9], first[5:9])
    assert np.array_equal(composed.order[9:2:-3], first[9:2:-3])
    assert composed.compose(Selection.span(10, 20)).numbers(np.arange(10)).tolist() == first[10:20].tolist()
