"""The ring: batches in order, memory that is not reused while it is referred to, and an end in every case."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
import warnings
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiercache._native import gather
from tiercache._native.permute import RowFinder
from tiercache._native.ring import CLOSED, END, FAILED, Plan, Ring, Slot, held_bytes, override_distance
from tiercache.waiting import wait_for

REF = 3
WIDTH = 24


@pytest.fixture(autouse=True, scope="module", params=[None, True], ids=["", "far"])
def distance(request):
    """Whether workers copy for a core that is far."""
    override_distance(request.param)
    yield
    override_distance(None)


def fixed_streams(width: int = WIDTH) -> np.ndarray:
    return np.array([[gather.FIXED, width]], np.uint32)


def plan_of(rows: np.ndarray, order: np.ndarray) -> Plan:
    """A plan over one block of fixed rows."""
    addresses = np.array([[[rows.ctypes.data, 0, 0]]], np.uint64)
    return Plan(addresses, np.zeros(len(order), np.uint32), order.astype(np.uint32), rows)


def take_all(ring: Ring, width: int = WIDTH) -> list[np.ndarray]:
    batches = []
    while not isinstance(slot := ring.take(10), int):
        batches.append(np.frombuffer(memoryview(slot), np.uint8, slot.n_rows * width).reshape(-1, width).copy())
    assert slot == END
    return batches


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 50), max_size=6),
    st.integers(1, 17),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([0, 64, 1 << 12]),
)
def test_rows_are_served_in_the_pushed_order_as_batches(sizes, batch_rows, depth, n_threads, slot_bytes):
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 256, (max(n, 1), WIDTH), dtype=np.uint8) for n in sizes]
    orders = [rng.permutation(n) for n in sizes]
    ring = Ring(fixed_streams(), batch_rows=batch_rows, depth=depth, n_threads=n_threads, slot_bytes=slot_bytes)
    for rows, order in zip(parts, orders, strict=True):
        assert ring.push(plan_of(rows, order))
    ring.finish()
    found = take_all(ring)
    ring.close()
    expected = np.concatenate([p[o] for p, o in zip(parts, orders, strict=True)]) if sizes else np.zeros((0, WIDTH))
    assert [len(b) for b in found[:-1]] == [batch_rows] * (len(found) - 1)
    assert np.array_equal(np.concatenate(found) if found else np.zeros((0, WIDTH)), expected)


def test_slots_in_use_are_not_overwritten_and_return_when_dropped():
    rows = np.arange(4000 * 8, dtype=np.uint8).reshape(4000, 8)
    ring = Ring(fixed_streams(8), batch_rows=10, depth=4, n_threads=2, slot_bytes=80)
    ring.push(plan_of(rows, np.arange(4000)))
    ring.finish()
    held = []
    while not isinstance(slot := ring.take(10), int):
        held.append(slot)
    assert np.array_equal(
        np.concatenate([np.frombuffer(memoryview(s), np.uint8, 80).reshape(10, 8) for s in held]), rows
    )
    assert held_bytes() >= 4000 * 8
    del held, slot
    gc.collect()
    assert held_bytes() == 0
    ring.close()


# Until 2 MiB rest, or of small slots as many as are ahead, but one. Those that had to grow are 84 KiB; the last of too
# many is unmapped, and now and then a new one gets its address: other memory.
@pytest.mark.parametrize(("width", "expected", "n_resting"), [(1024, 64 << 10, 31), (1024, 1024, 24), (16, 1024, 31)])
def test_a_released_slot_stays_idle_until_enough_other_memory_was_written(width, expected, n_resting):
    rows, batch_rows = np.arange(1 << 20, dtype=np.uint8).reshape(-1, width), 64
    ring = Ring(fixed_streams(width), batch_rows=batch_rows, depth=32, n_threads=1, slot_bytes=expected)
    ring.push(plan_of(rows, np.arange(200 * batch_rows) % len(rows)))
    ring.finish()
    places = []
    for _ in range(200):  # one that it would wait for the consumer fills, and reads, itself
        assert wait_for(lambda: ring.figures()["ready"] > 0, deadline_s=30)
        slot = ring.take()
        places.append(np.frombuffer(memoryview(slot), np.uint8).ctypes.data)
        del slot
    ring.close()
    n_early = sum(place in places[max(i - n_resting, 0) : i] for i, place in enumerate(places))
    assert n_early <= (10 if n_resting == 24 else 0)
    assert len(set(places)) <= 2 * 32 + 2


def test_close_wakes_a_waiting_consumer_and_a_waiting_planner():
    rows = np.zeros((8, WIDTH), np.uint8)
    hungry = Ring(fixed_streams(), batch_rows=9, depth=1, n_threads=1)
    hungry.push(plan_of(rows, np.arange(8)))
    full = Ring(fixed_streams(), batch_rows=1, depth=1, n_threads=1)
    full.push(plan_of(rows, np.arange(8)))
    seen: dict[str, object] = {}
    threads = [
        threading.Thread(target=lambda: seen.update(take=hungry.take())),
        threading.Thread(target=lambda: seen.update(room=full.wait_room(0))),
    ]
    for thread in threads:
        thread.start()
    hungry.close()
    full.close()
    for thread in threads:
        thread.join(10)
    assert seen == {"take": CLOSED, "room": False}
    assert full.push(plan_of(rows, np.arange(3))) is False


def test_a_second_close_waits_until_no_plan_is_read_any_more():
    rows = np.zeros((1 << 16, 1024), np.uint8)
    order = np.random.default_rng(0).permutation(1 << 16)
    ring = Ring(fixed_streams(1024), batch_rows=1 << 16, depth=1, n_threads=1)
    ring.push(plan_of(rows, order))
    assert ring.wait_room(0)  # cut: a thread gathers it now
    first = threading.Thread(target=ring.close)
    first.start()
    while ring.push(plan_of(rows, order[:1])):
        pass
    ring.close()
    gather_ns = ring.figures()["gather_ns"]
    first.join()
    assert ring.figures()["gather_ns"] == gather_ns > 0


def bytes_plan(records: list[bytes], order: np.ndarray) -> Plan:
    values = np.frombuffer(b"".join(records) or b"\0", np.uint8)
    offsets = np.cumsum([0, *map(len, records)], dtype=np.int64)
    addresses = np.array([[[values.ctypes.data, offsets.ctypes.data, len(values)]]], np.uint64)
    return Plan(addresses, np.zeros(len(order), np.uint32), order.astype(np.uint32), (values, offsets))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 63, 5_000, 70_000, 200_000]), min_size=1, max_size=40), st.integers(1, 4))
def test_bytes_objects_are_filled_by_all_threads(sizes, n_threads):
    rng = np.random.default_rng(len(sizes))
    records = [rng.bytes(n) for n in sizes]
    order = rng.integers(0, len(records), 60)
    ring = Ring(np.array([[REF, 1]], np.uint32), batch_rows=23, depth=3, n_threads=n_threads)
    ring.push(bytes_plan(records, order))
    ring.finish()
    found = []
    while not isinstance(slot := ring.take(10), int):
        found += slot.bytes_list(0)
    ring.close()
    assert found == [records[i] for i in order]


def test_close_waits_for_bytes_objects_that_are_being_filled():
    rng = np.random.default_rng(5)
    records = [rng.bytes(60_000) for _ in range(64)]
    for pause in range(12):
        ring = Ring(np.array([[REF, 1]], np.uint32), batch_rows=64, depth=3, n_threads=3)
        plan = bytes_plan(records, np.tile(np.arange(64), 40))
        ring.push(plan)
        ring.finish()
        taken = [ring.take(10)]
        closer = threading.Timer(pause * 2e-4, ring.close)
        closer.start()
        while not isinstance(taken[-1], int):
            assert taken[-1].bytes_list(0) == records
            try:
                taken.append(ring.take(10))
            except RuntimeError:
                break
        closer.join(10)
        assert not closer.is_alive()


def test_a_waiting_consumer_gathers_rows_that_no_worker_has_started():
    """Its own processor time says so: handing over 30 batches takes less than 1 ms, gathering one of 16 MiB more.

    The ring's own figures are wall time, which grows where a thread waits for its processor, and are no measure here.
    """
    rows = np.ones((1 << 14, 1024), np.uint8)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(1 << 14), 30))
    ring = Ring(fixed_streams(1024), batch_rows=1 << 14, depth=4, n_threads=1)
    ring.push(plan_of(rows, order))
    ring.finish()
    start_ns, n_batches = time.thread_time_ns(), 0
    while not isinstance(slot := ring.take(), int):
        del slot
        n_batches += 1
    helped_ns = time.thread_time_ns() - start_ns
    assert n_batches == 30
    assert helped_ns > 3_000_000
    ring.close()


def test_wait_room_returns_when_the_next_batch_needs_more_rows():
    rows = np.zeros((8, WIDTH), np.uint8)
    ring = Ring(fixed_streams(), batch_rows=20, depth=2, n_threads=1)
    for _ in range(3):
        ring.push(plan_of(rows, np.arange(6)))
        assert ring.wait_room(1)
    ring.push(plan_of(rows, np.arange(6)))
    assert ring.take(10).n_rows == 20
    ring.close()


def test_a_planner_failure_is_reported_after_all_whole_batches():
    rows = np.zeros((8, WIDTH), np.uint8)
    ring = Ring(fixed_streams(), batch_rows=4, depth=2, n_threads=1)
    ring.push(plan_of(rows, np.arange(8)))
    ring.push(plan_of(rows, np.arange(3)))  # which is no whole batch: who resumes gets it with the rows that it lacks
    ring.finish(failed=True)
    assert ring.take(10).n_rows == 4
    assert ring.take(10).n_rows == 4
    assert ring.take(10) == FAILED
    assert ring.take(10) == FAILED
    ring.close()


def test_plans_are_kept_exactly_until_their_rows_are_retired():
    class Held:
        pass

    alive = []
    ring = Ring(fixed_streams(8), batch_rows=4, depth=2, n_threads=1)
    for _ in range(3):
        rows = np.zeros((4, 8), np.uint8)
        held = Held()
        held.rows = rows
        alive.append(held)
        addresses = np.array([[[rows.ctypes.data, 0, 0]]], np.uint64)
        ring.push(Plan(addresses, np.zeros(4, np.uint32), np.arange(4, dtype=np.uint32), held))
    ring.finish()
    references = [weakref.ref(h) for h in alive]
    alive.clear()
    del held, rows
    for _ in range(2):
        ring.take(10)
    assert ring.wait_room(2)
    gc.collect()
    assert [r() is not None for r in references] == [False, True, True]
    ring.take(10)
    assert ring.take(10) == END
    assert ring.wait_room(1)
    gc.collect()
    assert [r() is not None for r in references] == [False, False, False]
    ring.close()


def test_a_forked_child_sees_a_closed_ring_and_can_drop_everything():
    rows = np.zeros((400, WIDTH), np.uint8)
    ring = Ring(fixed_streams(), batch_rows=4, depth=2, n_threads=2)
    ring.push(plan_of(rows, np.arange(400)))
    slot = ring.take(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # "multi-threaded, use of fork()": that is what is tested
        child = os.fork()
    if child == 0:
        ok = ring.take(10) == CLOSED and not ring.push(plan_of(rows, np.arange(4)))
        del slot
        ring.close()
        del ring
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert ring.take(10).n_rows == 4
    ring.close()


def test_invalid_arguments_raise_an_error():
    for bad in ({"batch_rows": 0}, {"depth": 0}, {"n_threads": 0}):
        with pytest.raises(ValueError, match="1 or more"):
            Ring(fixed_streams(), **{"batch_rows": 1, "depth": 1, "n_threads": 1, **bad})
    finder = RowFinder(np.array([0, 4, 10], np.int64), None)
    for run in ((-1, 2), (0, 11), (10, 1), (0, -1)):
        with pytest.raises(ValueError, match="of 10 in 2 blocks, with addresses of 2 blocks"):
            Plan.from_finder(np.zeros((1, 2, 3), np.uint64), (finder, *run), None)
    with pytest.raises(ValueError, match="with addresses of 1 blocks"):
        Plan.from_finder(np.zeros((1, 1, 3), np.uint64), (finder, 0, 10), None)
    with pytest.raises(TypeError, match=r"Ring\.take"):
        Slot()


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.sampled_from([None, b"k" * 16]),
    st.integers(1, 25),
    st.integers(1, 3),
    st.data(),
)
def test_rows_of_a_finder_are_gathered(records, key, batch_rows, n_threads, data):
    n_blocks, n = len(records), sum(records)
    rng = np.random.default_rng(n)
    starts = rng.integers(0, 5, n_blocks).astype(np.uint32)
    values = [rng.integers(0, 256, (k + 5, WIDTH), np.uint8) for k in records]
    texts = [[b"x" * int(i) for i in rng.integers(0, 9, k + 5)] for k in records]
    offsets = [np.concatenate([[0], np.cumsum([len(t) for t in block])]).astype(np.int64) for block in texts]
    joined = [np.frombuffer(b"".join(block) + b"-", np.uint8) for block in texts]
    addresses = np.zeros((2, n_blocks, 3), np.uint64)
    for i in range(n_blocks):
        addresses[0, i, 0] = values[i].ctypes.data
        addresses[1, i] = joined[i].ctypes.data, offsets[i].ctypes.data, offsets[i][-1]
    finder = RowFinder(np.concatenate([[0], np.cumsum(records)]).astype(np.int64), key, starts)
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=3))})
    streams = np.array([[gather.FIXED, WIDTH], [gather.VAR, 1]], np.uint32)

    def served(plans):
        ring = Ring(streams, batch_rows=batch_rows, depth=3, n_threads=n_threads)
        for plan in plans:
            assert ring.push(plan)
        ring.finish()
        found = []
        while not isinstance(slot := ring.take(), int):
            memory = bytes(memoryview(slot))
            n_rows, (fixed_at, _, _), (at, offsets_at, n_bytes) = (
                slot.n_rows,
                slot.stream_position(0),
                slot.stream_position(1),
            )
            offsets_bytes = memory[offsets_at : offsets_at + 8 * (n_rows + 1)]
            found.append(
                (n_rows, memory[fixed_at : fixed_at + WIDTH * n_rows], offsets_bytes, memory[at : at + n_bytes])
            )
        return found

    def arrays(lo, hi):
        block, row = np.empty(hi - lo, np.uint32), np.empty(hi - lo, np.uint32)
        finder.find(lo, block, row)
        return Plan(addresses, block, row, None)

    pairs = list(itertools.pairwise(cuts))
    runs = [Plan.from_finder(addresses, (finder, lo, hi - lo), None) for lo, hi in pairs]
    assert [plan.n_rows for plan in runs] == [hi - lo for lo, hi in pairs]
    expected = served([arrays(lo, hi) for lo, hi in pairs])
    assert sum(batch[0] for batch in expected) == n
    assert served(runs) == expected
    mixed = [plan if i % 2 else arrays(*pair) for i, (plan, pair) in enumerate(zip(runs, pairs, strict=True))]
    assert served(mixed) == expected  # parts of both kinds in one batch


def lent_memory(n_bytes: int) -> np.ndarray:
    memory = np.zeros(n_bytes + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first : first + n_bytes]


def is_inside(slot: Slot, memory: np.ndarray) -> bool:
    start = np.frombuffer(memoryview(slot), np.uint8).ctypes.data
    return memory.ctypes.data <= start < memory.ctypes.data + memory.size


def test_slots_are_cut_from_the_callers_memory_while_it_has_room():
    rows = np.arange(60 * WIDTH, dtype=np.uint8).reshape(60, WIDTH)
    slot_bytes = 320  # more than the 256 bytes that a batch takes with its alignment
    memory = lent_memory(3 * slot_bytes)
    ring = Ring(fixed_streams(), batch_rows=10, depth=1, n_threads=1, slot_bytes=slot_bytes, memory=memory)
    assert ring.push(plan_of(rows, np.arange(60)))
    ring.finish()
    slots = [ring.take(10) for _ in range(6)]
    assert [is_inside(slot, memory) for slot in slots] == [True] * 3 + [False] * 3
    for i, slot in enumerate(slots):
        assert np.array_equal(np.frombuffer(memoryview(slot), np.uint8, 10 * WIDTH), rows[10 * i : 10 * i + 10].ravel())
    del slot
    slots.clear()
    ring.close()


def test_a_batch_that_outgrew_its_slot_leaves_the_slot_to_the_next_batch():
    lengths = [1, 1, 4000, 1, 1, 1]
    values = np.arange(sum(lengths), dtype=np.uint8)
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    addresses = np.array([[[values.ctypes.data, offsets.ctypes.data, len(values)]]], np.uint64)
    memory = lent_memory(2 * 256)
    streams = np.array([[gather.VAR, 1]], np.uint32)
    ring = Ring(streams, batch_rows=1, depth=1, n_threads=1, slot_bytes=256, memory=memory)
    assert ring.push(Plan(addresses, np.zeros(6, np.uint32), np.arange(6, dtype=np.uint32), (values, offsets)))
    ring.finish()
    inside = []
    for i in range(6):
        slot = ring.take(10)
        start, _, n = slot.stream_position(0)
        assert np.array_equal(np.frombuffer(memoryview(slot), np.uint8, n, start), values[offsets[i] : offsets[i + 1]])
        inside.append(is_inside(slot, memory))
        del slot
    assert inside == [True, True, False, True, True, True]
    assert 4000 < ring.figures()["largest"] < 4300
    ring.close()


def test_the_callers_memory_is_kept_until_the_last_slot_is_dropped():
    memory = lent_memory(1024)
    released = weakref.ref(memory)
    rows = np.ones((4, WIDTH), np.uint8)
    ring = Ring(fixed_streams(), batch_rows=4, depth=1, n_threads=1, slot_bytes=256, memory=memory)
    assert ring.push(plan_of(rows, np.arange(4)))
    slot = ring.take(10)
    del memory, ring
    gc.collect()
    assert released() is not None
    assert bytes(memoryview(slot)[: 4 * WIDTH]) == b"\1" * 4 * WIDTH
    del slot
    assert released() is None


def test_memory_that_slots_cannot_be_cut_from_is_refused():
    memory = lent_memory(1024)
    for slot_bytes, buffer in ((100, memory), (0, memory), (128, memory[1:])):
        with pytest.raises(ValueError, match="begin at multiples of 64 bytes"):
            Ring(fixed_streams(), batch_rows=4, depth=1, n_threads=1, slot_bytes=slot_bytes, memory=buffer)
    with pytest.raises((ValueError, BufferError)):
        Ring(fixed_streams(), batch_rows=4, depth=1, n_threads=1, slot_bytes=64, memory=bytes(64))


def test_streams_that_stay_on_the_host_lie_apart_from_the_others():
    # [heads on the host][heads of tensors][values of tensors][values on the host]
    n, texts, numbers = 7, [b"x" * i for i in range(7)], np.arange(7)
    values = np.frombuffer(b"".join(texts), np.uint8)
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    var = [[values.ctypes.data, offsets.ctypes.data, len(values)]]
    addresses = np.array([[[numbers.ctypes.data, 0, 0]], var, var, var], np.uint64)
    on_host = gather.VAR | 1 << 24
    streams = np.array([[gather.FIXED, 8], [on_host, 1], [REF, 1], [gather.VAR, 1]], np.uint32)
    ring = Ring(streams, batch_rows=n, depth=1, n_threads=1)
    assert ring.push(Plan(addresses, np.zeros(n, np.uint32), np.arange(n, dtype=np.uint32), None))
    slot = ring.take(10)
    fixed, text, refs, var = (slot.stream_position(stream) for stream in range(4))
    places = [text[1], refs[0], fixed[0], var[1], var[0], text[0]]
    assert places == sorted(places)
    assert all(place % 64 == 0 for place in places)
    assert slot.str_list(1) == [text.decode() for text in texts]
    assert slot.bytes_list(2) == texts
    del slot
    ring.close()
