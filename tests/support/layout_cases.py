"""Small data sets in the layouts of other libraries, written by hand or by Arrow, for the conformance suite."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tests.support import mds_files


@dataclass(frozen=True)
class LayoutCase:
    """write(folder) writes a data set and returns its columns: the values of all records, in stored order.

    types: Text of the type of each column.
    """

    name: str
    write: Callable[[Path], Mapping[str, list[Any]]]
    types: Mapping[str, str]


def write_parquet(folder: Path) -> Mapping[str, list[Any]]:
    rng = np.random.default_rng(1)
    columns: dict[str, list[Any]] = {name: [] for name in ("id", "x", "name", "tokens", "label", "opt", "year")}
    for year in (2023, 2024):
        for number in range(2):
            n, first = 300, len(columns["id"])
            part = {
                "id": list(range(first, first + n)),
                "x": rng.random(n).tolist(),
                "name": [f"record {i}" if i % 9 else "" for i in range(first, first + n)],
                "tokens": [rng.integers(0, 1000, i % 7, np.int32) for i in range(first, first + n)],
                "label": [bytes([i % 251]) * (i % 5) for i in range(first, first + n)],
                "opt": [None if i % 4 == 0 else i for i in range(first, first + n)],
            }
            table = pa.table(
                {
                    name: pa.array(values, pa.list_(pa.int32()) if name == "tokens" else None)
                    for name, values in part.items()
                }
            )
            path = folder / f"year={year}" / f"{number}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path, row_group_size=64, compression="zstd" if number else "snappy")
            for name, values in part.items():
                columns[name] += values
            columns["year"] += [year] * n
    (folder / "README.md").write_text("not a record")
    return columns


def write_mds(folder: Path, codec: str = "") -> Mapping[str, list[Any]]:
    shards = [mds_files.some_records(first, n) for first, n in ((0, 150), (150, 1), (151, 90))]
    mds_files.write_mds(folder, mds_files.ENCODINGS, shards, codec)
    return mds_files.columns_of(shards)


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tars(folder: Path, tar_format: int = tarfile.USTAR_FORMAT, prefix: str = "") -> Mapping[str, list[Any]]:
    """Write 3 shards of samples, of which some lack a text; with folders of their own between them."""
    columns: dict[str, list[Any]] = {name: [] for name in ("__key__", "seg.png", "cls", "json", "txt", "raw")}
    for shard in range(3):
        with tarfile.open(folder / f"shard-{shard:03}.tar", "w", format=tar_format) as tar:
            for i in range(shard * 100, shard * 100 + (1 if shard == 1 else 100)):
                key = f"{prefix}part{i % 2}/sample{i:05}"
                sample = {
                    "seg.png": b"\x89PNG\r\n\x1a\n" + bytes([i % 251]) * (i * 37 % 2000),
                    "cls": f"{i % 10}\n".encode(),
                    "json": json.dumps({"i": i, "a": [None, "ä"]}).encode(),
                    "txt": None if i % 3 == 0 else f"täxt {i}".encode(),
                    "raw": bytes(i % 5),
                }
                if i % 50 == 0 and prefix:
                    folder_of = tarfile.TarInfo(f"{prefix}folder{i}")
                    folder_of.type = tarfile.DIRTYPE
                    tar.addfile(folder_of)
                for ending, content in sample.items():
                    if content is not None:
                        add_file(tar, f"{key}.{ending}", content)
                add_file(tar, f"{prefix}__meta__", b"no part of a sample")
                columns["__key__"].append(key)
                columns["seg.png"].append(sample["seg.png"])
                columns["cls"].append(i % 10)
                columns["json"].append({"i": i, "a": [None, "ä"]})
                columns["txt"].append(None if i % 3 == 0 else f"täxt {i}")
                columns["raw"].append(sample["raw"])
    return columns


_TAR_TYPES = {"__key__": "str", "seg.png": "image", "cls": "int64", "json": "json", "raw": "bytes", "txt": "str?"}

CASES = [
    LayoutCase("webdataset", write_tars, _TAR_TYPES),
    LayoutCase(
        "webdataset-long-names",
        partial(write_tars, tar_format=tarfile.GNU_FORMAT, prefix="a/" * 60),
        _TAR_TYPES,
    ),
    LayoutCase("mds", write_mds, mds_files.TYPES),
    LayoutCase("mds-zstd", partial(write_mds, codec="zstd"), mds_files.TYPES),
    LayoutCase(
        "parquet",
        write_parquet,
        {
            "id": "int64",
            "x": "float64",
            "name": "str",
            "tokens": "int32[*]?",
            "label": "bytes",
            "opt": "int64?",
            "year": "int64",
        },
    ),
]
