"""The disk of the cache: its space and kind, the breaker that bypasses it while it fails, and warnings given once."""

from __future__ import annotations

import ctypes
import errno
import os
import warnings
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING

from tiercache.waiting import SYSTEM_CLOCK, Clock

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """The space on a disk for this user's files; n_free_files is None if the number of files is not limited."""

    free_bytes: int
    total_bytes: int
    n_free_files: int | None


def disk_space(path: Path) -> DiskSpace:
    """Return the space on the disk of path."""
    status = os.statvfs(path)
    n_free_files = status.f_favail if status.f_files else None
    return DiskSpace(status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize, n_free_files)


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error says that the disk, or this user's quota, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


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


def network_file_system(path: Path) -> str | None:
    """Return the name of the network file system of path; None: a local file system."""
    library = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if library.statfs(os.fsencode(path), buffer) != 0:
        return None
    return _NETWORK.get(ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF)  # the first member is f_type, a long


PROBE_AFTER_S = 30.0


class Breaker:
    """Decides whether the cache's disk may be used. All methods are quick and safe from any thread."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK, probe_after_s: float = PROBE_AFTER_S) -> None:
        self._clock, self._probe_after_s = clock, probe_after_s
        self._lock = Lock()
        self._probe_at_s: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether the disk is bypassed."""
        return self._probe_at_s is not None

    def allows(self) -> bool:
        """Return whether to use the disk now. While it is bypassed, one caller per probe_after_s seconds may try it."""
        if not self.is_open:
            return True
        with self._lock:
            now_s = self._clock.monotonic()
            probe_at_s = self._probe_at_s
            if probe_at_s is None:  # reset() ran between the two checks
                return True
            if now_s >= probe_at_s:
                self._probe_at_s = now_s + self._probe_after_s
            return now_s >= probe_at_s

    def trip(self) -> None:
        """Bypass the disk, after it failed."""
        with self._lock:
            self._probe_at_s = self._clock.monotonic() + self._probe_after_s

    def reset(self) -> None:
        """Use the disk again, after it worked."""
        with self._lock:
            self._probe_at_s = None


class Notices:
    """Gives each kind of warning once. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._given: set[str] = set()
        self._datasets: dict[str, str] = {}

    def copied(self) -> Notices:
        """Return a copy for a forked child, in which another thread's hold on the lock would never end."""
        notices = Notices()
        notices._given, notices._datasets = set(self._given), dict(self._datasets)
        return notices

    def add_dataset(self, dataset_id: str, description: str) -> None:
        """Let the cache warn once, as kind dataset_id, when it has no space for this data set."""
        with self._lock:
            self._datasets[dataset_id] = description

    def unwarned_dataset(self, dataset_id: str) -> str | None:
        """Return the description of a data set about which no warning was given yet; None: there is none."""
        with self._lock:
            return None if dataset_id in self._given else self._datasets.get(dataset_id)

    def warn(self, kind: str, message: str) -> None:
        """Give a warning, unless this kind was given before."""
        with self._lock:
            if kind in self._given:
                return
            self._given.add(kind)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
