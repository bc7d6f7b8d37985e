"""A copy in part: a sparse file that grows unit by unit, and beside it the map that says which units are there.

::

    copies/NAME.part    n_bytes long from the start; a unit's bytes are written before the map says so
    copies/NAME.map     head (64 bytes), uint8 flag[n_units] (1: there), 8-byte aligned uint32 crc32c[n_units]

The map's head names the part's inode, so that a map never speaks for another part of that name (where locks lie, two
may make one at the same time), and the boot: after a power failure the disk may have kept the map and lost the data, so
a part of an earlier boot is read back against its checksums before anybody is served from it.

Flags only ever go from 0 to 1. Readers read them with pread(2), and only as long as the answer is "not yet": a mapping
would kill the process, by SIGBUS, where somebody cuts the map short.
"""

from __future__ import annotations

import errno
import os
import struct
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiercache._native.checksum import crc32c
from tiercache.cache.inherit import close_private, keep_private
from tiercache.cache.locks import try_shared
from tiercache.cache.machine import boot_id
from tiercache.cache.sums import sums_of
from tiercache.cache.units import PIECE_BYTES, UNIT_BYTES, Mask, bounds, covers, n_units, ranges_of, runs_of
from tiercache.catalog import charge_bytes
from tiercache.catalog.files import set_mode
from tiercache.catalog.tables import BLOCK_BYTES
from tiercache.points import reach
from tiercache.store.posix import write_all
from tiercache.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tiercache.cache.folder import Folder
    from tiercache.model import ByteRange

MAGIC = b"\x89TCMAP\r\n"
HEAD_BYTES = 64
_HEAD = struct.Struct("<8sIIQQ16s12xI")
_VERSION = 1
# ext4 keeps four extents in the inode, and some 340 in each block beyond: charged as if half of each were in use.
_EXTENTS_IN_INODE = 4
_EXTENTS_PER_BLOCK = 170
# Between a part and its map lie some system calls of its maker.
SETTLE_S = 0.5


def map_bytes(n_bytes: int) -> int:
    """Size of the map of a file of n_bytes."""
    return _crc_offset(n_bytes) + 4 * n_units(n_bytes)


def _crc_offset(n_bytes: int) -> int:
    return HEAD_BYTES + -(-n_units(n_bytes) // 8) * 8


def charge_of(present: Mask, n_bytes: int) -> int:
    """What a part with these units, its map and its record take on disk; 0 with none."""
    if not present.any():
        return 0
    n_extents = len(runs_of(present))
    n_blocks = 0 if n_extents <= _EXTENTS_IN_INODE else 1 + n_extents // _EXTENTS_PER_BLOCK
    data_bytes = (int(present.sum()) + n_blocks) * UNIT_BYTES
    return charge_bytes(data_bytes) + charge_bytes(map_bytes(n_bytes)) - BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a map. inode: of the part it speaks for; boot: in which the part was written."""

    n_bytes: int
    inode: int
    boot: str

    def pack(self) -> bytes:
        """Its 64 bytes."""
        body = _HEAD.pack(MAGIC, _VERSION, UNIT_BYTES, self.n_bytes, self.inode, self.boot.encode(), 0)[:-4]
        return body + struct.pack("<I", crc32c(body))

    @classmethod
    def parse(cls, data: bytes) -> Head | None:
        """The head, None if it is none: torn by a power failure, or of another release."""
        if len(data) != HEAD_BYTES:
            return None
        magic, version, unit_bytes, n_bytes, inode, boot, crc = _HEAD.unpack(data)
        if (magic, version, unit_bytes, crc) != (MAGIC, _VERSION, UNIT_BYTES, crc32c(data[:-4])):
            return None
        return cls(n_bytes, inode, boot.rstrip(b"\0").decode("ascii", "replace"))


class Presence:
    """Which units of a file are there, as its map says. Owns a descriptor of the map. Safe from any thread.

    What was seen to be there is not asked for again; two threads may both ask, which does no harm.
    """

    def __init__(self, fd: int, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._fd = fd
        self._seen = np.zeros(n_units(n_bytes), bool)

    def covers(self, ranges: Sequence[ByteRange]) -> bool:
        """Whether all these bytes are there by now."""
        if covers(self._seen, ranges, self.n_bytes):
            return True
        for wanted in ranges:
            if wanted.end > self.n_bytes or not self._look(*bounds(wanted, self.n_bytes)):
                return False
        return True

    def _look(self, first: int, last: int) -> bool:
        if not self._seen[first:last].all():
            self._seen[first:last] |= read_flags(self._fd, first, last)
        return bool(self._seen[first:last].all())

    def mask(self) -> Mask:
        """All units that are there by now; a copy."""
        self._look(0, len(self._seen))
        return self._seen.copy()

    def dup(self) -> Presence:
        """Another one with a descriptor of its own."""
        return Presence(os.dup(self._fd), self.n_bytes)

    def sums(self, first: int, last: int) -> np.ndarray:
        """CRC-32C of the units [first, last), uint32; shorter where the map is. Valid of those that are there."""
        data = os.pread(self._fd, 4 * (last - first), _crc_offset(self.n_bytes) + 4 * first)
        return np.frombuffer(data[: len(data) // 4 * 4], "<u4")

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def close(self) -> None:
        """Close the map. Once only."""
        close_private(self._fd)


def read_flags(map_fd: int, first: int, last: int) -> Mask:
    """The flags of units [first, last); what cannot be read is not there."""
    try:
        data = os.pread(map_fd, last - first, HEAD_BYTES + first)
    except OSError:
        data = b""
    flags = np.zeros(last - first, bool)
    flags[: len(data)] = np.frombuffer(data, np.uint8) == 1
    return flags


@dataclass(slots=True)
class Held:
    """A reader's hold on a copy: a descriptor under a reader's lock, and the map where it is (or was) a part.

    presence: None: all of it is there.
    """

    fd: int
    presence: Presence | None = None

    def dup(self) -> Held:
        """The same hold once more: they share one lock, which lasts until the last of them is closed."""
        fd = os.dup(self.fd)
        try:
            return Held(fd, None if self.presence is None else self.presence.dup())
        except BaseException:
            os.close(fd)
            raise

    def keep_private(self) -> None:
        """Let a forked child close it."""
        keep_private(self.fd)
        if self.presence is not None:
            keep_private(self.presence.fileno())

    def close(self) -> None:
        """End the hold. Once only."""
        try:
            close_private(self.fd)  # never LOCK_UN: closing ends this hold and no other
        finally:
            if self.presence is not None:
                self.presence.close()


def hold_part(folder: Folder, name: str, n_bytes: int) -> Held | None:
    """A reader's hold on the part of a copy; None: none is there, or it is being evicted, or not vouched for.

    The races with eviction and with an earlier boot are those of open_leased() and Part.open().
    """
    fd = folder.open_copy(f"{name}.part")
    if fd is None:
        return None
    map_fd = None
    try:
        if try_shared(fd) and os.fstat(fd).st_nlink:
            map_fd = folder.open_copy(f"{name}.map")
            if map_fd is not None and _head_of(map_fd, fd, n_bytes) == boot_id():
                return Held(fd, Presence(map_fd, n_bytes))
    except BaseException:
        _close_all(fd, map_fd)
        raise
    _close_all(fd, map_fd)
    return None


def _close_all(*fds: int | None) -> None:
    with ExitStack() as closing:  # where closing one fails (a network file system writes then), the others are closed
        for fd in fds:
            if fd is not None:
                closing.callback(os.close, fd)


def _open_pair(folder: Folder, name: str, n_bytes: int) -> tuple[tuple[int, int], str] | None:
    """Descriptors of a part and its map, for writing, and the boot they are of; None: there is no such pair."""
    fd, map_fd = folder.open_to_write(f"{name}.part"), None
    try:
        map_fd = folder.open_to_write(f"{name}.map")
        boot = None if fd is None or map_fd is None else _head_of(map_fd, fd, n_bytes)
    except BaseException:
        _close_all(fd, map_fd)
        raise
    if fd is None or map_fd is None or boot is None:
        _close_all(fd, map_fd)
        return None
    return (fd, map_fd), boot


def _head_of(map_fd: int, part_fd: int, n_bytes: int) -> str | None:
    """The boot in which a part was written; None: these two are no part of n_bytes and its map."""
    status = os.fstat(part_fd)
    if status.st_nlink != 1:  # unlinked meanwhile; or a copy already, whose map is about to go
        return None
    head = Head.parse(os.pread(map_fd, HEAD_BYTES, 0))
    fits = head is not None and (head.n_bytes, head.inode, status.st_size) == (n_bytes, status.st_ino, n_bytes)
    return head.boot if head is not None and fits and os.fstat(map_fd).st_size == map_bytes(n_bytes) else None


class Part:
    """The writing end of a part. Its threads write different units; whoever opens it holds the name's lock.

    present: bool[n_units], what is there; held, and changed by write().
    """

    def __init__(self, folder: Folder, name: str, n_bytes: int, fds: tuple[int, int]) -> None:
        """fds: of part and map, open for writing, taken over."""
        self.folder, self.name, self.n_bytes = folder, name, n_bytes
        self.fd, self._map_fd = keep_private(fds[0]), keep_private(fds[1])
        self.present: Mask = read_flags(self._map_fd, 0, n_units(n_bytes))

    @classmethod
    def create(cls, folder: Folder, name: str, n_bytes: int) -> Part:
        """A new part without a unit. Raises OSError, FileExistsError where somebody else has just made one.

        Whoever makes the part may make its map: one that lies there already is of a part that is gone.
        """
        fd = folder.new_file(f"{name}.part")
        map_fd = None
        try:
            reach("fetch.part")
            os.ftruncate(fd, n_bytes)
            folder.remove_file("copies", f"{name}.map")
            map_fd = folder.new_file(f"{name}.map")
            reach("fetch.map")
            os.ftruncate(map_fd, map_bytes(n_bytes))
            # The head last: a map without one is none.
            os.pwrite(map_fd, Head(n_bytes, os.fstat(fd).st_ino, boot_id()).pack(), 0)
            reach("fetch.mapped")
        except BaseException:
            _close_all(fd, map_fd)
            folder.remove_part(name)
            raise
        return cls(folder, name, n_bytes, (fd, map_fd))

    @classmethod
    def open(cls, folder: Folder, name: str, n_bytes: int) -> Part | None:
        """The part that is there; None: there is none. What cannot be gone on with is removed.

        One of an earlier boot is read back: each unit must be what its checksum says. One without a map has lost its
        maker; but where locks lie he may be about to make the map, so he gets a moment. And where no part is, none is
        removed: there he may have made it since we looked, and would fill, for himself, a file without a name.
        """
        has_map = folder.has_file(f"{name}.map")  # asked first: whoever makes a part makes its map after it
        found = wait_for(lambda: _open_pair(folder, name, n_bytes) or not folder.has_file(f"{name}.part"), SETTLE_S)
        if found is True:
            if has_map and not folder.has_copy(name):
                folder.remove_file("copies", f"{name}.map")
            return None
        if not found:
            folder.remove_part(name)
            return None
        fds, boot = found
        part = cls(folder, name, n_bytes, fds)
        try:
            if boot == boot_id() or part._vouch():
                return part
        except BaseException:
            part.close()
            raise
        part.close()
        folder.remove_part(name)
        return None

    def _vouch(self) -> bool:
        """Whether each unit that is there has its checksum; if so the part is of this boot from now on."""
        if wrong_units(self.fd, Presence(self._map_fd, self.n_bytes)):
            return False
        reach("fetch.vouched")
        os.pwrite(self._map_fd, Head(self.n_bytes, os.fstat(self.fd).st_ino, boot_id()).pack(), 0)
        return True

    def write(self, start: int, data: np.ndarray) -> int | None:
        """Write whole units (the file's last may be short) from start on; the CRC-32C of data if all of it was written.

        Where locks lie another process may have written some of them meanwhile: those stay as they are, for somebody
        may be reading them. Data, then checksums, then flags: whoever dies in between has written nothing.

        Args:
            start: a multiple of UNIT_BYTES.
            data: uint8[n], not kept.

        Raises:
            OSError: the disk.
        """
        sums, whole = sums_of(data)
        first, n = start // UNIT_BYTES, max(len(sums), 1)
        missing = ~read_flags(self._map_fd, first, first + n)
        for begin, end in runs_of(missing):
            part = data[begin * UNIT_BYTES : end * UNIT_BYTES]
            write_all(self.fd, part.data, start + begin * UNIT_BYTES)
            reach("fetch.data")
            at = _crc_offset(self.n_bytes) + 4 * (first + begin)
            write_all(self._map_fd, memoryview(sums[begin:end].tobytes()), at)
            reach("fetch.sums")
            write_all(self._map_fd, memoryview(b"\x01" * (end - begin)), HEAD_BYTES + first + begin)
            reach("fetch.flags")
        self.present[first : first + n] = True
        return whole if missing.all() else None

    def look_again(self) -> None:
        """See what another has written too, where locks lie. Of two that do so after their last write one sees all."""
        self.present |= read_flags(self._map_fd, 0, len(self.present))

    def hold(self) -> Held:
        """A reader's hold on this very file, whatever has its name by now."""
        fd, map_fd = _reopen(self.fd, self.folder.copy_path(f"{self.name}.part")), None
        try:
            try_shared(fd)
            map_fd = _reopen(self._map_fd, self.folder.copy_path(f"{self.name}.map"))
            return Held(fd, Presence(map_fd, self.n_bytes))
        except BaseException:
            _close_all(fd, map_fd)
            raise

    @property
    def has_name(self) -> bool:
        """Whether the file has any name still."""
        return os.fstat(self.fd).st_nlink > 0

    def seal(self, mode: int) -> None:
        """Let nobody open it for writing any more."""
        set_mode(self.fd, mode)

    def forget_name(self, *, keep_map: bool) -> None:
        """Drop the names that a part has, if they are still this one's: it is a copy now."""
        path = self.folder.copy_path(f"{self.name}.part")
        with suppress(FileNotFoundError):
            if os.lstat(path).st_ino != os.fstat(self.fd).st_ino:
                return
        if not keep_map:  # first: a part beside its copy is swept, a map alone beside it would stay
            self.folder.remove_file("copies", f"{self.name}.map")
        self.folder.remove_part(self.name, keep_map=True)

    def close(self) -> None:
        """Close the files. Once only."""
        try:
            close_private(self.fd)
        finally:
            close_private(self._map_fd)


def _reopen(fd: int, path: str) -> int:
    """Another open file of what fd is of. Raises FileNotFoundError: it has lost its name, and there is no /proc."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    with suppress(FileNotFoundError, PermissionError):
        return os.open(f"/proc/self/fd/{fd}", flags)
    other = os.open(path, flags | os.O_NOFOLLOW)
    try:
        if os.fstat(other).st_ino == os.fstat(fd).st_ino:
            return other
    except BaseException:
        os.close(other)
        raise
    os.close(other)
    raise FileNotFoundError(errno.ENOENT, "another file has this name by now", path)


def open_map(folder: Folder, name: str, fd: int, n_bytes: int) -> Presence | None:
    """The map of the copy or part that fd is open on; None: there is none that speaks for it."""
    map_fd = folder.open_copy(f"{name}.map")
    if map_fd is None:
        return None
    try:
        if _head_of(map_fd, fd, n_bytes) is not None:
            return Presence(map_fd, n_bytes)
    except BaseException:
        os.close(map_fd)
        raise
    os.close(map_fd)
    return None


def read_all(fd: int, buffer: memoryview, offset: int) -> bool:
    """Fill buffer from a file; False: it ends before, or cannot be read."""
    done = 0
    while done < len(buffer):
        try:
            n_read = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError:
            return False
        if not n_read:
            return False
        done += n_read
    return True


def wrong_units(fd: int, presence: Presence) -> list[int]:
    """Offsets of the units of a part that are not what came from its source; of what cannot be read, the first.

    fd: of the part.
    """
    wrong: list[int] = []
    for span in ranges_of(presence.mask(), presence.n_bytes):
        for start in range(span.start, span.end, PIECE_BYTES):
            data = np.empty(min(PIECE_BYTES, span.end - start), np.uint8)
            if not read_all(fd, data.data, start):
                wrong.append(start)
                continue
            sums, first = sums_of(data)[0], start // UNIT_BYTES
            expected = presence.sums(first, first + len(sums))
            is_wrong = np.ones(len(sums), bool)  # what a map that was cut short says nothing of is wrong too
            is_wrong[: len(expected)] = expected != sums[: len(expected)]
            wrong += (start + UNIT_BYTES * np.flatnonzero(is_wrong)).tolist()
    return wrong
