"""The execution of a call to a remote store: retries, time limits, threads, and second attempts beside late ones.

`RequestRunner.run()` executes the requests of one call. A thread of the pool sends a request, and sends it again after
a retryable error. The caller's thread waits, and looks at the running attempts: a late one gets another attempt beside
it (a hedge). The attempt that is answered first ends the request, and the answers of the others are dropped. No client
library can interrupt a request, so a thread whose request hangs stays with it until the client's own time limit.
"""

from __future__ import annotations

import logging
import math
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Event, Lock
from typing import Any, TypeVar

from tiercache.errors import StoreError
from tiercache.stats import Counters
from tiercache.waiting import SYSTEM_CLOCK, Clock, must_fail_fast, note_answer, pause

T = TypeVar("T")

logger = logging.getLogger("tiercache")

# A longer wait is reported by a warning.
REPORT_AFTER_S = 2.0
# How often a waiting caller looks at its requests and at its cancel event: no thread can wait for an Event and a queue.
_LOOK_EVERY_S = 0.05
# Threads of a store that has not been called for this long end.
IDLE_S = 0.5
# Threads for each request that may run: the others keep requests that hang.
_THREADS_PER_REQUEST = 4

_jitter = random.SystemRandom()  # not the seeded generator: ranks must not retry in step
_thread_state = threading.local()


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Number of attempts, and the pauses between them: exponential backoff with full jitter.

    A pause is drawn uniformly between 0 and first_s, 2 first_s, 4 first_s, ..., at most longest_s; after progress, it
    starts again with first_s. By default the number of attempts has no limit: the CallLimit of a call ends its retries.
    """

    n_attempts: float = math.inf
    first_s: float = 0.1
    longest_s: float = 10.0

    def pause_s(self, n_failed: int) -> float:
        """Return the seconds to wait after the n_failed-th failure, counted from 1."""
        return _jitter.uniform(0.0, min(self.longest_s, self.first_s * 2.0 ** min(n_failed - 1, 60)))


@contextmanager
def stop_retries_when(unwanted: Event | None) -> Iterator[None]:
    """Stop retries of this thread's calls once `unwanted` is set. A first attempt is still made.

    Prefetch threads use it: a data set may be closed while a thread is about to call a server that does not answer.
    """
    before, _thread_state.unwanted = getattr(_thread_state, "unwanted", None), unwanted
    try:
        yield
    finally:
        _thread_state.unwanted = before


def is_unwanted() -> bool:
    """Return whether what this thread does is not needed any more: see stop_retries_when()."""
    unwanted: Event | None = getattr(_thread_state, "unwanted", None)
    return unwanted is not None and unwanted.is_set()


class CallLimit:
    """The time limits of one call: its deadline, its cancellation, and timeout_s since its last progress.

    The call makes progress when it starts and at each progressed(), that is when new bytes arrive. Failed attempts and
    pauses are not progress. Time in which all requests of the call wait for their turn does not count. Safe for
    threads.

    deadline_s is the number of seconds from now within which the whole call must end. endpoint() returns the name of
    what the call waits for now: the server, or the source of its keys. Setting `stop` ends pauses and retries.
    on_failure(error) is called after each failed attempt. Retries are counted in counters.
    """

    def __init__(
        self,
        url: str,
        doing: str,
        deadline_s: float | None = None,
        cancel: Event | None = None,
        *,
        clock: Clock,
        timeout_s: float | None = None,
        endpoint: Callable[[], str] | None = None,
        on_failure: Callable[[StoreError], object] = lambda _error: None,
        counters: Counters | None = None,
    ) -> None:
        self.url, self.doing, self.cancel, self.clock = url, doing, cancel, clock
        self.stop = Event()
        self.on_failure, self.counters = on_failure, counters
        self.deadline_s, self.timeout_s = deadline_s, timeout_s
        self._unwanted: Event | None = getattr(_thread_state, "unwanted", None)
        self._endpoint = endpoint
        self._progress_s = now_s = clock.monotonic()
        self._deadline_end_s = math.inf if deadline_s is None else now_s + deadline_s
        self.error: StoreError | None = None  # of the last failed attempt since the last progress
        self.is_reported = False
        self.n_turns: int | None = None  # requests that have their turn; None: of a call without turns

    @property
    def endpoint(self) -> str:
        """Name of the server, or of the source of credentials, for which the call waits now."""
        return self.url if self._endpoint is None else self._endpoint()

    @property
    def is_unwanted(self) -> bool:
        """Whether the answer is not needed any more, as far as the calling thread knows: see stop_retries_when()."""
        return self._unwanted is not None and self._unwanted.is_set()

    @property
    def is_queued(self) -> bool:
        """Whether all requests of the call wait for their turn."""
        return self.n_turns == 0

    @property
    def waited_s(self) -> float:
        """Seconds since the last progress."""
        return 0.0 if self.is_queued else self.clock.monotonic() - self._progress_s

    @property
    def left_s(self) -> float:
        """Seconds until the call times out without progress, negative afterwards."""
        timeout_s = math.inf if self.timeout_s is None else self.timeout_s - self.waited_s
        return min(timeout_s, self._deadline_end_s - self.clock.monotonic())

    def progressed(self) -> None:
        """Record that new bytes have arrived."""
        self._progress_s = self.clock.monotonic()
        self.error, self.is_reported = None, False

    def check(self) -> None:
        """Raise StoreError (retryable) if the call was cancelled, or its deadline or timeout has passed."""
        if self.cancel is not None and self.cancel.is_set():
            raise StoreError(f"{self.doing}: cancelled", url=self.url, retryable=True)
        if self._deadline_end_s <= self.clock.monotonic():
            text = f"{self.doing}: not done within {self.deadline_s:g} s"
        elif self.left_s <= 0:
            text = f"{self.doing}: nothing came from {self.endpoint} for {self.timeout_s or 0:g} s (timeout)"
        else:
            return
        raise StoreError(text + self._last_error(), url=self.url, retryable=True)

    def _last_error(self) -> str:
        if self.error is None:
            return ""
        return f"; the last attempt: {self.error.details.get('text', self.error.message)}"

    def report(self) -> None:
        """Log a warning that the call is waiting."""
        limit = f"; the call fails after {self.timeout_s:g} s without a byte (timeout)" if self.timeout_s else ""
        text = f"has waited {self.waited_s:.0f} s for {self.endpoint}{self._last_error()}{limit}"
        logger.warning("%s: %s: %s", self.url, self.doing, text)


def with_retries(attempt: Callable[[], T], policy: RetryPolicy, limit: CallLimit) -> T:
    """Return the result of attempt, retrying while its StoreError is retryable and policy and limit allow it.

    Raises the last error. An error with .maybe_done is raised at once, because the attempt may have taken effect.
    """
    n_failed, has_renewed = 0, False
    while True:
        limit.check()
        try:
            answer = attempt()
        except StoreError as error:
            limit.on_failure(error)
            n_failed = n_failed + 1 if limit.error is not None else 1  # None: progress since the last failure
            if error.details.get("renewed"):  # new credentials are available
                if has_renewed:  # the new credentials were refused too
                    raise
                has_renewed = True
                continue
            pause_s = policy.pause_s(n_failed)
            if n_failed >= policy.n_attempts or not _is_worth_repeating(error, limit, pause_s):
                raise
            limit.error = error
            if not pause(pause_s, limit.clock, limit.stop):
                raise
            if limit.counters is not None:
                limit.counters.add("retries")
        else:
            note_answer(limit.endpoint)
            return answer


def _is_worth_repeating(error: StoreError, limit: CallLimit, pause_s: float) -> bool:
    """Return whether another attempt after pause_s may succeed and has time to."""
    if not error.retryable or error.maybe_done or limit.is_unwanted:
        return False
    if error.details.get("sent") is not False:
        note_answer(limit.endpoint)
    elif must_fail_fast(limit.endpoint):
        return False
    return pause_s < limit.left_s


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


class RequestTimes:
    """The longest silences of recent requests to one store, from which follows when a request gets another attempt.

    A request is late when it has brought no new byte for longer than 95 % of the recent ones ever were silent. It gets
    another attempt beside it at once if at most 5 % of all requests have had one, and otherwise after 8 times that
    long, at least 2 s; each further attempt waits twice as long, so that a slow store is not asked more and more often.
    """

    def __init__(self) -> None:
        self.n_requests = self.n_hedges = 0
        self._silences_s: deque[float] = deque(maxlen=_N_OBSERVED)
        self._late_s: float | None = None  # computed from _silences_s

    def note_answer(self, silence_s: float) -> None:
        """Record the longest silence of an answered request."""
        self._silences_s.append(silence_s)
        self._late_s = None

    def take_hedge(self, silence_s: float, n_attempts: int) -> bool:
        """Return whether a request of n_attempts whose newest is silent for so long gets another one, and count it."""
        stall_s = _FIRST_STALL_S
        if len(self._silences_s) >= _LEAST_OBSERVED:
            if self._late_s is None:
                ordered = sorted(self._silences_s)
                self._late_s = max(ordered[int(_LATE_QUANTILE * len(ordered))], _LATE_FLOOR_S)
            stall_s = max(_STALL_FACTOR * self._late_s, _STALL_FLOOR_S)
            if n_attempts == 1 and silence_s > self._late_s and self.n_hedges + 1 <= HEDGED_SHARE * self.n_requests:
                self.n_hedges += 1
                return True
        return silence_s > stall_s * 2.0 ** (n_attempts - 1)


class Attempt:
    """One attempt of a request, as its function sees it. Used by one thread, and looked at by the caller's."""

    def __init__(self, task: _Task, clock: Clock) -> None:
        self._task, self._clock = task, clock
        self.silent_since_s = clock.monotonic()
        self.longest_silence_s = 0.0

    @property
    def is_over(self) -> bool:
        """Whether nobody needs the answer any more: another attempt was answered first, or the call has ended."""
        return self._task.is_done or self._task.call.is_over

    def received(self, *, has_new: bool = True) -> None:
        """Record bytes of the answer. has_new: Whether some had not come before; otherwise the call has no progress."""
        now_s = self._clock.monotonic()
        self.longest_silence_s = max(self.longest_silence_s, now_s - self.silent_since_s)
        self.silent_since_s = now_s
        if has_new:
            self._task.call.limit.progressed()


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
    has_turn: bool = False


class RequestRunner:
    """Executes requests in the threads of one process. Safe for threads.

    A request has its turn from its first attempt to its answer; a hanging one gives it to the next request when another
    attempt was answered. The lock guards the request times, the pool and the running calls.

    Args:
        n_requests: Number of requests that run at once.
        policy: Retries of a request.
        clock: Clock of all time limits.
        counters: Counters of the store; the runner counts "hedges".
        hedges: Whether late attempts get another one beside them.
    """

    def __init__(
        self, n_requests: int, policy: RetryPolicy, clock: Clock, counters: Counters, *, hedges: bool = True
    ) -> None:
        self._n_requests, self._policy, self._clock, self._counters = n_requests, policy, clock, counters
        self._hedges = hedges
        self._turns = threading.Semaphore(n_requests)
        self._lock = Lock()
        self._times = RequestTimes()
        self._is_closed = False
        self._calls: set[_Call] = set()
        self._threads: ThreadPoolExecutor | None = None
        self._last_call_s = 0.0
        self._idle_timer: threading.Timer | None = None
        self._reported: CallLimit | None = None

    def close(self) -> None:
        """End calls that wait for their turn, and the retries of others. Requests that run are not interrupted."""
        with self._lock:
            self._is_closed = True
            for call in self._calls:
                call.limit.stop.set()
            self._end_threads()
            if self._idle_timer is not None:
                self._idle_timer.cancel()

    def _end_threads(self) -> None:
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False)

    def _end_idle_threads(self) -> None:
        with self._lock:
            self._idle_timer = None
            if not self._calls and not self._is_closed:
                if SYSTEM_CLOCK.monotonic() - self._last_call_s >= IDLE_S:
                    self._end_threads()
                else:
                    self._start_idle_timer()

    def _start_idle_timer(self) -> None:
        self._idle_timer = threading.Timer(IDLE_S, self._end_idle_threads)
        self._idle_timer.name, self._idle_timer.daemon = "tiercache-store-idle", True
        with suppress(RuntimeError):  # no thread can start, for example while Python ends
            self._idle_timer.start()

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

        After the call has returned or raised, Attempt.is_over is true for attempts that still run.

        Args:
            requests: Functions that send a request.
            limit: Time limits of the call.
            is_write: Whether a running attempt is awaited although the time is over: its effect would be unknown.
            hedges: Whether a request may run twice at the same time. A write never does.
            policy: Retries of a request; None: those of the runner.

        Raises:
            StoreError: The first error of a request that was not worth repeating, or the error of the limit.
        """
        limit.check()
        with self._lock:
            if self._is_closed:
                raise self._closed(limit)
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
                self._end_turn(task)
            with self._lock:
                self._calls.discard(call)
                self._last_call_s = SYSTEM_CLOCK.monotonic()
                if not self._calls and self._idle_timer is None and not self._is_closed:
                    self._start_idle_timer()
        return [task.result for task in tasks]

    def _run_all(self, call: _Call, tasks: Sequence[_Task], *, is_write: bool, hedges: bool) -> None:
        limit, n_begun, n_ended = call.limit, 0, 0
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
                if not is_write or limit.is_queued:
                    limit.check()
                now_s = self._clock.monotonic()
                if now_s - looked_s >= _LOOK_EVERY_S:
                    looked_s = now_s
                    self._report(limit)
                    if hedges:
                        self._hedge(tasks[:n_begun], now_s)

    def _closed(self, limit: CallLimit) -> StoreError:
        return StoreError(f"{limit.doing}: the store was closed during the call", url=limit.url, retryable=True)

    def _report(self, limit: CallLimit) -> None:
        """Report a long wait, unless another call's was reported that still waits: probably for the same reason."""
        if limit.is_reported or limit.waited_s < REPORT_AFTER_S:
            return
        with self._lock:
            limit.is_reported = True
            if self._reported is not None and self._reported is not limit and self._reported.is_reported:
                return
            self._reported = limit
        limit.report()

    def _start_thread(self, task: _Task) -> None:
        """Begin to send a request. If no thread can start, such as while Python ends, the calling thread sends it."""
        task.n_threads += 1
        try:
            task.call.threads.submit(self._run_task, task)
        except RuntimeError:
            if self._is_closed:
                raise self._closed(task.call.limit) from None
            self._run_task(task)

    def _hedge(self, tasks: Sequence[_Task], now_s: float) -> None:
        """Start another attempt beside each one that is late."""
        for task in tasks:
            attempt = task.newest
            if task.is_done or attempt is None:
                continue
            with self._lock:
                if not self._times.take_hedge(now_s - attempt.silent_since_s, task.n_attempts):
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
        """Send a request until it is answered, in a thread of the pool."""
        limit = task.call.limit
        result: Any = None
        error: BaseException | None = None
        try:
            self._take_turn(task)
            result = with_retries(lambda: self._attempt(task), task.call.policy, limit)
        except BaseException as raised:  # noqa: BLE001 - top of a thread: the caller's thread raises it
            error = raised
        with task.call.lock:
            task.n_threads -= 1
            if task.is_done or (error is not None and task.n_threads):
                return  # another attempt was answered first, or still may be
            task.is_done, task.result, task.error = True, result, error
        self._end_turn(task)
        task.call.ended.put(task)

    def _take_turn(self, task: _Task) -> None:
        """Wait until one more request may run, unless the request has its turn already."""
        call, limit = task.call, task.call.limit
        if task.has_turn or task.is_done:
            return
        while not self._turns.acquire(timeout=_LOOK_EVERY_S):
            if limit.stop.is_set():
                raise self._closed(limit)
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
        attempt = task.newest = Attempt(task, self._clock)
        with self._lock:
            self._times.n_requests += 1
        try:
            result = task.send(attempt)
        finally:
            if task.newest is attempt:
                task.newest = None
        if not task.is_done:
            silence_s = max(attempt.longest_silence_s, self._clock.monotonic() - attempt.silent_since_s)
            with self._lock:
                self._times.note_answer(silence_s)
        return result
