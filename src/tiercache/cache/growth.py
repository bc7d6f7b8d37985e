"""The room and the part of one fetch: reserved before bytes, made when the first are admitted, booked at the end."""

from __future__ import annotations

import errno
import os
from contextlib import closing, suppress
from typing import TYPE_CHECKING

import numpy as np

from tiercache.cache.lease import open_leased
from tiercache.cache.partial import Part, charge_of
from tiercache.cache.units import Mask, n_units
from tiercache.errors import ObjectChanged
from tiercache.points import reach

if TYPE_CHECKING:
    from tiercache.cache.fetch import Fetch
    from tiercache.cache.locks import NameLock
    from tiercache.cache.publisher import Publisher


class Growth:
    """A part while one fetch lets it grow. admit() and part() are called with the download's lock held, or before it.

    The reservation covers what the part will take beyond what the books say of it, and is replaced as that becomes
    more.
    """

    def __init__(self, publisher: Publisher, fetch: Fetch, lock: NameLock) -> None:
        """Find the part that is there, and offer it to whoever waits. lock: of its name. Raises OSError."""
        self._publisher, self.fetch, self._lock = publisher, fetch, lock
        self._wanted = fetch.wanted
        self.reserved_bytes = 0
        self._booked_bytes = 0
        fetch.step = f"being fetched by process {os.getpid()}"
        self._part = Part.open(publisher.folder, self._wanted.name, self._wanted.n_bytes)
        self.present: Mask = np.zeros(n_units(self._wanted.n_bytes), bool)
        if self._part is not None:
            self.present = self._part.present
            self._begin(self._part)

    def _begin(self, part: Part) -> None:
        """Have the books know a part that is there, and its readers too; where that fails it is closed."""
        try:
            self._make_known(part)
        except BaseException as error:
            with closing(part):  # a disk that is full for the record, say: it is begun again when there is room
                if isinstance(error, FileNotFoundError):  # somebody deletes what we make: drop() would not know of it
                    part.forget_name(keep_map=False)
            raise

    def _make_known(self, part: Part) -> None:
        folder, name = self._publisher.folder, self._wanted.name
        if folder.read_record(name) is None:
            folder.write_record(name, self._wanted.record(self._wanted.crc32c))
            reach("fetch.recorded")
        # Booking ends a reservation: where locks lie and the part of another was found, he books what is there.
        if part.present.any() and not self.reserved_bytes:
            self._booked_bytes = charge_of(part.present, part.n_bytes)
            self._publisher.book(self._wanted, self._record(), self._booked_bytes)
        self.fetch.offer(part.hold(), part.present)

    def _record(self) -> str:
        return self._wanted.record(self._wanted.crc32c).to_json()

    def is_whole(self) -> bool:
        """Whether all units are there by now."""
        if self._part is not None:
            self._part.look_again()
        return self._part is not None and bool(self.present.all())

    def admit(self, units: Mask) -> bool:
        """Reserve room for a part of these units; False: there is none."""
        need_bytes = max(charge_of(units, self._wanted.n_bytes) - self._booked_bytes, 0)
        evictor, name = self._publisher.evictor, self._wanted.name
        self.note(need_bytes)
        if not evictor.reserve(name, need_bytes, spare=self.fetch.spare | {name}):
            self.note(self.reserved_bytes)
            self._publisher.tell_of_no_room(self._wanted, need_bytes)
            return False
        if not self.reserved_bytes:
            evictor.note_fetch(name)
        self.reserved_bytes = need_bytes
        reach("fetch.reserved")
        return True

    def note(self, n_bytes: int) -> None:
        """Let whoever has to make new books know what may still come of this part."""
        self._lock.note({"owner": str(self._publisher.owners.me), "reserved_bytes": n_bytes})

    def part(self) -> Part:
        """The part to write to, made at the first call. Raises OSError."""
        part = self._part
        if part is None:
            part = self._made()
            self._begin(part)
            self._part, self.present = part, part.present
        return part

    def _made(self) -> Part:
        """A new part; where locks lie somebody else may have begun one since we looked, or be done with it."""
        folder, name, n_bytes = self._publisher.folder, self._wanted.name, self._wanted.n_bytes
        try:
            part = Part.create(folder, name, n_bytes)
        except FileExistsError:
            found = Part.open(folder, name, n_bytes)
            if found is None:
                raise FileNotFoundError(errno.ENOENT, "gone as soon as it was made", name) from None
            return found
        try:
            copy_fd = open_leased(folder, name, n_bytes)
            if copy_fd is None:
                return part
            os.close(copy_fd)
            part.forget_name(keep_map=False)
        except BaseException:
            part.close()
            raise
        part.close()
        raise FileNotFoundError(errno.ENOENT, "it is a copy already", name)

    def book(self) -> None:
        """Set the part's row on the books to what it is by now; one without a unit goes."""
        self.note(0)  # first: noted after it, it would stand in new books for ever
        if self._part is None or not self._part.has_name:  # somebody found it wrong, and removed it
            self._publisher.accounts.release(self._wanted.name)
        elif self.present.any():
            self._publisher.book(self._wanted, self._record(), charge_of(self.present, self._wanted.n_bytes))
            reach("fetch.booked")
        else:
            self.drop()

    def drop(self) -> None:
        """Remove the part, and what the books know of it; where it lost its name, that is another's by now."""
        self.note(0)
        self.fetch.forget()  # a hold of our own would make it count as deleted but still being read
        if self._part is not None and self._part.has_name:
            self._publisher.remove(self._wanted.name)
        self._publisher.accounts.release(self._wanted.name)

    def end(self, error: BaseException) -> None:
        """After an error: what has come stays, for whoever goes on with it, unless the object is another one by now."""
        with suppress(OSError):  # what failed first is what is told
            if isinstance(error, ObjectChanged):
                self.drop()
            else:
                self.book()

    def close(self) -> None:
        """Close the part."""
        if self._part is not None:
            self._part.close()
