"""Which shards a verb is about: the order of a training without its loader, shares, lists, ranks."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.cli.warm import (
    Training,
    epoch_reads,
    merge_reads,
    parse_ranks,
    parse_training,
    select_shards,
)
from tiercache.model import ShardInfo
from tiercache.shard.versions import ShardTable, new_segment, parse_segment


def table(sizes, records=None):
    records = records or [10] * len(sizes)
    infos = [
        ShardInfo(f"shards/{i:04d}.tcs", f"{i:032x}", n, size, i, size - 20, 10)
        for i, (n, size) in enumerate(zip(records, sizes, strict=True))
    ]
    ref, data = new_segment(infos)
    return ShardTable([parse_segment(pa.py_buffer(data), ref, url="x")])


shards = st.lists(st.tuples(st.integers(0, 50), st.integers(100, 10_000)), min_size=1, max_size=40)


@given(
    shards=shards,
    seed=st.integers(0, 99),
    epoch=st.integers(0, 3),
    world_size=st.integers(1, 6),
    placement=st.sampled_from(["sticky", "global"]),
)
def test_all_ranks_together_read_everything(shards, seed, epoch, world_size, placement):
    records, sizes = np.array(shards, np.int64).T.copy()
    reads = epoch_reads(records, sizes, Training(seed, epoch, tuple(range(world_size)), world_size, placement))
    for mine in reads.values():
        assert mine.clock.tolist() == (np.cumsum(sizes[mine.shards]) - sizes[mine.shards]).tolist()
    assert sorted(merge_reads(list(reads.values())).tolist()) == np.flatnonzero(records).tolist()


class TestChoice:
    def test_the_whole_data_set_in_stored_order_is_the_default(self):
        assert select_shards(table([100] * 4)).tolist() == [0, 1, 2, 3]

    def test_a_share_is_taken_of_what_the_globs_leave_in_the_order_of_the_training(self):
        found = table([100] * 20)
        training = Training(5, ranks=(1,), world_size=2)
        whole = epoch_reads(found.n_records, found.n_bytes, training)[1].shards.tolist()
        even = [i for i in whole if i % 2 == 0]
        chosen = select_shards(found, ["*[02468].tcs"], training=training, limit="50%")
        assert chosen.tolist() == even[: -(-len(even) // 2)]
        assert select_shards(found, training=training, limit="250").tolist() == whole[:3]


class TestFlags:
    @pytest.mark.parametrize("texts", [["8/8"], ["x"], ["2-1/8"], ["1"], ["1/0"], ["0/2", "0/4"], ["-1/4"]])
    def test_what_is_no_rank_is_an_error(self, texts):
        with pytest.raises(ValueError, match="--rank"):
            parse_ranks(texts)

    def test_a_flag_of_the_order_needs_the_seed(self):
        with pytest.raises(ValueError, match="--rank needs --seed"):
            parse_training(None, ["0/2"])

    def test_an_order_that_cannot_be_is_an_error(self):
        with pytest.raises(ValueError, match="--placement must be sticky or global, got 'here'"):
            parse_training(1, placement="here")
