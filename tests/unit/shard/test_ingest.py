"""Values that a ShardWriter accepts for a column, and the errors for other values."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.support.every_kind import EVERY_KIND

import tiercache as tc
from tiercache._native.block_builder import join
from tiercache.errors import SchemaError
from tiercache.shard.conversion import build_column_data, infer_batch, infer_records
from tiercache.shard.reader import ShardReader
from tiercache.shard.schema import Image, Ragged, Schema, Tensor
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
def test_numbers_are_accepted_in_any_container(store, data, dtype):
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
def test_tensors_are_accepted_in_any_container(store, data, kind):
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
def test_ragged_arrays_are_accepted_in_any_container(store, data):
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
def test_text_and_bytes_are_accepted_in_any_container(store, kind, data):
    (batch,) = written(store, {"x": kind}, [{"x": data}])
    assert [x.decode() if isinstance(x, bytes) else x for x in batch["x"]] == ["a", "bc", ""]


BAD = [
    ("int8", [1, 2, 300], 2, "300"),
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
    ("float16", np.array([1.0, 7e4]), 1, "70000.0"),
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


def test_an_image_is_given_as_bytes_as_a_path_or_as_an_image_of_pillow(store, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    picture = PIL.Image.fromarray(pixels)
    picture.save(tmp_path / "a.jpg", quality=80)
    data = (tmp_path / "a.jpg").read_bytes()
    writer = ShardWriter(store, Schema.of({"jpeg": "image<jpeg>", "any": "image?"}))
    writer.write({"jpeg": tmp_path / "a.jpg", "any": None})
    writer.write({"jpeg": data, "any": picture})
    opened = PIL.Image.open(tmp_path / "a.jpg")
    writer.write_batch({"jpeg": [opened, picture], "any": [opened, tmp_path / "a.jpg"]})
    (info,) = writer.finish()
    with ShardReader(store, info.name, info=info) as reader:
        found = as_batch(reader.take(range(4), [0, 1]))
    assert found["jpeg"][:2] == [data, data]
    assert found["any"][0] is None
    shown = [PIL.Image.open(io.BytesIO(one)) for one in (*found["jpeg"][2:], *found["any"][1:])]
    assert [one.format for one in shown] == ["JPEG", "JPEG", "PNG", "JPEG", "JPEG"]
    assert (np.asarray(shown[2]) == pixels).all(), "a PNG loses nothing"
    assert shown[0].quantization == opened.quantization, "the quality of the file is kept"


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (Path("/nowhere/a.jpg"), "'/nowhere/a.jpg': No such file or directory"),
        ("a.jpg", "a str; the path of a file is a pathlib.Path"),
        (PIL.Image.new("RGBA", (2, 2)), "an image of the mode RGBA, which Pillow cannot write as jpeg"),
    ],
)
def test_an_image_that_cannot_be_read_or_written_is_an_error_that_says_why(store, value, got):
    with pytest.raises(SchemaError, match="column 'x', record 0: expected image<jpeg>") as caught:
        ShardWriter(store, Schema.of({"x": "image<jpeg>"})).write({"x": value})
    assert got in str(caught.value)


@pytest.mark.parametrize(("kind", "data", "record", "got"), BAD)
def test_an_error_names_the_value_that_does_not_fit_and_nothing_of_its_write_is_kept(store, kind, data, record, got):
    writer = ShardWriter(store, Schema.of({"ok": "int8", "x": kind}), ShardOptions())
    n = len(data) if hasattr(data, "__len__") and getattr(data, "ndim", 1) else 1
    with pytest.raises(SchemaError, match=got) as caught:
        writer.write_batch({"ok": np.ones(n, np.int8), "x": data})
    assert (caught.value.column, caught.value.record) == ("x", record)
    assert caught.value.expected
    assert caught.value.got
    if isinstance(data, list):
        for value in data[:record]:
            writer.write({"ok": 1, "x": value})
        with pytest.raises(SchemaError) as alone:
            writer.write({"ok": 1, "x": data[record]})
        assert (alone.value.column, alone.value.record) == ("x", record)
    assert sum(info.n_records for info in writer.finish()) == (record if isinstance(data, list) else 0)


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
def test_a_batch_with_other_columns_is_an_error(store, batch, message):
    writer = ShardWriter(store, Schema.of({"x": "int8", "y": "str", "z": "int8?"}), ShardOptions())
    with pytest.raises(SchemaError, match=message):
        writer.write_batch(batch)
    with pytest.raises(SchemaError, match="column names must differ"):
        writer.write_batch(pa.table([[1], [2]], names=["x", "x"]))
    writer.write_batch({"x": [], "y": []})
    assert writer.finish() == []


@pytest.mark.parametrize("given", [[1], "a", pa.table({"a": [1]}).to_reader()])
def test_a_batch_without_column_names_is_an_error(store, given):
    writer = ShardWriter(store, Schema.of({"a": "int64"}))
    for call in (writer.write, writer.write_batch, lambda record: infer_records([record]), infer_batch):
        with pytest.raises(TypeError, match="mapping"):
            call(given)


def test_an_error_shows_only_the_beginning_of_a_long_value(store):
    writer = ShardWriter(store, Schema.of({"n": "int8"}))
    with pytest.raises(SchemaError) as caught:
        writer.write({"n": 10**4000})
    assert len(str(caught.value)) < 400


VALUES = st.one_of(st.none(), st.binary(max_size=9), st.text(max_size=9), st.binary(max_size=3).map(bytearray))
ASCII = st.text(st.characters(max_codepoint=127), max_size=9)
USUAL = st.lists(st.none() | st.binary(max_size=9)) | st.lists(st.none() | ASCII)


@given(USUAL | st.lists(VALUES, max_size=4), st.booleans(), st.booleans())
def test_lists_of_bytes_and_text_are_converted_as_their_values_are(values, text, nullable):
    column = Schema.of({"x": ("str" if text else "bytes") + ("?" if nullable else "")}).columns[0]
    joined = join(values, text, nullable)
    usual = all(
        (nullable and v is None) or (type(v) is str and v.isascii() if text else type(v) is bytes) for v in values
    )
    assert (joined is not None) == usual
    if joined is not None:
        slow = build_column_data(column, [v.encode() if isinstance(v, str) else v for v in values])
        assert joined[0].tobytes() == slow.values.tobytes()
        assert joined[1].tolist() == slow.offsets.tolist()
        assert (joined[2] is None) == (None not in values)
        assert joined[2] is None or joined[2].tolist() == slow.valid.tolist()


class Text(str):
    __slots__ = ()


def test_a_list_with_one_value_that_needs_conversion_is_written_completely(store):
    texts = ["a", None, "ä", "", Text("b")]
    (batch,) = written(store, {"x": "str?"}, [{"x": texts}])
    assert batch["x"] == texts


@pytest.mark.parametrize("column", [c for c in Schema.of(EVERY_KIND).columns if c.nullable], ids=lambda c: c.name)
def test_arrow_nulls_without_a_type_are_nulls_of_every_kind_of_column(store, column):
    with tc.Writer(store.url, schema={"x": str(column)}) as writer:
        writer.write_batch(pa.table({"x": pa.nulls(3)}))
    assert list(tc.Dataset(store.url)) == [{"x": None}] * 3
