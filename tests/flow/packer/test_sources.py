"""What every source of packing guarantees, and what is particular to the sources of tables."""

import csv
import gzip
import json
import pickle
import random
from contextlib import closing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.feather
import pyarrow.orc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.image_files import png
from tests.support.litdata_files import write_litdata
from tests.support.tfrecord_files import example, tfrecords
from typer.testing import CliRunner

import tiercache as tc
from tiercache.cli.app import app
from tiercache.errors import CorruptShard, SchemaError
from tiercache.packer.pack import pack
from tiercache.packer.plan import PackOptions, plan_pack
from tiercache.packer.sources import SourceOptions, find_source, narrow
from tiercache.packer.transform import select_source
from tiercache.shard.schema import Schema
from tiercache.store import open_store

N = 300
ROWS = [{"id": i, "text": f"text, {i}\n", "score": i / 2} for i in range(N)]
TABLE = pa.Table.from_pylist(ROWS)


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def images(folder):
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for i in range(80):
            (folder / name / f"{i:03d}.png").write_bytes(png(f"{name}{i}".encode()))
    return [{"label": n, "path": f"{name}/{i:03d}.png"} for n, name in enumerate(("cat", "dog")) for i in range(80)]


def files(folder):
    for i in range(150):
        (folder / f"{i:03d}.bin").write_bytes(bytes([i]) * i)
    return [{"bytes": bytes([i]) * i, "path": f"{i:03d}.bin"} for i in range(150)]


def parquet(folder):
    pq.write_table(TABLE[:200], folder / "a.parquet", row_group_size=30)
    pq.write_table(TABLE[200:], folder / "b.parquet", row_group_size=30)
    return ROWS


def csv_files(folder):
    write_csv(folder / "a.csv", ROWS[:200])
    write_csv(folder / "b.csv", ROWS[200:])
    return ROWS


def feather(folder):
    pa.feather.write_feather(TABLE[:200], folder / "a.feather", chunksize=30)
    pa.feather.write_feather(TABLE[200:], folder / "b.feather", compression="zstd")
    return ROWS


def orc(folder):
    pa.orc.write_table(TABLE[:200], folder / "a.orc")
    pa.orc.write_table(TABLE[200:], folder / "b.orc")
    return ROWS


def arrow(folder):
    for name, table in (("a", TABLE[:200]), ("b", TABLE[200:])):
        with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=30)
    return ROWS


def jsonl(folder):
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:200]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS[200:]).encode()))
    return ROWS


def numpy(folder):
    rng = np.random.default_rng(0)
    x, y = rng.random((N, 3), np.float32), np.arange(N)
    for name, rows in (("a", slice(0, 200)), ("b", slice(200, N))):
        np.savez(folder / f"{name}.npz", x=x[rows], y=y[rows], text=np.char.add("t", y[rows].astype(str)))
    return [{"x": x[i].tolist(), "y": i, "text": f"t{i}"} for i in range(N)]


def tfrecord(folder):
    examples = [example({"id": [i], "text": [f"t{i}".encode()], "x": np.float32([i / 2, 1])}) for i in range(N)]
    (folder / "a.tfrecord-00000-of-00002").write_bytes(tfrecords(examples[:200]))
    (folder / "a.tfrecord-00001-of-00002").write_bytes(gzip.compress(tfrecords(examples[200:])))
    return [{"id": i, "text": f"t{i}".encode(), "x": [i / 2, 1]} for i in range(N)]


def litdata(folder):
    rows = [{"id": i, "text": f"t{i}", "tokens": np.arange(i % 5, dtype=np.int32)} for i in range(N)]
    write_litdata(folder, [rows[:200], rows[200:]])
    return [{**row, "tokens": row["tokens"].tolist()} for row in rows]


SOURCES = {"images": images, "files": files, "parquet": parquet, "csv": csv_files, "feather": feather, "orc": orc}
SOURCES |= {"jsonl": jsonl, "arrow": arrow, "numpy": numpy, "tfrecord": tfrecord, "litdata": litdata}


def plain(value):
    return value.tolist() if hasattr(value, "tolist") else value


def records_of(source, split, batch_bytes=1000):
    records = []
    for batch in source.read(split, batch_bytes):
        assert not batch.bad
        columns = batch.columns
        rows = columns.to_pylist() if isinstance(columns, pa.RecordBatch) else None
        if rows is None:
            rows = [{name: plain(values[i]) for name, values in columns.items()} for i in range(batch.n_records)]
        assert len(rows) == batch.n_records
        records += rows
    return records


@pytest.fixture(params=SOURCES, scope="module")
def made(request, tmp_path_factory):
    """A source of each kind and the records that it must have, as far as they are stated."""
    folder = tmp_path_factory.mktemp(request.param)
    expected = SOURCES[request.param](folder)
    source, skipped = find_source(folder, SourceOptions(kind="files" if request.param == "files" else None))
    assert not skipped
    return source, expected


class TestEverySource:
    def test_the_splits_in_order_have_the_records_in_order(self, made):
        source, expected = made
        found = [record for split in source.splits for record in records_of(source, split)]
        assert [{name: record[name] for name in expected[0]} for record in found] == expected
        assert all(tuple(record) == source.schema.names for record in found)

    def test_a_split_has_the_same_records_whichever_were_read_before_and_in_another_process(self, made):
        source, _ = made
        in_order = {split: records_of(source, split) for split in source.splits}
        copy = pickle.loads(pickle.dumps(source))
        assert copy.splits == source.splits
        assert copy.schema == source.schema
        assert repr(copy) == repr(source)
        for split in random.Random(0).sample(source.splits, len(source.splits)):
            assert records_of(copy, split, batch_bytes=10**9) == in_order[split]

    def test_each_record_has_a_location_of_its_own_that_names_a_file(self, made):
        source, expected = made
        found = [b.location(i) for s in source.splits for b in source.read(s, 500) for i in range(b.n_records)]
        assert len(set(found)) == len(expected)
        assert all(source.files.root in location for location in found)

    def test_the_schema_has_no_nullable_column_without_nulls_and_the_records_can_be_packed(self, made, tmp_path):
        source, expected = made
        assert not any(c.nullable for c in source.schema.columns if not str(c).startswith("list"))
        root = source.files.root
        version = pack(root, tmp_path / "out", kind="files" if "bytes" in source.schema.names else None)
        assert version.n_records == len(expected)

    def test_columns_and_a_filter_select_the_values_that_the_whole_source_has(self, made):
        source, expected = made
        key = next(name for name in ("path", "id", "y") if name in expected[0])
        other = next(name for name in expected[0] if name != key)
        some = [record[key] for record in expected[::7]]
        selected = select_source(source, [other], pc.field(key).isin(some), narrow)
        assert selected.schema.names == (other,)
        copy = pickle.loads(pickle.dumps(selected))
        assert repr(copy) == repr(selected)
        found = [record for split in copy.splits for record in records_of(copy, split)]
        assert found == [{other: record[other]} for record in expected[::7]]
        batches = [batch for split in copy.splits for batch in source.read(split, 1000)]
        places = [batch.location(i) for batch in batches for i in range(batch.n_records)]
        chosen = [b.location(i) for split in copy.splits for b in copy.read(split, 1000) for i in range(b.n_records)]
        assert chosen == places[::7]


def upper(record):
    return {"text": record["text"].upper()}


class TestSelection:
    @pytest.mark.parametrize("kind", ["parquet", "feather", "orc"])
    def test_columns_that_are_not_selected_are_not_read(self, tmp_path, kind):
        noise = [random.Random(i).randbytes(500).hex() for i in range(500)]
        table = pa.table({"id": range(500), "noise": noise})
        path = tmp_path / f"a.{kind}"
        write, options = {
            "parquet": (pq.write_table, {}),
            "feather": (pa.feather.write_feather, {"chunksize": 250}),
            "orc": (pa.orc.write_table, {"stripe_size": 100_000, "batch_size": 100}),
        }[kind]
        write(table, path, compression="zstd", **options)
        data = bytearray(path.read_bytes())
        start, end = len(data) * 6 // 10, len(data) * 9 // 10  # the first record batch, or stripe, is inspected
        data[start:end] = bytes(end - start)
        path.write_bytes(data)
        with pytest.raises(SchemaError, match="not readable"):
            pack(path, tmp_path / "whole", kind=kind, schema={"id": "int64?", "noise": "str?"})
        pack(path, tmp_path / "out", columns=["id"], filter=pc.field("id") >= 100)
        found = list(tc.Dataset(tmp_path / "out"))
        assert found == [{"id": i} for i in range(100, 500)]

    def test_columns_of_a_data_set_that_are_not_selected_are_not_read(self, tmp_path):
        rows = [{"id": i, "noise": random.Random(i).randbytes(5000)} for i in range(200)]
        pack(rows, tmp_path / "set", block_size=50_000, compression="none")
        (path,) = (tmp_path / "set" / "shards").glob("*.tcs")
        path.write_bytes(path.read_bytes().replace(rows[160]["noise"], bytes(5000)))  # 100 records are inspected
        with closing(tc.Dataset(tmp_path / "set")) as dataset:
            with pytest.raises(CorruptShard):
                pack(dataset, tmp_path / "whole")
            pack(dataset, tmp_path / "out", columns=["id"], filter=pc.field("id") > 20)
        assert list(tc.Dataset(tmp_path / "out")) == [{"id": i} for i in range(21, 200)]

    def test_a_filter_is_applied_before_a_function_and_a_value_that_does_not_fit_it_is_a_bad_record(self, tmp_path):
        rows = [{"id": i, "n": i % 5 if i != 7 else "seven"} for i in range(20)]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"schema": {"n": "int64"}, "filter": pc.field("n") == 2, "columns": ["id"]}
        with pytest.raises(SchemaError, match=r"line 8: its values do not fit the filter: .*seven"):
            pack(tmp_path / "a.jsonl", tmp_path / "other", **options)
        with pytest.warns(UserWarning, match="1 bad records"):
            pack(tmp_path / "a.jsonl", tmp_path / "out", on_error="skip", **options)
        assert [record["id"] for record in tc.Dataset(tmp_path / "out")] == [2, 12, 17]
        pack([{"id": i} for i in range(4)], tmp_path / "objects", filter=pc.bit_wise_and(pc.field("id"), 1) == 1)
        assert [record["id"] for record in tc.Dataset(tmp_path / "objects")] == [1, 3]

    def test_appending_needs_the_columns_of_the_data_set_after_the_selection(self, tmp_path):
        write_csv(tmp_path / "a.csv", ROWS)
        out = tmp_path / "out"
        pack(tmp_path / "a.csv", out, columns=["score", "id"], schema={"id": "int16"}, workers=2)
        pack(tmp_path / "a.csv", out, columns=["id", "score"], filter=pc.field("id") == 5, mode="append")
        assert tc.Dataset(out)[N] == {"score": 2.5, "id": 5}
        with pytest.raises(SchemaError, match="text"):
            pack(tmp_path / "a.csv", out, filter=pc.field("id") == 5, mode="append")

    def test_a_selection_comes_before_a_function_tokens_and_a_split(self, tmp_path):
        write_csv(tmp_path / "a.csv", ROWS)
        given = {
            "columns": ["text"],
            "filter": pc.bit_wise_and(pc.field("id"), 1) == 0,
            "map": "tests.flow.packer.test_sources:upper",
            "tokenize": "bytes",
            "split": {"a": 0.5, "b": 0.5},
        }
        expected = sorted(list(row["text"].upper().encode()) for row in ROWS if row["id"] % 2 == 0)
        for workers in (1, 2):
            out = tmp_path / f"out-{workers}"
            pack(tmp_path / "a.csv", out, workers=workers, shard_size=2000, block_size=500, **given)
            found = [record["tokens"].tolist() for part in "ab" for record in tc.Dataset(out / part)]
            assert sorted(found) == expected

    def test_other_columns_and_another_filter_are_another_packing(self, tmp_path):
        (tmp_path / "in").mkdir()
        for i in range(5):
            write_csv(tmp_path / "in" / f"{i}.csv", ROWS)
        sizes = {"shard_size": 1000, "block_size": 300}
        many = list(range(0, N, 2))
        given = {"columns": ["id"], "filter": pc.field("id").isin(many)}

        def stop(progress):
            if progress.n_bytes > progress.total_bytes // 2:  # also if columns are not read
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pack(tmp_path / "in", tmp_path / "out", on_progress=stop, **given, **sizes)
        for other, is_same in (
            ({}, True),
            ({"columns": ["id", "score"]}, False),
            ({"filter": pc.field("id").isin([*many[:50], 1, *many[51:]])}, False),
            ({"filter": None}, False),
        ):
            plan = plan_pack(tmp_path / "in", tmp_path / "out", PackOptions(**given | other, **sizes))
            assert bool(plan.finished) is is_same, other
        pack(tmp_path / "in", tmp_path / "out", **given, **sizes)
        assert [record["id"] for record in tc.Dataset(tmp_path / "out")] == many * 5

    def test_the_command_packs_columns(self, tmp_path):
        write_csv(tmp_path / "a.csv", ROWS)
        done = CliRunner().invoke(
            app, ["pack", str(tmp_path / "a.csv"), str(tmp_path / "out"), "--columns", "score,id"]
        )
        assert done.exit_code == 0, done.stderr
        assert tc.Dataset(tmp_path / "out").schema.names == ("score", "id")

    def test_the_command_packs_the_records_of_a_condition(self, tmp_path):
        write_csv(tmp_path / "a.csv", ROWS)
        arguments = ["pack", str(tmp_path / "a.csv"), str(tmp_path / "out"), "--columns", "text", "--where"]
        done = CliRunner().invoke(app, [*arguments, "id >= 10 and score < 7"])
        assert done.exit_code == 0, done.stderr
        assert [record["text"] for record in tc.Dataset(tmp_path / "out")] == [row["text"] for row in ROWS[10:14]]
        done = CliRunner().invoke(app, [*arguments, "id >"])
        assert done.exit_code != 0
        assert "--where" in done.stderr

    def test_what_there_is_not_is_refused_before_anything_is_written(self, tmp_path):
        write_csv(tmp_path / "a.csv", ROWS)
        for options, error, match in (
            ({"columns": ["nope"]}, SchemaError, "nope"),
            ({"columns": "id"}, TypeError, "columns must be a sequence of names"),
            ({"columns": ["id", "id"]}, ValueError, "columns= names a column twice"),
            ({"filter": pc.field("nope") == 1}, SchemaError, "there is no such column; there are id, text, score"),
            ({"filter": pc.field("id") + 1}, SchemaError, "cannot evaluate"),
            ({"filter": "id = 1"}, TypeError, "filter must be an expression of pyarrow"),
        ):
            with pytest.raises(error, match=match):
                pack(tmp_path / "a.csv", tmp_path / "out", **options)
            assert not (tmp_path / "out").exists()


class TestTables:
    @pytest.mark.parametrize("kind", ["parquet", "csv", "feather", "orc"])
    def test_folders_of_hive_partitions_become_columns(self, tmp_path, kind):
        for year in (2023, 2024):
            folder = tmp_path / f"year={year}" / "site=a"
            folder.mkdir(parents=True)
            SOURCES[kind](folder)
        source, _ = find_source(tmp_path, SourceOptions())
        assert source.schema.names == ("id", "text", "score", "year", "site")
        found = [record for split in source.splits for record in records_of(source, split)]
        assert found == [{**row, "year": year, "site": "a"} for year in (2023, 2024) for row in ROWS]

    @pytest.mark.parametrize("kind", ["parquet", "csv", "feather", "orc"])
    def test_a_schema_selects_columns_and_states_their_types(self, tmp_path, kind):
        SOURCES[kind](tmp_path)
        source, _ = find_source(tmp_path, SourceOptions(schema=Schema.of({"score": "float32", "id": "int16"})))
        assert source.schema.names == ("score", "id")
        first = records_of(source, source.splits[0])[:2]
        assert first == [{"score": 0.0, "id": 0}, {"score": 0.5, "id": 1}]
        with pytest.raises(SchemaError, match="no such column; there are id, text, score"):
            find_source(tmp_path, SourceOptions(schema={"nope": "int8"}))

    @pytest.mark.parametrize("kind", ["parquet", "feather", "orc"])
    def test_a_file_that_is_cut_off_is_named(self, tmp_path, kind):
        SOURCES[kind](tmp_path)
        path = tmp_path / f"b.{kind}"
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(SchemaError, match=rf"b\.{kind}: not a readable file"):
            find_source(tmp_path, SourceOptions())


class TestCsv:
    def test_bad_rows_are_found_between_good_ones_with_their_numbers(self, tmp_path):
        lines = [f"{i},w{i}" for i in range(1, 1001)]
        for row, text in ((3, "3,w3,more"), (500, "x,w500"), (501, "501"), (502, ""), (1000, "1e400x,y")):
            lines[row - 1] = text
        (tmp_path / "a.csv").write_text("id,word\n" + "\n".join(lines[:501] + lines[502:]) + "\n")
        options = SourceOptions(schema={"id": "int64", "word": "str"})
        source, _ = find_source(tmp_path, options)
        batches = list(source.read(source.splits[0], 1000))
        rows = [row for batch in batches if batch.n_records for row in batch.columns["id"].to_pylist()]
        good = [i for i in range(1, 1001) if i not in (3, 500, 501, 502, 1000)]
        assert rows == good
        bad = [(one.location.rpartition("row ")[2], one.column, one.reason) for batch in batches for one in batch.bad]
        assert [(row, column) for row, column, _ in bad] == [
            ("3", None),
            ("500", "id"),
            ("501", None),
            ("999", "id"),
        ]
        assert "expected 2 fields, got 3" in bad[0][2]
        assert "expected int64, got invalid value 'x'" in bad[1][2]

    @given(
        st.lists(
            st.tuples(st.integers(-9, 9), st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4)),
            min_size=1,
            max_size=40,
        ),
        st.sets(st.integers(0, 39)),
    )
    def test_rows_that_do_not_fit_are_left_out_and_no_other(self, rows, wrong):
        store = open_store("memory://test-csv-rows")
        sink = pa.BufferOutputStream()
        table = pa.table(
            {"n": ["x" if i in wrong else str(n) for i, (n, _) in enumerate(rows)], "t": [t for _, t in rows]}
        )
        pa.csv.write_csv(table, sink)
        store.put("in/a.csv", sink.getvalue().to_pybytes())
        source, _ = find_source("memory://test-csv-rows/in", SourceOptions(schema={"n": "int8", "t": "str"}))
        batches = list(source.read(source.splits[0], 100))
        found = [(r["n"], r["t"]) for b in batches if b.n_records for r in b.columns.to_pylist()]
        assert found == [row for i, row in enumerate(rows) if i not in wrong]
        locations = [one.location.rpartition("row ")[2] for batch in batches for one in batch.bad]
        assert locations == [str(i + 1) for i in sorted(wrong) if i < len(rows)]

    @pytest.mark.parametrize(("name", "delimiter"), [("a.tsv", "\t"), ("a.csv", ";"), ("a.csv.gz", ",")])
    def test_the_header_shows_the_delimiter_and_files_may_be_compressed(self, tmp_path, name, delimiter):
        text = f"id{delimiter}word\n1{delimiter}a\n2{delimiter}b\n".encode()
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        source, _ = find_source(tmp_path, SourceOptions())
        assert records_of(source, source.splits[0]) == [{"id": 1, "word": "a"}, {"id": 2, "word": "b"}]

    def test_types_that_files_disagree_about_are_joined_and_columns_are_not(self, tmp_path):
        (tmp_path / "a.csv").write_text("x,y\n1,1\n")
        (tmp_path / "b.csv").write_text("y,x\nword,0.5\n")
        plan = plan_pack(tmp_path, tmp_path / "out", PackOptions())
        assert {c.name: str(c) for c in plan.source.schema.columns} == {"x": "float64", "y": "str"}
        (tmp_path / "c.csv").write_text("x,z\n1,1\n")
        with pytest.raises(SchemaError, match=r"c\.csv: its columns differ from those of .*a\.csv: y, z"):
            plan_pack(tmp_path, tmp_path / "out", PackOptions())

    def test_a_file_without_values_in_a_column_has_no_say_in_its_type(self, tmp_path):
        (tmp_path / "a.csv").write_text("x,y\n")
        (tmp_path / "b.csv").write_text("x,y\n1,\n")
        (tmp_path / "c.csv").write_text("x,y\n2,0.5\n")
        tc.pack(tmp_path, tmp_path / "out")
        assert str(tc.Dataset(tmp_path / "out").schema) == "Schema(x: int64, y: float64?)"
        assert list(tc.Dataset(tmp_path / "out").to_pandas()["x"]) == [1, 2]

    def test_two_columns_of_one_name_are_an_error(self, tmp_path):
        (tmp_path / "a.csv").write_text("x,x\n1,2\n")
        with pytest.raises(SchemaError, match=r"'x': .*a\.csv: the file has two columns with this name"):
            plan_pack(tmp_path, tmp_path / "out", PackOptions())

    def test_identifiers_with_leading_zeros_stay_text_on_request(self, tmp_path):
        (tmp_path / "a.csv").write_text("id\n007\n012\n")
        source, _ = find_source(tmp_path, SourceOptions(schema={"id": "str"}))
        assert [r["id"] for r in records_of(source, source.splits[0])] == ["007", "012"]
