"""What the golden files of format version 1 must give, and how they were written.

Version 1 is frozen: test_golden.py holds the SHA-256 of the files, which are never written again. A later format
version gets a folder and a module of its own.
"""

import datetime as dt
import decimal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tiercache.shard.reader import ShardReader
from tiercache.shard.schema import STORED, Image, Ragged, Schema, Tensor
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store.memory import MemoryStore

FOLDER = Path(__file__).parents[1] / "golden" / "v1"
SCHEMA = Schema.of(
    {
        "id": "int64",
        "label": "uint8?",
        "score": "float32",
        "half": "float16",
        "brain": "bfloat16",
        "flag": "bool?",
        "tokens": Tensor("uint16", (2, 3)),
        "mask": Tensor("bool", (3,), nullable=True),
        "empty": Tensor("int32", (2, 0)),
        "boxes": Ragged("float32", (None, 4)),
        "waves": Ragged("int16", (None, 2, None), nullable=True),
        "blob": "bytes",
        "caption": "str?",
        "facts": "json",
        "picture": Image("png", nullable=True),
        "tree": pa.field("tree", pa.list_(pa.struct([("x", pa.int32()), ("names", pa.map_(pa.string(), pa.int8()))]))),
        "when": pa.timestamp("us", "UTC"),
        "price": pa.field("price", pa.decimal128(9, 2)),
    }
)
ARROW_TYPES = {
    "date": pa.date32(),
    "time": pa.time64("us"),
    "span": pa.duration("ms"),
    "fixed": pa.binary(3),
    "words": pa.list_(pa.string()),
    "large": "large_list<float64?>?",
    "pair": pa.list_(pa.string(), 2),
    "choice": pa.dictionary(pa.int8(), pa.string()),
    "text_view": pa.string_view(),
    "nothing": pa.null(),
    "wide_price": pa.decimal256(40, 3),
}
# Every dtype, alone and in arrays, nullable and not; a chunk of several pages; other Arrow types; nulls only.
WIDE = Schema.of(
    {
        **{dtype: dtype for dtype in STORED},
        **{f"{dtype}?": f"{dtype}?" for dtype in STORED},
        **{f"tensor {dtype}": Tensor(dtype, (2,)) for dtype in STORED},
        **{f"ragged {dtype}": Ragged(dtype, (None,), nullable=True) for dtype in STORED},
        "pages": Tensor("uint8", (9000,)),
        "blob": "bytes?",
        "facts": "json?",
        "nulls only": "str?",
        **{name: kind if isinstance(kind, str) else pa.field(name, kind) for name, kind in ARROW_TYPES.items()},
    }
)
ROWS = Schema.of({"id": "int64", "caption": "str?", "tokens": Tensor("uint16", (4,))})
# What each version of the golden data set holds: numbers of records.
VERSIONS = {1: range(7), 2: range(9), 3: range(14), 4: range(100, 105), 5: (*range(100, 105), 200)}


def record(i: int) -> dict[str, Any]:
    """Record i, as it is written; brain is its float value."""
    return {
        "id": i * 10**15 - 3,
        "label": None if i % 3 == 1 else 250 + i,
        "score": i / 4,
        "half": -i / 2,
        "brain": i * 0.5,
        "flag": (True, None, False)[i % 3],
        "tokens": np.arange(6, dtype=np.uint16).reshape(2, 3) + i,
        "mask": None if i % 4 == 2 else np.array([True, False, i % 2 == 0]),
        "empty": np.zeros((2, 0), np.int32),
        "boxes": np.full((i % 3, 4), i, np.float32),
        "waves": None if i == 2 else np.arange(2 * i * (i % 3), dtype=np.int16).reshape(i, 2, i % 3),
        "blob": bytes(range(i * 3)),
        "caption": None if i == 1 else "Übung " * (i % 3),
        "facts": {"n": i, "list": [None, 1.5, "ä"], "deep": {"yes": True}},
        "picture": None if i == 0 else b"\x89PNG" + bytes(i),
        "tree": None if i == 1 else [{"x": i, "names": [("k", 1)]}, None][: i % 3],
        "when": dt.datetime(2026, 11, 25, 12, 0, i, i, tzinfo=dt.UTC),
        "price": None if i == 3 else decimal.Decimal(i) / 4 * 3,
    }


def wide_record(i: int) -> dict[str, Any]:
    """Record i of WIDE: the least, the greatest, zero, and for floats what is no number, by turns."""
    numbers = {dtype: edge(dtype, i) for dtype in STORED}
    return {
        **numbers,
        **{f"{dtype}?": None if i % 3 == 1 else number for dtype, number in numbers.items()},
        **{f"tensor {dtype}": array(dtype, [number, edge(dtype, i + 1)]) for dtype, number in numbers.items()},
        **{f"ragged {dtype}": None if i == 5 else array(dtype, [n] * (i % 3)) for dtype, n in numbers.items()},
        "pages": (np.arange(9000) * (i + 1) % 251).astype(np.uint8),
        "blob": (None, b"", b"\0\xff", b"x" * 300)[i % 4],
        "facts": (None, {}, [], "text", 2**53 + 1, {"b": 1, "a": [True, None]})[i % 6],
        "nulls only": None,
        "date": (dt.date(1, 1, 1), dt.date(9999, 12, 31), None)[i % 3],
        "time": dt.time(23, 59, 59, 999999),
        "span": dt.timedelta(milliseconds=-i),
        "fixed": (b"abc", b"\0\0\0", None)[i % 3],
        "words": ([], None, ["", None, "ß"])[i % 3],
        "large": [0.5] * i,
        "pair": ([str(i), None], None)[i % 2],
        "choice": ("red", "green", None)[i % 3],
        "text_view": ("short", "longer than twelve bytes", None)[i % 3],
        "nothing": None,
        "wide_price": decimal.Decimal(10) ** 36 + i,
    }


def edge(dtype: str, i: int) -> Any:
    """The i-th interesting value of a dtype."""
    if dtype == "bool":
        return i % 2 == 0
    if "float" in dtype:
        return (0.0, -0.0, 1.5, -2.0, float("inf"), float("-inf"), float("nan"))[i % 7]
    limits = np.iinfo(dtype)
    return (0, limits.min, limits.max, 1)[i % 4]


def array(dtype: str, numbers: list[Any]) -> np.ndarray:
    """Numbers as an array; bfloat16 as the float32 that it is written from."""
    return np.array(numbers, "float32" if dtype == "bfloat16" else dtype)


def row(i: int) -> dict[str, Any]:
    """Record i of the golden data sets."""
    return {"id": i, "caption": None if i % 3 == 2 else f"caption {i}", "tokens": np.arange(4, dtype=np.uint16) * i}


RECORDS = [record(i) for i in range(5)]
WIDE_RECORDS = [wide_record(i) for i in range(12)]


def write(compression: str, schema: Schema = SCHEMA, records: list[dict[str, Any]] = RECORDS, block: int = 600) -> Any:
    """(the shard's row, its bytes)."""
    store = MemoryStore(f"golden-{compression}")
    options = ShardOptions(block_bytes=block, compression=compression)
    writer = ShardWriter(store, schema, options, writer_id="golden")
    for one in records:
        writer.write(one)
    (info,) = writer.finish()
    return asdict(info), store.get(info.name)


def tables(data: bytes) -> pa.Table:
    """All of a shard's blocks as plain Arrow."""
    store = MemoryStore("golden-tables")
    store.put("shard", data)
    reader = ShardReader(store, "shard")
    n_blocks, n_columns = reader.footer.n_blocks, len(reader.schema)
    schema = pa.schema([pa.field(c.name, c.storage_type) for c in reader.schema.columns])
    blocks = reader.load_blocks(range(n_blocks), range(n_columns))
    batches = []
    for block in range(n_blocks):
        arrays = [blocks.array(block, column) for column in range(n_columns)]
        plain = [a.storage if isinstance(a, pa.ExtensionArray) else a for a in arrays]
        batches.append(pa.RecordBatch.from_arrays(plain, schema=schema))
    return pa.Table.from_batches(batches, schema)
