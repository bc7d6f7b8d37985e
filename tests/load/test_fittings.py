"""What pipelines of a run share: made once for what is served, anew where something else is."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from tests.load.conftest import check_batch, ids_of, make_columns

import tiercache as tc
from tiercache.load import batch
from tiercache.load.batch import PipelineCache, PipelineSetup
from tiercache.load.output_spec import OutputSpec
from tiercache.shard.schema import Column, Schema

N = 300
SHARD_BYTES = np.array([6000, 4000])


def source_of(*columns):
    return SimpleNamespace(schema=Schema(list(columns)), shard_bytes=SHARD_BYTES)


def test_all_epochs_of_a_run_are_served_by_one_assembler(make_dataset, monkeypatch):
    made, assembler = [], batch.Assembler
    monkeypatch.setattr(batch, "Assembler", lambda *what: made.append(assembler(*what)) or made[-1])
    loader = tc.DataLoader(tc.Dataset(make_dataset(N)), batch_size=16)
    epochs = [ids_of(loader) for _ in range(3)]
    assert [[i for ids in epoch for i in ids] for epoch in epochs] == [list(range(N))] * 3
    assert len(made) == 1


def test_two_iterators_of_a_loader_share_an_assembler_and_take_their_own_batches(make_dataset):
    loader = tc.DataLoader(tc.Dataset(make_dataset(N)), batch_size=16)
    first, second = iter(loader), iter(loader)
    assert first._pipeline._assembler is second._pipeline._assembler
    served = [(check_batch(a), check_batch(b)) for a, b in zip(first, second, strict=True)]
    assert served == [(ids, ids) for ids in ids_of(loader)]


def test_a_run_that_goes_on_with_another_version_has_that_ones_length_and_records(make_dataset):
    path = make_dataset(60)
    state = tc.DataLoader(tc.Dataset(path), batch_size=16).state_dict()
    with tc.Writer(path, mode="append") as writer:
        writer.write_batch(make_columns(20, 60))
    loader = tc.DataLoader(tc.Dataset(path), batch_size=16)
    assert (len(loader), [len(ids) for ids in ids_of(loader)]) == (5, [16] * 5)
    loader.load_state_dict(state)
    assert (len(loader), [len(ids) for ids in ids_of(loader)]) == (4, [16, 16, 16, 12])


def test_what_fits_another_source_or_serving_is_made_anew():
    source, serving, kept = source_of(Column.of("a", "int32")), OutputSpec(), PipelineCache()
    fitted = kept.of(source, serving)
    assert kept.of(source, serving) is fitted
    assert kept.of(source, OutputSpec()) is not fitted
    other = source_of(Column.of("a", "int32"))
    assert kept.of(other, serving).source is other


def test_a_batch_has_no_more_rows_than_its_epoch_and_at_least_one():
    fitted = PipelineSetup(source_of(Column.of("a", "int32")), OutputSpec())
    assert [fitted.sizes(16, n_records).rows for n_records in (100, 16, 5, 0)] == [16, 16, 5, 1]


def test_a_slot_is_made_with_room_for_what_records_take_where_they_differ_in_length():
    lengths = PipelineSetup(source_of(Column.of("a", "bytes")), OutputSpec({"a": "buffer"})).sizes(10, 100)
    fixed = PipelineSetup(source_of(Column.of("a", "int32")), OutputSpec()).sizes(10, 100)
    assert lengths.about_bytes == fixed.about_bytes == 1000
    assert lengths.expected_bytes == 1000 + 1000 // 8
    assert 10 * 4 <= fixed.expected_bytes < 1000
