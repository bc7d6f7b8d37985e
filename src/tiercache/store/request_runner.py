"""The execution of read requests: threads, retries, hedges, deadlines of attempts, and the gate of a store.

`RequestRunner.run()` executes the requests of one call. A request is sent by a line of attempts: a thread of the pool
that sends it, and again after a retryable error. The caller's thread waits, and looks at the running attempts. A late
attempt gets a second line beside it (a hedge, if RequestTimes grants one); an attempt without a byte until its deadline
gets another line in its place. The line that is answered first ends the request, and the answers of the others are
dropped. No client library can interrupt a request, so a thread whose request hangs stays with it until the client's own
time limit; its permit is given to the next request.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Condition, Lock
from typing import Any, TypeVar

from tiercache.errors import StoreError
from tiercache.stats import Counters
from tiercache.store.machine_limits import NO_SLOT, MachineLimits
from tiercache.store.pacing import ConcurrencyLimit, RequestTimes, RunningAttempt
from tiercache.store.retry import CallLimit, RetryPolicy, with_retries
from tiercache.waiting import Clock, pause, wait_for

T = TypeVar("T")

# How often a waiting caller looks at its requests and at its cancel event: no thread can wait for an Event and a queue.
_LOOK_EVERY_S = 0.05
# Threads for each request that may run: the others keep requests that hang or pause.
_THREADS_PER_REQUEST = 4
_jitter = random.SystemRandom()  # not the seeded generator: ranks must not go on in step


@dataclass(slots=True)
class _Permit:
    """Permission to send one request: a part of the limits of this process and of the machine."""

    slot: int
    is_valid: bool = True


class Gate:
    """Lets as many requests through as the store and the user allow, and none during a back-off. Safe for threads.

    The condition guards the number of running requests and the concurrency limit.
    """

    def __init__(self, machine: MachineLimits, most_requests: int, clock: Clock) -> None:
        self.machine, self._clock = machine, clock
        self._changed = Condition()
        self._n_running = 0
        self._concurrency = ConcurrencyLimit(most_requests)
        self._was_answered = False  # since the store throttled

    @property
    def n_allowed(self) -> int:
        """Number of requests of this process that may run at once now."""
        return self._concurrency.value

    def acquire(self, limit: CallLimit) -> _Permit:
        """Wait for a permit to send a request. Once limit.stop is set, the call returns without waiting further."""
        clock, stop = self._clock, limit.stop
        while (left_s := self.machine.backoff_left_s(clock.monotonic())) and not stop.is_set():
            pause(left_s + _jitter.uniform(0.0, left_s), clock, stop)
        with self._changed:
            while self._n_running >= self._concurrency.value and not stop.is_set():
                self._concurrency.note_full()
                self._changed.wait(_LOOK_EVERY_S)
            self._n_running += 1
            if self._n_running >= self._concurrency.value:
                self._concurrency.note_full()

        def take() -> _Permit | None:
            slot = self.machine.take_slot()
            return None if slot is None else _Permit(slot)

        # None: the call was stopped meanwhile. An attempt that it still makes holds no slot of the machine.
        return wait_for(take, None, clock, cancel=stop) or _Permit(NO_SLOT)

    def release(self, permit: _Permit) -> None:
        """Give a permit back. Repeated calls have no effect."""
        with self._changed:
            was_valid, permit.is_valid = permit.is_valid, False
            if was_valid:
                self._n_running -= 1
                self._changed.notify()
        if was_valid:
            self.machine.give_back_slot(permit.slot)

    def note_answer(self, n_bytes: int) -> None:
        """Record an answered request, from which the number of requests at once follows."""
        with self._changed:
            self._was_answered = True
            before = self._concurrency.value
            self._concurrency.note_answer(n_bytes, self._clock.monotonic())
            if self._concurrency.value > before:
                self._changed.notify_all()

    def note_throttled(self) -> float:
        """Record that the store throttles; all processes leave it alone. Return the seconds until it is asked again."""
        now_s = self._clock.monotonic()
        with self._changed:
            self._concurrency.note_throttled(now_s)
            was_answered, self._was_answered = self._was_answered, False
        backoff = self.machine.throttled(now_s, was_answered=was_answered)
        return backoff.left_s(now_s) + _jitter.uniform(0.0, backoff.length_s)


class Attempt:
    """One attempt of a request, as its function sees it. Used by one thread, and looked at by the caller's."""

    def __init__(self, runner: RequestRunner, task: _Task, permit: _Permit, running: RunningAttempt) -> None:
        self._runner, self._task = runner, task
        self.permit, self.running = permit, running

    @property
    def is_over(self) -> bool:
        """Whether nobody needs the answer any more: another attempt was answered first, or the call has ended."""
        return self._task.is_done or self._task.call.is_over

    def received(self, n_bytes: int, *, has_new: bool = True) -> None:
        """Record bytes of the answer, and wait as long as the user's bandwidth demands.

        Args:
            n_bytes: Number of bytes that have arrived.
            has_new: Whether some of them had not arrived before; otherwise they are no progress of the call.
        """
        clock, limit = self._runner.clock, self._task.call.limit
        now_s = clock.monotonic()
        wait_s = self._runner.gate.machine.charge(n_bytes, now_s)
        self.running.quiet_since_s = now_s + wait_s  # this wait does not make the request late
        if wait_s > 0:
            with limit.pacing():
                pause(wait_s, clock, limit.stop)
        if has_new:
            limit.progressed()


Send = Callable[[Attempt], Any]
"""Sends one request and returns the result. It may run in several threads at once, and must end early if is_over."""


@dataclass(slots=True, eq=False)
class _Call:
    limit: CallLimit
    threads: ThreadPoolExecutor
    ended: SimpleQueue[_Task] = field(default_factory=SimpleQueue)
    lock: Lock = field(default_factory=Lock)
    futures: list[Future[None]] = field(default_factory=list)
    is_over: bool = False
    was_closed: bool = False


@dataclass(slots=True, eq=False)
class _Task:
    """One request of a call: its lines, and the result of the first that is answered."""

    call: _Call
    n_bytes: int
    send: Send
    is_done: bool = False
    result: Any = None
    error: BaseException | None = None
    n_lines: int = 0
    n_repeated: int = 0
    is_hedged: bool = False
    newest: Attempt | None = None
    attempts: list[Attempt] = field(default_factory=list)


class RequestRunner:
    """Executes read requests in the threads of one process. Safe for threads.

    The lock guards the request times, the pool, and the number of calls. The pool exists while calls run.

    Args:
        gate: Gate of the store; the runner closes its machine limits.
        policy: Retries of a request.
        most_requests: Largest number of requests at once.
        clock: Clock of all time limits.
        counters: Counters of the store; the runner counts "retries" after a deadline and "hedges".
        adapts: Whether late attempts are hedged, and attempts past their deadline are sent again.
    """

    def __init__(
        self,
        gate: Gate,
        policy: RetryPolicy,
        most_requests: int,
        clock: Clock,
        counters: Counters,
        *,
        adapts: bool = True,
    ) -> None:
        self.gate, self.clock = gate, clock
        self._policy, self._counters, self._adapts = policy, counters, adapts
        self._lock = Lock()
        self._times = RequestTimes()
        self._is_closed = False
        self._n_threads = _THREADS_PER_REQUEST * most_requests
        self._n_calls = 0
        self._threads: ThreadPoolExecutor | None = None

    def close(self) -> None:
        """End calls that wait for a thread. Requests that run are not interrupted."""
        with self._lock:
            self._is_closed = True
            self._end_threads()

    def end_idle_threads(self) -> None:
        """End the threads if no call runs. They, and the file of the machine's limits, come back with the next call."""
        with self._lock:
            if not self._n_calls:
                self._end_threads()

    def _end_threads(self) -> None:
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)
        self.gate.machine.close()

    def run(self, requests: Sequence[tuple[int, Send]], limit: CallLimit) -> list[Any]:
        """Execute requests in parallel and return their results, in order.

        After the call has returned or raised, Attempt.is_over is true for attempts that still run.

        Args:
            requests: Number of bytes of each request (0: unknown), and the function that sends it.
            limit: Time limits of the call.

        Raises:
            StoreError: The first error of a request that was not worth repeating, or the error of the limit.
        """
        limit.check()
        with self._lock:
            if self._is_closed:
                raise self._closed(limit)
            self._n_calls += 1
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self._n_threads, "tiercache-store")
            call = _Call(limit, self._threads)
        tasks = [_Task(call, n_bytes, send) for n_bytes, send in requests]
        limit.queue()
        try:
            self._run_all(call, tasks)
        finally:
            call.is_over = True
            limit.stop.set()
            for future in call.futures:
                future.cancel()
            for task in tasks:
                self._end_attempts(task)
            with self._lock:
                self._n_calls -= 1
        return [task.result for task in tasks]

    def _run_all(self, call: _Call, tasks: Sequence[_Task]) -> None:
        limit, n_begun, n_ended = call.limit, 0, 0
        looked_s = self.clock.monotonic()
        while n_ended < len(tasks):
            # The rest waits here and not in threads.
            while n_begun < len(tasks) and n_begun - n_ended < max(self.gate.n_allowed, 1):
                if not self._start_line(tasks[n_begun]):
                    raise self._closed(limit)
                n_begun += 1
            left_s = limit.left_s
            try:
                task = call.ended.get(timeout=_LOOK_EVERY_S if left_s is None else max(min(left_s, _LOOK_EVERY_S), 0.0))
            except Empty:
                pass
            else:
                n_ended += 1
                if task.error is not None:
                    raise task.error
            if call.was_closed:
                raise self._closed(limit)
            if n_ended < len(tasks):
                limit.check()
                now_s = self.clock.monotonic()
                if self._adapts and now_s - looked_s >= _LOOK_EVERY_S:
                    looked_s = now_s
                    self._hedge_or_resend(tasks[:n_begun], now_s)

    def _closed(self, limit: CallLimit) -> StoreError:
        return StoreError(f"{limit.doing}: the store was closed during the call", url=limit.url, retryable=True)

    def _start_line(self, task: _Task, *, is_hedge: bool = False) -> bool:
        """Start a line of attempts; return False if the store is closed.

        If no thread can start, the calling thread sends the request, unless the task has a line already: for example,
        use reports are written while Python ends, when executors take no more work.

        Raises:
            RuntimeError: No thread can start, and the task has another line.
        """
        call = task.call

        def note_cancelled(future: Future[None]) -> None:
            if future.cancelled():
                call.was_closed = True

        with call.lock:
            task.n_lines += 1
            is_only = task.n_lines == 1
        try:
            future = call.threads.submit(self._run_line, task, is_hedge)
        except RuntimeError:
            if is_only and not self._is_closed:
                self._run_line(task, is_hedge)
                return True
            with call.lock:
                task.n_lines -= 1
            if self._is_closed:
                return False
            raise
        call.futures.append(future)
        future.add_done_callback(note_cancelled)
        return True

    def _hedge_or_resend(self, tasks: Sequence[_Task], now_s: float) -> None:
        """Start a second line for each attempt that is late, and another one for each that has passed its deadline."""
        for task in tasks:
            attempt = task.newest
            if task.is_done or attempt is None:
                continue
            with self._lock:
                quiet_s = now_s - attempt.running.quiet_since_s
                is_past_deadline = quiet_s > self._times.deadline_s(task.n_bytes, task.n_repeated)
                is_hedge = (
                    not is_past_deadline and not task.is_hedged and self._times.grant_hedge(attempt.running, now_s)
                )
            if is_past_deadline or is_hedge:
                task.is_hedged |= is_hedge
                task.n_repeated += is_past_deadline
                self._counters.add("hedges" if is_hedge else "retries")
                if is_past_deadline:  # its permit is for the new line; a hedge waits for another permit
                    task.newest = None
                    self.gate.release(attempt.permit)
                try:
                    self._start_line(task, is_hedge=is_hedge)
                except RuntimeError:
                    return  # no more threads: the existing attempts do the work

    def _run_line(self, task: _Task, is_hedge: bool) -> None:
        limit, error = task.call.limit, None
        permit: _Permit | None = None
        result = None
        try:
            permit = self.gate.acquire(limit)

            def attempt() -> Any:
                nonlocal permit
                own = self.gate.acquire(limit) if permit is None else permit
                permit = None  # _attempt() releases it
                return self._attempt(task, own, is_hedge)

            with limit.running():
                result = with_retries(attempt, RetryPolicy(n_attempts=1) if is_hedge else self._policy, limit)
        except BaseException as raised:  # noqa: BLE001 - top of a thread: the caller's thread raises it
            error = raised
        if permit is not None:
            self.gate.release(permit)
        with task.call.lock:
            task.n_lines -= 1
            if task.is_done or (error is not None and task.n_lines):
                return  # another line was answered first, or still may be
            task.is_done, task.result, task.error = True, result, error
        self._end_attempts(task)
        task.call.ended.put(task)

    def _attempt(self, task: _Task, permit: _Permit, is_hedge: bool) -> Any:
        is_answered = False
        attempt = None
        try:
            if task.is_done or task.call.is_over:
                return None
            with self._lock:
                running = self._times.begin(task.n_bytes, self.clock.monotonic(), is_hedge=is_hedge)
            attempt = Attempt(self, task, permit, running)
            task.attempts.append(attempt)
            task.newest = attempt
            result = task.send(attempt)
            is_answered = not task.is_done
            return result
        finally:
            if attempt is not None:
                self._end(attempt, is_observed=is_answered)
                if task.newest is attempt:
                    task.newest = None
            self.gate.release(permit)
            if is_answered:
                self.gate.note_answer(task.n_bytes)

    def _end(self, attempt: Attempt, *, is_observed: bool) -> None:
        with self._lock:
            self._times.end(attempt.running, self.clock.monotonic(), is_observed=is_observed)

    def _end_attempts(self, task: _Task) -> None:
        """Release what the attempts hold that still run: they are no longer waited for."""
        for attempt in list(task.attempts):
            self._end(attempt, is_observed=False)
            self.gate.release(attempt.permit)
