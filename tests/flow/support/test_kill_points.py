"""Points are found in the source, struck for certain, and what a dead child told is not lost."""

import json

import pytest
from tests.support.kill_points import points_in
from tests.support.warm_python import run_warm

# One process for all, because importing the package takes a second.
PROGRAM = """
import json, os, signal, threading
from tiercache.crash_points import crash_point
from tests.support import forks
from tests.support.forks import run_forked
from tests.support.kill_points import KillAt, count_points, kill_at

def work(tell):
    for i in range(3):
        tell(f"before {i}")
        crash_point("rig.step")
        tell(f"after {i}")

def threaded(tell):
    threads = [threading.Thread(target=work, args=(tell,)) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    tell("lived on")

def hang_here(tell):
    tell("begun")
    threading.Event().wait()

def struck(of, at):
    one = kill_at(of, at)
    return [one.hit, one.ended.code, one.lines]

in_thread = kill_at(threaded, KillAt("rig.step", 7))
hits, counted = count_points(work)
hung = run_forked(hang_here, deadline_s=0.2)
failed = run_forked(lambda tell: 1 / 0)
answer = {
    "first": struck(work, KillAt("rig.step", 1)),
    "third": struck(work, KillAt("rig.step", 3)),
    "fourth": struck(work, KillAt("rig.step", 4))[:2],
    "otherwise": struck(lambda tell: os.kill(os.getpid(), signal.SIGKILL), KillAt("rig.step"))[:2],
    "in a thread": [in_thread.hit, "lived on" in in_thread.ended.lines],
    "hits": [hits, counted.code, len(counted.lines)],
    "hung": [hung.hung, hung.code, hung.lines, "in hang_here" in hung.error],
    "failed": [failed.code, "ZeroDivisionError" in failed.error],
}
stop = threading.Event()
threading.Thread(target=stop.wait, name="busy").start()
forks.THREADS_GONE_S = 0.05
try:
    run_forked(print)
except RuntimeError as error:
    answer["with threads"] = "has 2" in str(error)
stop.set()
print(json.dumps(answer))
"""


def test_a_child_dies_exactly_where_it_is_told_to_and_its_lines_and_errors_survive_it():
    done = run_warm(["-c", PROGRAM])
    assert done.returncode == 0, done.stderr
    told = ["before 0", "after 0", "before 1", "after 1", "before 2"]
    assert json.loads(done.stdout) == {
        "first": [True, -9, told[:1]],
        "third": [True, -9, told],
        "fourth": [False, 0],  # it is not reached
        "otherwise": [False, -9],  # killed, and not at the point
        "in a thread": [True, False],
        "hits": [{"rig.step": 3}, 0, 6],
        "hung": [True, -9, ["begun"], True],
        "failed": [1, True],
        "with threads": True,
    }


def test_points_are_listed_with_their_locations_and_need_literal_names_that_occur_once(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/a.py").write_text('def f():\n    crash_point("fetch.reserved")\n    points.crash_point("a.b")\n')
    assert points_in(tmp_path) == {"fetch.reserved": "cache/a.py:2", "a.b": "cache/a.py:3"}
    for argument in ("name", "", '"fetch"', '"Fetch.Named"', 'f"fetch.{i}"', '"a.b.c"'):
        (tmp_path / "b.py").write_text(f"\ncrash_point({argument})\n")
        with pytest.raises(ValueError, match=r"b\.py:2"):
            points_in(tmp_path)
    (tmp_path / "b.py").write_text('crash_point("a.b")\n')
    with pytest.raises(ValueError, match=r"cache/a\.py:3.*b\.py:1|b\.py:1.*cache/a\.py:3"):
        points_in(tmp_path)
