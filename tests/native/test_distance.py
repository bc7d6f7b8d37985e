"""Whether a consumer's core is far: asked for, written, read, and believed only when it is said again and again."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tiercache._native import gather, ring
from tiercache._native.distance import Distance
from tiercache._native.ring import Plan, Ring
from tiercache.waiting import wait_for

IDLE, ASKED, MARKED = 0, 1, 2


def test_lines_are_written_once_for_each_time_that_they_are_asked_for():
    distance = Distance()
    distance.mark()
    assert distance.step == IDLE
    distance.ask()
    assert distance.step == ASKED
    distance.look()
    assert distance.step == ASKED
    distance.mark()
    distance.ask()
    assert distance.step == MARKED
    distance.look()
    assert distance.step == IDLE


def test_seven_answers_more_change_what_is_held_true_and_six_do_not():
    distance = Distance()
    for _ in range(100):
        distance.learn(is_far=False)
    for _ in range(6):
        distance.learn(is_far=True)
    assert not distance.is_far
    distance.learn(is_far=True)
    assert distance.is_far
    for _ in range(100):
        distance.learn(is_far=True)
    for answer in (False, True, False, False, False, False, False, False):
        distance.learn(is_far=answer)
    assert distance.is_far
    distance.learn(is_far=False)
    assert distance.is_far is False


def test_what_this_core_has_written_is_near():
    """Most times: a thread may lose its processor while it reads."""
    distance = Distance()
    for _ in range(7):
        distance.learn(is_far=True)
    assert distance.is_far
    for _ in range(200):
        distance.ask()
        distance.mark()
        distance.look()
    assert not distance.is_far


def test_what_was_written_long_before_it_is_read_says_nothing():
    distance = Distance()
    for _ in range(4):
        distance.learn(is_far=True)
    for _ in range(20):
        distance.ask()
        distance.mark()
        until_s = time.perf_counter() + 0.002
        while time.perf_counter() < until_s:
            pass
        distance.look()
        assert distance.step == IDLE
    assert distance.is_far


def test_a_ring_asks_and_its_workers_answer():
    """An answer over a millisecond old does not count. On a loaded machine most are: this reads on until one counts."""
    if not ring.can_pass():
        pytest.skip("this processor does not copy past its caches")
    before = ring.n_answers()
    assert wait_for(lambda: _read_through_a_ring() > before, 120)


def _read_through_a_ring() -> int:
    """Returns the number of answers so far, after a busy ring of 2,000 batches was read."""
    rows = np.zeros((64, 2048), np.uint8)
    addresses = np.array([[[rows.ctypes.data, 0, 0]]], np.uint64)
    order = np.zeros(64 * 2000, np.uint32)
    busy = Ring(np.array([[gather.FIXED, 2048]], np.uint32), batch_rows=64, depth=4, n_threads=2)
    assert busy.push(Plan(addresses, order, order, rows))
    busy.finish()
    while not isinstance(busy.take(10), int):
        pass
    busy.close()
    return ring.n_answers()
