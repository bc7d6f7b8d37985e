"""Values of columns of plain Arrow types: values that Arrow alone would change are errors."""

import datetime as dt
import secrets
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from tiercache.errors import SchemaError
from tiercache.shard.reader import ShardReader
from tiercache.shard.schema import Schema
from tiercache.shard.values import as_batch
from tiercache.shard.writer import ShardWriter
from tiercache.store.memory import MemoryStore

NOON = dt.datetime(2026, 1, 1, 12)
POINT = pa.struct([pa.field("x", pa.int32(), nullable=False), pa.field("name", pa.string())])
CHANGED = [
    (pa.timestamp("us"), 1.5),
    (pa.timestamp("us"), Decimal("1.5")),
    (pa.timestamp("s"), NOON.replace(microsecond=5)),
    (pa.timestamp("us"), pd.Timestamp(1)),
    (pa.date32(), NOON),
    (pa.date32(), 1.5),
    (pa.time32("ms"), dt.time(1, 2, 3, 4)),
    (pa.duration("s"), dt.timedelta(microseconds=1)),
    (pa.duration("us"), True),
    (pa.list_(pa.list_(pa.float32())), [[1e300]]),
    (pa.list_(pa.list_(pa.int32())), [[True]]),
    (pa.list_(pa.list_(pa.int32())), [[1.5]]),
    (pa.list_(pa.list_(pa.float32())), [[True]]),
    (pa.list_(pa.list_(pa.bool_())), [[1]]),
    (pa.list_(pa.string()), "ab"),
    (pa.timestamp("us"), NOON.replace(tzinfo=dt.UTC)),
    (pa.timestamp("us", "UTC"), NOON),
    (pa.list_(pa.list_(pa.int32())), b"ab"),
    (pa.list_(pa.list_(pa.int32())), [{1, 2}]),
    (pa.list_(pa.list_(pa.int32())), np.zeros(())),
    (POINT, {"x": 1, "y": 2}),
    (POINT, {"name": "a"}),
    (POINT, []),
    (pa.map_(pa.string(), pa.int8()), "ab"),
    (pa.map_(pa.string(), pa.int8()), [("k", "v")]),
    (pa.binary(3), "abc"),
    (pa.decimal128(5, 1), 1.0),
]
KEPT = [
    (pa.timestamp("us", "UTC"), NOON.replace(tzinfo=dt.UTC, microsecond=5)),
    (pa.timestamp("s"), NOON),
    (pa.timestamp("ns"), pd.Timestamp(1)),
    (pa.date32(), NOON.date()),
    (pa.time64("us"), dt.time(1, 2, 3, 4)),
    (pa.duration("us"), dt.timedelta(days=1, microseconds=1)),
    (pa.list_(pa.list_(pa.float64())), [[0.5, None], None, []]),
    (POINT, {"x": 1, "name": None}),
    (pa.map_(pa.string(), pa.int8()), [("k", 1), ("l", None)]),
    (pa.binary(3), b"abc"),
    (pa.decimal128(5, 1), Decimal("1.5")),
    (pa.list_(pa.list_(pa.bool_())), [[True, None]]),
]


ALIKE = [
    (pa.list_(pa.list_(pa.float32())), ((0.1, np.inf, 1),), [[float(np.float32(0.1)), np.inf, 1.0]]),
    (pa.timestamp("us"), 5, dt.datetime(1970, 1, 1, 0, 0, 0, 5)),
    (POINT, {"x": np.int64(1)}, {"x": 1, "name": None}),
]


def writer_of(arrow_type):
    store = MemoryStore(secrets.token_hex(8))
    return store, ShardWriter(store, Schema.of({"c": arrow_type, "n": "int8"}))


def read(store, writer):
    (info,) = writer.finish()
    with ShardReader(store, info.name, info=info) as reader:
        return as_batch(reader.take(range(reader.n_records), [0, 1]))


@pytest.mark.parametrize(("arrow_type", "value"), CHANGED)
def test_a_value_that_arrow_would_change_is_refused_by_name_and_nothing_is_written(arrow_type, value):
    _, writer = writer_of(pa.field("c", arrow_type))
    for record, write in (
        (0, lambda: writer.write({"c": value, "n": 1})),
        (1, lambda: writer.write_batch({"c": [None, value], "n": [1, 2]})),
    ):
        with pytest.raises(SchemaError) as caught:
            write()
        assert (caught.value.column, caught.value.record) == ("c", record)
        assert type(value).__name__ in caught.value.got
        if value is NOON and pa.types.is_timestamp(arrow_type):
            assert "write value.replace(tzinfo=datetime.UTC)" in caught.value.expected
    assert writer.n_records == 0
    assert writer.finish() == []


@pytest.mark.parametrize(("arrow_type", "value", "back"), [*((*kept, kept[1]) for kept in KEPT), *ALIKE])
def test_a_value_that_fits_is_read_back_equal(arrow_type, value, back):
    store, writer = writer_of(arrow_type)
    writer.write({"c": value, "n": 1})
    writer.write_batch({"c": [value], "n": [2]})
    batch = read(store, writer)
    assert batch["c"] == [back, back]
    assert batch["n"].tolist() == [1, 2]


def test_a_value_that_python_cannot_represent_is_an_error_that_names_to_arrow():
    store, writer = writer_of(pa.timestamp("s"))
    writer.write_batch({"c": pa.array([2**40], pa.timestamp("s")), "n": [1]})
    with pytest.raises(SchemaError, match=r"'c'.*to_arrow") as caught:
        read(store, writer)
    assert caught.value.column == "c"
    (info,) = writer.finish()
    with ShardReader(store, info.name, info=info) as reader:
        assert reader.load_blocks([0], [0]).array(0, 0).cast(pa.int64()).to_pylist() == [2**40]
