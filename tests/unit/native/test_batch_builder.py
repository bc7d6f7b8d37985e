"""Batches built in one native call: their content, the lifetime of their memory, and batches left to the slow path."""

from __future__ import annotations

import gc
import itertools
import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.dlpack import from_dlpack

from tiercache._native import gather
from tiercache._native.ring import (
    BatchBuilder,
    BatchTaker,
    BufferEntry,
    FastIterator,
    Plan,
    Ring,
    RowType,
    TensorEntry,
    held_bytes,
)
from tiercache.data.output_spec import Buffer
from tiercache.waiting import wait_for

N_ROWS, BATCH_ROWS = 40, 8
INT64, UINT8 = RowType(0, 64), RowType(1, 8)
STREAMS = np.array([[gather.FIXED, 8], [gather.VAR, 1]], np.uint32)


class Rows:
    """Numbers, and text of as many bytes as its number says (mod 7), in memory as blocks have it."""

    def __init__(self) -> None:
        self.numbers = np.arange(N_ROWS)
        self.texts = [bytes([65 + i]) * (i % 7) for i in range(N_ROWS)]
        self.values = np.frombuffer(b"".join(self.texts), np.uint8)
        self.offsets = np.cumsum([0, *map(len, self.texts)])

    def plan(self, order: np.ndarray) -> Plan:
        sources = np.array(
            [
                [[self.numbers.ctypes.data, 0, 0]],
                [[self.values.ctypes.data, self.offsets.ctypes.data, len(self.values)]],
            ],
            np.uint64,
        )
        return Plan(sources, np.zeros(len(order), np.uint32), order.astype(np.uint32), (self, sources))


def ring_of(plan: Plan | None, *, ended: bool = True) -> Ring:
    ring = Ring(STREAMS, batch_rows=BATCH_ROWS, depth=2, n_threads=1, slot_bytes=4096)
    if plan is not None:
        assert ring.push(plan)
    if ended:
        ring.finish()
    return ring


def entries_of(*more) -> BatchBuilder:
    text = BufferEntry(1, UINT8, INT64, Buffer, lambda _slot, n: Buffer("none", n))
    return BatchBuilder([("id", TensorEntry(0, INT64)), ("text", text), *more], len(STREAMS), from_dlpack)


def ready(ring: Ring) -> None:
    """Return once the next batch is ready."""
    assert wait_for(lambda: ring.figures()["ready"] > 0, 10)


@pytest.fixture
def rows():
    return Rows()


def test_a_batch_has_its_entries_in_order_with_their_rows(rows):
    order = np.random.default_rng(3).permutation(N_ROWS)
    ring, entries = ring_of(rows.plan(order)), entries_of(("n", lambda _slot, n: n))
    assert not entries.is_native
    found, texts = [], []
    while not isinstance(slot := ring.take(10), int):
        batch = entries.build(slot)
        assert list(batch) == ["id", "text", "n"]
        assert batch["n"] == slot.n_rows
        assert (batch["id"].dtype, batch["text"].offsets.dtype) == (torch.int64, torch.int64)
        assert batch["text"].shapes is None
        found += batch["id"].tolist()
        texts += [bytes(value.numpy()) for value in batch["text"]]
    ring.close()
    assert found == order.tolist()
    assert texts == [rows.texts[i] for i in order]


def test_a_buffer_without_elements_is_made_by_make_empty(rows):
    ring = ring_of(rows.plan(np.array([0, 7, 14])))
    assert entries_of().build(ring.take(10))["text"].values == "none"
    ring.close()


def test_a_slot_is_released_with_the_last_tensor_of_its_batch(rows):
    gc.collect()
    before = held_bytes()
    ring = ring_of(rows.plan(rows.numbers))
    batch = entries_of().build(ring.take(10))
    for name, attribute in (("id", None), ("text", "offsets")):
        kept = batch[name] if attribute is None else getattr(batch[name], attribute)
        assert held_bytes() > before
        del batch[name]
    assert held_bytes() > before
    assert kept.tolist() == rows.offsets[: BATCH_ROWS + 1].tolist()
    del kept
    assert held_bytes() == before
    ring.close()


def test_an_entry_of_a_missing_stream_raises_an_error():
    with pytest.raises(ValueError, match="stream 2"):
        entries_of(("more", TensorEntry(2, INT64)))
    with pytest.raises(ValueError, match="no elements"):
        BufferEntry(1, RowType(1, 8, (3, 0)), INT64, Buffer, Buffer)
    with pytest.raises(TypeError):
        BufferEntry(1, None, INT64, Buffer, Buffer)


@pytest.mark.parametrize("what", ["nothing is ready", "something is odd", "somebody takes", "it failed", "it ended"])
def test_take_ready_leaves_special_batches_to_take(rows, what):
    plan, odd, lock = rows.plan(rows.numbers), deque(), threading.RLock()
    if what == "it failed":
        rows.offsets[3] = 1 << 40
    ring = ring_of(None if what in ("nothing is ready", "it ended") else plan, ended=what != "nothing is ready")
    taker = BatchTaker(ring, entries_of(), deque(), (deque(), odd), lock, waits := [0, 0])
    if what in ("something is odd", "somebody takes", "it failed"):
        ready(ring)
    if what == "something is odd":
        odd.append(1)
    if what == "somebody takes":
        other = threading.Thread(target=lock.acquire)
        other.start()
        other.join()
    assert taker.take_ready() is None
    assert (taker.rows, taker.batches, taker.n_bytes, waits) == (0, 0, 0, [0, 0])
    if what == "it failed":
        with pytest.raises(gather.CorruptError):
            ring.take(0.0)
    elif what == "nothing is ready":
        assert ring.push(plan)
        assert ring.take(10).first_row == 0
    elif what == "it ended":
        assert isinstance(ring.take(0.0), int)
    else:
        assert ring.take(0.0).first_row == 0
    ring.close()


def test_taken_batches_are_counted_and_their_pieces_dropped(rows):
    ring, pieces, lock = ring_of(rows.plan(rows.numbers)), deque([(8, "a"), (20, "b"), (40, "c")]), threading.RLock()
    taker = BatchTaker(ring, entries_of(), pieces, (deque(),), lock, waits := [0, 0])
    left = []
    for number in range(N_ROWS // BATCH_ROWS):
        ready(ring)
        if number == 2:
            taker.count(ring.take(0.0))  # by hand
        else:
            assert taker.take_ready()["id"].tolist() == list(range(8 * number, 8 * number + 8))
        left.append("".join(name for _, name in pieces))
        assert (taker.rows, taker.samples) == (8 * (number + 1), 8 * (number + 1))
    assert (left, taker.batches, waits) == (["bc", "bc", "c", "c", ""], 5, [4, 0])
    assert taker.n_bytes == 8 * N_ROWS + len(rows.values)
    assert lock.acquire(blocking=False)
    ring.close()


def test_a_lost_batch_does_not_shift_the_position_of_later_batches(rows):
    ring = ring_of(rows.plan(rows.numbers))
    taker = BatchTaker(ring, entries_of(), deque(), (), threading.RLock(), [0])
    ring.take(10)  # as where Ctrl-C struck before it was counted
    ready(ring)
    assert taker.take_ready()["id"].tolist() == list(range(8, 16))
    assert (taker.rows, taker.samples) == (16, 8)
    ring.close()


class Short(FastIterator):
    """Hands out what is ready, and "long" for all that comes the long way."""

    def __init__(
        self,
        ready: Callable[[], Any] | None,
        *,
        n_yielded: int = 1,
        plain: bool = True,
        progress: Any = None,
    ):
        self.progress = progress or SimpleNamespace(n_yielded=n_yielded)
        self.profiler = SimpleNamespace(_is_profiler_enabled=False)
        self.missed: list[BaseException] = []
        super().__init__(self.progress, self.profiler, plain)
        self._set_fast_path(ready)

    def _next(self) -> str:
        return "long"

    def _on_take_error(self, error: BaseException) -> None:
        self.missed.append(error)


def test_a_ready_batch_takes_the_fast_path_and_is_counted():
    iterator = Short(itertools.count().__next__)
    assert iter(iterator) is iterator
    assert ([next(iterator) for _ in range(3)], iterator.progress.n_yielded) == ([0, 1, 2], 4)


@pytest.mark.parametrize(
    ("ready", "how"),
    [
        (lambda: None, {}),
        (None, {}),
        (lambda: "short", {"plain": False}),
    ],
)
def test_all_other_batches_take_the_slow_path(ready, how):
    iterator = Short(ready, **how)
    before = iterator.progress.n_yielded
    assert (next(iterator), iterator.progress.n_yielded) == ("long", before)


def test_batches_take_the_slow_path_under_the_profiler():
    iterator = Short(lambda: "short")
    iterator.profiler._is_profiler_enabled = True
    assert next(iterator) == "long"
    assert iterator._next_ready() == "short"  # what the long way asks for first
    iterator.profiler._is_profiler_enabled = False
    assert (next(iterator), iterator.progress.n_yielded) == ("short", 3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
def test_an_error_of_a_take_is_passed_to_the_iterator_and_raised(error):
    def fail():
        raise error

    iterator = Short(fail)
    with pytest.raises(error):
        next(iterator)
    assert ([type(one) for one in iterator.missed], iterator.progress.n_yielded) == ([error], 1)


def test_ctrl_c_while_a_batch_is_counted_is_passed_to_the_iterator():
    class KillResult:
        @property
        def n_yielded(self):
            return 1

        @n_yielded.setter
        def n_yielded(self, n_batches):
            raise KeyboardInterrupt

    iterator = Short(lambda: "short", progress=KillResult())
    with pytest.raises(KeyboardInterrupt):
        next(iterator)
    assert [type(one) for one in iterator.missed] == [KeyboardInterrupt]
