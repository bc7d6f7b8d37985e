"""Shuffled rows copied into one buffer by kind of column, in one thread, compared with numpy and with a plain copy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.turns import Case, in_turns
from tiercache._native import gather

if TYPE_CHECKING:
    from pathlib import Path

    from stages.turns import Effort

SOURCE_BYTES = 128 << 20
# Approximate bytes of a batch: it stays in the cache, as a slot of the ring does.
BATCH_BYTES = 1 << 20
MAX_BATCH_ROWS = 4096
FIXED_WIDTHS = (8, 64, 2048, 12288)
VARIED_MEANS = (60, 20_000)
COPY = "memcpy of as many bytes"


@dataclass(frozen=True)
class Rows:
    """A source in one block and the rows of a batch. The object owns the memory.

    values: uint8[n * width], or the bytes of all rows. offsets: int64[n + 1]. row: uint32[rows of the batch].
    """

    values: np.ndarray
    offsets: np.ndarray | None
    row: np.ndarray

    @cached_property
    def addresses(self) -> np.ndarray:
        """Return the addresses in the form of the gather."""
        offsets = 0 if self.offsets is None else self.offsets.ctypes.data
        return np.array([[self.values.ctypes.data, offsets, len(self.values)]], np.uint64)

    @cached_property
    def block(self) -> np.ndarray:
        """Return the block of each row."""
        return np.zeros(len(self.row), np.uint32)


def measure(effort: Effort, _folder: Path, scale: float) -> list[dict[str, Any]]:
    """Return the rows for all kinds of columns."""
    rng, n_bytes = np.random.default_rng(2), max(int(SOURCE_BYTES * scale), 4 * BATCH_BYTES)
    rows: list[dict[str, Any]] = []
    for width in FIXED_WIDTHS:
        rows += in_turns(fixed(rng, width, n_bytes), effort)
    rows += in_turns(bits(rng, n_bytes // 64), effort)
    for mean in VARIED_MEANS:
        rows += in_turns(varied(rng, mean, n_bytes), effort)
    return rows


def _batch(rng: np.random.Generator, n: int, width: int) -> np.ndarray:
    return rng.integers(0, n, min(max(BATCH_BYTES // width, 1), MAX_BATCH_ROWS)).astype(np.uint32)


def fixed(rng: np.random.Generator, width: int, n_bytes: int) -> list[Case]:
    """Return the cases for rows of one width."""
    n = n_bytes // width
    rows = Rows(rng.integers(0, 256, n * width, np.uint8), None, _batch(rng, n, width))
    matrix, out = rows.values.reshape(n, width), np.zeros((len(rows.row), width), np.uint8)
    row, flat, copied = rows.row, out.reshape(-1), out.copy()
    runs = {
        "numpy take": lambda: np.take(matrix, row, axis=0, out=out, mode="clip"),
        COPY: lambda: np.copyto(copied, out),
        "gather": lambda: gather.gather(gather.FIXED, width, rows.addresses, rows.block, row, flat),
    }
    return _cases(f"gather, {width:,} bytes a row", runs, len(row))


def bits(rng: np.random.Generator, n_bytes: int) -> list[Case]:
    """Return the cases for booleans stored as bits."""
    rows = Rows(rng.integers(0, 256, n_bytes, np.uint8), None, rng.integers(0, 8 * n_bytes, 4096).astype(np.uint32))
    row, out = rows.row, np.zeros(len(rows.row), np.uint8)
    flags = np.unpackbits(rows.values, bitorder="little")
    runs = {
        "numpy take": lambda: np.take(flags, row, out=out, mode="clip"),
        "gather": lambda: gather.gather(gather.BITS, 1, rows.addresses, rows.block, row, out),
    }
    return _cases("gather, bits (numpy: of bytes)", runs, len(row))


def varied(rng: np.random.Generator, mean: int, n_bytes: int) -> list[Case]:
    """Return the cases for text and bytes of varying length: as one buffer with offsets, and as lists of objects."""
    lengths = rng.integers(mean // 5, mean * 9 // 5 + 1, n_bytes // mean)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = Rows(rng.integers(97, 123, offsets[-1], np.uint8), offsets, _batch(rng, len(lengths), mean))
    row, data = rows.row, rows.values
    ends = gather.measure(rows.addresses, rows.block, row)
    out = np.zeros(ends[-1], np.uint8)
    view, copied = memoryview(data), out.copy()

    def by_hand() -> np.ndarray:
        starts, stops = offsets[row].tolist(), offsets[row + 1].tolist()
        return np.concatenate([data[a:b] for a, b in zip(starts, stops, strict=True)])

    def by_hand_objects() -> list[bytes]:
        starts, stops = offsets[row].tolist(), offsets[row + 1].tolist()
        return [bytes(view[a:b]) for a, b in zip(starts, stops, strict=True)]

    def by_hand_text() -> list[str]:
        whole = by_hand().tobytes().decode()
        return [whole[a:b] for a, b in pairwise(ends.tolist())]

    def buffer() -> None:
        found = gather.measure(rows.addresses, rows.block, row)
        gather.gather(gather.VAR, 1, rows.addresses, rows.block, row, out, found)

    stage = f"gather, records of {mean:,} bytes in the mean"
    lists = {
        "numpy, list of bytes": by_hand_objects,
        "gather_bytes": lambda: gather.gather_bytes(rows.addresses, rows.block, row),
        "numpy, list of str": by_hand_text,
        "gather_str": lambda: gather.gather_str(rows.addresses, rows.block, row),
    }
    buffers = {"numpy, buffer": by_hand, COPY: lambda: np.copyto(copied, out), "measure and gather": buffer}
    n = len(row)
    of_lists = [
        Case(stage, name, run, n / 1e6, "M rows/s", before if name.startswith("gather") else "")
        for (name, run), before in zip(lists.items(), ("", *lists), strict=False)
    ]
    return [*_cases(stage, buffers, n), *of_lists]


def _cases(stage: str, runs: dict[str, Any], n_rows: int) -> list[Case]:
    """Return cases of which the first is the baseline."""
    first = next(iter(runs))
    return [
        Case(stage, name, run, n_rows / 1e6, "M rows/s", "" if name == first else first) for name, run in runs.items()
    ]
