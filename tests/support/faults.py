"""Stores that wrap another store and inject scripted faults, delays and stops, in place of mocks and sleeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatch
from threading import Event, Lock
from typing import TypeVar

from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.store.contract import Span, Store, WrapperStore

T = TypeVar("T")


class FaultKind(StrEnum):
    """Kind of a fault in a call."""

    ERROR = "error"
    """The call fails without an effect."""
    LOST_RESPONSE = "lost_answer"
    """The call takes effect and then fails; the error has the fact maybe_done."""
    BIT_FLIP = "bit_flip"
    """The call succeeds, but one bit of the data that it read is wrong (get, read_tail, read_into)."""
    REPLACED = "replaced"
    """read_into: the object is replaced after the first span was read; the call must raise ObjectChanged."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A scripted fault: calls number nth, nth + 1, ... nth + times - 1 of a verb go wrong, counted from 1.

    verb: Name of the method. error, retryable, status: Of the exception. keys: Glob over the keys whose calls count.
    """

    verb: str
    nth: int = 1
    times: int = 1
    kind: FaultKind = FaultKind.ERROR
    error: type[StoreError] = StoreError
    retryable: bool = True
    status: int | None = 503
    keys: str = "*"

    def failure(self, url: str, doing: str) -> StoreError:
        if self.error in (NotFound, ObjectChanged):
            return self.error(f"scripted fault in {doing}", url=url)
        return self.error(
            f"scripted fault in {doing} ({self.kind})",
            url=url,
            retryable=self.retryable,
            status=self.status,
            maybe_done=self.kind is FaultKind.LOST_RESPONSE,
        )


class FaultStore(WrapperStore):
    """A store whose calls go wrong as scripted; of two faults of one call, the first counts. Safe for threads.

    faulted_calls: Verb and key of each call that went wrong, in order.
    """

    def __init__(self, inner: Store, script: Sequence[Fault] = ()) -> None:
        super().__init__(inner)
        self.faulted_calls: list[tuple[str, str]] = []
        self._lock = Lock()
        self._script = [*script]
        self._n_calls = [0] * len(self._script)

    def add(self, *faults: Fault) -> None:
        """Add faults to the script; their calls are counted from now on."""
        with self._lock:
            self._script.extend(faults)
            self._n_calls.extend([0] * len(faults))

    def _fault(self, verb: str, key: str) -> Fault | None:
        with self._lock:
            due = None
            for line, fault in enumerate(self._script):
                if fault.verb == verb and fnmatch(key, fault.keys):
                    self._n_calls[line] += 1
                    if due is None and fault.nth <= self._n_calls[line] < fault.nth + fault.times:
                        due = fault
            if due is not None:
                self.faulted_calls.append((verb, key))
            return due

    def around(self, method: str, key: str, call: Callable[[], T]) -> T:
        fault = self._fault(method, key)
        if fault is None:
            return call()
        return self._befall(fault, key, call)

    def _befall(self, fault: Fault, key: str, call: Callable[[], T]) -> T:
        url = f"{self.url}/{key}"
        if fault.kind is FaultKind.ERROR:
            raise fault.failure(url, fault.verb)
        answer = call()
        if fault.kind is FaultKind.BIT_FLIP:
            return _flipped(answer)
        raise fault.failure(url, fault.verb)

    def read_into(
        self, key: str, spans: Sequence[Span], *, if_match: str | None = None, cancel: Event | None = None
    ) -> None:
        def read(wanted: Sequence[Span], etag: str | None = if_match) -> None:
            self.inner.read_into(key, wanted, if_match=etag, cancel=cancel)

        fault = self._fault("read_into", key)
        if fault is None:
            read(spans)
        elif fault.kind is FaultKind.REPLACED:
            etag = if_match or self.inner.head(key).etag
            read(spans[:1], etag)
            self.inner.put(key, self.inner.get(key)[::-1])
            read(spans[1:], etag)
        else:
            self._befall(fault, key, lambda: read(spans))
            if fault.kind is FaultKind.BIT_FLIP:
                _flip_in_place(spans)


def _flip_in_place(spans: Sequence[Span]) -> None:
    for _, buffer in spans:
        if buffer.nbytes:
            buffer[buffer.nbytes // 2] ^= 1
            return


def _flipped(answer: T) -> T:
    """Return the result of get or read_tail with one bit inverted; other results unchanged."""
    data = answer[0] if isinstance(answer, tuple) else answer
    if not isinstance(data, bytes) or not data:
        return answer
    wrong = bytearray(data)
    wrong[len(wrong) // 2] ^= 1
    return (bytes(wrong), *answer[1:]) if isinstance(answer, tuple) else bytes(wrong)  # type: ignore[return-value]
