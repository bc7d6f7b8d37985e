"""Listed records: where each lies, windows that hold what fits, and an order that follows the list."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.order.explicit import ExplicitOrder, RecordLocator, count_fitting, explicit_section
from tiercache.order.window import BlockSizes, DatasetSizes

SHARDS = st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=5)


def sizes_of(shards, asked=None):
    """The sizes of shards whose blocks have these records, and 10 bytes and one for each record."""
    tables = [BlockSizes(np.array(b, np.int64), 10 + np.array(b, np.int64)) for b in shards]

    def blocks(numbers):
        if asked is not None:
            asked.extend(numbers)
        return [tables[number] for number in numbers]

    records = np.array([sum(b) for b in shards], np.int64)
    return DatasetSizes(records, records * 100 + 7, blocks)


def all_places(shards):
    """(shard, block, row) of each record, in stored order."""
    return [(s, b, r) for s, blocks in enumerate(shards) for b, n in enumerate(blocks) for r in range(n)]


def as_list(section, lo=0, hi=None):
    block, row = section.rows(lo, section.stop - section.start if hi is None else hi)
    (window,) = section.windows
    return [(int(window.shards[b]), int(window.blocks[b]), int(r)) for b, r in zip(block, row, strict=True)]


@given(SHARDS, st.lists(st.integers(0, 99), max_size=30))
def test_records_are_located_in_any_order(shards, wanted):
    places = all_places(shards)
    numbers = np.array([w % len(places) for w in wanted] if places else [], np.int64)
    locator = RecordLocator(sizes_of(shards))
    found = locator.find(numbers)
    assert locator.n_records == len(places)
    shard, block = found.shards[found.at], found.blocks[found.at]
    assert list(zip(shard, block, found.row, strict=True)) == [places[n] for n in numbers]
    expected = [10 + shards[places[n][0]][places[n][1]] for n in numbers]
    assert found.block_bytes[found.at].tolist() == expected
    assert locator.shards(numbers).tolist() == [places[n][0] for n in numbers]


def test_only_footers_of_requested_shards_are_read_and_each_once():
    asked = []
    locator = RecordLocator(sizes_of([[3], [2, 2], [4]], asked))
    locator.find(np.array([8, 0, 9]))
    locator.find(np.array([0, 8, 10]))
    assert asked == [0, 2]
    locator.find(np.array([3]))
    assert asked == [0, 2, 1]


def test_a_footer_with_another_record_count_is_an_error_that_names_the_shard():
    dataset_sizes = DatasetSizes(
        np.array([3, 4]), np.array([1, 1]), lambda numbers: [BlockSizes([5], [9]) for _ in numbers]
    )
    with pytest.raises(ValueError, match="shard 1: its footer holds 5 records, but the version lists 4"):
        RecordLocator(dataset_sizes).find(np.array([4]))


@given(SHARDS, st.lists(st.integers(0, 99), max_size=30), st.sampled_from([None, 1, 12, 25, 60]), st.data())
def test_an_explicit_order_serves_its_list_from_any_position_in_windows_that_fit(shards, wanted, window_bytes, data):
    places = all_places(shards)
    numbers = np.array([w % len(places) for w in wanted] if places else [], np.int64)
    order = ExplicitOrder(sizes_of(shards), numbers, window_bytes)
    assert (order.n_records, order.n_streams, order.stream_records(0)) == (len(numbers), 1, len(numbers))
    position = start = data.draw(st.integers(0, len(numbers)))
    found = []
    while position < len(numbers):
        section = order.section_at(0, position)
        assert section.start <= position < section.stop
        assert order.section_at(0, position) is section
        (window,) = section.windows
        assert len(set(zip(window.shards, window.blocks, strict=True))) == len(window.blocks)
        if window_bytes is not None and len(window.blocks) > 1:
            assert window.raw_bytes <= window_bytes
        found += as_list(section, position - section.start)
        position = section.stop
    assert found == [places[n] for n in numbers[start:]]


@given(SHARDS, st.lists(st.integers(0, 99), max_size=30), st.data())
def test_shards_ahead_are_in_reading_order(shards, wanted, data):
    places = all_places(shards)
    numbers = np.array([w % len(places) for w in wanted] if places else [], np.int64)
    dataset_sizes = sizes_of(shards)
    order = ExplicitOrder(dataset_sizes, numbers, None)
    position = data.draw(st.integers(0, len(numbers)))
    expected = list(dict.fromkeys(places[n][0] for n in numbers[position:]))
    assert order.shards_ahead(0, position, None).tolist() == expected
    n_bytes = data.draw(st.integers(1, 3000))
    found = order.shards_ahead(0, position, n_bytes).tolist()
    assert found == expected[: len(found)]
    held = np.cumsum(dataset_sizes.stored_bytes[expected]).tolist()
    assert len(found) == next((i + 1 for i, total in enumerate(held) if total >= n_bytes), len(expected))


def test_positions_and_records_outside_the_order_are_refused():
    order = ExplicitOrder(sizes_of([[3]]), np.array([2, 0, 1]), None)
    for stream, position in ((1, 0), (0, -1), (0, 4)):  # another stream, before the first, behind the end
        for call in (order.section_at, lambda s, p: order.shards_ahead(s, p, None)):
            with pytest.raises(ValueError, match="outside an epoch of 3 records"):
                call(stream, position)
    with pytest.raises(ValueError, match="outside an epoch of 3 records"):
        order.section_at(0, 3)
    with pytest.raises(ValueError, match=r"positions \[1, 4\) are outside a section of 3"):
        order.section_at(0, 0).rows(1, 4)
    with pytest.raises(ValueError, match=r"record numbers -1 to 3 exceed 3 records"):
        ExplicitOrder(sizes_of([[3]]), np.array([3, -1]), None)


def test_mapped_blocks_do_not_count_towards_the_window_limit():
    locator = RecordLocator(sizes_of([[2, 2], [2, 2]]))
    found = locator.find(np.array([0, 2, 4, 1, 6]))  # blocks of 12 bytes: 0.0, 0.1, 1.0, 0.0 again, 1.1
    assert count_fitting(found, 24) == 2
    assert count_fitting(found, 36) == 4
    assert count_fitting(found, 1) == 1
    assert count_fitting(found, None) == 5
    assert count_fitting(found, 24, [0]) == 5
    assert count_fitting(found, 12, [0]) == 4
    assert count_fitting(found, 1, [1, 0]) == 5
    assert as_list(explicit_section(7, found.slice(1, 3))) == [(0, 1, 0), (1, 0, 0)]


def test_a_window_of_all_blocks_is_kept_if_it_fits_and_most_blocks_are_needed(monkeypatch):
    monkeypatch.setattr("tiercache.order.explicit.FIRST_WINDOW_ROWS", 6)
    monkeypatch.setattr("tiercache.order.explicit.MAX_WINDOW_ROWS", 6)
    numbers = np.array([0, 2, 4, 6, 0, 2, 4, 6, 1, 3, 5, 7])
    dataset_sizes = sizes_of([[2, 2], [2, 2]])  # four blocks of 12 bytes
    for window_bytes, is_mapped in ((48, lambda shard: False), (24, lambda shard: shard == 0), (1, lambda shard: True)):
        order = ExplicitOrder(dataset_sizes, numbers, window_bytes, is_mapped)
        first, second = order.section_at(0, 0), order.section_at(0, 6)
        assert first.window is second.window
        assert len(first.window.blocks) == 4
        assert as_list(first) + as_list(second) == [all_places([[2, 2], [2, 2]])[n] for n in numbers]
    order = ExplicitOrder(dataset_sizes, numbers, 47)
    assert order.section_at(0, 0).stop == 3  # a fourth block does not fit
