"""Processor time and private memory of a process and its children, from /proc."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Self

SAMPLE_S = 0.02
PRIVATE = ("Pss_Anon:", "Pss_Shmem:")


def _family() -> list[int]:
    """Return this process and all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    family = [os.getpid()]
    for pid in family:
        family.extend(children.get(pid, []))
    return family


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name, which may contain spaces; none if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def cpu_s() -> float:
    """Return the processor seconds of this process, its living children, and the children that were waited for."""
    fields = [found for pid in _family() if (found := _stat(pid))]
    return sum(int(value) for found in fields for value in found[11:15]) / os.sysconf("SC_CLK_TCK")


def private_bytes() -> int:
    """Return the memory of this process and its children that is not a mapped file; shared memory counts once."""
    n_kib = 0
    for pid in _family():
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        n_kib += sum(int(line.split()[1]) for line in lines if line.startswith(PRIVATE))
    return n_kib << 10


class PeakMemory:
    """Samples `private_bytes` continuously inside its block. It takes processor time: do not time anything meanwhile.

    n_bytes: Maximum that was sampled.
    """

    def __init__(self) -> None:
        self.n_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.n_bytes = max(self.n_bytes, private_bytes())

    def __enter__(self) -> Self:
        self.n_bytes = private_bytes()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.n_bytes = max(self.n_bytes, private_bytes())
