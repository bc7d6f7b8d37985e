"""Stores that wrap another store and inject scripted faults, delays and stops, in place of mocks and sleeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatch
from threading import Event, Lock
from typing import TypeVar

from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ByteRange
from tiercache.store.contract import Span, Store, WrapperStore

T = TypeVar("T")

VERBS = (
    "head", "get", "read_tail", "read_into", "put", "put_if_absent", "create", "delete", "list",
    "put_part", "complete", "abort",
)  # fmt: skip


class FaultKind(StrEnum):
    """Kind of a fault in a call."""

    ERROR = "error"
    """The call fails without an effect."""
    LOST_RESPONSE = "lost_answer"
    """The call takes effect and then fails; the error has the fact maybe_done."""
    SHORT_READ = "short_read"
    """read_into fills half of each span and then fails."""
    BIT_FLIP = "bit_flip"
    """The call succeeds, but one bit of the data that it read is wrong (get, read_tail, read_into)."""
    REPLACED = "replaced"
    """read_into: the object is replaced after the first span was read; the call must raise ObjectChanged."""


_VERBS_OF = {
    FaultKind.SHORT_READ: ("read_into",),
    FaultKind.REPLACED: ("read_into",),
    FaultKind.BIT_FLIP: ("get", "read_tail", "read_into"),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """A scripted fault: calls number nth, nth + 1, ... nth + times - 1 of a verb go wrong, counted from 1.

    Attributes:
        verb: Name of the call, one of VERBS.
        nth: First call that goes wrong.
        times: Number of calls that go wrong.
        kind: Kind of the fault.
        error: Class of the exception.
        retryable: The exception's retryable.
        status: The exception's HTTP status.
        keys: Glob over keys; only calls with matching keys are counted.
        replacement: New content of the object, for REPLACED; None: the old content reversed.
    """

    verb: str
    nth: int = 1
    times: int = 1
    kind: FaultKind = FaultKind.ERROR
    error: type[StoreError] = StoreError
    retryable: bool = True
    status: int | None = 503
    keys: str = "*"
    replacement: bytes | None = None

    def __post_init__(self) -> None:
        if self.verb not in VERBS or self.nth < 1 or self.times < 1:
            raise ValueError(f"verb must be one of {VERBS}, and nth and times at least 1; got {self}")
        verbs = _VERBS_OF.get(self.kind, VERBS)
        if self.verb not in verbs:
            raise ValueError(f"a fault of kind {self.kind} applies only to {' and '.join(verbs)}, not to {self.verb}")

    def failure(self, url: str, doing: str) -> StoreError:
        """Return the exception of this fault.

        Args:
            url: URL of the object.
            doing: Name of the call, for the message.
        """
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
    """A store whose calls go wrong as scripted. Thread-safe: the lock guards the counts.

    Args:
        inner: Store that makes the calls.
        script: Faults, in any order; if two apply to one call, the first one is used.

    Attributes:
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
        """See WrapperStore.around."""
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
        self,
        key: str,
        spans: Sequence[Span],
        *,
        if_match: str | None = None,
        deadline_s: float | None = None,
        cancel: Event | None = None,
    ) -> None:
        """See Store.read_into."""

        def read(wanted: Sequence[Span], etag: str | None = if_match) -> None:
            self.inner.read_into(key, wanted, if_match=etag, deadline_s=deadline_s, cancel=cancel)

        fault = self._fault("read_into", key)
        if fault is None:
            read(spans)
        elif fault.kind is FaultKind.SHORT_READ:
            read([_halved(span) for span in spans])
            raise fault.failure(f"{self.url}/{key}", "read_into")
        elif fault.kind is FaultKind.REPLACED:
            etag = if_match or self.inner.head(key).etag
            read(spans[:1], etag)
            self.inner.put(key, self.inner.get(key)[::-1] if fault.replacement is None else fault.replacement)
            read(spans[1:], etag)
        else:
            self._befall(fault, key, lambda: read(spans))
            if fault.kind is FaultKind.BIT_FLIP:
                _flip_in_place(spans)


def _halved(span: Span) -> Span:
    wanted, buffer = span
    n_bytes = wanted.n_bytes // 2
    return ByteRange(wanted.start, wanted.start + n_bytes), buffer[:n_bytes]


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
