"""Writes the golden shards of format version 0: `python tests/shard/make_golden.py`, from the repository's root.

Tests only read them. While the version is 0 they may be written again, by a commit whose title says so; from version
1 on never.
"""

import datetime as dt
import decimal
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tiercache.shard.types import Image, Ragged, Schema, Tensor
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store.memory import MemoryStore

FOLDER = Path(__file__).parents[1] / "golden" / "v0"
COMPRESSIONS = ("none", "zstd", "auto")
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


RECORDS = [record(i) for i in range(5)]


def write(compression: str) -> tuple[dict[str, Any], bytes]:
    """(the shard's row, its bytes)."""
    store = MemoryStore(f"golden-{compression}")
    options = ShardOptions(block_bytes=600, compression=compression, metadata={"made by": "make_golden.py"})
    writer = ShardWriter(store, SCHEMA, options, writer_id="golden")
    for one in RECORDS:
        writer.write(one)
    (info,) = writer.finish()
    return asdict(info), store.get(info.name)


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = {}
    for compression in COMPRESSIONS:
        rows[compression], data = write(compression)
        (FOLDER / f"{compression}.tcs").write_bytes(data)
    (FOLDER / "infos.json").write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
