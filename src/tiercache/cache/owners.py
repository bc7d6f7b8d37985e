"""`Owners`: the processes that have a cache folder open.

Each holds a locked file, so that others know whether it runs.
"""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING

from tiercache.cache.holders import is_locked
from tiercache.cache.inherit import close_private, keep_private
from tiercache.cache.locks import try_exclusive
from tiercache.cache.machine import Owner
from tiercache.cache.record import NAME
from tiercache.catalog.files import open_file, read_text
from tiercache.points import crash_point

if TYPE_CHECKING:
    from tiercache.cache.folder import Folder

_open_here: set[str] = set()


class Owners:
    """This process as an owner, and the state of the other owners. Safe from any thread."""

    def __init__(self, folder: Folder, limit_bytes: int) -> None:
        """Create the owner file. Raises OSError if the folder is not writable."""
        self._folder, self._limit_bytes, self._lock = folder, limit_bytes, Lock()
        self.me = Owner.of_this_process()
        self.is_closed = False
        self._fd = self._make()
        _open_here.add(str(self.me))

    def _make(self) -> int:
        fd = open_file(self._folder.owners / str(self.me), os.O_RDWR | os.O_CREAT, self._folder.rights.file)
        try:
            crash_point("owner.made")
            try_exclusive(fd)
            crash_point("owner.locked")
            os.pwrite(fd, json.dumps({"limit_bytes": self._limit_bytes}).encode(), 0)
        except BaseException:
            os.close(fd)
            with suppress(OSError):
                self._folder.remove_file("owners", str(self.me))
            raise
        crash_point("owner.written")
        return keep_private(fd)

    def ensure(self) -> None:
        """Recreate the folder and the owner file if they were deleted. Raises OSError after close()."""
        # Two fetches may find it deleted: the second would close the file that the first has just locked.
        with self._lock:
            if self.is_closed:  # called during a close: another file may have this descriptor number now
                raise OSError(errno.EBADF, f"cache {self._folder.root} is closed")
            self._folder.ensure()
            if not os.fstat(self._fd).st_nlink:
                fd, self._fd = self._fd, self._make()
                close_private(fd)

    def alive(self, text: str) -> bool:
        """Return whether the process of an owner still has the cache open.

        The process number, start time and boot decide if they can be compared; otherwise (another container) the lock
        of the owner file decides.
        """
        owner = Owner.parse(text)
        if owner is None:
            return False
        if owner.pid == self.me.pid and owner.started == self.me.started and owner.namespace == self.me.namespace:
            return text in _open_here
        runs = owner.runs()
        return self._is_locked(text) if runs is None else runs

    def _is_locked(self, text: str) -> bool:
        try:
            fd = open_file(self._folder.owners / text, os.O_RDONLY)
        except OSError:
            return False
        try:
            return not try_exclusive(fd)
        finally:
            os.close(fd)

    def remove_files_of(self, text: str) -> None:
        """Remove the file of a dead owner. Its partial copies stay: the next fetch of each continues there."""
        with suppress(FileNotFoundError):
            crash_point("owner.buried")
            if Owner.parse(text) is not None:
                self._folder.remove_file("owners", text)

    def remove_files_of_dead(self) -> None:
        """Remove the files of all dead owners."""
        for text in [file.name for file in self._folder.owners.iterdir()]:
            if not self.alive(text):
                self.remove_files_of(text)

    def limits(self) -> dict[str, int]:
        """Return the size limit in bytes of every live owner."""
        limits = {str(self.me): self._limit_bytes}
        with suppress(FileNotFoundError):
            for file in self._folder.owners.iterdir():
                with suppress(OSError, ValueError, KeyError, TypeError):
                    note = json.loads(read_text(file))
                    if self.alive(file.name):
                        limits[file.name] = int(note["limit_bytes"])
        return limits

    # -- queries of the accounts ---------------------------------------------------------------------------------------

    def is_over(self, owner: str, name: str) -> bool:
        """Return whether a reservation belongs to a corrupt copy that is deleted and that no reader has open any more.

        The process that deleted the copy releases the reservation when it next uses the cache, which may be much later.
        Locks of another container are not visible here.
        """
        inode = name.partition("-")[2].partition("-")[0]
        who = Owner.parse(owner)
        if not inode or who is None or who.namespace != self.me.namespace:
            return False
        return not os.path.lexists(self._folder.quarantine / f"{name}.bad") and not is_locked(int(inode, 16))

    def running_fetches(self) -> list[tuple[str, str, int]]:
        """Return (owner, name, bytes) of what each fetch may still add, as its lock file says.

        A fetch writes this note before it reserves, and clears it before it commits. Notes of dead owners are included.
        """
        found: list[tuple[str, str, int]] = []
        with suppress(OSError):
            for file in self._folder.locks.iterdir():
                # Not the lock of a fetch, or released meanwhile.
                with suppress(OSError, ValueError, KeyError, TypeError):
                    note = json.loads(read_text(file))
                    coming = str(note["owner"]), file.name, int(note["reserved_bytes"])
                    if coming[2] > 0 and NAME.fullmatch(file.name):
                        found.append(coming)
        return found

    def charge_of(self, name: str) -> int | None:
        """Return the bytes that a copy, whole or partial, takes of the size limit; None: it does not exist."""
        return self._folder.charge_of(name)

    def charges(self) -> dict[str, int]:
        """Return the bytes that each copy, whole or partial, takes of the size limit, by name."""
        return self._folder.sizes()

    def record(self, name: str) -> str:
        """Return the record of a copy, "" if there is none."""
        record = self._folder.read_record(name)
        return "" if record is None else record.to_json()

    def close(self) -> None:
        """Remove the owner file. Must be called only once."""
        with self._lock:
            self.is_closed = True
        _open_here.discard(str(self.me))
        with suppress(OSError):
            self._folder.remove_file("owners", str(self.me))
        close_private(self._fd)
