"""An upload in numbered parts through a client that accepts bytes only in order."""

from __future__ import annotations

from contextlib import suppress
from threading import Condition
from typing import Any, Protocol

from tiercache.errors import StoreError
from tiercache.model import ObjectInfo
from tiercache.store.contract import Buffer, Upload
from tiercache.store.sums import PartsEtag, is_md5_of

# An object of at most this size is written by one request, also with if_absent.
_HOLD_BYTES = 16 << 20
# Maximum size of early parts, whose predecessors have not come yet; then put_part() waits.
_AHEAD_BYTES = 64 << 20
_AHEAD_WAIT_S = 300.0


class UploadTarget(Protocol):
    """Destination of an upload.

    Attributes:
        key: Key of the object.
        exclusive: Whether a large object may be published with if_absent.
        part_bytes: Size of the parts that a writer sends.
    """

    key: str
    exclusive: bool
    part_bytes: int

    def put(self, data: bytes, *, if_absent: bool) -> ObjectInfo | None:
        """Write a small object in one request. Return None if if_absent is true and the key exists."""

    def begin(self) -> Any:
        """Return the writer of a new large object."""

    def write(self, writer: Any, data: bytes) -> None:
        """Append data to the writer."""

    def close(self, writer: Any, n_bytes: int, *, if_absent: bool) -> ObjectInfo | None:
        """Publish the object."""

    def abort(self, writer: Any) -> None:
        """Discard the object."""


class OrderedUpload(Upload):
    """An upload that holds the first 16 MiB and then streams. Early parts wait in memory, up to 64 MiB of them.

    The lock guards the table of parts and the sending flag; one thread at a time sends bytes, outside the lock. After
    complete(), `is_confirmed` says whether the store returned the MD5 of exactly the bytes sent, if confirm() was
    called.
    """

    def __init__(self, target: UploadTarget) -> None:
        self._target = target
        self._etag: PartsEtag | None = None
        self.is_confirmed = False
        self._changed = Condition()
        self._next = 0
        self._early: dict[int, bytes] = {}
        self._is_sending = False
        self._is_open = True
        self._error: StoreError | None = None
        self._held: list[bytes] = []
        self._n_bytes = 0
        self._writer: Any = None

    def confirm(self) -> None:
        """Hash the bytes from the first one on, for is_confirmed. Costs 1.5 s of processor time per GB."""
        self._etag = PartsEtag(self._target.part_bytes)

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
            message = f"put_part {number}: part {self._next} is still missing after {_AHEAD_WAIT_S:g} s"
            raise StoreError(message, url=key, retryable=False)
        if self._error is not None:
            raise self._error
        if not self._is_open or number < self._next or number in self._early:
            raise ValueError(f"{key}: part {number}: each part must come once, before complete() or abort()")

    def _take_due(self) -> bytes | None:
        with self._changed:
            part = self._early.pop(self._next, None)
            if part is None:
                # Cleared under the lock: the thread of a later part sees that no thread sends, and sends the part
                # itself.
                self._is_sending = False
                self._changed.notify_all()
                return None
            self._next += 1
            self._changed.notify_all()
            return part

    def _send(self, part: bytes) -> None:
        self._n_bytes += len(part)
        if self._writer is not None:
            self._write(part)
            return
        self._held.append(part)
        if self._n_bytes > _HOLD_BYTES:
            self._writer = self._target.begin()
            for held in self._held:
                self._write(held)
            self._held.clear()

    def _write(self, part: bytes) -> None:
        self._target.write(self._writer, part)
        if self._etag is not None:  # hashed after the hand-over, while the writer sends the part
            self._etag.add(part)

    def complete(self, *, if_absent: bool = False) -> ObjectInfo | None:
        """Publish the object. A small object takes one request."""
        key = self._target.key
        if if_absent and self._writer is not None and not self._target.exclusive:
            raise ValueError(f"{key}: complete(if_absent=True) of a large object needs create(key, if_absent=True)")
        if not self._stop():
            raise ValueError(f"{key}: the upload is already completed or aborted")
        if self._error is not None:
            self._drop()
            raise self._error
        if self._early:
            self._drop()
            raise ValueError(f"{key}: part {self._next} is missing; parts are numbered 0, 1, 2, ... without gaps")
        return self._put(if_absent=if_absent) if self._writer is None else self._close(if_absent=if_absent)

    def _put(self, *, if_absent: bool) -> ObjectInfo | None:
        data = b"".join(self._held)
        info = self._target.put(data, if_absent=if_absent)
        self.is_confirmed = self._etag is not None and info is not None and is_md5_of(info.etag, data)
        return info

    def _close(self, *, if_absent: bool) -> ObjectInfo | None:
        info = self._target.close(self._writer, self._n_bytes, if_absent=if_absent)
        self.is_confirmed = self._etag is not None and info is not None and self._etag.matches(info.etag)
        return info

    def abort(self) -> None:
        """Discard the bytes sent."""
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
            with suppress(StoreError):  # the parts then stay until a lifecycle rule of the bucket removes them
                self._target.abort(self._writer)
