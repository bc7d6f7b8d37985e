"""Casts: columns served as another dtype, the same by every way of reading."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import default_collate

import tiercache as tc
from tiercache.data.output_spec import Buffer
from tiercache.errors import SchemaError

N = 60
FIXTURE = [HealthCheck.function_scoped_fixture]
SCHEMA: dict[str, Any] = {
    "id": "int64",
    "tokens": tc.Tensor("uint16", (70,)),
    "short": tc.Tensor("uint8", (2, 3)),
    "none": tc.Tensor("int8", (0,)),
    "flag": "bool",
    "flags": tc.Tensor("bool", (3,)),
    "score": "float32?",
    "half": tc.Tensor("bfloat16", (4,), nullable=True),
    "count": "int32?",
    "maybe": "bool?",
    "ids": tc.Ragged("uint16", (None,)),
    "boxes": tc.Ragged("int16", (None, 2), nullable=True),
    "grid": tc.Ragged("float64", (2, None), nullable=True),
    "cube": tc.Ragged("uint8", (None, 2, None)),
    "text": "str",
    "blob": "bytes",
}
WHOLE = ["int16", "int32", "int64", "uint64", "float32", "float64", "bfloat16"]
SIGNED = [name for name in WHOLE if name != "uint64"]
FLOATS = ["float16", "bfloat16", "float32", "float64"]
# Values are small enough for every one of these.
TARGETS = {
    "id": ["uint8", "int32", "float16"],
    "tokens": WHOLE,
    "short": ["bool", *WHOLE],
    "none": WHOLE,
    "flag": ["uint8", *WHOLE],
    "flags": ["uint8", *WHOLE],
    "score": FLOATS,
    "half": FLOATS,
    "count": ["int8", *SIGNED],
    "maybe": ["uint8", *WHOLE],
    "ids": WHOLE,
    "boxes": ["int8", "int64", *FLOATS],
    "grid": FLOATS,
    "cube": ["int8", *WHOLE],
}
FILLS = {
    "score": -1.5,
    "half": 2.0,
    "count": 7,
    "maybe": True,
    "boxes": np.full((2, 2), 3),
    "grid": np.full((2, 1), 0.5),
}
VARIED = ("ids", "boxes", "grid", "cube")
NUMPY_DTYPES = {"bfloat16": np.float32}


def make_record(i: int) -> dict[str, Any]:
    """Record i, which follows from its number; every third value of a nullable column is null."""
    rng = np.random.default_rng(i)
    k, m = int(rng.integers(0, 4)), int(rng.integers(0, 3))
    record = {
        "id": i,
        "tokens": rng.integers(0, 256, 70).astype(np.uint16),
        "short": rng.integers(0, 2, (2, 3)).astype(np.uint8),
        "none": np.zeros(0, np.int8),
        "flag": i % 2 == 0,
        "flags": rng.integers(0, 2, 3).astype(np.bool_),
        "score": float(i) / 4,
        "half": torch.tensor([i, -i, 0.5, 1], dtype=torch.bfloat16),
        "count": i - 9,
        "maybe": i % 2 == 0,
        "ids": rng.integers(0, 256, k * 60).astype(np.uint16),
        "boxes": rng.integers(-9, 99, (k, 2)).astype(np.int16),
        "grid": rng.integers(0, 16, (2, m)) / 8,
        "cube": rng.integers(0, 99, (k, 2, m)).astype(np.uint8),
        "text": f"text {i}",
        "blob": bytes(k),
    }
    return record | {name: None for at, name in enumerate(FILLS) if (i + at) % 3 == 0}


def write(path: Path, schema: dict[str, Any], records: list[dict[str, Any]], **options: Any) -> Path:
    with tc.Writer(path, schema=schema, **options) as writer:
        for record in records:
            writer.write(record)
    return path


@pytest.fixture(scope="module", params=["none", "zstd"])
def packed(tmp_path_factory, request):
    path = tmp_path_factory.mktemp("cast") / "data"
    records = [make_record(i) for i in range(N)]
    return write(path, SCHEMA, records, shard_size="24KiB", block_size="4KiB", compression=request.param)


def dtype_of(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


def plain(value: Any) -> Any:
    """A value as nested lists with dtype and shape, for comparing across numpy and torch."""
    if isinstance(value, Buffer):
        return [plain(value.values), plain(value.offsets), plain(value.shapes)]
    if isinstance(value, torch.Tensor) and value.is_nested:
        return [plain(value.values()), plain(value.offsets())]
    if isinstance(value, list):
        return [plain(v) for v in value]
    return (dtype_of(value), tuple(value.shape), value.tolist()) if hasattr(value, "tolist") else value


def plain_batch(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: plain(values) for name, values in batch.items()}


def expected_value(name: str, i: int, dtype: str) -> Any:
    """A written value as nested lists after numpy's astype, None for a null."""
    value = make_record(i)[name]
    if value is None:
        return None
    numbers = value.float().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    return numbers.astype(NUMPY_DTYPES.get(dtype, dtype)).tolist()


@st.composite
def servings(draw):
    forms = {}
    for name in VARIED:
        nested = ["nested"] if name in ("ids", "boxes") else []
        forms[name] = draw(st.sampled_from(["list", "padded", "buffer", *nested]))
    cast = {name: draw(st.sampled_from(dtypes)) for name, dtypes in TARGETS.items() if draw(st.integers(0, 3))}
    nulls = {name: fill for name, fill in FILLS.items() if draw(st.booleans())}
    if "maybe" in nulls and "maybe" in cast:
        nulls["maybe"] = 1  # a fill is a value of the served dtype
    return {"layouts": forms, "cast": cast, "fill_nulls": nulls}


@settings(max_examples=15, deadline=None, suppress_health_check=FIXTURE)
@given(asked=servings(), i=st.integers(0, N - 1))
def test_a_record_has_the_values_that_numpy_casts_to(packed, asked, i):
    dataset = tc.Dataset(packed, cast=asked["cast"])
    usual = tc.Dataset(packed)[i]
    for name, value in dataset[i].items():
        dtype = asked["cast"].get(name)
        if dtype is None or value is None:
            assert plain(value) == plain(usual[name])
        else:
            assert dtype_of(value) == dtype
            assert isinstance(value, torch.Tensor if dtype == "bfloat16" else np.ndarray | np.generic)
            assert value.tolist() == expected_value(name, i, dtype)
            assert not isinstance(value, np.ndarray) or value.flags.writeable


@settings(max_examples=15, deadline=None, suppress_health_check=FIXTURE)
@given(asked=servings(), indices=st.lists(st.integers(0, N - 1), max_size=12), start=st.integers(0, N))
def test_batches_records_slices_and_iteration_agree(packed, asked, indices, start):
    dataset = tc.Dataset(packed, cast=asked["cast"], fill_nulls=asked["fill_nulls"])
    batch = dataset[indices]
    for place, index in enumerate(indices):
        for name, value in dataset[index].items():
            found = batch[name][place] if value is not None else None
            assert plain(found) == plain(value)
    assert plain_batch(dataset[start:]) == plain_batch(dataset[list(range(start, N))])
    for i, record in zip(range(3), dataset, strict=False):
        assert plain_batch(record) == plain_batch(dataset[i])


@settings(max_examples=20, deadline=None, suppress_health_check=FIXTURE)
@given(asked=servings(), batch_size=st.integers(1, 40), shuffle=st.booleans())
def test_the_native_path_and_collate_give_the_same_batch(packed, asked, batch_size, shuffle):
    dataset = tc.Dataset(packed, **asked)
    seen = 0
    for batch in tc.DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, options=tc.LoaderOptions(seed=1)):
        ids = [int(i) for i in batch["id"].tolist()]
        wanted = tc.collate(dataset.__getitems__(ids))
        assert list(batch) == list(wanted)
        assert plain_batch(batch) == plain_batch(wanted)
        seen += len(ids)
    assert seen == N


def test_torch_loaders_get_the_cast_with_either_collate(packed):
    dataset = tc.Dataset(packed, columns=["tokens", "flag"], cast={"tokens": "int64", "flag": "float32"})
    wanted = [[expected_value("tokens", i, "int64") for i in range(N)], [float(i % 2 == 0) for i in range(N)]]
    for collate_fn in (tc.collate, default_collate):
        batches = list(TorchLoader(dataset, batch_size=16, collate_fn=collate_fn))
        assert {(b["tokens"].dtype, b["flag"].dtype) for b in batches} == {(torch.int64, torch.float32)}
        assert torch.cat([b["tokens"] for b in batches]).tolist() == wanted[0]
        assert torch.cat([b["flag"] for b in batches]).tolist() == wanted[1]


def test_the_schema_says_what_is_served_and_arrow_what_is_stored(packed):
    ask = {"columns": ["tokens", "flag", "score", "boxes"], "cast": {"tokens": "int64", "flag": "uint8"}}
    dataset = tc.Dataset(packed, **ask, fill_nulls={"score": 0})
    served = [str(column) for column in dataset.schema.columns]
    assert served == ["int64[70]", "uint8", "float32?", "int16[*, 2]?"]
    tables = list(dataset.to_arrow())
    assert tables[0].schema == tc.Dataset(packed, columns=ask["columns"]).schema.arrow
    assert pa.Table.from_batches(tables).column("flag").to_pylist() == [i % 2 == 0 for i in range(N)]
    assert dataset.to_pandas()["flag"].dtype == np.bool_


def test_names_of_labels_stay_with_a_cast_column(tmp_path):
    field = pa.field("label", pa.int64(), nullable=False, metadata={"tiercache.classes": '["cat", "dog"]'})
    write(tmp_path / "data", pa.schema([field]), [{"label": 1}])
    dataset = tc.Dataset(tmp_path / "data", cast={"label": "int32"})
    assert dataset.schema.columns[0].classes == ("cat", "dog")
    assert dataset[0]["label"].dtype == np.int32


def test_pickles_selections_views_and_joined_data_sets_keep_the_cast(packed):
    dataset = tc.Dataset(packed, cast={"tokens": "int64", "id": "int32"})
    chosen = dataset.select_columns(["tokens"])
    joined = dataset.take(5) + dataset.skip(50)
    for one in (pickle.loads(pickle.dumps(dataset)), chosen, pickle.loads(pickle.dumps(chosen)), joined):
        assert one[3]["tokens"].dtype == np.int64
        assert one[[]]["tokens"].dtype == np.int64
        assert one.schema.columns[one.column_names.index("tokens")].dtype == "int64"
        assert next(iter(tc.DataLoader(one, batch_size=4)))["tokens"].dtype == torch.int64
    assert dict(chosen._output_spec.cast) == {"tokens": "int64"}
    assert plain_batch(joined[4:6]) == plain_batch(dataset[[4, 50]])


def test_data_sets_that_are_cast_otherwise_are_not_joined(packed):
    with pytest.raises(SchemaError, match="id"):
        tc.Dataset(packed, cast={"id": "int32"}) + tc.Dataset(packed)


def test_a_cast_to_the_stored_dtype_is_none(packed):
    dataset = tc.Dataset(packed, cast={"tokens": "uint16", "flag": np.bool_})
    assert dataset._output_spec.cast == {}
    assert plain_batch(dataset[0]) == plain_batch(tc.Dataset(packed)[0])


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Record 40 alone has values that many dtypes have not."""
    schema = {"id": "int64", "x": "float64", "many": tc.Tensor("int32", (50,)), "ids": tc.Ragged("int64", (None,))}
    records = [
        {"id": i, "x": float(i), "many": np.full(50, i, np.int32), "ids": np.arange(i % 3, dtype=np.int64)}
        for i in range(80)
    ]
    records[40] = {"id": -300, "x": 1e300, "many": np.full(50, 2**24 + 1, np.int32), "ids": np.array([2**40])}
    return write(tmp_path_factory.mktemp("large") / "data", schema, records)


@pytest.mark.parametrize(
    ("column", "dtype", "got"),
    [
        ("id", "uint8", "-300"),
        ("id", "bool", r"-300|\d+"),
        ("x", "float32", "1e\\+300"),
        ("many", "float32", "16777217"),
        ("ids", "int32", "1099511627776"),
    ],
)
def test_a_value_that_would_be_lost_is_an_error_that_names_it_whichever_way_it_is_read(large, column, dtype, got):
    dataset = tc.Dataset(large, columns=[column], cast={column: dtype})
    match = rf"'{column}'.*cast to {dtype}.*no equal.*got ({got})"
    if dtype != "bool":
        assert dataset[39][column].dtype == dataset[[0, 1]][column][0].dtype == dtype
    for read in (lambda: dataset[40], lambda: dataset[[3, 40]], lambda: dataset[30:50], lambda: list(dataset)):
        with pytest.raises(SchemaError, match=match):
            read()
    with pytest.raises(SchemaError, match=match):
        list(tc.DataLoader(dataset, batch_size=16))
    with pytest.raises(SchemaError, match=match):
        list(TorchLoader(dataset, batch_size=16, collate_fn=tc.collate))


def test_batches_before_the_value_that_does_not_fit_are_served(large):
    loader = iter(tc.DataLoader(tc.Dataset(large, columns=["many"], cast={"many": "int16"}), batch_size=16))
    assert [len(next(loader)["many"]) for _ in range(2)] == [16, 16]
    with pytest.raises(SchemaError, match="int16"):
        next(loader)


def test_invalid_casts_are_refused_when_the_data_set_is_opened(packed):
    for cast, match in (
        ({"nothing": "int64"}, "'nothing': no such column"),
        ({"tokens": "int65"}, "'tokens': cast: no such dtype.*one of int8.*'int65'"),
        ({"text": "int64"}, "'text': cast: only numbers can be cast, and this is str"),
        ({"blob": "int64"}, "'blob': cast: only numbers can be cast.*DecodeImage"),
        ({"score": "int32"}, r"'score'.*0\.5.*one of float16, bfloat16, float32, float64, got int32"),
        ({"half": "bool"}, "'half'.*bfloat16 has values without an equal bool"),
    ):
        with pytest.raises(SchemaError, match=match):
            tc.Dataset(packed, cast=cast)
    with pytest.raises(TypeError, match="cast is a mapping from column names to dtypes, got str"):
        tc.Dataset(packed, cast="int64")


def test_pictures_objects_and_arrow_columns_are_refused_with_what_to_do(tmp_path):
    schema = {"image": tc.Image("png"), "doc": "json", "when": pa.field("when", pa.list_(pa.int64()))}
    write(tmp_path / "data", schema, [{"image": b"", "doc": {}, "when": [1]}])
    for name, match in (("image", "DecodeImage"), ("doc", "only numbers"), ("when", "only numbers")):
        with pytest.raises(SchemaError, match=f"'{name}'.*{match}"):
            tc.Dataset(tmp_path / "data", cast={name: "int64"})


def test_fills_are_of_the_served_dtype(packed):
    assert tc.Dataset(packed, cast={"count": "float32"}, fill_nulls={"count": 0.5})[1]["count"] == np.float32(0.5)
    with pytest.raises(SchemaError, match=r"'count'.*hold"):
        tc.Dataset(packed, cast={"count": "int8"}, fill_nulls={"count": 300})
