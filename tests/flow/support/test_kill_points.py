"""Points are found in the source, struck for certain, and what a dead child told is not lost."""

import json

import pytest
from tests.support.kill_points import points_in
from tests.support.warm_python import run_warm

from tiercache import crash_points

PRELUDE = """
import json, os, signal, sys, threading
from tiercache.crash_points import crash_point
from tests.support.forks import run_forked
from tests.support.kill_points import KillAt, KilledChild, count_points, kill_at

def work(tell):
    for i in range(3):
        tell(f"before {i}")
        crash_point("rig.step")
        tell(f"after {i}")
"""


def answer(code):
    """What code, run in a process without threads, prints as JSON."""
    done = run_warm(["-c", PRELUDE + code])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def write(folder, name, text):
    (folder / name).write_text(text)


def test_points_are_listed_with_their_locations(tmp_path):
    (tmp_path / "cache").mkdir()
    write(
        tmp_path, "cache/a.py", 'def f():\n    crash_point("fetch.reserved")\n    points.crash_point("fetch.named")\n'
    )
    write(tmp_path, "b.py", 'crash_point("evict.locked")\n')
    assert points_in(tmp_path) == {
        "evict.locked": "b.py:1",
        "fetch.reserved": "cache/a.py:2",
        "fetch.named": "cache/a.py:3",
    }


@pytest.mark.parametrize("argument", ["name", "", '"fetch"', '"Fetch.Named"', 'f"fetch.{i}"', '"a.b.c"'])
def test_a_point_without_a_literal_name_is_refused_with_its_location(tmp_path, argument):
    write(tmp_path, "a.py", f"\ncrash_point({argument})\n")
    with pytest.raises(ValueError, match=r"a\.py:2"):
        points_in(tmp_path)


def test_a_point_name_that_occurs_twice_is_refused_with_both_locations(tmp_path):
    write(tmp_path, "a.py", 'crash_point("a.b")\n')
    write(tmp_path, "b.py", 'crash_point("a.b")\n')
    with pytest.raises(ValueError, match=r"b\.py:1.*a\.py:1"):
        points_in(tmp_path)


def test_a_hook_is_called_at_each_point_and_returned():
    seen = []
    before = crash_points.set_hook(seen.append)
    try:
        crash_points.crash_point("rig.one")
    finally:
        assert crash_points.set_hook(before) == seen.append
    crash_points.crash_point("rig.two")
    assert seen == ["rig.one"]


@pytest.mark.parametrize("nth", [1, 3])
def test_a_kill_at_the_nth_time_keeps_earlier_messages(nth):
    code = f"struck = kill_at(work, KillAt('rig.step', {nth}))\n"
    code += "print(json.dumps([struck.hit, struck.ended.code, struck.lines]))"
    told = [f"{when} {i}" for i in range(nth) for when in ("before", "after")][:-1]
    assert answer(code) == [True, -9, told]


def test_a_point_that_is_not_reached_is_not_counted():
    code = "struck = kill_at(work, KillAt('rig.step', 4)); print(json.dumps([struck.hit, struck.ended.code]))"
    assert answer(code) == [False, 0]


def test_a_child_that_was_killed_otherwise_is_not_counted():
    code = """
struck = kill_at(lambda tell: os.kill(os.getpid(), signal.SIGKILL), KillAt('rig.step'))
print(json.dumps([struck.hit, struck.ended.code]))"""
    assert answer(code) == [False, -9]


def test_a_kill_in_a_thread_ends_the_whole_child():
    code = """
def threaded(tell):
    threads = [threading.Thread(target=work, args=(tell,)) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    tell("lived on")
struck = kill_at(threaded, KillAt('rig.step', 7))
print(json.dumps([struck.hit, "lived on" in struck.lines]))"""
    assert answer(code) == [True, False]


def test_all_times_that_points_are_reached_are_counted():
    code = "hits, ended = count_points(work); print(json.dumps([hits, ended.code, len(ended.lines)]))"
    assert answer(code) == [{"rig.step": 3}, 0, 6]


def test_a_child_that_hangs_is_killed_and_its_stack_is_reported():
    code = """
def hang_here(tell):
    tell("begun")
    threading.Event().wait()
ended = run_forked(hang_here, deadline_s=0.2)
print(json.dumps([ended.hung, ended.code, ended.lines, "in hang_here" in ended.error]))"""
    assert answer(code) == [True, -9, ["begun"], True]


def test_an_error_of_a_child_reaches_the_parent_as_a_traceback():
    code = "ended = run_forked(lambda tell: 1 / 0); print(json.dumps([ended.code, ended.error]))"
    code, error = answer(code)
    assert code == 1
    assert "ZeroDivisionError" in error


def test_a_process_with_threads_does_not_fork():
    code = """
stop = threading.Event()
thread = threading.Thread(target=stop.wait, name="busy")
thread.start()
from tests.support import forks
forks.THREADS_GONE_S = 0.05
try:
    run_forked(print)
except RuntimeError as error:
    print(json.dumps(str(error)))
stop.set()"""
    assert "has 2" in answer(code)
