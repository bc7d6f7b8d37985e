"""Records that a function changes while they are packed, and data sets of several parts."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from tests.support.image_files import png
from tests.support.layout_cases import write_mds
from typer.testing import CliRunner

import tiercache as tc
from tiercache.cli.app import app
from tiercache.errors import CommitConflict, SchemaError
from tiercache.packer.plan import PackOptions, plan_pack

N = 600
ROWS = [{"id": i, "text": f"text {i}", "tokens": list(range(i % 5))} for i in range(N)]
SMALL = {"shard_size": 3000, "block_size": 500}


@pytest.fixture
def source(tmp_path):
    """A folder of two Parquet files of several row groups."""
    folder = tmp_path / "in"
    folder.mkdir()
    schema = pa.schema([("id", pa.int32()), ("text", pa.string()), ("tokens", pa.list_(pa.uint16()))])
    for number, rows in enumerate((ROWS[:350], ROWS[350:])):
        pq.write_table(pa.Table.from_pylist(rows, schema), folder / f"{number}.parquet", row_group_size=40)
    return folder


def read(url):
    return list(tc.Dataset(url))


def evens(record):
    return None if record["id"] % 2 else {**record, "length": len(record["text"])}


def twice(record):
    return [record, {**record, "id": record["id"] + 1000}]


def fail_at_seven(record):
    return {"inverse": 1.0 / (int(record["id"]) - 7)}


class TestMap:
    @pytest.mark.parametrize("workers", [1, 2])
    def test_records_are_changed_left_out_and_added(self, source, tmp_path, workers):
        version = tc.pack(source, tmp_path / "evens", map=evens, workers=workers, **SMALL)
        assert version.n_shards > 3
        found = read(tmp_path / "evens")
        assert [record["id"] for record in found] == list(range(0, N, 2))
        assert all(record["length"] == len(record["text"]) for record in found)
        tc.pack(source, tmp_path / "twice", map="tests.flow.packer.test_map_and_split:twice", workers=workers, **SMALL)
        assert [record["id"] for record in read(tmp_path / "twice")] == [n for i in range(N) for n in (i, i + 1000)]

    def test_columns_that_are_passed_on_keep_their_types_and_values_are_those_that_a_dataset_serves(
        self, source, tmp_path
    ):
        tc.pack(source, tmp_path / "plain")
        seen = []

        def keep(record):
            seen.append(record)
            return {"n": int(record["id"]), **record}

        tc.pack(source, tmp_path / "out", map=keep)
        types = {column.name: str(column) for column in tc.Dataset(tmp_path / "out").schema.columns}
        plain = {column.name: str(column) for column in tc.Dataset(tmp_path / "plain").schema.columns}
        assert types == {"n": "int64", **plain}
        served = tc.Dataset(tmp_path / "plain")[4]
        record = next(one for one in seen if one["id"] == 4)
        assert record["tokens"].dtype == served["tokens"].dtype == np.uint16
        assert type(record["id"]) is type(served["id"])

    def test_images_stay_images_with_the_classes_of_their_folders(self, tmp_path):
        for name in ("cat", "dog"):
            (tmp_path / "in" / name).mkdir(parents=True)
            for i in range(3):
                (tmp_path / "in" / name / f"{i}.png").write_bytes(png(f"{name}{i}".encode()))

        def other_bytes(record):
            return {"image": record["image"] + b" ", "label": record["label"], "name": Path(record["path"]).stem}

        tc.pack(tmp_path / "in", tmp_path / "out", map=other_bytes)
        dataset = tc.Dataset(tmp_path / "out")
        assert [str(column) for column in dataset.schema.columns] == ["image", "int64", "str"]
        assert list(dataset.classes) == ["cat", "dog"]
        assert dataset[5]["image"].endswith(b" ")

    def test_arrays_of_other_libraries_reach_the_function_as_arrays(self, tmp_path):
        (tmp_path / "in").mkdir()
        columns = write_mds(tmp_path / "in")
        shapes = []

        def shape_of(record):
            shapes.append({name: value.shape for name, value in record.items() if isinstance(value, np.ndarray)})
            return {"id": record["id"]}

        tc.pack(tmp_path / "in", tmp_path / "out", map=shape_of, schema={"id": "int64"})
        expected = {name for name, values in columns.items() if isinstance(values[0], np.ndarray)}
        assert all(set(one) >= expected for one in shapes)
        assert shapes[3] == {name: columns[name][3].shape for name in shapes[3]}

    def test_a_schema_is_enough_where_the_function_returns_no_record(self, source, tmp_path):
        with pytest.raises(SchemaError, match="returned no record of those that were tried"):
            tc.pack(source, tmp_path / "out", map=lambda _record: None)
        tc.pack(source, tmp_path / "out", map=lambda _record: None, schema={"twice": "int64"})
        assert (len(tc.Dataset(tmp_path / "out")), tc.Dataset(tmp_path / "out").column_names) == (0, ["twice"])

    def test_a_record_on_which_the_function_fails_is_a_bad_record(self, source, tmp_path):
        with pytest.raises(
            SchemaError, match=r"0\.parquet, row group 0, row 7: fail_at_seven\(\) failed: ZeroDivisionError: .*line"
        ):
            tc.pack(source, tmp_path / "out", map=fail_at_seven)
        with pytest.warns(UserWarning, match="1 bad record"):
            tc.pack(source, tmp_path / "out", map=fail_at_seven, on_error="dead-letter", workers=2, **SMALL)
        assert len(read(tmp_path / "out")) == N - 1
        (line,) = map(json.loads, Path(f"{tmp_path / 'out'}.bad.jsonl").read_text().splitlines())
        assert line["content"]["text"] == "text 7"
        with pytest.raises(SchemaError, match=r"must return a record \(a dict\), a list of records, or None"):
            tc.pack(source, tmp_path / "other", map=lambda record: 5)

    def test_bad_records_of_the_source_are_reported_with_their_own_numbers(self, tmp_path):
        lines = [json.dumps({"x": i}) for i in range(1200)]  # types follow from the first 1,000
        lines[20], lines[1100] = "{", json.dumps({"x": "no number"})
        (tmp_path / "a.jsonl").write_text("\n".join(lines))

        def negative(record):
            if record["x"] == 40:
                raise ValueError("forty")
            return {"y": -record["x"]}

        with pytest.warns(UserWarning, match="3 bad records"):
            tc.pack(tmp_path / "a.jsonl", tmp_path / "out", map=negative, on_error="skip", block_size=100)
        assert [record["y"] for record in read(tmp_path / "out")] == [
            -i for i in range(1200) if i not in (20, 40, 1100)
        ]
        report = [json.loads(line) for line in Path(f"{tmp_path / 'out'}.bad.jsonl").read_text().splitlines()]
        assert sorted(line["location"].rpartition(" ")[2] for line in report) == ["1101", "21", "41"]

    def test_the_text_that_a_function_makes_is_tokenized(self, source, tmp_path):
        options = {"map": lambda record: {"text": record["text"].upper()}, "tokenize": "bytes"}
        tc.pack(source, tmp_path / "out", **options)
        assert bytes(read(tmp_path / "out")[599]["tokens"].astype(np.uint8)) == b"TEXT 599"

    def test_another_function_is_another_packing_and_its_results_must_fit_the_data_set(self, source, tmp_path):
        def stop(progress):
            if progress.n_records > 200:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tc.pack(source, tmp_path / "out", map=evens, on_progress=stop, **SMALL)
        assert plan_pack(source, tmp_path / "out", PackOptions(map=evens, **SMALL)).finished
        assert not plan_pack(source, tmp_path / "out", PackOptions(map=twice, **SMALL)).finished
        tc.pack(source, tmp_path / "out", map=evens, **SMALL)
        tc.pack(source, tmp_path / "out", map=evens, mode="append")
        assert [record["id"] for record in read(tmp_path / "out")] == 2 * list(range(0, N, 2))
        with pytest.raises(SchemaError, match="length"):
            tc.pack(source, tmp_path / "out", map=twice, mode="append")
        with pytest.raises(ValueError, match="has no 'absent'"):
            tc.pack(source, tmp_path / "new", map="tests.flow.packer.test_map_and_split:absent")
        with pytest.raises(ValueError, match=r"tests\.flow: expected 'module:function'"):
            tc.pack(source, tmp_path / "new", map="tests.flow")
        with pytest.raises(ValueError, match="cannot be sent to other processes"):
            tc.pack(source, tmp_path / "new", map=lambda record: record, workers=2)


SHARES = {"train": 0.8, "val": 0.2}


class TestSplit:
    def test_the_parts_are_data_sets_with_each_record_once_for_any_number_of_workers(self, source, tmp_path):
        for workers in (1, 2):
            tc.pack(source, tmp_path / f"{workers}", split=SHARES, workers=workers, **SMALL)
        parts = {part: [record["id"] for record in read(tmp_path / "1" / part)] for part in SHARES}
        assert sorted(parts["train"] + parts["val"]) == list(range(N))
        assert parts["train"] == sorted(parts["train"])
        assert 0.7 * N < len(parts["train"]) < 0.9 * N
        assert parts == {part: [record["id"] for record in read(tmp_path / "2" / part)] for part in SHARES}
        assert not list((tmp_path / "1" / "_tiercache").rglob("*.json"))

    @pytest.mark.parametrize("kind", ["parquet", "jsonl", "objects"])
    def test_records_with_equal_keys_stay_together_as_in_a_split_by_hash(self, tmp_path, kind):
        rows = [{"user": f"user {i % 37}", "group": i % 11, "x": i} for i in range(N)]
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=40)
        elif kind == "jsonl":
            (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = rows if kind == "objects" else tmp_path / f"a.{kind}"
        tc.pack(given, tmp_path / "all")
        for key in ("user", "group"):
            tc.pack(given, tmp_path / key, split=SHARES, split_by=key)
            expected = tc.Dataset(tmp_path / "all").split(SHARES, seed=0, by_hash=key)
            for part, dataset in expected.items():
                assert [r["x"] for r in read(tmp_path / key / part)] == [r["x"] for r in dataset]

    def test_text_that_arrow_holds_as_views_is_filtered_and_divided(self, tmp_path):
        text = pa.array([f"k{i % 37}" for i in range(500)], pa.string_view())
        nested = pa.StructArray.from_arrays([text, text.cast(pa.binary_view())], ["a", "b"])
        table = pa.table({"x": range(500), "k": text, "nested": nested})
        tc.pack(table, tmp_path / "out", split={"a": 0.5, "b": 0.5}, split_by="k", filter=pc.field("k") != "k1")
        tc.pack(table, tmp_path / "whole")
        expected = [record for record in read(tmp_path / "whole") if record["k"] != "k1"]
        parts = [read(tmp_path / "out" / part) for part in "ab"]
        assert min(map(len, parts)) > 0
        assert sorted(parts[0] + parts[1], key=lambda record: record["x"]) == expected

    def test_bad_records_are_in_one_report_and_a_part_without_records_is_an_empty_data_set(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"user": 1}\n{\n{"user": 1}\n')
        with pytest.warns(UserWarning, match="1 bad record"):
            tc.pack(tmp_path / "a.jsonl", tmp_path / "out", split=SHARES, split_by="user", on_error="skip")
        assert sorted(len(tc.Dataset(tmp_path / "out" / part)) for part in SHARES) == [0, 2]

    def test_parts_are_appended_to_and_existing_ones_are_not_overwritten_by_create(self, source, tmp_path):
        tc.pack(source, tmp_path / "out", split=SHARES, **SMALL)
        with pytest.raises(CommitConflict, match="train"):
            tc.pack(source, tmp_path / "out", split=dict.fromkeys(SHARES, 0.5), **SMALL)
        tc.pack(source, tmp_path / "out", split=SHARES, mode="append", **SMALL)
        assert sum(len(tc.Dataset(tmp_path / "out" / part)) for part in SHARES) == 2 * N

    def test_wrong_splits_are_refused_with_what_was_expected(self, source, tmp_path):
        for split, by, error, text in (
            ({"train": 0.9, "val": 0.2}, None, ValueError, "sum up to 1"),
            ({"a/b": 0.5, "c": 0.5}, None, ValueError, "cannot be named 'a/b'"),
            ({"_tiercache": 0.5, "c": 0.5}, None, ValueError, "cannot be named '_tiercache'"),
            (SHARES, "nope", SchemaError, "nope"),
            (SHARES, "tokens", SchemaError, "split_by= takes a column of keys"),
            (None, "id", ValueError, "split_by= names the key of split="),
        ):
            with pytest.raises(error, match=text):
                tc.pack(source, tmp_path / "out", split=split, split_by=by)
        done = CliRunner().invoke(app, ["pack", str(source), str(tmp_path / "out"), "--split", "train=x"])
        assert done.exit_code != 0
        assert "such as train=0.9,val=0.1" in " ".join(done.stderr.split())

    def test_the_command_maps_splits_and_prints_each_part(self, source, tmp_path):
        done = CliRunner().invoke(
            app,
            [
                *("pack", str(source), str(tmp_path / "out"), "--json", "--split", "train=0.8,val=0.2"),
                *("--split-by", "id", "--map", "tests.flow.packer.test_map_and_split:evens"),
            ],
        )
        assert done.exit_code == 0, done.stderr
        events = [json.loads(line) for line in done.stdout.splitlines()]
        assert [event["url"].rpartition("/")[2] for event in events] == ["train", "val"]
        assert sum(event["records"] for event in events) == N // 2
