"""`CopyFile`, an open copy; a partial one is a sparse file that grows in units of 4 KiB, with a map of its units.

::

    copies/NAME.part    n_bytes long from the start; a unit's bytes are written before the map says so
    copies/NAME.map     head (64 bytes), uint8 flag[n_units] (1: present), 8-byte aligned uint32 crc32c[n_units]

The head of the map contains the inode of the partial copy, so that a map never describes another file of that name. It
also contains the boot: after a power failure the disk may have kept the map and lost the data, so a partial copy of an
earlier boot is verified against its checksums before it is served.

A flag only changes from 0 to 1. Readers read flags with pread(2), and only while the flag was 0: with a mapping, SIGBUS
would kill the process if another process truncated the map.

The record of a complete copy has the checksums of its sections, at most N_SECTIONS of equal size. If the copy is
damaged, it becomes a partial copy again that has the units of its right sections, and only the others are fetched. They
are overwritten in place: a reader that has the file mapped sees the damage, which its checksums reveal, or right bytes.

A mask of units is bool[n_units], True for the selected units. An empty file has one unit of no bytes: it too must be
fetched once before it counts as present.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tiercache._native.checksum import combine_pages, crc32c, crc32c_pages
from tiercache.cache.folder import BLOCK_BYTES, Folder, charge_bytes, close_private, keep_private, try_shared
from tiercache.cache.names import CopySpec
from tiercache.crash_points import crash_point
from tiercache.model import ByteRange
from tiercache.store import Span
from tiercache.store.contract import covering_ranges
from tiercache.store.local import write_all
from tiercache.store.shared_files import PRIVATE, boot_id, set_mode

# The block size of the disk. A smaller unit would take as much space; a larger one would fetch more bytes that no
# reader needs when columns are selected, up to two units per chunk.
UNIT_BYTES = 4096
# The size of one request: long enough for the full speed of a store.
REQUEST_BYTES = 8 << 20
# Bytes that are read and checked at a time: they fit the second cache of a core.
_CHECK_BYTES = 1 << 20
# If less than this is missing of a file, it is fetched too: a whole copy needs no map and is verified as a whole.
LITTLE_BYTES = 256 << 10
LITTLE_SHARE = 32
# A gap that is fetched takes space in the cache, which costs more than the time to read it; so only short gaps are.
_UNIT_GAP_BYTES = 16 << 10
# A gap of units that are to be fetched in any case only delays what comes after it. It must be fetched with its
# neighbours if the store would read it between them: otherwise it comes twice.
_REQUESTED_GAP_BYTES = 250_000
_ANY_BYTES = 1 << 62
N_SECTIONS = 256  # so that the record takes one block of the disk

Mask: TypeAlias = npt.NDArray[np.bool_]


def n_units(n_bytes: int) -> int:
    return max(-(-n_bytes // UNIT_BYTES), 1)


def bounds(span: ByteRange, n_bytes: int) -> tuple[int, int]:
    start, end = min(span.start, n_bytes), min(span.end, n_bytes)
    if not n_bytes:
        return 0, 1
    return start // UNIT_BYTES, -(-end // UNIT_BYTES) if end > start else start // UNIT_BYTES


def mask_of(ranges: Iterable[ByteRange], n_bytes: int) -> Mask:
    mask = np.zeros(n_units(n_bytes), bool)
    for span in ranges:
        first, last = bounds(span, n_bytes)
        mask[first:last] = True
    return mask


def covers(present: Mask, ranges: Iterable[ByteRange], n_bytes: int) -> bool:
    for span in ranges:
        if span.end > n_bytes:
            return False
        first, last = bounds(span, n_bytes)
        if not present[first:last].all():
            return False
    return True


def runs_of(mask: Mask) -> list[tuple[int, int]]:
    edges = (np.flatnonzero(mask[1:] != mask[:-1]) + 1).tolist()
    if mask[:1].any():
        edges.insert(0, 0)
    if mask[-1:].any():
        edges.append(len(mask))
    return list(zip(edges[::2], edges[1::2], strict=True))


def ranges_of(mask: Mask, n_bytes: int) -> list[ByteRange]:
    return [ByteRange(first * UNIT_BYTES, min(last * UNIT_BYTES, n_bytes)) for first, last in runs_of(mask)]


def next_request(
    mask: Mask,
    n_bytes: int,
    request_bytes: int = REQUEST_BYTES,
    *,
    gaps: Mask | None = None,
    run_bytes: int = _ANY_BYTES,
) -> list[ByteRange]:
    """Return the ranges of the first units of a mask, at most request_bytes in total, for one request.

    gaps: Units that come too where they lie in a gap that costs less than a request. run_bytes: The first range is
    requested alone if it is longer, and has at most so many bytes.
    """
    if gaps is not None and mask.any():
        mask = mask | with_gaps(mask, n_bytes, _REQUESTED_GAP_BYTES) & gaps
    first = np.zeros_like(mask)
    first[np.flatnonzero(mask)[: request_bytes // UNIT_BYTES]] = True
    ranges = ranges_of(first, n_bytes)
    if ranges and ranges[0].n_bytes > run_bytes:
        return [ByteRange(ranges[0].start, ranges[0].start + run_bytes)]
    return ranges


def with_gaps(mask: Mask, n_bytes: int, max_gap_bytes: int = _UNIT_GAP_BYTES) -> Mask:
    return mask_of(covering_ranges(ranges_of(mask, n_bytes), max_gap_bytes, _ANY_BYTES), n_bytes)


def bytes_of(mask: Mask, n_bytes: int) -> int:
    whole = int(mask.sum()) * UNIT_BYTES
    return whole - (len(mask) * UNIT_BYTES - n_bytes if mask[-1] else 0)


def to_fetch(present: Mask, requested: Mask, n_bytes: int) -> Mask:
    """Return the missing units of a request, with_gaps(), and with the rest of the file if it is small."""
    missing = requested & ~present
    if not missing.any():
        return missing
    missing = with_gaps(missing, n_bytes) & ~present
    rest = ~present & ~missing
    left_bytes = bytes_of(rest, n_bytes)
    return missing | rest if left_bytes < LITTLE_BYTES or left_bytes * LITTLE_SHARE < n_bytes else missing


def _sections(n_bytes: int) -> list[ByteRange]:
    section_bytes = -(-n_units(n_bytes) // N_SECTIONS) * UNIT_BYTES
    return [ByteRange(start, min(start + section_bytes, n_bytes)) for start in range(0, n_bytes, section_bytes)]


def is_right_copy(fd: int, spec: CopySpec) -> bool:
    crc, offset, _ = read_checksum(fd, spec.n_bytes)
    return offset == spec.n_bytes == os.fstat(fd).st_size and crc == spec.crc32c


def read_checksum(fd: int, n_bytes: int) -> tuple[int, int, OSError | None]:
    """Return the CRC-32C of a file as far as it can be read, the bytes read, and the error that ended it."""
    buffer = memoryview(bytearray(min(REQUEST_BYTES, max(n_bytes, 1))))
    crc = offset = 0
    while offset < n_bytes:
        try:
            n_read = os.preadv(fd, [buffer[: n_bytes - offset]], offset)
        except OSError as error:
            return crc, offset, error
        if not n_read:
            break
        crc = crc32c(buffer[:n_read], crc)
        offset += n_read
    return crc, offset, None


MAGIC = b"\x89TCMAP\r\n"
HEAD_BYTES = 64
_HEAD = struct.Struct("<8sIIQQ16s12xI")
_VERSION = 1
# ext4 keeps four extents in the inode and about 340 in each further block; the charge assumes half-full blocks.
_EXTENTS_IN_INODE = 4
_EXTENTS_PER_BLOCK = 170


def map_bytes(n_bytes: int) -> int:
    return _crc_offset(n_bytes) + 4 * n_units(n_bytes)


def _crc_offset(n_bytes: int) -> int:
    return HEAD_BYTES + -(-n_units(n_bytes) // 8) * 8


def charge_of(present: Mask, n_bytes: int) -> int:
    """Return the disk space in bytes of a partial copy with these units, its map and its record; 0 without units."""
    if not present.any():
        return 0
    n_extents = len(runs_of(present))
    n_blocks = 0 if n_extents <= _EXTENTS_IN_INODE else 1 + n_extents // _EXTENTS_PER_BLOCK
    data_bytes = (int(present.sum()) + n_blocks) * UNIT_BYTES
    return charge_bytes(data_bytes) + charge_bytes(map_bytes(n_bytes)) - BLOCK_BYTES


def _head(fd: int, n_bytes: int) -> bytes:
    body = _HEAD.pack(MAGIC, _VERSION, UNIT_BYTES, n_bytes, os.fstat(fd).st_ino, boot_id().encode(), 0)[:-4]
    return body + struct.pack("<I", crc32c(body))


def _boot_of(map_fd: int, part_fd: int, n_bytes: int) -> str | None:
    """Return the boot in which a partial copy was written; None: the files do not belong together, or one is torn."""
    status = os.fstat(part_fd)
    head = os.pread(map_fd, HEAD_BYTES, 0)
    if status.st_nlink != 1:  # it was unlinked; or it is a complete copy already, whose map is about to be deleted
        return None
    if len(head) != HEAD_BYTES or status.st_size != n_bytes or os.fstat(map_fd).st_size != map_bytes(n_bytes):
        return None
    *facts, boot, crc = _HEAD.unpack(head)
    if facts != [MAGIC, _VERSION, UNIT_BYTES, n_bytes, status.st_ino] or crc != crc32c(head[:-4]):
        return None
    return str(boot.rstrip(b"\0").decode("ascii", "replace"))


def read_flags(map_fd: int, first: int, last: int) -> Mask:
    """Return the flags of the units [first, last). A flag that cannot be read counts as 0."""
    data = b""
    with suppress(OSError):
        data = os.pread(map_fd, last - first, HEAD_BYTES + first)
    flags = np.zeros(last - first, bool)
    flags[: len(data)] = np.frombuffer(data, np.uint8) == 1
    return flags


class CopyFile:
    """An open copy: its file, and its unit map unless it was whole when it was opened.

    A reader's file has a shared lock, and any thread may use it. A fetch's file is open for writing, under the lock of
    the name; its threads write different units.

    Attributes:
        fd, map_fd: Descriptors of the copy and of its map; map_fd is -1 if the copy is whole.
        present: Units of a partial copy that are known to be present, bool[n_units]; of a whole copy bool[0].
    """

    def __init__(self, fd: int, n_bytes: int, map_fd: int = -1) -> None:
        self.fd, self.n_bytes, self.map_fd = fd, n_bytes, map_fd
        self.present = np.zeros(n_units(n_bytes) if map_fd >= 0 else 0, bool)

    @property
    def is_partial(self) -> bool:
        return self.map_fd >= 0

    def covers(self, ranges: Sequence[ByteRange]) -> bool:
        if any(span.end > self.n_bytes for span in ranges):
            return False
        if not self.is_partial or covers(self.present, ranges, self.n_bytes):
            return True
        return all(self._update(*bounds(span, self.n_bytes)) for span in ranges)

    def _update(self, first: int, last: int) -> bool:
        if not self.present[first:last].all():
            self.present[first:last] |= read_flags(self.map_fd, first, last)
        return bool(self.present[first:last].all())

    def mask(self) -> Mask:
        if not self.is_partial:
            return np.ones(n_units(self.n_bytes), bool)
        self._update(0, len(self.present))
        return self.present.copy()

    # -- for readers ---------------------------------------------------------------------------------------------------

    def _checked(self, span: ByteRange) -> Iterator[tuple[int, npt.NDArray[np.uint8], list[int]]]:
        """Yield the units of a range in pieces: offset, data (until the next piece), and the offsets of wrong units."""
        buffer = np.empty(_CHECK_BYTES, np.uint8)
        end = min(-(-span.end // UNIT_BYTES) * UNIT_BYTES, self.n_bytes)
        for start in range(span.start // UNIT_BYTES * UNIT_BYTES, end, _CHECK_BYTES):
            data = buffer[: end - start]
            if not read_all(self.fd, data.data, start):
                yield start, data, [start]
                continue
            sums = np.empty(-(-len(data) // UNIT_BYTES), np.uint32)
            crc32c_pages(int(data.__array_interface__["data"][0]), len(data), UNIT_BYTES, sums)
            raw = os.pread(self.map_fd, 4 * len(sums), _crc_offset(self.n_bytes) + 4 * (start // UNIT_BYTES))
            expected = np.frombuffer(raw[: len(raw) // 4 * 4], "<u4")
            # A unit without a checksum, because the map was truncated, is wrong too.
            is_wrong = np.ones(len(sums), bool)
            is_wrong[: len(expected)] = expected != sums[: len(expected)]
            yield start, data, (start + UNIT_BYTES * np.flatnonzero(is_wrong)).tolist()

    def wrong_units(self) -> list[int]:
        spans = ranges_of(self.mask(), self.n_bytes)
        return [offset for span in spans for _, _, wrong in self._checked(span) for offset in wrong]

    def are_right(self, ranges: Sequence[ByteRange]) -> bool:
        return not any(wrong for span in ranges for _, _, wrong in self._checked(span))

    def read(self, spans: Sequence[Span]) -> bool:
        """Fill every span, each unit compared with the map; False: corrupt or unreadable, and undefined buffers."""
        for span, buffer in spans:
            if span.end > self.n_bytes:
                return False
            for start, data, wrong in self._checked(span):
                if wrong:
                    return False
                begin, stop = max(start, span.start), min(start + len(data), span.end)
                buffer[begin - span.start : stop - span.start] = data.data[begin - start : stop - start]
        return True

    def dup(self) -> CopyFile:
        """Return a second view. Both share one lock, which lasts until the last of them is closed."""
        fd = os.dup(self.fd)
        try:
            return CopyFile(fd, self.n_bytes, os.dup(self.map_fd) if self.is_partial else -1)
        except BaseException:
            os.close(fd)
            raise

    # -- for the fetch -------------------------------------------------------------------------------------------------

    def start_writing(self) -> CopyFile:
        self._sums = np.zeros(n_units(self.n_bytes), "<u4")  # of the units that are written from now on
        self.mask()
        return self.keep_private()

    def write(self, offset: int, data: memoryview) -> None:
        """Write bytes of units that are not present, and checksum them. A unit's bytes come in order."""
        write_all(self.fd, data, offset)
        self._add_sums(offset, data)

    def _add_sums(self, offset: int, data: memoryview) -> None:
        array, done = np.frombuffer(data, np.uint8), 0
        while done < len(array):
            unit, in_unit = divmod(offset + done, UNIT_BYTES)
            n_whole = (len(array) - done) // UNIT_BYTES
            if in_unit or not n_whole:
                piece = array[done : done + UNIT_BYTES - in_unit]
                # Of a unit so far: the last unit of the file may be short.
                self._sums[unit] = crc32c(piece.data, int(self._sums[unit]) if in_unit else 0)
            else:
                piece = array[done : done + n_whole * UNIT_BYTES]
                address = int(piece.__array_interface__["data"][0])
                crc32c_pages(address, len(piece), UNIT_BYTES, self._sums[unit : unit + n_whole])
            done += len(piece)

    def mark_present(self, span: ByteRange) -> None:
        """Mark units as present: data, checksums and flags come in this order, so a crash leaves no wrong unit."""
        first, last = span.start // UNIT_BYTES, max(-(-span.end // UNIT_BYTES), 1)
        crash_point("fetch.data")
        write_all(self.map_fd, memoryview(self._sums[first:last].tobytes()), _crc_offset(self.n_bytes) + 4 * first)
        crash_point("fetch.sums")
        write_all(self.map_fd, memoryview(b"\x01" * (last - first)), HEAD_BYTES + first)
        crash_point("fetch.flags")
        self.present[first:last] = True

    def checksum(self) -> int:
        """Return the CRC-32C of the whole file, combined from those of its units, which must all be present."""
        sums = self._sums_of_map()
        if len(sums) == len(self.present) and self.n_bytes:  # an empty file has no pages
            return combine_pages(sums, UNIT_BYTES, self.n_bytes)
        crc, _, error = read_checksum(self.fd, self.n_bytes)
        if error is not None:
            raise error
        return crc

    def section_sums(self) -> bytes:
        """Return the CRC-32C of each section, uint32, combined from those of its units; b"": the map is cut."""
        sums = self._sums_of_map()
        if len(sums) != len(self.present):
            return b""
        spans = [(bounds(section, self.n_bytes), section.n_bytes) for section in _sections(self.n_bytes)]
        found = [combine_pages(sums[first:last], UNIT_BYTES, n_bytes) for (first, last), n_bytes in spans]
        return np.array(found, "<u4").tobytes()

    def mark_right_sections(self, section_sums: bytes) -> None:
        """Mark the sections of which the file has the right bytes as present."""
        for section, expected in zip(_sections(self.n_bytes), np.frombuffer(section_sums, "<u4"), strict=True):
            for start in range(section.start, section.end, _CHECK_BYTES):
                data = memoryview(bytearray(min(_CHECK_BYTES, section.end - start)))
                if not read_all(self.fd, data, start):
                    break
                self._add_sums(start, data)
            else:
                first, last = bounds(section, self.n_bytes)
                if combine_pages(self._sums[first:last], UNIT_BYTES, section.n_bytes) == expected:
                    self.mark_present(section)

    def _sums_of_map(self) -> npt.NDArray[np.uint32]:
        data = os.pread(self.map_fd, 4 * len(self.present), _crc_offset(self.n_bytes))
        return np.frombuffer(data[: len(data) // 4 * 4], "<u4")

    def hold(self) -> CopyFile:
        """Return a reader's view of this file, even if another file has its name by now."""
        flags = os.O_RDONLY | os.O_CLOEXEC
        fd = os.open(f"/proc/self/fd/{self.fd}", flags)
        try:
            try_shared(fd)
            return CopyFile(fd, self.n_bytes, os.open(f"/proc/self/fd/{self.map_fd}", flags))
        except BaseException:
            os.close(fd)
            raise

    @property
    def has_name(self) -> bool:
        return os.fstat(self.fd).st_nlink > 0

    # -- the end -------------------------------------------------------------------------------------------------------

    def keep_private(self) -> CopyFile:
        keep_private(self.fd)
        if self.is_partial:
            keep_private(self.map_fd)
        return self

    def close(self) -> None:
        try:
            close_private(self.fd)  # never LOCK_UN, which would end the lock of all duplicates
        finally:
            if self.is_partial:
                close_private(self.map_fd)


def open_whole(folder: Folder, name: str, n_bytes: int) -> CopyFile | None:
    """Open a whole copy under a reader's lock; None: it is missing, being evicted, or has another size.

    The race: (1) the reader opens the file, (2) the evictor locks and unlinks it, (3) the reader locks a file without a
    name, for whose bytes nobody accounts. So a file without a name is a miss.
    """
    fd = folder.open_copy(name)
    if fd is None:
        return None
    try:
        if try_shared(fd):
            status = os.fstat(fd)
            if status.st_nlink and status.st_size == n_bytes and stat.S_ISREG(status.st_mode):
                return CopyFile(fd, n_bytes)
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def open_part(folder: Folder, name: str, n_bytes: int) -> CopyFile | None:
    """Open a partial copy under a reader's lock; None: it is missing, being evicted, or of an earlier boot."""
    fd = folder.open_copy(f"{name}.part")
    if fd is None:
        return None
    try:
        found = open_map(folder, name, fd, n_bytes, boot=boot_id()) if try_shared(fd) else None
    except BaseException:
        os.close(fd)
        raise
    if found is None:
        os.close(fd)
    return found


def open_map(folder: Folder, name: str, fd: int, n_bytes: int, *, boot: str | None = None) -> CopyFile | None:
    """Return a view of a copy that fd is open on, which it then owns, with its map; None: no map (of boot) fits it."""
    map_fd = folder.open_copy(f"{name}.map")
    if map_fd is None:
        return None
    try:
        written = _boot_of(map_fd, fd, n_bytes)
        if written is not None and boot in (None, written):
            return CopyFile(fd, n_bytes, map_fd)
    except BaseException:
        os.close(map_fd)
        raise
    os.close(map_fd)
    return None


def create_part(folder: Folder, name: str, n_bytes: int) -> CopyFile:
    with ExitStack() as on_error:
        fd = folder.new_file(f"{name}.part")
        on_error.callback(folder.remove_part, name)
        on_error.callback(os.close, fd)
        crash_point("fetch.part")
        os.ftruncate(fd, n_bytes)
        part = _with_new_map(folder, name, fd, n_bytes)
        on_error.pop_all()
    return part


def _with_new_map(folder: Folder, name: str, fd: int, n_bytes: int) -> CopyFile:
    folder.remove_file("copies", f"{name}.map")
    with ExitStack() as on_error:
        map_fd = folder.new_file(f"{name}.map")
        on_error.callback(os.close, map_fd)
        crash_point("fetch.map")
        os.ftruncate(map_fd, map_bytes(n_bytes))
        # The head is written last: a map without a head is ignored.
        os.pwrite(map_fd, _head(fd, n_bytes), 0)
        crash_point("fetch.mapped")
        on_error.pop_all()
    return CopyFile(fd, n_bytes, map_fd).start_writing()


def keep_right_sections(folder: Folder, record: CopySpec) -> Mask | None:
    """Make a damaged complete copy a partial one of its right sections, and return its units; None: none is known.

    Under the lock of the name. The map is complete before the copy loses its name, so a crash leaves one or the other.
    """
    name, n_bytes = record.name, record.n_bytes
    fd = None if folder.size_of(name) == -1 else folder.open_copy(name)
    if fd is None:
        return None
    if len(record.section_sums) != 4 * len(_sections(n_bytes)):
        os.close(fd)
        return None
    with ExitStack() as on_error:
        on_error.callback(os.close, fd)
        part = _with_new_map(folder, name, fd, n_bytes)
        on_error.pop_all()
    with closing(part):
        part.mark_right_sections(record.section_sums)
        if part.present.all() or not part.present.any():
            return None
        crash_point("damaged.mapped")
        folder.take_name(name)
        crash_point("damaged.renamed")
        set_mode(fd, PRIVATE)
        os.truncate(f"/proc/self/fd/{fd}", n_bytes)
    return part.present


def continue_part(folder: Folder, name: str, n_bytes: int) -> CopyFile | None:
    """Open the partial copy for writing; None: there is none. One that cannot be continued is removed.

    The units of an earlier boot are verified against their checksums.
    """
    boot = None
    with ExitStack() as on_failure:
        fds = []
        for kind in (".part", ".map"):
            fds.append(folder.open_to_write(f"{name}{kind}"))
            if fds[-1] is not None:
                on_failure.callback(os.close, fds[-1])
        fd, map_fd = fds
        if fd is not None and map_fd is not None:
            boot = _boot_of(map_fd, fd, n_bytes)
            part = CopyFile(fd, n_bytes, map_fd)
            if boot == boot_id() or (boot is not None and not part.wrong_units()):
                if boot != boot_id():
                    crash_point("fetch.vouched")
                    os.pwrite(map_fd, _head(fd, n_bytes), 0)
                on_failure.pop_all()
                return part.start_writing()
    if boot is not None:
        folder.remove_part(name)
    elif folder.has_file(f"{name}.part") or folder.has_file(f"{name}.map"):
        folder.remove_part(name, keep_map=folder.size_of(name) is not None)
    return None


def read_all(fd: int, buffer: memoryview, offset: int) -> bool:
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
