"""Memory of rows is lent again when nothing refers to it, and never before."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tiercache.order.window import MOST_ROWS, allocate_rows

N = 100_000


@pytest.fixture(autouse=True)
def _nobody_else_has_some():
    gc.collect()


def place(array):
    return array.ctypes.data


def test_an_array_without_references_is_reused():
    rows = allocate_rows(N)
    at = place(rows)
    del rows
    assert place(allocate_rows(MOST_ROWS)) == at


@pytest.mark.parametrize(
    "refer",
    [lambda rows: rows[10:20], lambda rows: rows.view(np.int32), memoryview, lambda rows: rows[::2].reshape(2, -1)],
    ids=["slice", "other dtype", "memoryview", "view of a view"],
)
def test_a_referenced_array_is_not_reused(refer):
    rows = allocate_rows(N)
    at = place(rows)
    view = refer(rows)
    del rows
    assert at not in {place(allocate_rows(N)) for _ in range(20)}
    del view
    assert place(allocate_rows(N)) == at


def test_arrays_that_are_lent_at_a_time_do_not_overlap():
    held = [allocate_rows(N) for _ in range(10)]
    for number, rows in enumerate(held):
        rows[:] = number
    assert [int(rows.min()) == int(rows.max()) == n for n, rows in enumerate(held)] == [True] * 10


def test_few_rows_and_more_than_are_kept_are_new_arrays():
    for n in (0, 1, 1000, MOST_ROWS + 1):
        rows = allocate_rows(n)
        assert (rows.dtype, rows.shape) == (np.uint32, (n,))
        assert rows.base is None


def test_two_threads_never_get_the_same_array():
    def fill(number):
        for _ in range(200):
            rows = allocate_rows(N)
            rows[:] = number
            if not (rows == number).all():
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(fill, range(4))) == [True] * 4
