"""RecordBuffer: the fast path keeps exactly what the conversion keeps, with the same errors."""

import datetime as dt
import tracemalloc
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tiercache._native.block_builder import ADDED, EXCEEDS_BLOCK, NEEDS_CONVERSION
from tiercache.errors import SchemaError
from tiercache.shard.schema import Image, Ragged, Schema, Tensor
from tiercache.shard.writer import RecordBuffer, ShardOptions, ShardWriter
from tiercache.store.memory import MemoryStore

INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
NUMBERS = [*INTEGERS, "float16", "float32", "float64"]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


def scalars(dtype: str) -> st.SearchStrategy[Any]:
    """Numbers of a dtype, as Python's, numpy's and torch's."""
    if dtype in INTEGERS:
        info = np.iinfo(dtype)
        plain: st.SearchStrategy[Any] = st.integers(int(info.min), int(info.max))
    else:
        plain = st.floats(width=int(dtype[5:]))
    return st.one_of(plain, plain.map(np.dtype(dtype).type), plain.map(lambda x: np.array(x, dtype)))


def in_some_form(array: np.ndarray) -> st.SearchStrategy[Any]:
    """The same array contiguous, strided, reversed in memory, Fortran's, read-only, big-endian, a list, or torch's."""
    wide = np.repeat(array, 2, axis=-1)[..., ::2]
    turned = np.ascontiguousarray(array[::-1])[::-1]
    closed = array.copy()
    closed.flags.writeable = False
    forms = [array, wide, turned, np.asfortranarray(array), closed, array.astype(array.dtype.newbyteorder(">"))]
    forms += [np.array(array), torch.from_numpy(array.copy())] if array.dtype.name not in ("uint32", "uint64") else []
    return st.sampled_from(forms)


def arrays(dtype: str, shape: tuple[int, ...]) -> st.SearchStrategy[Any]:
    return hnp.arrays(dtype, shape).flatmap(in_some_form)


@st.composite
def columns(draw: st.DrawFn) -> tuple[Any, st.SearchStrategy[Any]]:
    """A type, and values in all the forms that a record may have."""
    nullable, dtype = draw(st.booleans()), draw(st.sampled_from(NUMBERS))
    mark = "?" if nullable else ""
    dimensions = st.integers(0, 3)
    user, values = draw(
        st.sampled_from(
            [
                (dtype + mark, scalars(dtype)),
                ("bfloat16" + mark, st.integers(-8, 8).map(float)),
                ("bool" + mark, st.booleans() | st.booleans().map(np.bool_)),
                (Tensor(dtype, (2, 3), nullable), arrays(dtype, (2, 3))),
                (Tensor("bool", (3,), nullable), hnp.arrays(np.bool_, (3,))),
                (Tensor(dtype, (0, 2), nullable), st.just(np.zeros((0, 2), dtype))),
                (Ragged(dtype, (None, 2), nullable), dimensions.flatmap(lambda n: arrays(dtype, (n, 2)))),
                ("bytes" + mark, st.binary(max_size=9) | st.binary(max_size=9).map(bytearray)),
                (Image("png", nullable), st.binary(max_size=9)),
                ("str" + mark, TEXT),
                ("json" + mark, st.dictionaries(TEXT, st.integers(), max_size=2)),
                (pa.field("c", pa.timestamp("us"), nullable=nullable), st.datetimes(dt.datetime(1970, 1, 1))),
            ]
        )
    )
    return user, (st.none() | values if nullable else values)


@st.composite
def data_sets(draw: st.DrawFn) -> tuple[Schema, list[dict[str, Any]]]:
    drawn = draw(st.lists(columns(), min_size=1, max_size=4))
    rows = [{f"c{i}": draw(values) for i, (_, values) in enumerate(drawn)} for _ in range(draw(st.integers(0, 12)))]
    return Schema.of({f"c{i}": user for i, (user, _) in enumerate(drawn)}), rows


def shards(schema: Schema, rows: list[dict[str, Any]], block_bytes: int, ends: list[int]) -> list[bytes]:
    """What is written: records one by one up to the first end, from there to the second as a batch, and so on."""
    store = MemoryStore("record-buffer")
    options = ShardOptions(block_bytes=block_bytes, shard_bytes=2000, compression="none")
    with ShardWriter(store, schema, options, writer_id="w") as writer:
        edges = [0, *sorted(min(end, len(rows)) for end in ends), len(rows)]
        for i in range(len(edges) - 1):
            piece = rows[edges[i] : edges[i + 1]]
            if i % 2:
                writer.write_batch({name: [row[name] for row in piece] for name in schema.names})
            else:
                for row in piece:
                    writer.write(row)
    return [store.get(info.name)[64 : info.footer_offset] for info in writer.finish()]


def nested(schema: Schema) -> bool:
    return any(column.kind.value == "arrow" for column in schema.columns)


@given(data_sets(), st.sampled_from([1, 60, 200, 1 << 20]), st.lists(st.integers(0, 12), max_size=4))
def test_single_records_and_batches_give_equal_shards(drawn, block_bytes, ends):
    schema, rows = drawn
    if nested(schema):  # their blocks are cut by the mean of a batch
        block_bytes, ends = 1 << 20, []
    assert shards(schema, rows, block_bytes, ends) == shards(schema, rows, block_bytes, [0])


USUAL = {
    "int8": -128,
    "uint16": 65535,
    "int32": np.int32(7),
    "uint64": 2**63 - 1,
    "float32": 1.5,
    "float64": np.float64(-0.0),
    "bool": True,
    "bytes": b"abc",
    "str": "abc",
    Image("jpeg"): b"\xff\xd8",
    Tensor("uint16", (2, 2)): np.ones((2, 2), np.uint16),
    Tensor("bool", (2,)): np.array([True, False]),
    Tensor("int8", (3,)): np.ma.masked_array([1, 2, 3], dtype=np.int8),  # as of all subclasses, its elements
    Ragged("float16", (None, 2)): np.ones((3, 2), np.float16),
    "str?": None,
}


@pytest.mark.parametrize(("kind", "value"), USUAL.items())
def test_values_of_exact_types_take_the_fast_path(kind, value):
    buffer = RecordBuffer(Schema.of({"x": kind}).columns, 1 << 20)
    assert buffer.add_fast({"x": value}) == ADDED
    assert buffer.n_records == 1


UNUSUAL = [
    ("int8", 128),
    ("int8", True),
    ("int8", None),
    ("uint8", -1),
    ("uint64", 2**63),
    ("int64", np.int32(1)),
    ("float32", 1e39),
    ("float32", float("nan")),
    ("float64", 1),
    ("bool", 1),
    ("bytes", bytearray(b"a")),
    ("str", "ä"),
    ("str", b"a"),
    ("json?", None),
    (Tensor("uint16", (2, 2)), np.ones((2, 3), np.uint16)),
    (Tensor("uint16", (2, 2)), np.ones((2, 2), np.int16)),
    (Tensor("uint16", (2, 2)), np.ones((2, 2), ">u2")),
    (Tensor("uint16", (2, 2)), np.ones((2, 4), np.uint16)[:, ::2]),
    (Tensor("uint16", (2, 2)), np.ones(4, np.uint16)),
    (Tensor("uint16", (2, 2)), [[1, 2], [3, 4]]),
    (Tensor("int64", (2,)), np.array(["2020", "2021"], "M8[s]").astype("M8[us]").view("V8")),
    (Tensor("bool", (2,)), np.ones(2, np.uint8)),
    (Ragged("float16", (None, 2)), np.ones((3, 3), np.float16)),
]


@pytest.mark.parametrize(("kind", "value"), UNUSUAL)
def test_other_values_are_left_to_the_conversion_and_nothing_of_the_record_is_kept(kind, value):
    buffer = RecordBuffer(Schema.of({"n": "int8", "x": kind}).columns, 1 << 20)
    assert buffer.add_fast({"n": 1, "x": value}) == NEEDS_CONVERSION
    assert buffer.n_records == 0


@pytest.mark.parametrize("record", [{}, {"x": 1}, {"x": 1, "z": 1}, {"x": 1, "y": 1, "z": 1}, [1, 2], None, "xy"])
def test_records_with_other_names_do_not_take_the_fast_path(record):
    assert RecordBuffer(Schema.of({"x": "int8", "y": "int8"}).columns, 100).add_fast(record) == NEEDS_CONVERSION


def test_the_names_of_a_record_are_checked_before_its_values():
    with (
        ShardWriter(MemoryStore("names"), Schema.of({"x": "int8", "y": "int8"})) as writer,
        pytest.raises(SchemaError, match="column 'y', record 0: it is missing"),
    ):
        writer.write({"x": 999})


def test_values_of_a_rejected_record_do_not_appear_in_the_next():
    schema = Schema.of({"b": "bytes", "r": Ragged("int8", (None,)), "w": pa.list_(pa.int8()), "x": "int8"})
    buffer = RecordBuffer(schema.columns, 1 << 20)
    with pytest.raises(SchemaError):
        buffer.add({"b": b"refused", "r": np.ones(5, np.int8), "w": [1], "x": 1000}, 0)
    buffer.add({"b": b"kept", "r": np.zeros(2, np.int8), "w": [2], "x": 1}, 0)
    parts = buffer.take(1)
    assert parts[0].values[: parts[0].offsets[1]].tobytes() == b"kept"
    assert parts[1].shapes.tolist() == [[2]]
    assert parts[2].array.to_pylist() == [[2]]


def test_a_record_that_exceeds_the_block_begins_the_next_block():
    buffer = RecordBuffer(Schema.of({"b": "bytes", "n": "int64"}).columns, 100)
    kept = [buffer.add_fast({"b": b"x" * 14, "n": n}) for n in range(4)]
    assert kept == [ADDED, ADDED, ADDED, EXCEEDS_BLOCK]
    first, (b, n) = buffer.take(3), buffer.take(1)
    assert first[1].values.ravel().tolist() == [0, 1, 2]
    assert (n.values.ravel().tolist(), b.offsets.tolist()) == ([3], [0, 14])


def test_a_record_that_makes_the_buffer_grow_keeps_shape_and_validity():
    schema = Schema.of({"r": Ragged("int16", (None, 2)), "b": "bytes?", "s": "str?"})
    buffer = RecordBuffer(schema.columns, 1 << 24)
    rows = [np.full((1 << (i % 13), 2), i, np.int16) for i in range(130)]
    for row in rows:
        assert buffer.add_fast({"r": row, "b": row.tobytes(), "s": "x" * len(row)}) == ADDED
    r, b, s = buffer.take(len(rows))
    assert r.shapes.tolist() == [list(row.shape) for row in rows]
    assert r.values[: r.offsets[-1]].tobytes() == b.values[: b.offsets[-1]].tobytes() == b"".join(rows)
    assert (b.valid, s.valid) == (None, None)


class Scarce:
    """numpy.empty() that fails from the n-th call on."""

    def __init__(self, n):
        self.n = n
        self.empty = np.empty

    def __call__(self, *shape):
        self.n -= 1
        if self.n < 0:
            raise MemoryError
        return self.empty(*shape)


KINDS = {"t": Tensor("uint16", (64,)), "r": Ragged("int8", (None,)), "b": "bytes?", "n": "int64"}


def record(i):
    return {"t": np.full(64, i, np.uint16), "r": np.full(i, 1, np.int8), "b": b"b" * i, "n": i}


@pytest.mark.parametrize("n", range(12))
def test_a_memory_error_leaves_all_records_unchanged(monkeypatch, n):
    buffer = RecordBuffer(Schema.of(KINDS).columns, 4000)
    number = failed = 0
    for goal in (64, 65):
        with monkeypatch.context() as patch:
            patch.setattr(np, "empty", Scarce(n))
            try:
                while number < goal and not failed:
                    buffer.add_fast(record(number))
                    number += 1
                buffer.take(goal)
            except MemoryError:
                failed += 1
        assert buffer.n_records == number
        if failed:
            break
    assert failed
    while number < 65:
        assert buffer.add_fast(record(number)) != NEEDS_CONVERSION
        number += 1
    t, r, b, k = buffer.take(65)
    assert t.values.tolist() == [[i] * 64 for i in range(65)]
    assert r.shapes.ravel().tolist() == list(range(65))
    assert b.values[: b.offsets[-1]].tobytes() == b"b" * sum(range(65))
    assert (b.valid, k.values.ravel().tolist()) == (None, list(range(65)))


def test_columns_of_huge_records_take_no_memory_before_the_first_record():
    columns = Schema.of({"x": Tensor("uint8", (2**31 - 1,))}).columns
    tracemalloc.start()
    try:
        buffer = RecordBuffer(columns, 1 << 20)
        taken_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert buffer.n_records == 0
    assert taken_bytes < 1 << 20


def test_one_long_record_does_not_enlarge_the_memory_of_later_blocks():
    buffer = RecordBuffer(Schema.of({"b": "bytes"}).columns, 1000)
    buffer.add_fast({"b": bytes(1 << 20)})
    buffer.take(1)
    buffer.add_fast({"b": b"x"})
    assert buffer.take(1)[0].values.nbytes <= 2000
