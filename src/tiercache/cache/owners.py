"""The processes that have a cache folder open: each holds a locked file, so that the others know whether it lives."""

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
from tiercache.points import reach

if TYPE_CHECKING:
    from tiercache.cache.folder import Folder

_open_here: set[str] = set()


class Owners:
    """This process as an owner, and what can be said of the others. Safe from any thread."""

    def __init__(self, folder: Folder, limit_bytes: int) -> None:
        """Make the owner file. Raises OSError where the folder cannot be written."""
        self._folder, self._limit_bytes, self._lock = folder, limit_bytes, Lock()
        self.me = Owner.of_this_process()
        self.is_closed = False
        self._fd = self._make()
        _open_here.add(str(self.me))

    def _make(self) -> int:
        fd = open_file(self._folder.owners / str(self.me), os.O_RDWR | os.O_CREAT, self._folder.rights.file)
        try:
            reach("owner.made")
            try_exclusive(fd)
            reach("owner.locked")
            os.pwrite(fd, json.dumps({"limit_bytes": self._limit_bytes}).encode(), 0)
        except BaseException:
            os.close(fd)
            with suppress(OSError):
                self._folder.remove_file("owners", str(self.me))
            raise
        reach("owner.written")
        return keep_private(fd)

    def ensure(self) -> None:
        """Make the folder and the owner file in it, where somebody has deleted them. Raises OSError after close()."""
        with self._lock:  # two fetches may find it gone at once: the second would close what the first has just locked
            if self.is_closed:  # whoever was at work while the cache was closed: another file may have the number now
                raise OSError(errno.EBADF, f"cache {self._folder.root} is closed")
            self._folder.ensure()
            if not os.fstat(self._fd).st_nlink:
                fd, self._fd = self._fd, self._make()
                close_private(fd)

    def alive(self, text: str) -> bool:
        """Whether the process of an owner still has the cache open.

        Process number, start time and boot decide where they can be compared; where they cannot (another container),
        its lock does.
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

    def bury(self, text: str) -> None:
        """Remove the file of a dead owner. What it was fetching stays, in part: whoever wants it next goes on there."""
        with suppress(FileNotFoundError):
            reach("owner.buried")
            if Owner.parse(text) is not None:
                self._folder.remove_file("owners", text)

    def bury_all(self) -> None:
        """Remove what all dead owners have left."""
        for text in [file.name for file in self._folder.owners.iterdir()]:
            if not self.alive(text):
                self.bury(text)

    def limits(self) -> dict[str, int]:
        """The limit in bytes of every owner that lives."""
        limits = {str(self.me): self._limit_bytes}
        with suppress(FileNotFoundError):
            for file in self._folder.owners.iterdir():
                with suppress(OSError, ValueError, KeyError, TypeError):
                    note = json.loads(read_text(file))
                    if self.alive(file.name):
                        limits[file.name] = int(note["limit_bytes"])
        return limits

    # -- what else the accounts ask ---------------------------------------------------------------------------------

    def is_over(self, owner: str, name: str) -> bool:
        """Whether a reservation is for a wrong copy that is deleted, and that no reader holds any more.

        The process that deleted it gives it back when it next uses the cache, which may be tomorrow. What a container
        holds is not seen from another one.
        """
        inode = name.partition("-")[2].partition("-")[0]
        who = Owner.parse(owner)
        if not inode or who is None or who.namespace != self.me.namespace:
            return False
        return not os.path.lexists(self._folder.quarantine / f"{name}.bad") and not is_locked(int(inode, 16))

    def coming(self) -> list[tuple[str, str, int]]:
        """(owner, name, charge in bytes) of what each fetch may still bring, as the file of its lock says.

        A fetch notes that before it reserves, and takes it back before it books. What a dead owner has noted is in
        here too.
        """
        found: list[tuple[str, str, int]] = []
        with suppress(OSError):
            for file in self._folder.locks.iterdir():
                with suppress(OSError, ValueError, KeyError, TypeError):  # no fetch's, or given back meanwhile
                    note = json.loads(read_text(file))
                    coming = str(note["owner"]), file.name, int(note["reserved_bytes"])
                    if coming[2] > 0 and NAME.fullmatch(file.name):
                        found.append(coming)
        return found

    def charge_of(self, name: str) -> int | None:
        """What a copy, or a copy in part, takes of the budget in bytes; None: it is not there."""
        return self._folder.charge_of(name)

    def charges(self) -> dict[str, int]:
        """What every copy, and every copy in part, takes of the budget in bytes, by name."""
        return self._folder.sizes()

    def record(self, name: str) -> str:
        """The record beside a copy, "" where there is none."""
        record = self._folder.read_record(name)
        return "" if record is None else record.to_json()

    def close(self) -> None:
        """Give the owner file up. Once only."""
        with self._lock:
            self.is_closed = True
        _open_here.discard(str(self.me))
        with suppress(OSError):
            self._folder.remove_file("owners", str(self.me))
        close_private(self._fd)
