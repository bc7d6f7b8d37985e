"""Copies of long rows and runs, and batches that several threads copy: every byte is right."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiercache._native import gather
from tiercache._native.ring import END, Plan, Ring, override_distance

PAGE = 4096
MEMORY = np.random.default_rng(5).integers(0, 256, 1 << 20, np.uint8)


@pytest.fixture(autouse=True, scope="module", params=[False, True], ids=["by the caches", "past the caches"])
def passes(request):
    """What another core is to read is copied by other instructions."""
    gather.set_nontemporal_copies(request.param)
    override_distance(request.param)
    yield request.param
    gather.set_nontemporal_copies(False)
    override_distance(None)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2 * PAGE),
    st.integers(0, 200),
    st.one_of(st.integers(1000, 1100), st.integers(1, 5 * PAGE)),
    st.integers(1, 9),
    st.booleans(),
)
def test_rows_of_any_width_are_copied_between_any_alignments(start, target, width, n_rows, is_run):
    blocks = np.zeros(n_rows, np.uint32)
    order = np.arange(n_rows) if is_run else np.random.default_rng(width).permutation(n_rows)
    rows = MEMORY[start : start + n_rows * width].reshape(n_rows, width)
    out = np.full(target + n_rows * width + 64, 7, np.uint8)
    addresses = np.array([[rows.ctypes.data, 0, 0]], np.uint64)
    place = memoryview(out)[target : target + n_rows * width]
    gather.gather(gather.FIXED, width, addresses, blocks, order.astype(np.uint32), place)
    assert np.array_equal(out[target : target + n_rows * width].reshape(n_rows, width), rows[order])
    assert (out[:target] == 7).all()
    assert (out[target + n_rows * width :] == 7).all()


def test_a_target_just_behind_its_source_in_a_page_is_copied_correctly():
    width, out = 3 * PAGE, np.zeros(8 * PAGE, np.uint8)
    for behind in range(0, 2 * PAGE, 13):
        at = (MEMORY.ctypes.data + behind - out.ctypes.data) % PAGE
        addresses = np.array([[MEMORY.ctypes.data, 0, 0]], np.uint64)
        one = np.zeros(1, np.uint32)
        gather.gather(gather.FIXED, width, addresses, one, one, memoryview(out)[at : at + width])
        assert np.array_equal(out[at : at + width], MEMORY[:width])


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("is_run", [True, False])
def test_a_batch_gathered_by_several_threads_equals_that_of_one_thread(n_threads, is_run):
    """3.4 MB a batch, in shares of 256 KiB; batches end inside plans, plans inside shares."""
    rng, width, n = np.random.default_rng(1), 9000, 700
    fixed = rng.integers(0, 256, (n, width), np.uint8)
    sizes = rng.integers(0, 3000, n)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    values = rng.integers(0, 256, offsets[-1], np.uint8)
    addresses = np.array(
        [[[fixed.ctypes.data, 0, 0]], [[values.ctypes.data, offsets.ctypes.data, len(values)]]], np.uint64
    )
    streams = np.array([[gather.FIXED, width], [gather.VAR, 1]], np.uint32)
    orders = [np.arange(n) if is_run else rng.permutation(n) for _ in range(3)]
    ring = Ring(streams, batch_rows=320, depth=3, n_threads=n_threads)
    for order in orders:
        assert ring.push(Plan(addresses, np.zeros(n, np.uint32), order.astype(np.uint32), None))
    ring.finish()
    rows = iter(np.concatenate(orders))
    while not isinstance(slot := ring.take(10), int):
        memory = np.frombuffer(memoryview(slot), np.uint8)
        at, (start, head, n_elements) = slot.stream_position(0)[0], slot.stream_position(1)
        ends = np.frombuffer(memoryview(slot), np.int64, slot.n_rows + 1, head)
        assert ends[-1] == n_elements
        for i in range(slot.n_rows):
            row = next(rows)
            assert np.array_equal(memory[at + i * width : at + (i + 1) * width], fixed[row])
            assert np.array_equal(
                memory[start + ends[i] : start + ends[i + 1]], values[offsets[row] : offsets[row + 1]]
            )
    assert slot == END
    assert next(rows, None) is None
    ring.close()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.just(0), st.integers(1, 300), st.integers(1, 9000)), min_size=1, max_size=60), st.data())
def test_rows_of_any_lengths_are_copied_in_any_order(sizes, data):
    """Short ones, those of middling length, which are asked for ahead, and long ones, together and apart."""
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    values = np.resize(MEMORY, offsets[-1] + 1)
    order = np.array(data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=80)))
    addresses = np.array([[values.ctypes.data, offsets.ctypes.data, offsets[-1]]], np.uint64)
    ring = Ring(np.array([[gather.VAR, 1]], np.uint32), batch_rows=len(order), depth=1, n_threads=2)
    assert ring.push(Plan(addresses[None], np.zeros(len(order), np.uint32), order.astype(np.uint32), (values, offsets)))
    ring.finish()
    slot = ring.take(10)
    start, head, n_elements = slot.stream_position(0)
    found = np.frombuffer(memoryview(slot), np.uint8)[start : start + n_elements]
    ends = np.frombuffer(memoryview(slot), np.int64, len(order) + 1, head)
    assert ends.tolist() == [0, *np.cumsum(np.array(sizes)[order])]
    assert found.tobytes() == b"".join(values[offsets[i] : offsets[i + 1]].tobytes() for i in order)
    ring.close()


def test_portable_kernels_give_the_same_result(passes):
    """Forced, for no other run on a processor with the string instruction would try them."""
    if passes:
        return  # the run by the caches has started the tests of both
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "not portable"],
        env={**os.environ, "TIERCACHE_KERNEL": "portable"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
