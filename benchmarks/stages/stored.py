"""Small data sets for the stages: written once, local, in the page cache."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np

import tiercache as tc

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

PIECE_ROWS = 1 << 16


def tokens(folder: Path, n_records: int) -> Path:
    """Return a data set of uint16[1024] and an int64 label."""

    def piece(rng: np.random.Generator, rows: NDArray[np.int64]) -> dict[str, Any]:
        return {"values": rng.integers(0, 50_000, (len(rows), 1024), np.uint16), "label": rows}

    return _written(folder, {"values": tc.Tensor("uint16", (1024,)), "label": "int64"}, n_records, piece)


def tensors(folder: Path, n_records: int) -> Path:
    """Return a data set of uint8[3, 64, 64] and an int64 label."""

    def piece(rng: np.random.Generator, rows: NDArray[np.int64]) -> dict[str, Any]:
        return {"values": rng.integers(0, 256, (len(rows), 3, 64, 64), np.uint8), "label": rows}

    schema = {"values": tc.Tensor("uint8", (3, 64, 64)), "label": "int64"}
    return _written(folder, schema, n_records, piece, piece_rows=1 << 10)


def wide(folder: Path, n_records: int, n_columns: int) -> Path:
    """Return a data set of int64 columns c0, c1, ..., each of them the record's number."""
    names = [f"c{i}" for i in range(n_columns)]

    def piece(_rng: np.random.Generator, rows: NDArray[np.int64]) -> dict[str, Any]:
        return dict.fromkeys(names, rows)

    return _written(folder, dict.fromkeys(names, "int64"), n_records, piece)


def small_rows(folder: Path, n_records: int) -> Path:
    """Return a data set of float32[16], text of 60 bytes and an int64 label."""

    def piece(rng: np.random.Generator, rows: NDArray[np.int64]) -> dict[str, Any]:
        letters = rng.integers(97, 123, len(rows) * 60, np.uint8).tobytes().decode()
        texts = [letters[at : at + 60] for at in range(0, len(letters), 60)]
        return {"vector": rng.standard_normal((len(rows), 16), np.float32), "text": texts, "label": rows}

    schema = {"vector": tc.Tensor("float32", (16,)), "text": "str", "label": "int64"}
    return _written(folder, schema, n_records, piece)


def _written(folder: Path, schema: dict[str, Any], n_records: int, piece: Any, *, piece_rows: int = PIECE_ROWS) -> Path:
    """Write the data set anew."""
    if folder.exists():
        shutil.rmtree(folder)
    rng = np.random.default_rng(3)
    with tc.Writer(folder, schema=schema) as writer:
        for start in range(0, n_records, piece_rows):
            writer.write_batch(piece(rng, np.arange(start, min(start + piece_rows, n_records))))
    return folder
