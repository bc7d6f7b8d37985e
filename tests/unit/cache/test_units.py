"""Units of a file, against sets of bytes."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tiercache.cache import copy_file
from tiercache.model import ByteRange

UNIT = copy_file.UNIT_BYTES
MIB = 1 << 20


sizes = st.integers(0, 40 * UNIT)


@st.composite
def ranges_in(draw):
    n_bytes = draw(sizes)
    edges = st.integers(0, n_bytes + UNIT)
    pairs = draw(st.lists(st.tuples(edges, edges), max_size=6))
    return n_bytes, [ByteRange(min(pair), max(pair)) for pair in pairs]


def units_by_byte(ranges, n_bytes):
    """The units of every single byte."""
    found = {byte // UNIT for r in ranges for byte in range(r.start, min(r.end, n_bytes), UNIT)}
    found |= {(min(r.end, n_bytes) - 1) // UNIT for r in ranges if min(r.end, n_bytes) > r.start}
    return found | ({0} if not n_bytes and ranges else set())


@given(ranges_in())
def test_the_units_of_ranges_contain_their_bytes(case):
    n_bytes, ranges = case
    mask = copy_file.mask_of(ranges, n_bytes)
    assert len(mask) == max(-(-n_bytes // UNIT), 1)
    assert set(np.flatnonzero(mask).tolist()) == units_by_byte(ranges, n_bytes)
    assert copy_file.covers(mask, [r for r in ranges if r.end <= n_bytes], n_bytes)
    assert not copy_file.covers(mask, [ByteRange(n_bytes, n_bytes + 1)], n_bytes)


@given(st.lists(st.booleans(), max_size=40))
def test_runs_are_the_units_of_a_mask_and_do_not_touch(mask):
    runs = copy_file.runs_of(np.array(mask, bool))
    assert [unit for first, last in runs for unit in range(first, last)] == [
        i for i, is_set in enumerate(mask) if is_set
    ]
    assert all(last < first for (_, last), (first, _) in itertools.pairwise(runs))


@given(ranges_in(), st.sampled_from([UNIT, 3 * UNIT, 1 << 30]))
def test_pieces_contain_each_unit_once_and_respect_the_size_limit(case, request_bytes):
    n_bytes, ranges = case
    mask = copy_file.mask_of(ranges, n_bytes)
    left, bytes_seen, last = mask.copy(), 0, -1
    while piece := copy_file.next_request(left, n_bytes, request_bytes):
        assert sum(r.n_bytes for r in piece) <= request_bytes
        for found in piece:
            assert found.start % UNIT == 0
            assert found.start >= last
            last = found.end
            bytes_seen += found.n_bytes
        taken = copy_file.mask_of(piece, n_bytes)
        assert not (taken & ~left).any()
        left &= ~taken
    assert not left.any()
    assert bytes_seen == copy_file.bytes_of(mask, n_bytes)
    assert copy_file.ranges_of(mask, n_bytes) == copy_file.next_request(mask, n_bytes, 1 << 30)


def test_a_long_first_range_is_requested_alone_and_in_part():
    mask = copy_file.mask_of([ByteRange(0, 10 * UNIT), ByteRange(12 * UNIT, 13 * UNIT)], 20 * UNIT)
    assert copy_file.next_request(mask, 20 * UNIT, run_bytes=4 * UNIT) == [ByteRange(0, 4 * UNIT)]
    assert copy_file.next_request(mask, 20 * UNIT, run_bytes=10 * UNIT) == copy_file.ranges_of(mask, 20 * UNIT)


@given(ranges_in(), st.data())
def test_a_small_rest_is_fetched_with_the_missing_units(case, data):
    n_bytes, ranges = case
    present = copy_file.mask_of(data.draw(ranges_in())[1], n_bytes)
    wanted = copy_file.mask_of(ranges, n_bytes)
    fetched = copy_file.to_fetch(present, wanted, n_bytes)
    missing = wanted & ~present
    assert not (fetched & present).any()
    assert (fetched >= missing).all()
    # All of these files are below LITTLE_BYTES: whatever is fetched, the file is whole after it.
    assert (fetched | present).all() or not missing.any()


def test_a_large_rest_is_not_fetched():
    n_bytes = 64 * MIB
    nothing = np.zeros(copy_file.n_units(n_bytes), bool)
    half = copy_file.mask_of([ByteRange(0, 32 * MIB)], n_bytes)
    assert (copy_file.to_fetch(nothing, half, n_bytes) == half).all()
    most = copy_file.mask_of([ByteRange(0, 63 * MIB)], n_bytes)
    assert copy_file.to_fetch(nothing, most, n_bytes).all()
