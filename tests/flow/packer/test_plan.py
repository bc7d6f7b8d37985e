"""Kinds of sources, and how the work is shared out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache.errors import NotFound, SchemaError
from tiercache.packer.files import InputSplit
from tiercache.packer.pack import PackOptions, divide_splits, plan_pack
from tiercache.packer.sources import find_source, kind_of


def test_file_names_decide_the_kind(tmp_path):
    assert kind_of(["a/1.JPG", "a/2.png"]) == "images"
    assert kind_of(["x.parquet", "_SUCCESS"]) == "parquet"
    assert kind_of(["x.jsonl", "y.jsonl.gz", "README.md"]) == "jsonl"
    with pytest.raises(ValueError, match="no file name indicates the kind"):
        kind_of(["a.csv"])
    with pytest.raises(ValueError, match=r"several kinds \(images, parquet\)"):
        kind_of(["a.jpg", "b.parquet"])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(SchemaError, match="has the fixed columns image, label and path"):
        find_source(tmp_path, PackOptions(schema={"label": "int8"}))
    with pytest.raises(NotFound, match="leave none of the 1 files"):
        find_source(tmp_path, PackOptions(exclude=["*.jpg"]))


def test_options_are_checked(tmp_path):
    for fields, message in (
        ({"kind": "csv"}, "kind must be one of images, parquet, jsonl"),
        ({"mode": "replace"}, "replace"),
        ({"jobs": -1}, "jobs must be a number"),
        ({"jobs": True}, "jobs must be a number"),
        ({"include": "*.jpg"}, "include must be a sequence of globs"),
        ({"block_size": 0}, "1 byte or more"),
        ({"shard_size": "big"}, "not a size"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            PackOptions(**fields)
    with pytest.raises(ValueError, match="exists in one process only"):
        plan_pack(tmp_path, "memory://test-pack-jobs", PackOptions(jobs=2))


sizes = st.lists(st.integers(0, 1000), max_size=40)


@given(sizes, st.integers(1, 9), st.integers(1, 500))
def test_tasks_contain_all_splits_in_order(n_bytes, jobs, shard_bytes):
    parts = [InputSplit("x", i, i + 1, n) for i, n in enumerate(n_bytes)]
    shares = divide_splits(parts, jobs, shard_bytes)
    assert [part for share in shares for part in share] == parts
    assert all(shares)
    if jobs == 1:
        assert len(shares) <= 1


def test_a_large_source_has_up_to_four_tasks_per_process_of_at_least_four_shards():
    parts = [InputSplit("x", i, i + 1, 10) for i in range(100)]
    assert len(divide_splits(parts, 2, 10)) == 8
    assert len(divide_splits(parts, 2, 50)) == 5 - 0
    assert len(divide_splits(parts, 2, 1000)) == 2
