"""Speed of the checksum, compared with reading and copying the same bytes; one thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stages.turns import Case, in_turns
from tiercache._native import checksum

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from stages.turns import Effort

PAGE_BYTES = 64 << 10
# One size that stays in L2, one that is much larger than the last-level cache.
SIZES = {"256 KiB, in the cache": 256 << 10, "128 MiB, from memory": 128 << 20}


def measure(effort: Effort, _folder: Path, scale: float) -> list[dict[str, Any]]:
    """Return the rows for both sizes."""
    rows: list[dict[str, Any]] = []
    for title, n_bytes in SIZES.items():
        rows += in_turns(cases(title, max(int(n_bytes * scale), PAGE_BYTES)), effort)
    return rows


def cases(title: str, n_bytes: int) -> list[Case]:
    """Return the cases: CRC-32C of a buffer, at once and by pages; numpy's sum of 8-byte words; numpy's copy."""
    data = np.random.default_rng(1).integers(0, 256, n_bytes, np.uint8)
    words, copy, sums = data.view(np.uint64), np.zeros_like(data), np.empty(-(-n_bytes // PAGE_BYTES), np.uint32)
    address, stage, read = data.ctypes.data, f"checksum, {title}", "read: numpy's sum of words"
    runs = {
        read: lambda: np.add.reduce(words),
        "memcpy": lambda: np.copyto(copy, data),
        f"crc32c, {checksum.KERNEL}": lambda: checksum.crc32c(data),
        "crc32c_pages, 64 KiB": lambda: checksum.crc32c_pages(address, n_bytes, PAGE_BYTES, sums),
    }
    return [Case(stage, name, run, n_bytes / 1e9, "GB/s", "" if name == read else read) for name, run in runs.items()]
