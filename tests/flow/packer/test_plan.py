"""Kinds of sources, and how the work is shared out."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.errors import NotFound, SchemaError
from tiercache.packer.files import InputSplit
from tiercache.packer.pack import pack
from tiercache.packer.plan import PackOptions, divide_splits, plan_pack
from tiercache.packer.sources import find_source, kind_of


def test_file_names_decide_the_kind(tmp_path):
    assert kind_of(["a/1.JPG", "a/2.png"]) == "images"
    assert kind_of(["x.parquet", "_SUCCESS"]) == "parquet"
    assert kind_of(["x.jsonl", "y.jsonl.gz", "README.md"]) == "jsonl"
    with pytest.raises(ValueError, match="no file name indicates the kind"):
        kind_of(["a.unknown"])
    with pytest.raises(ValueError, match=r"several kinds \(2 of images, 1 of parquet\); say it with kind="):
        kind_of(["a.jpg", "b.parquet", "c.png"])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(SchemaError, match="no such column; there are image, label, path"):
        find_source(tmp_path, PackOptions(schema={"x": "int8"}))
    with pytest.raises(NotFound, match="leave none of the 1 files"):
        find_source(tmp_path, PackOptions(exclude=["*.jpg"]))


def test_options_are_checked(tmp_path):
    for fields, message in (
        ({"kind": "excel"}, "kind must be one of images, files, parquet, csv"),
        ({"mode": "replace"}, "replace"),
        ({"workers": -1}, "workers must be a number"),
        ({"workers": True}, "workers must be a number"),
        ({"include": "*.jpg"}, "include must be a sequence of globs"),
        ({"block_size": 0}, "1 byte or more"),
        ({"shard_size": "big"}, "not a size"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            PackOptions(**fields)
    with pytest.raises(ValueError, match="exists in one process only"):
        plan_pack(tmp_path, "memory://test-pack-jobs", PackOptions(workers=2))


sizes = st.lists(st.integers(0, 1000), max_size=40)


@given(sizes, st.integers(1, 500))
def test_tasks_contain_all_splits_in_order(n_bytes, shard_bytes):
    parts = [InputSplit("x", i, i + 1, n) for i, n in enumerate(n_bytes)]
    tasks = divide_splits(parts, shard_bytes)
    assert [part for task in tasks for part in task] == parts
    assert all(tasks)
    assert len(tasks) <= max(sum(n_bytes) // shard_bytes, 1)


def test_a_task_is_worth_one_to_eight_shards():
    parts = [InputSplit("x", i, i + 1, 10) for i in range(1000)]
    assert {len(divide_splits(parts, n)) for n in (10_000, 20_000)} == {1}
    assert len(divide_splits(parts, 1000)) == 10
    assert len(divide_splits(parts, 100)) == 64
    assert len(divide_splits(parts, 10)) == 125


def test_an_engine_that_is_not_there_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'tiercache-data\[ray\]'"):
        pack([{"x": 1}], tmp_path / "out", engine="ray")
    with pytest.raises(ValueError, match="engine must be one of process, ray, got 'spark'"):
        pack([{"x": 1}], tmp_path / "out", engine="spark")
