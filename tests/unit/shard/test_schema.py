"""Schemas and columns: types that users state, inference, and their Arrow form."""

import datetime as dt
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch

from tiercache.errors import SchemaError
from tiercache.shard.conversion import infer_batch, infer_record
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
}
TEXT = (
    "Schema(i: int64?, f: float16, h: bfloat16, b: bool, t: uint16[3, 0, 2], m: bool[4], r: float32[*, 4]?, y: bytes, "
    "s: str?, j: json, p: image<jpeg>, l: list<item: struct<x: int32>>, w: timestamp[us]?)"
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
        (pa.list_(pa.float32()), "list<item: float>"),
        (pa.list_view(pa.string_view()), "large_list<item: large_string>"),
        (pa.struct([("a", pa.dictionary(pa.int8(), pa.string()))]), "struct<a: string>"),
        (pa.uuid(), "fixed_size_binary[16]"),
    ],
)
def test_arrow_types_become_columns(arrow, text):
    assert str(Column.of("x", arrow)) == text
    assert str(Column.of("x", pa.field("x", arrow))) == f"{text}?"


def test_arrow_types_that_cannot_be_stored_are_refused():
    for arrow in (
        pa.dense_union([pa.field("a", pa.int8())]),
        pa.run_end_encoded(pa.int32(), pa.int8()),
        pa.list_(pa.sparse_union([pa.field("a", pa.int8())])),
    ):
        with pytest.raises(SchemaError, match=r"column .x.: .* cannot be stored"):
            Column.of("x", arrow)


def test_an_unknown_type_is_an_error_that_lists_the_types():
    for bad in ("int65", "", "?", "float", "object", 5, None, int, {"a": 1}):
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
    ],
)
def test_types_are_inferred_from_the_values_of_a_record(value, text):
    assert str(infer_record({"x": value}).columns[0]) == text


def test_a_value_of_an_unknown_type_is_an_error_that_lists_the_types():
    unknown = (None, [1, 2], (1,), object(), 1j, {1, 2}, dt.datetime(2026, 1, 1), np.array(["a"]), np.zeros(2, complex))
    for value in unknown:
        with pytest.raises(SchemaError, match="column 'x'") as caught:
            infer_record({"x": value})
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
        ([np.zeros((1, 2)), None, np.zeros((3, 2))], "float64[*, 2]?"),
        ([np.zeros((1, 2)), np.zeros((1, 2))], "float64[1, 2]"),
    ],
)
def test_types_are_inferred_from_the_columns_of_a_batch(values, text):
    assert str(infer_batch({"x": values}).columns[0]) == text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, "a"], "record 1: expected int64, like the records before, got str"),
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
