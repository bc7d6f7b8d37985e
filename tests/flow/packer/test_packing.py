"""From a source to a committed data set."""

import gzip
import json
import os
from multiprocessing import active_children
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.image_files import jpeg, png

from tiercache.crash_points import set_hook
from tiercache.data.dataset import Dataset
from tiercache.data.packing import pack_sequences
from tiercache.errors import CommitConflict, NotFound, SchemaError, StoreError, TierCacheError
from tiercache.packer import tables
from tiercache.packer.pack import pack, run_pack
from tiercache.packer.plan import PackOptions, plan_pack
from tiercache.shard.gc import collect_garbage
from tiercache.shard.packings import list_packings
from tiercache.shard.reader import ShardReader
from tiercache.shard.schema import Image, Kind, Ragged, Schema
from tiercache.shard.versions import Commit, find_latest, latest, read_shards
from tiercache.shard.writer import Writer
from tiercache.store import open_store

NESTED_SCHEMA = pa.schema(
    {
        "list": pa.list_(pa.string()),
        "deep": pa.list_(pa.list_(pa.int64())),
        "struct": pa.struct({"a": pa.int64(), "b": pa.list_(pa.int8())}),
        "map": pa.map_(pa.string(), pa.int64()),
        "number": pa.int64(),
    }
)
SMALL = st.none() | st.integers(0, 9)
VALUES = {
    "list": st.lists(st.none() | st.sampled_from("ab"), max_size=2),
    "deep": st.lists(st.none() | st.lists(SMALL, max_size=2), max_size=2),
    "struct": st.fixed_dictionaries({"a": SMALL, "b": st.none() | st.lists(SMALL, max_size=2)}),
    "map": st.lists(st.tuples(st.sampled_from("ab"), SMALL), max_size=2),
    "number": st.integers(0, 9),
}
PNG = png()


def read(url, **options):
    """All records, in order, shard by shard; reads by another way than pack writes."""
    store = open_store(url, **options)
    version = latest(store)
    records = []
    for info in read_shards(store, version).infos():
        with ShardReader(store, info.name, info=info) as reader:
            columns = range(len(reader.schema))
            values = reader.take(np.arange(reader.n_records), list(columns))
            records += [{v.column.name: v.record(i) for v in values} for i in range(reader.n_records)]
    return records


def is_empty(url):
    return list(open_store(url).list()) == []


@pytest.fixture
def photos(tmp_path):
    """Three classes, 30 pictures; class order is not folder order of creation."""
    for name in ("dog", "cat", "ant-eater"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "photos" / name / f"{i}.png").write_bytes(png(name.encode() * i))
    (tmp_path / "photos" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "photos" / "dog" / ".hidden.txt").write_bytes(b"x")
    return tmp_path / "photos"


def photo_records(names=("ant-eater", "cat", "dog")):
    return [
        {"image": png(name.encode() * i), "label": label, "path": f"{name}/{i}.png"}
        for label, name in enumerate(names)
        for i in range(10)
    ]


class TestImages:
    def test_a_folder_becomes_images_labels_and_paths_in_order(self, photos, tmp_path):
        progress = []
        version = pack(photos, tmp_path / "out", on_progress=progress.append)
        assert version.n_records == 30
        assert str(version.schema.columns[0]) == "image"
        assert version.schema.columns[1].classes == ("ant-eater", "cat", "dog")
        assert read(tmp_path / "out") == photo_records()
        assert progress[-1].n_records == 30
        assert progress[-1].n_bytes == progress[-1].total_bytes > 0

    def test_appending_keeps_the_meaning_of_labels(self, photos, tmp_path):
        pack(photos, tmp_path / "out")
        (photos / "dog" / "plain").write_bytes(png(b"plain"))  # its bytes say its encoding
        version = pack(photos, tmp_path / "out", kind="images", mode="append", include=["dog"], exclude=["[5-9].png"])
        assert (version.number, version.n_records) == (2, 36)
        assert [(r["label"], r["path"]) for r in read(tmp_path / "out")[34:]] == [(2, "dog/4.png"), (2, "dog/plain")]
        (photos / "emu").mkdir()
        (photos / "emu" / "1.png").write_bytes(PNG)
        with pytest.raises(SchemaError, match="class 'emu' is not among the 3 classes 'ant-eater', 'cat', 'dog'"):
            pack(photos, tmp_path / "out", mode="append")


class TestParquet:
    def table(self, n=100, seed=0):
        rng = np.random.default_rng(seed)
        return pa.table(
            {
                "id": pa.array(range(n), pa.int32()),
                "text": pa.array([f"t{i}" for i in range(n)]),
                "maybe": pa.array([None if i == 7 else float(i) for i in range(n)]),
                "word": pa.array(["a", "b"] * (n // 2)).dictionary_encode(),
                "vector": pa.FixedSizeListArray.from_arrays(pa.array(rng.random(n * 3, np.float32)), 3),
                "tags": pa.array([["x"] * (i % 3) for i in range(n)]),
            }
        )

    def test_parquet_values_and_types_are_kept_and_only_nulls_make_a_column_nullable(self, tmp_path):
        table = self.table()
        pq.write_table(table, tmp_path / "in.parquet", row_group_size=30)
        version = pack(tmp_path / "in.parquet", tmp_path / "out")
        assert {c.name: str(c) for c in version.schema.columns if c.kind is not Kind.ARROW} == {
            "id": "int32",
            "text": "str",
            "maybe": "float64?",
            "word": "str",
            "vector": "float32[3]",
        }
        assert version.schema.columns[-1].nullable  # tags: Parquet counts their empty lists as nulls
        records = read(tmp_path / "out")
        expected = table.to_pylist()
        assert [{**r, "vector": r["vector"].tolist()} for r in records] == expected

    @given(
        st.sets(st.sampled_from(NESTED_SCHEMA.names)).flatmap(
            lambda with_nulls: st.lists(
                st.fixed_dictionaries({n: st.none() | v if n in with_nulls else v for n, v in VALUES.items()}),
                min_size=1,
                max_size=12,
            )
        )
    )
    def test_a_nested_column_that_has_a_null_is_nullable(self, records):
        table = pa.Table.from_pylist(records, NESTED_SCHEMA)
        store = open_store("memory://test-pack-nested-nulls")
        for i, part in enumerate((table[:5], table[5:])):
            sink = pa.BufferOutputStream()
            pq.write_table(part, sink, row_group_size=2)
            store.put(f"in/{i}.parquet", sink.getvalue().to_pybytes())
        plan = plan_pack("memory://test-pack-nested-nulls/in", "memory://test-pack-nested-nulls/out", PackOptions())
        nullable = {column.name for column in plan.source.schema.columns if column.nullable}
        assert nullable >= {name for name in table.column_names if table[name].null_count}

    def test_lists_of_numbers_become_ragged_arrays_and_their_tokens_can_be_packed_into_rows(self, tmp_path):
        documents = [[1, 2, 3], [4, 5], [6, 7, 8]]
        table = pa.table({"tokens": pa.array(documents, pa.list_(pa.int32())), "label": [0, 1, 0]})
        pq.write_table(table, tmp_path / "in.parquet")
        version = pack(tmp_path / "in.parquet", tmp_path / "out", classes={"label": ["ant", "bee"]})
        assert [str(c) for c in version.schema.columns] == ["int32[*]", "int64"]
        assert version.schema.columns[1].classes == ("ant", "bee")
        assert [r["tokens"].tolist() for r in read(tmp_path / "out")] == documents
        rows = pack_sequences(Dataset(tmp_path / "out"), "tokens", length=4)
        assert [row["tokens"].tolist() for row in rows] == [[1, 2, 3, 4], [5, 6, 7, 8]]
        pack(tmp_path / "in.parquet", tmp_path / "out", mode="append", classes={"label": ["ant", "bee"]})
        with pytest.raises(SchemaError, match="column 'label': the appended batch has other class names"):
            pack(tmp_path / "in.parquet", tmp_path / "out", mode="append", classes={"label": ["ant"]})

    def test_a_list_with_nulls_inside_is_an_error_that_names_its_type(self, tmp_path):
        pq.write_table(pa.table({"x": [[1], [2, None]], "word": [["a"], ["b", None]]}), tmp_path / "in.parquet")
        with pytest.raises(SchemaError, match=r"column 'x'.*row 1: .*nulls inside, whose type is list<int64\?>"):
            pack(tmp_path / "in.parquet", tmp_path / "out")
        with pytest.raises(
            SchemaError, match=r"column 'word'.*row 1: expected list<str>, got a value with nulls inside"
        ):
            pack(tmp_path / "in.parquet", tmp_path / "out", schema={"x": "list<int64?>", "word": "list<str>"})
        pack(tmp_path / "in.parquet", tmp_path / "out", schema={"x": "list<int64?>", "word": "list<str?>"})
        assert read(tmp_path / "out")[1] == {"x": [2, None], "word": ["b", None]}

    def test_other_files_in_a_folder_of_parquet_files_are_skipped(self, tmp_path):
        (tmp_path / "in").mkdir()
        for i in range(3):
            pq.write_table(pa.table({"x": range(i * 10, i * 10 + 10)}), tmp_path / "in" / f"part-{i}.parquet")
        (tmp_path / "in" / "_SUCCESS").write_text("")
        pack(tmp_path / "in", tmp_path / "out")
        assert [r["x"] for r in read(tmp_path / "out")] == list(range(30))
        pack(tmp_path / "in" / "part-[02].parquet", tmp_path / "out2")
        assert [r["x"] for r in read(tmp_path / "out2")] == [*range(10), *range(20, 30)]

    def test_a_type_in_the_schema_replaces_the_type_of_the_files(self, tmp_path):
        pq.write_table(pa.table({"image": [jpeg(), jpeg()], "x": [1, 2]}), tmp_path / "in.parquet")
        version = pack(tmp_path / "in.parquet", tmp_path / "out", schema={"image": Image("jpeg")})
        assert [str(c) for c in version.schema.columns] == ["image<jpeg>", "int64"]
        version = pack(tmp_path / "in.parquet", tmp_path / "only", schema=Schema.of({"x": "int8"}))
        assert [str(c) for c in version.schema.columns] == ["int8"]
        with pytest.raises(SchemaError, match="column 'z': no such column"):
            pack(tmp_path / "in.parquet", tmp_path / "no", schema=Schema.of({"z": "int8"}))
        with pytest.raises(SchemaError, match=r"column 'y': .*no such column; there are image, x"):
            pack(tmp_path / "in.parquet", tmp_path / "no", schema={"y": "int8"})

    def test_a_value_that_does_not_fit_names_file_and_row(self, tmp_path):
        pq.write_table(pa.table({"x": [*range(200)]}), tmp_path / "in.parquet", row_group_size=150)
        with pytest.raises(SchemaError, match=r"column 'x': .*in\.parquet, row group 0, row 128: expected int8"):
            pack(tmp_path / "in.parquet", tmp_path / "out", schema={"x": "int8"})
        assert is_empty(tmp_path / "out")

    def test_files_with_different_columns_are_named(self, tmp_path):
        for other, message in (
            ({"x": ["1"]}, r"column 'x': .*b\.parquet: expected int64 as in .*a\.parquet, got string"),
            ({"y": ["1"]}, r"b\.parquet: its columns differ from those of .*a\.parquet: x, y"),
        ):
            pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
            pq.write_table(pa.table(other), tmp_path / "b.parquet")
            with pytest.raises(SchemaError, match=message):
                pack(tmp_path / "*.parquet", tmp_path / "out")
        pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "a.parquet")
        with pytest.raises(SchemaError, match=r"a\.parquet: the file has two columns") as caught:
            pack(tmp_path / "a.parquet", tmp_path / "out")
        assert caught.value.column == "a"


class TestJsonLines:
    records: ClassVar = [
        {"id": i, "tokens": list(range(i % 4)), "text": f"é{i}", "extra": {"k": [i, None]}} for i in range(50)
    ]

    def write(self, path, records=None):
        lines = [json.dumps(r) for r in (self.records if records is None else records)]
        data = ("\n".join(lines) + "\n").encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return path

    def check(self, url):
        found = [{**r, "tokens": r["tokens"].tolist()} for r in read(url)]
        assert found == self.records

    @pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson"])
    def test_lines_become_records(self, tmp_path, name):
        version = pack(self.write(tmp_path / name), tmp_path / "out")
        assert [str(c) for c in version.schema.columns] == ["int64", "int64[*]", "str", "json"]
        self.check(tmp_path / "out")

    def test_every_split_of_a_file_into_byte_ranges_reads_each_line_once(self, tmp_path, monkeypatch):
        self.write(tmp_path / "a.jsonl")
        whole = (tmp_path / "a.jsonl").read_bytes()
        for part_bytes in (1, 7, 60, len(whole) - 1, len(whole)):
            monkeypatch.setattr(tables, "SPLIT_BYTES", part_bytes)
            pack(tmp_path / "a.jsonl", tmp_path / "out", mode="overwrite")
            self.check(tmp_path / "out")

    @pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
    def test_an_invalid_line_is_named(self, tmp_path, name):
        for bad, message in (
            ('{"x": "one"}', r"column 'x': .*line 1003: expected int64, got a str"),
            ('{"x": null}', r"column 'x': .*line 1003: expected int64, got None"),
            ('{"x": 1, "y": 2}', r"column 'y': .*line 1003: a column that the schema lacks; specify its type"),
            ("{}", r"column 'x': .*line 1003: expected int64, got None"),
            ("[1]", "line 1003: expected a JSON object, got list"),
            ('{"x": 1', "line 1003: not JSON"),
            ('{"x": 9223372036854775808}', "line 1003: expected int64"),
        ):
            data = ("".join(f'{{"x": {i}}}\n' for i in range(1001)) + "\n" + bad + "\n").encode()
            (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
            with pytest.raises(SchemaError, match=message):
                pack(tmp_path / name, tmp_path / "out", block_size=1000)
            assert is_empty(tmp_path / "out")
        if name.endswith("gz"):
            (tmp_path / name).write_bytes(gzip.compress(data)[:500])
            with pytest.raises(SchemaError, match=r"a\.jsonl\.gz: damaged gzip file"):
                pack(tmp_path / name, tmp_path / "out")

    def test_the_schema_can_name_a_column_that_appears_late_or_all(self, tmp_path):
        path = self.write(tmp_path / "a.jsonl", [{"x": i} for i in range(1000)] + [{"x": 1000, "late": "here"}])
        pack(path, tmp_path / "out", schema={"late": "str?", "x": "int32"})
        records = read(tmp_path / "out")
        assert records[0] == {"x": 0, "late": None}
        assert records[1000] == {"x": 1000, "late": "here"}
        schema = Schema.of({"x": "int8", "t": Ragged("uint16", (None,))})
        path.write_text("")
        assert pack(path, tmp_path / "empty", schema=schema).n_records == 0
        assert pack(self.write(path, [{"x": 1, "t": [1]}]), tmp_path / "empty", mode="append").schema == schema

    def test_a_data_set_inside_its_source_is_not_packed(self, tmp_path):
        (tmp_path / "a.json").write_text('{"a": 1}\n')
        pack(tmp_path, tmp_path / "out")
        assert pack(tmp_path, tmp_path / "out", mode="append").n_records == 2


class TestModes:
    def test_appending_needs_a_data_set_of_the_same_schema(self, photos, tmp_path):
        with pytest.raises(NotFound, match="no data set to append to"):
            pack(photos, tmp_path / "out", mode="append")
        (tmp_path / "a.jsonl").write_text('{"x": 1}')
        pack(tmp_path / "a.jsonl", tmp_path / "out")
        with pytest.raises(SchemaError, match="column 'x'"):
            plan_pack(photos, tmp_path / "out", PackOptions(mode="append"))

    def test_appended_values_must_fit_the_existing_columns(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"x": 1, "y": null, "f": 0.5}\n{"x": 2, "y": 3, "f": 1.5}\n')
        pack(tmp_path / "a.jsonl", tmp_path / "out", schema={"x": "int8"})
        (tmp_path / "b.jsonl").write_text('{"x": 3, "f": 2}\n')
        pack(tmp_path / "b.jsonl", tmp_path / "out", mode="append")
        pq.write_table(pa.table({"f": [2.5], "y": [4], "x": [5]}), tmp_path / "c.parquet")
        pack(tmp_path / "c.parquet", tmp_path / "out", mode="append")
        assert read(tmp_path / "out") == [
            {"x": 1, "y": None, "f": 0.5},
            {"x": 2, "y": 3, "f": 1.5},
            {"x": 3, "y": None, "f": 2.0},
            {"x": 5, "y": 4, "f": 2.5},
        ]
        (tmp_path / "d.jsonl").write_text('{"x": 1000, "f": 2}\n')
        with pytest.raises(SchemaError, match=r"column 'x': .*d\.jsonl, line 1: expected int8"):
            pack(tmp_path / "d.jsonl", tmp_path / "out", mode="append")
        pq.write_table(pa.table({"f": [2.5], "x": [5]}), tmp_path / "e.parquet")
        with pytest.raises(SchemaError, match="column 'y': the data set has this column"):
            pack(tmp_path / "e.parquet", tmp_path / "out", mode="append")


def shards_of(url):
    """Numbers of records of each block, by shard, and all records."""
    store, blocks = open_store(url), []
    for info in read_shards(store, latest(store)).infos():
        with ShardReader(store, info.name, info=info) as reader:
            blocks.append(reader.footer.block_records.tolist())
    return blocks, read(url)


def remove_all(url):
    store = open_store(url)
    store.delete([info.key for info in store.list()])


@given(
    n_lines=st.lists(st.integers(0, 60), min_size=1, max_size=8),
    shard_bytes=st.sampled_from([300, 1000, 5000]),
    stops=st.lists(st.integers(1, 12), max_size=12),
)
def test_a_packing_that_is_stopped_anywhere_and_continued_writes_the_same_shards(n_lines, shard_bytes, stops):
    source = open_store("memory://test-pack-stops/in")
    remove_all("memory://test-pack-stops")
    for i, n in enumerate(n_lines):
        lines = (f'{{"x": {i * 100 + j}, "text": "{"y" * (j % 50)}"}}\n' for j in range(n))
        source.put(f"{i}.jsonl", "".join(lines).encode())
    options = {"schema": Schema.of({"x": "int64", "text": "str"}), "shard_size": shard_bytes, "block_size": 200}
    pack(source.url, "memory://test-pack-stops/whole", **options)
    for n_batches in [*stops, 0]:
        calls = iter(range(n_batches - 1, -2, -1))

        def stop(_progress, calls=calls):
            if next(calls, -1) == 0:
                raise KeyboardInterrupt

        try:
            pack(source.url, "memory://test-pack-stops/stopped", on_progress=stop, **options)
            break
        except KeyboardInterrupt:
            continue
    assert shards_of("memory://test-pack-stops/stopped") == shards_of("memory://test-pack-stops/whole")
    keys = {info.key for info in open_store("memory://test-pack-stops/stopped").list("_tiercache/packing/")}
    assert keys == set()


class TestProcesses:
    def lines(self, path, n=4000):
        path.write_text("".join(f'{{"x": {i}, "text": "{"y" * (i % 50)}"}}\n' for i in range(n)))
        return path

    def test_several_processes_keep_the_order_of_the_source(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tables, "SPLIT_BYTES", 5000)
        self.lines(tmp_path / "a.jsonl")
        progress = []
        version = pack(tmp_path / "a.jsonl", tmp_path / "out", workers=2, shard_size=2000, on_progress=progress.append)
        assert version.n_shards > 4
        assert [r["x"] for r in read(tmp_path / "out")] == list(range(4000))
        assert progress[-1].n_records == 4000

    def test_any_number_of_processes_writes_the_same_shards(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tables, "SPLIT_BYTES", 5000)
        self.lines(tmp_path / "a.jsonl")
        for workers in (1, 2, 5):
            version = pack(tmp_path / "a.jsonl", tmp_path / str(workers), workers=workers, shard_size=10_000)
            assert version.n_shards > 4
            assert shards_of(tmp_path / str(workers)) == shards_of(tmp_path / "1")

    def test_records_that_gc_removes_from_a_packing_that_goes_on_are_an_error_and_are_packed_again(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(tables, "SPLIT_BYTES", 5000)
        self.lines(tmp_path / "a.jsonl")
        options = {"mode": "append", "shard_size": 10_000}
        Writer(tmp_path / "out", schema={"x": "int64", "text": "str"}).close()

        def collect(point):
            if point == "packing.tasks_finished":
                collect_garbage(open_store(tmp_path / "out"), older_than_s=0)

        before = set_hook(collect)
        try:
            with pytest.raises(StoreError, match=r"records of (\d+) of \1 finished tasks .*run the same command again"):
                pack(tmp_path / "a.jsonl", tmp_path / "out", **options)
        finally:
            set_hook(before)
        assert read(tmp_path / "out") == []
        pack(tmp_path / "a.jsonl", tmp_path / "out", **options)
        assert [r["x"] for r in read(tmp_path / "out")] == list(range(4000))
        assert list(list_packings(open_store(tmp_path / "out"))) == []

    def test_after_an_error_what_is_finished_stays_and_a_changed_source_is_another_packing(
        self, tmp_path, monkeypatch, caplog
    ):
        monkeypatch.setattr(tables, "SPLIT_BYTES", 5000)
        good = self.lines(tmp_path / "a.jsonl").read_text()
        (tmp_path / "a.jsonl").write_text(good + '{"x": "bad", "text": ""}\n')
        with pytest.raises(SchemaError, match=r"column 'x': .*a\.jsonl, line 4001: expected int64, got a str"):
            pack(tmp_path / "a.jsonl", tmp_path / "out", workers=2, shard_size=20_000)
        assert find_latest(open_store(tmp_path / "out")) is None
        plan = plan_pack(tmp_path / "a.jsonl", tmp_path / "out", PackOptions(shard_size=20_000))
        assert set() != set(plan.finished) <= set(range(len(plan.tasks) - 1))
        (tmp_path / "a.jsonl").write_text(good)
        plan = plan_pack(tmp_path / "a.jsonl", tmp_path / "out", PackOptions(shard_size=20_000))
        assert plan.finished == frozenset()
        assert "with other options, were not finished, and are left to gc: 1" in caplog.text
        run_pack(plan)
        assert [r["x"] for r in read(tmp_path / "out")] == list(range(4000))

    def test_a_killed_worker_process_is_an_error_after_which_the_packing_continues(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tables, "SPLIT_BYTES", 5000)
        self.lines(tmp_path / "a.jsonl")
        options = PackOptions(workers=2, shard_size=20_000)

        def kill_the_children(_progress):
            for child in active_children():
                child.kill()

        with pytest.raises(
            TierCacheError, match=r"a worker process died \(exit code -9\); the system may have killed it"
        ):
            run_pack(plan_pack(tmp_path / "a.jsonl", tmp_path / "out", options), kill_the_children)
        assert run_pack(plan_pack(tmp_path / "a.jsonl", tmp_path / "out", options))[""].n_records == 4000
        assert [r["x"] for r in read(tmp_path / "out")] == list(range(4000))


def test_a_finished_task_whose_shards_were_deleted_or_whose_record_is_damaged_runs_again(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_text("".join(f'{{"x": {i * 1000 + j}}}\n' for j in range(1000)))

    def stop(progress):
        if progress.n_records > 2000:
            raise KeyboardInterrupt

    def finished():
        return sorted((tmp_path / "out").glob("_tiercache/packing/*/*/*.json"))

    for damage in ("shard", "record", "start"):
        with pytest.raises(KeyboardInterrupt):
            pack(tmp_path / "*.jsonl", tmp_path / "out", mode="overwrite", shard_size=10_000, on_progress=stop)
        assert len(finished()) == 2
        if damage == "shard":
            next((tmp_path / "out").glob("shards/*.tcs")).unlink()
        else:
            path = finished()[0] if damage == "record" else next(finished()[0].parent.parent.glob("start-*"))
            path.write_bytes(path.read_bytes().replace(b"0", b"1"))
        pack(tmp_path / "*.jsonl", tmp_path / "out", mode="overwrite", shard_size=10_000)
        assert [r["x"] for r in read(tmp_path / "out")] == list(range(3000))
        for shard in (tmp_path / "out").glob("shards/*.tcs"):
            shard.unlink()


def test_two_processes_that_run_the_same_packing_commit_it_once(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_text("".join(f'{{"x": {i * 1000 + j}}}\n' for j in range(1000)))
    pack(tmp_path / "0.jsonl", tmp_path / "out")
    other = []

    def run_the_other(progress):
        if not other and progress.n_records > 1000:  # when one of the tasks is finished, and the second has begun
            other.append(None)
            other[0] = pack(tmp_path / "*.jsonl", tmp_path / "out", mode="append", shard_size=10_000)

    version = pack(tmp_path / "*.jsonl", tmp_path / "out", mode="append", shard_size=10_000, on_progress=run_the_other)
    assert version == other[0]
    assert version.number == 2
    assert [r["x"] for r in read(tmp_path / "out")] == [*range(1000), *range(3000)]


def keys_of(url: Path) -> set[str]:
    return {info.key for info in open_store(url).list()}


class TestTheSameCommandAfterItsEnd:
    def test_a_data_set_of_the_same_files_is_left_as_it_is(self, photos, tmp_path):
        version = pack(photos, tmp_path / "out")
        before = keys_of(tmp_path / "out")
        for workers in (1, 2):
            assert pack(photos, tmp_path / "out", workers=workers) == version
            assert keys_of(tmp_path / "out") == before
        assert pack(tmp_path / "out", tmp_path / "copy") == pack(tmp_path / "out", tmp_path / "copy")

    def test_files_that_were_changed_are_another_source_although_their_sizes_are_the_same(self, tmp_path):
        source, out = tmp_path / "x.jsonl", tmp_path / "out"
        source.write_text('{"x": 1}\n')
        pack(source, out)
        source.write_text('{"x": 2}\n')
        os.utime(source, ns=(1, 1))
        with pytest.raises(CommitConflict, match="a data set exists already"):
            pack(source, out)
        assert pack(source, out, mode="overwrite").number == 2
        assert [r["x"] for r in read(out)] == [2]

    def test_a_data_set_that_has_newer_versions_is_not_that_of_the_command(self, photos, tmp_path):
        pack(photos, tmp_path / "out")
        pack(photos, tmp_path / "out", mode="append")
        with pytest.raises(CommitConflict, match=r"a data set exists already \(version 2, 60 records\)"):
            pack(photos, tmp_path / "out")

    def test_objects_whose_content_is_unknown_are_refused(self, tmp_path):
        pack(lambda i: {"x": i}, [1, 2], tmp_path / "out")
        with pytest.raises(CommitConflict, match="a data set exists already"):
            pack(lambda i: {"x": i}, [1, 2], tmp_path / "out")


def test_a_packing_of_files_that_were_changed_after_a_kill_begins_anew(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for i in range(3):
        (source / f"{i}.jsonl").write_text(f'{{"x": {i}}}\n' * 1000)

    def stop(progress):
        if progress.n_records > 1000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, out, shard_size=10_000, on_progress=stop)
    assert any(records.shards for records in list_packings(open_store(out)))
    (source / "0.jsonl").write_text('{"x": 7}\n' * 1000)
    pack(source, out, shard_size=10_000)
    assert [r["x"] for r in read(out)] == [7] * 1000 + [1] * 1000 + [2] * 1000


def test_ctrl_c_or_a_lost_answer_during_the_commit_deletes_nothing_and_the_same_command_continues(
    photos, tmp_path, monkeypatch
):
    run = Commit.run

    def struck(commit):
        run(commit)
        raise KeyboardInterrupt

    def lost(_commit):
        raise StoreError("the answer was lost", url="x", maybe_done=True)

    monkeypatch.setattr(Commit, "run", struck)
    with pytest.raises(KeyboardInterrupt):
        pack(photos, tmp_path / "out")
    assert read(tmp_path / "out") == photo_records()
    monkeypatch.setattr(Commit, "run", lost)
    assert pack(photos, tmp_path / "out").number == 1  # the version that is there
    with pytest.raises(StoreError, match="the answer was lost"):
        pack(photos, tmp_path / "other")
    monkeypatch.setattr(Commit, "run", run)
    kept = {info.key for info in open_store(tmp_path / "other").list("shards/")}
    pack(photos, tmp_path / "other")
    assert {info.key for info in open_store(tmp_path / "other").list("shards/")} == kept != set()
