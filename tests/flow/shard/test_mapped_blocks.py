"""Blocks of a mapped shard that the reader keeps: a selection of them equals blocks that are loaded alone."""

import numpy as np
import pytest
from tests.support.mixed_shard import SCHEMA, fill, wait_until_settled

from tiercache.shard.reader import ShardReader
from tiercache.store.local import LocalFolder

RAW = [SCHEMA.index(name) for name in ("i", "t", "b", "r", "n")]


@pytest.fixture
def folder(tmp_path):
    store = LocalFolder(tmp_path)
    info = fill(store)
    wait_until_settled(store.root / info.name)
    return store, info


@pytest.mark.parametrize("chosen", [[0], [1], [1, 0], range(1, 3), [2, 0, 2], []])
def test_blocks_selected_from_a_mapped_shard_equal_blocks_loaded_alone(folder, chosen):
    store, info = folder
    with ShardReader(store, info.name) as reader, ShardReader(store, info.name, verify="always") as alone:
        whole, part, anew = (
            reader.load_blocks(range(3), RAW),
            reader.load_blocks(chosen, RAW),
            alone.load_blocks(chosen, RAW),
        )
        assert reader.footer.n_blocks == 3
        assert reader.load_blocks(range(3), RAW) is reader.mapped_blocks(RAW) is whole
        assert part.blocks == anew.blocks == tuple(chosen)
        assert part.n_rows.tolist() == anew.n_rows.tolist()
        assert np.array_equal(part.addresses, whole.addresses[:, list(chosen)])
        assert part.addresses.flags.c_contiguous
        shift = (
            reader.local_copy.map_file().__array_interface__["data"][0]
            - alone.local_copy.map_file().__array_interface__["data"][0]
        )
        assert (part.pages - np.array([shift % 2**64, 0], np.uint64)).tolist() == anew.pages.tolist()
        assert (part.pending_checks is None) is (anew.pending_checks is None) is (not chosen)
        for position in range(len(chosen)):
            for column in RAW:
                assert part.array(position, column).equals(anew.array(position, column))
        assert part.pending_checks is None  # found right by it, and so by all
        left = whole.pending_checks
        assert left is None or not left[:, list(chosen)].any()
        whole.reset_checks()
        assert (part.pending_checks is None) is (not chosen)
