"""The machine as the cache needs it: file locks and fork-safe descriptors, lock holders, disk space, process identity.

Locks only save bandwidth: all results are correct on file systems where flock is not enforced. A descriptor that is
inherited through fork shares its lock with the parent: close() keeps the parent's lock, LOCK_UN would release it.
`Breaker` bypasses a failing disk, `Notices` gives each warning once.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tiercache.catalog.files import pid_namespace, start_time

# statfs(2) types of file systems whose locks, links or mappings other machines share. FUSE often is one and cannot be
# told apart.
_NETWORK = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB2",
    0x65735546: "FUSE",
    0x0BD00BD0: "Lustre",
    0x47504653: "GPFS",
    0x19830326: "BeeGFS",
    0x00C36400: "Ceph",
    0x5346414F: "AFS",
    0x01021997: "9P",
    0x01161970: "GFS2",
    0x7461636F: "OCFS2",
}
_STATFS_BYTES = 512  # larger than struct statfs on any platform


@dataclass(frozen=True, slots=True)
class Room:
    """The space on a disk.

    Attributes:
        free_bytes: Free space for this user.
        total_bytes: Size of the file system.
        n_free_files: Number of free inodes; None if the file system has no fixed number.
    """

    free_bytes: int
    total_bytes: int
    n_free_files: int | None


def room(path: Path) -> Room:
    """Return the space for files of this user on the disk of path."""
    status = os.statvfs(path)
    n_free_files = status.f_favail if status.f_files else None
    return Room(status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize, n_free_files)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error says that the disk, or this user's quota, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def network_file_system(path: Path) -> str | None:
    """Return the name of the network file system of path; None: a local file system."""
    library = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if not hasattr(library, "statfs") or library.statfs(os.fsencode(path), buffer) != 0:
        return None
    # On Linux, f_type is the first member, a long; on other systems the numbers in the table do not occur there.
    return _NETWORK.get(ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF)


def host_name() -> str:
    """Return the name of this machine, with only characters that are safe in a file name."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:100] or "host"


@cache
def boot_id() -> str:
    """Return an identifier of the current boot of this machine; "0" if the system provides none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")[:16]
    except OSError:
        return "0"


@dataclass(frozen=True, slots=True)
class Owner:
    """The owner of a temporary file or a reservation: one open cache in one process. Never reused."""

    boot: str
    namespace: int
    pid: int
    started: int
    nonce: str

    @classmethod
    def of_this_process(cls) -> Owner:
        """Return a new owner."""
        pid = os.getpid()
        return cls(boot_id(), pid_namespace(), pid, start_time(pid) or 0, secrets.token_hex(4))

    @classmethod
    def parse(cls, text: str) -> Owner | None:
        """Return the owner that str() wrote; None: the text is not an owner."""
        match = re.fullmatch(r"([0-9a-f]{1,16})-(\d+)-(\d+)-(\d+)-([0-9a-f]{8})", text)
        return match and cls(match[1], int(match[2]), int(match[3]), int(match[4]), match[5])

    def __str__(self) -> str:
        return f"{self.boot}-{self.namespace}-{self.pid}-{self.started}-{self.nonce}"

    def runs(self) -> bool | None:
        """Return whether the owner's process runs; None: it cannot be determined from here (another container)."""
        if self.boot != boot_id():
            return False
        if self.namespace != pid_namespace():
            return None
        return start_time(self.pid) == self.started
