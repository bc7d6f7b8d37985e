"""What the pipelines of a run have in common: the sizes of batches, and the records of the version that is served."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from tests.support.records import check_batch, ids_of, make_columns

import tiercache as tc
from tiercache.data.output_spec import OutputSpec
from tiercache.load.batch import PipelineSetup
from tiercache.load.loader import TorchLibrary
from tiercache.shard.schema import Column, Schema

N = 300


def setup_of(column, spec):
    shards = {"shard_records": np.array([60, 40]), "shard_bytes": np.array([6000, 4000])}
    return PipelineSetup(SimpleNamespace(schema=Schema([column]), **shards), spec, TorchLibrary())


def test_two_iterators_of_a_loader_take_their_own_batches(make_dataset):
    loader = tc.DataLoader(tc.Dataset(make_dataset(N)), batch_size=16)
    served = [(check_batch(a), check_batch(b)) for a, b in zip(iter(loader), iter(loader), strict=True)]
    assert served == [(ids, ids) for ids in ids_of(loader)]


def test_a_run_resumed_at_another_version_has_its_length_and_records(make_dataset):
    path = make_dataset(60)
    state = tc.DataLoader(tc.Dataset(path), batch_size=16).state_dict()
    with tc.Writer(path, mode="append") as writer:
        writer.write_batch(make_columns(20, 60))
    loader = tc.DataLoader(tc.Dataset(path), batch_size=16)
    assert (len(loader), [len(ids) for ids in ids_of(loader)]) == (5, [16] * 5)
    loader.load_state_dict(state)
    assert (len(loader), [len(ids) for ids in ids_of(loader)]) == (4, [16, 16, 16, 12])


@pytest.mark.parametrize("n_records", [0, 1, 5])
def test_a_batch_that_is_larger_than_its_epoch_takes_little_memory(make_dataset, n_records):
    loader = tc.DataLoader(tc.Dataset(make_dataset(n_records)), batch_size=1 << 40)
    assert ids_of(loader) == ([list(range(n_records))] if n_records else [])


def test_a_slot_is_made_with_room_for_what_records_take_where_they_differ_in_length():
    varying = setup_of(Column.of("a", "bytes"), OutputSpec({"a": "buffer"})).slot_bytes(10)
    fixed, about = setup_of(Column.of("a", "int32"), OutputSpec()).slot_bytes(10)
    assert varying == (1000 + 1000 // 8, 1000 + 1000 // 8)
    assert 10 * 4 <= fixed < 1000 == about
