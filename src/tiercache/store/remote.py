"""A store that is reached by requests, their repetition, and their time limits.

`RequestRunner.run()` executes the requests of one call. A thread of the pool sends a request, and sends it again after
a retryable error. The caller's thread waits, and gives a late request another attempt beside it (a hedge). The attempt
that is answered first ends the request. The end of a request or of its call interrupts the attempts that still run, if
the client library can do that (obstore's can), and closes their connections.

cancel_calls_when() and call_threads() say when nobody needs the calls of a thread any more: they then end at once.
"""

from __future__ import annotations

import atexit
import logging
import math
import random
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event, Lock
from typing import Any, Protocol, TypeVar

import numpy as np

from tiercache.errors import NotFound, ObjectChanged, StoreError
from tiercache.model import ByteRange, ObjectInfo
from tiercache.stats import Counters
from tiercache.store.access import CallOptions
from tiercache.store.contract import (
    MAX_GAP_BYTES,
    MAX_REQUEST_BYTES,
    Buffer,
    ProcessLocal,
    Receive,
    Request,
    SequentialUpload,
    Span,
    Store,
    Upload,
    check_key,
    check_spans,
    plan_requests,
)
from tiercache.store.local import TEMP_PREFIX
from tiercache.waiting import SYSTEM_CLOCK, Clock, must_fail_fast, note_answer, pause

T = TypeVar("T")

logger = logging.getLogger("tiercache")

# A longer wait is reported by a warning if it is unusual for the store: twice as long as that of its slow requests.
REPORT_AFTER_S, _UNUSUAL_FACTOR = 2.0, 2.0
# How often a waiting caller looks at its requests and at its cancel event: no thread can wait for an Event and a queue.
_LOOK_EVERY_S = 0.05
# A caller that did not look for longer did not run: its process was suspended, as by SIGSTOP.
_SUSPENDED_S = 1.0
# Threads for each request that may run: the others keep requests that hang.
_THREADS_PER_REQUEST = 4

# Statuses with which the server says that it gets too many requests; S3 sends 503 SlowDown.
_THROTTLED = (429, 503)

# A server that sends the whole object instead of a range may be one of several replicas; one without ranges never will.
_RANGE_ATTEMPTS = 4

_jitter = random.SystemRandom()  # not the seeded generator: ranks must not retry in step
_thread_state = threading.local()


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Number of attempts, and the pauses between them: exponential backoff with full jitter.

    A pause is drawn between 0 and first_s, 2 first_s, 4 first_s, ..., at most longest_s; progress begins anew. By
    default only the CallLimit of a call ends its retries.
    """

    n_attempts: float = math.inf
    first_s: float = 0.1
    longest_s: float = 10.0

    def pause_s(self, n_failed: int) -> float:
        """Return the seconds to wait after the n_failed-th failure, counted from 1."""
        return _jitter.uniform(0.0, min(self.longest_s, self.first_s * 2.0 ** min(n_failed - 1, 60)))


# Set when the interpreter ends, before it waits for the threads of pools. atexit's functions are called after that;
# threading has no public hook. Checkpoints, which are written to the end, register theirs later: it is called earlier.
_exiting = Event()
getattr(threading, "_register_atexit", atexit.register)(_exiting.set)


class CancelEvent(Protocol):
    """A threading.Event, or what says the same."""

    def is_set(self) -> bool:
        """Return whether the calls are cancelled."""


def _cancel_events() -> tuple[CancelEvent, ...]:
    events: tuple[CancelEvent, ...] | None = getattr(_thread_state, "cancel_events", None)
    if events is None:  # the interpreter waits for the other threads of the user, and so for their calls
        events = _thread_state.cancel_events = (_exiting,) if threading.current_thread().daemon else ()
    return events


def _set_cancel_events(events: tuple[CancelEvent, ...]) -> None:
    _thread_state.cancel_events = events


@contextmanager
def cancel_calls_when(*events: CancelEvent) -> Iterator[None]:
    """Cancel the calls of this thread, also those that run, when one of the events is set or the interpreter ends.

    They raise StoreError.
    """
    before = _cancel_events()
    _set_cancel_events((*(before or (_exiting,)), *events))
    try:
        yield
    finally:
        _set_cancel_events(before)


class _TimeLimit:
    def __init__(self, limit_s: float) -> None:
        self._end_s = SYSTEM_CLOCK.monotonic() + limit_s

    def is_set(self) -> bool:
        return SYSTEM_CLOCK.monotonic() >= self._end_s


@contextmanager
def cancel_calls_after(limit_s: float) -> Iterator[None]:
    """Cancel the calls of this thread after limit_s seconds: for the last calls while the interpreter ends."""
    before = _cancel_events()
    _set_cancel_events((_TimeLimit(limit_s),))
    try:
        yield
    finally:
        _set_cancel_events(before)


def is_cancelled() -> bool:
    """Return whether cancel_calls_when() cancels the calls of this thread now."""
    return any(event.is_set() for event in _cancel_events())


@contextmanager
def call_threads(n_threads: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads whose calls are cancelled with those of this thread, or when an exception leaves the block.

    Without it, Ctrl-C would wait for calls that are retried.
    """
    failed = Event()
    with (
        cancel_calls_when(failed),
        ThreadPoolExecutor(n_threads, name, initializer=_set_cancel_events, initargs=(_cancel_events(),)) as pool,
    ):
        try:
            yield pool
        except BaseException:
            failed.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class CallLimit:
    """The time limits of one call: its deadline, its cancellation, and timeout_s since its last progress.

    New bytes are progress; failed attempts and pauses are none. Time in which all requests of the call wait for their
    turn does not count. `stop` is set when the store is closed or the call ends: it ends pauses and retries. endpoint()
    names what the call waits for now: the server, or the source of its keys. counters count "retries" and "throttled".
    Safe for threads.

    Time in which the process was suspended does not count, if the caller's thread calls look() all the time. It is seen
    by the system's clock, whatever the clock of the call.
    """

    def __init__(
        self,
        url: str,
        doing: str,
        deadline_s: float | None = None,
        cancel: Event | None = None,
        *,
        clock: Clock,
        timeout_s: float | None,
        endpoint: Callable[[], str],
        counters: Counters,
    ) -> None:
        self.url, self.doing, self.clock = url, doing, clock
        self._cancel_events = _cancel_events() if cancel is None else (*_cancel_events(), cancel)
        self.stop = Event()
        self.endpoint, self.counters = endpoint, counters
        self.deadline_s, self.timeout_s = deadline_s, timeout_s
        self._looked_s: float | None = None
        self._progress_s = now_s = clock.monotonic()
        self._deadline_end_s = math.inf if deadline_s is None else now_s + deadline_s
        self.error: StoreError | None = None  # of the last failed attempt since the last progress
        self.is_reported = False
        self.n_turns: int | None = None  # requests that have their turn; None: of a call without turns

    @property
    def is_cancelled(self) -> bool:
        return any(event.is_set() for event in self._cancel_events)

    @property
    def is_queued(self) -> bool:
        return self.n_turns == 0

    @property
    def _suspended_s(self) -> float:
        """Seconds for which nobody has looked, if the process was suspended meanwhile."""
        unseen_s = 0.0 if self._looked_s is None else SYSTEM_CLOCK.monotonic() - self._looked_s
        return unseen_s if unseen_s > _SUSPENDED_S else 0.0

    @property
    def waited_s(self) -> float:
        return 0.0 if self.is_queued else self.clock.monotonic() - self._progress_s - self._suspended_s

    def look(self) -> bool:
        """Return whether the process was suspended since the last look."""
        suspended_s = self._suspended_s
        self._progress_s += suspended_s
        self._looked_s = SYSTEM_CLOCK.monotonic()
        return suspended_s > 0

    @property
    def left_s(self) -> float:
        """Seconds until the call times out without progress, negative afterwards."""
        timeout_s = math.inf if self.timeout_s is None else self.timeout_s - self.waited_s
        return min(timeout_s, self._deadline_end_s - self.clock.monotonic())

    def waited_behind_others(self, until_s: float) -> None:
        """Record that the bytes of other requests came until then, and that those of the call may be behind them."""
        self._progress_s = max(self._progress_s, until_s)

    def progressed(self) -> None:
        self._progress_s = self.clock.monotonic()
        self.error, self.is_reported = None, False

    def check(self) -> None:
        """Raise StoreError (retryable) if the call was cancelled, or its deadline or timeout has passed."""
        if self.is_cancelled:
            raise StoreError(f"{self.doing}: cancelled", url=self.url, retryable=True)
        if self.stop.is_set():
            raise StoreError(f"{self.doing}: the store was closed during the call", url=self.url, retryable=True)
        if self._deadline_end_s <= self.clock.monotonic():
            text = f"{self.doing}: not done within {self.deadline_s:g} s"
        elif self.left_s <= 0:
            text = f"{self.doing}: nothing came from {self.endpoint()} for {self.timeout_s or 0:g} s{self.setting()}"
        else:
            return
        raise StoreError(text + self._last_error(), url=self.url, retryable=True)

    def setting(self) -> str:
        """Return which setting ends the call, for messages."""
        if self.timeout_s is None or self._deadline_end_s - self.clock.monotonic() < self.timeout_s - self.waited_s:
            return "" if self.deadline_s is None else f"; the call has {self.deadline_s:g} s"
        return f"; the storage option timeout={self.timeout_s:g} limits the seconds without a byte"

    def _last_error(self) -> str:
        if self.error is None:
            return ""
        return f"; the last attempt: {self.error.details.get('text', self.error.message)}"

    def report(self) -> None:
        text = f"has waited {self.waited_s:.0f} s for {self.endpoint()}{self._last_error()}{self.setting()}"
        logger.warning("%s: %s: %s", self.url, self.doing, text)


def with_retries(attempt: Callable[[], T], policy: RetryPolicy, limit: CallLimit) -> T:
    """Return the result of attempt, retrying while its StoreError is retryable and policy and limit allow it.

    An error with .maybe_done is raised at once, because the attempt may have taken effect.
    """
    n_failed, has_renewed = 0, False
    while True:
        limit.check()
        try:
            answer = attempt()
        except StoreError as error:
            if error.status in _THROTTLED:
                limit.counters.add("throttled")
            n_failed = n_failed + 1 if limit.error is not None else 1  # None: progress since the last failure
            if error.details.get("renewed") and not has_renewed:  # new credentials are available
                has_renewed = True
                continue
            pause_s = policy.pause_s(n_failed)
            n_attempts = min(policy.n_attempts, _RANGE_ATTEMPTS) if error.details.get("no_range") else policy.n_attempts
            if n_failed >= n_attempts or not _is_worth_repeating(error, limit):
                raise
            if pause_s >= limit.left_s:
                attempts = f"{n_failed} attempt{'' if n_failed == 1 else 's'}"
                error.message += f"; gave up after {attempts} in {limit.waited_s:.0f} s{limit.setting()}"
                raise
            limit.error = error
            if not pause(pause_s, limit.clock, limit.stop):
                raise
            limit.counters.add("retries")
        else:
            note_answer(limit.endpoint())
            return answer


def _is_worth_repeating(error: StoreError, limit: CallLimit) -> bool:
    if not error.retryable or error.maybe_done or limit.is_cancelled:
        return False
    if error.details.get("sent") is not False:
        note_answer(limit.endpoint())
    elif must_fail_fast(limit.endpoint()):
        return False
    return True


_N_OBSERVED = 128
_LEAST_OBSERVED = 10
_LATE_QUANTILE = 0.95
# Without it, the scheduling of threads would make requests late on a fast network.
_LATE_FLOOR_S = 0.05
HEDGED_SHARE = 0.05
_STALL_FACTOR = 8.0
_STALL_FLOOR_S = 2.0
# Before enough requests were observed.
_FIRST_STALL_S = 5.0
# Requests that begin within this time may reach a proxy in any order. _QUEUE_FACTOR: The queue may also have bytes of
# other processes, and of requests that were interrupted.
_SAME_TIME_S, _QUEUE_FACTOR = 2.0, 1.5
# A request that began so much later, and got bytes, has overtaken.
_OVERTAKEN_S = 0.2


class RequestTimes:
    """The longest silences of recent requests to one store, from which follows when a request gets another attempt.

    A request is late when it was silent for longer than 95 % of the recent ones ever were. It gets another attempt at
    once if at most 5 % of all requests have had one, and otherwise after 8 times that long, at least 2 s; each further
    attempt waits twice as long, so that a slow store is not asked more and more often.

    n_received: Bytes that have come. n_expected: Bytes that the running attempts still expect. received_s: When bytes
    came last. newest_begun_s: Begin of the newest attempt to which bytes came.
    """

    def __init__(self) -> None:
        self.n_requests = self.n_hedges = 0
        self.n_received = self.n_expected = 0
        self.received_s = self.newest_begun_s = -math.inf
        self._silences_s: deque[float] = deque(maxlen=_N_OBSERVED)
        self._late_s: float | None = None  # computed from _silences_s

    def note_answer(self, silence_s: float) -> None:
        self._silences_s.append(silence_s)
        self._late_s = None

    def take_hedge(self, silence_s: float, n_attempts: int, stalled_s: float | None = None) -> bool:
        """Return whether a request of n_attempts whose newest is silent for so long gets another one, and count it.

        stalled_s: Attempt.stalled_s(), if that is less than silence_s.
        """
        late_s = self.late_s()
        stall_s = _FIRST_STALL_S
        if late_s is not None:
            stall_s = max(_STALL_FACTOR * late_s, _STALL_FLOOR_S)
            if n_attempts == 1 and silence_s > late_s and self.n_hedges + 1 <= HEDGED_SHARE * self.n_requests:
                self.n_hedges += 1
                return True
        return (silence_s if stalled_s is None else stalled_s) > stall_s * 2.0 ** (n_attempts - 1)

    def late_s(self) -> float | None:
        """Return the silence that 95 % of the recent requests did not exceed, in s; None: too few were observed."""
        if len(self._silences_s) < _LEAST_OBSERVED:
            return None
        if self._late_s is None:
            ordered = sorted(self._silences_s)
            self._late_s = max(ordered[int(_LATE_QUANTILE * len(ordered))], _LATE_FLOOR_S)
        return self._late_s


class Answer(Protocol):
    """The answer of a server that a client library brings, and that may be cancelled by any thread."""

    def wait(self, timeout_s: float) -> bool:
        """Return whether result() need not wait, at the latest after timeout_s."""

    def result(self) -> Any:
        """Wait for the answer and return it, or raise the library's error."""

    def cancel(self, error: BaseException) -> None:
        """Let result() raise the error, unless the answer has come, and close the connection."""


class Attempt:
    """One attempt of a request, as its function sees it. Used by one thread; others look at it and interrupt it."""

    def __init__(self, task: _Task, clock: Clock, times: RequestTimes, lock: Lock) -> None:
        """Begin an attempt. lock: Guards times."""
        self._task, self._clock, self._times, self._lock = task, clock, times, lock
        self.begun_s = self.silent_since_s = clock.monotonic()
        self.longest_silence_s = 0.0
        self._n_expected = 0
        self._note_queue()
        self._answer: Answer | None = None

    def _note_queue(self) -> None:
        """Note the bytes that other attempts expect: a proxy or a router may send them before those of this one."""
        self._n_before = self._times.n_received
        self._n_ahead = self._times.n_expected - self._n_expected

    def expects(self, n_bytes: int) -> None:
        """Record that the answer has n_bytes, of which none has come."""
        with self._lock:
            self._times.n_expected += n_bytes - self._n_expected
            self._n_expected = n_bytes

    @property
    def is_over(self) -> bool:
        """Whether nobody needs the answer any more: another attempt was answered first, or the call has ended."""
        return self._task.is_done or self._task.call.is_over

    def stalled_s(self, now_s: float) -> float:
        """Return the seconds of a silence that other bytes do not explain.

        Behind deep buffers, all bytes that were requested before, or at about the same time, may come first: until
        then, the silence begins when the last byte of any request came. Called often by the caller's thread.
        """
        n_since = self._times.n_received - self._n_before
        if now_s - self.silent_since_s < _SAME_TIME_S:
            self._n_ahead = max(self._n_ahead, n_since + self._times.n_expected - self._n_expected)
        if n_since < _QUEUE_FACTOR * self._n_ahead:
            return now_s - max(self.silent_since_s, self._times.received_s)
        return now_s - self.silent_since_s

    @property
    def is_overtaken(self) -> bool:
        """Whether bytes came to a request that began after the bytes of this one had ceased."""
        return self._times.newest_begun_s > self.silent_since_s + _OVERTAKEN_S

    def received(self, n_bytes: int = 0, *, has_new: bool = True) -> None:
        """Record bytes of the answer. has_new: Whether some had not come before; otherwise the call has no progress."""
        now_s = self._clock.monotonic()
        self.longest_silence_s = max(self.longest_silence_s, now_s - self.silent_since_s)
        self.silent_since_s = now_s
        with self._lock:
            times, n_expected = self._times, max(self._n_expected - n_bytes, 0)
            times.n_received += n_bytes
            times.n_expected += n_expected - self._n_expected
            times.received_s, times.newest_begun_s = now_s, max(times.newest_begun_s, self.begun_s)
            self._n_expected = n_expected
            self._note_queue()
        if has_new:
            self._task.call.limit.progressed()

    def wait_for(self, answer: Answer) -> Any:
        """Return the result of an answer that the end of the request or of its call cancels."""
        self._answer = answer
        if self.is_over:  # interrupt() may have run before the assignment
            self.interrupt()
        try:
            if _cancel_events():  # the caller's thread, of which no other one takes care
                while not answer.wait(_LOOK_EVERY_S):
                    if is_cancelled():
                        self.interrupt()
            return answer.result()
        finally:
            self._answer = None

    def interrupt(self, error: StoreError | None = None) -> None:
        """Let the attempt end with an error; None: nobody needs its answer."""
        answer = self._answer
        if answer is not None:
            limit = self._task.call.limit
            answer.cancel(error or StoreError(f"{limit.doing}: cancelled", url=limit.url, sent=False))


def wait_for_answer(answer: Answer) -> Any:
    """Return the result of an answer; what ends the request of the running attempt cancels it."""
    attempt: Attempt | None = getattr(_thread_state, "attempt", None)
    return answer.result() if attempt is None else attempt.wait_for(answer)


Send = Callable[[Attempt], Any]
"""Sends one request and returns the result. It may run in several threads at once, and must end early if is_over."""


@dataclass(slots=True, eq=False)
class _Call:
    limit: CallLimit
    policy: RetryPolicy
    threads: ThreadPoolExecutor
    ended: SimpleQueue[_Task] = field(default_factory=SimpleQueue)
    lock: Lock = field(default_factory=Lock)
    is_over: bool = False


@dataclass(slots=True, eq=False)
class _Task:
    """One request of a call: its attempts, and the result of the first that is answered."""

    call: _Call
    send: Send
    is_done: bool = False
    result: Any = None
    error: BaseException | None = None
    n_threads: int = 0  # that try to get an answer
    n_attempts: int = 1  # without retries
    newest: Attempt | None = None
    attempts: set[Attempt] = field(default_factory=set)  # that run
    has_turn: bool = False

    def interrupt(self) -> None:
        """Interrupt the attempts that still run, as nobody needs their answer."""
        for attempt in tuple(self.attempts):
            attempt.interrupt()

    def resume(self, now_s: float) -> None:
        """Let the silence of the attempts that run begin now: the process was suspended."""
        for attempt in tuple(self.attempts):
            attempt.silent_since_s = now_s


def _look(limit: CallLimit, tasks: Sequence[_Task], now_s: float) -> None:
    if limit.look():
        for task in tasks:
            task.resume(now_s)


class RequestRunner:
    """Executes at most n_requests requests at once in the threads of one process. Safe for threads. Counts "hedges".

    A request has its turn from its first attempt to its answer. The lock guards the request times, the pool and the
    calls.
    """

    def __init__(
        self,
        n_requests: int,
        policy: RetryPolicy,
        clock: Clock,
        counters: Counters,
        *,
        hedges: bool = True,
        stall_s: float = math.inf,
    ) -> None:
        """Start no thread yet. stall_s: Attempts that stall for longer are interrupted, and repeated."""
        self._n_requests, self._policy, self._clock, self._counters = n_requests, policy, clock, counters
        self._hedges, self._stall_s = hedges, stall_s
        self._turns = threading.Semaphore(n_requests)
        self._lock = Lock()
        self._times = RequestTimes()
        self._is_closed = False
        self._calls: set[_Call] = set()
        self._threads: ThreadPoolExecutor | None = None
        self._reported: CallLimit | None = None

    def close(self) -> None:
        """End all calls of reads, and writes that wait for their turn. A write that runs is not interrupted."""
        with self._lock:
            self._is_closed = True
            for call in self._calls:
                call.limit.stop.set()
            threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False)

    def run(
        self,
        requests: Sequence[Send],
        limit: CallLimit,
        *,
        is_write: bool = False,
        hedges: bool = True,
        policy: RetryPolicy | None = None,
    ) -> list[Any]:
        """Execute requests in parallel and return their results, in order.

        After the call, Attempt.is_over is true for attempts that still run, which are interrupted. is_write: A running
        attempt is awaited although the time is over, because its effect would be unknown; it is never hedged. policy:
        None: that of the runner. Raises the first StoreError of a request that was not worth repeating, or that of the
        limit.
        """
        limit.check()
        with self._lock:
            if self._is_closed:
                limit.stop.set()
                limit.check()
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_THREADS_PER_REQUEST * self._n_requests, "tiercache-store")
            self._calls.add(call := _Call(limit, policy or self._policy, self._threads))
        limit.n_turns = 0
        tasks = [_Task(call, send) for send in requests]
        try:
            self._run_all(call, tasks, is_write=is_write, hedges=hedges and not is_write and self._hedges)
        finally:
            call.is_over = True
            limit.stop.set()
            limit.is_reported = False
            for task in tasks:
                task.interrupt()
                self._end_turn(task)
            with self._lock:
                self._calls.discard(call)
        return [task.result for task in tasks]

    def _run_all(self, call: _Call, tasks: Sequence[_Task], *, is_write: bool, hedges: bool) -> None:
        limit, n_begun, n_ended = call.limit, 0, 0
        limit.look()
        looked_s = self._clock.monotonic()
        while n_ended < len(tasks):
            # The rest waits here and not in threads.
            while n_begun < len(tasks) and n_begun - n_ended < self._n_requests:
                self._start_thread(tasks[n_begun])
                n_begun += 1
            try:
                wait_s = _LOOK_EVERY_S if is_write else max(min(limit.left_s, _LOOK_EVERY_S), 0.0)
                task = call.ended.get(timeout=wait_s)
            except Empty:
                pass
            else:
                n_ended += 1
                if task.error is not None:
                    raise task.error
            if n_ended < len(tasks):
                now_s = self._clock.monotonic()
                _look(limit, tasks, now_s)
                is_time = now_s - looked_s >= _LOOK_EVERY_S
                if is_time:
                    looked_s = now_s
                    self._interrupt_stalled(limit, tasks[:n_begun], now_s)
                if not is_write or limit.is_queued or limit.is_cancelled:
                    limit.check()
                if is_time:
                    self._report(limit, tasks[:n_begun])
                    if hedges:
                        self._hedge(tasks[:n_begun], now_s)

    def _interrupt_stalled(self, limit: CallLimit, tasks: Sequence[_Task], now_s: float) -> None:
        for attempt in [attempt for task in tasks for attempt in tuple(task.attempts)]:
            stalled_s = attempt.stalled_s(now_s)
            if stalled_s < now_s - attempt.silent_since_s:
                limit.waited_behind_others(now_s - stalled_s)
            if stalled_s > self._stall_s:
                text = f"no answer, or no further byte, from {limit.endpoint()} for {self._stall_s:g} s"
                attempt.interrupt(StoreError(f"{limit.doing}: {text}", url=limit.url, retryable=True, text=text))

    def _report(self, limit: CallLimit, tasks: Sequence[_Task]) -> None:
        """Report a wait that is unusually long, unless another call's was reported that still waits."""
        if limit.is_reported or limit.waited_s < REPORT_AFTER_S:
            return
        own_s = max((attempt.longest_silence_s for task in tasks for attempt in tuple(task.attempts)), default=0.0)
        with self._lock:
            late_s = self._times.late_s()
            first_s = _FIRST_STALL_S if late_s is None else 0.0
            if limit.waited_s < max(first_s, _UNUSUAL_FACTOR * max(late_s or 0.0, own_s)):
                return
            limit.is_reported = True
            if self._reported is not None and self._reported is not limit and self._reported.is_reported:
                return
            self._reported = limit
        limit.report()

    def _start_thread(self, task: _Task) -> None:
        """Begin to send a request. If no thread can start, such as while Python ends, the calling thread sends it.

        Nobody can then end its pauses, so a call that may be cancelled is not retried.
        """
        task.n_threads += 1
        try:
            task.call.threads.submit(self._run_task, task)
        except RuntimeError:
            task.call.limit.check()  # raises if the store is closed
            if _cancel_events():
                task.call.policy = RetryPolicy(n_attempts=1)
            self._run_task(task)

    def _hedge(self, tasks: Sequence[_Task], now_s: float) -> None:
        for task in tasks:
            attempt = task.newest
            if task.is_done or attempt is None:
                continue
            silence_s, stalled_s = now_s - attempt.silent_since_s, attempt.stalled_s(now_s)
            with self._lock:
                if not self._times.take_hedge(
                    silence_s if attempt.is_overtaken else stalled_s, task.n_attempts, stalled_s
                ):
                    continue
            with task.call.lock:
                task.n_threads += 1
            task.newest, task.n_attempts = None, task.n_attempts + 1  # here: the new thread sets `newest`
            try:
                task.call.threads.submit(self._run_task, task)
            except RuntimeError:  # no more threads: the existing attempts do the work
                with task.call.lock:
                    task.n_threads -= 1
                return
            self._counters.add("hedges")

    def _run_task(self, task: _Task) -> None:
        limit = task.call.limit
        result: Any = None
        error: BaseException | None = None
        try:
            self._take_turn(task)
            result = with_retries(lambda: self._attempt(task), task.call.policy, limit)
        except BaseException as raised:  # noqa: BLE001 - top of a thread: the caller's thread raises it
            # Nobody raises the error of an interrupted attempt, whose frames would keep the connection open.
            error = raised.with_traceback(None) if task.is_done or task.call.is_over else raised
        with task.call.lock:
            task.n_threads -= 1
            if task.is_done or (error is not None and task.n_threads):
                return  # another attempt was answered first, or still may be
            task.is_done, task.result, task.error = True, result, error
        task.interrupt()
        self._end_turn(task)
        task.call.ended.put(task)

    def _take_turn(self, task: _Task) -> None:
        call, limit = task.call, task.call.limit
        if task.has_turn or task.is_done:
            return
        while not self._turns.acquire(timeout=_LOOK_EVERY_S):
            if limit.stop.is_set():
                limit.check()
        with call.lock:
            task.has_turn = True
            if not limit.n_turns:
                limit.progressed()  # the time of the call begins
            limit.n_turns = (limit.n_turns or 0) + 1
        if call.is_over:
            self._end_turn(task)

    def _end_turn(self, task: _Task) -> None:
        limit = task.call.limit
        with task.call.lock:
            had_turn, task.has_turn = task.has_turn, False
            limit.n_turns = (limit.n_turns or 0) - had_turn
        if had_turn:
            self._turns.release()

    def _attempt(self, task: _Task) -> Any:
        if task.is_done or task.call.is_over:
            return None
        with self._lock:
            attempt = Attempt(task, self._clock, self._times, self._lock)
        task.newest = _thread_state.attempt = attempt
        task.attempts.add(attempt)
        with self._lock:
            self._times.n_requests += 1
        try:
            result = task.send(attempt)
        finally:
            _thread_state.attempt = None
            task.attempts.discard(attempt)
            attempt.expects(0)
            if task.newest is attempt:
                task.newest = None
        if not task.is_done:
            silence_s = max(attempt.longest_silence_s, self._clock.monotonic() - attempt.silent_since_s)
            with self._lock:
                self._times.note_answer(silence_s)
        return result


# numpy releases the GIL while it copies; below this size, releasing it costs more than the copy.
_GIL_DROP_BYTES = 32 << 10


class Landing:
    """Destination of the bytes of one request, for all its attempts. Safe for threads.

    Each byte is stored once and in order, by the attempt that brings it first, and none after close() has returned: the
    lock is held meanwhile. receive: Gets them in pieces; None: they are copied into the buffers of the request. error:
    What receive() raised; the request is over then.
    """

    def __init__(self, request: Request, receive: Receive | None = None) -> None:
        self.request = request
        self.n_bytes = 0
        self.error: BaseException | None = None
        self._receive = receive
        self._lock = Lock()
        self._is_closed = False

    def add(self, offset: int, data: memoryview) -> bool:
        """Store the new ones of the bytes from this offset (at most n_bytes) on; return whether there were any."""
        with self._lock:
            n_known = self.n_bytes - offset
            if self._is_closed or n_known >= data.nbytes:
                return False
            try:
                self._store(self.n_bytes, data[n_known:] if n_known else data)
            except BaseException as error:  # noqa: BLE001 - the user's code; the attempt raises it
                self.error, self._is_closed = error, True
                return False
            self.n_bytes = offset + data.nbytes
            return True

    def _store(self, offset: int, data: memoryview) -> None:
        for start, buffer in self.request.targets:
            at, end = max(start, offset), min(start + buffer.nbytes, offset + data.nbytes)
            if at < end:
                piece = data[at - offset : end - offset]
                if self._receive is None:
                    _copy(buffer[at - start : end - start], piece)
                else:
                    self._receive(self.request.range.start + at, piece)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True


def _copy(target: memoryview, data: memoryview) -> None:
    if target.nbytes < _GIL_DROP_BYTES:
        target[:] = data
    else:
        np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(data, np.uint8))


# Every failure of a server, such as 520 to 529 of content delivery networks, but what it does not implement or allow.
RETRYABLE_STATUSES = frozenset((408, 425, 429, *range(500, 600))) - {501, 505, 511}
# Statuses with which the server says that it did not execute the request; after other errors of a write this is
# unknown.
_NOT_EXECUTED = (429, 501, 503)
# Statuses with which a server refuses the condition of a put, which it does not implement.
_UNCONDITIONAL = (405, 501)
# The name of an unfinished write, which no listing shows.
_PROBE_KEY = f"{TEMP_PREFIX}conditional-put"
# S3's codes of a status 409 with which it refuses a write because another one of the key is running.
CONFLICT_CODES = ("ConditionalRequestConflict", "OperationAborted")
_BEYOND_END = 416
_DELETE_KEYS = 1000
# An object of at most this size is written by one request, also with if_absent.
_HOLD_BYTES = 16 << 20
_ONE_ATTEMPT = RetryPolicy(n_attempts=1)


class ObjectWriter(Protocol):
    """A large object that is written in order. One thread at a time uses it."""

    def write(self, data: bytes) -> object:
        """Append data."""

    def close(self) -> object:
        """Publish the object."""

    def abort(self) -> object:
        """Discard the object."""


class ObjectClient(ABC):
    """Single requests to a store by one client library, not retried. Safe for threads.

    The methods raise the library's own errors, which errors() converts to StoreError. Its details: "sent" is False if
    the request was never sent; "exists": a conditional write was refused because the key exists. checks_etag: range()
    enforces if_match; otherwise descriptions before and after are compared.
    """

    url: str
    counters: Counters
    checks_etag = True

    def url_of(self, key: str) -> str:
        """Return the URL of a key, for messages."""
        return f"{self.url}/{key}" if key else self.url

    @abstractmethod
    def wait_target(self) -> str:
        """Return the name of what a request waits for now: the server, or the source of the credentials."""

    @abstractmethod
    def errors(self, key: str, doing: str) -> AbstractContextManager[None]:
        """Count a request, and convert the library's errors to StoreError."""

    @abstractmethod
    def head(self, key: str) -> ObjectInfo:
        """Return the description of an object."""

    @abstractmethod
    def get(self, key: str, on_piece: Callable[[], object]) -> bytes:
        """Return a whole object; call on_piece for each piece of the body that has arrived."""

    @abstractmethod
    def tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """Return the end of an object."""

    @abstractmethod
    def range(
        self, key: str, byte_range: ByteRange, if_match: str | None
    ) -> tuple[ObjectInfo | None, Iterable[memoryview]]:
        """Request a range. Return the description of the object if the answer has it, and the body in pieces."""

    @abstractmethod
    def put(self, key: str, body: bytes) -> ObjectInfo:
        """Write a whole object."""

    @abstractmethod
    def put_new(self, key: str, body: bytes) -> None:
        """Write a whole object if the key is free."""

    def put_new_by_store(self, key: str, body: bytes) -> None:
        """Write a whole object if the key is free, by nothing but the store's own condition."""
        self.put_new(key, body)

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> None:
        """Delete up to 1,000 objects. May fail if one of them does not exist."""

    @abstractmethod
    def pages(self, folder: str, after: str | None) -> Iterator[Sequence[ObjectInfo]]:
        """Yield the pages of a listing after a key."""

    @abstractmethod
    def open_writer(self, key: str) -> ObjectWriter:
        """Return the writer of a large object."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""


def _may_have_taken_effect(error: StoreError) -> bool:
    """Return whether a failed write may have taken effect: it was sent, and no answer says that it was refused."""
    if error.status is not None:
        return int(error.status) >= 500 and error.status not in _NOT_EXECUTED
    return bool(error.details.get("sent", False)) and bool(error.retryable)


# With 8 MiB and 20 ms, 16 requests fill 6 GB/s; with 1 MiB and 50 ms, 32 fill 660 MB/s.
N_REQUESTS = 32


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """How a store reads. n_requests: Unless the storage option `concurrency` says another number.

    max_gap_bytes, max_bytes: Most bytes of a gap that is read, and of a request.
    """

    policy: RetryPolicy = field(default_factory=RetryPolicy)
    max_gap_bytes: int = MAX_GAP_BYTES
    max_bytes: int = MAX_REQUEST_BYTES
    n_requests: int = N_REQUESTS
    clock: Clock = SYSTEM_CLOCK
    hedges: bool = True


class RemoteStore(Store):
    """Objects that an ObjectClient reads and writes. Each process creates its client and threads at first use.

    knows_conditional_put: Whether the kind of the store alone says that it has conditional puts. stall_s: Seconds
    without a byte after which an attempt is repeated, unless the client itself ends it.
    """

    knows_conditional_put = False
    stall_s = math.inf

    def __init__(self, url: str, options: CallOptions, settings: ReadSettings) -> None:
        self.url, self.call_options, self._settings = url, options, settings
        self._may_commit = options.is_single_writer  # or known from a test of conditional puts
        self.counters = Counters("requests", "bytes_read", "bytes_written", "retries", "hedges", "throttled")
        self._client: ProcessLocal[ObjectClient] = ProcessLocal(self._open_client, lambda client: client.close())
        self._runner = ProcessLocal(self._open_runner, RequestRunner.close)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    @abstractmethod
    def _open_client(self) -> ObjectClient:
        """Return a new client for this process, without sending a request."""

    def _open_runner(self) -> RequestRunner:
        chosen = self._settings
        n_requests = self.call_options.concurrency or chosen.n_requests
        return RequestRunner(
            n_requests, chosen.policy, chosen.clock, self.counters, hedges=chosen.hedges, stall_s=self.stall_s
        )

    @property
    def client(self) -> ObjectClient:
        return self._client.get()

    def close(self) -> None:
        """End the threads of this process and close its connections. Running calls are not retried any more."""
        self._runner.drop()
        self._client.drop()

    def call_limit(
        self, key: str, doing: str, deadline_s: float | None = None, cancel: Event | None = None
    ) -> CallLimit:
        client = self.client
        return CallLimit(
            client.url_of(key),
            doing,
            deadline_s,
            cancel,
            clock=self._settings.clock,
            timeout_s=self.call_options.timeout_s,
            endpoint=client.wait_target,
            counters=self.counters,
        )

    def _read(self, key: str, doing: str, request: Callable[[ObjectClient, Attempt], T], *, hedges: bool = True) -> T:
        def send(attempt: Attempt) -> T:
            client = self.client
            with client.errors(key, doing):
                return request(client, attempt)

        result: T = self._runner.get().run([send], self.call_limit(key, doing), hedges=hedges)[0]
        return result

    def _write(self, key: str, doing: str, request: Callable[[ObjectClient], T], *, is_conditional: bool = False) -> T:
        """Return the result of a write request, whose last attempt is awaited: its effect would be unknown otherwise.

        A conditional write is not repeated after a lost answer, because it would find its own object: the error has
        .maybe_done.
        """

        def send(_attempt: Attempt) -> T:
            client = self.client
            try:
                with client.errors(key, doing):
                    return request(client)
            except StoreError as error:
                if not is_conditional or error.details.get("exists") or not _may_have_taken_effect(error):
                    raise
                lost = f"{doing}: the answer was lost, so the object may or may not have been written ({error.message})"
                raise StoreError(lost, url=client.url_of(key), retryable=True, maybe_done=True) from None

        result: T = self._runner.get().run([send], self.call_limit(key, doing), is_write=True)[0]
        return result

    def head(self, key: str) -> ObjectInfo:
        check_key(key)
        return self._read(key, "head", lambda client, _attempt: client.head(key))

    def get(self, key: str) -> bytes:
        check_key(key)
        data = self._read(key, "get", lambda client, attempt: client.get(key, attempt.received))
        self.counters.add("bytes_read", len(data))
        return data

    def read_tail(self, key: str, n_bytes: int) -> tuple[bytes, ObjectInfo]:
        """Send one GET with a suffix range; HEAD and GET if the store has no suffix ranges or the object is empty."""
        check_key(key)
        if n_bytes <= 0:
            return b"", self.head(key)
        tail, info = self._read(key, "read_tail", lambda client, _attempt: client.tail(key, n_bytes))
        self.counters.add("bytes_read", len(tail))
        return tail, info

    def read_into(
        self,
        key: str,
        spans: Sequence[Span],
        *,
        if_match: str | None = None,
        deadline_s: float | None = None,
        cancel: Event | None = None,
    ) -> None:
        """Read the ranges in parallel, with one copy from the client's buffer. All are of one version of the object.

        deadline_s: Seconds from now within which the whole call must end; else it fails with a retryable error.
        """
        check_key(key)
        check_spans(spans)
        requests = plan_requests(spans, self._settings.max_gap_bytes, self._settings.max_bytes)
        limit = self.call_limit(key, "read_into", deadline_s, cancel)
        self._read_requests(key, [Landing(request) for request in requests], if_match, limit)

    def read_pieces(
        self,
        key: str,
        ranges: Sequence[ByteRange],
        receive: Receive,
        *,
        if_match: str | None = None,
        deadline_s: float | None = None,
        cancel: Event | None = None,
    ) -> None:
        check_key(key)
        # Of this size, no range is split into two requests.
        extent_bytes = max((one.end for one in ranges), default=0) - min((one.start for one in ranges), default=0)
        # Only the lengths of these spans count: views of one byte, repeated.
        spans = [(wanted, np.broadcast_to(np.uint8(0), wanted.n_bytes).data) for wanted in ranges]
        requests = plan_requests(spans, self._settings.max_gap_bytes, max(extent_bytes, 1))
        limit = self.call_limit(key, "read_pieces", deadline_s, cancel)
        self._read_requests(key, [Landing(request, receive) for request in requests], if_match, limit)

    def _read_requests(self, key: str, landings: Sequence[Landing], if_match: str | None, limit: CallLimit) -> None:
        """Execute the requests of one call. After it has returned or raised, no bytes are stored."""
        client = self.client
        reading = _ObjectRead(client, key, if_match, limit)
        compares = not client.checks_etag and (if_match is not None or len(landings) > 1)
        if compares:
            reading.check_etag(self.head(key))
        try:
            self._runner.get().run([partial(reading.attempt, landing) for landing in landings], limit)
        finally:
            for landing in landings:
                landing.close()  # an attempt that was overtaken or abandoned may still run
        if compares:
            reading.check_etag(self.head(key))

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        check_key(key)
        body = bytes(data)  # a connection may hold the body longer than the call; bytes are not copied
        info = self._write(key, "put", lambda client: client.put(key, body))
        self.counters.add("bytes_written", len(body))
        return info

    def put_if_absent(self, key: str, data: Buffer) -> bool:
        """Send one PUT with If-None-Match: *."""
        check_key(key)
        if self.call_options.is_single_writer:
            with suppress(NotFound):
                self.head(key)
                return False
            self.put(key, data)
            return True
        body = bytes(data)
        if is_new := self._put_new(key, lambda client: client.put_new(key, body)):
            self.counters.add("bytes_written", len(body))
        return is_new

    def _put_new(self, key: str, put: Callable[[ObjectClient], object]) -> bool:
        try:
            self._write(key, "put_if_absent", put, is_conditional=True)
        except StoreError as error:
            if error.details.get("exists"):
                return False
            raise
        return True

    def require_conditional_put(self) -> None:
        """Test the store once, by up to three requests: it must refuse the second of two puts of one key."""
        if self._may_commit or self.knows_conditional_put:
            return

        def put_probe() -> bool:
            return self._put_new(_PROBE_KEY, lambda client: client.put_new_by_store(_PROBE_KEY, b""))

        was_created, reason = False, "the store ignores the condition of a put"
        try:
            try:
                was_created = put_probe()
            except StoreError as error:
                if not error.maybe_done:
                    raise
                was_created = True
            self._may_commit = not was_created or not put_probe()
        except StoreError as error:
            if error.status not in _UNCONDITIONAL and not error.details.get("unsupported"):
                raise
            reason = error.message
        finally:
            if was_created:  # else another process tests the store now, or its test was interrupted
                with suppress(StoreError):
                    self.delete([_PROBE_KEY])
        if not self._may_commit:
            raise StoreError(
                f"{reason}: of two writers that commit at the same time, one would lose its data without an error; if "
                "only one process writes at a time, say so with storage_options={'single_writer': True}",
                url=self.url,
            )

    def create(self, key: str) -> Upload:
        """Start an upload that streams its parts. Up to 16 MiB are written by one request."""
        return _RemoteUpload(self, check_key(key))

    def delete(self, keys: Iterable[str]) -> None:
        def delete(keys: Sequence[str]) -> None:
            self._write(keys[0], "delete", lambda client: client.delete(keys))

        wanted = [check_key(key) for key in keys]
        for start in range(0, len(wanted), _DELETE_KEYS):
            some = wanted[start : start + _DELETE_KEYS]
            try:
                delete(some)
            except NotFound:
                for key in some:  # this store reports missing objects, and stopped at the first one
                    with suppress(NotFound):
                        delete([key])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        folder = check_key(prefix.removesuffix("/")) if prefix else ""
        after: str | None = None
        pages: Iterator[Sequence[ObjectInfo]] | None = None

        def next_page(client: ObjectClient, _attempt: Attempt) -> Sequence[ObjectInfo] | None:
            nonlocal pages
            try:
                pages = client.pages(folder, after) if pages is None else pages
                return next(pages, None)
            except BaseException:
                pages = None  # the next attempt begins after the last key
                raise

        # Without hedges: a page follows from the page before, so two attempts must not run at once.
        while (page := self._read(folder, "list", next_page, hedges=False)) is not None:
            for info in page:
                after = info.key
                if not any(segment.startswith(TEMP_PREFIX) for segment in info.key.split("/")):
                    yield info

    def write_part(self, key: str, writer: ObjectWriter, data: bytes) -> None:
        """Append data to the writer of a long object, which may block while too many parts are in flight."""
        with self.client.errors(key, "put_part"):
            writer.write(data)
        self.counters.add("bytes_written", len(data))

    def end_long_object(self, key: str, writer: ObjectWriter, n_bytes: int) -> ObjectInfo:
        """Let the writer make the object, without a retry, and check its size."""

        def close(_attempt: Attempt) -> None:
            with self.client.errors(key, "complete"):
                writer.close()

        self._runner.get().run([close], self.call_limit(key, "complete"), is_write=True, policy=_ONE_ATTEMPT)
        info = self.head(key)
        if info.n_bytes != n_bytes:
            raise StoreError(f"complete: sent {n_bytes} bytes, stored {info.n_bytes}", url=self.client.url_of(key))
        return info


class _ObjectRead:
    """One read: all its ranges must be of one version of the object, named by if_match or by the first answer.

    The threads of the call share it; dict.setdefault is atomic.
    """

    def __init__(self, client: ObjectClient, key: str, if_match: str | None, limit: CallLimit) -> None:
        self._client, self._key, self._limit = client, key, limit
        self._seen: dict[str, str] = {} if if_match is None else {"etag": if_match}

    def attempt(self, landing: Landing, attempt: Attempt) -> None:
        """Send one request, for what earlier attempts have not brought, and store its bytes."""
        client, byte_range = self._client, landing.request.range
        etag = self._seen.get("etag")
        condition = None if etag is None or etag.startswith("W/") else etag  # HTTP: a weak ETag never matches If-Match
        start = landing.n_bytes if self._seen else 0
        wanted = ByteRange(byte_range.start + start, byte_range.end)
        if not wanted.n_bytes:
            return  # another attempt has brought the rest, and is about to end
        position, info = start, None
        try:
            with client.errors(self._key, "read_into"):
                attempt.expects(wanted.n_bytes)
                info, body = client.range(self._key, wanted, condition)
                attempt.received(has_new=False)  # the head of the answer
                if info is not None:
                    self.check_etag(info)
                    self._check_end(info.n_bytes, byte_range)
                for data in body:
                    if attempt.is_over or landing.error is not None:
                        break
                    is_new = landing.add(position, data)
                    position += data.nbytes
                    attempt.received(data.nbytes, has_new=is_new)  # bytes that had come before are no progress
        except ObjectChanged as error:
            raise ObjectChanged(url=client.url_of(self._key), expected=etag, found=error.found) from None
        except StoreError as error:
            if error.status == _BEYOND_END:
                raise self._too_far(byte_range, "before the range") from None
            raise
        finally:
            client.counters.add("bytes_read", position - start)
        if landing.error is not None:
            raise landing.error
        if position != byte_range.end - byte_range.start and not attempt.is_over:
            if info is None:
                with client.errors(self._key, "head"):
                    info = client.head(self._key)
                self._check_end(info.n_bytes, byte_range)
            message = f"read_into: received only {position - start} bytes of the range [{wanted.start}, {wanted.end})"
            raise StoreError(message, url=client.url_of(self._key), retryable=True)

    def check_etag(self, info: ObjectInfo) -> None:
        """Raise ObjectChanged if the description is that of another version than those seen before."""
        # Without an ETag, only the date tells a replaced object.
        name, found = ("etag", info.etag) if info.etag is not None else ("date", str(info.modified_s))
        expected = self._seen.setdefault(name, found)
        if found != expected:
            raise ObjectChanged(url=self._client.url_of(self._key), expected=expected, found=found)

    def _check_end(self, n_bytes: int, byte_range: ByteRange) -> None:
        if n_bytes < byte_range.end:
            raise self._too_far(byte_range, f"at byte {n_bytes}")

    def _too_far(self, byte_range: ByteRange, end: str) -> StoreError:
        return StoreError(
            f"a range ends at byte {byte_range.end}, the object {end}", url=self._client.url_of(self._key)
        )


class _RemoteUpload(SequentialUpload):
    """An upload that holds the first 16 MiB, which one request can write, and streams a longer object."""

    def __init__(self, store: RemoteStore, key: str) -> None:
        super().__init__(key)
        self._store = store
        self._held: list[bytes] = []
        self._n_bytes = 0
        self._writer: ObjectWriter | None = None

    def append(self, data: memoryview) -> None:
        self._n_bytes += data.nbytes
        self._held.append(bytes(data))
        if self._writer is None and self._n_bytes > _HOLD_BYTES:
            self._writer = self._store._write(self.key, "create", lambda client: client.open_writer(self.key))  # noqa: SLF001
        if self._writer is not None:
            held, self._held = self._held, []
            for part in held:
                self._store.write_part(self.key, self._writer, part)

    def make_object(self, *, if_absent: bool) -> ObjectInfo | None:
        """Obstore cannot complete a long object under a condition, so the key is checked before."""
        store, key = self._store, self.key
        if self._writer is None:
            data = b"".join(self._held)
            if not if_absent:
                return store.put(key, data)
            return store.head(key) if store.put_if_absent(key, data) else None
        if if_absent:
            with suppress(NotFound):
                store.head(key)
                return None
        info = store.end_long_object(key, self._writer, self._n_bytes)
        self._writer = None  # after an error, discard() aborts it
        return info

    def discard(self) -> None:
        """If this fails, the parts sent stay until gc, or a lifecycle rule of the bucket, removes them."""
        self._held = []
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(StoreError), self._store.client.errors(self.key, "abort"):
                writer.abort()
