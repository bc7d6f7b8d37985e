"""Transforms in worker processes: what they serve, share and leave behind, and how they end."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
import time
import warnings
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.records import SCHEMA, make_columns
from tests.support.transformed import draw_globals, fail_at_seven, loader_of, options, rows_of, together
from torch.utils.data import get_worker_info

import tiercache as tc
from tiercache.load import transform_workers
from tiercache.load.transform_workers import SharedBlock
from tiercache.waiting import wait_for

N = 101
# Python 3.12 warns of a fork beside threads; torch's loader forks beside them, too.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("transforms") / "data"
    with tc.Writer(path, schema=SCHEMA, shard_size="2KiB", block_size="512B") as writer:
        writer.write_batch(make_columns(N))
    return path


def test_workers_serve_what_the_loaders_thread_serves(path):
    for more in ({}, {"collate_fn": together}, {"batch_size": 1}):
        ours = list(loader_of(path, workers=2, **more))
        assert rows_of(ours) == rows_of(loader_of(path, **more))
        pids = {int(pid) for batch in ours for pid in batch["pid"]}
        assert os.getpid() not in pids
        assert len(pids) <= 2


def test_foreign_augmentations_are_equal_for_any_number_of_workers_and_new_in_each_epoch(path):
    one = loader_of(path, draw_globals, workers=1, persistent_workers=True)
    two = loader_of(path, draw_globals, workers=2)
    epochs = [rows_of(one), rows_of(one)]
    assert epochs == [rows_of(two), rows_of(two)]
    names = sorted(next(iter(loader_of(path, draw_globals))).keys() - {"pid"})
    for name in ("torch", "python", "legacy"):
        assert len({row[names.index(name)] for rows in epochs for row in rows}) == 2 * N


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_a_run_resumes_on_another_number_of_workers(path, before, after):
    whole = rows_of(loader_of(path))
    loader = loader_of(path, workers=before)
    begun = rows_of(itertools.islice(loader, 4))
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = loader_of(path, workers=after)
    resumed.load_state_dict(state)
    assert begun + rows_of(resumed) == whole


def mark(batch):
    info = get_worker_info()
    return {**batch, "worker": torch.full((len(batch["id"]),), -1 if info is None else info.id)}


def test_batch_transforms_run_in_workers(path):
    plain = tc.Dataset(path, columns=["id", "tokens", "boxes", "score"], layouts={"boxes": "buffer"})
    more = {"batch_size": 8, "shuffle": True, "num_workers": 2, "multiprocessing_context": "fork"}
    loader = tc.DataLoader(plain, options=options(batch_transform=mark), **more)
    expected = tc.DataLoader(plain, 8, shuffle=True, options=options())
    workers = set()
    for batch, one in zip(loader, expected, strict=True):
        workers |= set(batch.pop("worker").tolist())
        assert [str(value) for value in batch.values()] == [str(value) for value in one.values()]
    assert workers <= {0, 1}
    assert workers


KEPT = []


def keep(batch):
    """The batch before this one, which the function has kept."""
    KEPT.append(batch)
    return KEPT[max(len(KEPT) - 2, 0)]


def keep_record(record):
    KEPT.append(record)
    return KEPT[max(len(KEPT) - 40, 0)]


def test_a_function_may_keep_what_it_saw(path):
    more = {"batch_size": 8, "num_workers": 1, "multiprocessing_context": "fork"}
    loader = tc.DataLoader(tc.Dataset(path, columns=["id", "tokens"]), options=options(batch_transform=keep), **more)
    expected = list(tc.DataLoader(tc.Dataset(path, columns=["id", "tokens"]), 8))
    for batch, one in zip(loader, [expected[0], *expected], strict=False):
        assert torch.equal(batch["tokens"], one["tokens"])
    for batch_size in (1, 4):
        dataset = tc.Dataset(path, columns=["id", "tokens"], transform=keep_record)
        for batch in tc.DataLoader(dataset, **{**more, "batch_size": batch_size}):
            assert batch["tokens"].tolist() == make_columns(N)["tokens"][batch["id"].numpy()].tolist()


def same_size(record):
    return {"id": record["id"], "x": np.full(5000, record["id"])}


def test_shared_memory_is_reused_and_belongs_to_the_consumer_in_the_meantime(path):
    addresses = set()
    before = None
    for batch in loader_of(path, same_size, workers=1, batch_size=2):
        if before is not None:
            assert (before["x"] == before["id"][:, None]).all()
        batch["x"] += 0  # the consumer may write
        addresses.add(batch["x"].data_ptr())
        before = batch
    assert len(addresses) < 20  # of 51 batches


def test_torchs_default_collate_makes_no_file_in_shared_memory(path):
    def files():  # other processes make theirs at any time
        own = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
        return {file for pid in own for file in Path("/dev/shm").glob(f"torch_{pid}_*")}

    before = files()
    iterator = iter(loader_of(path, same_size, workers=1))
    for _ in range(3):
        next(iterator)
        assert files() <= before
    iterator.close()


class Noted:
    """What a worker_init_fn sets, and a transform reads."""

    value = None


def init(number):
    info = get_worker_info()
    Noted.value = (number, info.id, info.num_workers, info.seed, type(info.dataset).__name__, torch.get_num_threads())


def tell(record):
    return {"id": record["id"], "noted": Noted.value}


def test_workers_are_set_up_as_torchs_are(path):
    loader = loader_of(path, tell, workers=2, worker_init_fn=init, collate_fn=list)
    noted = {tuple(record["noted"]) for batch in loader for record in batch}
    assert {(n[0], n[1], n[2], n[4], n[5]) for n in noted} <= {(i, i, 2, "Dataset", 1) for i in range(2)}
    assert len({n[3] for n in noted}) == len(noted)


def fail(number):
    raise LookupError(f"worker {number} has no licence")


def test_an_error_of_worker_init_fn_is_raised_in_place_of_the_first_batch(path):
    with pytest.raises(LookupError, match=r"Caught LookupError in DataLoader worker process 0(.|\n)*has no licence"):
        next(iter(loader_of(path, workers=1, worker_init_fn=fail)))


def leave(number):
    os._exit(3)


def test_a_worker_that_ends_before_its_first_batch_is_said_not_to_have_started(path):
    with pytest.raises(RuntimeError, match=r"DataLoader worker 0 \(pid \d+\) could not start \(exit code 3\)"):
        next(iter(loader_of(path, workers=1, worker_init_fn=leave)))


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_error_comes_in_place_of_its_batch_with_the_workers_traceback_and_the_record(path, shuffle):
    loader = loader_of(path, fail_at_seven, workers=2, shuffle=shuffle, batch_size=4)
    with pytest.raises(
        ArithmeticError, match=r"in DataLoader worker process(.|\n)*in fail_at_seven(.|\n)*no sevens"
    ) as raised:
        list(loader)
    assert raised.value.__notes__ == [f"tiercache: in the transform of record 7 of {str(path)!r}, version 1"]
    order = [row[0] for row in rows_of(loader_of(path, shuffle=shuffle, batch_size=4))]
    assert loader.state_dict()["offset"] == order.index(7) // 4 * 4


def test_an_error_ends_the_workers_and_frees_the_iterator_without_the_garbage_collector(path):
    iterator = iter(loader_of(path, fail_at_seven, workers=2, shuffle=False, batch_size=4))
    processes = [process.pid for process in multiprocessing.active_children()]
    assert len(processes) >= 2
    next(iterator)
    gc.disable()
    try:
        with pytest.raises(ArithmeticError) as caught:
            next(iterator)
        assert not any(Path(f"/proc/{pid}").exists() for pid in processes)
        dropped = weakref.ref(iterator)
        del iterator, caught
        assert dropped() is None
    finally:
        gc.enable()


def unpicklable(record):
    return {"id": record["id"], "f": lambda: 1}


def test_a_result_that_cannot_be_pickled_is_an_error_of_its_batch(path):
    with pytest.raises(Exception, match=r"pickle|local object"):
        next(iter(loader_of(path, unpicklable, workers=1, collate_fn=list)))


def wait_at_seven(record):
    if record["id"] == 7:
        time.sleep(600)
    return {"id": record["id"], "pid": os.getpid()}


def kill_at_seven(record):
    if record["id"] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"id": record["id"]}


def exit_at_seven(record):
    if record["id"] == 7:
        os._exit(3)
    return {"id": record["id"]}


@pytest.mark.parametrize(
    ("transform", "how", "workers"), [(kill_at_seven, "SIGKILL", 1), (exit_at_seven, "exit code 3", 2)]
)
def test_a_worker_that_dies_is_an_error_that_names_it(path, transform, how, workers):
    iterator = iter(loader_of(path, transform, workers=workers, shuffle=False, batch_size=4))
    assert next(iterator)["id"].tolist() == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match=rf"DataLoader worker \d \(pid \d+\).*{how}"):
        list(iterator)


def test_leaving_an_epoch_ends_workers_that_are_in_the_midst_of_a_transform(path):
    iterator = iter(loader_of(path, wait_at_seven, workers=1, shuffle=False, batch_size=4))
    pid = int(next(iterator)["pid"][0])
    iterator.close()
    assert not Path(f"/proc/{pid}").exists()


def test_a_timeout_is_honoured(path):
    iterator = iter(loader_of(path, wait_at_seven, workers=1, shuffle=False, batch_size=4, timeout=0.3))
    with pytest.raises(RuntimeError, match="timed out"):
        list(iterator)
    iterator.close()


def test_workers_live_from_epoch_to_epoch_if_asked(path):
    for keeps in (False, True):
        loader = loader_of(path, workers=1, persistent_workers=keeps)
        pids, epochs = [], []
        for stop in (None, 3, None):
            batches = list(itertools.islice(loader, stop))
            epochs.append(rows_of(batches))
            pids.append({int(pid) for batch in batches for pid in batch["pid"]})
            gc.collect()
        assert len(set.union(*pids)) == (1 if keeps else 3)
        expected = loader_of(path)
        assert epochs == [rows_of(itertools.islice(expected, stop)) for stop in (None, 3, None)]
        del loader


class CannotBeRead:
    def __reduce__(self):
        return _raise, ()


def _raise():
    raise LookupError("not here")


def test_a_batch_of_an_abandoned_epoch_that_cannot_be_read_is_no_error_of_the_next_one(path, tmp_path):
    begun, gate, made = tmp_path / "begun", tmp_path / "open", itertools.count()

    def wrong_after_a_batch(record):
        number = next(made)
        if number == 8:
            begun.touch()
            wait_for(gate.exists, 60)
        return {"id": record["id"], "x": CannotBeRead() if 8 <= number < 16 else None}

    more = {"workers": 1, "persistent_workers": True, "collate_fn": list}
    loader = loader_of(path, wrong_after_a_batch, **more)
    iterator = iter(loader)
    next(iterator)
    wait_for(begun.exists, 60)
    iterator.close()
    gate.touch()
    assert len(list(loader)) == len(loader)
    with pytest.raises(LookupError, match="not here"):
        list(loader_of(path, wrong_after_a_batch, **more))


def test_workers_end_though_later_workers_hold_their_pipes(path, tmp_path, monkeypatch):
    monkeypatch.setattr(transform_workers, "END_S", 60.0)
    noted = tmp_path / "terminated"

    def note_the_end(number):
        signal.signal(signal.SIGTERM, lambda *_: noted.touch())

    loader = loader_of(path, workers=1, multiprocessing_context="fork", worker_init_fn=note_the_end)
    one, two = iter(loader), iter(loader)
    pid = int(next(one)["pid"][0])
    one.close()
    assert not Path(f"/proc/{pid}").exists()
    two.close()
    assert not noted.exists()


def test_a_signal_handler_of_the_training_script_does_not_keep_a_worker_alive(path):
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        iterator = iter(loader_of(path, workers=1, batch_size=2, multiprocessing_context="fork"))
        pid = int(next(iterator)["pid"][0])
        os.kill(pid, signal.SIGTERM)
        with pytest.raises(RuntimeError, match=rf"pid {pid}\).*SIGTERM"):
            list(iterator)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_error_of_the_receiving_thread_reaches_the_consumer(path, monkeypatch):
    iterator = iter(loader_of(path, workers=1, timeout=60))
    next(iterator)

    wait = transform_workers.connection.wait  # joining a process calls it, too

    def no_memory(objects, timeout=None):
        if threading.current_thread().name.startswith("tiercache-transform"):
            raise MemoryError("of the receiver")
        return wait(objects, timeout)

    monkeypatch.setattr(transform_workers.connection, "wait", no_memory)
    with pytest.raises(MemoryError, match="of the receiver"):
        list(iterator)


def test_workers_that_get_no_memory_leave_nothing_behind(path, monkeypatch):
    made, create = itertools.count(), SharedBlock.create

    def create_some():
        if next(made) == 9:  # of the second worker
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return create()

    monkeypatch.setattr(SharedBlock, "create", create_some)
    with pytest.raises(OSError, match="Too many open files"):
        iter(loader_of(path, workers=2))
    assert not [process for process in multiprocessing.active_children() if "transform-worker" in process.name]


def test_no_more_batches_are_ahead_than_prefetch_factor_says(path, tmp_path):
    def note(record):
        with (tmp_path / "seen").open("a") as file:
            file.write("x\n")
        return {"id": record["id"]}

    loader = loader_of(path, note, workers=1, batch_size=1, prefetch_factor=3)
    iterator = iter(loader)
    for _ in range(10):
        next(iterator)
    iterator.close()
    assert len((tmp_path / "seen").read_text().split()) <= 10 + 3 + 1


def megabyte(record):
    return {"id": record["id"], "x": np.zeros(1 << 20, np.uint8)}


def test_memory_bytes_limits_the_shared_memory_of_the_workers(path):
    def shared_bytes():
        n_bytes = 0
        for file in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # closed by another thread
                n_bytes += file.stat().st_size if "tiercache-transform" in str(file.readlink()) else 0
        return n_bytes

    more = {"batch_size": 1, "prefetch_factor": 8, "options": options(memory_bytes="4MiB")}
    before = shared_bytes()
    iterator = iter(loader_of(path, megabyte, workers=2, **more))
    for _ in range(60):
        next(iterator)
    after = shared_bytes()
    iterator.close()
    # of each worker's 11 blocks for results: 3 for batches ahead, and 3 for those that wait or that the consumer held
    assert after - before < 2 * (3 + 3) * 1.2 * (1 << 20)


@pytest.mark.parametrize("transform", [None, megabyte])
def test_a_prefetch_factor_of_0_is_refused(path, transform):
    with pytest.raises(ValueError, match="prefetch_factor must be 1 or more, or None for 2, got 0"):
        loader_of(path, transform, workers=1, prefetch_factor=0)


def test_options_of_workers_that_run_transforms_are_not_said_to_be_ignored(path, caplog):
    caplog.set_level("INFO", logger="tiercache")
    loader_of(path, workers=2, worker_init_fn=init, persistent_workers=True, prefetch_factor=3)
    assert not caplog.records


def test_a_spawned_worker_serves_the_same(path):
    loader = loader_of(path, workers=1, multiprocessing_context="spawn")
    assert rows_of(loader) == rows_of(loader_of(path))


def test_functions_that_another_process_cannot_get_are_an_error_of_iter(path):
    with pytest.raises(Exception, match=r"pickle|local object"):
        iter(loader_of(path, lambda record: record, workers=1, multiprocessing_context="spawn"))


def test_stats_count_what_was_handed_out(path):
    loader = loader_of(path, workers=2)
    list(itertools.islice(loader, 3))
    gc.collect()
    stats = loader.stats()
    assert (stats["samples"], stats["batches"]) == (24, 3)
    assert stats["stages"]["transform_s"] > 0
    large = loader_of(path, same_size, workers=2)
    kept = list(large)
    assert large.stats()["held_bytes"] > 0
    del kept
    assert large.stats()["held_bytes"] == 0


PRELUDE = """
import os, sys, time
import torch
import tiercache as tc

def slow(record):
    time.sleep(0.002)
    return {"id": record["id"], "pid": os.getpid(), "x": torch.zeros(10_000)}

dataset = tc.Dataset(sys.argv[1], transform=slow)
loader = tc.DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context="fork", persistent_workers=True)
"""
LOOP = """
while True:
    for batch in loader:
        print(*batch["pid"].tolist(), flush=True)
"""


@contextmanager
def training(python, path, folder):
    """A process that loads for ever, once its workers are at work; and their process ids."""
    with (folder / "out").open("w") as out, (folder / "errors").open("w") as errors:
        process = python.start(["-c", PRELUDE + LOOP, str(path)], out=out, errors=errors)
    try:
        assert wait_for(lambda: len((folder / "out").read_text().split()) > 20, 60), (folder / "errors").read_text()
        yield process, {int(pid) for pid in (folder / "out").read_text().split()[:20]}
    finally:
        process.kill()
        process.wait()


def runs(pid):
    """Whether a process runs; one that only waits for init to ask how it ended does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def are_gone(pids):
    return wait_for(lambda: not any(map(runs, pids)), 60)


def test_workers_end_when_their_parent_is_killed(path, tmp_path, warm_python):
    with training(warm_python, path, tmp_path) as (process, pids):
        process.kill()
        process.wait()
        assert are_gone(pids)


def test_ctrl_c_ends_the_loop_and_the_workers(path, tmp_path, warm_python):
    with training(warm_python, path, tmp_path) as (process, pids):
        for pid in (*pids, process.pid):  # a terminal sends it to the workers, too
            os.kill(pid, signal.SIGINT)
        assert process.wait(60)
        errors = (tmp_path / "errors").read_text()
        assert errors.rstrip().endswith("KeyboardInterrupt")
        assert errors.count("Traceback") == 1
        assert are_gone(pids)


def test_an_interpreter_that_ends_in_mid_epoch_ends_in_silence(path, warm_python):
    code = "for batch in loader: print(*batch['pid'].tolist()); sys.exit(0)"
    done = warm_python.run(["-c", PRELUDE + code, str(path)], cwd=path)
    assert (done.stderr, done.returncode) == ("", 0)
    assert are_gone(map(int, done.stdout.split()))


def test_a_forked_child_leaves_its_parents_workers_alone(path):
    iterator = iter(loader_of(path, workers=1))
    next(iterator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        try:
            iterator.close()
            next(iterator)
        except RuntimeError as error:
            os._exit(0 if re.search("fork", str(error)) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert len(rows_of(iterator)) == N - 8
