"""ShardWriter: what it takes, what it refuses, how it cuts, and what it leaves behind."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tiercache._native.checksum import crc32c
from tiercache.errors import SchemaError, StoreError
from tiercache.shard.codec import RAW, ZSTD
from tiercache.shard.reader import ShardReader
from tiercache.shard.types import Image, Ragged, Schema, Tensor
from tiercache.shard.values import as_batch
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store.memory import MemoryStore


@pytest.fixture
def store(request: pytest.FixtureRequest) -> MemoryStore:
    return MemoryStore(f"writer-{request.node.name}")


def written(store, schema, batches, **options):
    """All values of each column after writing batches."""
    with ShardWriter(store, Schema.of(schema), ShardOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    found = []
    for info in writer.finish():
        reader = ShardReader(store, info.name, info=info)
        found.append(as_batch(reader.take(range(reader.n_records), range(len(reader.schema)))))
    return found


class ArrayLike:
    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


SAME_NUMBERS = [
    np.array([1, 2, 3], np.int64),
    np.array([1, 2, 3], np.uint8),
    np.array([1, 2, 3], ">i4"),
    np.arange(6)[1::2][:3] * 0 + [1, 2, 3],
    np.asfortranarray(np.array([[1, 9], [2, 9], [3, 9]]))[:, 0],
    [1, 2, 3],
    (1, 2, 3),
    [np.int8(1), 2, np.uint64(3)],
    [torch.tensor(1), 2, np.array(3)],
    range(1, 4),
    torch.tensor([1, 2, 3], dtype=torch.int32),
    torch.tensor([1.0, 2.0, 3.0], requires_grad=True).detach().to(torch.int16),
    ArrayLike(np.array([1, 2, 3], np.int16)),
    pa.array([1, 2, 3], pa.int8()),
    pa.array([0, 1, 2, 3, 4])[1:4],
    pa.chunked_array([[1], [2, 3]]),
    pa.array([1, 2, 3]).dictionary_encode(),
]


@pytest.mark.parametrize("data", SAME_NUMBERS, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("dtype", ["int64", "uint8", "float32", "bfloat16", "int16?"])
def test_numbers_may_come_in_any_container(store, data, dtype):
    (batch,) = written(store, {"x": dtype}, [{"x": data}])
    assert batch["x"].tolist() == [1, 2, 3]
    assert str(batch["x"].dtype).removeprefix("torch.") == dtype.removesuffix("?")


SAME_TENSORS = [
    np.arange(6).reshape(3, 2),
    np.arange(6).reshape(2, 3).T.reshape(3, 2),
    list(np.arange(6).reshape(3, 2)),
    [[0, 1], (2, 3), torch.tensor([4, 5])],
    torch.arange(6).reshape(3, 2),
    pa.FixedSizeListArray.from_arrays(pa.array(range(6)), 2),
    pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(6).reshape(3, 2)),
    pa.array([[0, 1], [2, 3], [4, 5]]),
    pa.array([[9], [0, 1], [2, 3], [4, 5]])[1:],
]


@pytest.mark.parametrize("data", SAME_TENSORS, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize(
    "kind", [Tensor("int32", (2,)), Tensor("float64", (2,)), Tensor("bfloat16", (2,), nullable=True)]
)
def test_tensors_may_come_in_any_container(store, data, kind):
    expected = np.array(data.to_pylist() if isinstance(data, pa.Array) else [list(map(int, row)) for row in data])
    (batch,) = written(store, {"x": kind}, [{"x": data}])
    assert batch["x"].tolist() == expected.reshape(3, 2).tolist()


@pytest.mark.parametrize(
    "data",
    [
        [[1], [2, 3], []],
        [np.array([1]), torch.tensor([2, 3]), np.zeros(0)[:0].astype(int)],
        pa.array([[1], [2, 3], []]),
        pa.array([[7], [1], [2, 3], []])[1:],
    ],
)
def test_ragged_arrays_may_come_in_any_container(store, data):
    (batch,) = written(store, {"x": Ragged("int16", (None,))}, [{"x": data}])
    assert [x.tolist() for x in batch["x"]] == [[1], [2, 3], []]
    assert {x.dtype for x in batch["x"]} == {np.dtype("int16")}


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("str", pa.array(["a", "bc", ""], pa.string())),
        ("str", pa.array(["a", "bc", ""], pa.string_view())),
        ("str", pa.array(["a", "bc", ""]).dictionary_encode()),
        ("str", np.array(["a", "bc", ""])),
        ("str", np.array(["a", "bc", ""], object)),
        ("bytes", pa.array([b"a", b"bc", b""])),
        ("bytes", [b"a", bytearray(b"bc"), memoryview(b"")]),
        (Image("png"), pa.array([b"x", b"a", b"bc", b""], pa.large_binary())[1:]),
        ("json", ["a", "bc", ""]),
        ("json", pa.array(['"a"', '"bc"', '""'])),
        ("json", pa.array(['"a"', '"bc"', '""'], pa.json_())),
    ],
)
def test_text_and_bytes_may_come_in_any_container(store, kind, data):
    (batch,) = written(store, {"x": kind}, [{"x": data}])
    assert [x.decode() if isinstance(x, bytes) else x for x in batch["x"]] == ["a", "bc", ""]


BAD = [
    ("int8", [1, 2, 300], 2, "300"),
    ("int8", np.array([1, -129]), 1, "-129"),
    ("uint8", [0, -1], 1, "-1"),
    ("uint64", [2**64], 0, str(2**64)),
    ("int64", np.array([0, 2**63], np.uint64), 1, str(2**63)),
    ("int32", [1.0], 0, "float"),
    ("int32", np.zeros(2), 0, "float64"),
    ("int32", [1, True], 1, "bool"),
    ("int32", ["1"], 0, "str"),
    ("int32", [None], 0, "None"),
    ("int32", pa.array([1, None]), 1, "null"),
    ("int32", pa.array([1.5]), 0, "float64"),
    ("int32", pa.array(["1"]), 0, "string"),
    ("bool", pa.array([0, 1], pa.uint8()), 0, "uint8"),
    ("bfloat16", pa.array([256, 257], pa.uint16()), 1, "257"),
    (Tensor("bool", (2,)), pa.array([[0, 1]], pa.list_(pa.uint8(), 2)), 0, "uint8"),
    ("int32", pa.DictionaryArray.from_arrays([0, 1], pa.array([1, None])), 1, "null"),
    ("float32", [1.0, 1e39], 1, r"1e\+39"),
    ("float32", [2**24 + 1], 0, str(2**24 + 1)),
    ("float64", [1, 2**53 + 1], 1, str(2**53 + 1)),
    ("float16", np.array([1.0, 7e4]), 1, "70000.0"),
    ("bfloat16", [257], 0, "257"),
    ("float32", np.array([True]), 0, "bool"),
    ("float32", [1 + 2j], 0, "complex"),
    ("bool", [True, 1], 1, "int"),
    ("bool", np.array([0, 1]), 0, "int64"),
    ("str", ["a", b"b"], 1, "bytes"),
    ("str", ["a", "\ud800"], 1, "surrogate"),
    ("str", np.zeros(1), 0, "float"),
    ("bytes", [b"a", "b"], 1, "str"),
    ("bytes", pa.array(["a"]), 0, "string"),
    (Image("jpeg"), [np.zeros(3, np.uint8)], 0, "ndarray"),
    ("json", [1, {1: 2}], 1, "keys must be str"),
    ("json", [float("nan")], 0, "float"),
    ("json", [{"a": object()}], 0, "object"),
    ("json", pa.array(["{"]), 0, "JSON"),
    (Tensor("int8", (2,)), [[1, 2], [1, 2, 3]], 1, r"\(3,\)"),
    (Tensor("int8", (2,)), np.zeros((1, 3), np.int8), 0, r"\(3,\)"),
    (Tensor("int8", (2,)), [[1, 2], [1, [2]]], 1, "lengths"),
    (Tensor("int8", (2,)), [[1, 200]], 0, "200"),
    (Tensor("int8", (2,)), [[1, True]], 0, "other types"),
    (Tensor("int8", (2,)), [[1, 2], None], 1, "None"),
    (Tensor("int8", (2,)), pa.array([[1, 2], [1]]), 1, "1 elements"),
    (Tensor("int8", (2,)), pa.array([[1, 2], [1, None]], pa.list_(pa.int8(), 2)), 1, "nulls inside"),
    (Tensor("bool", (2,)), [[1, 0]], 0, "int64"),
    (Ragged("int8", (None, 2)), [np.zeros((1, 2), np.int8), np.zeros((2, 1), np.int8)], 1, r"\(2, 1\)"),
    (Ragged("int8", (None,)), pa.array([[1], [2, 300]]), 1, "300"),
    (Ragged("int8", (None,)), [[1], 5], 1, "single number"),
    (pa.list_(pa.int8()), [[1], [300]], 1, "300"),
    (pa.timestamp("us"), [5, "x"], 1, "str"),
    ("int32", 5, 0, "int"),
    ("str", "text", 0, "str"),
    ("int32", np.array(5), 0, "single value"),
]


@pytest.mark.parametrize(("kind", "data", "record", "got"), BAD)
def test_a_value_that_does_not_fit_is_named_and_nothing_of_its_batch_is_written(store, kind, data, record, got):
    writer = ShardWriter(store, Schema.of({"ok": "int8", "x": kind}), ShardOptions())
    n = len(data) if hasattr(data, "__len__") and getattr(data, "ndim", 1) else 1
    with pytest.raises(SchemaError, match=got) as caught:
        writer.write_batch({"ok": np.ones(n, np.int8), "x": data})
    assert (caught.value.column, caught.value.record) == ("x", record)
    assert caught.value.expected
    assert caught.value.got
    assert writer.finish() == []


@pytest.mark.parametrize(("kind", "data", "record", "got"), [bad for bad in BAD if isinstance(bad[1], list)])
def test_a_record_that_does_not_fit_is_named_by_its_number_in_the_whole_input(store, kind, data, record, got):
    with ShardWriter(store, Schema.of({"ok": "int8", "x": kind}), ShardOptions()) as writer:
        for value in data[:record]:
            writer.write({"ok": 1, "x": value})
        with pytest.raises(SchemaError) as caught:
            writer.write({"ok": 1, "x": data[record]})
        assert (caught.value.column, caught.value.record) == ("x", record)
    assert sum(info.n_records for info in writer.finish()) == record


def test_errors_count_records_from_the_first_that_was_ever_written(store):
    with ShardWriter(store, Schema.of({"x": "int8"}), ShardOptions()) as writer:
        writer.write_batch({"x": [1, 2]})
        writer.write({"x": 3})
        with pytest.raises(SchemaError, match=r"column 'x', record 4: expected int8 .-128 to 127., got 999"):
            writer.write_batch({"x": np.array([5, 999])})
        writer.write({"x": 4})
    assert sum(info.n_records for info in writer.finish()) == 4


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": [1]}, "column 'y': it is missing"),
        ({"x": [1], "y": ["a"], "w": [1]}, "column 'w': no such column; there are 'x', 'y', 'z'"),
        ({"x": [1], "y": ["a", "b"]}, "column 'y': expected 1 records, as in 'x', got 2"),
        ({"w": []}, "column 'w': no such column"),
        ({}, "column 'x': it is missing"),
    ],
)
def test_a_batch_of_other_columns_is_refused(store, batch, message):
    writer = ShardWriter(store, Schema.of({"x": "int8", "y": "str", "z": "int8?"}), ShardOptions())
    with pytest.raises(SchemaError, match=message):
        writer.write_batch(batch)
    assert writer.finish() == []


@pytest.mark.parametrize(
    ("record", "message"),
    [({"x": 1}, "column 'y', record 1: it is missing"), ({"x": 1, "y": "a", "w": 1}, "column 'w': no such column")],
)
def test_a_record_of_other_columns_is_refused(store, record, message):
    with ShardWriter(store, Schema.of({"x": "int8", "y": "str", "z": "int8?"}), ShardOptions()) as writer:
        writer.write({"x": 0, "y": ""})
        with pytest.raises(SchemaError, match=message):
            writer.write(record)
    assert [info.n_records for info in writer.finish()] == [1]


@pytest.mark.parametrize("given", [[1], "a", pa.table({"a": [1]}).to_reader()])
def test_what_names_no_columns_is_refused(store, given):
    writer = ShardWriter(store, Schema.of({"a": "int64"}))
    for call in (writer.write, writer.write_batch, Schema.infer_record, Schema.infer_columns):
        with pytest.raises(TypeError, match="mapping"):
            call(given)


class Unreadable:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("not now")


@pytest.mark.parametrize("value", [Unreadable(), torch.zeros(1, device="meta"), torch.zeros(1).to_sparse()])
def test_an_array_that_cannot_be_read_is_a_value_that_does_not_fit(store, value):
    writer = ShardWriter(store, Schema.of({"n": "int8", "x": Tensor("float32", (1,))}))
    for call in (writer.write, lambda record: writer.write_batch({name: [v] for name, v in record.items()})):
        with pytest.raises(SchemaError) as caught:
            call({"n": 1, "x": value})
        assert (caught.value.column, caught.value.record) == ("x", 0)
    assert writer.finish() == []


def test_an_error_shows_the_beginning_of_a_long_value(store):
    writer = ShardWriter(store, Schema.of({"n": "int8"}))
    with pytest.raises(SchemaError) as caught:
        writer.write({"n": 10**4000})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("nulls", [(), (0,), (3, 39)])
def test_tensors_written_one_by_one_are_read_back_equal_whatever_their_callers_do_next(store, nulls):
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


def test_a_nullable_column_may_be_left_out(store):
    with ShardWriter(store, Schema.of({"x": "int8", "z": "str?"}), ShardOptions()) as writer:
        writer.write({"x": 1})
        writer.write_batch({"x": [2]})
    (info,) = writer.finish()
    assert as_batch(ShardReader(store, info.name).take([0, 1], [0, 1]))["z"] == [None, None]


@given(sizes=st.lists(st.integers(0, 40), max_size=25), cuts=st.lists(st.integers(0, 25), max_size=5))
def test_how_records_were_batched_makes_no_difference_to_the_blocks(sizes, cuts):
    schema = Schema.of({"n": "int16", "b": "bytes", "r": Ragged("int16", (None, 2))})
    rows = [{"n": i, "b": b"x" * size, "r": np.full((size % 5, 2), i, np.int16)} for i, size in enumerate(sizes)]
    shards = []
    for edges in ([0, len(rows)], sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})):
        store = MemoryStore("writer-batched")
        with ShardWriter(
            store, schema, ShardOptions(block_bytes=100, shard_bytes=1200, compression="none"), writer_id="w"
        ) as writer:
            for start, end in pairwise(edges):
                writer.write_batch({name: [row[name] for row in rows[start:end]] for name in schema.names})
        infos = writer.finish()
        shards.append([store.get(info.name)[64 : info.footer_offset] for info in infos])
    assert shards[0] == shards[1]


def test_blocks_hold_about_block_bytes_and_a_longer_record_is_a_block_of_its_own(store):
    sizes = [10, 20, 5000, 30, 40, 900, 100]
    with ShardWriter(store, Schema.of({"b": "bytes"}), ShardOptions(block_bytes=1000, compression="none")) as writer:
        writer.write_batch({"b": [b"x" * n for n in sizes]})
    (info,) = writer.finish()
    assert ShardReader(store, info.name).footer.block_records.tolist() == [2, 1, 3, 1]


def test_shards_roll_over_at_about_shard_bytes_and_keep_the_order(store):
    values = np.random.default_rng(1).integers(0, 256, (300, 64), np.uint8)
    with ShardWriter(
        store,
        Schema.of({"v": Tensor("uint8", (64,))}),
        ShardOptions(shard_bytes=4096, block_bytes=1 << 20),
        writer_id="w7",
    ) as writer:
        writer.write_batch({"v": values})
    infos = writer.finish()
    assert [info.name for info in infos] == [f"shards/w7-{n:06d}.tcs" for n in range(5)]
    assert sum(info.n_records for info in infos) == 300
    read = [ShardReader(store, info.name).take(range(info.n_records), [0])[0].values for info in infos]
    assert np.array_equal(np.concatenate(read), values)


def test_arrays_may_be_changed_after_they_were_written(store):
    values = np.arange(100, dtype=np.int64)
    with ShardWriter(
        store, Schema.of({"x": "int64", "t": Tensor("int64", (1,))}), ShardOptions(block_bytes=333)
    ) as writer:
        writer.write_batch({"x": values, "t": values.reshape(-1, 1)})
        record = {"x": 100, "t": np.array([100])}
        writer.write(record)
        record["t"][:] = -1
        values[:] = -1
    (info,) = writer.finish()
    x, t = ShardReader(store, info.name).take(range(101), [0, 1])
    assert x.values.tolist() == t.values[:, 0].tolist() == list(range(101))


def test_auto_stores_raw_what_does_not_shrink_and_zstd_what_does(store):
    noise = np.random.default_rng(2).integers(0, 256, (4000, 32), np.uint8)
    batch = {"noise": noise, "label": np.arange(4000) % 10, "picture": [b"\xff\xd8" + bytes(40)] * 4000}
    schema = {"noise": Tensor("uint8", (32,)), "label": "int64", "picture": Image("jpeg")}
    with ShardWriter(store, Schema.of(schema), ShardOptions(block_bytes=10000)) as writer:
        writer.write_batch(batch)
    (info,) = writer.finish()
    codecs = ShardReader(store, info.name).footer.chunks["codec"]
    assert set(codecs[:, 0].tolist()) == {RAW}
    assert set(codecs[:, 1].tolist()) == {ZSTD}
    assert set(codecs[:, 2].tolist()) == {RAW}  # encoded pictures are not measured


@pytest.mark.parametrize(("compression", "codec"), [("none", RAW), ("zstd", ZSTD), ("zstd:19", ZSTD)])
def test_a_named_compression_is_forced(store, compression, codec):
    with ShardWriter(
        store, Schema.of({"b": "bytes", "z": "int8"}), ShardOptions(compression={"b": compression, "z": "none"})
    ) as writer:
        writer.write_batch({"b": [np.random.default_rng(3).bytes(1000)], "z": [0]})
    (info,) = writer.finish()
    assert ShardReader(store, info.name).footer.chunks["codec"][0].tolist() == [codec, RAW]


@pytest.mark.parametrize("text", ["gzip", "zstd:0", "zstd:23", "zstd:", "zstd:-1", "lz4:1", "Zstd"])
def test_a_compression_that_is_not_there_is_refused(text):
    with pytest.raises(ValueError, match="a compression is"):
        ShardOptions(compression=text)


def test_a_compression_for_a_column_that_is_not_there_is_refused(store):
    with pytest.raises(SchemaError, match="no such column"):
        ShardWriter(store, Schema.of({"x": "int8"}), ShardOptions(compression={"y": "none"}))


def test_leaving_by_an_exception_leaves_nothing(store):
    writer = ShardWriter(store, Schema.of({"x": "int64"}), ShardOptions(shard_bytes=1000, compression="none"))

    def fail():
        with writer:
            writer.write_batch({"x": np.arange(1000)})
            assert len(list(store.list())) > 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(store.list()) == []
    with pytest.raises(ValueError, match="aborted"):
        writer.write({"x": 1})


class Failing(MemoryStore):
    def create(self, key):
        raise StoreError("no more", url=self.url)


def test_after_a_stores_error_the_writer_only_aborts():
    writer = ShardWriter(Failing("writer-fails"), Schema.of({"x": "int64"}), ShardOptions(block_bytes=8))
    with pytest.raises(StoreError):
        writer.write_batch({"x": np.arange(10)})
    for call in (lambda: writer.write({"x": 1}), writer.finish):
        with pytest.raises(ValueError, match="only abort"):
            call()
    writer.abort()


def test_nothing_is_visible_before_a_shard_is_whole(store):
    with ShardWriter(store, Schema.of({"x": "int64"}), ShardOptions(block_bytes=64)) as writer:
        writer.write_batch({"x": np.arange(1000)})
        assert list(store.list()) == []
    assert len(list(store.list())) == 1


def test_uploads_get_parts_of_at_least_what_the_store_needs_and_the_row_sums_the_file():
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


def test_a_table_of_arrow_is_a_batch(store):
    table = pa.table({"b": ["x", None, "z"], "a": pa.chunked_array([[1], [2, 3]])})
    schema = Schema.infer_columns(table)
    with ShardWriter(store, schema, ShardOptions()) as writer:
        writer.write_batch(table)
        writer.write_batch(table.to_batches()[0])
    (info,) = writer.finish()
    batch = as_batch(ShardReader(store, info.name).take(range(4), [0, 1]))
    assert (batch["a"].tolist(), batch["b"]) == ([1, 2, 3, 1], ["x", None, "z", "x"])


def test_bits_of_arrow_are_numbers_unless_their_field_says_otherwise(store):
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


def test_a_schema_without_columns_is_refused(store):
    with pytest.raises(SchemaError, match="at least one column"):
        ShardWriter(store, Schema([]), ShardOptions())


@pytest.mark.parametrize("options", [{"shard_bytes": 0}, {"block_bytes": 0}, {"metadata": {"x": object()}}])
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(ValueError, match=r"must be"):
        ShardOptions(**options)
