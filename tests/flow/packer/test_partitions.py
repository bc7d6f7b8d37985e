"""Hive partitions: the folders of a source name columns, packed and in place."""

import json
from contextlib import closing

import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as ds
import pyarrow.feather
import pyarrow.orc
import pyarrow.parquet as pq
import pytest

import tiercache as tc
from tiercache.errors import SchemaError
from tiercache.packer.pack import pack
from tiercache.packer.plan import PackOptions, plan_pack


def write(folder, path, table):
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), folder / path)


def test_partitions_become_columns_as_pyarrow_reads_them(tmp_path):
    table = pa.table(
        {"x": list(range(12)), "year": [2023, 2024] * 6, "month": [1, 2, 3] * 4, "site": ["a b", "c/d", None] * 4}
    )
    pq.write_to_dataset(table, tmp_path / "in", partition_cols=["year", "month", "site"])
    version = pack(tmp_path / "in", tmp_path / "out")
    assert [(c.name, str(c)) for c in version.schema.columns] == [
        ("x", "int64"),
        ("year", "int64"),
        ("month", "int64"),
        ("site", "str?"),
    ]
    with closing(tc.Dataset(tmp_path / "out")) as dataset:
        packed = {r["x"]: (r["year"], r["month"], r["site"]) for r in (dataset[i] for i in range(len(dataset)))}
    assert packed == {r["x"]: (r["year"], r["month"], r["site"]) for r in table.to_pylist()}


def test_the_schema_decides_the_type_of_a_partition_column(tmp_path):
    write(tmp_path / "in", "id=007/a.parquet", {"x": [1]})
    version = pack(tmp_path / "in", tmp_path / "out", schema={"id": "str"})
    assert str(version.schema.columns[1]) == "str"
    with closing(tc.Dataset(tmp_path / "out")) as dataset:
        assert dataset[0]["id"] == "007"
    write(tmp_path / "in", "id=eight/a.parquet", {"x": [1]})
    with pytest.raises(SchemaError, match="eight"):
        pack(tmp_path / "in", tmp_path / "other", schema={"id": "int32"})


def test_a_stored_column_takes_precedence_and_files_with_different_partition_columns_are_refused(tmp_path):
    write(tmp_path / "in", "year=2024/a.parquet", {"x": [1], "year": [1999]})
    pack(tmp_path / "in", tmp_path / "out")
    with closing(tc.Dataset(tmp_path / "out")) as dataset:
        assert (dataset[0]["x"], dataset[0]["year"]) == (1, 1999)
    write(tmp_path / "in", "b.parquet", {"x": [1], "year": [1999]})
    with pytest.raises(SchemaError, match="'year'"):
        plan_pack(tmp_path / "in", tmp_path / "out", PackOptions(mode="overwrite"))


def write_json_lines(table, path):
    path.write_text("".join(json.dumps(record) + "\n" for record in table.to_pylist()))


WRITERS = {
    "parquet": pq.write_table,
    "feather": pyarrow.feather.write_feather,
    "orc": pyarrow.orc.write_table,
    "csv": pyarrow.csv.write_csv,
    "jsonl": write_json_lines,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_partitions_of_all_tables_are_those_that_pyarrow_finds(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", str(tmp_path / "cache"))
    folders = ("day=1/site=a%20b%2Fc", "day=1/site=__HIVE_DEFAULT_PARTITION__", "day=-2/site=%C3%A9=%25")
    for number, folder in enumerate(folders):
        (tmp_path / "in" / folder).mkdir(parents=True)
        WRITERS[kind](pa.table({"x": [number, number]}), tmp_path / "in" / folder / f"a.{kind}")
    found = ds.dataset(tmp_path / "in", format="json" if kind == "jsonl" else kind, partitioning="hive").to_table()
    expected = sorted((r["x"], r["day"], r["site"]) for r in found.to_pylist())
    assert {row[2] for row in expected} == {"a b/c", None, "é=%"}
    assert pa.types.is_integer(found.schema.field("day").type)
    pack(tmp_path / "in", tmp_path / "out")
    in_place = [tc.Dataset(tmp_path / "in")] if kind in ("parquet", "feather") else []
    for dataset in [tc.Dataset(tmp_path / "out"), *in_place]:
        assert [str(column) for column in dataset.schema.columns] == ["int64", "int64", "str?"]
        assert sorted((r["x"], r["day"], r["site"]) for r in dataset) == expected
