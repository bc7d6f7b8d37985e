"""The interrupt between two lines: it strikes where it is told to, and says what became of it."""

import json

from tests.support.warm_python import run_warm

# What is interrupted must be of the package: a small module of it, with lines to spare.
PROGRAM = """
import json
from threading import Lock

from tiercache.cache.fetch import CopyLease
from tiercache.model import format_bytes, parse_bytes
from tests.support.interrupts import interrupted, lines_of

def plain(tell):
    tell(format_bytes(parse_bytes("3MiB")))

def swallowing(tell):
    try:
        plain(tell)
    except KeyboardInterrupt:
        pass

def changing(tell):
    try:
        plain(tell)
    except KeyboardInterrupt:
        raise OSError("changed") from None

class Dying:
    def __del__(self):
        format_bytes(3)

def dying(tell):
    Dying()
    tell("alive")

lease = CopyLease(1, None)

def locking(tell):
    lease.close()

def is_free(tell):
    tell(str(lease._lock.acquire(timeout=5)))

lines = lines_of(plain)
done = {
    work.__name__: [interrupted(work, nth, then=lambda tell: tell("then")) for nth in lines.positions()]
    for work in (plain, swallowing, changing)
}
beyond = interrupted(plain, 10**6)
dropped = [interrupted(dying, nth) for nth in lines_of(dying).positions()]
left = [interrupted(locking, nth, then=is_free) for nth in lines_of(locking).positions()]
print(json.dumps({
    "told": lines.ended.lines, "n": len(lines.positions()),
    "places": [one.where in lines.times for one in done["plain"]],
    "outcomes": {name: sorted({one.outcome for one in ends}) for name, ends in done.items()},
    "codes": {name: sorted({one.ended.code for one in ends}) for name, ends in done.items()},
    "then": [one.ended.lines[-1:] == ("then",) for one in done["plain"]],
    "dropped": sorted({(one.outcome, one.ended.lines) for one in dropped}),
    "left": [sum(bool(one.where) for one in left), sorted({one.ended.lines for one in left})],
    "beyond": [beyond.where, beyond.outcome, beyond.ended.code],
}))
"""


def test_each_line_can_be_interrupted_and_its_outcome_is_reported():
    done = run_warm(["-c", PROGRAM])
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["told"] == ["3.0 MiB"]
    assert found["n"] > 5
    assert all(found["places"])
    assert found["outcomes"] == {"plain": ["raised"], "swallowing": ["swallowed"], "changing": ["changed"]}
    assert found["codes"] == {"plain": [0], "swallowing": [0], "changing": [1]}
    assert all(found["then"])
    assert found["dropped"] == [["dropped", ["alive"]]]
    assert found["left"] == [found["left"][0], [["True"]]]
    assert found["left"][0] > 3
    assert found["beyond"] == ["", "", 0]
