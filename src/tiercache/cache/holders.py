"""Which processes have files locked. On Linux, the kernel lists flock(2) locks by inode; elsewhere nothing is known."""

from __future__ import annotations

import os
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

_LOCKS = Path("/proc/locks")
_LONGEST_COMMAND = 200


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has the cache open or reads copies.

    Attributes:
        pid: Process number.
        command: Command line of the process, "" if unknown.
        names: Names of the copies that the process holds, as far as they can be determined.
    """

    pid: int
    command: str
    names: tuple[str, ...] = ()


def locked_inodes() -> dict[int, set[int]] | None:
    """Return the processes that hold a flock, by inode, for all file systems; None: the system does not list locks.

    A lock lasts until the last descriptor and the last mapping of its file are closed, in any process; the listed
    process is the one that took the lock. Locks of other containers are not listed.
    """
    try:
        text = _LOCKS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    holders: dict[int, set[int]] = defaultdict(set)
    for line in text.splitlines():
        # "1: FLOCK  ADVISORY  READ 9846 fe:00:11280417 0 EOF"; a process that waits for a lock has "->" before the
        # kind.
        fields = line.split()
        if len(fields) >= 6 and fields[1] == "FLOCK":
            inode = fields[5].rpartition(":")[2]
            if fields[4].isdigit() and inode.isdigit():
                holders[int(inode)].add(int(fields[4]))
    return dict(holders)


def is_locked(inode: int) -> bool:
    """Return whether any process has a lock on the file; False if the system does not list locks."""
    return inode in (locked_inodes() or {})


def holders_of(folder: Path, inodes: Mapping[str, int]) -> list[Holder]:
    """Return the processes that hold files of a folder, by process number.

    An inode number may also occur on another disk, and on some file systems /proc/locks and stat() number the disks
    differently; so the open files of each process are checked.

    Args:
        folder: Folder of the files.
        inodes: Inode of each file, by name.
    """
    locks = locked_inodes() or {}
    held: dict[int, list[str]] = defaultdict(list)
    for name, inode in sorted(inodes.items()):
        for pid in locks.get(inode, ()):
            held[pid].append(name)
    prefix = f"{os.path.realpath(folder)}/"
    return [Holder(pid, command_of(pid), tuple(names)) for pid, names in sorted(held.items()) if _opens(pid, prefix)]


def _opens(pid: int, prefix: str) -> bool:
    """Return whether a process has a file under prefix open or mapped; True if that cannot be determined."""
    process = Path(f"/proc/{pid}")
    try:
        for link in (process / "fd").iterdir():
            with suppress(FileNotFoundError):  # closed during the scan
                if str(link.readlink()).startswith(prefix):
                    return True
        return prefix in (process / "maps").read_text(encoding="utf-8", errors="replace")
    except OSError:  # another user's process; or it ended, and a child holds the lock that it took
        return True


def command_of(pid: int) -> str:
    """Return the command line of a process, "" if it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.replace("\0", " ").strip()[:_LONGEST_COMMAND]
