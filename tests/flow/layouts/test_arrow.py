"""Files and streams of Arrow, and what Hugging Face `datasets` knows of their columns."""

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pytest
from tests.support.token_and_arrow_cases import hf_columns, hf_table, save_to_disk

import tiercache as tc
from tiercache.errors import CorruptShard, SchemaError, TierCacheError
from tiercache.layouts import arrow
from tiercache.layouts.arrow import ArrowLayout
from tiercache.layouts.find import StoreFolder
from tiercache.layouts.hugging_face import array_of, features_of, hf_features_schema
from tiercache.store import open_store


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", str(tmp_path / "default-cache"))


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "data"
    made.mkdir()
    return made


def write_stream(path, table, rows=100):
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def layout_of(folder):
    return ArrowLayout.find(StoreFolder(open_store(str(folder)), None))


_CHANCE = random.Random(5)


def value_of(arrow_type, depth=0):
    """Return a random value of a type, None now and then."""
    if _CHANCE.random() < 0.2:
        return None
    if pa.types.is_struct(arrow_type):
        return {field.name: value_of(field.type) for field in arrow_type}
    if pa.types.is_map(arrow_type):
        return [(str(i), value_of(arrow_type.item_type)) for i in range(_CHANCE.randrange(3))]
    if pa.types.is_fixed_size_list(arrow_type):
        return [value_of(arrow_type.value_type) for _ in range(arrow_type.list_size)]
    if pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type):
        return [value_of(arrow_type.value_type) for _ in range(_CHANCE.randrange(4))]
    if pa.types.is_boolean(arrow_type):
        return _CHANCE.random() < 0.5
    if pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type):
        return "ä" * _CHANCE.randrange(5)
    if pa.types.is_binary(arrow_type) or pa.types.is_large_binary(arrow_type):
        return bytes(_CHANCE.randrange(5))
    if pa.types.is_fixed_size_binary(arrow_type):
        return bytes([_CHANCE.randrange(256)] * arrow_type.byte_width)
    return _CHANCE.randrange(100)


TYPES = [
    pa.int8(),
    pa.float64(),
    pa.bool_(),
    pa.string(),
    pa.large_binary(),
    pa.timestamp("us"),
    pa.binary(3),
    pa.list_(pa.bool_()),
    pa.large_list(pa.string()),
    pa.list_(pa.list_(pa.int16())),
    pa.list_(pa.int32(), 3),
    pa.list_(pa.bool_(), 3),
    pa.list_(pa.list_(pa.string(), 2)),
    pa.struct({"a": pa.bool_(), "b": pa.list_(pa.string())}),
    pa.list_(pa.struct({"a": pa.bool_(), "b": pa.string()})),
    pa.map_(pa.string(), pa.bool_()),
    pa.struct([]),
]


@pytest.mark.parametrize("block_bytes", [64, 700, 1 << 20])
@pytest.mark.parametrize("is_file", [False, True])
def test_rows_of_a_batch_that_are_read_by_ranges_equal_those_that_arrow_reads(
    folder, monkeypatch, block_bytes, is_file
):
    monkeypatch.setattr(arrow, "TARGET_BLOCK_BYTES", block_bytes)
    n = 203
    table = pa.table({str(t): pa.array([value_of(t) for _ in range(n)], t) for t in TYPES})
    with (pa.ipc.new_file if is_file else pa.ipc.new_stream)(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=90)
    layout = layout_of(folder)
    (file,) = layout.files
    data = StoreFolder(open_store(str(folder)), None).open(file.info)
    names = table.schema.names
    first = 0
    for block, n_records in enumerate(file.index.n_records.tolist()):
        schema = pa.ipc.read_schema(pa.py_buffer(file.index.parts["schema"]))
        rows = layout._read_rows(file, data, schema, block, names)
        for name in names:
            rows[name].validate(full=True)
            assert rows[name].equals(table[name].slice(first, n_records).combine_chunks()), (name, block)
            alone = layout._read_rows(file, data, schema, block, [name])[name]
            assert alone.equals(rows[name])
        first += n_records
    assert first == n
    if block_bytes < 1 << 20:
        assert len(file.index.n_records) > 3


def test_a_column_of_a_batch_is_read_without_the_others(folder):
    save_to_disk(folder, [hf_table(hf_columns(0, 400, image_bytes=20_000))], 400)
    layout = layout_of(folder)
    (file,) = layout.files
    n_blocks = len(file.index.n_records)
    assert n_blocks >= 6
    assert int(file.index.raw_bytes.max()) < 3 << 20
    labels = sum(one.n_bytes for one in layout.ranges(file, range(n_blocks), ["label"]))
    assert labels < file.info.n_bytes / 50


def test_class_names_and_images_keep_their_meaning(folder):
    save_to_disk(folder, [hf_table(hf_columns(0, 20))], 10)
    dataset = tc.Dataset(folder)
    label = dataset.schema.columns[dataset.schema.index("label")]
    assert label.classes == ("cat", "dog", "owl")
    assert str(dataset.schema.columns[dataset.schema.index("image")]) == "image"


def test_an_image_that_is_stored_as_a_path_is_an_error_that_says_what_to_do(folder):
    table = hf_table(hf_columns(0, 20))
    image = pa.array([{"bytes": None, "path": "/photos/1.jpg"}] * 20, table.schema.field("image").type)
    write_stream(folder / "a.arrow", table.set_column(1, table.schema.field("image"), image))
    dataset = tc.Dataset(folder)
    with pytest.raises(SchemaError, match=r"a\.arrow.*'/photos/1\.jpg'.*embed_table_storage"):
        dataset[3]


def test_an_image_that_is_missing_is_none(folder):
    table = hf_table(hf_columns(0, 20))
    values = [None if i == 2 else {"bytes": None if i == 3 else b"x", "path": None} for i in range(20)]
    image = pa.array(values, table.schema.field("image").type)
    write_stream(folder / "a.arrow", table.set_column(1, table.schema.field("image"), image))
    found = [record["image"] for record in tc.Dataset(folder)]
    assert found == [None if i in (2, 3) else b"x" for i in range(20)]


def test_arrays_that_are_not_of_their_stated_shape_are_an_error(folder):
    features = {"grid": {"shape": [2, 2], "dtype": "int8", "_type": "Array2D"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    grid = pa.array([[[1, 2], [3, 4]], [[1, 2, 3], [4]]], pa.list_(pa.list_(pa.int8())))
    write_stream(folder / "a.arrow", pa.table({"grid": grid}).replace_schema_metadata(metadata))
    with pytest.raises(SchemaError, match=r"a\.arrow, block 0: expected int8\[2, 2\]"):
        list(tc.Dataset(folder))


def test_the_metadata_of_a_parquet_file_gives_the_same_schema():
    table = hf_table(hf_columns(0, 5))
    plain = pa.schema([field.with_nullable(False) for field in table.schema])
    schema = hf_features_schema(features_of(table.schema), plain)
    assert str(schema.columns[schema.index("image")]) == "image"
    column = schema.columns[schema.index("image")]
    assert array_of(column, table["image"], "here").to_pylist() == [one["bytes"] for one in table["image"].to_pylist()]
    assert features_of(table.schema.remove_metadata()) == {}
    assert features_of(table.schema.with_metadata({"huggingface": "[1]"})) == {}


def test_a_folder_of_splits_is_an_error_that_names_them(folder):
    for split in ("train", "test"):
        save_to_disk(folder / split, [hf_table(hf_columns(0, 20))], 10)
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(SchemaError, match=r"test, train.*data/train$"):
        tc.Dataset(folder)
    assert len(tc.Dataset(folder / "train")) == 20


def test_a_missing_file_of_a_saved_data_set_is_an_error(folder):
    save_to_disk(folder, [hf_table(hf_columns(0, 20))] * 2, 10)
    (folder / "data-00000-of-00002.arrow").unlink()
    with pytest.raises(SchemaError, match=r"data-00000-of-00002\.arrow"):
        tc.Dataset(folder)


def test_a_state_of_another_program_is_an_error(folder):
    save_to_disk(folder, [hf_table(hf_columns(0, 20))], 10)
    (folder / "state.json").write_text('{"step": 3}')
    with pytest.raises(SchemaError, match=r"state\.json"):
        tc.Dataset(folder)


def test_files_with_different_columns_are_refused_by_name(folder):
    write_stream(folder / "a.arrow", pa.table({"x": [1]}))
    write_stream(folder / "b.arrow", pa.table({"x": [1.5]}))
    with pytest.raises(SchemaError, match=r"b\.arrow.*int64.*a\.arrow"):
        tc.Dataset(folder)


def test_files_of_feather_v1_and_of_other_programs_are_refused(folder):
    (folder / "a.feather").write_bytes(b"FEA1" + bytes(60) + b"FEA1")
    with pytest.raises(SchemaError, match=r"a\.feather.*V1"):
        tc.Dataset(folder)
    (folder / "a.feather").write_bytes(b"something else" * 10)
    with pytest.raises(TierCacheError, match=r"a\.feather"):
        tc.Dataset(folder)


@pytest.mark.parametrize("write", ["stream", "file", "compressed"])
def test_files_that_were_cut_or_changed_anywhere_never_crash(folder, write):
    table = pa.table(
        {
            "text": [f"{i}" * (i % 9) for i in range(60)],
            "tokens": [list(range(i % 7)) for i in range(60)],
            "kind": pa.array([f"k{i % 3}" for i in range(60)]).dictionary_encode()
            if write == "compressed"
            else [1] * 60,
        }
    )
    path = folder / "a.arrow"
    if write == "compressed":
        feather.write_feather(table, str(path), compression="lz4", chunksize=20)
    else:
        with (pa.ipc.new_stream if write == "stream" else pa.ipc.new_file)(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=20)
    whole = path.read_bytes()
    chance = random.Random(write)
    for _ in range(250):
        data = bytearray(whole)
        if chance.random() < 0.3:
            del data[chance.randrange(len(data)) :]
        for _ in range(chance.choice([0, 1, 3, 30])):
            data[chance.randrange(len(data))] = chance.choice([0, 1, 127, 128, 255, chance.randrange(256)])
        path.write_bytes(data)
        try:
            message = f"{path}: {len(list(tc.Dataset(folder)))} records"
        except TierCacheError as error:
            message = str(error)
        assert "a.arrow" in message or "column" in message or str(folder) in message


def test_offsets_that_leave_their_values_are_found_before_they_are_used(folder):
    text = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(np.array([0, 1 << 20, 2, 3], "<i4")), pa.py_buffer(b"abc")]
    )
    write_stream(folder / "a.arrow", pa.table({"text": text}))
    with pytest.raises(CorruptShard, match=r"a\.arrow, ?.*block 0|a\.arrow: block 0"):
        list(tc.Dataset(folder))
