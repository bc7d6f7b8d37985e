"""Blocks of a mapped shard that the reader keeps: selection, damage, and files that change."""

import os

import numpy as np
import pytest
from tests.support.mixed_shard import SCHEMA, fill, wait_until_settled

from tiercache.errors import CorruptShard
from tiercache.shard.reader import ShardReader
from tiercache.shard.schema import Schema
from tiercache.shard.writer import ShardOptions, ShardWriter
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


def test_mapped_blocks_are_kept_for_the_columns_of_the_last_call(folder):
    store, info = folder
    with ShardReader(store, info.name) as reader:
        both = reader.mapped_blocks(RAW[:2])
        assert reader.mapped_blocks(RAW[1:2]).columns == (RAW[1],)
        assert reader.mapped_blocks(RAW[:2]) is not both
        assert reader.is_mapped(RAW[:2])
        assert not reader.is_mapped([SCHEMA.index("s")])
        assert reader.mapped_blocks([SCHEMA.index("s")]) is None
        with pytest.raises(IndexError, match="blocks must be 0 to 2, got 3"):
            reader.load_blocks([0, 3], RAW[:2])


def test_mapped_blocks_are_not_kept_with_verify_always_or_compressed_chunks(folder):
    store, info = folder
    with ShardReader(store, info.name, verify="always") as reader:
        assert reader.mapped_blocks(RAW) is None
        assert reader.load_blocks([0], RAW) is not reader.load_blocks([0], RAW)
    with ShardReader(store, info.name) as reader:
        decoded = reader.load_blocks([0], [SCHEMA.index("s")])
        assert decoded.private_bytes
        assert reader.load_blocks([0], [SCHEMA.index("s")]) is not decoded
        assert not len(decoded.pages)


@pytest.mark.parametrize("is_one_block", [True, False])
def test_offsets_are_checked_again_for_each_arrow_array(tmp_path, is_one_block):
    store = LocalFolder(tmp_path)
    with ShardWriter(store, Schema.of({"b": "bytes"}), ShardOptions(compression="none"), writer_id="w") as writer:
        writer.write_batch({"b": [bytes(20_000) for _ in range(30 if is_one_block else 100)]})
    info = writer.finish()[0]
    with ShardReader(store, info.name, info=info, verify="never") as reader, ShardReader(store, info.name) as checking:
        n_blocks = reader.footer.n_blocks
        assert (n_blocks == 1) is is_one_block
        for one in (reader, checking):
            one.load_blocks(range(n_blocks), [0]).array(0, 0)
        stream = reader.load_blocks(range(n_blocks), [0]).addresses[0, 0]
        at = int(stream[1]) - reader.local_copy.map_file().__array_interface__["data"][0]
        with (store.root / info.name).open("r+b") as file:
            file.seek(at + 8)
            file.write((1 << 40).to_bytes(8, "little"))
        wait_until_settled(store.root / info.name)
        for blocks in ([0], range(n_blocks)):
            with pytest.raises(CorruptShard, match="offsets decrease or exceed"):
                reader.load_blocks(blocks, [0]).array(0, 0)
        with pytest.raises(CorruptShard, match="CRC-32C of page 0"):
            checking.load_blocks([0], [0]).array(0, 0)


def test_a_truncated_file_is_detected_when_mapped_blocks_are_reused(folder):
    store, info = folder
    with ShardReader(store, info.name) as reader:
        reader.load_blocks([0], RAW)
        os.truncate(store.root / info.name, info.n_bytes - 1)
        for blocks in ([0], range(3)):
            with pytest.raises(CorruptShard, match="shorter than"):
                reader.load_blocks(blocks, RAW)
