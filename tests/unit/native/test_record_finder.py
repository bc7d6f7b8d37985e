"""The record finder against a plain search, and what its results keep alive."""

from __future__ import annotations

import gc
import os
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache._native.record_finder import BlockTable, RecordFinder, normalize_indices
from tiercache.waiting import wait_for

N_STREAMS = 2


class Owner:
    """Something that a weak reference can follow."""


def table_of(blocks: list[int], shard: int, *, checked: bool = True, owner: object = None) -> BlockTable:
    """A table whose words say which shard, stream and block they are of."""
    first = np.cumsum([0, *blocks]).astype(np.uint64)
    words = np.arange(4, dtype=np.uint64)
    stream, block = np.arange(N_STREAMS, dtype=np.uint64), np.arange(len(blocks), dtype=np.uint64)
    name = shard * 10_000 + 1000 * stream[:, None] + 10 * block[None, :]
    words = name.astype(np.uint64)[:, :, None] + words
    return BlockTable(first, np.ascontiguousarray(words[:, :, :3]), 5 + words if checked else None, owner)


def test_a_table_is_dropped_once_its_file_has_another_ctime(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"as it was")
    with path.open("rb") as file:
        changed_ns = os.fstat(file.fileno()).st_ctime_ns

        def put(pause_ns: int = 0) -> RecordFinder:
            finder = RecordFinder(np.array([0, 3], np.int64), 1)
            places = np.zeros((1, 1, 3), np.uint64)
            watched = file.fileno(), changed_ns, pause_ns
            finder.put(0, BlockTable(np.array([0, 3], np.uint64), places, None, None, watched))
            return finder

        for_one, for_many, pausing = put(), put(), put(1 << 60)
        for _ in range(2):
            assert for_one.find_one(1) is not None
            assert for_many.find(np.array([1, 2])) is not None
            assert pausing.find_one(1) is not None
        assert wait_for(lambda: os.utime(path) or path.stat().st_ctime_ns != changed_ns, 60.0)
        assert for_one.find_one(1) is None
        assert for_many.find(np.array([1, 2])) is None
        assert pausing.find_one(1) is not None
        assert 0 not in for_one
        assert 0 not in for_many


shards_of = st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=6)


@given(shards=shards_of, data=st.data())
def test_every_record_is_found_in_its_shard_block_and_row(shards, data):
    first_record = np.cumsum([0, *map(sum, shards)]).astype(np.int64)
    n = int(first_record[-1])
    finder = RecordFinder(first_record, N_STREAMS)
    checked = data.draw(st.lists(st.booleans(), min_size=len(shards), max_size=len(shards)))
    for shard, blocks in enumerate(shards):
        if blocks:
            finder.put(shard, table_of(blocks, shard, checked=checked[shard]))
    places = [
        (shard, block, row)
        for shard, blocks in enumerate(shards)
        for block, rows in enumerate(blocks)
        for row in range(rows)
    ]
    assert len(places) == n
    if not n:
        return
    asked = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=12))
    one_by_one = [finder.find_one(record) for record in asked]
    together = finder.find(np.array(asked, np.int64))
    for i, record in enumerate(asked):
        shard, block, row = places[record]
        for addresses, checks, of_block, of_row, _ in (together, one_by_one[i]):
            at = i if len(of_row) > 1 else 0
            assert of_row[at] == row
            for stream in range(N_STREAMS):
                name = shard * 10_000 + 1000 * stream + 10 * block
                assert addresses[stream][of_block[at]].tolist() == [name, name + 1, name + 2]
                if checked[shard]:
                    assert checks[stream][of_block[at]].tolist() == [name + 5 + k for k in range(4)]
                else:
                    assert checks is None or not checks[stream][of_block[at]].any()


def test_records_of_a_shard_without_a_table_are_not_found():
    finder = RecordFinder(np.array([0, 4, 8]), N_STREAMS)
    finder.put(0, table_of([4], 0))
    assert finder.find(np.array([0, 3])) is not None
    assert finder.find(np.array([0, 5])) is None
    assert finder.find_one(5) is None
    finder.put(1, table_of([1, 3], 1))
    assert finder.find(np.array([0, 5])) is not None
    assert (1 in finder, len(finder)) == (True, 2)
    finder.forget(1)
    finder.forget(1)
    finder.forget(99)
    assert finder.find_one(5) is None
    assert (1 in finder, 99 in finder, len(finder)) == (False, False, 1)
    finder.clear()
    assert finder.find_one(0) is None


@pytest.mark.parametrize("record", [-1, 8, 2**62])
def test_a_record_out_of_range_raises_index_error(record):
    finder = RecordFinder(np.array([0, 8]), N_STREAMS)
    finder.put(0, table_of([8], 0))
    with pytest.raises(IndexError, match="data set of 8"):
        finder.find_one(record)
    with pytest.raises(IndexError, match="data set of 8"):
        finder.find(np.array([0, record]))


def test_invalid_tables_raise_an_error():
    finder = RecordFinder(np.array([0, 8]), N_STREAMS)
    with pytest.raises(ValueError, match="another number of records"):
        finder.put(0, table_of([4], 0))
    with pytest.raises(ValueError, match="a shard below 1"):
        finder.put(1, table_of([8], 0))
    with pytest.raises(ValueError, match="2 streams"):
        finder.put(0, BlockTable(np.array([0, 8], np.uint64), np.zeros((1, 1, 3), np.uint64), None, None))
    first = np.array([0, 8], np.uint64)
    for addresses, checks in [((2, 2, 3), None), ((2, 1, 2), None), ((2, 1, 3), (1, 1, 4)), ((2, 1, 3), (2, 1, 3))]:
        with pytest.raises(ValueError, match="need the shape"):
            BlockTable(first, *(None if s is None else np.zeros(s, np.uint64) for s in (addresses, checks)), None)
    for rows in ([1, 8], [0, 9, 8]):
        with pytest.raises(ValueError, match="start at 0"):
            BlockTable(np.array(rows, np.uint64), np.zeros((2, len(rows) - 1, 3), np.uint64), None, None)
    with pytest.raises(ValueError, match="one number more"):
        RecordFinder(np.zeros(0, np.int64), 1)


def test_a_result_keeps_its_owner_after_the_table_is_dropped():
    finder, owner = RecordFinder(np.array([0, 8]), N_STREAMS), Owner()
    finder.put(0, table_of([8], 0, owner=owner))
    alive = weakref.ref(owner)
    del owner
    found = [finder.find_one(3), finder.find(np.array([3, 4]))]
    finder.forget(0)
    for _ in range(2):
        gc.collect()
        assert alive() is not None
        found.pop()
    gc.collect()
    assert alive() is None


@given(records=st.lists(st.integers(-9, 9), max_size=6), n_records=st.integers(0, 9))
def test_negative_records_count_from_the_end(records, n_records):
    given_records = np.array(records, np.int64)
    if all(-n_records <= record < n_records for record in records):
        found = normalize_indices(given_records, n_records)
        assert found.tolist() == [record % n_records for record in records]
        assert (found is given_records) == all(record >= 0 for record in records)
        assert given_records.tolist() == records
    else:
        with pytest.raises(IndexError, match=f"data set of {n_records}"):
            normalize_indices(given_records, n_records)
