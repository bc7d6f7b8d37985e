"""MDS data sets written from the documented format: records one after the other, each with the sizes of its values."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

_DTYPES = {"uint8": 8, "int8": 9, "uint16": 16, "int16": 17, "float16": 18, "uint32": 32, "int32": 33, "float32": 34}
_DTYPES |= {"uint64": 64, "int64": 65, "float64": 66}


def encoded(encoding: str, value: Any) -> bytes:
    name, *fixed = encoding.split(":")
    if name == "bytes":
        return value
    if name == "json":
        return json.dumps(value).encode()
    if name.startswith("str"):
        return str(value).encode()
    if name != "ndarray":
        return np.dtype("int64" if name == "int" else name).type(value).tobytes()
    head = b"" if fixed else bytes([_DTYPES[value.dtype.name]])
    if len(fixed) < 2:
        width = 0 if max(value.shape) < 256 else 1
        head += bytes([value.ndim << 2 | width]) + np.array(value.shape, f"<u{1 << width}").tobytes()
    return head + value.tobytes()


def fixed_bytes(encoding: str) -> int | None:
    name, *fixed = encoding.split(":")
    if name == "ndarray" and len(fixed) == 2:
        return int(np.prod([int(d) for d in fixed[1].split(",")])) * np.dtype(fixed[0]).itemsize
    if name == "ndarray" or name in ("bytes", "json", "str", "str_int", "str_float", "str_decimal"):
        return None
    return np.dtype("int64" if name == "int" else name).itemsize


def shard_bytes(encodings: Mapping[str, str], records: Sequence[Mapping[str, Any]]) -> bytes:
    rows = []
    for record in records:
        values = [encoded(encoding, record[name]) for name, encoding in encodings.items()]
        sizes = [len(v) for v, e in zip(values, encodings.values(), strict=True) if fixed_bytes(e) is None]
        rows.append(np.array(sizes, "<u4").tobytes() + b"".join(values))
    config = json.dumps({"column_names": list(encodings)}).encode()
    offsets = 8 + 4 * len(rows) + len(config) + np.cumsum([0, *map(len, rows)])
    return np.array([len(rows), *offsets], "<u4").tobytes() + config + b"".join(rows)


def write_mds(
    folder: Path, encodings: Mapping[str, str], shards: Sequence[Sequence[Mapping[str, Any]]], codec: str = ""
) -> None:
    entries = []
    for number, records in enumerate(shards):
        raw, name = shard_bytes(encodings, records), f"shard.{number:05d}.mds"
        zipped = {"": raw, "gz": raw, "zstd": raw}[codec]
        if codec == "gz":
            packer = zlib.compressobj(wbits=31)
            zipped = packer.compress(raw) + packer.flush()
        elif codec == "zstd":
            zipped = pa.Codec("zstd").compress(raw).to_pybytes()
        stored = f"{name}.{codec}" if codec else name
        (folder / stored).write_bytes(zipped)
        entries.append(
            {
                "version": 2,
                "format": "mds",
                "column_names": list(encodings),
                "column_encodings": list(encodings.values()),
                "column_sizes": list(map(fixed_bytes, encodings.values())),
                "compression": codec or None,
                "hashes": [],
                "raw_data": {"basename": name, "bytes": len(raw), "hashes": {}},
                "zip_data": {"basename": stored, "bytes": len(zipped), "hashes": {}} if codec else None,
                "samples": len(records),
                "size_limit": 1 << 26,
            }
        )
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))


ENCODINGS = {
    "id": "int",
    "text": "str",
    "x": "float32",
    "tokens": "ndarray:uint16",
    "matrix": "ndarray:float32:2,3",
    "any": "ndarray",
    "data": "bytes",
    "meta": "json",
    "big": "str_int",
}
TYPES = {
    "id": "int64",
    "text": "str",
    "x": "float32",
    "tokens": "uint16[*]",
    "matrix": "float32[2, 3]",
    "any": "int32[*, *]",
    "data": "bytes",
    "meta": "json",
    "big": "int64",
}


def some_records(first: int, n: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(first)
    return [
        {
            "id": i,
            "text": "" if i % 7 == 0 else f"täxt {i}",
            "x": np.float32(i / 3),
            "tokens": rng.integers(0, 60000, 1 + i % 300, np.uint16),
            "matrix": rng.random((2, 3), np.float32),
            "any": rng.integers(-9, 9, (1 + i % 3, 2), np.int32),
            "data": bytes([i % 256]) * (i % 5),
            "meta": {"i": i, "list": [1, None]},
            "big": i * 10**12,
        }
        for i in range(first, first + n)
    ]


def columns_of(shards: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, list[Any]]:
    records = [record for shard in shards for record in shard]
    return {name: [record[name] for record in records] for name in ENCODINGS}
