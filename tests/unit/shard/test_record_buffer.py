"""RecordBuffer: the fast path keeps exactly what the conversion keeps, with the same errors."""

import numpy as np
import pytest

from tiercache._native.block_builder import ADDED, EXCEEDS_BLOCK, NEEDS_CONVERSION
from tiercache.errors import SchemaError
from tiercache.shard.schema import Image, Ragged, Schema, Tensor
from tiercache.shard.writer import RecordBuffer

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


def test_values_of_exact_types_take_the_fast_path():
    for kind, value in USUAL.items():
        buffer = RecordBuffer(Schema.of({"x": kind}), 1 << 20)
        assert buffer.add_fast({"x": value}) == ADDED, kind
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


def test_other_values_are_left_to_the_conversion_and_nothing_of_the_record_is_kept():
    for kind, value in UNUSUAL:
        buffer = RecordBuffer(Schema.of({"n": "int8", "x": kind}), 1 << 20)
        assert buffer.add_fast({"n": 1, "x": value}) == NEEDS_CONVERSION, (kind, value)
        assert buffer.n_records == 0
    for record in ({}, {"x": 1}, {"x": 1, "z": 1}, {"x": 1, "y": 1, "z": 1}, [1, 2], None, "xy"):
        assert RecordBuffer(Schema.of({"x": "int8", "y": "int8"}), 100).add_fast(record) == NEEDS_CONVERSION


def test_values_of_a_rejected_record_do_not_appear_in_the_next():
    schema = Schema.of({"b": "bytes", "r": Ragged("int8", (None,)), "w": "list<int8?>", "x": "int8"})
    buffer = RecordBuffer(schema, 1 << 20)
    with pytest.raises(SchemaError):
        buffer.add({"b": b"refused", "r": np.ones(5, np.int8), "w": [1], "x": 1000}, 0)
    buffer.add({"b": b"kept", "r": np.zeros(2, np.int8), "w": [2], "x": 1}, 0)
    parts = buffer.take(1)
    assert parts[0].values[: parts[0].offsets[1]].tobytes() == b"kept"
    assert parts[1].shapes.tolist() == [[2]]
    assert parts[2].array.to_pylist() == [[2]]


def test_a_record_that_exceeds_the_block_begins_the_next_block():
    buffer = RecordBuffer(Schema.of({"b": "bytes", "n": "int64"}), 100)
    kept = [buffer.add_fast({"b": b"x" * 14, "n": n}) for n in range(4)]
    assert kept == [ADDED, ADDED, ADDED, EXCEEDS_BLOCK]
    first, (b, n) = buffer.take(3), buffer.take(1)
    assert first[1].values.ravel().tolist() == [0, 1, 2]
    assert (n.values.ravel().tolist(), b.offsets.tolist()) == ([3], [0, 14])
    buffer.add_fast({"b": bytes(1 << 20), "n": 0})
    buffer.take(1)
    buffer.add_fast({"b": b"x", "n": 0})
    assert buffer.take(1)[0].values.nbytes <= 2000, "a long record does not enlarge the memory of later blocks"


def test_a_record_that_makes_the_buffer_grow_keeps_shape_and_validity():
    schema = Schema.of({"r": Ragged("int16", (None, 2)), "b": "bytes?", "s": "str?"})
    buffer = RecordBuffer(schema, 1 << 24)
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
    buffer = RecordBuffer(Schema.of(KINDS), 4000)
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
