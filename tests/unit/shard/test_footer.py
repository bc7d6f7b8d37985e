"""Head, tail and footer as bytes: they read back equal, newer versions are recognised, and every number is checked."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache._native.checksum import crc32c
from tiercache.errors import CorruptShard, UnsupportedFormat
from tiercache.shard import codec
from tiercache.shard.footer import (
    CHUNK_ROW,
    FORMAT_VERSION,
    HEAD_BYTES,
    TAIL_BYTES,
    Footer,
    Tail,
    pack_head,
    parse_head,
)
from tiercache.shard.reader import ShardReader
from tiercache.shard.schema import Ragged, Schema, Tensor
from tiercache.shard.values import as_batch
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store.memory import MemoryStore

COLUMNS = {"i": "int32?", "f": "bool", "t": Tensor("int16", (3,)), "s": "str"}
COLUMNS |= {"r": Ragged("int8", (None, 2), nullable=True)}
SCHEMA = Schema.of(COLUMNS)


@pytest.fixture(scope="module")
def shard() -> tuple[bytes, Footer, list[str]]:
    store = MemoryStore("layout")
    with ShardWriter(store, SCHEMA, ShardOptions(block_bytes=40, compression={"s": "zstd", "t": "none"})) as writer:
        for i in range(6):
            writer.write(
                {
                    "i": i or None,
                    "f": i > 2,
                    "t": [i] * 3,
                    "s": "x" * 99,
                    "r": np.ones((i, 2), np.int8) if i % 2 else None,
                }
            )
    (info,) = writer.finish()
    reader = ShardReader(store, info.name)
    return store.get(info.name)[: info.footer_offset], reader.footer, [repr(v) for v in take(reader)]


def take(reader: ShardReader) -> list[dict]:
    return [as_batch([v]) for v in reader.take(range(reader.n_records), range(len(SCHEMA)))]


def sealed(chunks: bytes, footer: Footer) -> MemoryStore:
    """A shard with these chunks and this footer, whose checksums are all right."""
    stored, raw_bytes = footer.pack()
    tail = Tail(len(chunks), len(stored), raw_bytes, crc32c(stored))
    store = MemoryStore("layout-sealed")
    store.put("shard", chunks + stored + tail.pack())
    return store


def test_a_newer_head_or_tail_is_unsupported_and_a_damaged_one_corrupt():
    head, tail = bytearray(pack_head(bytes(range(16)))), Tail(64, 10, 10, 0)
    assert (parse_head(bytes(head), "u"), len(head)) == (bytes(range(16)), HEAD_BYTES)
    assert (Tail.parse(tail.pack(), tail.file_bytes, "u"), len(tail.pack())) == (tail, TAIL_BYTES)
    head[8:12] = (FORMAT_VERSION + 1).to_bytes(4, "little")
    with pytest.raises(CorruptShard, match="CRC-32C"):
        parse_head(bytes(head), "u")
    head[60:] = crc32c(head[:60]).to_bytes(4, "little")
    with pytest.raises(UnsupportedFormat, match="the shard has format 2, which a later tiercache knows") as caught:
        parse_head(bytes(head), "u")
    assert (caught.value.found, caught.value.supported) == (FORMAT_VERSION + 1, FORMAT_VERSION)
    data = bytearray(tail.pack())
    data[28:32] = (7).to_bytes(4, "little")
    with pytest.raises(CorruptShard, match="CRC-32C"):
        Tail.parse(bytes(data), tail.file_bytes, "u")
    large = Tail(64, 100, 2**40, 0)
    with pytest.raises(CorruptShard, match="invalid footer"):  # before it is decoded
        Tail.parse(large.pack(), large.file_bytes, "u")


EXTREME = st.sampled_from(
    [0, 1, 2, 63, 64, 65, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 64, 2**64 - 1]
)
TABLES = [("chunks", name) for name in CHUNK_ROW.names]
TABLES += [(name, None) for name in ("block_first", "nodes", "buffers", "pages")]


def test_overlapping_buffers_are_corruption(shard):
    chunks, footer, _ = shard
    for row in np.flatnonzero(footer.buffers[:, 0]).tolist():
        if footer.buffers[row, 1]:
            changed = footer.buffers.copy()
            changed[row, 0] = 0
            with pytest.raises(CorruptShard, match="begins before the one before it ends"):
                ShardReader(sealed(chunks, replace(footer, buffers=changed)), "shard")


@given(data=st.data())
def test_a_wrong_number_under_a_right_checksum_is_found_or_harmless(shard, data):
    chunks, footer, rows = shard
    table, field = data.draw(st.sampled_from(TABLES))
    changed = getattr(footer, table).copy()
    numbers = (changed if field is None else changed[field]).reshape(-1)  # a view: writing to it changes the table
    place = data.draw(st.integers(0, len(numbers) - 1))
    limit = int(np.iinfo(numbers.dtype).max)
    value = data.draw(EXTREME | st.integers(-130, 130).map(lambda by: int(numbers[place]) + by)) % (limit + 1)
    numbers[place] = value
    assert np.shares_memory(numbers, changed)
    store = sealed(chunks, replace(footer, **{table: changed}))
    for verify in ("first", "never"):
        try:
            reader = ShardReader(store, "shard", verify=verify)
            reader.load_blocks(range(reader.footer.n_blocks), range(len(SCHEMA)))
            got = [repr(v) for v in take(reader)]
        except (CorruptShard, UnsupportedFormat):  # a codec that is not known yet is no damage
            continue
        assert verify == "never" or got == rows


def test_contradicting_tables_of_a_footer_are_corruption(shard):
    chunks, footer, _ = shard
    for change, message in (
        ({"n_records": 7}, "block table"),
        ({"n_records": 2**63}, "block table"),
        ({"schema": Schema.of({"i": "int32?"})}, "section 'chunks'"),
        ({"schema": Schema.of({**COLUMNS, "t": Tensor("int64", (3,))})}, "do not fit its type"),
        ({"schema": Schema.of({**COLUMNS, "i": "int32"})}, "has nulls"),
        ({"nodes": np.zeros((0, 2), np.uint64)}, "node rows"),
        ({"buffers": np.zeros((1, 2), np.uint64)}, "buffer rows"),
        ({"pages": np.zeros(500, np.uint32)}, "page rows"),
        ({"block_first": np.zeros(1, np.uint64)}, "section 'blocks'"),
    ):
        with pytest.raises(CorruptShard, match=f"footer: .*{message}"):
            ShardReader(sealed(chunks, replace(footer, **change)), "shard")


def test_a_compression_bomb_takes_no_more_memory_than_its_stated_length():
    n_bytes = 8 << 20
    frame = codec.compress(bytes(n_bytes), 3)
    tracemalloc.start()
    try:
        content = codec.decompress(frame, n_bytes)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert content.nbytes == n_bytes
    assert content.readonly
    assert peak_bytes < 1.5 * n_bytes
