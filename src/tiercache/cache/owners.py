"""The processes that have a cache folder open: each holds a locked file, so that the others know whether it lives."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from tiercache.cache.inherit import close_private, keep_private
from tiercache.cache.locks import try_exclusive
from tiercache.cache.machine import Owner

if TYPE_CHECKING:
    from tiercache.cache.folder import Folder

_open_here: set[str] = set()


class Owners:
    """This process as an owner, and what can be said of the others. Safe from any thread."""

    def __init__(self, folder: Folder, limit_bytes: int) -> None:
        """Make the owner file. Raises OSError where the folder cannot be written."""
        self._folder, self._limit_bytes = folder, limit_bytes
        self.me = Owner.of_this_process()
        self._fd = self._make()
        _open_here.add(str(self.me))

    def _make(self) -> int:
        fd = os.open(self._folder.owners / str(self.me), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            try_exclusive(fd)
            os.pwrite(fd, json.dumps({"limit_bytes": self._limit_bytes}).encode(), 0)
        except OSError:
            os.close(fd)
            raise
        return keep_private(fd)

    def ensure(self) -> None:
        """Make the folder and the owner file in it, where somebody has deleted them."""
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
            fd = os.open(self._folder.owners / text, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            return not try_exclusive(fd)
        finally:
            os.close(fd)

    def bury(self, text: str) -> None:
        """Remove what a dead owner has left: its files in the making, and its owner file."""
        with suppress(FileNotFoundError):
            for file, owner, _ in self._folder.temps():
                if owner == text:
                    self._folder.remove_temp(file)
            if Owner.parse(text) is not None:
                (self._folder.owners / text).unlink()

    def bury_all(self) -> None:
        """Remove what all dead owners have left."""
        left = {owner for _, owner, _ in self._folder.temps()}
        for text in left | {file.name for file in self._folder.owners.iterdir()}:
            if not self.alive(text):
                self.bury(text)

    def limits(self) -> dict[str, int]:
        """The limit in bytes of every owner that lives."""
        limits = {str(self.me): self._limit_bytes}
        with suppress(FileNotFoundError):
            for file in self._folder.owners.iterdir():
                with suppress(OSError, ValueError, KeyError, TypeError):
                    note = json.loads(file.read_text(encoding="ascii"))
                    if self.alive(file.name):
                        limits[file.name] = int(note["limit_bytes"])
        return limits

    # -- what else the accounts ask ---------------------------------------------------------------------------------

    def coming(self) -> list[tuple[str, str, int]]:
        """(owner, name, final size in bytes) of each file in the making: it has its size from the start."""
        coming = []
        for file, owner, name in self._folder.temps():
            with suppress(FileNotFoundError):
                coming.append((owner, name, (self._folder.copies / file).stat().st_size))
        return coming

    def size_of(self, name: str) -> int | None:
        """Size in bytes of a copy; None: it is not there."""
        return self._folder.size_of(name)

    def sizes(self) -> dict[str, int]:
        """Size in bytes of each copy, by name."""
        return self._folder.sizes()

    def record(self, name: str) -> str:
        """The record beside a copy, "" where there is none."""
        record = self._folder.read_record(name)
        return "" if record is None else record.to_json()

    def close(self) -> None:
        """Give the owner file up. Once only."""
        _open_here.discard(str(self.me))
        with suppress(OSError):
            (self._folder.owners / str(self.me)).unlink()
        close_private(self._fd)
