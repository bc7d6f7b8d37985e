"""Result rows of benchmarks as JSON lines, one per case, with the machine; and printed tables of them."""

from __future__ import annotations

import json
import os
import platform
import statistics
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tiercache as tc

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

OUT = Path(__file__).parent / "out"
VERSIONED = ("torch", "torchdata", "numpy", "pyarrow")


def machine() -> dict[str, Any]:
    """Return the facts that figures depend on: processor, usable cores, memory, kernel, versions and time."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "versions": {
            "tiercache": tc.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in VERSIONED},
        },
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the minimum, median and maximum of repetitions."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, replacing the file's content. Rows without a machine get this one."""
    here = machine()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({**here, **row}) + "\n" for row in rows))


def table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a text table: the first column left-aligned, the others right-aligned."""
    widths = [max(len(line[i]) for line in (titles, *lines)) for i in range(len(titles))]
    cells = [
        [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in (titles, ["-" * width for width in widths], *lines)
    ]
    return "\n".join("  ".join(line).rstrip() for line in cells)
