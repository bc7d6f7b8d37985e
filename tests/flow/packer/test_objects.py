"""Functions of inputs and Python objects as sources of a packing."""

import os
import sys

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from tests.flow.packer.test_packing import read, shards_of

import tiercache as tc
from tiercache.errors import SchemaError
from tiercache.packer.plan import PackOptions, plan_pack


def records_of(number):
    """Records of an input: none for each tenth, a record for odd ones, otherwise some."""
    if number % 10 == 0:
        return None
    if number % 2:
        return {"x": number, "text": f"t{number}"}
    return ({"x": number, "text": "y" * i} for i in range(number % 5))


EXPECTED = [
    {"x": n, "text": text}
    for n in range(300)
    if n % 10
    for text in ([f"t{n}"] if n % 2 else ["y" * i for i in range(n % 5)])
]


CALLS: list[int] = []  # of a function of a test


CALLS = []


class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, i):
        return {"square": torch.tensor(i * i), "name": str(i)}


def make_squares():
    return Squares()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_records_of_a_function_are_packed_in_the_order_of_the_inputs(tmp_path, workers):
    version = tc.pack(records_of, range(300), tmp_path / "out", workers=workers, shard_size=500, block_size=100)
    assert version.n_shards > 4
    assert read(tmp_path / "out") == EXPECTED
    tc.pack(records_of, iter(range(300)), tmp_path / "one", shard_size=500, block_size=100)
    assert shards_of(tmp_path / "one") == shards_of(tmp_path / "out")


def test_a_packing_of_a_function_continues_unless_the_function_or_an_input_has_changed(tmp_path):
    def of(number):
        CALLS.append(number)
        return {"x": number, "text": "y" * 50}

    def other(number):
        return {"x": number + 1, "text": "y" * 50}

    def stop(progress):
        if progress.n_records > 200:
            raise KeyboardInterrupt

    options = {"shard_size": 1000, "block_size": 100}
    with pytest.raises(KeyboardInterrupt):
        tc.pack(of, range(300), tmp_path / "out", on_progress=stop, **options)
    given = PackOptions(**options)
    assert plan_pack(of, tmp_path / "out", given, range(300)).finished
    assert not plan_pack(of, tmp_path / "out", given, range(1, 301)).finished
    assert not plan_pack(other, tmp_path / "out", given, range(300)).finished
    CALLS.clear()
    tc.pack(of, range(300), tmp_path / "out", **options)
    assert len(CALLS) < 200
    assert [record["x"] for record in read(tmp_path / "out")] == list(range(300))


def test_a_function_that_other_processes_cannot_import_is_an_error_that_says_so(tmp_path):
    options = {"shard_size": 500, "block_size": 100}
    with pytest.raises(ValueError, match=r"cannot be sent to other processes .*; or use workers=1"):
        tc.pack(lambda n: {"x": f"{n:0100}"}, range(300), tmp_path / "out", workers=2, **options)
    assert tc.pack(lambda n: {"x": f"{n:0100}"}, range(300), tmp_path / "out", **options).n_records == 300


def test_an_invalid_record_names_the_input(tmp_path):
    with pytest.raises(SchemaError, match=r"input 250 of .*<lambda>: expected int64, got a str"):
        tc.pack(lambda n: {"x": n if n < 250 else "bad"}, range(300), tmp_path / "out")
    with pytest.raises(TypeError, match=r"\(3 \(int\)\): expected a record .*, or an iterable of records, got 3"):
        tc.pack(lambda n: n, [3], tmp_path / "out")
    with pytest.raises(SchemaError, match=r"expected a record .*got a tuple of 2; name its values by schema="):
        tc.pack([(1, 2)], tmp_path / "out")
    with pytest.raises(TypeError, match="cannot pack 5"):
        tc.pack(5, tmp_path / "out")
    with pytest.raises(ValueError, match="kind= is for files"):
        tc.pack([{"x": 1}], tmp_path / "out", kind="jsonl")


def test_lists_iterators_tuples_and_torch_datasets_are_packed(tmp_path):
    tc.pack([{"x": None}, {"x": 1}], tmp_path / "list")
    assert read(tmp_path / "list") == [{"x": None}, {"x": 1}]
    tc.pack(({"x": i} for i in range(1000)), tmp_path / "iterator")
    assert [r["x"] for r in read(tmp_path / "iterator")] == list(range(1000))
    tc.pack([(1, "a"), (2, "b")], tmp_path / "tuples", schema={"n": "int8", "t": "str"})
    assert read(tmp_path / "tuples") == [{"n": 1, "t": "a"}, {"n": 2, "t": "b"}]
    squares = [{"square": i * i, "name": str(i)} for i in range(50)]
    tc.pack(Squares(), tmp_path / "torch", workers=2, shard_size=100, block_size=50)
    assert read(tmp_path / "torch") == squares
    tc.pack(f"{__name__}:make_squares", tmp_path / "named")
    assert read(tmp_path / "named") == squares


def test_tables_frames_and_readers_keep_types_and_values(tmp_path):
    table = pa.table({"x": range(1000), "maybe": [None if i == 7 else i / 2 for i in range(1000)]})
    for name, source in {
        "table": table,
        "reader": table.to_reader(max_chunksize=64),
        "frame": table.to_pandas().convert_dtypes(dtype_backend="pyarrow"),
    }.items():
        version = tc.pack(source, tmp_path / name, workers=2, shard_size=3000, block_size=500, schema={"x": "int32"})
        assert version.schema.names == ("x", "maybe")
        assert str(version.schema.columns[0]) == "int32"
        assert [(r["x"], r["maybe"]) for r in read(tmp_path / name)] == [tuple(r.values()) for r in table.to_pylist()]


@pytest.mark.parametrize(
    "options", [{"filter": pc.field("x") < 40}, {"split": {"a": 0.5, "b": 0.5}}], ids=["filter", "split"]
)
def test_chosen_records_of_a_data_set_keep_tensors_of_bool(tmp_path, options):
    records = [{"x": i, "mask": [i % 2 == 0, True, i % 3 == 0]} for i in range(100)]
    with tc.Writer(tmp_path / "in", schema={"x": "int64", "mask": "bool[3]"}) as writer:
        for record in records:
            writer.write(record)
    tc.pack(tmp_path / "in", tmp_path / "out", **options)
    parts = [tmp_path / "out" / part for part in options.get("split", [""])]
    found = [{"x": int(r["x"]), "mask": r["mask"].tolist()} for part in parts for r in tc.Dataset(part)]
    expected = [record for record in records if "split" in options or record["x"] < 40]
    assert sorted(found, key=lambda record: record["x"]) == expected


def test_data_sets_are_packed_again_and_merged(tmp_path):
    for name, start in (("a", 0), ("b", 300)):
        tc.pack(
            [{"x": np.int32(i), "v": np.full(3, i, np.float16)} for i in range(start, start + 300)], tmp_path / name
        )
    both = [tc.Dataset(tmp_path / name) for name in ("a", "b")]
    version = tc.pack(both, tmp_path / "out", workers=2, shard_size=2000, block_size=300)
    assert version.n_shards > 2
    assert version.schema == both[0].schema
    assert [r["x"].item() for r in read(tmp_path / "out")] == list(range(600))
    tc.pack(both[1].take(5), tmp_path / "out", mode="append")
    assert len(read(tmp_path / "out")) == 605
    for dataset in both:
        dataset.close()


def test_the_command_packs_what_a_callable_of_the_current_folder_returns(tmp_path, monkeypatch):
    (tmp_path / "my_source.py").write_text("def numbers():\n    for i in range(10):\n        yield {'x': i}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    tc.pack("my_source:numbers", tmp_path / "out")
    assert [r["x"] for r in read(tmp_path / "out")] == list(range(10))
    with pytest.raises(ValueError, match="no module 'your_source' in this folder"):
        tc.pack("your_source:numbers", tmp_path / "other")
    assert os.fspath(tmp_path) in sys.path


def numbers():
    return ({"x": i} for i in range(3000))


@pytest.mark.parametrize("source", [numbers, lambda: numbers], ids=["iterator", "function"])
def test_no_record_of_an_iterator_is_lost_when_a_function_and_a_filter_have_inspected_it(tmp_path, source):
    given = {"map": lambda record: {"y": record["x"]}, "filter": pc.field("x") >= 1}
    tc.pack(source(), tmp_path / "out", **given)
    assert [record["y"] for record in read(tmp_path / "out")] == list(range(1, 3000))
