"""Stores that fail, wait or stop as scripted: faults and races without mocks and without sleeping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatch
from random import Random
from threading import Event, Lock
from typing import TypeVar

from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ByteRange
from tiercache.store.contract import Span, Store
from tiercache.testing.wrapper import VERBS, WrapperStore
from tiercache.waiting import SYSTEM_CLOCK, Clock, pause

T = TypeVar("T")


class FaultKind(StrEnum):
    """What goes wrong in a call."""

    ERROR = "error"
    """The call fails and did nothing."""
    LOST_ANSWER = "lost_answer"
    """The call takes effect and then fails; a put_if_absent says .maybe_done."""
    SHORT_READ = "short_read"
    """read_into fills half of what it was asked for and fails."""
    BIT_FLIP = "bit_flip"
    """The call succeeds; one bit of what it read is wrong (get, read_tail, read_into)."""
    REPLACED = "replaced"
    """read_into: the object is replaced after the first span was read, so the call must fail with ObjectChanged."""


_VERBS_OF = {
    FaultKind.SHORT_READ: ("read_into",),
    FaultKind.REPLACED: ("read_into",),
    FaultKind.BIT_FLIP: ("get", "read_tail", "read_into"),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of a script: calls nth, nth + 1, ... nth + times - 1 of verb, counted from 1, go wrong.

    keys: a glob; only calls for keys that match are counted. error: the class of what is raised; retryable, status: its
    facts. replacement: the new object of REPLACED (None: the old one reversed).
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
            raise ValueError(f"verb must be one of {VERBS}, nth and times at least 1; got {self}")
        verbs = _VERBS_OF.get(self.kind, VERBS)
        if self.verb not in verbs:
            raise ValueError(f"a fault of kind {self.kind} can only befall {' and '.join(verbs)}, not {self.verb}")

    def failure(self, url: str, doing: str) -> StoreError:
        """The error of this fault."""
        if self.error in (NotFound, ObjectChanged):
            return self.error(f"scripted fault in {doing}", url=url)
        maybe = {"maybe_done": True} if self.kind is FaultKind.LOST_ANSWER else {}
        return self.error(
            f"scripted fault in {doing} ({self.kind})", url=url, retryable=self.retryable, status=self.status, **maybe
        )


class FaultStore(WrapperStore):
    """Goes wrong as script says, and only so. struck: (verb, key) of what went wrong; the lock guards the counts."""

    def __init__(self, inner: Store, script: Sequence[Fault] = ()) -> None:
        super().__init__(inner)
        self.struck: list[tuple[str, str]] = []
        self._lock = Lock()
        self._script = [*script]
        self._n_calls = [0] * len(self._script)

    def add(self, *faults: Fault) -> None:
        """Extend the script; calls are counted from now."""
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
                self.struck.append((verb, key))
            return due

    def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
        """Make the call, or let it go wrong."""
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
        """Read, or let it go wrong."""

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
    """The answer of get or read_tail with one bit wrong; other answers as they are."""
    data = answer[0] if isinstance(answer, tuple) else answer
    if not isinstance(data, bytes) or not data:
        return answer
    wrong = bytearray(data)
    wrong[len(wrong) // 2] ^= 1
    return (bytes(wrong), *answer[1:]) if isinstance(answer, tuple) else bytes(wrong)  # type: ignore[return-value]


class LatencyStore(WrapperStore):
    """Makes every call late by a seeded, evenly spread time between shortest_s and longest_s."""

    def __init__(
        self, inner: Store, *, seed: int, shortest_s: float = 0.0, longest_s: float, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        super().__init__(inner)
        self._random = Random(seed)
        self._lock = Lock()
        self._shortest_s, self._longest_s, self._clock = shortest_s, longest_s, clock

    def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
        """Wait, then make the call."""
        del verb, key
        with self._lock:
            late_s = self._random.uniform(self._shortest_s, self._longest_s)
        pause(late_s, self._clock)
        return call()


class Gate:
    """A named point where one call stops until it is opened. Who waits longer than timeout_s here fails."""

    def __init__(self, point: str, keys: str = "*", timeout_s: float = 30.0) -> None:
        when, _, verb = point.partition("_")
        if when not in ("before", "after") or verb not in VERBS:
            raise ValueError(f"a point is before_VERB or after_VERB, VERB one of {VERBS}; got {point!r}")
        self.point, self.keys, self.timeout_s = point, keys, timeout_s
        self._reached, self._opened = Event(), Event()

    def wait_reached(self) -> None:
        """Return when a call has stopped here."""
        if not self._reached.wait(self.timeout_s):
            raise AssertionError(f"nobody reached {self.point} of {self.keys} within {self.timeout_s:g} s")

    @property
    def is_reached(self) -> bool:
        """Whether a call has stopped here."""
        return self._reached.is_set()

    def open(self) -> None:
        """Let the call go on."""
        self._opened.set()

    def stop(self) -> None:
        """Stop the calling thread here until the gate is opened."""
        self._reached.set()
        if not self._opened.wait(self.timeout_s):
            raise AssertionError(f"nobody opened {self.point} of {self.keys} within {self.timeout_s:g} s")

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *exc: object) -> None:
        self.open()


class GateStore(WrapperStore):
    """Stops calls at points: `gate = store.stop_at("before_read_into")`, then gate.wait_reached() and gate.open()."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._lock = Lock()
        self._gates: list[Gate] = []

    def stop_at(self, point: str, keys: str = "*") -> Gate:
        """A gate for the next call by point (`before_VERB`, `after_VERB`) whose key matches the glob."""
        gate = Gate(point, keys)
        with self._lock:
            self._gates.append(gate)
        return gate

    def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
        """Make the call, stopping where a gate stands."""
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
    """Writes down every call: calls is a list of (verb, key)."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.calls: list[tuple[str, str]] = []

    def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
        """Note the call and make it."""
        self.calls.append((verb, key))  # appending is atomic
        return call()

    def n_calls(self, verb: str | None = None, keys: str = "*") -> int:
        """How many calls of the verb (None: of any) had a key that matches the glob."""
        return sum(1 for called, key in [*self.calls] if verb in (None, called) and fnmatch(key, keys))
