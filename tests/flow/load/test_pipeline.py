"""The pipeline at its edges: odd sizes, errors of others, threads that race, and a store that does not answer."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import threading
import time
import warnings
import weakref
from concurrent.futures import CancelledError

import pyarrow as pa
import pytest
from tests.support.records import check_batch, ids_of, join_loading

import tiercache as tc
from tiercache.load.pieces import PieceSizes
from tiercache.shard.reader import ShardReader


class After:
    """A thing of which one method's results go through `then`."""

    def __init__(self, inner, method, then):
        self._inner, self._method, self._then = inner, method, then

    def __getattr__(self, name):
        found = getattr(self._inner, name)
        return found if name != self._method else lambda *args: self._then(found(*args))


def after_ready(iterator, then):
    """Let what an iterator's batches that are ready are go through `then`."""
    take_ready = iterator._pipeline.fast_take
    iterator._set_fast_path(lambda: then(take_ready() if take_ready else None))


def test_a_batch_size_beyond_any_data_set_is_one_batch(make_dataset):
    loader = tc.DataLoader(tc.Dataset(make_dataset(50)), batch_size=2**70)
    assert ids_of(loader) == [list(range(50))]


def test_no_records_of_object_columns_alone_are_no_batches(tmp_path):
    with tc.Writer(tmp_path / "data", schema={"s": pa.struct([("a", pa.int32())])}) as writer:
        writer.write_batch({"s": []})
    assert list(tc.DataLoader(tc.Dataset(tmp_path / "data"), batch_size=4)) == []


def test_a_run_that_a_failed_window_ended_resumes_without_losing_a_record(make_dataset, monkeypatch):
    dataset = tc.Dataset(make_dataset(500))
    options = tc.LoaderOptions(shuffle_window_bytes="1KiB", seed=3)
    loaders = [tc.DataLoader(dataset, batch_size=16, shuffle=True, options=options) for _ in range(3)]
    whole, found, n_loads = ids_of(loaders[0]), [], itertools.count()
    load = type(dataset._source).load_blocks

    def refuse(self, shard, blocks):
        if next(n_loads) > 4:
            raise PermissionError(errno.EACCES, "not for you")
        return load(self, shard, blocks)

    with monkeypatch.context() as patch:
        patch.setattr(type(dataset._source), "load_blocks", refuse)
        with pytest.raises(PermissionError):
            found += (check_batch(batch) for batch in loaders[1])
    assert [len(ids) for ids in found] == [16] * len(found)
    loaders[2].load_state_dict(loaders[1].state_dict())
    assert found + ids_of(loaders[2]) == whole


def test_a_planner_that_hears_of_close_before_the_ring_does_ends_the_iterator_as_close_does(make_dataset, monkeypatch):
    dataset = tc.Dataset(make_dataset(100))

    def cancelled(self, shard, blocks):
        raise CancelledError

    monkeypatch.setattr(type(dataset._source), "load_blocks", cancelled)
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(tc.DataLoader(dataset, batch_size=10)))


def test_a_failed_preparation_is_reported_by_the_epoch_itself(make_dataset, monkeypatch):
    dataset = tc.Dataset(make_dataset(100))
    loader = tc.DataLoader(dataset, batch_size=10)

    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, "not for you")

    with monkeypatch.context() as patch:
        patch.setattr("tiercache.load.planner.loading_pool", refuse)  # of the next epoch alone
        assert sorted(i for ids in ids_of(loader) for i in ids) == list(range(100))
        join_loading()
    assert sorted(i for ids in ids_of(loader) for i in ids) == list(range(100))


def test_only_some_of_a_windows_order_is_in_memory(make_dataset, monkeypatch):
    monkeypatch.setattr("tiercache.load.epoch.ARRAY_PIECES", PieceSizes(64, 64, 64))
    options = tc.LoaderOptions(shuffle_window_bytes="all", memory_bytes=1, seed=0)
    chosen = tc.Dataset(make_dataset(3005)).select(range(5, 3005))  # rows of a view are looked up by piece
    loader = tc.DataLoader(chosen, batch_size=16, shuffle=True, options=options)
    iterator, served, most, ends = iter(loader), [], 0, set()
    for batch in iterator:
        served += check_batch(batch)
        held = list(iterator._pipeline._shared.pushed)
        most, ends = max(most, len(held)), ends | {end for end, _ in held}
    assert sorted(served) == list(range(5, 3005))
    assert len(ends) > 3000 // 64  # pieces
    assert most <= 3


def test_leaving_the_loop_does_not_wait_for_a_slow_store(make_dataset, monkeypatch):
    dataset = tc.Dataset(make_dataset(100))
    gate, opened = threading.Event(), threading.Event()
    load = ShardReader.load_blocks

    def slow(self, *args, **kwargs):
        opened.set()
        gate.wait(60)
        return load(self, *args, **kwargs)

    monkeypatch.setattr(ShardReader, "load_blocks", slow)
    monkeypatch.setattr(ShardReader, "is_mapped", lambda self, columns: False)  # not at hand: loaded by a thread
    iterator = iter(tc.DataLoader(dataset, batch_size=10))
    assert opened.wait(30)
    start_s = time.monotonic()
    iterator.close()
    iterator.close()  # has no effect
    assert not iterator._pipeline._planner.is_alive()
    assert time.monotonic() - start_s < 30
    gate.set()


@pytest.mark.parametrize("columns", [["id"], ["id", "blob", "text"]])
@pytest.mark.parametrize("where", ["in the ring", "for a tensor"])
def test_after_a_memory_error_no_batch_is_served(make_dataset, columns, where):
    def fail(found):
        if found is None or isinstance(found, int):
            return found
        raise MemoryError if where == "in the ring" else RuntimeError("DefaultCPUAllocator: not enough memory")

    iterator = iter(tc.DataLoader(tc.Dataset(make_dataset(100), columns=columns), batch_size=10))
    next(iterator)
    pipeline = iterator._pipeline
    ring, assembler = pipeline._ring, pipeline._assembler
    after_ready(iterator, fail)
    if where == "in the ring":
        pipeline._ring = After(ring, "take", fail)
    else:
        pipeline._assembler = After(assembler, "batch", fail)
    with pytest.raises((MemoryError, RuntimeError), match="memory" if where == "for a tensor" else None):
        list(itertools.islice(iterator, 3))  # of lists the next batch may have been taken ahead, and one after it
    pipeline._ring, pipeline._assembler = ring, assembler
    with pytest.raises(RuntimeError, match="closed"):
        next(iterator)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("is_being_taken", [False, True])
def test_a_forked_child_cannot_continue_its_parents_epoch(make_dataset, is_being_taken):
    iterator = iter(tc.DataLoader(tc.Dataset(make_dataset(100), columns=["id"]), batch_size=10))
    next(iterator)
    taking, go = threading.Event(), threading.Event()

    def hold():
        with iterator._pipeline._taking:
            taking.set()
            go.wait(20)

    other = threading.Thread(target=hold)
    if is_being_taken:
        other.start()
        assert taking.wait(20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking a process with threads: that is what is tested
        child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            next(iterator)
        except RuntimeError as error:
            os._exit(0 if "before a fork" in str(error) else 1)
        finally:
            os._exit(2)
    go.set()
    if is_being_taken:
        other.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert next(iterator)["id"].tolist() == list(range(10, 20))
    iterator.close()


def test_windows_stay_in_memory_while_a_batch_is_made_of_them(make_dataset):
    iterator = iter(tc.DataLoader(tc.Dataset(make_dataset(100)), batch_size=10))
    pipeline, inside, go = iterator._pipeline, threading.Event(), threading.Event()
    make = pipeline._assembler.batch
    pipeline._assembler.batch = lambda slot: (inside.set(), go.wait(30), make(slot))[2]
    found = []
    consumer = threading.Thread(target=lambda: found.append(next(iterator)))
    consumer.start()
    assert inside.wait(30)
    window = weakref.ref(pipeline._shared.pushed[0][1].joined.addresses)
    closer = threading.Thread(target=iterator.close)
    closer.start()
    closer.join(0.2)
    assert window() is not None
    go.set()
    consumer.join(30)
    closer.join(30)
    assert check_batch(found[0]) == list(range(10))
    assert window() is None


def test_a_planner_that_cannot_be_started_leaves_nothing_behind(make_dataset, monkeypatch):
    loader = tc.DataLoader(tc.Dataset(make_dataset(100)), batch_size=10)
    start = threading.Thread.start

    def interrupted(thread):
        start(thread)
        if thread.name == "tiercache-plan":  # Ctrl-C in the wait for the thread's first sign of life
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            iter(loader)
    assert [i for ids in ids_of(loader) for i in ids] == list(range(100))


def strike(iterator, at):
    """Let Ctrl-C strike just after the ring gave its batch number `at` (from 1) away."""
    numbers = itertools.count(1)

    def then(found):
        if found is not None and not isinstance(found, int) and next(numbers) == at:
            raise KeyboardInterrupt
        return found

    iterator._pipeline._ring = After(iterator._pipeline._ring, "take", then)
    after_ready(iterator, then)


@pytest.mark.parametrize("columns", [["id", "blob", "text"], ["id"]])
@pytest.mark.parametrize("begin", [0, 3])
def test_ctrl_c_between_a_batch_and_its_count_moves_no_later_batch(make_dataset, columns, begin):
    dataset = tc.Dataset(make_dataset(100), columns=columns)

    def make():
        return tc.DataLoader(dataset, batch_size=10, shuffle=True, options=tc.LoaderOptions(seed=1))

    whole, loader = [batch["id"].tolist() for batch in make()], make()
    iterator = iter(loader)
    for _ in range(begin):
        next(iterator)
    state = loader.state_dict()
    loader = make()
    loader.load_state_dict(state)
    iterator = iter(loader)
    strike(iterator, 3)
    served = []
    for _ in range(5):
        with contextlib.suppress(KeyboardInterrupt):
            batch = next(iterator)["id"].tolist()
            number = begin + whole[begin:].index(batch)
            assert loader.state_dict()["offset"] == 10 * (number + 1)
            served.append(number)
    assert len(served) == 4
    again = make()
    again.load_state_dict(loader.state_dict())
    assert [batch["id"].tolist() for batch in again] == whole[served[-1] + 1 :]
    iterator.close()


def test_ctrl_c_at_the_end_of_an_epoch_leaves_it_ended(make_dataset, monkeypatch):
    loader = tc.DataLoader(tc.Dataset(make_dataset(100)), batch_size=10)
    iterator = iter(loader)
    for _ in range(10):
        next(iterator)
    close = iterator._pipeline.close

    def interrupted(self):
        monkeypatch.undo()
        close()
        raise KeyboardInterrupt

    monkeypatch.setattr(type(iterator._pipeline), "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(iterator)
    assert next(iterator, None) is None
    assert loader.state_dict()["epoch"] == 1


def test_ctrl_c_in_a_wait_for_a_batch_loses_none(make_dataset):
    class Late:
        """A ring whose batches come after a wait in which Ctrl-C struck."""

        def __init__(self, ring):
            self.ring = ring

        def take(self, timeout_s):
            if timeout_s == 0.0:
                return 1  # not ready
            return self.ring.take(timeout_s)

        def __getattr__(self, name):
            return getattr(self.ring, name)

    loader = tc.DataLoader(tc.Dataset(make_dataset(100), columns=["id"]), batch_size=10)
    iterator = iter(loader)
    iterator._pipeline._ring = Late(iterator._pipeline._ring)
    iterator._set_fast_path(None)
    found = []
    for number in range(10):
        with pytest.MonkeyPatch.context() as patch:
            if number in (0, 4, 5):

                def struck(*_):
                    raise KeyboardInterrupt

                patch.setattr(type(loader._engine._waits), "add", struck)
                with pytest.raises(KeyboardInterrupt):
                    next(iterator)
        found.append(next(iterator)["id"].tolist())
        assert loader.state_dict()["offset"] == 10 * (number + 1)
    assert found == [list(range(first, first + 10)) for first in range(0, 100, 10)]
    iterator.close()
