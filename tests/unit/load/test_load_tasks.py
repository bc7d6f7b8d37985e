"""How blocks of a window are split among threads, and mapped ranges into steps: properties."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tiercache.load.windows import (
    MAX_TASK_BYTES,
    STEP_BYTES,
    TASKS_A_THREAD,
    count_near,
    cut_load_tasks,
    cut_steps,
    task_bytes,
)
from tiercache.order.window import Window
from tiercache.shard.blocks import merge_pages

PAGE = 4096


def make_window(shards: list[int], sizes: list[int]) -> Window:
    n = len(shards)
    numbers = np.zeros(n, np.int32)
    for shard in set(shards):
        places = np.flatnonzero(np.array(shards) == shard)
        numbers[places] = np.random.default_rng(shard).permutation(len(places))
    return Window(
        group=0,
        index=0,
        start=0,
        stop=n,
        raw_bytes=sum(sizes),
        shards=np.array(shards, np.int32),
        blocks=numbers,
        block_bytes=np.array(sizes, np.int64),
        first=np.arange(n + 1),
        key=None,
    )


blocks = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40 << 20), st.booleans()), min_size=1, max_size=40)


@given(blocks, st.integers(1, 8))
def test_each_block_is_in_one_task_and_a_task_is_of_one_shard(drawn, n_threads):
    window = make_window([b[0] for b in drawn], [b[1] for b in drawn])
    needed = np.array([b[2] for b in drawn])
    mapped, loaded = cut_load_tasks(window, needed, n_threads, lambda shard: shard % 2 == 0)
    tasks = [*mapped, *loaded]
    assert sorted(place for task in tasks for place in task) == np.flatnonzero(needed).tolist()
    assert all(window.shards[task[0]] % 2 == 0 for task in mapped)
    assert all(window.shards[task[0]] % 2 == 1 for task in loaded)
    assert len({int(window.shards[task[0]]) for task in mapped}) == len(mapped)
    for task in tasks:
        assert len(set(window.shards[task])) == 1
        assert (np.diff(window.blocks[task]) > 0).all()


@given(blocks, st.integers(1, 8))
def test_a_task_is_not_larger_than_its_share_unless_it_is_one_block(drawn, n_threads):
    window = make_window([b[0] for b in drawn], [b[1] for b in drawn])
    needed = np.ones(len(drawn), bool)
    limit = task_bytes(window.raw_bytes, n_threads)
    assert limit <= MAX_TASK_BYTES
    for task in cut_load_tasks(window, needed, n_threads, lambda _: False)[1]:
        assert len(task) == 1 or int(window.block_bytes[task].sum()) <= limit


def test_a_window_in_one_shard_has_work_for_every_thread():
    window = make_window([0] * 64, [1 << 20] * 64)
    tasks = cut_load_tasks(window, np.ones(64, bool), 4, lambda _: False)[1]
    sizes = [int(window.block_bytes[task].sum()) for task in tasks]
    assert len(tasks) == 4 * TASKS_A_THREAD
    assert max(sizes) == min(sizes)


ranges = st.lists(st.tuples(st.integers(0, 1 << 15), st.integers(0, 3 * STEP_BYTES)), max_size=6)


@given(ranges)
def test_steps_hold_every_page_of_the_ranges_once_and_no_other(drawn):
    starts, n_bytes = _ranges_of(drawn)
    expected = {page for at, n in zip(starts, n_bytes, strict=True) if n for page in _pages_of(at, n)}
    pages = merge_pages(starts, n_bytes)
    steps = cut_steps(pages)
    assert [page for at, n in steps for page in range(at // PAGE, (at + n) // PAGE)] == sorted(expected)
    assert all(at % PAGE == n % PAGE == 0 for at, n in [*steps, *pages.tolist()])
    assert all(at // STEP_BYTES == (at + n - 1) // STEP_BYTES for at, n in steps)
    assert (pages[1:, 0] > pages[:-1].sum(axis=1)).all()  # what touches is one


@given(ranges, st.randoms(use_true_random=False))
def test_pages_are_the_same_in_whatever_order_the_ranges_come(drawn, random):
    starts, n_bytes = _ranges_of(drawn)
    turn = random.sample(range(len(drawn)), len(drawn))
    assert np.array_equal(merge_pages(starts[turn], n_bytes[turn]), merge_pages(starts, n_bytes))


def _ranges_of(drawn: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """(gap, bytes) of each as addresses and bytes."""
    gaps, n_bytes = np.array(drawn, np.uint64).reshape(-1, 2).T
    return np.uint64(1 << 30) + np.cumsum(gaps + n_bytes) - n_bytes, n_bytes


def _pages_of(at: int, n_bytes: int) -> range:
    return range(int(at) // PAGE, (int(at) + int(n_bytes) - 1) // PAGE + 1)


def test_only_the_first_parts_that_fit_together_are_prefetched():
    assert [count_near([3, 4, 5], room) for room in (-1, 2, 7, 11, 12)] == [0, 0, 2, 2, 3]
