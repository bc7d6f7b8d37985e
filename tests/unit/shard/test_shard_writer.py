"""ShardWriter: blocks, shards, compression, and the objects that it leaves."""

import numpy as np
import pyarrow as pa
import pytest
import torch  # noqa: F401 -- values of bfloat16 are its own

from tiercache._native.checksum import crc32c
from tiercache.errors import SchemaError
from tiercache.shard.reader import ShardReader
from tiercache.shard.schema import Schema, Tensor
from tiercache.shard.values import as_batch
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store.memory import MemoryStore


@pytest.fixture
def store(request: pytest.FixtureRequest) -> MemoryStore:
    return MemoryStore(f"writer-{request.node.name}")


@pytest.mark.parametrize("nulls", [(), (0,), (3, 39)])
def test_written_tensors_do_not_change_with_the_callers_arrays(store, nulls):
    values = [None if i in nulls else np.full((2, 3), i, np.int16) for i in range(40)]
    mine = np.zeros((2, 3), np.int16)
    with ShardWriter(
        store, Schema.of({"t": Tensor("int16", (2, 3), nullable=True)}), ShardOptions(block_bytes=300)
    ) as writer:
        for value in values:
            mine[:] = 0 if value is None else value
            writer.write({"t": None if value is None else mine})
    (info,) = writer.finish()
    with ShardReader(store, info.name, info=info) as reader:
        assert reader.footer.n_blocks > 1
        batch = as_batch(reader.take(range(40), [0]))
    np.testing.assert_array_equal(batch["t"], np.stack([mine * 0 if v is None else v for v in values]))
    assert np.flatnonzero(~batch["t.valid"]).tolist() == list(nulls)


def test_blocks_hold_about_block_bytes_and_a_longer_record_is_a_block_of_its_own(store):
    sizes = [10, 20, 5000, 30, 40, 900, 100]
    with ShardWriter(store, Schema.of({"b": "bytes"}), ShardOptions(block_bytes=1000, compression="none")) as writer:
        writer.write_batch({"b": [b"x" * n for n in sizes]})
    (info,) = writer.finish()
    assert ShardReader(store, info.name).footer.block_records.tolist() == [2, 1, 3, 1]


def test_invalid_options_are_errors(store):
    for text in ("gzip", "zstd:0", "zstd:23", "zstd:", "zstd:-1", "lz4:1", "Zstd"):
        with pytest.raises(ValueError, match="compression must be"):
            ShardOptions(compression=text)
    for sizes in ({"shard_bytes": 0}, {"block_bytes": 0}):
        with pytest.raises(ValueError, match=r"must be"):
            ShardOptions(**sizes)
    with pytest.raises(SchemaError, match="no such column"):
        ShardWriter(store, Schema.of({"x": "int8"}), ShardOptions(compression={"y": "none"}))
    with pytest.raises(SchemaError, match="at least one column"):
        ShardWriter(store, Schema([]), ShardOptions())


def test_parts_have_the_stores_minimum_size_and_the_checksum_covers_the_file():
    sizes = []

    class Watching(MemoryStore):
        def create(self, key):
            upload = super().create(key)
            put_part = upload.put_part
            upload.put_part = lambda number, data: (sizes.append(len(data)), put_part(number, data))
            return upload

    store = Watching("writer-parts")
    values = np.random.default_rng(4).integers(0, 256, (20, 1 << 20), np.uint8)
    with ShardWriter(store, Schema.of({"x": Tensor("uint8", (1 << 20,))}), ShardOptions()) as writer:
        writer.write_batch({"x": values})
    (info,) = writer.finish()
    assert len(sizes) == 3
    assert min(sizes[:-1]) >= store.min_part_bytes
    data = store.get(info.name)
    assert (info.n_bytes, info.crc32c) == (len(data), crc32c(data))


def test_arrow_values_are_bits_only_if_their_field_states_it(store):
    schema = Schema.of({"x": "bfloat16", "t": Tensor("bfloat16", (1,)), "m": Tensor("bool", (1,))})
    bits, byte = pa.array([0x3F80, 0x4000], pa.uint16()), pa.array([1, 0], pa.uint8())
    arrays = [bits, pa.FixedSizeListArray.from_arrays(bits, 1), pa.FixedSizeListArray.from_arrays(byte, 1)]
    said = [pa.field(c.name, c.storage_type, metadata=c.arrow.metadata) for c in schema.columns]
    with ShardWriter(store, schema, ShardOptions()) as writer:
        writer.write_batch(pa.table(arrays, schema=pa.schema(said)))
        writer.write_batch({"x": bits, "t": arrays[1], "m": np.array([[True], [False]])})
        wrong = pa.FixedSizeListArray.from_arrays(pa.array([2], pa.uint8()), 1)
        with pytest.raises(SchemaError, match="neither 0 nor 1"):
            writer.write_batch(pa.table([bits[:1], arrays[1][:1], wrong], schema=pa.schema(said)))
    (info,) = writer.finish()
    batch = as_batch(ShardReader(store, info.name).take(range(4), [0, 1, 2]))
    assert batch["x"].tolist() == batch["t"][:, 0].tolist() == [1.0, 2.0, 0x3F80, 0x4000]
    assert batch["m"][:, 0].tolist() == [True, False, True, False]
