"""The data set itself: records and batches by index, any loader round it, any way of starting processes."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import warnings

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.every_kind import is_same
from tests.support.records import SCHEMA, check_batch, make_columns
from torch.utils.data import DataLoader as TorchLoader

import tiercache as tc


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("dataset") / "data"
    with tc.Writer(path, schema=SCHEMA, shard_size="8KiB", block_size="1KiB") as writer:
        writer.write_batch(make_columns(150))
    return path


@pytest.fixture
def dataset(packed):
    dataset = tc.Dataset(packed)
    yield dataset
    dataset.close()


@pytest.mark.parametrize("i", [0, 7, 149, -1, -150])
def test_a_record_is_a_dict_of_the_columns_own_types(dataset, i):
    record = dataset[i]
    expected = {name: values[0] for name, values in make_columns(1, i % 150).items()}
    assert is_same(record, {**expected, "score": None if expected["score"] is None else np.float32(expected["score"])})
    assert type(record["id"]) is np.int64
    assert type(record["flag"]) is np.bool_
    record["tokens"][:] = 0
    assert is_same(dataset[i]["tokens"], expected["tokens"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.slices(150))
def test_a_slice_is_a_batch(dataset, cut):
    assert check_batch(dataset[cut]) == list(range(150))[cut]


def test_indices_are_accepted_in_any_container(dataset):
    for index in (np.array([3, 1]), torch.tensor([3, 1]), (3, 1)):
        assert check_batch(dataset[index]) == [3, 1]


def test_an_invalid_index_is_an_error(dataset):
    for index, error in (
        (150, IndexError),
        (-151, IndexError),
        ([0, 150], IndexError),
        (np.array([0, 2**64 - 1], np.uint64), IndexError),
        (1.0, TypeError),
        ("a", TypeError),
        (np.ones(150, bool), TypeError),
    ):
        with pytest.raises(error):
            dataset[index]


def test_iteration_gives_every_record_in_order(dataset):
    assert [record["id"] for record in dataset] == list(range(150))


def test_arrow_batches_and_pandas_hold_everything_in_order(dataset):
    for batch_size in (1, 7, 1000):
        batches = list(dataset.to_arrow(batch_size))
        assert [b.num_rows for b in batches][:-1] == [batch_size] * (-(-150 // batch_size) - 1)
        table = pa.Table.from_batches(batches)
        assert table["id"].to_pylist() == list(range(150))
        assert table["text"].to_pylist() == [f"text {i}" for i in range(150)]
        assert table["score"].null_count == 30
    frame = dataset.to_pandas()
    assert list(frame.columns) == list(SCHEMA)
    assert frame["id"].tolist() == list(range(150))


def test_to_arrow_is_a_reader_that_any_library_takes_by_the_c_stream_interface(dataset):
    reader = dataset.to_arrow()
    assert hasattr(reader, "__arrow_c_stream__")
    assert reader.schema == dataset.schema.arrow
    assert pa.table(reader)["id"].to_pylist() == list(range(150))
    assert dataset.take(0).to_arrow().read_all().schema == dataset.schema.arrow


def test_arrow_that_lost_the_metadata_of_its_fields_is_packed_with_the_types_of_its_columns(tmp_path):
    """As polars passes it on: extension types with their names, and fields without metadata."""
    schema = {"half": "bfloat16", "boxes": "float32[*, 2]", "picture": "image<png>", "photo": "image", "x": "int8[2]"}
    records = [{"half": 1.5, "boxes": np.ones((i, 2)), "picture": b"a", "photo": b"b", "x": [i, 2]} for i in range(5)]
    with tc.Writer(tmp_path / "one", schema=schema) as writer:
        for record in records:
            writer.write(record)
    dataset = tc.Dataset(tmp_path / "one")
    table = dataset.to_arrow().read_all()
    bare = pa.schema([field.remove_metadata() for field in table.schema])
    tc.pack(pa.Table.from_arrays(table.columns, schema=bare), tmp_path / "two")
    again = tc.Dataset(tmp_path / "two")
    assert again.schema == dataset.schema
    assert again.to_arrow().read_all().equals(table)


def test_extension_types_over_other_memory_than_ours_are_read_by_their_own_storage(tmp_path):
    """As polars exports them, and as a forged file may have them."""
    png = b'{"encoding": "png"}'
    ragged = pa.struct([("data", pa.list_(pa.int16())), ("shape", pa.list_(pa.int32(), 1))])

    def table_of(name, described, array):
        metadata = {"ARROW:extension:name": f"tiercache.{name}", "ARROW:extension:metadata": described}
        schema = pa.schema([pa.field("c", array.type, metadata=metadata)])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as stream:
            stream.write_batch(pa.record_batch([array], schema=schema))
        return pa.ipc.open_stream(sink.getvalue()).read_all()

    long = [b"x" * 100, b"y"]
    tc.pack(table_of("image", png, pa.array(long, pa.binary_view())), tmp_path / "image")
    assert [record["c"] for record in tc.Dataset(tmp_path / "image")] == long
    rows = [{"data": [1, 2], "shape": [2]}, {"data": [], "shape": [0]}]
    tensors = table_of("variable_shape_tensor", b'{"uniform_shape": [null]}', pa.array(rows, ragged))
    tc.pack(tensors, tmp_path / "ragged")
    assert [record["c"].tolist() for record in tc.Dataset(tmp_path / "ragged")] == [[1, 2], []]
    with pytest.raises(tc.SchemaError, match="image<png>"):
        tc.pack(table_of("image", png, pa.array([1, 2], pa.int8())), tmp_path / "forged")
    with pytest.raises(tc.SchemaError, match="expected uint16, got an Arrow array of string"):
        tc.pack(table_of("bfloat16", b"", pa.array(["a"])), tmp_path / "forged")


def test_selected_columns_and_their_order_apply_to_every_way_of_reading(dataset):
    chosen = dataset.select_columns(["text", "id"])
    assert chosen.column_names == ["text", "id"]
    assert chosen[3] == {"text": "text 3", "id": 3}
    with pytest.raises(tc.SchemaError, match="no such column"):
        dataset.select_columns(["nothing"])


def test_an_opened_data_set_keeps_its_version(tmp_path):
    with tc.Writer(tmp_path / "d", schema={"id": "int64"}) as writer:
        writer.write_batch({"id": np.arange(3)})
    first = tc.Dataset(tmp_path / "d")
    with tc.Writer(tmp_path / "d", mode="append") as writer:
        writer.write_batch({"id": np.arange(3, 5)})
    assert (len(first), len(pickle.loads(pickle.dumps(first))), len(tc.Dataset(tmp_path / "d"))) == (3, 3, 5)
    assert len(tc.Dataset(tmp_path / "d", version=first.version)) == 3
    with pytest.raises(tc.NotFound):
        tc.Dataset(tmp_path / "d", version=99)


def test_a_missing_data_set_is_not_found_and_the_error_names_its_url(tmp_path):
    with pytest.raises(tc.NotFound, match="nowhere"):
        tc.Dataset(tmp_path / "nowhere")


def test_records_that_were_read_together_are_a_sequence_that_is_made_at_the_first_access(dataset):
    chosen = dataset.select_columns(["id", "text"])
    plain = [chosen[i] for i in (2, 0, 1)]
    for look in (list, lambda r: r[0:3], lambda r: list(reversed(r))[::-1], lambda r: pickle.loads(pickle.dumps(r))[:]):
        records = chosen.__getitems__([2, 0, 1])
        assert len(records) == 3
        assert records.as_gathered
        assert look(records) == plain
    assert plain[1] in records


def test_changes_that_a_collate_function_makes_to_records_are_in_the_batch(dataset):
    def collate(records):
        for record in records:
            record["tokens"] = record["tokens"] * 0
        return tc.collate(sorted(records, key=lambda record: -record["id"]))

    batch = next(iter(TorchLoader(dataset.select_columns(["id", "tokens"]), batch_size=4, collate_fn=collate)))
    assert batch["id"].tolist() == [3, 2, 1, 0]
    assert not batch["tokens"].any()


def test_a_forked_child_does_not_wait_for_a_shard_that_its_parent_was_opening(dataset):
    unopened = pickle.loads(pickle.dumps(dataset))
    with unopened._lock, warnings.catch_warnings():  # as a thread holds it while it opens
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
        if child == 0:
            _exit_with_record_4(unopened)
    assert os.waitpid(child, 0)[1] == 0


def _exit_with_record_4(dataset):
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(20)
    os._exit(0 if dataset[4]["id"] == 4 else 1)


def test_a_forked_childs_second_thread_does_not_take_its_parents_lock(dataset, monkeypatch):
    dataset[3]
    readers, make = dataset._source.leaves[0]._readers, threading.Lock
    done = []

    def make_while_another_comes():
        monkeypatch.setattr(threading, "Lock", make)
        thread = threading.Thread(target=lambda: done.append(readers.get(0)), daemon=True)
        thread.start()
        thread.join(20)
        return make()

    readers._lock.acquire()  # by a thread that the fork has left behind
    readers._pid = -1
    monkeypatch.setattr(threading, "Lock", make_while_another_comes)
    readers.get(0)
    assert len(done) == 1


def test_the_pickled_data_set_is_small_and_opens_nothing_until_it_is_used(dataset, monkeypatch):
    data = pickle.dumps(dataset)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert again._opened is None
    assert len(again) == 150


def test_invalid_arguments_are_errors_that_name_them(tmp_path):
    with pytest.raises(ValueError, match="verify"):
        tc.Dataset(tmp_path, verify="sometimes")
    with pytest.raises(TypeError, match="list of names"):
        tc.Dataset(tmp_path, columns="id")
    with pytest.raises(ValueError, match="columns is empty"):
        tc.Dataset(tmp_path, columns=[])


def test_the_repr_names_url_version_and_schema(dataset):
    assert "150 records" in repr(dataset)
    assert "tokens: uint16[6]" in repr(dataset)
