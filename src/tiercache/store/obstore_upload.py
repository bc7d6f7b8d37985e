"""An upload in numbered parts over a client that only takes bytes in their order."""

from __future__ import annotations

from contextlib import suppress
from threading import Condition
from typing import Any, Protocol

from tiercache.errors import StoreError
from tiercache.model import ObjectInfo
from tiercache.store.contract import Buffer, Upload

# What fits here is written by one request, if_absent too.
_HOLD_BYTES = 16 << 20
# Parts that came before their predecessors, at most; then put_part waits.
_AHEAD_BYTES = 64 << 20
_AHEAD_WAIT_S = 300.0


class Target(Protocol):
    """Where the bytes go."""

    key: str
    exclusive: bool

    def put(self, data: bytes, *, if_absent: bool) -> ObjectInfo | None:
        """Write a small object in one request; None if if_absent and the key is taken."""

    def begin(self) -> Any:
        """Start a large object: a writer."""

    def write(self, writer: Any, data: bytes) -> None:
        """Append to it."""

    def close(self, writer: Any, n_bytes: int, *, if_absent: bool) -> ObjectInfo | None:
        """Publish it."""

    def abort(self, writer: Any) -> None:
        """Drop it."""


class StreamedUpload(Upload):
    """Holds the first 16 MiB, then streams; parts that come too early wait in memory, at most 64 MiB of them.

    The lock guards the table and says who sends; bytes are sent outside it, by one thread at a time.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._changed = Condition()
        self._next = 0
        self._early: dict[int, bytes] = {}
        self._is_sending = False
        self._is_open = True
        self._error: StoreError | None = None
        self._held: list[bytes] = []
        self._n_bytes = 0
        self._writer: Any = None

    def put_part(self, number: int, data: Buffer) -> None:
        """Send the part, or keep a copy until its turn."""
        part = bytes(data)
        with self._changed:
            self._admit(number, len(part))
            self._early[number] = part
            if self._is_sending:
                return
            self._is_sending = True
        try:
            while (due := self._take_due()) is not None:
                self._send(due)
        except BaseException as error:
            with self._changed:
                broken = StoreError(f"put_part {number}: interrupted", url=self._target.key, retryable=False)
                self._error = error if isinstance(error, StoreError) else broken
                self._is_sending = False
                self._changed.notify_all()
            raise

    def _admit(self, number: int, n_bytes: int) -> None:
        def has_room() -> bool:
            early_bytes = sum(map(len, self._early.values()))
            return number == self._next or early_bytes + n_bytes <= _AHEAD_BYTES or not self._is_open

        key = self._target.key
        if not self._changed.wait_for(has_room, _AHEAD_WAIT_S):
            message = f"put_part {number}: part {self._next} did not come within {_AHEAD_WAIT_S:g} s"
            raise StoreError(message, url=key, retryable=False)
        if self._error is not None:
            raise self._error
        if not self._is_open or number < self._next or number in self._early:
            raise ValueError(f"{key}: part {number}: each part comes once, before complete() or abort()")

    def _take_due(self) -> bytes | None:
        with self._changed:
            part = self._early.pop(self._next, None)
            if part is None:
                # Said under the lock: a part that comes from here on finds nobody sending, and sends itself.
                self._is_sending = False
                self._changed.notify_all()
                return None
            self._next += 1
            self._changed.notify_all()
            return part

    def _send(self, part: bytes) -> None:
        self._n_bytes += len(part)
        if self._writer is not None:
            self._target.write(self._writer, part)
            return
        self._held.append(part)
        if self._n_bytes > _HOLD_BYTES:
            self._writer = self._target.begin()
            for held in self._held:
                self._target.write(self._writer, held)
            self._held.clear()

    def complete(self, *, if_absent: bool = False) -> ObjectInfo | None:
        """Publish: by one request if it is small."""
        key = self._target.key
        if if_absent and self._writer is not None and not self._target.exclusive:
            raise ValueError(f"{key}: complete(if_absent=True) of a large object needs create(key, if_absent=True)")
        if not self._stop():
            raise ValueError(f"{key}: the upload was completed or aborted before")
        if self._error is not None:
            self._drop()
            raise self._error
        if self._early:
            self._drop()
            raise ValueError(f"{key}: part {self._next} is missing; parts are numbered 0, 1, 2, ... without gaps")
        if self._writer is None:
            return self._target.put(b"".join(self._held), if_absent=if_absent)
        return self._target.close(self._writer, self._n_bytes, if_absent=if_absent)

    def abort(self) -> None:
        """Drop what was sent."""
        if self._stop():
            self._drop()

    def _stop(self) -> bool:
        with self._changed:
            was_open, self._is_open = self._is_open, False
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._is_sending)
            return was_open

    def _drop(self) -> None:
        self._held.clear()
        self._early.clear()
        if self._writer is not None:
            with suppress(StoreError):  # the parts then stay until the bucket's own rule removes them
                self._target.abort(self._writer)
