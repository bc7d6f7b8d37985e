"""Our loader and torch's over one data set, copies of both, and data sets that users derive from ours."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from tests.support.records import check_batch, ids_of

import tiercache as tc
from tiercache.shard.schema import Schema


def test_a_pickled_loader_continues_at_its_position(make_dataset):
    loader = tc.DataLoader(tc.Dataset(make_dataset(200)), batch_size=16, shuffle=True)
    fresh = pickle.loads(pickle.dumps(loader))
    assert sorted(itertools.chain(*ids_of(fresh))) == list(range(200))
    iterator = iter(loader)
    check_batch(next(iterator))
    again = pickle.loads(pickle.dumps(loader))
    assert ids_of(again) == ids_of(iterator)


def test_a_nullable_ragged_column_is_tensors_on_both_paths(tmp_path):
    schema = {"x": tc.Ragged("float32", (None, 2), nullable=True)}
    with tc.Writer(tmp_path / "data", schema=schema) as writer:
        writer.write_batch({"x": [None, np.ones((2, 2), np.float32), None]})
    dataset = tc.Dataset(tmp_path / "data")
    for batch in (
        *tc.DataLoader(dataset, batch_size=3),
        *torch.utils.data.DataLoader(dataset, batch_size=3, collate_fn=tc.collate),
    ):
        assert [tuple(x.shape) for x in batch["x"]] == [(0, 2), (2, 2), (0, 2)]
        assert batch["x.valid"].tolist() == [False, True, False]


def test_a_json_value_nested_too_deep_is_a_corrupt_shard(tmp_path):
    text = "[" * 100_000 + "]" * 100_000
    with tc.Writer(tmp_path / "data", schema={"j": "str"}) as writer:
        writer.write_batch({"j": [text]})
    dataset = tc.Dataset(tmp_path / "data")
    dataset._source.schema = Schema.of({"j": "json"})
    with pytest.raises(tc.CorruptShard):
        next(iter(tc.DataLoader(dataset)))


class _Negative(tc.Dataset):
    def __init__(self, path, factor):
        super().__init__(path, columns=["id"])
        self.factor = factor

    def __getitem__(self, index):
        return {"id": super().__getitem__(index)["id"] * self.factor}


def test_a_subclass_that_overrides_records_is_used_by_any_loader(make_dataset):
    dataset = _Negative(make_dataset(40), -1)
    expected = [-i for i in range(40)]
    for loader in (
        tc.DataLoader(dataset, batch_size=10),
        torch.utils.data.DataLoader(dataset, batch_size=10),
        tc.DataLoader(pickle.loads(pickle.dumps(dataset)).select_columns(["id"]), batch_size=10),
    ):
        assert [i for batch in loader for i in batch["id"].tolist()] == expected
    with pytest.raises(ValueError, match=r"threads=2.*class overrides"):
        tc.DataLoader(dataset, options=tc.LoaderOptions(threads=2))
