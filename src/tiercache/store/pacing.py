"""When a request is late, how many requests run at once, and how long a throttled store is left alone.

Pure decisions: the classes hold numbers and read no clock; every time is an argument, in seconds of one monotonic
clock. request_runner.py and machine_limits.py carry the decisions out and hold the locks.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

# Sizes of requests are told apart by powers of four from 64 KiB on.
_SMALLEST_CLASS_BYTES = 64 << 10
_N_OBSERVED = 128
_LEAST_OBSERVED = 10
_LATE_QUANTILE = 0.95
# Without it, the scheduling of threads would make requests late on a fast network.
_LATE_FLOOR_S = 0.05
# A request without a new byte for this many times the p95 is sent again on another connection.
_DEADLINE_FACTOR = 8.0
_DEADLINE_FLOOR_S = 2.0
# Deadline before enough requests were observed.
_FIRST_DEADLINE_S = 5.0
HEDGED_SHARE = 0.05
# If more than this share of the running attempts is late, the store as a whole is slow, and hedges would add load.
_SLOW_SHARE = 0.25


def _size_class(n_bytes: int) -> int:
    """Return the number of the size class: 0 for up to 64 KiB, 1 for up to 256 KiB, ..."""
    return max(0, math.ceil(math.log(max(n_bytes, 1) / _SMALLEST_CLASS_BYTES, 4)))


@dataclass(slots=True)
class RunningAttempt:
    """An attempt of a request that runs: the first, a retry or a hedge.

    Attributes:
        n_bytes: Number of requested bytes; 0 if unknown.
        started_s: Start of the attempt.
        quiet_since_s: Time of its last new byte, or its start.
    """

    n_bytes: int
    started_s: float
    quiet_since_s: float


class RequestTimes:
    """Durations of the attempts at one store. Decides which attempts are late, hedged or sent again.

    An attempt is late when it has brought no new byte for longer than the p95 of the durations of whole answers of its
    size. At any time, hedges are at most 5 % of the other attempts, and none is granted while the store as a whole is
    slow.

    Attributes:
        n_attempts: Number of attempts that were started, without hedges.
        n_hedges: Number of hedges.
    """

    def __init__(self) -> None:
        self.n_attempts = self.n_hedges = 0
        self._durations: dict[int, deque[float]] = {}
        self._late_s: dict[int, float] = {}  # p95 by size class, removed when a duration is added
        self._running: dict[int, RunningAttempt] = {}  # by id()

    def begin(self, n_bytes: int, now_s: float, *, is_hedge: bool) -> RunningAttempt:
        """Enter an attempt that starts now. A hedge must have been granted by grant_hedge(), which has counted it."""
        self.n_attempts += not is_hedge
        attempt = RunningAttempt(n_bytes, now_s, now_s)
        self._running[id(attempt)] = attempt
        return attempt

    def end(self, attempt: RunningAttempt, now_s: float, *, is_observed: bool) -> None:
        """Remove an attempt. Repeated calls have no effect.

        Args:
            attempt: Attempt that begin() returned.
            now_s: Time of its end.
            is_observed: Whether the attempt was answered in full, so that its duration says how fast the store is.
        """
        if self._running.pop(id(attempt), None) is not None and is_observed:
            number = _size_class(attempt.n_bytes)
            self._durations.setdefault(number, deque(maxlen=_N_OBSERVED)).append(now_s - attempt.started_s)
            self._late_s.clear()

    def late_after_s(self, n_bytes: int) -> float | None:
        """Return the seconds without a byte after which a request of this size is late; None if too little is known.

        For a size without enough requests, the value comes from the next larger size, or from the next smaller one in
        proportion to the size: a request takes at most in proportion longer.
        """
        wanted = _size_class(n_bytes)
        known = [number for number, seen in self._durations.items() if len(seen) >= _LEAST_OBSERVED]
        if not known:
            return None
        if wanted not in self._late_s:
            nearest = min((n for n in known if n >= wanted), default=max(known))
            ordered = sorted(self._durations[nearest])
            p95_s = ordered[min(int(_LATE_QUANTILE * len(ordered)), len(ordered) - 1)]
            self._late_s[wanted] = max(p95_s * 4.0 ** max(wanted - nearest, 0), _LATE_FLOOR_S)
        return self._late_s[wanted]

    def deadline_s(self, n_bytes: int, n_repeated: int) -> float:
        """Return the seconds without a byte after which a request is sent again: 8 times the p95, at least 2 s.

        Doubled for each time n_repeated that the request was sent again, so that a slow store is not asked more often.
        """
        late_s = self.late_after_s(n_bytes)
        first_s = _FIRST_DEADLINE_S if late_s is None else max(_DEADLINE_FACTOR * late_s, _DEADLINE_FLOOR_S)
        return first_s * 2.0**n_repeated

    def is_store_slow(self, now_s: float) -> bool:
        """Return whether so many attempts are late that the store, and not a connection, is slow."""
        late = sum(self._is_late(attempt, now_s) for attempt in self._running.values())
        return late > max(1.0, _SLOW_SHARE * len(self._running))

    def _is_late(self, attempt: RunningAttempt, now_s: float) -> bool:
        late_s = self.late_after_s(attempt.n_bytes)
        return late_s is not None and now_s - attempt.quiet_since_s > late_s

    def grant_hedge(self, attempt: RunningAttempt, now_s: float) -> bool:
        """Return whether a second attempt may be sent beside this one now, and count it if so.

        The caller must ask only once for each request: an attempt does not know its request.
        """
        if (
            not self._is_late(attempt, now_s)
            or self.n_hedges + 1 > HEDGED_SHARE * self.n_attempts
            or self.is_store_slow(now_s)
        ):
            return False
        self.n_hedges += 1
        return True


# Requests at once: at the start, after which they double, and at most. With 8 MiB and 20 ms, 16 requests fill 6 GB/s;
# with 1 MiB and 50 ms, 64 fill 1.3 GB/s.
_FIRST_REQUESTS = 16
MOST_REQUESTS = 64
# A round with more requests at once must bring this share of the raise in throughput, or the knee is passed.
_GAIN_SHARE = 0.2
_PROBE_STEP = 1.25
_ROUNDS_BETWEEN_PROBES = 8
_DECREASE = 0.5
# A request counts as this many bytes beyond its own, so that rounds of small requests are comparable.
_REQUEST_COST_BYTES = 64 << 10


class ConcurrencyLimit:
    """Number of requests to one store that run at once: slow start, then probes for the knee of the throughput.

    A round is as many answered requests as the limit allows. The limit doubles from round to round while that raises
    the throughput by a fifth, goes back to the value before when it does not, and is raised by a quarter every eight
    rounds to see whether more has become useful. A throttled request halves it, once a round. A round in which fewer
    requests ran than allowed says nothing, and does not change the limit.

    Attributes:
        most: Largest limit.
        value: Limit now, from 1 to most.
    """

    def __init__(self, most: int = MOST_REQUESTS) -> None:
        self.most = most
        self.value = min(_FIRST_REQUESTS, most)
        self._factor = 2.0  # of the next raise
        self._before: tuple[int, float] | None = None  # limit and throughput before a raise that is not judged yet
        self._rounds_left = 0  # rounds until the next raise
        self._start_round(None)

    def _start_round(self, now_s: float | None) -> None:
        self._round_start_s, self._n_answered, self._work = now_s, 0, 0
        self._was_full = self._was_throttled = False

    def note_full(self) -> None:
        """Record that as many requests run as the limit allows."""
        self._was_full = True

    def note_answer(self, n_bytes: int, now_s: float) -> None:
        """Record a request that was answered with n_bytes."""
        if self._round_start_s is None:
            self._start_round(now_s)
            return
        self._n_answered += 1
        self._work += n_bytes + _REQUEST_COST_BYTES
        elapsed_s = now_s - self._round_start_s
        if self._n_answered >= self.value and elapsed_s > 0:
            if self._was_full and not self._was_throttled:
                self._judge(self._work / elapsed_s)
            self._start_round(now_s)

    def _judge(self, work_per_s: float) -> None:
        if self._before is not None:
            value, before = self._before
            self._before = None
            if work_per_s < before * (1 + (self.value / value - 1) * _GAIN_SHARE):
                self.value, self._factor, self._rounds_left = value, _PROBE_STEP, _ROUNDS_BETWEEN_PROBES
                return
            self._rounds_left = 0 if self._factor == 2.0 else _ROUNDS_BETWEEN_PROBES
        if self._rounds_left:
            self._rounds_left -= 1
        elif self.value < self.most:
            self._before = self.value, work_per_s
            self.value = min(math.ceil(self.value * self._factor), self.most)

    def note_throttled(self, now_s: float) -> None:
        """Record a request that the store refused because of too many requests."""
        if not self._was_throttled:
            self.value = max(int(self.value * _DECREASE), 1)
            self._factor, self._before, self._rounds_left = _PROBE_STEP, None, _ROUNDS_BETWEEN_PROBES
            self._start_round(now_s)
            self._was_throttled = True


_FIRST_BACKOFF_S = 0.05
_LONGEST_BACKOFF_S = 5.0


@dataclass(frozen=True, slots=True)
class Backoff:
    """Time for which a throttled store gets no requests.

    Attributes:
        until_s: End of the back-off.
        length_s: Length of the back-off that ends then; 0 if there was none.
    """

    until_s: float = 0.0
    length_s: float = 0.0

    def left_s(self, now_s: float) -> float:
        """Return the seconds that are left; 0 for an entry that is no possible one, for example of an earlier boot."""
        left_s = self.until_s - now_s
        return left_s if 0 < left_s <= _LONGEST_BACKOFF_S else 0.0

    def throttled(self, now_s: float, *, was_answered: bool) -> Backoff:
        """Return the back-off after a request was throttled: twice as long if the one before has just ended.

        Requests that were sent before the back-off began are throttled too; these do not lengthen it.

        Args:
            now_s: Time of the answer.
            was_answered: Whether the store has answered a request since the last back-off: then it only sheds some
                load, and the back-off is a short one again.
        """
        if self.left_s(now_s):
            return self
        is_recent = 0 <= now_s - self.until_s <= 4 * self.length_s and not was_answered
        length_s = min(2 * self.length_s, _LONGEST_BACKOFF_S) if is_recent and self.length_s else _FIRST_BACKOFF_S
        return Backoff(now_s + length_s, length_s)


# A connection may use the bandwidth of this time at once after a pause.
_BURST_S = 0.1


def pay(paid_until_s: float, n_bytes: int, bytes_per_s: float, now_s: float) -> tuple[float, float]:
    """Charge received bytes to a bandwidth.

    Args:
        paid_until_s: Time until which the bandwidth is used up by earlier bytes.
        n_bytes: Number of bytes that were received.
        bytes_per_s: Bandwidth.
        now_s: Time of the receipt.

    Returns:
        The new paid_until_s, and the seconds that the receiver must wait before it receives more.
    """
    length_s = n_bytes / bytes_per_s
    # A time that is too far ahead is no possible one: the file is of an earlier boot.
    start_s = max(paid_until_s if paid_until_s - now_s < 600.0 else 0.0, now_s - _BURST_S)
    return start_s + length_s, max(start_s + length_s - now_s, 0.0)
