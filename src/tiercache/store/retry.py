"""Trying again, in one place: back ends say in `.retryable` whether it can help; this file decides how often."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import TypeVar

from tiercache.errors import StoreError
from tiercache.waiting import Clock, pause

T = TypeVar("T")

_jitter = random.SystemRandom()  # not the seeded generator: many ranks must not come back in step


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """n_attempts in all; pauses are drawn evenly below first_s, 2 first_s, 4 first_s, ... longest_s, until total_s.

    The defaults wait some 26 s in all: a store that restarts, in 10 s or so, must not end a training.
    """

    n_attempts: int = 12
    first_s: float = 0.1
    longest_s: float = 10.0
    total_s: float = 180.0

    def __post_init__(self) -> None:
        if self.n_attempts < 1 or not 0 <= self.first_s <= self.longest_s or self.total_s < 0:
            raise ValueError(f"n_attempts must be at least 1 and 0 <= first_s <= longest_s, got {self}")

    def pause_s(self, n_failed: int) -> float:
        """Seconds to wait after the n_failed-th failure, counted from 1."""
        return _jitter.uniform(0.0, min(self.longest_s, self.first_s * 2.0 ** (n_failed - 1)))


class _Here(threading.local):
    """Of each thread: what says that nobody wants what it asks for any more."""

    unwanted: Event | None = None


_here = _Here()


@contextmanager
def trying_until(unwanted: Event | None) -> Iterator[None]:
    """Have calls of this thread try nothing again once unwanted is set; what they are asked once, they are asked.

    For who reads ahead: 1. the data set is closed, and its server too. 2. A thread that was on its way asks, and would
    try again for half a minute.
    """
    before, _here.unwanted = _here.unwanted, unwanted
    try:
        yield
    finally:
        _here.unwanted = before


class Patience:
    """How long one call may go on: until its deadline, or until it is cancelled. Read from any thread."""

    def __init__(
        self, url: str, doing: str, deadline_s: float | None = None, cancel: Event | None = None, *, clock: Clock
    ) -> None:
        self.url, self.doing, self.cancel, self.clock = url, doing, cancel, clock
        self.deadline_s, self._unwanted = deadline_s, _here.unwanted
        self.start_s = clock.monotonic()

    @property
    def is_endless(self) -> bool:
        """Whether nothing but the store itself can end the call."""
        return self.deadline_s is None and self.cancel is None

    @property
    def is_wanted(self) -> bool:
        """Whether somebody wants the answer still, as far as the thread that asks was told: see trying_until()."""
        return self._unwanted is None or not self._unwanted.is_set()

    @property
    def left_s(self) -> float | None:
        """Seconds to the deadline, negative after it; None without one."""
        if self.deadline_s is None:
            return None
        return self.start_s + self.deadline_s - self.clock.monotonic()

    def check(self) -> None:
        """Return if the call may go on.

        Raises:
            StoreError: retryable; the deadline has passed or the call was cancelled.
        """
        if self.cancel is not None and self.cancel.is_set():
            raise StoreError(f"{self.doing}: cancelled", url=self.url, retryable=True)
        left_s = self.left_s
        if left_s is not None and left_s <= 0:
            raise StoreError(f"{self.doing}: not done within {self.deadline_s:g} s", url=self.url, retryable=True)


def with_retries(attempt: Callable[[], T], policy: RetryPolicy, patience: Patience, *, stop: Event | None = None) -> T:
    """What attempt gives, trying again while its StoreError is retryable and policy and patience allow.

    stop: ends a pause, and trying again, when nobody waits for the answer any more.

    Raises:
        StoreError: the last one; with .maybe_done set, at once, because the attempt may have taken effect.
    """
    n_failed = 0
    while True:
        patience.check()
        try:
            return attempt()
        except StoreError as error:
            n_failed += 1
            spent_s = patience.clock.monotonic() - patience.start_s
            if not error.retryable or error.facts.get("maybe_done") or n_failed >= policy.n_attempts:
                raise
            if not patience.is_wanted:
                raise
            pause_s = policy.pause_s(n_failed)
            left_s = patience.left_s
            if spent_s + pause_s > policy.total_s or (left_s is not None and pause_s >= left_s):
                raise
            if not pause(pause_s, patience.clock, stop or patience.cancel) and stop is not None:
                raise
