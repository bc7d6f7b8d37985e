"""Columns that are stored beside a data set: their values, versions and errors."""

from __future__ import annotations

import numpy as np
import pytest

import tiercache as tc

N = 300


@pytest.fixture
def dataset(tmp_path):
    with tc.Writer(tmp_path / "data", schema={"text": "str", "number": "int64"}, block_size="1KiB") as writer:
        writer.write_batch({"text": [f"text {i}" for i in range(N)], "number": np.arange(N)})
    dataset = tc.Dataset(tmp_path / "data")
    yield dataset
    dataset.close()


def lengths(batch):
    return {"length": np.array([len(text) for text in batch["text"]], np.int32), "double": batch["number"] * 2}


def test_columns_from_a_function_have_a_value_for_each_record_beside_the_data_set(dataset, tmp_path):
    added = dataset.add_columns(lengths, batch_size=70)
    assert added[:]["length"].tolist() == [len(f"text {i}") for i in range(N)]
    assert added[:]["double"].tolist() == list(range(0, 2 * N, 2))
    assert (added.version, added.column_names) == (1, ["length", "double"])
    again = tc.Dataset(f"{tmp_path / 'data'}.columns/length+double")
    assert again.fingerprint == added.fingerprint
    assert tc.Dataset(tmp_path / "data").column_names == ["text", "number"]
    both = zip(tc.DataLoader(dataset, batch_size=64), tc.DataLoader(added, batch_size=64), strict=True)
    assert all((one["number"] * 2).tolist() == other["double"].tolist() for one, other in both)


def test_columns_from_arrays_and_lists_get_a_new_version_and_the_earlier_one_stays(dataset, tmp_path):
    tokens = [np.arange(i % 5, dtype=np.uint16) for i in range(N)]
    for version in (1, 2):
        added = dataset.add_columns(
            {"tokens": [part + version for part in tokens]}, schema={"tokens": tc.Ragged("uint16", (None,))}
        )
        assert added.version == version
    earlier = tc.Dataset(f"{tmp_path / 'data'}.columns/tokens", version=1)
    assert [record["tokens"].tolist() for record in earlier] == [(part + 1).tolist() for part in tokens]
    rows = tc.pack_sequences(added, "tokens", 16)
    assert len(rows) == -(-sum(map(len, tokens)) // 16)


def test_columns_of_a_view_go_where_the_caller_says(dataset, tmp_path):
    view = dataset.select([7, 3, 3])
    added = view.add_columns(lengths, url=tmp_path / "elsewhere")
    assert added[:]["double"].tolist() == [14, 6, 6]
    with pytest.raises(ValueError, match="need a URL"):
        view.add_columns(lengths)


def test_wrong_columns_are_explained_and_nothing_is_committed(dataset, tmp_path):
    def fails_late(batch):
        if batch["number"][0] >= 200:
            raise RuntimeError("a failing function")
        return lengths(batch)

    cases = [
        (ValueError, "columns has 2 values of column 'a' for 300 records", {"a": [1, 2]}),
        (TypeError, "columns must be a mapping from .* of 300 values each, got 3", 3),
        (TypeError, "columns must be a mapping from .* and column 'a' is 3", {"a": 3}),
        (ValueError, "has a column 'text' already", {"text": ["x"] * N}),
        (ValueError, "for records 0 to 99 has 1 values of column 'a' for 100 records", lambda _: {"a": [1]}),
        (TypeError, "returned for records 0 to 99 must be a mapping .* of 100 values each, got None", lambda _: None),
        (TypeError, "must be a mapping from .*, got {}", lambda _: {}),
        (RuntimeError, "a failing function", fails_late),
        (tc.SchemaError, "cannot infer", lambda batch: {"a": [object()] * len(batch["number"])}),
    ]
    for error, message, columns in cases:
        with pytest.raises(error, match=message):
            dataset.add_columns(columns, batch_size=100)
    with pytest.raises(ValueError, match="batch_size must be"):
        dataset.add_columns(lengths, batch_size=0)
    with pytest.raises(ValueError, match="no records"):
        dataset.take(0).add_columns(lengths, url=tmp_path / "none")
    with pytest.raises(tc.NotFound):
        tc.Dataset(f"{tmp_path / 'data'}.columns/length+double")


@pytest.mark.parametrize("name", ["../recs", "..", ".hidden", "a/b", "a+b"])
def test_a_name_that_would_leave_the_folder_or_repeat_another_url_needs_a_url(tmp_path, name):
    with tc.Writer(tmp_path / "recs", schema={"x": "int64"}) as writer:
        writer.write_batch({"x": np.arange(4)})
    dataset = tc.Dataset(tmp_path / "recs")
    with pytest.raises(ValueError, match="give url="):
        dataset.add_columns({name: np.arange(4)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recs"]
    assert tc.Dataset(tmp_path / "recs").version == 1
    assert dataset.add_columns({name: np.arange(4)}, url=tmp_path / "other")[3][name] == 3
