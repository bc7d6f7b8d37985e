"""verify_shard names all damage in one pass over the bytes."""

from dataclasses import replace

import numpy as np
import pytest

from tiercache._native.checksum import crc32c
from tiercache.errors import CorruptShard
from tiercache.model import ShardInfo
from tiercache.shard.footer import Tail
from tiercache.shard.reader import ShardReader
from tiercache.shard.schema import Ragged, Schema, Tensor
from tiercache.shard.verify import Finding, verify_shard
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store.memory import MemoryStore

SCHEMA = Schema.of({"t": Tensor("uint8", (5000,)), "s": "str", "r": Ragged("bfloat16", (None,))})


@pytest.fixture
def shard(request) -> tuple[MemoryStore, ShardInfo]:
    store = MemoryStore(f"verify-{request.node.name}")
    options = ShardOptions(block_bytes=100_000, compression={"t": "none", "s": "zstd", "r": "zstd"})
    with ShardWriter(store, SCHEMA, options) as writer:
        numbers = np.random.default_rng(7).integers(0, 256, (50, 5000), np.uint8)
        ragged = [np.zeros(i % 3, np.float32) for i in range(50)]
        writer.write_batch({"t": numbers, "s": [str(i) * 20 for i in range(50)], "r": ragged})
    return store, writer.finish()[0]


def flip(store, name, position):
    data = bytearray(store.get(name))
    data[position] ^= 4
    store.put(name, bytes(data))


def chunk(store, info, block, column):
    footer = ShardReader(store, info.name).footer
    return footer.chunks[block, SCHEMA.index(column)]


def test_an_intact_shard_has_no_findings_and_its_bytes_are_read_once(shard):
    store, info = shard
    before = store.counters["bytes_read"]
    assert list(verify_shard(store, info.name, info, info.identity("d"))) == []
    assert store.counters["bytes_read"] - before <= info.n_bytes + (64 << 10)
    assert list(verify_shard(store, info.name)) == []


def test_damaged_chunks_are_named_with_block_and_column(shard):
    store, info = shard
    for block, column in ((0, "t"), (1, "s"), (2, "r")):
        flip(store, info.name, int(chunk(store, info, block, column)["offset"]) + 3)
    found = list(verify_shard(store, info.name, info, info.identity("d")))
    assert [(f.part, f.block, f.column) for f in found] == [("chunk", 0, "t"), ("chunk", 1, "s"), ("chunk", 2, "r")]


def test_a_wrong_checksum_of_the_file_is_one_finding_if_nothing_names_the_place(shard):
    store, info = shard
    info = replace(info, crc32c=info.crc32c ^ 1)
    (found,) = verify_shard(store, info.name, info, info.identity("d"))
    assert (found.part, "CRC-32C of the file" in found.message) == ("file", True)


def test_damage_outside_the_chunks_is_named_by_part(shard):
    store, info = shard
    whole = store.get(info.name)
    for position, part in ((0, "head"), (20, "head"), (-5, "tail"), (-40, "tail"), (-70, "footer")):
        flip(store, info.name, position)
        assert [f.part for f in verify_shard(store, info.name)] == [part]
        store.put(info.name, whole)
    for wrong in ({"shard_id": "0" * 32}, {"n_records": 49}, {"n_bytes": 5}, {"crc32c": 5}):
        found = list(verify_shard(store, info.name, replace(info, **wrong)))
        assert [type(f) for f in found] == [Finding], wrong


@pytest.mark.parametrize(("kind", "as_if"), [("bytes", "str"), ("str", "json")])
def test_invalid_values_are_found_under_right_checksums(kind, as_if):
    store = MemoryStore("verify-values")
    value = {"bytes": b"\xff\xfe", "str": "{"}[kind]
    with ShardWriter(store, Schema.of({"b": kind}), ShardOptions(compression="none")) as writer:
        writer.write_batch({"b": [value]})
    (info,) = writer.finish()
    footer = replace(ShardReader(store, info.name).footer, schema=Schema.of({"b": as_if}))
    stored, raw_bytes = footer.pack()
    tail = Tail(info.footer_offset, len(stored), raw_bytes, crc32c(stored))
    store.put("lie", store.get(info.name)[: info.footer_offset] + stored + tail.pack())
    assert [(f.part, f.block, f.column) for f in verify_shard(store, "lie")] == [("chunk", 0, "b")]
    with pytest.raises(CorruptShard, match="column 'b'"):
        ShardReader(store, "lie").take([0], [0])
