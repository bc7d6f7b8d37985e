"""Retries: a back end sets `.retryable` on an error, and this module decides how often and how long to retry."""

from __future__ import annotations

import logging
import math
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Event
from typing import Literal, TypeAlias, TypeVar

from tiercache.errors import StoreError
from tiercache.stats import Counters
from tiercache.waiting import Clock, must_fail_fast, note_answer, pause

T = TypeVar("T")

AbandonableAttempts: TypeAlias = Literal["none", "retries", "all"]
"""Attempts that run in a thread of their own, which is abandoned when the time of the call is over.

"none": a write may still take effect. "retries": the client's own limits are no longer than the call's, but a retry
begins late. "all": the client has no such limits.
"""

logger = logging.getLogger("tiercache")

# Default of the storage option `timeout`: longer than the restart of a store (about 10 s).
TIMEOUT_S = 60.0
# A longer wait is reported by a warning.
REPORT_AFTER_S = 2.0
_LOOK_EVERY_S = 0.5

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
    pauses are not progress. Time in which all requests of the call wait for a thread of the pool does not count. Safe
    for threads.

    deadline_s is the number of seconds from now within which the whole call must end. endpoint() returns the name of
    what the call waits for now: the server, or the source of its keys. Setting `stop` ends pauses and retries.
    on_failure(error) is called after each failed attempt, and returns the least seconds until the next one. Retries are
    counted in counters.
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
        on_failure: Callable[[StoreError], float] = lambda _error: 0.0,
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
        self._end_s = self._deadline_end_s if timeout_s is None else min(self._deadline_end_s, now_s + timeout_s)
        self.error: StoreError | None = None  # of the last failed attempt since the last progress
        self.is_reported = False
        self._in_pool = False  # whether threads of a pool, of which these run now, execute the call
        self._running: set[int] = set()
        self._n_paced = 0  # threads in pacing()

    @property
    def endpoint(self) -> str:
        """Name of the server, or of the source of credentials, for which the call waits now."""
        return self.url if self._endpoint is None else self._endpoint()

    @property
    def is_unwanted(self) -> bool:
        """Whether the answer is not needed any more, as far as the calling thread knows: see stop_retries_when()."""
        return self._unwanted is not None and self._unwanted.is_set()

    @property
    def waited_s(self) -> float:
        """Seconds since the last progress; 0 while threads wait as the user's bandwidth demands."""
        return 0.0 if self._is_queued or self._n_paced else self.clock.monotonic() - self._progress_s

    @property
    def left_s(self) -> float | None:
        """Seconds until the call times out without progress, negative afterwards; None without a limit."""
        if self._is_queued and self.timeout_s is not None:  # the timeout starts when a thread starts
            return min(self._deadline_end_s - self.clock.monotonic(), self.timeout_s)
        return None if self._end_s == math.inf else self._end_s - self.clock.monotonic()

    @property
    def _is_queued(self) -> bool:
        return self._in_pool and not self._running

    def queue(self) -> None:
        """Declare that threads of a pool execute the call: its time runs only while a thread is in running()."""
        self._in_pool = True

    @contextmanager
    def running(self) -> Iterator[None]:
        """Execute a request of a queued call in this thread."""
        if not self._running:
            self.progressed()
        self._running.add(threading.get_ident())
        try:
            yield
        finally:
            self._running.discard(threading.get_ident())

    @contextmanager
    def pacing(self) -> Iterator[None]:
        """Wait as the user's own limit demands: that is no wait for the store."""
        self._n_paced += 1
        try:
            yield
        finally:
            self._n_paced -= 1

    def progressed(self) -> None:
        """Record that new bytes have arrived."""
        self._progress_s = now_s = self.clock.monotonic()
        if self.timeout_s is not None:
            self._end_s = min(self._deadline_end_s, now_s + self.timeout_s)
        self.error, self.is_reported = None, False

    def check(self) -> None:
        """Raise StoreError (retryable) if the call was cancelled, or its deadline or timeout has passed."""
        if self.cancel is not None and self.cancel.is_set():
            raise StoreError(f"{self.doing}: cancelled", url=self.url, retryable=True)
        now_s = self.clock.monotonic()
        if self._deadline_end_s <= now_s:
            text = f"{self.doing}: not done within {self.deadline_s:g} s"
        elif self._end_s <= now_s and not self._is_queued:
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


class CallMonitor:
    """The running calls of one store in this process: close() ends their retries, and a long wait is reported.

    While calls run, a watcher thread looks at them twice a second. Only one of several waiting calls is reported,
    because they mostly wait for the same reason. The lock guards the set of calls and the watcher.

    Args:
        on_idle: Function that the watcher calls when no call has been running for up to half a second.
    """

    def __init__(self, on_idle: Callable[[], object] = lambda: None) -> None:
        self._on_idle = on_idle
        self._lock = threading.Lock()
        self._calls: set[CallLimit] = set()
        self._has_watcher = False
        self._closed = Event()

    @contextmanager
    def track(self, limit: CallLimit) -> Iterator[None]:
        """Watch a call while the block runs."""
        with self._lock:
            self._calls.add(limit)
            if not self._has_watcher:
                with suppress(RuntimeError):  # no thread can start, for example while Python ends: nobody reports waits
                    threading.Thread(target=self._watch, name="tiercache-store-watch", daemon=True).start()
                    self._has_watcher = True
        try:
            yield
        finally:
            with self._lock:
                self._calls.discard(limit)

    def run(
        self, attempt: Callable[[], T], policy: RetryPolicy, limit: CallLimit, abandons: AbandonableAttempts = "none"
    ) -> T:
        """Return the result of with_retries() on a watched call."""
        with self.track(limit):
            return with_retries(attempt, policy, limit, abandons)

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_EVERY_S):
            self.look()
            with self._lock:
                self._has_watcher = bool(self._calls)
                if self._has_watcher:
                    continue
            self._on_idle()
            return

    def look(self) -> None:
        """Report a wait of more than 2 s, unless another wait has been reported.

        Calls that have waited for half of that time count as reported with it: they wait for the same reason.
        """
        with self._lock:
            waiting = [limit for limit in self._calls if limit.waited_s >= REPORT_AFTER_S / 2]
        late = [limit for limit in waiting if limit.waited_s >= REPORT_AFTER_S]
        if late and not any(limit.is_reported for limit in late):
            late[0].report()
        for limit in waiting if late else ():
            limit.is_reported = True

    def close(self) -> None:
        """End the retries of running calls, and the watcher thread."""
        self._closed.set()
        with self._lock:
            for limit in self._calls:
                limit.stop.set()


def with_retries(
    attempt: Callable[[], T], policy: RetryPolicy, limit: CallLimit, abandons: AbandonableAttempts = "none"
) -> T:
    """Return the result of attempt, retrying while its StoreError is retryable and policy and limit allow it.

    Raises the last error. An error with .maybe_done is raised at once, because the attempt may have taken effect.
    """
    n_failed, has_renewed = 0, False
    while True:
        limit.check()
        try:
            is_left = abandons == "all" or (abandons == "retries" and n_failed > 0)
            answer = _in_time(attempt, limit) if is_left else attempt()
        except StoreError as error:
            least_s = limit.on_failure(error)
            n_failed = n_failed + 1 if limit.error is not None else 1  # None: progress since the last failure
            if error.details.get("renewed"):  # new credentials are available
                if has_renewed:  # the new credentials were refused too
                    raise
                has_renewed = True
                continue
            pause_s = max(policy.pause_s(n_failed), least_s)
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


def _in_time(attempt: Callable[[], T], limit: CallLimit) -> T:
    """Return the result of attempt in a thread of its own, or abandon the thread when the time is over."""
    threads = ThreadPoolExecutor(1, thread_name_prefix="tiercache-store-attempt")
    try:
        future = threads.submit(attempt)
    except RuntimeError:  # no thread can start, for example while Python ends
        return attempt()
    threads.shutdown(wait=False)  # the thread ends with the attempt
    while not wait((future,), timeout=limit.left_s).done:
        limit.check()  # returns if the attempt has made progress
    return future.result()


def _is_worth_repeating(error: StoreError, limit: CallLimit, pause_s: float) -> bool:
    """Return whether another attempt after pause_s may succeed and has time to."""
    if not error.retryable or error.maybe_done or limit.is_unwanted:
        return False
    if error.details.get("sent") is not False:
        note_answer(limit.endpoint)
    elif must_fail_fast(limit.endpoint):
        return False
    left_s = limit.left_s
    return left_s is None or pause_s < left_s
