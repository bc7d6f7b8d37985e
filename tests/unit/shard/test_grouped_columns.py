"""Small columns whose chunks lie together: which columns they are, and that readers see the same records."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import later_release as later

import tiercache as tc
from tiercache.errors import CorruptShard
from tiercache.shard.footer import GROUPED_COLUMNS, Tail
from tiercache.shard.reader import ShardReader
from tiercache.shard.schema import Schema
from tiercache.shard.shard_file import GROUP_BYTES, columns_to_group
from tiercache.shard.verify import verify_shard
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store import MemoryStore
from tiercache.store.contract import MAX_GAP_BYTES, WrapperStore

N, ROWS_A_BLOCK = 160, 10
SCHEMA = Schema.of({"label": "int64", "x": tc.Tensor("uint8", (50_000,)), "name": "str"})


class CountingStore(WrapperStore):
    """Counts the ranges that are read."""

    def __init__(self, inner):
        super().__init__(inner)
        self.ranges = []

    def read_into(self, key, spans, **options):
        self.ranges += [span for span, _ in spans]
        super().read_into(key, spans, **options)


def columns():
    x = np.random.default_rng(0).integers(0, 255, (N, 50_000), dtype=np.uint8)
    return {"label": np.arange(N), "x": x, "name": [f"name {i}" for i in range(N)]}


@pytest.fixture(scope="module", params=["none", "zstd:1"])
def packed(request):
    store = MemoryStore(f"grouped-{request.param}")
    options = ShardOptions(block_bytes=ROWS_A_BLOCK * 50_200, compression=request.param)
    with ShardWriter(store, SCHEMA, options) as writer:
        writer.write_batch(columns())
        (info,) = writer.finish()
    return store, info


def test_small_columns_of_large_blocks_are_read_by_one_request(packed):
    store, info = packed
    counting, expected = CountingStore(store), columns()
    with ShardReader(counting, info.name, info=info) as reader:
        n_blocks = reader.footer.n_blocks
        assert n_blocks > 10
        counting.ranges.clear()
        labels, names = (reader.load_blocks(range(n_blocks), [column]) for column in (0, 2))
        assert len(counting.ranges) == 2
        for block, first in enumerate(reader.footer.block_first[:-1].tolist()):
            last = int(reader.footer.block_first[block + 1])
            assert labels.array(block, 0).to_pylist() == list(range(first, last))
            assert names.array(block, 2).to_pylist() == expected["name"][first:last]
    assert list(verify_shard(store, info.name)) == []


def test_a_shard_without_the_feature_must_have_its_chunks_in_the_order_of_the_table(packed):
    store, info = packed
    data = store.get(info.name)
    tail = Tail.parse(data[-64:], len(data), "memory://grouped")
    assert tail.features == GROUPED_COLUMNS
    changed = bytearray(data[-64:])
    changed[40:44] = bytes(4)
    store.put("without", data[:-64] + later.resum_tail(changed))
    with pytest.raises(CorruptShard, match="not aligned, or overlap"):
        ShardReader(store, "without")


@given(st.lists(st.integers(0, 4 << 20), min_size=1, max_size=6), st.integers(0, 3000))
def test_grouped_columns_are_small_together_and_leave_a_gap_dearer_than_a_request(sizes, n_blocks):
    grouped = columns_to_group(sizes, n_blocks)
    assert sum(sizes[column] for column in grouped) * n_blocks <= GROUP_BYTES
    if grouped:
        assert n_blocks > 1
        assert sum(size for column, size in enumerate(sizes) if column not in grouped) > MAX_GAP_BYTES
        assert max(sizes[column] for column in grouped) <= min(
            size for column, size in enumerate(sizes) if column not in grouped
        )
