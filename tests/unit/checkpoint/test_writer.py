"""The threads of saves: calls in parallel, and tasks one after another, also where a thread cannot be started."""

import threading
from threading import Thread

import pytest
from tests.support.saves import WAIT_S

from tiercache.checkpoint.writer import TaskThread, in_parallel


@pytest.fixture
def limit_threads(monkeypatch):
    """A function that lets only so many more threads start; None: any number."""
    left = [None]
    start = Thread.start

    def limited(thread):
        if left[0] is not None:
            if not left[0]:
                raise RuntimeError("can't start new thread")
            left[0] -= 1
        start(thread)

    monkeypatch.setattr(Thread, "start", limited)

    def limit(n_threads):
        left[0] = n_threads

    return limit


def test_calls_are_made_by_the_threads_that_can_be_started(limit_threads):
    limit_threads(1)
    both = threading.Barrier(2)

    def call(number):
        if number < 2:
            both.wait(WAIT_S)  # two threads are in calls at the same time
        return number, threading.current_thread()

    done = in_parallel([lambda number=number: call(number) for number in range(20)], 8)
    assert [number for number, _ in done] == [*range(20)]
    assert len({thread for _, thread in done}) == 2
    assert not any(thread.is_alive() for _, thread in done if thread is not threading.current_thread())


def test_no_call_runs_any_more_when_the_caller_was_interrupted(monkeypatch):
    begun, in_main, gate, ends = threading.Event(), threading.Event(), threading.Event(), []

    def call(number):
        if threading.current_thread() is threading.main_thread():
            in_main.set()
            assert begun.wait(WAIT_S)
            raise KeyboardInterrupt
        assert in_main.wait(WAIT_S)
        begun.set()
        assert gate.wait(WAIT_S)
        ends.append(number)

    join = Thread.join

    def open_and_join(thread):  # the call runs until the caller waits for it
        gate.set()
        join(thread)

    monkeypatch.setattr(Thread, "join", open_and_join)
    with pytest.raises(KeyboardInterrupt):
        in_parallel([lambda number=number: call(number) for number in range(100)], 2)
    n_ended = len(ends)
    gate.set()
    assert n_ended == 1, "the running call has ended, and no other has begun"


def test_a_task_of_another_thread_is_not_lost_when_no_thread_can_be_started(limit_threads, monkeypatch):
    """1. A submits, and its thread cannot be started. 2. B submits meanwhile. B's task runs, or B learns of it."""
    tasks, done, errors, others = TaskThread("tasks"), [], [], []
    start = Thread.start

    def start_while_another_submits(thread):
        if thread.name != "tasks":
            return start(thread)
        if not others:
            others.append(Thread(target=submit, args=("b",), name="other"))
            others[0].start()
            others[0].join(0.2)  # it may wait for A
            raise RuntimeError("can't start new thread")
        return start(thread)

    def submit(name):
        try:
            tasks.submit(lambda: done.append(name))
        except RuntimeError:
            errors.append(name)

    monkeypatch.setattr(Thread, "start", start_while_another_submits)
    submit("a")
    others[0].join(WAIT_S)
    tasks.join()
    assert (errors, done) == (["a"], ["b"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tasks_after_one_that_crashes_are_run_and_the_crash_is_reported(monkeypatch):
    tasks, done, gate, reported = TaskThread("tasks"), [], threading.Event(), []
    monkeypatch.setattr(threading, "excepthook", lambda args: reported.append((args.exc_type, args.thread.name)))
    tasks.submit(lambda: gate.wait(WAIT_S))
    tasks.submit(lambda: 1 / 0)
    tasks.submit(lambda: done.append("after"))
    gate.set()
    tasks.join()
    assert done == ["after"]
    assert reported == [(ZeroDivisionError, "tasks")]
