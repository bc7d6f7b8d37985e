"""Forms of columns, casts and fills of nulls: the same meaning whichever way records are read."""

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
from tests.support.records import replace_bytes
from torch.utils.data import DataLoader as TorchLoader

import tiercache as tc
from tiercache.data.output_spec import Buffer

N = 60
FIXTURE = [HealthCheck.function_scoped_fixture]
VARIED: dict[str, Any] = {
    "blob": "bytes",
    "text": "str?",
    "picture": tc.Image("png", nullable=True),
    "flat": tc.Ragged("uint16", (None,)),
    "half": tc.Ragged("bfloat16", (None,), nullable=True),
    "flags": tc.Ragged("bool", (None, 3), nullable=True),
    "rows": tc.Ragged("float32", (None, 2, 2), nullable=True),
    "empty": tc.Ragged("int8", (None, 0)),
    "last": tc.Ragged("float64", (2, None)),
    "box": tc.Ragged("int16", (None, 2, None), nullable=True),
}
OTHERS: dict[str, Any] = {
    "id": "int64",
    "doc": "json?",
    "count": "int32?",
    "flag": "bool?",
    "point": tc.Tensor("bfloat16", (2,), nullable=True),
    "when": "list<int64?>?",
}
SCHEMA = OTHERS | VARIED
ONE_VARIES_FIRST = ("blob", "text", "picture", "flat", "half", "flags", "rows", "empty")
FILLS: dict[str, Any] = {
    "text": "наполнитель",
    "picture": b"\x89PNG",
    "half": torch.full((3,), 0.5),
    "flags": np.zeros((0, 3), np.bool_),
    "rows": np.arange(8, dtype=np.float32).reshape(2, 2, 2),
    "box": np.full((1, 2, 3), -7),
    "doc": {"none": []},
    "count": -1,
    "flag": True,
    "point": -2.0,
    "when": [7, 7],
}


# Dtypes that each column can be cast to: the numbers are equal, and compare so.
TARGETS: dict[str, list[str]] = {
    "id": ["int32", "uint8", "float64"],
    "count": ["int8", "float32"],
    "flag": ["uint8", "float32"],
    "point": ["float32"],
    "flat": ["int32", "int64", "float32"],
    "half": ["float32", "float64"],
    "flags": ["uint8", "int64"],
    "rows": ["float64"],
    "empty": ["int64"],
    "box": ["int8", "int64", "float32"],
}


# A value that each column can be padded with.
PADDING: dict[str, Any] = {
    "blob": 255,
    "text": 32,
    "picture": 1,
    "flat": 65535,
    "half": -2.5,
    "flags": True,
    "rows": 1.5,
    "empty": -100,
    "last": 1e300,
    "box": -7,
}


def make_record(i: int) -> dict[str, Any]:
    """Record i, which follows from its number; every third value of a nullable column is null."""
    rng = np.random.default_rng(i)
    k, m = int(rng.integers(0, 5)), int(rng.integers(0, 4))
    record = {
        "id": i,
        "doc": {"i": i},
        "count": i - 5,
        "flag": i % 2 == 0,
        "point": torch.tensor([i, -i], dtype=torch.bfloat16),
        "when": [i] * m,
        "blob": rng.bytes(k * m),
        "text": "žluťoučký 🐴"[:k] * m,
        "picture": rng.bytes(k),
        "flat": rng.integers(0, 65536, k * 3).astype(np.uint16),
        "half": torch.arange(m * k, dtype=torch.bfloat16),
        "flags": rng.integers(0, 2, (k, 3)).astype(np.bool_),
        "rows": rng.random((m, 2, 2)).astype(np.float32),
        "empty": np.zeros((k, 0), np.int8),
        "last": rng.random((2, m)),
        "box": rng.integers(-9, 9, (k, 2, m)).astype(np.int16),
    }
    nullable = [name for name in SCHEMA if name in FILLS]
    return record | {name: None for at, name in enumerate(nullable) if (i + at) % 3 == 0}


def write(path: Path, records: list[dict[str, Any]], compression: str = "zstd") -> Path:
    sizes = {"shard_size": "6KiB", "block_size": "1KiB"}
    with tc.Writer(path, schema=SCHEMA, compression=compression, **sizes) as writer:
        for record in records:
            writer.write(record)
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write(tmp_path_factory.mktemp("layouts") / "data", [make_record(i) for i in range(N)])


@pytest.fixture(scope="module", params=["mapped", "decoded"])
def stored(request, packed, tmp_path_factory):
    """The records in blocks that are mapped, and in blocks that are decoded."""
    if request.param == "decoded":
        return packed
    return write(tmp_path_factory.mktemp("mapped") / "data", [make_record(i) for i in range(N)], "none")


def as_plain(value: Any) -> Any:
    """A value as nested lists with its shape, for comparing across numpy and torch."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype).removeprefix("torch."), tuple(value.shape), value.tolist())
    if isinstance(value, np.ndarray | np.generic):
        return (value.dtype.name, value.shape, value.tolist())
    return value


def plain_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch in a form that == compares, shapes and dtypes included."""
    found: dict[str, Any] = {}
    for name, values in batch.items():
        if isinstance(values, Buffer):
            found[name] = [as_plain(values.values), as_plain(values.offsets), as_plain(values.shapes)]
        elif isinstance(values, torch.Tensor) and values.is_nested:
            found[name] = ["nested", as_plain(values.values()), as_plain(values.offsets())]
        else:
            found[name] = [as_plain(v) for v in values] if isinstance(values, list) else as_plain(values)
    return found


def as_array(value: Any) -> np.ndarray:
    """A value as a numpy array; bfloat16 as float32."""
    if isinstance(value, torch.Tensor):
        return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()
    return np.asarray(value)


def records_of(batch: dict[str, Any], name: str, form: Any) -> list[Any]:
    """Each record's value in a batch, taken out of the column's form again."""
    values = batch[name]
    padding = form if isinstance(form, tc.Padded) else tc.Padded()
    if form == "buffer":
        return list(values)
    if form == "nested":
        return list(values.unbind())
    if form == "list":
        return list(values)
    vary = [d for d, size in enumerate(getattr(SCHEMA[name], "shape", (None,))) if size is None]
    lengths = batch[f"{name}.lengths"].reshape(len(values), len(vary)).tolist()
    for number, dimension in enumerate(vary):
        longest, box = max((length[number] for length in lengths), default=0), values.shape[1 + dimension]
        assert longest <= box < max(longest, 1) + padding.multiple_of
        assert box % padding.multiple_of == 0
        assert padding.max_length is None or longest <= padding.max_length
    out = []
    for value, length in zip(values, lengths, strict=True):
        cut = [slice(None)] * value.ndim
        for dimension, n in zip(vary, length, strict=True):
            cut[dimension] = slice(0, n)
        out.append(value[tuple(cut)])
        behind = np.ones(value.shape, np.bool_)
        behind[tuple(cut)] = False
        assert (as_array(value)[behind] == padding.value).all()
    return out


def expected_value(name: str, value: Any, fill: Any, form: Any) -> Any:
    """What was written, as a list of numbers (of the encoded bytes, where the form is none of objects)."""
    value = fill if value is None else value
    if form != "list" and isinstance(value, str | bytes):
        value = np.frombuffer(value.encode() if isinstance(value, str) else value, np.uint8)
    if isinstance(form, tc.Padded):
        shape = getattr(SCHEMA[name], "shape", (None,))
        value = value[tuple(slice(form.max_length if size is None else None) for size in shape)]
    return value.tolist() if hasattr(value, "tolist") else value


@st.composite
def paddings(draw, name):
    """How a column is padded; longer records are cut if there is a limit."""
    limit = draw(st.one_of(st.none(), st.integers(1, 9)))
    value, multiple = draw(st.sampled_from([0, PADDING[name]])), draw(st.sampled_from([1, 1, 2, 5, 8]))
    return tc.Padded(value, multiple_of=multiple, max_length=limit, truncate=limit is not None)


@st.composite
def servings(draw):
    forms = {
        name: draw(
            st.one_of(
                st.sampled_from(("list", "padded", "buffer", *(["nested"] * (name in ONE_VARIES_FIRST)))),
                paddings(name),
            )
        )
        for name in VARIED
    }
    nulls = {n: f for n, f in FILLS.items() if draw(st.booleans())}
    cast = {name: draw(st.sampled_from(dtypes)) for name, dtypes in TARGETS.items() if draw(st.booleans())}
    if "flags" in cast:  # a padding and a fill are values of the served dtype
        forms["flags"] = "list" if isinstance(forms["flags"], tc.Padded) else forms["flags"]
        nulls |= {"flags": np.zeros((0, 3), np.uint8)} if "flags" in nulls else {}
    if "flag" in cast and "flag" in nulls:
        nulls["flag"] = 1
    return {"layouts": forms, "fill_nulls": nulls, "cast": cast}


def has_dtype(value: Any, dtype: str | None) -> bool:
    return dtype is None or str(value.dtype).removeprefix("torch.") == dtype


@settings(max_examples=15, deadline=None, suppress_health_check=FIXTURE)
@given(asked=servings(), batch_size=st.integers(1, 40), shuffle=st.booleans(), window=st.sampled_from(["1KiB", "all"]))
def test_the_native_path_and_collate_give_the_same_batch(stored, asked, batch_size, shuffle, window):
    dataset = tc.Dataset(stored, **asked)
    options = tc.LoaderOptions(seed=1, shuffle_window_bytes=window, threads=2)
    seen = 0
    for batch in tc.DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, options=options):
        ids = [int(i) for i in batch["id"].tolist()]
        expected = tc.collate(dataset.__getitems__(ids))
        assert list(batch) == list(expected)
        assert plain_batch(batch) == plain_batch(expected)
        seen += len(ids)
    assert seen == N


@settings(max_examples=15, deadline=None, suppress_health_check=FIXTURE)
@given(asked=servings(), indices=st.lists(st.integers(0, N - 1), max_size=12))
def test_numpy_batches_hold_what_was_written_in_every_form(stored, asked, indices):
    batch = tc.Dataset(stored, **asked)[indices]
    for name in VARIED:
        form, fill = asked["layouts"][name], asked["fill_nulls"].get(name)
        null = [make_record(i)[name] is None for i in indices]
        if name in FILLS:
            assert (f"{name}.valid" in batch) is (name not in asked["fill_nulls"])
        if f"{name}.valid" in batch:
            assert batch[f"{name}.valid"].tolist() == [not n for n in null]
        found = records_of(batch, name, form)
        for i, value, is_null in zip(indices, found, null, strict=True):
            if is_null and fill is None:
                assert value is None or 0 in value.shape
            else:
                expected = expected_value(name, make_record(i)[name], fill, form)
                assert (value.tolist() if hasattr(value, "tolist") else value) == expected
                assert has_dtype(value, asked["cast"].get(name))


@settings(max_examples=20, deadline=None, suppress_health_check=FIXTURE)
@given(asked=servings(), i=st.integers(0, N - 1), start=st.integers(0, N))
def test_a_record_has_its_fills_and_casts_and_no_layouts(stored, asked, i, start):
    dataset = tc.Dataset(stored, **asked)
    record, usual = dataset[i], tc.Dataset(stored)[i]
    assert record.keys() == usual.keys()
    for name, value in usual.items():
        if value is None and name in asked["fill_nulls"]:
            fill = FILLS[name]
            expected = [fill] * 2 if name == "point" else expected_value(name, None, fill, "list")
            assert (record[name].tolist() if hasattr(record[name], "tolist") else record[name]) == expected
        elif value is None or name not in asked["cast"]:
            assert as_plain(record[name]) == as_plain(value)
        else:
            assert record[name].tolist() == value.tolist()
            assert has_dtype(record[name], asked["cast"][name])
            assert not isinstance(record[name], np.ndarray) or record[name].flags.writeable
    assert plain_batch(dataset[start:]) == plain_batch(dataset[list(range(start, N))])


def test_a_fill_is_every_records_own(packed):
    given = {"none": []}
    dataset = tc.Dataset(packed, columns=["doc", "when", "flags"], fill_nulls={"doc": given, "when": [1]})
    given["none"].append(1)
    batch = dataset[[i for i in range(20) if make_record(i)["doc"] is None]]
    batch["doc"][0]["none"].append(2)
    assert batch["doc"][1] == {"none": []}
    assert dataset._output_spec.nulls["doc"] == {"none": []}


def test_layouts_that_a_column_cannot_have_are_refused(packed):
    for asked, told in (
        ({"layouts": {"nothing": "list"}}, "nothing.*no such column"),
        ({"layouts": {"text": "pad"}}, "text.*'padded'.*got 'pad'"),
        ({"layouts": {"count": "padded"}}, "count.*records differ in length.*int32"),
        ({"layouts": {"count": tc.Padded(1)}}, "count.*records differ in length.*int32"),
        ({"layouts": {"doc": tc.Padded()}}, "doc.*'list', got 'padded'"),
        ({"layouts": {"text": tc.Padded(256)}}, "text.*cannot hold this value.*uint8.*256"),
        ({"layouts": {"blob": tc.Padded(-100)}}, "blob.*cannot hold.*0 to 255"),
        ({"layouts": {"flat": tc.Padded(-100)}}, "flat.*cannot hold.*uint16.*-100"),
        ({"layouts": {"flat": tc.Padded(0.5)}}, "flat.*cannot hold"),
        ({"layouts": {"flags": tc.Padded(2)}}, "flags.*cannot hold.*bool"),
        ({"layouts": {"box": tc.Padded([1, 2])}}, "box.*cannot hold"),
        ({"layouts": {"doc": "buffer"}}, "doc.*'list', got 'buffer'"),
        ({"layouts": {"box": "nested"}}, "box.*one dimension only.*'padded', 'buffer'"),
        ({"layouts": {"last": "nested"}}, "last.*the first"),
        ({"fill_nulls": {"nothing": 0}}, "nothing.*no such column"),
        ({"fill_nulls": {"id": 0}}, "id.*not nullable"),
        ({"fill_nulls": {"count": 1.5}}, "count.*cannot hold.*int32"),
        ({"fill_nulls": {"count": 2**31}}, "count.*int32.*2147483648"),
        ({"fill_nulls": {"count": None}}, "count.*None"),
        ({"fill_nulls": {"flag": 1}}, "flag.*bool"),
        ({"fill_nulls": {"text": b"x"}}, "text.*str.*bytes"),
        ({"fill_nulls": {"rows": np.zeros((2, 3))}}, r"rows.*float32\[\*, 2, 2\].*\(2, 3\)"),
        ({"fill_nulls": {"point": [1.0, 2.0, 3.0]}}, r"point.*bfloat16\[2\]"),
        ({"fill_nulls": {"when": "x"}}, "when"),
        ({"decode": {"text": object()}}, "text.*only images"),
        ({"decode": {"picture": object()}, "layouts": {"picture": "buffer"}}, "picture.*remove layouts= or decode="),
    ):
        with pytest.raises(tc.SchemaError, match=f"(?s){told}"):
            tc.Dataset(packed, **asked)
    with pytest.raises(TypeError, match="layouts is a mapping"):
        tc.Dataset(packed, layouts=["text"])
    with pytest.raises(ValueError, match="transform"):
        tc.Dataset(packed, layouts={"text": "buffer"}, transform=dict)
    with pytest.raises(tc.SchemaError, match=r"text.*no such column"):
        tc.Dataset(packed, columns=["id"], layouts={"text": "buffer"})


def test_a_column_with_the_name_of_lengths_is_refused(tmp_path):
    with tc.Writer(tmp_path / "d", schema={"x": "bytes", "x.lengths": "int8"}) as writer:
        writer.write({"x": b"", "x.lengths": 1})
    with pytest.raises(tc.SchemaError, match=r"x\.lengths.*taken"):
        tc.Dataset(tmp_path / "d", layouts={"x": "padded"})


@pytest.mark.parametrize("name", ["text", "box"])
def test_a_record_that_is_too_long_is_an_error_that_names_it_and_its_length(packed, name):
    lengths = [max(_lengths_of(name, i)) for i in range(N)]
    limit = max(lengths) - 1
    dataset = tc.Dataset(packed, columns=["id", name], layouts={name: tc.Padded(max_length=limit)})
    first = lengths.index(limit + 1)
    told = rf"column '{name}', record {first}: .*length is {limit + 1}, and max_length is {limit}.*truncate=True"
    served = []
    with pytest.raises(tc.SchemaError, match=told) as caught:
        served += [batch["id"].tolist() for batch in tc.DataLoader(dataset, batch_size=7)]
    assert (caught.value.column, caught.value.record) == (name, first)
    assert served == [list(range(at, at + 7)) for at in range(0, first - 6, 7)]
    for read in (lambda: dataset[[0, first]], lambda: tc.collate(dataset.__getitems__([first]))):
        with pytest.raises(tc.SchemaError, match=told):
            read()
    other = next(i for i in range(N) if lengths[i] <= limit)
    view = dataset.select([first, other])
    for read in (
        lambda: view[[1, 0]],
        lambda: list(tc.DataLoader(view, batch_size=2)),
        lambda: list(tc.DataLoader(view, batch_size=2, shuffle=True)),
    ):
        with pytest.raises(tc.SchemaError, match=f"length is {limit + 1}") as of_view:
            read()
        assert of_view.value.record == sorted([first, other]).index(first)  # in stored order
    assert dataset[first]["id"] == first  # a single record is not padded
    whole = tc.Dataset(packed, columns=["id", name], layouts={name: tc.Padded(max_length=limit + 1)})
    assert sum(len(batch["id"]) for batch in tc.DataLoader(whole, batch_size=7)) == N


def _lengths_of(name: str, i: int) -> list[int]:
    value = make_record(i)[name]
    if value is None:
        return [0]
    if isinstance(value, str):
        return [len(value.encode())]
    return [n for n, size in zip(value.shape, SCHEMA[name].shape, strict=True) if size is None]


def test_a_fill_that_is_too_long_is_an_error(tmp_path):
    with tc.Writer(tmp_path / "d", schema={"x": tc.Ragged("int8", (None,), nullable=True)}) as writer:
        writer.write_batch({"x": [None, np.ones(2, np.int8)]})
    refused = tc.Dataset(tmp_path / "d", layouts={"x": tc.Padded(max_length=2)}, fill_nulls={"x": [7, 8, 9]})
    for read in (lambda: list(tc.DataLoader(refused, batch_size=2)), lambda: refused[[0, 1]]):
        with pytest.raises(tc.SchemaError, match=r"record 0: .*length is 3"):
            read()


def test_a_wrong_setting_of_padding_is_an_error_that_names_it():
    for wrong, error, told in (
        ({"multiple_of": 0}, ValueError, "multiple_of must be 1 or more, got 0"),
        ({"multiple_of": 1.5}, TypeError, "multiple_of must be a whole number, got 1.5"),
        ({"max_length": 0}, ValueError, "max_length must be 1 or more"),
        ({"max_length": True}, ValueError, "max_length must be 1 or more, got True"),
        ({"truncate": 1, "max_length": 2}, TypeError, "truncate is True or False"),
        ({"truncate": True}, ValueError, "truncate=True needs a max_length"),
    ):
        with pytest.raises(error, match=told):
            tc.Padded(**wrong)


@pytest.mark.parametrize(
    ("spec", "values", "old", "new", "verify", "told"),
    [
        ("bytes?", [b"needle", None, b""], b"needle", b"beetle", "first", "column 'x'"),
        ("str", ["fine", "needle", ""], b"needle", b"needl\xff", "never", "column 'x': .*utf-8"),
        (
            tc.Ragged("uint8", (None, None)),
            [np.zeros((1234, 2), np.uint8)] * 3,
            b"\xd2\x04\0\0\x02\0\0\0",
            b"\xd2\x04\0\0\x03\0\0\0",
            "never",
            r"column 'x': 2468 elements of the shape \(1234, 3\)",
        ),
    ],
    ids=["a page", "text", "shapes"],
)
def test_damage_is_found_in_every_form(tmp_path, spec, values, old, new, verify, told):
    with tc.Writer(tmp_path / "d", schema={"id": "int64", "x": spec}, compression="none") as writer:
        writer.write_batch({"id": np.arange(3), "x": values})
    replace_bytes(tmp_path / "d", old, new)
    fills = {"x": b"filled"} if spec == "bytes?" else {}
    for form in ["list"] if spec == "str" else ["list", "padded", "buffer", *(["nested"] if fills else [])]:
        dataset = tc.Dataset(tmp_path / "d", verify=verify, layouts={"x": form}, fill_nulls=fills)
        for read in (lambda d=dataset: list(tc.DataLoader(d, batch_size=3)), lambda d=dataset: d[[0, 1]]):
            with pytest.raises(tc.CorruptShard, match=told):
                read()


def test_a_buffer_is_a_sequence_that_moves_and_pins_as_tensors_do():
    buffer = Buffer(torch.arange(6, dtype=torch.uint8), torch.tensor([0, 2, 2, 6]))
    assert len(buffer) == 3
    assert [v.tolist() for v in buffer] == [[0, 1], [], [2, 3, 4, 5]]
    assert buffer[-1].tolist() == [2, 3, 4, 5]
    for index in (3, -4):
        with pytest.raises(IndexError, match="a buffer of 3"):
            buffer[index]
    moved = buffer.to("meta")
    assert (moved.values.device.type, moved.offsets.device.type) == ("meta", "meta")
    assert (buffer.to(torch.float32).values.dtype, buffer.to(torch.float32).offsets.dtype) == (
        torch.float32,
        torch.int64,
    )
    assert pickle.loads(pickle.dumps(buffer))[2].tolist() == [2, 3, 4, 5]
    with pytest.raises(AttributeError):
        buffer.values = None


class _Pinnable:
    """Stands for a tensor on a machine without an accelerator."""

    def pin_memory(self) -> str:
        return "pinned"


def test_torch_pins_a_buffer_that_lies_deep_in_a_batch():
    batch = {"a": [Buffer(_Pinnable(), _Pinnable(), _Pinnable())]}
    pinned = torch.utils.data._utils.pin_memory.pin_memory(batch)["a"][0]
    assert isinstance(pinned, Buffer)
    assert (pinned.values, pinned.offsets, pinned.shapes) == ("pinned",) * 3


@pytest.mark.parametrize("form", ["list", "padded", "buffer"])
def test_batches_are_on_the_cpu_whatever_torch_s_default_device_is(tmp_path, form):
    path = tmp_path / "data"
    with tc.Writer(path, schema={"flat": tc.Ragged("int8", (None,)), "none": tc.Tensor("int8", (0,))}) as writer:
        writer.write_batch({"flat": [np.zeros(0, np.int8)] * 4, "none": np.zeros((4, 0), np.int8)})
    iterator = iter(tc.DataLoader(tc.Dataset(path, layouts={"flat": form}), batch_size=4))
    with torch.device("meta"):
        batch = next(iterator)
    flat = batch["flat"]
    tensors = flat if form == "list" else [flat.values if form == "buffer" else flat]
    assert {tensor.device.type for tensor in (*tensors, batch["none"])} == {"cpu"}


def test_the_schema_says_what_is_served_and_arrow_what_is_stored(packed):
    ask = {"columns": ["id", "flag", "count", "box"], "cast": {"id": "int32", "flag": "uint8"}}
    dataset = tc.Dataset(packed, **ask, fill_nulls={"count": 0})
    assert [str(column) for column in dataset.schema.columns] == ["int32", "uint8?", "int32?", "int16[*, 2, *]?"]
    tables = list(dataset.to_arrow())
    assert tables[0].schema == tc.Dataset(packed, columns=ask["columns"]).schema.arrow
    assert pa.Table.from_batches(tables).column("id").to_pylist() == list(range(N))
    assert dataset.to_pandas()["id"].dtype == np.int64


def test_pickles_selections_views_and_joined_data_sets_keep_the_cast(packed):
    dataset = tc.Dataset(packed, cast={"id": "int32", "flat": "int64"})
    chosen = dataset.select_columns(["id"])
    joined = dataset.take(5) + dataset.skip(50)
    for one in (pickle.loads(pickle.dumps(dataset)), chosen, pickle.loads(pickle.dumps(chosen)), joined):
        assert one[3]["id"].dtype == one[[]]["id"].dtype == np.int32
        assert one.schema.columns[one.column_names.index("id")].dtype == "int32"
        assert next(iter(tc.DataLoader(one, batch_size=4)))["id"].dtype == torch.int32
    assert dict(chosen._output_spec.cast) == {"id": "int32"}
    assert plain_batch(joined[4:6]) == plain_batch(dataset[[4, 50]])
    with pytest.raises(tc.SchemaError, match="id"):
        tc.Dataset(packed, cast={"id": "int32"}) + tc.Dataset(packed)
    same = tc.Dataset(packed, cast={"id": "int64", "flag": np.bool_})
    assert same._output_spec.cast == {}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Record 40 alone has values that many dtypes have not."""
    schema = {"id": "int64", "x": "float64", "many": tc.Tensor("int32", (50,)), "ids": tc.Ragged("int64", (None,))}
    records = [
        {"id": i, "x": float(i), "many": np.full(50, i, np.int32), "ids": np.arange(i % 3, dtype=np.int64)}
        for i in range(80)
    ]
    records[40] = {"id": -300, "x": 1e300, "many": np.full(50, 2**24 + 1, np.int32), "ids": np.array([2**40])}
    with tc.Writer(path := tmp_path_factory.mktemp("large") / "data", schema=schema) as writer:
        for record in records:
            writer.write(record)
    return path


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
        with pytest.raises(tc.SchemaError, match=match):
            read()
    with pytest.raises(tc.SchemaError, match=match):
        list(tc.DataLoader(dataset, batch_size=16))
    with pytest.raises(tc.SchemaError, match=match):
        list(TorchLoader(dataset, batch_size=16, collate_fn=tc.collate))


def test_invalid_casts_are_refused_when_the_data_set_is_opened(packed):
    for cast, match in (
        ({"nothing": "int64"}, "'nothing': no such column"),
        ({"flat": "int65"}, "'flat': cast: no such type: 'int65'; the nearest is 'int64'; the types are int8"),
        ({"flat": "str"}, "'flat': cast: only numbers can be cast.*got str"),
        ({"flat": "int64[3]"}, r"'flat': cast: only the dtype can be cast, and this is .*got int64\[3\]"),
        ({"id": "int32?"}, "'id': cast: only the dtype can be cast, and this is int64"),
        ({"text": "int64"}, "'text': cast: only numbers can be cast, and this is str"),
        ({"blob": "int64"}, "'blob': cast: only numbers can be cast.*DecodeImage"),
        ({"picture": "int64"}, "'picture'.*DecodeImage"),
        ({"doc": "int64"}, "'doc'.*only numbers"),
        ({"when": "int64"}, "'when'.*only numbers"),
        ({"rows": "int32"}, r"'rows'.*0\.5.*one of float16, bfloat16, float32, float64, got int32"),
        ({"half": "bool"}, "'half'.*bfloat16 has values without an equal bool"),
    ):
        with pytest.raises(tc.SchemaError, match=match):
            tc.Dataset(packed, cast=cast)
    with pytest.raises(TypeError, match="cast is a mapping from column names to dtypes, got str"):
        tc.Dataset(packed, cast="int64")
