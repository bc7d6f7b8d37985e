"""Packing of data in the layouts of other libraries: the records are those that `Dataset` reads in place."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tests.support.image_files import png
from tests.support.layout_cases import CASES
from tests.support.token_and_arrow_cases import CASES as TOKEN_AND_ARROW_CASES
from typer.testing import CliRunner

import tiercache as tc
from tiercache.cli.app import app
from tiercache.errors import SchemaError
from tiercache.packer.plan import PackOptions, plan_pack
from tiercache.shard.versions import find_version, read_shards
from tiercache.store import open_store

BY_NAME = {case.name: case for case in [*CASES, *TOKEN_AND_ARROW_CASES]}


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", str(tmp_path / "default-cache"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def same(found, expected) -> bool:
    if isinstance(expected, np.ndarray):
        return found.dtype == expected.dtype and found.shape == expected.shape and np.array_equal(found, expected)
    return bool(found == expected) and (found is None) == (expected is None)


def shard_counts(path):
    with closing(open_store(path)) as store:
        return read_shards(store, find_version(store, None)).n_records.tolist()


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.filterwarnings("ignore:.*not packed")
def test_packed_records_equal_those_that_were_written(name, folder, tmp_path):
    columns = BY_NAME[name].write(folder)
    n_records = len(next(iter(columns.values())))
    # Shards of 64 KiB: several tasks, and blocks of a layout that begin and end in other shards.
    tc.pack(folder, tmp_path / "out", shard_size="64KiB", block_size="16KiB")
    packed, in_place = tc.Dataset(tmp_path / "out"), tc.Dataset(folder)
    assert len(packed) == n_records
    assert {column.name: str(column) for column in packed.schema.columns} == BY_NAME[name].types
    assert [column.classes for column in packed.schema.columns] == [
        column.classes for column in in_place.schema.columns
    ]
    for i, record in enumerate(packed):
        for column, values in columns.items():
            assert same(record[column], values[i]), (i, column, record[column], values[i])


def test_the_shards_are_the_same_for_any_number_of_workers(folder, tmp_path):
    BY_NAME["mds"].write(folder)
    for workers in (1, 2):
        tc.pack(folder, tmp_path / f"out{workers}", workers=workers, shard_size="16KiB", block_size="4KiB")
    one, two = (tc.Dataset(tmp_path / f"out{workers}") for workers in (1, 2))
    assert [record["id"] for record in one] == [record["id"] for record in two]
    counts = [shard_counts(tmp_path / f"out{workers}") for workers in (1, 2)]
    assert counts[0] == counts[1]
    assert len(counts[0]) > 2


@pytest.mark.parametrize("name", ["part0_text_document.idx", "part0_text_document"])
def test_one_file_of_a_layout_is_packed_alone(folder, tmp_path, name):
    columns = BY_NAME["megatron"].write(folder)
    tc.pack(folder / name, tmp_path / "out")
    packed = tc.Dataset(tmp_path / "out")
    assert 0 < len(packed) < len(columns["tokens"])
    assert all(same(record["tokens"], tokens) for record, tokens in zip(packed, columns["tokens"], strict=False))


def test_types_and_columns_of_a_layout_may_be_chosen(folder, tmp_path):
    table = pa.table({"x": pa.array([1, 2, 3]), "y": ["a", "b", "c"]})
    with pa.OSFile(str(folder / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    tc.pack(folder, tmp_path / "typed", schema={"x": "int8"})
    assert [str(column) for column in tc.Dataset(tmp_path / "typed").schema.columns] == ["int8", "str"]
    tc.pack(folder, tmp_path / "some", schema=pa.schema([pa.field("y", pa.string(), nullable=False)]))
    assert list(tc.Dataset(tmp_path / "some")) == [{"y": "a"}, {"y": "b"}, {"y": "c"}]
    with pytest.raises(SchemaError, match="z"):
        plan_pack(folder, tmp_path / "other", PackOptions(schema={"z": "int8"}))
    tc.pack(folder, tmp_path / "typed", mode="append")
    assert [record["x"] for record in tc.Dataset(tmp_path / "typed")] == [1, 2, 3, 1, 2, 3]


def test_files_of_a_layout_beside_those_of_another_kind_are_ambiguous(folder, tmp_path):
    BY_NAME["megatron"].write(folder)
    (folder / "vocab.json").unlink()
    (folder / "cat.png").write_bytes(png(b"cat"))
    with pytest.raises(ValueError, match="1 of images, 2 of megatron"):
        plan_pack(folder, tmp_path / "out", PackOptions())
    with pytest.warns(UserWarning, match=r"cat\.png"):
        tc.pack(folder, tmp_path / "out", kind="megatron")
    (folder / "part0_text_document.bin").unlink()
    (folder / "part1_text_document.bin").unlink()
    assert plan_pack(folder, tmp_path / "images", PackOptions()).source.schema.names == ("image", "path")
    with pytest.raises(SchemaError, match="kind='megatron'"):
        plan_pack(folder, tmp_path / "images", PackOptions(kind="megatron"))


def test_a_damaged_block_is_a_bad_record_and_all_others_are_packed(folder, tmp_path):
    columns = BY_NAME["mds-zstd"].write(folder)
    damaged = max(folder.glob("*.mds.zstd"), key=lambda path: path.stat().st_size)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    damaged.write_bytes(data)
    done = CliRunner().invoke(app, ["pack", str(folder), str(tmp_path / "stopped")])
    assert done.exit_code != 0
    assert damaged.name in done.stderr
    with pytest.warns(UserWarning, match="1 bad record"):
        tc.pack(folder, tmp_path / "out", on_error="skip")
    assert 0 < len(tc.Dataset(tmp_path / "out")) < len(next(iter(columns.values())))
    report = Path(f"{tmp_path / 'out'}.bad.jsonl").read_text()
    assert damaged.name in report
    assert ", records 0 to " in report
