"""Pickled views: small pickles; large selections are mapped by other processes as long as their owner lives."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import warnings

import numpy as np
import pyarrow.compute as pc
import pytest

import tiercache as tc

N = 20_000


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("pickling") / "data"
    with tc.Writer(path, schema={"id": "int64", "odd": "bool"}, shard_size="32KiB", block_size="4KiB") as writer:
        writer.write_batch({"id": np.arange(N), "odd": np.arange(N) % 2 == 1})
    return path


def shuffled(path):
    return tc.Dataset(path).select(np.random.default_rng(0).permutation(N))


@pytest.mark.parametrize(
    "make",
    [
        lambda d: d,
        lambda d: d.take(10_000).skip(5).shard(3, 1),
        lambda d: d.select(np.random.default_rng(0).permutation(N)),
        lambda d: d.select(np.arange(N) % 3 == 0),
        lambda d: d.filter(pc.field("odd")).select(np.arange(9000)[::-1]).take(7000),
        lambda d: d.select(np.arange(N) % 3 == 0) + d.filter(pc.field("odd")),
        lambda d: (d.select(np.arange(N) % 3 == 0) + d.filter(pc.field("odd"))).select(np.arange(9000)[::-1]),
        lambda d: tc.mix([d.filter(pc.field("odd")), d.shard(2, 0)], [1, 2]),
    ],
)
def test_a_view_of_any_form_pickles_to_less_than_2000_bytes(packed, make):
    view = make(tc.Dataset(packed))
    data = pickle.dumps(view)
    assert len(data) < 2000
    assert np.array_equal(pickle.loads(data)[:]["id"], view[:]["id"])


def test_a_list_of_numbers_is_readable_as_long_as_its_view_exists(packed):
    view = shuffled(packed)
    data = pickle.dumps(view)
    other = pickle.loads(data)
    expected = view[:]["id"]
    del view
    gc.collect()
    assert np.array_equal(other[:]["id"], expected)  # it has the memory mapped
    with pytest.raises(tc.NotFound, match="pickled selection of 20000 records is gone"):
        pickle.loads(data)


def test_a_filter_whose_view_is_gone_is_evaluated_again(packed):
    view = tc.Dataset(packed).filter(pc.field("odd"))
    data, parts = pickle.dumps(view), view._source.parts
    del view
    gc.collect()
    again = pickle.loads(data)
    assert len(again) == N // 2
    assert again._source.parts == parts


def test_threads_that_pickle_at_once_all_give_a_readable_view(packed):
    view, found, barrier = shuffled(packed), [], threading.Barrier(8)
    threads = [threading.Thread(target=lambda: (barrier.wait(), found.append(pickle.dumps(view)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for data in found:
        assert pickle.loads(data)[:3]["id"].tolist() == view[:3]["id"].tolist()


def test_without_shared_memory_the_pickle_contains_the_numbers(packed, monkeypatch):
    def no_memory(*_):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "memfd_create", no_memory)
    view = shuffled(packed)
    data = pickle.dumps(view)
    assert len(data) > 8 * N
    expected = view[:]["id"]
    del view
    assert np.array_equal(pickle.loads(data)[:]["id"], expected)


def test_another_file_under_the_descriptor_is_not_read(packed):
    view = shuffled(packed)
    data = pickle.dumps(view)
    del view
    gc.collect()
    other = pickle.dumps(tc.Dataset(packed).select(np.random.default_rng(1).permutation(N)))  # may get the descriptor
    with pytest.raises(tc.NotFound, match="gone"):
        pickle.loads(data)
    del other


def _first_ids(dataset):
    return dataset[:5]["id"].tolist(), pickle.loads(pickle.dumps(dataset))[:5]["id"].tolist()


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_processes_read_a_pickled_view_and_pickle_it_again(packed, start):
    view = shuffled(packed)
    expected = view[:5]["id"].tolist()
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert pool.apply(_first_ids, (view,)) == (expected, expected)
        pool.close()
        pool.join()


def test_a_forked_child_that_ends_leaves_its_parents_pickle_readable(packed):
    view = shuffled(packed)
    data = pickle.dumps(view)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        fine = len(pickle.loads(pickle.dumps(view))) == N
        del view
        gc.collect()
        os._exit(0 if fine else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(pickle.loads(data)) == N


KILLED = """
import os, pickle, sys, time
import numpy as np
from tiercache.data.selection import Selection
kept = Selection.of(np.random.default_rng(0).permutation(1000))
sys.stdout.buffer.write(pickle.dumps(kept))
sys.stdout.flush()
os.close(1)
time.sleep(60)
"""


def test_a_killed_process_takes_its_selection_with_it():
    process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE)
    data = process.stdout.read()
    process.stdout.close()
    expected = np.random.default_rng(0).permutation(1000)
    selection = pickle.loads(data)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert np.array_equal(selection.numbers(np.arange(1000)), expected)
    with pytest.raises(tc.NotFound, match="gone"):
        pickle.loads(data)
