"""Parquet files: nulls inside of lists, and the classes that `datasets` has written."""

import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support.token_and_arrow_cases import hf_columns, hf_table

import tiercache as tc
from tiercache.errors import SchemaError
from tiercache.packer.sources import SourceOptions, find_source


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", str(tmp_path / "default-cache"))


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "data"
    made.mkdir()
    return made


LISTS = [[1, 2], [], None, [3, None]]


def test_lists_with_nulls_inside_are_served_as_lists_from_arrow_files(folder, tmp_path):
    table = pa.table({"a": pa.array(LISTS, pa.list_(pa.int32())), "b": pa.array([[1]] * 4, pa.list_(pa.int32()))})
    for name, rows in {"a.arrow": table.slice(0, 3), "b.arrow": table.slice(3)}.items():
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(rows)
    tc.pack(folder, tmp_path / "packed")
    for dataset in (tc.Dataset(folder), tc.Dataset(tmp_path / "packed")):
        assert [str(column) for column in dataset.schema.columns] == ["list<int32?>?", "int32[*]"]
        assert [record["a"] for record in dataset] == LISTS


def test_lists_with_nulls_inside_are_an_error_in_parquet_which_says_how_to_pack_them(folder, tmp_path):
    pq.write_table(pa.table({"a": pa.array(LISTS, pa.list_(pa.int32()))}), folder / "a.parquet")
    with pytest.raises(SchemaError, match=r"record 3: .*list<int32\?>; pack\(\) takes .*schema=\{'a': \.\.\.\}"):
        list(tc.Dataset(folder))
    with pytest.raises(SchemaError, match=r"row 3: .*list<int32\?>"):
        tc.pack(folder, tmp_path / "packed")
    tc.pack(folder, tmp_path / "packed", schema={"a": "list<int32?>?"})
    assert [record["a"] for record in tc.Dataset(tmp_path / "packed")] == LISTS


def test_a_large_row_group_is_packed_in_pieces(folder):
    values = np.random.default_rng(0).bytes(48 << 20)
    array = pa.FixedSizeBinaryArray.from_buffers(pa.binary(1 << 10), 48 << 10, [None, pa.py_buffer(values)])
    pq.write_table(pa.table({"x": array.cast(pa.binary())}), folder / "a.parquet", compression="none")
    source, _ = find_source(folder, SourceOptions())
    assert len(source.splits) == 1
    tracemalloc.start()
    try:
        assert sum(batch.n_records for batch in source.read(source.splits[0], 1 << 20)) == 48 << 10
        assert tracemalloc.get_traced_memory()[1] < 20 << 20  # the bytes that Arrow has asked the file for
    finally:
        tracemalloc.stop()


def test_files_whose_classes_have_other_names_are_refused(folder, tmp_path):
    table = hf_table(hf_columns(0, 10))
    written = json.loads(table.schema.metadata[b"huggingface"])
    for number, names in enumerate((["cat", "dog", "owl"], ["dog", "cat", "owl"])):
        written["info"]["features"]["label"]["names"] = names
        metadata = {"huggingface": json.dumps(written), "row": str(number)}
        pq.write_table(table.replace_schema_metadata(metadata), folder / f"{number}.parquet")
    for refused in (lambda: tc.Dataset(folder), lambda: tc.pack(folder, tmp_path / "packed")):
        with pytest.raises(SchemaError, match=r"'label'.*1\.parquet: expected the classes \['cat', 'dog', 'owl'\]"):
            refused()
    tc.pack(folder / "1.parquet", tmp_path / "packed", schema={"image": "bytes"})
    dataset = tc.Dataset(tmp_path / "packed")
    assert dataset.classes == ["dog", "cat", "owl"]
    assert str(dataset.schema.columns[dataset.schema.index("image")]) == "bytes"
