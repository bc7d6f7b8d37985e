"""Processes with a memory limit: a control group (v1 or v2) for a test or a benchmark, where one can be created."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tiercache.waiting import wait_for

# Limit file, and the file that must also be limited so that pages cannot be swapped out instead.
_FILES = {"memory.max": "memory.swap.max", "memory.limit_in_bytes": "memory.memsw.limit_in_bytes"}
END_S = 5.0


class NoCgroup(Exception):
    """No control group with a memory limit can be created here; the message says why."""


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A control group with a memory limit.

    Attributes:
        folder: The group's folder in the mounted hierarchy.
        limit_bytes: Memory limit.
    """

    folder: Path
    limit_bytes: int

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command that starts a program inside the group, so that all its memory is counted."""
        return ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(self.folder), *arguments]


@contextlib.contextmanager
def memory_group(limit_bytes: int, root: Path = Path("/")) -> Iterator[MemoryGroup]:
    """Yield a group inside this process's own group, or inside the nearest parent that allows it; remove it at the end.

    Args:
        limit_bytes: Memory limit; swap is not allowed.
        root: Folder that contains /proc and /sys.

    Raises:
        NoCgroup: There is no memory controller, or no permission to create a group.
    """
    reasons = []
    for parent in _parents(root):
        folder = parent / f"tiercache-test-{uuid.uuid4().hex[:8]}"
        try:
            folder.mkdir()
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror}")
            continue
        try:
            try:
                limited = _limit(folder, limit_bytes)
            except OSError as error:
                reasons.append(f"{parent}: {error.strerror}")
                continue
            if limited:
                yield MemoryGroup(folder, limit_bytes)
                return
            reasons.append(f"{parent}: groups in it have no memory limit")
        finally:
            _remove(folder)
    raise NoCgroup("; ".join(reasons) or "no memory controller is mounted")


def drop_pages(folder: Path) -> None:
    """Write all files below a folder to disk and drop their unmapped pages from the page cache."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _parents(root: Path) -> Iterator[Path]:
    """Yield groups in which a new group could be created, nearest first: v1's memory controller, or else v2."""
    lines = (root / "proc/self/cgroup").read_text().splitlines() if (root / "proc/self/cgroup").exists() else []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        names = ("cgroup/memory",) if "memory" in controllers.split(",") else ("cgroup", "cgroup/unified")
        if controllers and "memory" not in controllers.split(","):
            continue
        for name in names:
            top = root / "sys/fs" / name
            own = top / path.lstrip("/")
            yield from (p for p in (own, *own.parents) if p.is_relative_to(top) and (p / "cgroup.procs").exists())


def _limit(folder: Path, limit_bytes: int) -> bool:
    """Set the limit; return whether the group has a limit that can be set."""
    for name, swap in _FILES.items():
        if (folder / name).exists():
            (folder / name).write_text(str(limit_bytes))
            if (folder / swap).exists():
                (folder / swap).write_text(str(0 if swap == "memory.swap.max" else limit_bytes))
            return True
    return False


def _remove(folder: Path) -> None:
    """Remove a group after its processes have ended."""

    def gone() -> bool:
        try:
            folder.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False  # the kernel may count a reaped process for a moment longer
        return True

    wait_for(gone, END_S)
