"""Stores for tests that wrap another store: they stop at a named call, or count calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from threading import Event, Lock
from typing import TypeVar

from tiercache.store.contract import Span, Store, WrapperStore

T = TypeVar("T")


class Gate:
    """A point at which one call of a GateStore stops until open(). Leaving the gate's context opens it.

    point: "before_VERB" or "after_VERB". keys: Glob over keys. A thread that waits for timeout_s raises AssertionError.
    """

    def __init__(self, point: str, keys: str = "*", timeout_s: float = 30.0) -> None:
        self.point, self.keys, self.timeout_s = point, keys, timeout_s
        self._reached, self._opened = Event(), Event()

    def wait_reached(self) -> None:
        """Return when a call has stopped at the gate."""
        if not self._reached.wait(self.timeout_s):
            raise AssertionError(f"no call reached {self.point} of {self.keys} within {self.timeout_s:g} s")

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
    """A store whose calls stop at gates: stop_at("before_read_into") returns one; then wait_reached() and open()."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._lock = Lock()
        self._gates: list[Gate] = []

    def stop_at(self, point: str, keys: str = "*") -> Gate:
        """Return a gate for the next call that reaches a point, of a key that matches the glob."""
        gate = Gate(point, keys)
        with self._lock:
            self._gates.append(gate)
        return gate

    def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
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
    """A store that records every call, and the bytes that it asks for. calls: Verb and key of each, in order."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.calls: list[tuple[str, str]] = []
        self._asked_bytes: list[int] = []

    @property
    def bytes_read(self) -> int:
        return sum([*self._asked_bytes])

    def read_into(
        self, key: str, spans: Sequence[Span], *, if_match: str | None = None, cancel: Event | None = None
    ) -> None:
        self._asked_bytes.append(sum(span.n_bytes for span, _ in spans))
        super().read_into(key, spans, if_match=if_match, cancel=cancel)

    def around(self, verb: str, key: str, call: Callable[[], T]) -> T:
        self.calls.append((verb, key))  # appending is atomic
        return call()

    def n_calls(self, verb: str | None = None, keys: str = "*") -> int:
        """Return the number of calls of a verb (None: all) whose key matches the glob."""
        return sum(1 for called, key in [*self.calls] if verb in (None, called) and fnmatch(key, keys))
