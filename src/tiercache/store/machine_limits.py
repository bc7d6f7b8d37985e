"""Limits of one store that all processes of a user share on this machine: requests, bandwidth and back-off.

The state is a small file in config.runtime_folder(), by the name of the store::

    0    float64 end, float64 length      the back-off (pacing.Backoff), CLOCK_MONOTONIC
    16   float64                          time until which the bandwidth is paid for (pacing.pay)
    64+  no bytes, only locks             one byte for each of max_requests slots

A slot is a lock of an open file description, which the kernel releases when its process ends, however it ends. Writers
take the file's flock for a few microseconds; the back-off is read without a lock, 16 bytes at once. Where the file
cannot be used, each process has these limits for itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import struct
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from tiercache import config
from tiercache.store.pacing import Backoff, pay

_PAID_OFFSET, _SLOTS_OFFSET = 16, 64
_FILE_BYTES = 64
_BACKOFF, _TIME = struct.Struct("=dd"), struct.Struct("=d")
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of Linux, 64 bits
_opened: weakref.WeakSet[MachineLimits] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """What a user allows the processes of a machine to take from one store.

    Attributes:
        max_requests: Number of read requests that run at once; None: no limit.
        max_bytes_per_s: Bandwidth of all reads, in bytes per second; None: no limit.
    """

    max_requests: int | None = None
    max_bytes_per_s: float | None = None


NO_LIMITS = StoreLimits()
# Number of no slot, for a request that needs none. give_back_slot() ignores it.
NO_SLOT = -1


class MachineLimits:
    """The limits of one store, by the shared file. Safe for threads; a forked child must open its own.

    The lock guards the slots of this process and its writes to the file.

    Args:
        name: Name of the store: processes with the same name share the limits.
        limits: What the user allows.
    """

    def __init__(self, name: str, limits: StoreLimits) -> None:
        self._fd: int | None = None
        self.limits = limits
        self._lock = Lock()
        self._slots: set[int] = set()
        self._backoff, self._paid_until_s = Backoff(), 0.0  # used without the file
        self._path: Path | None = _shared_path(name)  # None: the file cannot be used
        self._opening = Lock()
        _opened.add(self)

    def backoff_left_s(self, now_s: float) -> float:
        """Return the seconds for which the store must be left alone."""
        return self._read_backoff().left_s(now_s)

    def throttled(self, now_s: float, *, was_answered: bool) -> Backoff:
        """Begin or lengthen the back-off of all processes, and return it. See Backoff.throttled."""
        with self._exclusive():
            self._backoff = self._read_backoff().throttled(now_s, was_answered=was_answered)
            self._write(_BACKOFF.pack(self._backoff.until_s, self._backoff.length_s), 0)
            return self._backoff

    def charge(self, n_bytes: int, now_s: float) -> float:
        """Charge received bytes to the bandwidth. Return the seconds that the receiver must wait."""
        if self.limits.max_bytes_per_s is None:
            return 0.0
        with self._exclusive():
            data = self._read(_TIME.size, _PAID_OFFSET)
            paid_until_s = self._paid_until_s if data is None else _TIME.unpack(data)[0]
            self._paid_until_s, wait_s = pay(paid_until_s, n_bytes, self.limits.max_bytes_per_s, now_s)
            self._write(_TIME.pack(self._paid_until_s), _PAID_OFFSET)
            return wait_s

    def take_slot(self) -> int | None:
        """Return a free slot of max_requests, or None if there is none now. NO_SLOT if there is no limit."""
        most = self.limits.max_requests
        if most is None:
            return NO_SLOT
        first = random.randrange(most)  # noqa: S311 - processes must not try the same slots in the same order
        with self._lock:
            for i in range(most):
                slot = (first + i) % most
                if slot not in self._slots and self._set_lock(fcntl.F_WRLCK, slot):
                    self._slots.add(slot)
                    return slot
        return None

    def give_back_slot(self, slot: int) -> None:
        """Free a slot that take_slot() returned."""
        if slot != NO_SLOT:
            with self._lock:
                self._slots.discard(slot)
                if self._fd is not None:  # closing the file has freed the slot
                    self._set_lock(fcntl.F_UNLCK, slot)

    def close(self) -> None:
        """Free all slots and close the file, which is opened again when it is needed. May be called repeatedly."""
        with self._lock, self._opening:
            fd, self._fd = self._fd, None
            if fd is not None:
                os.close(fd)

    def _file(self) -> int | None:
        """Return the descriptor of the shared file; None if it cannot be used."""
        if self._fd is None and self._path is not None:
            with self._opening:
                if self._fd is None:
                    self._fd = _open_shared(self._path)
                    if self._fd is None:
                        self._path = None
        return self._fd

    def __del__(self, is_exiting: Callable[[], bool] = sys.is_finalizing) -> None:
        if not is_exiting():
            fd, self._fd = self._fd, None
            if fd is not None:
                os.close(fd)

    def _set_lock(self, kind: int, slot: int) -> bool:
        fd = self._file()
        if fd is None:
            return True
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, _SLOTS_OFFSET + slot, 1, 0))
        except BlockingIOError:
            return False
        except OSError:
            return True  # a file system without such locks
        return True

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._lock:
            fd = self._file()
            if fd is not None:
                with suppress(OSError):
                    fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                yield
            finally:
                if fd is not None:
                    with suppress(OSError):
                        fcntl.flock(fd, fcntl.LOCK_UN)

    def _read_backoff(self) -> Backoff:
        data = self._read(_BACKOFF.size, 0)
        return self._backoff if data is None else Backoff(*_BACKOFF.unpack(data))

    def _read(self, n_bytes: int, offset: int) -> bytes | None:
        fd = self._file()
        if fd is not None:
            with suppress(OSError):
                data = os.pread(fd, n_bytes, offset)
                if len(data) == n_bytes:
                    return data
        return None

    def _write(self, data: bytes, offset: int) -> None:
        fd = self._file()
        if fd is not None:
            with suppress(OSError):
                os.pwrite(fd, data, offset)


def _shared_path(name: str) -> Path:
    return config.runtime_folder() / f"store-{hashlib.sha256(name.encode()).hexdigest()[:32]}"


def _open_shared(path: Path) -> int | None:
    """Return a descriptor of a store's file, which is created if it is missing; None if that is not possible."""
    folder = path.parent
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.geteuid():
            return None
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return None
    with suppress(OSError):
        if os.fstat(fd).st_size < _FILE_BYTES:
            os.ftruncate(fd, _FILE_BYTES)
    return fd


def _close_inherited() -> None:
    """Close the files of the parent in a forked child, which would keep the slots of a parent that ends."""
    for limits in list(_opened):
        fd, limits._fd = limits._fd, None  # noqa: SLF001 - of this module; its lock may be held by a thread of the parent
        if fd is not None:
            with suppress(OSError):
                os.close(fd)


os.register_at_fork(after_in_child=_close_inherited)
