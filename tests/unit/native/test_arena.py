"""Memory that a ring leaves to the next ring of the same size.

Each test is a process of its own: others' rings and loaders, still alive, would keep memory too.
"""

from __future__ import annotations

import subprocess
import sys

BEGINNING = """
import numpy as np
from tiercache._native import gather
from tiercache._native.ring import Plan, Ring, ArenaKeeper

ROWS = np.zeros((4, 64), np.uint8)
ADDRESSES = np.array([[[ROWS.ctypes.data, 0, 0]]], np.uint64)

def is_mapped(address):
    spans = [line.split()[0].split("-") for line in open("/proc/self/maps")]
    return any(int(start, 16) <= address < int(end, 16) for start, end in spans)

def ring_of(slot_bytes):
    ring = Ring(np.array([[gather.FIXED, 64]], np.uint32), batch_rows=4, depth=2, n_threads=1, slot_bytes=slot_bytes)
    assert ring.push(Plan(ADDRESSES, np.zeros(4, np.uint32), np.arange(4, dtype=np.uint32), None))
    return ring

def first_place(ring):
    return np.frombuffer(memoryview(ring.take(10)), np.uint8).ctypes.data

def place_of_one(slot_bytes):
    return first_place(ring_of(slot_bytes))

SMALL, LARGE = 3 << 20, 20 << 20  # of a batch; four are in an arena
"""


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", BEGINNING + script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_next_ring_of_the_same_size_reuses_the_memory_of_the_last():
    run("""
spare = ArenaKeeper()
place = place_of_one(SMALL)
assert is_mapped(place)
assert place_of_one(SMALL) == place
""")


def test_memory_is_freed_with_the_last_arena_keeper():
    run("""
assert not is_mapped(place_of_one(SMALL))
one, other = ArenaKeeper(), ArenaKeeper()
place = place_of_one(SMALL)
del one
assert is_mapped(place)
del other
assert not is_mapped(place)
""")


def test_concurrent_rings_share_nothing_and_leave_one_arena():
    run("""
spare = ArenaKeeper()
rings = [ring_of(SMALL), ring_of(SMALL)]
places = [first_place(ring) for ring in rings]
assert abs(places[0] - places[1]) >= 4 * SMALL
rings.clear()
assert sum(map(is_mapped, places)) == 1
""")


def test_a_ring_of_another_size_replaces_the_kept_memory():
    # Memory that can be written to: a thread's heap is 64 MiB of mere addresses, a stack more, 8 MiB, tells nothing.
    run("""
def writable_bytes():
    spans = [line.split()[0].split("-") for line in open("/proc/self/maps") if " rw" in line]
    return sum(int(end, 16) - int(start, 16) for start, end in spans)

SIZE = 7 << 20
place_of_one(0)  # a thread's stack, which stays
spare, before = ArenaKeeper(), writable_bytes()
place_of_one(SIZE)
assert writable_bytes() - before >= 4 * SIZE
place_of_one(2 * SIZE)
assert 8 * SIZE <= writable_bytes() - before < 10 * SIZE
""")


def test_memory_of_large_batches_is_not_kept():
    run("""
spare = ArenaKeeper()
assert not is_mapped(place_of_one(LARGE))
""")


def test_a_forked_child_has_memory_of_its_own():
    run("""
import os
spare = ArenaKeeper()
place = place_of_one(SMALL)
child = os.fork()
if not child:
    ROWS[:] = 1
    ring = ring_of(SMALL)
    slot = ring.take(10)
    os._exit(not np.frombuffer(memoryview(slot), np.uint8)[:256].all())
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
ring = ring_of(SMALL)
assert not np.frombuffer(memoryview(ring.take(10)), np.uint8)[:256].any()
""")
