"""`PartialFetch`: the reserved space and the partial copy of one running fetch."""

from __future__ import annotations

import errno
import os
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import numpy as np

from tiercache.cache.lease import open_leased
from tiercache.cache.partial import PartialCopy, charge_of
from tiercache.cache.units import Mask, n_units
from tiercache.errors import ObjectChanged
from tiercache.points import crash_point

if TYPE_CHECKING:
    from tiercache.cache.fetch import Fetch
    from tiercache.cache.locks import NameLock
    from tiercache.cache.publisher import Publisher


class PartialFetch:
    """The reserved space and the partial copy of one fetch.

    Space is reserved before the first byte, and the accounts are settled at the end. admit() and part() are called with
    the lock of the download held, or before the download starts. The reservation covers the space beyond what the
    accounts already charge for the partial copy; a larger reservation replaces a smaller one.
    """

    def __init__(self, publisher: Publisher, fetch: Fetch, lock: NameLock) -> None:
        """Open the existing partial copy, if there is one, and offer it to the waiting leases. Raises OSError.

        Args:
            publisher: Publisher that runs the fetch.
            fetch: The fetch.
            lock: Lock of the name; on file systems where flock is not enforced, another process may hold it too.
        """
        self._publisher, self.fetch, self._lock = publisher, fetch, lock
        self._wanted = fetch.wanted
        self.reserved_bytes = 0
        self._booked_bytes = 0
        fetch.step = f"being fetched by process {os.getpid()}"
        self._part = PartialCopy.open(publisher.folder, self._wanted.name, self._wanted.n_bytes)
        self.present: Mask = np.zeros(n_units(self._wanted.n_bytes), bool)
        if self._part is not None:
            self.present = self._part.present
            self._begin(self._part)

    def _begin(self, part: PartialCopy) -> None:
        """Enter an existing partial copy in the accounts and offer it to readers; on an error it is closed."""
        try:
            self._make_known(part)
        except BaseException as error:
            with closing(part):  # for example, the disk is too full for the record; a later fetch starts again
                # Another process deletes these files, and drop() would not know this one.
                if isinstance(error, FileNotFoundError):
                    part.unlink_names(keep_map=False)
            raise

    def _make_known(self, part: PartialCopy) -> None:
        folder, name = self._publisher.folder, self._wanted.name
        if folder.read_record(name) is None:
            folder.write_record(name, self._wanted.record(self._wanted.crc32c))
            crash_point("fetch.recorded")
        # Committing releases the reservation. A partial copy that another process created is charged at its current
        # size; this happens on file systems where flock is not enforced.
        if part.present.any() and not self.reserved_bytes:
            self._booked_bytes = charge_of(part.present, part.n_bytes)
            self._publisher.book(self._wanted, self._record(), self._booked_bytes)
        self.fetch.set_file(part.hold(), part.present)

    def _record(self) -> str:
        return self._wanted.record(self._wanted.crc32c).to_json()

    def is_whole(self) -> bool:
        """Return whether all units are present by now."""
        if self._part is not None:
            self._part.look_again()
        return self._part is not None and bool(self.present.all())

    def admit(self, units: Mask) -> bool:
        """Reserve space for a partial copy of these units; return False if there is no space."""
        need_bytes = max(charge_of(units, self._wanted.n_bytes) - self._booked_bytes, 0)
        evictor, name = self._publisher.evictor, self._wanted.name
        self.note(need_bytes)
        if not evictor.reserve(name, need_bytes, spare=self.fetch.spare | {name}):
            self.note(self.reserved_bytes)
            self._publisher.warn_no_space(self._wanted, need_bytes)
            return False
        if not self.reserved_bytes:
            evictor.note_fetch(name)
        self.reserved_bytes = need_bytes
        crash_point("fetch.reserved")
        return True

    def note(self, n_bytes: int) -> None:
        """Note in the lock file how many bytes this fetch may still add, in case the accounts must be rebuilt."""
        self._lock.note({"owner": str(self._publisher.owners.me), "reserved_bytes": n_bytes})

    def part(self) -> PartialCopy:
        """Return the partial copy to write to; the first call creates it. Raises OSError."""
        part = self._part
        if part is None:
            part = self._made()
            self._begin(part)
            self._part, self.present = part, part.present
        return part

    def _made(self) -> PartialCopy:
        """Create a partial copy.

        On file systems where flock is not enforced, another process may have created one since the last check, or may
        have completed the copy.
        """
        folder, name, n_bytes = self._publisher.folder, self._wanted.name, self._wanted.n_bytes
        try:
            part = PartialCopy.create(folder, name, n_bytes)
        except FileExistsError:
            found = PartialCopy.open(folder, name, n_bytes)
            if found is None:
                raise FileNotFoundError(errno.ENOENT, "gone as soon as it was made", name) from None
            return found
        try:
            copy_fd = open_leased(folder, name, n_bytes)
            if copy_fd is None:
                return part
            os.close(copy_fd)
            part.unlink_names(keep_map=False)
        except BaseException:
            part.close()
            raise
        part.close()
        raise FileNotFoundError(errno.ENOENT, "it is a copy already", name)

    def book(self) -> None:
        """Set the charge of the partial copy in the accounts to its present size; one without units is removed."""
        self.note(0)  # first: after the commit, the note would be counted whenever the accounts are rebuilt
        if self._part is None or not self._part.has_name:  # another process found it corrupt and removed it
            self._publisher.accounts.release(self._wanted.name)
        elif self.present.any():
            self._publisher.book(self._wanted, self._record(), charge_of(self.present, self._wanted.n_bytes))
            crash_point("fetch.booked")
        else:
            self.drop()

    def drop(self) -> None:
        """Remove the partial copy and its charge.

        If it has lost its name, the name belongs to another file and is left alone.
        """
        self.note(0)
        self.fetch.reset()  # with our own handle open, the file would count as deleted but still in use
        if self._part is not None and self._part.has_name:
            self._publisher.remove(self._wanted.name)
        self._publisher.accounts.release(self._wanted.name)

    def end(self, error: BaseException) -> None:
        """After an error, keep what has come for a later fetch, unless the object has changed at its source."""
        with suppress(OSError):  # the first error is the one to report
            if isinstance(error, ObjectChanged):
                self.drop()
            else:
                self.book()

    def close(self) -> None:
        """Close the partial copy."""
        if self._part is not None:
            self._part.close()
