"""Small data sets in the layouts of other libraries, written by hand or by Arrow, for the conformance suite."""

from __future__ import annotations

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


CASES = [
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
