"""Corrupt data: quarantined copies that differ from their checksum, and objects that are corrupt at their source.

A corrupt copy is never served again; it is compared with the copy that is fetched in its place, and then deleted. A
corrupt source is remembered for some minutes, to prevent repeated fetches.

::

    quarantine/NAME-INODE-RANDOM.json  the report; written before the copy is moved, and again after the comparison
    quarantine/NAME-INODE-RANDOM.bad   the corrupt copy, until then
    poison/NAME.json                   an object that is corrupt at its source

A crash leaves one of three states, and the next sweep ends each of them: a report without a copy (the copy was not
moved yet), a copy with an unfinished report (it is compared with the present copy, or deleted), or a copy with a
finished report (it is deleted).
"""

from __future__ import annotations

import json
import os
import secrets
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tiercache.cache.machine import NameLock, is_locked
from tiercache.cache.names import NAME
from tiercache.catalog import charge_bytes
from tiercache.catalog.private_files import open_file, read_text, replace_whole
from tiercache.crash_points import crash_point
from tiercache.waiting import wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tiercache.cache.folder import Folder, Owners
    from tiercache.catalog import Accounts
    from tiercache.stats import Counters


_PIECE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Difference:
    """How a corrupt file differs from the correct one.

    Attributes:
        n_bad_bytes: Size of the corrupt file.
        n_good_bytes: Size of the correct file.
        n_differ: Number of differing bytes within the shorter length.
        first: Offset of the first differing byte, or the end of the shorter file; None: the files are equal.
        last: Offset of the last differing byte; None if no byte differs.
        unreadable: Offset at which the corrupt file could not be read; the rest was not compared. None: all was read.
    """

    n_bad_bytes: int
    n_good_bytes: int
    n_differ: int = 0
    first: int | None = None
    last: int | None = None
    unreadable: int | None = None

    def facts(self) -> dict[str, Any]:
        """Return the facts for a report."""
        return {
            "n_bytes_differ": self.n_differ,
            "first_offset": self.first,
            "last_offset": self.last,
            "unreadable_at": self.unreadable,
            "n_bytes_bad": self.n_bad_bytes,
            "n_bytes_good": self.n_good_bytes,
        }

    def __str__(self) -> str:
        said = []
        if self.n_bad_bytes != self.n_good_bytes:
            said.append(f"it had {self.n_bad_bytes:,} bytes instead of {self.n_good_bytes:,}")
        if self.n_differ:
            said.append(f"{self.n_differ:,} bytes differed, from offset {self.first} to {self.last}")
        if self.unreadable is not None:
            said.append(f"it could not be read at offset {self.unreadable}")
        return "; ".join(said) or "it equals what was fetched again: a read failed, or the object itself is corrupt"


def difference_of(bad_fd: int, good_fd: int) -> Difference:
    """Return how the file bad_fd differs from good_fd. Raises OSError: the correct file cannot be read."""
    n_bad_bytes, n_good_bytes = os.fstat(bad_fd).st_size, os.fstat(good_fd).st_size
    both = min(n_bad_bytes, n_good_bytes)
    n_differ, first, last, unreadable = 0, None, None, None
    for start in range(0, both, _PIECE_BYTES):
        n_bytes = min(_PIECE_BYTES, both - start)
        good = _piece(good_fd, start, n_bytes)
        try:
            bad = _piece(bad_fd, start, n_bytes)
        except OSError:
            unreadable = start
            break
        offsets = np.flatnonzero(bad != good)
        if len(offsets):
            n_differ += len(offsets)
            first = start + int(offsets[0]) if first is None else first
            last = start + int(offsets[-1])
    if first is None and n_bad_bytes != n_good_bytes:
        first = both
    return Difference(n_bad_bytes, n_good_bytes, n_differ, first, last, unreadable)


def _piece(fd: int, start: int, n_bytes: int) -> NDArray[np.uint8]:
    """Return n_bytes at start; zeros beyond the end of a truncated file."""
    piece = np.zeros(n_bytes, np.uint8)
    done = 0
    while done < n_bytes:
        n_read = os.preadv(fd, [piece[done:].data], start + done)
        if not n_read:
            break
        done += n_read
    return piece


# Long enough that an epoch does not fetch a corrupt shard for each of its blocks; short enough that a repaired shard is
# soon cached again.
POISON_S = 600.0


@dataclass(frozen=True, slots=True)
class CorruptSource:
    """An object whose bytes were wrong twice.

    Attributes:
        url: URL without credentials.
        expected: Expected CRC-32C of the whole object; None if unknown.
        found: CRC-32C that was found; None if only a part was fetched.
    """

    url: str
    expected: int | None
    found: int | None


def record_corrupt_source(folder: Folder, name: str, poison: CorruptSource) -> None:
    """Record that an object is corrupt at its source, and delete old records. Raises OSError."""
    crash_point("poison.found")
    replace_whole(folder.poison / f"{name}.json", json.dumps({"format": 0} | asdict(poison)) + "\n", folder.rights.file)
    crash_point("poison.noted")
    sweep_corrupt_sources(folder)


def corrupt_source_of(folder: Folder, name: str) -> CorruptSource | None:
    """Return what is known about a corrupt source of a copy; None: nothing, or the record is too old."""
    path = f"{folder.poison}/{name}.json"
    try:
        if not _is_young(os.lstat(path)):
            return None
        fields = json.loads(read_text(path))
        return CorruptSource(str(fields["url"]), _sum_or_none(fields["expected"]), _sum_or_none(fields["found"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sum_or_none(value: object) -> int | None:
    return None if value is None else int(str(value))


def corrupt_sources(folder: Folder) -> dict[str, CorruptSource]:
    """Return all objects that are known to be corrupt now, by the names of their copies, except those cached since."""
    found = {name: corrupt_source_of(folder, name) for name in _names(folder) if not folder.has_copy(name)}
    return {name: poison for name, poison in found.items() if poison is not None}


def forget_corrupt_source(folder: Folder, name: str) -> bool:
    """Allow an object to be fetched again; return False if it was not known to be corrupt."""
    return folder.remove_file("poison", f"{name}.json")


def sweep_corrupt_sources(folder: Folder) -> None:
    """Remove records that are too old."""
    for name in _names(folder):
        with suppress(FileNotFoundError):
            if not _is_young((folder.poison / f"{name}.json").lstat()):
                forget_corrupt_source(folder, name)


def _names(folder: Folder) -> list[str]:
    try:
        return [file.stem for file in folder.poison.iterdir() if file.suffix == ".json" and NAME.fullmatch(file.stem)]
    except OSError:
        return []


def _is_young(status: os.stat_result) -> bool:
    # The absolute value: after the clock was set back, a record must not stay valid for a year.
    return abs(time.time() - status.st_mtime) < POISON_S


# How long a corrupt copy waits for a correct one to compare with, and how long a report is kept for users.
WAIT_S = 3600.0
KEEP_S = 30 * 86400.0
# Bad memory causes many corrupt copies: their space is better used by correct ones, and 64 reports are enough for a
# diagnosis.
MOST_COPIES = 8
MOST_REPORTS = 64
LOCK_WAIT_S = 10.0


def stem_of(name: str, inode: int) -> str:
    """Return the common name of a corrupt copy's files in the quarantine, and of the reservation for its disk space."""
    return f"{name}-{inode:x}-{secrets.token_hex(4)}"


class Quarantine:
    """The quarantine of one folder, as one process sees it. Safe from any thread; the lock guards the two tables.

    A quarantined copy, and a corrupt copy that was deleted while a reader had it open, stay reserved in the size limit
    by this process until nobody has the file open. Then this process, or one that needs the space (Owners.is_over),
    releases the reservation. The disk reserve needs no such count, because statvfs(2) counts those blocks as used; nor
    does eviction, which deletes no copy in use.
    """

    def __init__(self, folder: Folder, owners: Owners, accounts: Accounts, counters: Counters) -> None:
        self._folder, self._owners, self._accounts, self._counters = folder, owners, accounts, counters
        self._lock = Lock()
        self._waiting: set[str] = set()
        self._unlinked: dict[str, int] = {}

    # -- adding copies -------------------------------------------------------------------------------------------------

    def add(self, name: str, fd: int, *, reason: str, found_crc32c: int | None = None) -> bool:
        """Move a corrupt copy into the quarantine; return False if another process has done so, or the copy is gone.

        The race with another reader of the same copy: (1) both verify the file, (2) the other one moves it and a
        correct copy takes its place, (3) this one moves the correct copy. Therefore the copy is moved only while it is
        the file that was verified.

        Args:
            name: Name of the copy.
            fd: Descriptor of the file that was verified; the caller keeps it.
            reason: What was wrong, for the report.
            found_crc32c: CRC-32C of the whole file; None if it could not be read.

        Raises:
            OSError: The disk or the catalog failed; the copy may still be in place.
        """
        lock = NameLock(self._folder.locks / name)
        try:
            # Without the lock the result is the same, except for a second download.
            wait_for(lock.try_acquire, LOCK_WAIT_S)
            status = os.fstat(fd)
            if not self._is(name, status):
                return False
            self._make_room()
            stem = stem_of(name, status.st_ino)
            self._write(stem, self._facts(name, status.st_size, reason, found_crc32c))
            crash_point("quarantine.noted")
            if not self._folder.set_aside(name, f"{stem}.bad"):
                return False
            crash_point("quarantine.moved")
            # The record, the map and the charge belong to the name, which a correct copy will take.
            self._folder.remove_copy(name)
            crash_point("quarantine.unrecorded")
            self._accounts.remove([name])
            self._hold(stem, status.st_size)
        finally:
            lock.release()
        self._counters.add("quarantined")
        return True

    def report(self, name: str, n_bytes: int, *, reason: str, verdict: str) -> None:
        """Report a corrupt copy that needs no comparison and that the caller deletes. Raises OSError."""
        facts = self._facts(name, n_bytes, reason, None) | {"compared": True, "verdict": verdict}
        self._write(f"{name}-{secrets.token_hex(4)}", facts)

    def knows(self, name: str) -> bool:
        """Return whether there is a report on copies of that name."""
        return any(stem.startswith(f"{name}-") for stem in self._stems(".json"))

    def _facts(self, name: str, n_bytes: int, reason: str, found_crc32c: int | None) -> dict[str, Any]:
        record = self._folder.read_record(name)
        return {
            "name": name,
            "source": "" if record is None else record.source,
            "reason": reason,
            "n_bytes": n_bytes,
            "expected_crc32c": None if record is None else record.crc32c,
            "found_crc32c": found_crc32c,
            "when_s": int(time.time()),
            "owner": str(self._owners.me),
            "compared": False,
        }

    def _is(self, name: str, status: os.stat_result) -> bool:
        try:
            there = os.lstat(self._folder.copy_path(name))
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (status.st_dev, status.st_ino)

    def _hold(self, stem: str, n_bytes: int) -> None:
        """Reserve the disk space that the corrupt copy still takes; if there is no space, it is not counted."""
        with self._lock:
            self._waiting.add(stem)
        self._accounts.reserve(stem, charge_bytes(n_bytes), spare_bytes=lambda: 1 << 62)

    def _make_room(self) -> None:
        copies = self._stems(".bad")
        for stem in copies[: max(len(copies) - MOST_COPIES + 1, 0)]:
            self._end(stem, "not compared: too many corrupt copies")

    # -- comparing and deleting ----------------------------------------------------------------------------------------

    def awaits(self, name: str) -> bool:
        """Return whether this process has quarantined a copy of that name that waits for a correct one. Does no I/O."""
        with self._lock:
            return any(stem.startswith(name) for stem in self._waiting)

    def compare(self, name: str) -> list[Difference]:
        """Compare the corrupt copies of a name with the present copy, write the reports, and delete them.

        Raises:
            OSError: The disk or the catalog failed; a sweep will continue.
        """
        found: list[Difference] = []
        good = self._folder.open_copy(name)
        if good is None:
            return found
        try:
            for stem in self._stems(".bad"):
                if stem.startswith(f"{name}-"):
                    with suppress(FileNotFoundError):  # another process has done it
                        found.append(self._compare_one(stem, good))
        finally:
            os.close(good)
        return found

    def _compare_one(self, stem: str, good: int) -> Difference:
        bad = open_file(self._folder.quarantine / f"{stem}.bad", os.O_RDONLY)
        try:
            difference = difference_of(bad, good)
            crash_point("quarantine.compared")
            self._end(stem, str(difference), difference)
        finally:
            os.close(bad)
        return difference

    def _end(self, stem: str, verdict: str, difference: Difference | None = None) -> None:
        """Write the final report on a corrupt copy and delete the copy."""
        facts = self._read(stem) or {"name": stem[:40]}
        if not facts.get("compared"):
            facts |= {"compared": True, "verdict": verdict} | ({} if difference is None else difference.facts())
            self._write(stem, facts)
        crash_point("quarantine.reported")
        with suppress(FileNotFoundError):
            inode = (self._folder.quarantine / f"{stem}.bad").lstat().st_ino
            self._folder.remove_file("quarantine", f"{stem}.bad")
            crash_point("quarantine.deleted")
            with self._lock:
                self._waiting.discard(stem)
                self._unlinked[stem] = inode
        self.release_unused()

    @contextmanager
    def unlinking(self, name: str) -> Iterator[None]:
        """Delete a copy inside this context: the disk space of a copy that its readers have open stays reserved."""
        inode, charge = 0, self._folder.charge_of(name) or 0
        for kind in ("", ".part"):
            with suppress(OSError):
                inode = inode or os.lstat(self._folder.copy_path(f"{name}{kind}")).st_ino
        yield
        if inode and is_locked(inode):
            stem = stem_of(name, inode)
            self._accounts.reserve(stem, charge, spare_bytes=lambda: 1 << 62)
            with self._lock:
                self._unlinked[stem] = inode

    def release_unused(self) -> None:
        """Release the reservations for deleted copies that nobody has open any more. Cheap if there are none."""
        with self._lock:
            unlinked = dict(self._unlinked)
            for stem in [s for s in self._waiting if not os.path.lexists(self._folder.quarantine / f"{s}.bad")]:
                unlinked[stem] = 0  # compared and deleted by another process
                self._waiting.discard(stem)
        for stem, inode in unlinked.items():
            if not is_locked(inode):
                self._accounts.release(stem)
                with self._lock:
                    self._unlinked.pop(stem, None)

    def close(self) -> None:
        """End the wait of copies that this process will not fetch any more. Raises as compare()."""
        with self._lock:
            waiting = sorted(self._waiting)
        for stem in waiting:
            self._end(stem, "not compared: the cache was closed before the object was fetched again")

    # -- reports, and the sweep of other processes' files --------------------------------------------------------------

    def reports(self) -> list[dict[str, Any]]:
        """Return the reports on all corrupt copies, oldest first."""
        found = [self._read(stem) for stem in self._stems(".json")]
        return [facts for facts in found if facts is not None]

    def sweep(self) -> None:
        """End what a crash left unfinished; delete old reports, and those beyond MOST_REPORTS."""
        for stem in self._stems(".bad"):
            with suppress(FileNotFoundError):
                facts = self._read(stem) or {}
                if facts.get("compared"):
                    self._end(stem, "")
                elif not self.compare(stem[:40]) and not self._is_awaited(stem, facts):
                    self._end(stem, "not compared: the object was not fetched again in time")
        copies, notes = set(self._stems(".bad")), self._stems(".json")
        for i, stem in enumerate(notes):
            with suppress(FileNotFoundError):
                facts = self._read(stem) or {"compared": True}
                is_lost = stem not in copies and not facts.get("compared") and not self._is_alive(facts)
                if is_lost or self._age_s(f"{stem}.json") > KEEP_S or i < len(notes) - MOST_REPORTS:
                    self._folder.remove_file("quarantine", f"{stem}.json")

    def _is_awaited(self, stem: str, facts: dict[str, Any]) -> bool:
        return self._is_alive(facts) and self._age_s(f"{stem}.json") < WAIT_S

    def _is_alive(self, facts: dict[str, Any]) -> bool:
        """Return whether the process that found a corrupt copy still has the cache open."""
        owner = str(facts.get("owner"))
        return owner == str(self._owners.me) or self._owners.alive(owner)

    def _age_s(self, file: str) -> float:
        # The absolute value: a report from the future, after the clock was set back, also counts as old.
        return abs(time.time() - (self._folder.quarantine / file).lstat().st_mtime)

    def _stems(self, suffix: str) -> list[str]:
        """Return the stems of the files with that suffix, oldest first."""
        found: list[tuple[float, str]] = []
        with suppress(OSError), os.scandir(self._folder.quarantine) as entries:
            for entry in entries:
                stem = entry.name.removesuffix(suffix)
                if stem != entry.name and NAME.fullmatch(stem.partition("-")[0]):
                    with suppress(FileNotFoundError):
                        found.append((entry.stat(follow_symlinks=False).st_mtime, stem))
        return [stem for _, stem in sorted(found)]

    def _write(self, stem: str, facts: dict[str, Any]) -> None:
        text = json.dumps({"format": 0} | facts, indent=1) + "\n"
        replace_whole(self._folder.quarantine / f"{stem}.json", text, self._folder.rights.file)

    def _read(self, stem: str) -> dict[str, Any] | None:
        try:
            facts = json.loads(read_text(self._folder.quarantine / f"{stem}.json"))
        except (OSError, ValueError):
            return None
        return facts if isinstance(facts, dict) else None
