"""Data sets of LitData as a source of a packing: what is refused, and what is damaged."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.litdata_files import write_litdata

import tiercache as tc
from tiercache.errors import SchemaError
from tiercache.packer.sources import SourceOptions, find_source
from tiercache.store import open_store

ROWS = [{"id": i, "text": f"t{i}"} for i in range(20)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            {"data_format": ["int", "pickle"]},
            "column 'text': .*pickled values, which are not unpickled, since that runs",
        ),
        ({"data_format": ["int", "graph:pickle"]}, "pickled values"),
        ({"data_format": ["int", "json"]}, "values that LitData stores as 'json'; .*pack it by module:callable"),
        ({"encryption": {"algorithm": "fernet"}}, "the data set is encrypted"),
        ({"item_loader": "ParquetLoader"}, "its chunks are for LitData's ParquetLoader"),
        ({"compression": "lz4"}, "expected the compression zstd, got 'lz4'"),
        ({"data_spec": None}, "expected a column for each of the leaves"),
        ({"data_spec": "[2, {}]"}, "its data_spec has the version 2"),
        ({"data_format": None}, "not an index of LitData that tiercache can read"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_sentence_before_anything_is_written(tmp_path, folder, config, match):
    write_litdata(folder, [ROWS], **config)
    with pytest.raises(SchemaError, match=match):
        tc.pack(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_records_of_tokens_are_arrays_and_other_files_are_reported(tmp_path, folder):
    index = {"chunks": [{"chunk_bytes": 30, "chunk_size": 2, "dim": 7, "filename": "chunk-0-0.bin"}]}
    leaf = {"type": None, "context": None, "children_spec": []}
    index["config"] = {"data_format": ["no_header_tensor:20"], "data_spec": json.dumps([1, leaf])}
    index["config"] |= {"compression": None, "item_loader": "TokensLoader"}
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "chunk-0-0.bin").write_bytes(struct.pack("<4I7H", 2, 16, 22, 30, *range(7)))
    (folder / "README.md").write_text("x")
    with pytest.warns(UserWarning, match=r"README\.md: the index does not list it"):
        tc.pack(folder, tmp_path / "out")
    assert [record["tokens"].tolist() for record in tc.Dataset(tmp_path / "out")] == [[0, 1, 2], [3, 4, 5, 6]]


def test_a_chunk_that_is_missing_is_named_before_anything_is_written(tmp_path, folder):
    write_litdata(folder, [ROWS, ROWS])
    (folder / "chunk-0-1.bin").unlink()
    with pytest.raises(SchemaError, match=r"it lists 2 chunks, of which 'chunk-0-1\.bin' does not exist"):
        tc.pack(folder, tmp_path / "out")


def test_damage_is_a_bad_record_and_the_other_chunks_are_packed(tmp_path, folder):
    write_litdata(folder, [ROWS, ROWS, ROWS])
    path = folder / "chunk-0-1.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(SchemaError, match=r"chunk-0-1\.bin, from record 19 on: damaged chunk: the chunk ends early"):
        tc.pack(folder, tmp_path / "other")
    damaged = bytearray(whole)
    damaged[whole.index(b"t7")] = 0xFF
    path.write_bytes(damaged)
    with pytest.warns(UserWarning, match="1 bad records"):
        assert tc.pack(folder, tmp_path / "out", on_error="skip").n_records == 59
    (line,) = (tmp_path / "out.bad.jsonl").read_text().splitlines()
    assert json.loads(line)["location"] == f"{path}, record 7"
    assert json.loads(line)["reason"].startswith("the leaf 'text' is no str: 'utf-8' codec")


TABLE = [{"id": i, "ok": i % 2 == 0, "turns": [{"who": "a", "n": i}] * (i % 3), "tags": [str(i)]} for i in range(300)]


class TestTables:
    def test_records_of_plain_values_have_the_columns_of_their_tables(self, tmp_path, folder):
        later = [{**row, "note": None} for row in TABLE[:5]]
        write_litdata(folder, [TABLE, TABLE[:7], later], as_tables=True)
        schema = {"note": "str?"}
        tc.pack(
            folder, tmp_path / "out", schema=schema, shard_size=3000, block_size=500, columns=["id", "turns", "note"]
        )
        expected = [{"id": row["id"], "turns": row["turns"], "note": None} for row in [*TABLE, *TABLE[:7], *later]]
        assert list(tc.Dataset(tmp_path / "out")) == expected
        tc.pack(folder, tmp_path / "all", schema=schema)
        assert str(tc.Dataset(tmp_path / "all").schema.columns[1]) == "bool"
        assert [row["ok"] for row in tc.Dataset(tmp_path / "all")][:300] == [row["ok"] for row in TABLE]

    def test_their_text_becomes_tokens(self, tmp_path, folder):
        write_litdata(folder, [ROWS], as_tables=True)
        tc.pack(folder, tmp_path / "out", tokenize="bytes")
        found = [(record["id"], bytes(record["tokens"].tolist()).decode()) for record in tc.Dataset(tmp_path / "out")]
        assert found == [(row["id"], row["text"]) for row in ROWS]

    def test_a_column_that_the_first_chunk_lacks_and_one_of_nulls_need_a_type(self, tmp_path, folder):
        write_litdata(folder, [TABLE, [{"id": 1, "new": 2}]], as_tables=True)
        with pytest.raises(SchemaError, match=r"chunk-0-1\.bin, from record 0 on: .* no column 'new'; specify"):
            tc.pack(folder, tmp_path / "out")
        write_litdata(folder, [[{"id": 1, "new": None}]], as_tables=True)
        with pytest.raises(SchemaError, match=r"column 'new': .*chunk-0-0\.bin: only null in its records; specify"):
            tc.pack(folder, tmp_path / "out")

    @pytest.mark.parametrize("at", [0, 1])
    def test_damage_is_a_bad_record_and_the_other_chunks_are_packed(self, tmp_path, folder, at):
        write_litdata(folder, [TABLE, TABLE], as_tables=True)
        path = folder / "chunk-0-1.bin"
        data = path.read_bytes()
        path.write_bytes([data[:-3], data[:-12] + b"\xff" * 4 + data[-8:]][at])
        with pytest.warns(UserWarning, match="1 bad records"):
            assert tc.pack(folder, tmp_path / "out", on_error="skip").n_records == 300
        (line,) = (tmp_path / "out.bad.jsonl").read_text().splitlines()
        assert json.loads(line)["location"] == f"{path}, from record 0 on"


@given(st.integers(0, 500), st.binary(min_size=1, max_size=4))
def test_any_damage_of_a_chunk_gives_records_and_bad_records(tmp_path_factory, at, noise):
    folder = tmp_path_factory.mktemp("damaged")
    write_litdata(folder, [ROWS, ROWS])
    store = open_store(f"memory://{folder.name}")
    for path in folder.iterdir():
        data = path.read_bytes()
        if path.name == "chunk-0-1.bin":
            data = data[:at] + noise + data[at + len(noise) :]
        store.put(path.name, data)
    source, _ = find_source(f"memory://{folder.name}", SourceOptions())
    batches = [batch for split in source.splits for batch in source.read(split, 100)]
    assert sum(batch.n_records for batch in batches) >= 20
