"""What the pipelines of a run have in common: the sizes of batches, and the records of the version that is served."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from tiercache.data.output_spec import OutputSpec
from tiercache.load.batch import PipelineSetup
from tiercache.load.loader import TorchLibrary
from tiercache.shard.schema import Column, Schema


def setup_of(column, spec):
    shards = {"shard_records": np.array([60, 40]), "shard_bytes": np.array([6000, 4000])}
    return PipelineSetup(SimpleNamespace(schema=Schema([column]), **shards), spec, TorchLibrary())


def test_a_slot_is_made_with_room_for_what_records_take_where_they_differ_in_length():
    varying = setup_of(Column.of("a", "bytes"), OutputSpec({"a": "buffer"})).slot_bytes(10)
    fixed, about = setup_of(Column.of("a", "int32"), OutputSpec()).slot_bytes(10)
    assert varying == (1000 + 1000 // 8, 1000 + 1000 // 8)
    assert 10 * 4 <= fixed < 1000 == about
