"""Pickled views, and pickles in other processes."""

from __future__ import annotations

import multiprocessing
import pickle

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
    ("make", "limit_bytes"),
    [
        (lambda d: d, 2000),
        (lambda d: d.take(10_000).skip(5).shard(3, 1), 2000),
        (lambda d: d.shuffle(3).take(100), 5000),
        (lambda d: d.select(np.random.default_rng(0).permutation(N)), 9 * N),
        (lambda d: d.filter(pc.field("odd")).select(np.arange(9000)[::-1]).take(7000), 16 * N),
        (lambda d: d.select(np.arange(N) % 3 == 0) + d.filter(pc.field("odd")), 16 * N),
        (lambda d: tc.mix([d.filter(pc.field("id") > 1), d.shard(2, 0)], [1, 2]), 2000),
    ],
)
def test_a_view_of_any_form_pickles_to_its_steps_and_runs(packed, make, limit_bytes):
    view = make(tc.Dataset(packed))
    data = pickle.dumps(view)
    assert len(data) < limit_bytes
    again = pickle.loads(data)
    assert np.array_equal(again[:]["id"], view[:]["id"])
    assert again._source.parts == view._source.parts


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
