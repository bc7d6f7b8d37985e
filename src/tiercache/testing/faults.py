"""Stores that wrap another store and inject scripted faults, delays and stops, in place of mocks and sleeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatch
from random import Random
from threading import Event, Lock
from typing import TypeVar

from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ByteRange, ObjectInfo
from tiercache.store.contract import Buffer, Span, Store, Upload
from tiercache.waiting import SYSTEM_CLOCK, Clock, pause

T = TypeVar("T")

VERBS = (
    "head", "get", "read_tail", "read_into", "put", "put_if_absent", "create", "delete", "list", "copy",
    "put_part", "complete", "abort",
)  # fmt: skip


class WrapperStore(Store):
    """Passes every call, including the three of its uploads, to inner through around().

    It is never a LocalStore, even if inner is: readers read it by ranges.

    Args:
        inner: Store that makes the calls.
    """

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.url = inner.url
        self.counters = inner.counters
        self.min_part_bytes = inner.min_part_bytes

    def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
        """Make the call. Subclasses act before it, after it or instead of it.

        Args:
            verb: Name of the call, one of VERBS.
            key: Key of the object.
            call: Function that makes the call.
        """
        del verb, key
        return call()

    def head(self, key: str) -> ObjectInfo:
        """Pass the call to inner."""
        return self.around("head", key, lambda: self.inner.head(key))

    def get(self, key: str) -> bytes:
        """Pass the call to inner."""
        return self.around("get", key, lambda: self.inner.get(key))

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """Pass the call to inner."""
        return self.around("read_tail", key, lambda: self.inner.read_tail(key, n_bytes))

    def read_into(
        self,
        key: str,
        spans: Sequence[Span],
        *,
        if_match: str | None = None,
        deadline_s: float | None = None,
        cancel: Event | None = None,
    ) -> None:
        """Pass the call to inner."""
        read = self.inner.read_into
        self.around("read_into", key, lambda: read(key, spans, if_match=if_match, deadline_s=deadline_s, cancel=cancel))

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        """Pass the call to inner."""
        return self.around("put", key, lambda: self.inner.put(key, data))

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """Pass the call to inner."""
        return self.around("put_if_absent", key, lambda: self.inner.put_if_absent(key, data))

    def create(self, key: str, *, if_absent: bool = False) -> Upload:
        """Pass the call to inner, and wrap the upload."""
        inner = self.around("create", key, lambda: self.inner.create(key, if_absent=if_absent))
        return WrapperUpload(self, key, inner)

    def delete(self, keys: Iterable[str]) -> None:
        """Pass the call to inner; around() gets the first key."""
        wanted = [*keys]
        self.around("delete", wanted[0] if wanted else "", lambda: self.inner.delete(wanted))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Pass the call to inner; around() covers the start of the listing only."""
        yield from self.around("list", prefix, lambda: self.inner.list(prefix))

    def copy(self, src: str, dst: str) -> ObjectInfo:
        """Pass the call to inner; around() gets the source key."""
        return self.around("copy", src, lambda: self.inner.copy(src, dst))

    def close(self) -> None:
        """Pass the call to inner."""
        self.inner.close()


class WrapperUpload(Upload):
    """Passes the calls of an upload through its store's around()."""

    def __init__(self, store: WrapperStore, key: str, inner: Upload) -> None:
        self._store, self._key, self._inner = store, key, inner

    def put_part(self, number: int, data: Buffer) -> None:
        """Pass the call to inner."""
        self._store.around("put_part", self._key, lambda: self._inner.put_part(number, data))

    def complete(self, *, if_absent: bool = False) -> ObjectInfo | None:
        """Pass the call to inner."""
        return self._store.around("complete", self._key, lambda: self._inner.complete(if_absent=if_absent))

    def abort(self) -> None:
        """Pass the call to inner."""
        self._store.around("abort", self._key, self._inner.abort)


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
        verb: Name of the call, one of `wrapper.VERBS`.
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
        maybe = {"maybe_done": True} if self.kind is FaultKind.LOST_RESPONSE else {}
        return self.error(
            f"scripted fault in {doing} ({self.kind})", url=url, retryable=self.retryable, status=self.status, **maybe
        )


class FaultStore(WrapperStore):
    """A store whose calls go wrong as scripted. Thread-safe: the lock guards the counts.

    Args:
        inner: Store that makes the calls.
        script: Faults, in any order; if two apply to one call, the first one is used.

    Attributes:
        struck: Verb and key of each call that went wrong, in order.
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

    def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
        """See WrapperStore.around."""
        fault = self._fault(verb, key)
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


class LatencyStore(WrapperStore):
    """A store that delays every call by a seeded random time, uniform between shortest_s and longest_s seconds.

    Args:
        inner: Store that makes the calls.
        seed: Seed of the delays.
        shortest_s: Shortest delay in seconds.
        longest_s: Longest delay in seconds.
        clock: Clock that waits.
    """

    def __init__(
        self, inner: Store, *, seed: int, shortest_s: float = 0.0, longest_s: float, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        super().__init__(inner)
        self._random = Random(seed)
        self._lock = Lock()
        self._shortest_s, self._longest_s, self._clock = shortest_s, longest_s, clock

    def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
        """See WrapperStore.around."""
        del verb, key
        with self._lock:
            late_s = self._random.uniform(self._shortest_s, self._longest_s)
        pause(late_s, self._clock)
        return call()


class Gate:
    """A point at which one call of a GateStore stops until open(). Leaving the gate's context opens it.

    Args:
        point: "before_VERB" or "after_VERB", with VERB one of `wrapper.VERBS`.
        keys: Glob over keys.
        timeout_s: Seconds after which a waiting thread raises AssertionError.
    """

    def __init__(self, point: str, keys: str = "*", timeout_s: float = 30.0) -> None:
        when, _, verb = point.partition("_")
        if when not in ("before", "after") or verb not in VERBS:
            raise ValueError(f"a point must be before_VERB or after_VERB with a VERB of {VERBS}; got {point!r}")
        self.point, self.keys, self.timeout_s = point, keys, timeout_s
        self._reached, self._opened = Event(), Event()

    def wait_reached(self) -> None:
        """Return when a call has stopped at the gate."""
        if not self._reached.wait(self.timeout_s):
            raise AssertionError(f"no call reached {self.point} of {self.keys} within {self.timeout_s:g} s")

    @property
    def is_reached(self) -> bool:
        """Return whether a call has stopped at the gate."""
        return self._reached.is_set()

    def open(self) -> None:
        """Let the stopped call continue."""
        self._opened.set()

    def stop(self) -> None:
        """Stop the calling thread until the gate is opened."""
        self._reached.set()
        if not self._opened.wait(self.timeout_s):
            raise AssertionError(f"the gate {self.point} of {self.keys} was not opened within {self.timeout_s:g} s")

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *exc: object) -> None:
        self.open()


class GateStore(WrapperStore):
    """A store whose calls stop at gates.

    For example, `gate = store.stop_at("before_read_into")`, then `gate.wait_reached()` and `gate.open()`.

    Args:
        inner: Store that makes the calls.
    """

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._lock = Lock()
        self._gates: list[Gate] = []

    def stop_at(self, point: str, keys: str = "*") -> Gate:
        """Return a gate for the next call that reaches a point.

        Args:
            point: "before_VERB" or "after_VERB".
            keys: Glob over keys.
        """
        gate = Gate(point, keys)
        with self._lock:
            self._gates.append(gate)
        return gate

    def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
        """See WrapperStore.around."""
        self._pass(f"before_{verb}", key)
        answer = call()
        self._pass(f"after_{verb}", key)
        return answer

    def _pass(self, point: str, key: str) -> None:
        with self._lock:
            due = next((gate for gate in self._gates if gate.point == point and fnmatch(key, gate.keys)), None)
            if due is None:
                return
            self._gates.remove(due)
        due.stop()


class CountingStore(WrapperStore):
    """A store that records every call.

    Args:
        inner: Store that makes the calls.

    Attributes:
        calls: Verb and key of each call, in order.
    """

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.calls: list[tuple[str, str]] = []

    def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
        """See WrapperStore.around."""
        self.calls.append((verb, key))  # appending is atomic
        return call()

    def n_calls(self, verb: str | None = None, keys: str = "*") -> int:
        """Return the number of recorded calls.

        Args:
            verb: Name of the calls; None: all.
            keys: Glob over keys.
        """
        return sum(1 for called, key in [*self.calls] if verb in (None, called) and fnmatch(key, keys))
