"""MosaicML MDS: what is refused, and damage that the sizes in the files reveal."""

import json

import numpy as np
import pytest
from tests.support.mds_files import write_mds

import tiercache as tc
from tiercache.errors import CorruptShard, SchemaError

RECORDS = [{"x": i, "s": f"text {i}"} for i in range(100)]


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", str(tmp_path / "default-cache"))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "data"
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shard: shard.update(format="json"), "reads only mds 2"),
        (lambda shard: shard.update(column_encodings=["pkl", "str"], column_sizes=[None, None]), "runs code"),
        (lambda shard: shard.update(column_encodings=["wav", "str"], column_sizes=[None, None]), "does not know"),
        (lambda shard: shard["raw_data"].update(basename="other.mds"), "is missing"),
        (lambda shard: shard.update(column_sizes=[4, None]), "cannot have 4 bytes"),
        (lambda shard: shard.pop("samples"), "samples"),
    ],
)
def test_an_index_that_cannot_be_read_is_refused_with_the_reason(folder, change, message):
    write_mds(folder, {"x": "int", "s": "str"}, [RECORDS])
    index = json.loads((folder / "index.json").read_text())
    change(index["shards"][0])
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(SchemaError, match=message):
        tc.Dataset(folder)


def test_folders_of_data_sets_are_named(folder):
    for name in ("train", "val"):
        (folder / name).mkdir()
        write_mds(folder / name, {"x": "int", "s": "str"}, [RECORDS])
    with pytest.raises(SchemaError, match="folders below it have: train, val"):
        tc.Dataset(folder)
    assert len(tc.Dataset(folder / "val")) == 100


@pytest.mark.parametrize("at", [0, 4, 8, 404])
def test_a_table_of_records_that_is_damaged_is_found(folder, at):
    write_mds(folder, {"x": "int", "s": "str"}, [RECORDS])
    path = folder / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    data[at : at + 4] = np.uint32(1 << 30).tobytes()
    path.write_bytes(data)
    with pytest.raises(CorruptShard, match=r"shard\.00000\.mds"):
        list(tc.Dataset(folder))


def test_sizes_of_values_that_do_not_fill_their_record_are_found(folder):
    write_mds(folder, {"x": "int", "s": "str"}, [RECORDS])
    path = folder / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    data[int(np.frombuffer(data, "<u4", 1, 4)[0])] += 1
    path.write_bytes(data)
    with pytest.raises(CorruptShard, match="record 0"):
        list(tc.Dataset(folder))


def test_an_array_of_another_type_than_the_first_one_names_its_record(folder):
    arrays = [np.zeros(3, np.int32), np.zeros(2, np.int32), np.zeros((2, 2), np.int32)]
    write_mds(folder, {"a": "ndarray"}, [[{"a": array} for array in arrays]])
    with pytest.raises(SchemaError, match="record 2"):
        list(tc.Dataset(folder))
