"""Trace files of a cache: one line per opened copy, appended by every traced process, and read by the simulator."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import numpy as np

from tiercache.cache.replay import Trace

if TYPE_CHECKING:
    from pathlib import Path

_FIELDS = 5


class Tracer:
    """Appends to a trace file. Safe from any thread and process: a line is one write of less than a page."""

    def __init__(self, path: Path) -> None:
        """Open or create the file. It is the user's own: a link is followed, and the mode stays. Raises OSError."""
        # O_NONBLOCK: a pipe without a reader gives an error instead of a wait.
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)

    def add(self, name: str, n_bytes: int, *, hit: bool) -> None:
        """Append an opening of a copy. Takes 3 us. Raises OSError.

        Args:
            name: Name of the copy.
            n_bytes: Size of the object.
            hit: Whether the copy was cached.
        """
        line = f"{time.time():.6f} {os.getpid()} {name} {n_bytes} {int(hit)}\n"
        os.write(self._fd, line.encode())

    def close(self) -> None:
        """Close the file. Must be called only once."""
        os.close(self._fd)


def read_trace(path: Path) -> Trace:
    """Return the trace of a file, in the order of time.

    Each process is a job; a last line that a crash cut off is skipped.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is not a trace; the message names the line.
    """
    text = path.read_text(encoding="ascii", errors="replace")
    lines = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]
    times, names, sizes, jobs = [], [], [], []
    for n, line in enumerate(lines, start=1):
        fields = line.split()
        try:
            if len(fields) != _FIELDS:
                raise ValueError(f"{len(fields)} fields")
            times.append(float(fields[0]))
            jobs.append(int(fields[1]))
            names.append(fields[2])
            sizes.append(int(fields[3]))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {n}: {error}; a line of a trace is 'seconds process name bytes hit', as "
                f"TIERCACHE_CACHE_TRACE writes it, got {line[:80]!r}"
            ) from None
    _, numbers = np.unique(np.array(names, dtype=str), return_inverse=True)
    order = np.argsort(np.array(times), kind="stable")
    columns = (numbers, np.array(sizes, np.int64), np.array(jobs, np.int64))
    return Trace.of(*(column.astype(np.int64)[order] for column in columns))
