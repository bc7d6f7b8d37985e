"""Schemas and columns: types that users state, inference, and their Arrow form."""

import datetime as dt
import pickle
import subprocess
import sys

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch

from tiercache.errors import SchemaError
from tiercache.shard.conversion import convert_arrow, infer_batch, infer_records
from tiercache.shard.schema import Column, Image, Ragged, Schema, Tensor

EVERYTHING = {
    "i": "int64?",
    "f": "float16",
    "h": "bfloat16",
    "b": "bool",
    "t": Tensor("uint16", (3, 0, 2)),
    "m": Tensor(torch.bool, [4]),
    "r": Ragged(np.float32, (None, 4), nullable=True),
    "y": "bytes",
    "s": "str?",
    "j": "json",
    "p": Image("jpeg"),
    "l": pa.list_(pa.struct([("x", pa.int32())])),
    "w": pa.field("ignored", pa.timestamp("us")),
    "n": "list<int32?>",
}
TEXT = (
    "Schema(i: int64?, f: float16, h: bfloat16, b: bool, t: uint16[3, 0, 2], m: bool[4], r: float32[*, 4]?, y: bytes, "
    "s: str?, j: json, p: image<jpeg>, l: list<struct<x: int32?>?>, w: timestamp[us]?, n: list<int32?>)"
)


def test_a_schema_reads_back_equal():
    schema = Schema.of(EVERYTHING)
    for found in (
        Schema.from_bytes(schema.to_bytes()),
        pickle.loads(pickle.dumps(schema)),
        Schema.of(schema.arrow),
        Schema.of({c.name: c.arrow for c in schema.columns}),
        Schema(pickle.loads(pickle.dumps(schema.columns))),
        schema.select(schema.names),
    ):
        assert found == schema
        assert hash(found) == hash(schema)
        assert repr(found) == TEXT
        assert found.columns == schema.columns


def test_schemas_of_other_types_names_or_order_differ():
    schema = Schema.of({"a": "int8", "b": "str"})
    assert schema.select(["b", "a"]).names == ("b", "a")
    with pytest.raises(SchemaError, match="column 'x': no such column; there are 'a', 'b'"):
        schema.select(["x"])
    others = ({"b": "str", "a": "int8"}, {"a": "int8?", "b": "str"}, {"a": "uint8", "b": "str"})
    for other in (*others, {"a": "int8", "b": "json"}):
        assert Schema.of(other) != schema


@pytest.mark.parametrize(
    ("arrow", "text"),
    [
        (pa.int8(), "int8"),
        (pa.float16(), "float16"),
        (pa.float64(), "float64"),
        (pa.bool_(), "bool"),
        (pa.bool8(), "bool"),
        (pa.string(), "str"),
        (pa.string_view(), "str"),
        (pa.large_binary(), "bytes"),
        (pa.json_(), "json"),
        (pa.dictionary(pa.int8(), pa.string()), "str"),
        (pa.dictionary(pa.int8(), pa.int32()), "int32"),
        (pa.list_(pa.float32(), 3), "float32[3]"),
        (pa.list_(pa.list_(pa.int8(), 3), 2), "int8[2, 3]"),
        (pa.fixed_shape_tensor(pa.uint8(), [2, 2]), "uint8[2, 2]"),
        (pa.list_(pa.float32()), "float32[*]"),
        (pa.large_list(pa.uint16()), "uint16[*]"),
        (pa.list_(pa.string()), "list<str?>"),
        (pa.list_(pa.list_(pa.int8())), "list<list<int8?>?>"),
        (pa.large_list(pa.string_view()), "large_list<large_string?>"),
        (pa.struct([("a", pa.dictionary(pa.int8(), pa.string()))]), "struct<a: str?>"),
        (pa.timestamp("us", "UTC"), "timestamp[us, UTC]"),
        (pa.uuid(), "fixed_size_binary[16]"),
    ],
)
def test_arrow_types_become_columns(arrow, text):
    assert str(Column.of("x", arrow)) == text
    assert str(Column.of("x", pa.field("x", arrow))) == f"{text}?"


@pytest.mark.parametrize("view", [pa.list_view(pa.int8()), pa.list_(pa.large_list_view(pa.int8()))])
def test_list_views_whose_casts_lose_elements_are_refused(view):
    with pytest.raises(SchemaError, match="list_view<item: int8> cannot be stored; make lists of them"):
        Column.of("x", view)
    with pytest.raises(SchemaError, match="list_view<item: int8>"):
        convert_arrow(Column.of("x", pa.list_(pa.list_(pa.int8()))), pa.array([], view))


def test_a_dictionary_of_text_views_is_stored_as_its_values():
    codes = pa.array([1, None, 0], pa.uint32())
    array = pa.DictionaryArray.from_arrays(codes, pa.array(["x", "y"], pa.string_view()))
    stored = convert_arrow(Column.of("x", "str?"), array)
    assert (bytes(stored.values), stored.offsets.tolist()) == (b"yx", [0, 1, 1, 2])


NOTATION = [
    *("int8", "bfloat16", "bool", "str?", "bytes", "json", "image", "image<png>?", "float32[3, 64]", "uint16[1024]?"),
    *(
        "float32[*, 4]",
        "list<int32?>",
        "list<str>",
        "list<str?>?",
        "list<list<int8>>",
        "list<str>[2]",
        "map<str, int8?>",
    ),
    *("struct<a: str, b: struct<c: list<float64?>[2]>?>", "large_list<large_string>", "timestamp[us]", "date32[day]"),
    *("timestamp[ns, Europe/Paris]?", "time64[us]", "duration[s]", "decimal128(10, 2)", "fixed_size_binary[16]"),
]


@pytest.mark.parametrize("text", NOTATION)
def test_a_type_is_shown_as_it_is_stated(text):
    column = Column.of("x", text)
    assert str(column) == text
    schema = Schema([column])
    assert Schema.from_bytes(schema.to_bytes()) == Schema.of(schema.arrow) == schema


@pytest.mark.parametrize(
    ("user", "text"),
    [
        *((int, "int64"), (float, "float64"), (str, "str"), (bytes, "bytes"), (bool, "bool")),
        *((int | None, "int64?"), (list[int], "int64[*]"), (list[str] | None, "list<str>?")),
        *(("int", "int64"), ("float?", "float64?"), ("float[3]", "float64[3]"), (" list < int32 > ? ", "int32[*]?")),
        *((np.float32, "float32"), (np.bool_, "bool"), (np.str_, "str"), (np.dtype("U5"), "str")),
        *((np.dtype(">i2"), "int16"), (np.dtype("M8[ns]"), "timestamp[ns]"), (np.dtype("S3"), "bytes")),
        *((torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.long, "int64"), (torch.bool, "bool")),
        *(
            ("string", "str"),
            ("double", "float64"),
            ("list<int8>[3]", "int8[3]"),
            ("timestamp[us, tz=UTC]", "timestamp[us, UTC]"),
        ),
    ],
)
def test_types_of_python_numpy_and_torch_are_types_of_columns(user, text):
    assert str(Column.of("x", user)) == text


@pytest.mark.parametrize(
    ("user", "nearest"),
    [
        ("int65", "int64"),
        ("flaot32[3]?", "float32[3]?"),
        ("list<flot32>", "list<float32>"),
        ("img<jpeg>", "image<jpeg>"),
        ("timstamp[us]", "timestamp[us]"),
        ("integer", "int"),
    ],
)
def test_the_error_of_an_unknown_type_names_the_nearest(user, nearest):
    with pytest.raises(SchemaError) as caught:
        Column.of("x", user)
    assert f"'x': no such type: {user!r}; the nearest is {nearest!r}; the types are int8" in str(caught.value)


def test_class_names_belong_to_columns_of_integers():
    schema = Schema.of({"label": "int16?", "x": "float32"})
    named = schema.with_classes({"label": ["ant", "bee"]})
    assert named.columns[0].classes == ("ant", "bee")
    assert Schema.from_bytes(named.to_bytes()) == Schema.of(named.arrow) == named
    for bad, message in (
        ({"x": ["a"]}, "column 'x': only a column of integers has class names, and this is float32"),
        ({"y": ["a"]}, "column 'y': no such column"),
        ({"label": "ab"}, "class names are a list of str, got 'ab'"),
        ({"label": [1]}, "class names are a list of str"),
    ):
        with pytest.raises(SchemaError, match=message):
            schema.with_classes(bad)


def test_arrow_types_that_cannot_be_stored_are_refused():
    for arrow in (
        pa.dense_union([pa.field("a", pa.int8())]),
        pa.run_end_encoded(pa.int32(), pa.int8()),
        pa.list_(pa.sparse_union([pa.field("a", pa.int8())])),
    ):
        with pytest.raises(SchemaError, match=r"column .x.: .* cannot be stored"):
            Column.of("x", arrow)


def test_an_unknown_type_is_an_error_that_lists_the_types():
    invalid = (
        "int64[a]",
        "int64[]",
        "int64[3",
        "list<int>x",
        "list<int8",
        "a b",
        "map<str>",
        "struct<a int8>",
        "int8??",
    )
    objects = (object, 5, None, {"a": 1}, complex, np.complex64, np.dtype(object), np.dtype("M8"), torch.complex64)
    for bad in ("int65", "", "?", "object", *invalid, *objects):
        with pytest.raises(SchemaError, match="column 'x': no such type") as caught:
            Schema.of({"x": bad})
        assert "bfloat16" in caught.value.expected
        assert "tiercache.Ragged" in caught.value.expected


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tensor("int8", ()),
        lambda: Tensor("int8", (None,)),
        lambda: Tensor("int8", (-1,)),
        lambda: Tensor("int8", 3),
        lambda: Tensor("object", (3,)),
        lambda: Tensor("int64", (2**30,)),
        lambda: Ragged("int8", (3,)),
        lambda: Ragged("int8", (None,) * 33),
        lambda: Image("JPEG file"),
        lambda: Image(""),
        lambda: Schema.of({"a": "image<JPEG file>"}),
        lambda: Schema.of({"a": "list<image>"}),
        lambda: Schema.of({"a": "int64[1073741824]"}),
        lambda: Schema.of({"": "int8"}),
        lambda: Schema.of({"a\0": "int8"}),
        lambda: Schema.of({5: "int8"}),
        lambda: Schema.of(["int8"]),
        lambda: Schema.of(pa.schema([("a", pa.int8()), ("a", pa.int8())])),
        lambda: Schema.of({"a": "int8?", "a.valid": "bool"}),
        lambda: Schema.from_bytes(b"junk"),
        lambda: Schema.of(pa.schema([pa.field("a", pa.int8(), metadata={"tiercache.type": '{"kind": "str"}'})])),
        lambda: Schema.of(pa.schema([pa.field("a", pa.int8(), metadata={"tiercache.type": "[]"})])),
    ],
)
def test_an_invalid_schema_is_an_error(make):
    with pytest.raises(SchemaError):
        make()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "int64"),
        (True, "bool"),
        (1.5, "float64"),
        ("a", "str"),
        (b"a", "bytes"),
        (bytearray(b"a"), "bytes"),
        ({"a": 1}, "json"),
        (np.uint8(1), "uint8"),
        (np.bool_(True), "bool"),
        (np.array(5, np.int16), "int16"),
        (np.zeros((2, 3), ">f4"), "float32[2, 3]"),
        (torch.zeros(2, dtype=torch.bfloat16), "bfloat16[2]"),
        (torch.tensor(1), "int64"),
        ([1, 2], "int64[*]"),
        ((1, 0.5), "float64[*]"),
        ([True], "bool[*]"),
        (["a", "b"], "list<str>"),
        (PIL.Image.new("L", (2, 2)), "image"),
    ],
)
def test_types_are_inferred_from_the_values_of_a_record(value, text):
    assert str(infer_records([{"x": value}]).columns[0]) == text


def test_a_value_of_an_unknown_type_is_an_error_that_lists_the_types():
    unknown = (
        None,
        [],
        [[1], [2]],
        [1, "a"],
        [{}],
        object(),
        1j,
        {1, 2},
        dt.datetime(2026, 1, 1),
        np.array(["a"]),
        np.zeros(2, complex),
    )
    for value in unknown:
        with pytest.raises(SchemaError, match="column 'x'") as caught:
            infer_records([{"x": value}])
        assert "bfloat16" in caught.value.expected


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1, 2], "int64"),
        ([1, 2.5], "float64"),
        ([None, "a"], "str?"),
        (np.zeros((4, 2), np.int8), "int8[2]"),
        (np.zeros(4, np.float16), "float16"),
        (np.array(["a", "b"]), "str"),
        (np.array([1, None], object), "int64?"),
        (np.array(["2026-01-01"], "M8[us]"), "timestamp[us]"),
        (torch.zeros(4, 5), "float32[5]"),
        (pa.array([1, None]), "int64?"),
        (pa.array([1, 2]), "int64"),
        (pa.array([[1, 2], []], pa.list_(pa.int32())), "int32[*]"),
        ([np.zeros((1, 2)), None, np.zeros((3, 2))], "float64[*, 2]?"),
        ([np.zeros((1, 2)), np.zeros((1, 2))], "float64[1, 2]"),
        ([[], [1], None, [0.5, 2]], "float64[*]?"),
        ([["a"], []], "list<str>"),
        ([np.zeros(2, np.int64), [1, 2, 3]], "int64[*]"),
    ],
)
def test_types_are_inferred_from_the_columns_of_a_batch(values, text):
    assert str(infer_batch({"x": values}).columns[0]) == text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, "a"], "record 1: expected int64, like the records before, got str"),
        ([[1], ["a"]], r"record 1: expected int64\[\*\], like the records before, got list<str>"),
        ([[], None], "no value, or only nulls and empty lists"),
        ([], "no value, or only nulls"),
        ([None], "no value, or only nulls"),
        ([np.zeros(1), np.zeros((1, 1))], "record 1"),
        ([np.zeros(1), np.zeros(1, np.int8)], "record 1"),
        ("text", "an array or a list"),
        (5, "an array or a list"),
        (np.int64(5), "first dimension"),
    ],
)
def test_a_batch_whose_types_cannot_be_inferred_is_an_error(values, message):
    with pytest.raises(SchemaError, match=f"column 'x'.*{message}"):
        infer_batch({"x": values})


def test_arrow_alone_reads_a_schema_without_our_types():
    """The file does not depend on them: unregistered, Arrow gives the storage, and the metadata says the rest."""
    data = Schema.of(EVERYTHING).to_bytes()
    code = "import sys, pyarrow as pa; print(pa.ipc.read_schema(pa.py_buffer(sys.stdin.buffer.read())).field('h').type)"
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert done.stdout.strip() == b"uint16"
    columns = Schema.of(EVERYTHING).columns
    plain = pa.schema([pa.field(c.name, c.storage_type, c.nullable, c.arrow.metadata) for c in columns])
    assert Schema.of(plain) == Schema.of(EVERYTHING)
