"""Every byte of a small shard is flipped, truncated, appended to: the result is a tiercache error, or equal data."""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch  # noqa: F401 - bfloat16 values are its tensors
from tests.support import golden_files as golden

from tiercache.errors import CorruptShard, UnsupportedFormat
from tiercache.model import ObjectInfo, ShardInfo
from tiercache.shard.reader import ShardReader
from tiercache.shard.values import as_batch, block_values
from tiercache.shard.verify import verify_shard
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store.local import LocalFolder
from tiercache.store.memory import MemoryStore

ERRORS = (CorruptShard, UnsupportedFormat)


class OneObject(MemoryStore):
    """One object, whose bytes a test changes under its readers."""

    def __init__(self, data: bytes) -> None:
        super().__init__("corruption")
        self.data = bytearray(data)

    def _object(self, key):
        return self.data, ObjectInfo(key, len(self.data))


@dataclass
class Sample:
    data: bytes
    footer_offset: int
    info: ShardInfo
    rows: dict[str, object]


def read_all(reader: ShardReader) -> list[str]:
    """Text of everything in a shard, by the way of blocks."""
    columns = range(len(reader.schema))
    n_blocks = reader.footer.n_blocks
    blocks = reader.load_blocks(range(n_blocks), columns)
    block = np.repeat(np.arange(n_blocks, dtype=np.uint32), blocks.n_rows)
    row = np.concatenate([np.arange(n, dtype=np.uint32) for n in blocks.n_rows])
    return [repr(as_batch([values])) for values in block_values(blocks, columns, block, row)]


def take_all(reader: ShardReader) -> list[str]:
    """The same, by the way of records."""
    return [repr(as_batch([v])) for v in reader.take(range(reader.n_records), range(len(reader.schema)))]


@pytest.fixture(scope="module")
def sample() -> Sample:
    store = MemoryStore("corruption-source")
    names = golden.SCHEMA.names
    compression = {name: "zstd" if number % 3 == 0 else "none" for number, name in enumerate(names)}
    with ShardWriter(store, golden.SCHEMA, ShardOptions(compression=compression), writer_id="s") as writer:
        for record in golden.RECORDS[:3]:
            writer.write(record)
    (info,) = writer.finish()
    data = store.get(info.name)
    assert len(data) < 8192
    rows = read_all(ShardReader(store, info.name))
    assert take_all(ShardReader(store, info.name)) == rows
    return Sample(data, info.footer_offset, info, rows)


def outcome(read: Callable[[], object]) -> object:
    try:
        return read()
    except ERRORS:
        return None


@pytest.mark.parametrize(("read", "step"), [("read_all", 1), ("take_all", 7)])
@pytest.mark.parametrize("where", ["memory", "mapped"])
def test_a_flipped_byte_of_a_chunk_is_reported_or_harmless(sample, read, step, where, tmp_path):
    read, step = globals()[read], 7 if where == "mapped" else step
    (tmp_path / "shard").write_bytes(sample.data)
    store = OneObject(sample.data) if where == "memory" else LocalFolder(tmp_path)
    fd, reported = os.open(tmp_path / "shard", os.O_RDWR), 0

    def put(position, byte):
        os.pwrite(fd, bytes([byte]), position)
        if where == "memory":
            store.data[position] = byte

    with ShardReader(store, "shard", verify="always") as reader:
        for position in range(64, sample.footer_offset, step):
            put(position, sample.data[position] ^ 1 << position % 8)
            got = outcome(lambda: read(reader))
            put(position, sample.data[position])
            assert got is None or got == sample.rows, position
            reported += got is None
        # most flips are seen; the rest are in gaps between chunks
        assert reported > 0.7 * (sample.footer_offset - 64) / step
        assert read(reader) == sample.rows
    os.close(fd)


def test_a_flipped_byte_of_head_footer_or_tail_is_reported_or_harmless(sample):
    store = OneObject(sample.data)
    for position in [*range(64), *range(sample.footer_offset, len(sample.data))]:
        for info, pattern in itertools.product((None, sample.info), (0x01, 0x80)):
            store.data[position] ^= pattern
            got = outcome(lambda info=info: read_all(ShardReader(store, "shard", info=info)))
            store.data[position] ^= pattern
            assert got is None or (position < 64 and got == sample.rows), position


def test_a_shard_truncated_at_any_length_or_appended_to_is_reported(sample):
    store = OneObject(sample.data)
    for n_bytes in range(len(sample.data)):
        store.data = bytearray(sample.data[:n_bytes])
        for info in (None, sample.info):
            with pytest.raises(ERRORS):
                ShardReader(store, "shard", info=info)
    for more in (b"\0", b"\n", b"TCSEND\r\n", bytes(64), sample.data):
        store.data = sample.data + more
        with pytest.raises(ERRORS):
            ShardReader(store, "shard")
        assert [f.part for f in verify_shard(store, "shard")] != []


def test_an_object_that_is_not_a_shard_is_reported():
    for junk in (b"", b"x", bytes(64), bytes(500), b"\x89PNG\r\n" * 50):
        with pytest.raises(CorruptShard, match=r"memory://corruption/shard"):
            ShardReader(OneObject(junk), "shard")


def test_verification_finds_every_damaged_byte_that_is_not_in_a_gap(sample):
    store = OneObject(sample.data)
    info = sample.info
    for position in range(0, len(sample.data), 11):
        store.data[position] ^= 0x20
        found = list(verify_shard(store, "shard", info))
        store.data[position] ^= 0x20
        assert found, position
    assert list(verify_shard(store, "shard", info)) == []
