"""How blocks of a window are split among threads, and mapped ranges into steps: properties."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tiercache.load.ahead import STEP_BYTES, count_near, plan_steps, share_of_huge_pages
from tiercache.load.split import MAX_PART_BYTES, PARTS_A_THREAD, part_bytes, split
from tiercache.order import Window

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
def test_every_wanted_block_is_in_one_part_and_a_part_is_of_one_shard_in_its_order(drawn, n_threads):
    window = make_window([b[0] for b in drawn], [b[1] for b in drawn])
    wanted = np.array([b[2] for b in drawn])
    found = split(window, wanted, n_threads, lambda shard: shard % 2 == 0)
    parts = [*found.at_hand, *found.work]
    assert sorted(place for part in parts for place in part) == np.flatnonzero(wanted).tolist()
    assert all(window.shards[part[0]] % 2 == 0 for part in found.at_hand)
    assert all(window.shards[part[0]] % 2 == 1 for part in found.work)
    assert len({int(window.shards[part[0]]) for part in found.at_hand}) == len(found.at_hand)
    for part in parts:
        assert len(set(window.shards[part])) == 1
        assert (np.diff(window.blocks[part]) > 0).all()


@given(blocks, st.integers(1, 8))
def test_a_part_is_not_larger_than_its_share_unless_it_is_one_block(drawn, n_threads):
    window = make_window([b[0] for b in drawn], [b[1] for b in drawn])
    wanted = np.ones(len(drawn), bool)
    limit = part_bytes(window.raw_bytes, n_threads)
    assert limit <= MAX_PART_BYTES
    for part in split(window, wanted, n_threads, lambda _: False).work:
        assert len(part) == 1 or int(window.block_bytes[part].sum()) <= limit


def test_a_window_in_one_shard_has_work_for_every_thread():
    window = make_window([0] * 64, [1 << 20] * 64)
    parts = split(window, np.ones(64, bool), 4, lambda _: False).work
    sizes = [int(window.block_bytes[part].sum()) for part in parts]
    assert len(parts) == 4 * PARTS_A_THREAD
    assert max(sizes) == min(sizes)


ranges = st.lists(st.tuples(st.integers(0, 1 << 15), st.integers(0, 3 * STEP_BYTES)), max_size=6)


@given(ranges)
def test_steps_hold_every_page_of_the_ranges_once_and_no_other(drawn):
    mapped, at, expected = [], 1 << 30, set()
    for gap, n_bytes in drawn:
        at += gap
        mapped.append((at, n_bytes))
        if n_bytes:
            expected.update(range(at // PAGE, (at + n_bytes - 1) // PAGE + 1))
        at += n_bytes
    steps = plan_steps(np.array(mapped, np.uint64).reshape(-1, 2))
    pages = [page for start, n in steps.tolist() for page in range(start // PAGE, (start + n) // PAGE)]
    assert pages == sorted(expected)
    assert all(start % PAGE == n % PAGE == 0 for start, n in steps.tolist())
    assert all(start // STEP_BYTES == (start + n - 1) // STEP_BYTES for start, n in steps.tolist())


@given(ranges)
def test_the_share_of_huge_pages_counts_each_of_them_once(drawn):
    at, mapped = 1 << 30, []
    for gap, n_bytes in drawn:
        mapped.append((at + gap, n_bytes))
        at += gap + n_bytes
    steps = plan_steps(np.array(mapped, np.uint64).reshape(-1, 2))
    huge = {page for start, n in steps.tolist() for page in range(start >> 21, ((start + n - 1) >> 21) + 1)}
    if len(steps):
        assert share_of_huge_pages(steps) == (len(huge) << 21) / sum(n for _, n in steps.tolist())


def test_only_the_first_parts_that_fit_together_are_brought_near():
    assert [count_near([3, 4, 5], room) for room in (-1, 2, 7, 11, 12)] == [0, 0, 2, 2, 3]
