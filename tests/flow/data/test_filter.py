"""Filters compared with pandas: the selected records, the columns and shards that are read, and errors."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiercache as tc
from tiercache.data import scan
from tiercache.data.opened_version import OpenedVersion

N = 400


def make_frame() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    return pd.DataFrame(
        {
            "id": np.arange(N),
            "label": rng.integers(0, 10, N),
            "near": np.arange(N) // 40 + rng.integers(0, 2, N),
            "big": np.arange(N).astype(np.uint64) + np.uint64(2**63),
            "score": np.where(rng.random(N) < 0.2, np.nan, rng.random(N) * 100),
            "maybe": pd.array(np.where(np.arange(N) % 80 < 40, np.arange(N), -1), "Int64"),
            "name": [f"{i % 7:02d}" for i in range(N)],
        }
    )


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path, frame = tmp_path_factory.mktemp("filter") / "data", make_frame()
    schema = {"id": "int64", "label": "int8", "near": "int64", "big": "uint64", "score": "float64", "maybe": "int32?"}
    schema |= {"name": "str", "picture": tc.Image("png"), "facts": "json", "pixels": tc.Tensor("uint8", (4,))}
    columns = {name: frame[name].to_numpy() for name in ("id", "label", "near", "big", "score")}
    columns["label"] = columns["label"].astype(np.int8)
    columns["maybe"] = [None if i % 80 >= 40 else i for i in range(N)]
    columns["name"] = frame["name"].tolist()
    columns["picture"] = [b"x" * (i % 5) for i in range(N)]
    columns["facts"] = [{"i": i} for i in range(N)]
    columns["pixels"] = np.zeros((N, 4), np.uint8)
    with tc.Writer(path, schema=schema, shard_size="4KiB", block_size="1KiB") as writer:
        writer.write_batch(columns)
    return path


@pytest.fixture(scope="module")
def frame():
    frame = make_frame()
    frame["maybe"] = pd.array([pd.NA if i % 80 >= 40 else i for i in range(N)], "Int64")
    return frame


@pytest.fixture
def dataset(packed):
    dataset = tc.Dataset(packed, columns=["id", "name"])
    yield dataset
    dataset.close()


def ids_of(dataset):
    return dataset[:]["id"].tolist()


COMPARISONS = ["__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__"]
LEAF = st.one_of(
    st.tuples(
        st.sampled_from(["id", "label", "near", "score", "maybe"]), st.sampled_from(COMPARISONS), st.integers(-2, N)
    ),
    st.tuples(st.just("name"), st.sampled_from(COMPARISONS), st.sampled_from(["00", "03", "06", "x"])),
    st.tuples(st.sampled_from(["maybe", "id"]), st.just("is_null"), st.none()),
)
TREE = st.recursive(LEAF, lambda inner: st.tuples(st.sampled_from(["and", "or", "not"]), inner, inner), max_leaves=4)


def as_expression(tree):
    name, how, value = tree
    if name == "not":
        return ~as_expression(how)
    if name in ("and", "or"):
        a, b = as_expression(how), as_expression(value)
        return a & b if name == "and" else a | b
    return pc.field(name).is_null() if how == "is_null" else getattr(pc.field(name), how)(value)


def as_mask(tree, frame):
    """Whether the tree is true, a row: pandas' nullable booleans follow the same logic of three values."""
    name, how, value = tree
    if name == "not":
        return ~as_mask(how, frame)
    if name in ("and", "or"):
        a, b = as_mask(how, frame), as_mask(value, frame)
        return a & b if name == "and" else a | b
    column = frame[name]
    if how == "is_null":
        return column.isna().astype("boolean")
    return getattr(column, how)(value).astype("boolean")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREE)
def test_a_filter_selects_the_records_that_pandas_selects(dataset, frame, tree):
    expected = frame["id"][as_mask(tree, frame).fillna(value=False).to_numpy(bool)].tolist()
    assert ids_of(dataset.filter(as_expression(tree))) == expected


def test_a_filter_evaluates_functions_of_any_column(dataset, frame):
    for expression, expected in (
        (pc.field("label").isin([3, 4]), frame.label.isin([3, 4])),
        (pc.field("big") > pa.scalar(2**63 + 390, pa.uint64()), frame.id > 390),
        (pc.starts_with(pc.field("name"), "0"), frame.id >= 0),
        (pc.binary_length(pc.field("picture")) == 4, frame.id % 5 == 4),
        (pc.match_substring_regex(pc.field("facts"), r'"i": ?12'), frame.id.astype(str).str.startswith("12")),
        (pc.scalar(True), frame.id >= 0),
        (pc.scalar(False), frame.id < 0),
        (pc.coalesce(pc.field("maybe"), pc.scalar(7)) == 7, (frame.id % 80 >= 40) | (frame.id == 7)),
        (pc.field("score") != 5, frame.id >= 0),
        (~(pc.field("score") <= 1000), frame.score.isna()),
        (pc.is_nan(pc.field("score")), frame.score.isna()),
        # NaN, casts that turn over, limits beyond 2^63.
        (~(pc.field("label") <= float("nan")), frame.id >= 0),
        (pc.field("big").cast("int64", safe=False) < -(2**63) + 5, frame.id < 5),
        (pc.field("big").isin([7, 1]) | (pc.field("id") < 3), frame.id < 3),
    ):
        assert ids_of(dataset.filter(expression)) == frame["id"][expected].tolist(), str(expression)


def test_an_expression_that_is_not_a_condition_is_an_error(dataset):
    for expression, said in (
        (pc.field("lable") == 3, "lable.*there are id, label"),
        (pc.field("id") + 1, "as a condition"),
        (pc.field("id") == "text", "cannot evaluate"),
        (pc.starts_with(pc.field("id"), "a"), "cannot evaluate"),
        (pc.field(0) == 3, "name columns"),
        ((pc.field(1) == 3) & (pc.field("id") == 3), "name columns"),
        # Seen only when there are values.
        (pc.match_substring_regex(pc.field("name"), "("), "cannot evaluate.*regular expression"),
        (pc.field("id").cast("int8") == 3, "cannot evaluate.*not in range"),
        (pc.divide(pc.scalar(9), pc.field("label")) == 3, "cannot evaluate.*divide by zero"),
        (pc.Expression._call("cumulative_sum", [pc.field("id")], pc.CumulativeOptions()) > 3, "non-scalar"),
    ):
        with pytest.raises(tc.SchemaError, match=said):
            dataset.filter(expression)


def test_a_filter_reads_only_the_columns_of_its_expression_in_the_shards_of_the_view(dataset, monkeypatch):
    seen, arrays = [], OpenedVersion.arrays

    def note(self, shard, block):
        seen.append((tuple(self.schema.names), shard))
        return arrays(self, shard, block)

    monkeypatch.setattr(OpenedVersion, "arrays", note)
    dataset.take(5).filter((pc.field("label") == 3) & (pc.field("score") > 5))
    assert set(seen) == {(("label", "score"), 0)}


def test_a_filter_takes_bounded_memory(dataset, monkeypatch, frame):
    monkeypatch.setattr(scan, "CHUNK_BYTES", 1)  # block by block
    sizes, evaluate = [], scan.evaluate
    monkeypatch.setattr(scan, "evaluate", lambda table, e: sizes.append(table.num_rows) or evaluate(table, e))
    assert ids_of(dataset.filter(pc.field("label") < 5)) == frame["id"][frame["label"] < 5].tolist()
    assert max(sizes) < N / len(dataset._source.shard_records)


def test_a_filter_bypasses_the_cache_for_shards_that_are_not_cached(tmp_path):
    url = f"memory://filter-{tmp_path.name}"
    with tc.Writer(url, schema={"id": "int64"}, shard_size="1KiB", block_size="512B") as writer:
        writer.write_batch({"id": np.arange(500)})
    cache = tc.Cache(tmp_path / "cache", size="64MiB")
    dataset = tc.Dataset(url, cache=cache)
    before = len(list(cache.entries()))
    view = dataset.filter(pc.bit_wise_and(pc.field("id"), 1) == 0)
    assert len(view) == 250
    assert len(list(cache.entries())) == before
    dataset.close()
    cache.close()
