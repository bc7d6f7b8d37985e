"""Views in other processes: small pickles, files that live as long as they are needed and no longer."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

import tiercache as tc
from tiercache.views import selection
from tiercache.views.selection import Selection

N = 20_000


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("spool") / "data"
    with tc.Writer(path, schema={"id": "int64", "odd": "bool"}, shard_size="32KiB", block_size="4KiB") as writer:
        writer.write_batch({"id": np.arange(N), "odd": np.arange(N) % 2 == 1})
    return path


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """A temporary folder of the test's own, so that its files can be counted."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def shuffled(path):
    return tc.Dataset(path).select(np.random.default_rng(0).permutation(N))


def files(folder):
    return list(folder.iterdir())


@pytest.mark.parametrize(
    "make",
    [
        lambda d: d,
        lambda d: d.take(10_000).skip(5).shard(3, 1),
        lambda d: d.select(np.random.default_rng(0).permutation(N)),
        lambda d: d.select(np.arange(N) % 3 == 0),
        lambda d: d.filter(pc.field("odd")).select(np.arange(9000)[::-1]).take(7000),
        lambda d: d.select(np.arange(N) % 3 == 0) + d.filter(pc.field("odd")),
        lambda d: tc.mix([d.filter(pc.field("odd")), d.shard(2, 0)], [1, 2]),
    ],
)
def test_a_view_pickles_to_little_whatever_it_chooses(packed, make):
    view = make(tc.Dataset(packed))
    data = pickle.dumps(view)
    assert len(data) < 2000
    assert np.array_equal(pickle.loads(data)[:]["id"], view[:]["id"])


def test_small_selections_need_no_file(packed, own_folder):
    view = tc.Dataset(packed).select([3, 1, 2]).filter(pc.field("odd"))
    assert pickle.loads(pickle.dumps(view))[:]["id"].tolist() == [3, 1]
    assert files(own_folder) == []


def test_the_file_is_made_once_and_goes_with_the_view(packed, own_folder):
    view = shuffled(packed)
    first, second = pickle.dumps(view), pickle.dumps(view)
    assert first == second
    (file,) = files(own_folder)
    assert file.stat().st_mode & 0o777 == 0o600
    other = pickle.loads(first)
    assert other[:3]["id"].tolist() == view[:3]["id"].tolist()
    expected = view[:]["id"]
    del view
    gc.collect()
    assert files(own_folder) == []
    assert np.array_equal(other[:]["id"], expected)  # it has the file mapped
    with pytest.raises(tc.NotFound, match="pickled selection of 20000 records is gone"):
        pickle.loads(first)


def test_a_filter_that_comes_too_late_for_its_file_is_evaluated_again(packed, own_folder):
    view = tc.Dataset(packed).filter(pc.field("odd"))
    data, parts = pickle.dumps(view), view._source.parts
    assert len(files(own_folder)) == 1
    del view
    gc.collect()
    assert files(own_folder) == []
    again = pickle.loads(data)
    assert len(again) == N // 2
    assert again._source.parts == parts


class _Together:
    """A lock that nobody has before all have come to it."""

    def __init__(self, n):
        self.barrier, self.lock = threading.Barrier(n), threading.Lock()

    def __enter__(self):
        self.barrier.wait()
        self.lock.acquire()

    def __exit__(self, *_):
        self.lock.release()


def test_threads_that_pickle_at_once_share_one_file(packed, own_folder, monkeypatch):
    view, found = shuffled(packed), []
    monkeypatch.setattr(selection, "_lock", _Together(8))
    threads = [threading.Thread(target=lambda: found.append(pickle.dumps(view))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(files(own_folder)) == 1


def test_where_no_file_can_be_written_the_pickle_holds_it_all(packed, monkeypatch):
    def no_space(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", no_space)
    view = shuffled(packed)
    data = pickle.dumps(view)
    assert len(data) > 8 * N
    expected = view[:]["id"]
    del view
    assert np.array_equal(pickle.loads(data)[:]["id"], expected)


@pytest.mark.parametrize("change", [lambda p: p.write_bytes(b"other" * 99), lambda p: p.write_bytes(b""), os.unlink])
def test_a_file_that_is_another_one_is_not_read(packed, own_folder, change):
    view = shuffled(packed)
    data = pickle.dumps(view)
    change(files(own_folder)[0])
    with pytest.raises(tc.NotFound, match="gone"):
        pickle.loads(data)


def _first_ids(dataset):
    again = pickle.loads(pickle.dumps(dataset))  # its own file, of its own process
    return dataset[:5]["id"].tolist(), again[:5]["id"].tolist()


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_processes_map_the_file_and_leave_none_behind(packed, own_folder, start):
    view = shuffled(packed)
    pickle.dumps(view)
    expected = view[:5]["id"].tolist()
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert pool.apply(_first_ids, (view,)) == (expected, expected)
        assert [f for f in files(own_folder) if str(f) == pickle.loads(pickle.dumps(view._source.selection.pack()))[0]]
        pool.close()
        pool.join()
    assert len(files(own_folder)) == 1
    del view
    gc.collect()
    assert files(own_folder) == []


def test_a_forked_child_that_ends_does_not_take_its_parents_file(packed, own_folder):
    view = shuffled(packed)
    data = pickle.dumps(view)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        del view
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert len(files(own_folder)) == 1
    assert len(pickle.loads(data)) == N


def test_a_forked_child_pickles_by_a_file_of_its_own_for_its_parents_may_go(packed, own_folder):
    view = shuffled(packed)
    mine = pickle.dumps(view)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os._exit(int(pickle.dumps(view) == mine or len(files(own_folder)) != 2))
    assert os.waitpid(child, 0)[1] == 0


KILLED = """
import os, pickle, signal, sys, tempfile
import numpy as np
tempfile.tempdir = sys.argv[1]
from tiercache.views.selection import Selection
kept = Selection.of(np.random.default_rng(0).permutation(1000))
pickle.dumps(kept)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["killed", "ended"])
def test_files_of_processes_that_are_gone_go_with_the_next_pickle(own_folder, end):
    subprocess.run([sys.executable, "-c", KILLED, str(own_folder), end], check=False)
    assert len(files(own_folder)) == (end == "killed")
    mine, other = (Selection.of(np.random.default_rng(s).permutation(1000)) for s in (1, 2))
    first = pickle.dumps(mine)
    assert len(files(own_folder)) == 1
    pickle.dumps(other)  # sweeps too: what is in use stays
    assert len(files(own_folder)) == 2
    assert np.array_equal(pickle.loads(first).order, mine.order)


def test_a_sweep_leaves_other_files_alone(own_folder):
    os.mkfifo(own_folder / f"{selection.PREFIX}pipe")
    (own_folder / "mine.txt").write_text("x")
    (own_folder / f"{selection.PREFIX}link").symlink_to(own_folder / "mine.txt")
    kept = Selection.of(np.random.default_rng(1).permutation(1000))
    pickle.dumps(kept)
    assert (own_folder / "mine.txt").exists()
    assert Path(own_folder / f"{selection.PREFIX}link").is_symlink()
