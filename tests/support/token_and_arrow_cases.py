"""Data sets in the layouts of Megatron and Arrow, written by hand or by Arrow, for the conformance suite."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
from tests.support.layout_cases import LayoutCase

MEGATRON_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def megatron_index(
    lengths: Sequence[int],
    documents: Sequence[int],
    dtype: str = "int32",
    *,
    modes: Sequence[int] | None = None,
    pointers: Sequence[int] | None = None,
    version: int = 1,
) -> bytes:
    """Return the bytes of an .idx file. documents: first sequence of each document, and the number of sequences."""
    if pointers is None:
        pointers = np.cumsum([0, *lengths])[:-1] * np.dtype(dtype).itemsize
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", version, MEGATRON_CODES[dtype], len(lengths), len(documents))
    arrays = [np.array(lengths, "<i4"), np.array(pointers, "<i8"), np.array(documents, "<i8")]
    arrays += [] if modes is None else [np.array(modes, "i1")]
    return head + b"".join(array.tobytes() for array in arrays)


def write_megatron_pair(
    prefix: Path, documents: Sequence[Sequence[np.ndarray]], *, modes: Sequence[int] | None = None
) -> None:
    """Write PREFIX.bin and PREFIX.idx. documents: The sequences of each document."""
    sequences = [sequence for document in documents for sequence in document]
    dtype = sequences[0].dtype.name
    bounds = np.cumsum([0, *map(len, documents)])
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.bin").write_bytes(b"".join(sequence.tobytes() for sequence in sequences))
    index = megatron_index([len(one) for one in sequences], bounds.tolist(), dtype, modes=modes)
    Path(f"{prefix}.idx").write_bytes(index)


def write_megatron(folder: Path) -> Mapping[str, list[Any]]:
    rng = np.random.default_rng(2)
    tokens = []
    for number in range(2):
        documents = []
        for _ in range(400 - number):
            lengths = rng.integers(0, 60, rng.integers(0, 4))
            documents.append([rng.integers(0, 50_000, n).astype(np.uint16) for n in lengths])
        if number:  # longer than a block
            documents.append([np.arange(1_500_000).astype(np.uint16)])
        write_megatron_pair(folder / f"part{number}_text_document", documents)
        tokens += [np.concatenate([np.zeros(0, np.uint16), *document]) for document in documents]
    (folder / "vocab.json").write_text("{}")
    return {"tokens": tokens}


def write_multimodal(folder: Path) -> Mapping[str, list[Any]]:
    rng = np.random.default_rng(3)
    sequences = [rng.integers(0, 99, n).astype(np.int32) for n in rng.integers(1, 30, 300)]
    modes = rng.integers(0, 2, 300).astype(np.int8)
    write_megatron_pair(folder / "mixed", [sequences[:100], sequences[100:]], modes=modes.tolist())
    return {"tokens": sequences, "mode": modes.tolist()}


HF_FEATURES = {
    "id": {"dtype": "int64", "_type": "Value"},
    "image": {"_type": "Image"},
    "label": {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"},
    "tokens": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
    "grid": {"shape": [2, 3], "dtype": "float32", "_type": "Array2D"},
    "track": {"shape": [None, 2], "dtype": "int16", "_type": "Array2D"},
    "text": {"dtype": "string", "_type": "Value"},
    "flag": {"dtype": "bool", "_type": "Value"},
    "opt": {"dtype": "float64", "_type": "Value"},
    "words": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    "pair": {"x": {"dtype": "int8", "_type": "Value"}, "y": {"dtype": "string", "_type": "Value"}},
}
_HF_ARROW = {
    "id": pa.int64(),
    "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    "label": pa.int64(),
    "tokens": pa.list_(pa.int32()),
    "grid": pa.list_(pa.list_(pa.float32())),
    "track": pa.list_(pa.list_(pa.int16())),
    "text": pa.string(),
    "flag": pa.bool_(),
    "opt": pa.float64(),
    "words": pa.list_(pa.string()),
    "pair": pa.struct({"x": pa.int8(), "y": pa.string()}),
}
_HF_TYPES = {
    "id": "int64",
    "image": "image",
    "label": "int64",
    "tokens": "int32[*]",
    "grid": "float32[2, 3]?",
    "track": "int16[*, 2]",
    "text": "str",
    "flag": "bool",
    "opt": "float64?",
    "words": "list<str?>",
    "pair": "struct<x: int8?, y: str?>",
}


def hf_columns(first: int, n: int, image_bytes: int = 20) -> dict[str, list[Any]]:
    """Return the columns of records, in the types that the library serves."""
    rng = np.random.default_rng(first)
    every = range(first, first + n)
    return {
        "id": list(every),
        "image": [rng.bytes(image_bytes + i % 5) for i in every],
        "label": [i % 3 for i in every],
        "tokens": [rng.integers(0, 1000, i % 7, np.int32) for i in every],
        "grid": [None if i % 11 == 3 else rng.random((2, 3), np.float32) for i in every],
        "track": [rng.integers(0, 99, (i % 4, 2), np.int16) for i in every],
        "text": [f"é{i}" * (i % 6) for i in every],
        "flag": [i % 3 == 0 for i in every],
        "opt": [None if i % 5 == 0 else i / 2 for i in every],
        "words": [["a" * (i % 3), f"w{i}"][: i % 3] for i in every],
        "pair": [{"x": i % 100, "y": None if i % 4 == 0 else str(i)} for i in every],
    }


def hf_table(columns: Mapping[str, list[Any]]) -> pa.Table:
    """Return records as `datasets` has them in Arrow, with its metadata."""
    stored = dict(columns) | {"image": [{"bytes": one, "path": None} for one in columns["image"]]}
    for name in ("grid", "track"):
        stored[name] = [None if one is None else one.tolist() for one in columns[name]]
    arrays = {name: pa.array(values, _HF_ARROW[name]) for name, values in stored.items()}
    return pa.table(arrays).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": HF_FEATURES}})})


def save_to_disk(folder: Path, tables: Sequence[pa.Table], batch_rows: int) -> None:
    """Write the files of Dataset.save_to_disk(): streams of Arrow, and two JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=batch_rows)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": HF_FEATURES}))


def write_saved(folder: Path) -> Mapping[str, list[Any]]:
    parts = [hf_columns(0, 350), hf_columns(350, 250)]
    save_to_disk(folder, [hf_table(part) for part in parts], 100)
    (folder / "cache-0123.arrow").write_bytes((folder / "data-00000-of-00002.arrow").read_bytes())
    return {name: parts[0][name] + parts[1][name] for name in parts[0]}


def write_large_batches(folder: Path) -> Mapping[str, list[Any]]:
    """One record batch of several MiB in a file, which is read in several blocks."""
    columns = hf_columns(0, 500, image_bytes=8000)
    save_to_disk(folder, [hf_table(columns)], 500)
    return columns


def write_feather(folder: Path) -> Mapping[str, list[Any]]:
    """Files of Arrow with compressed buffers and a dictionary, which are read by Arrow's own reader."""
    found: dict[str, list[Any]] = {"id": [], "kind": [], "text": []}
    for number in range(2):
        n, first = 300, 300 * number
        part = {
            "id": list(range(first, first + n)),
            "kind": [f"k{i % 5 + number}" for i in range(n)],
            "text": [f"{i}" * (i % 5) for i in range(n)],
        }
        table = pa.table(part)
        table = table.set_column(1, "kind", table["kind"].combine_chunks().dictionary_encode())
        feather.write_feather(table, str(folder / f"{number}.feather"), compression="zstd", chunksize=64)
        for name, values in part.items():
            found[name] += values
    return found


def write_hf_parquet(folder: Path) -> Mapping[str, list[Any]]:
    """Parquet files as Dataset.push_to_hub() writes them, with a null among the images."""
    columns = hf_columns(0, 300)
    columns["image"][7] = None
    table = hf_table(columns)
    for number in range(2):
        part = table.slice(150 * number, 150)
        pq.write_table(part, folder / f"train-{number:05d}-of-00002.parquet", row_group_size=60)
    return columns


CASES = [
    LayoutCase("megatron", write_megatron, {"tokens": "uint16[*]"}),
    LayoutCase("multimodal", write_multimodal, {"tokens": "int32[*]", "mode": "int8"}),
    LayoutCase("hugging-face", write_saved, _HF_TYPES),
    LayoutCase("large-batches", write_large_batches, _HF_TYPES),
    LayoutCase(
        "hugging-face-parquet",
        write_hf_parquet,
        # The statistics of Parquet do not tell empty lists from nulls.
        _HF_TYPES | {"image": "image?", "tokens": "int32[*]?", "track": "int16[*, 2]?", "words": "list<str?>?"},
    ),
    LayoutCase("feather", write_feather, {"id": "int64", "kind": "str", "text": "str"}),
]
