"""Which processes hold files: on Linux the kernel lists flock(2) locks by inode; elsewhere nothing is known."""

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
    """A process that has the cache open, or reads copies. names: of the copies that it holds, as far as can be seen."""

    pid: int
    command: str
    names: tuple[str, ...] = ()


def locked_inodes() -> dict[int, set[int]] | None:
    """Processes by the inode they have locked with flock, of all file systems; None: the system does not say.

    A lock lasts until the last descriptor and the last mapping of its file are gone, in whichever process; the process
    named is the one that took it. Those of other containers are not seen.
    """
    try:
        text = _LOCKS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    holders: dict[int, set[int]] = defaultdict(set)
    for line in text.splitlines():
        # "1: FLOCK  ADVISORY  READ 9846 fe:00:11280417 0 EOF"; who waits for a lock has "->" before the kind.
        fields = line.split()
        if len(fields) >= 6 and fields[1] == "FLOCK":
            inode = fields[5].rpartition(":")[2]
            if fields[4].isdigit() and inode.isdigit():
                holders[int(inode)].add(int(fields[4]))
    return dict(holders)


def is_locked(inode: int) -> bool:
    """Whether anybody holds that file; False where the system does not say."""
    return inode in (locked_inodes() or {})


def holders_of(folder: Path, inodes: Mapping[str, int]) -> list[Holder]:
    """Who holds which files of a folder, by process number.

    An inode number may occur on another disk too, and what /proc/locks calls a disk is not what stat() calls it on
    every file system; so the processes are asked which files they have open.

    Args:
        folder: where the files lie.
        inodes: of each file, by name.
    """
    locks = locked_inodes() or {}
    held: dict[int, list[str]] = defaultdict(list)
    for name, inode in sorted(inodes.items()):
        for pid in locks.get(inode, ()):
            held[pid].append(name)
    prefix = f"{os.path.realpath(folder)}/"
    return [Holder(pid, command_of(pid), tuple(names)) for pid, names in sorted(held.items()) if _opens(pid, prefix)]


def _opens(pid: int, prefix: str) -> bool:
    """Whether a process has a file under prefix open or mapped; True where it may not be asked."""
    process = Path(f"/proc/{pid}")
    try:
        for link in (process / "fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                if str(link.readlink()).startswith(prefix):
                    return True
        return prefix in (process / "maps").read_text(encoding="utf-8", errors="replace")
    except OSError:  # another user's; or it has ended, and a child holds what it has locked
        return True


def command_of(pid: int) -> str:
    """How a process was started, "" where that cannot be seen."""
    try:
        text = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.replace("\0", " ").strip()[:_LONGEST_COMMAND]
