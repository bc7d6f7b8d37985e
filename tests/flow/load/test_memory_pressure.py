"""Windows that do not fit memory: blocks are read again and again, in one order, with one warning, never refused."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.records import ids_of

import tiercache as tc
from tiercache.data.opened_version import OpenedVersion
from tiercache.load.windows import MemoryPressure


def limited(monkeypatch, limit_bytes):
    monkeypatch.setattr("tiercache.config.memory_limit_bytes", lambda: limit_bytes)


def make_loader(path, **options):
    options = tc.LoaderOptions(seed=4, shuffle_window_bytes="all", memory_bytes="1MiB", threads=1, **options)
    return tc.DataLoader(tc.Dataset(path), batch_size=16, shuffle=True, options=options)


@pytest.mark.parametrize("streams", [1, 4])
def test_with_too_little_memory_the_same_is_served_with_one_warning(make_dataset, monkeypatch, streams):
    path = make_dataset(200, compression="zstd:3")
    whole = ids_of(make_loader(path, shuffle_streams=streams))
    limited(monkeypatch, 32 << 10)
    loads = Counter()
    load = OpenedVersion.load_blocks

    def counted(self, shard, blocks):
        loads.update((shard, block) for block in blocks)
        return load(self, shard, blocks)

    monkeypatch.setattr(OpenedVersion, "load_blocks", counted)
    loader = make_loader(path, shuffle_streams=streams)
    with pytest.warns(RuntimeWarning, match=r"read and decoded again and again.*shuffle_window_bytes") as told:
        epochs = [ids_of(loader), ids_of(loader)]
    assert len(told) == 1
    assert epochs[0] == whole
    assert sorted(itertools.chain(*epochs[1])) == list(range(200))
    assert max(loads.values()) > 10


def test_mapped_windows_count_no_memory_and_cause_no_warning(make_dataset, monkeypatch):
    path = make_dataset(500, compression="none")
    whole = ids_of(make_loader(path))
    limited(monkeypatch, 32 << 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ids_of(make_loader(path)) == whole


def test_enough_memory_for_two_windows_of_each_stream_is_enough(make_dataset, monkeypatch):
    path = make_dataset(500, compression="zstd:3")
    raw_bytes = sum(int(table.raw_bytes.sum()) for table in tables_of(path))
    limited(monkeypatch, 5 * raw_bytes)  # a block that is cut between streams counts in both
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sorted(itertools.chain(*ids_of(make_loader(path, shuffle_streams=3)))) == list(range(500))


def tables_of(path):
    source = tc.Dataset(path)._source
    return source.block_sizes(range(len(source.shard_records)))


@given(
    st.lists(st.lists(st.integers(1, 100), min_size=1, max_size=9), min_size=1, max_size=4),
    st.integers(1, 400),
    st.integers(0, 2**32 - 1),
    st.integers(1, 300),
)
def test_slices_are_the_pieces_rows_in_order_and_each_needs_blocks_that_fit(sizes, room_bytes, seed, n_rows):
    random = np.random.default_rng(seed)
    windows = tuple(
        SimpleNamespace(blocks=np.arange(len(of_window)), block_bytes=np.array(of_window, np.int64))
        for of_window in sizes
    )
    block = random.integers(0, sum(map(len, sizes)), n_rows).astype(np.uint32)
    row = random.integers(0, 1 << 20, n_rows).astype(np.uint32)
    piece = SimpleNamespace(windows=windows, rows=lambda: (block, row))
    slices = list(MemoryPressure(lambda _: False, 4 * room_bytes).slices(piece))
    assert np.array_equal(np.concatenate([part.block for part in slices]), block)
    assert np.array_equal(np.concatenate([part.row for part in slices]), row)
    all_bytes = np.concatenate([window.block_bytes for window in windows])
    for part in slices:
        assert part.n_rows > 0
        touched = np.concatenate(part.needed)
        assert set(np.flatnonzero(touched)) == set(part.block.tolist())
        assert all_bytes[touched].sum() <= room_bytes or touched.sum() == 1
