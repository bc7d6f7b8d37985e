"""tc.export: what is exported and packed again is equal, in every format; files appear complete."""

import hashlib
import io
import json
import tarfile

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image
from tests.support.every_kind import EVERY_KIND, columns_of_every_kind, is_same

import tiercache as tc
from tiercache.packer.export_formats import MdsFile

FORMATS = ("parquet", "arrow", "webdataset", "mds", "jsonl")
N = 200
SCHEMA = EVERY_KIND | {
    "names": "list<str>?",
    "pairs": "struct<a: str, b: int8?>",
    "big": "uint64",
    "flags": "bool[*]",
    "holes": "list<int32?>",
    "photo": "image",
    "never_null": "str?",
    "class": "int16",
}
# What a format has no type or no null for: the refusals are tested below.
LACKING = {
    "parquet": ["nothing"],
    "arrow": [],
    "webdataset": [],
    "mds": ["nothing", "pair", "raw", "cut"],
    "jsonl": ["blob", "raw", "picture", "photo", "matrix", "boxes"],
}


def columns(n):
    return columns_of_every_kind(n) | {
        "names": [None if i % 3 == 0 else ["a"] * (i % 4) for i in range(n)],
        "pairs": [{"a": str(i), "b": None} for i in range(n)],
        "big": np.arange(n, dtype=np.uint64) + 2**63,
        "flags": [np.ones(i % 3, bool) for i in range(n)],
        "holes": [[None, i] for i in range(n)],
        "photo": [b"\xff\xd8\xff" + bytes([i]) for i in range(n)],
        "never_null": ["x"] * n,
        "class": np.arange(n) % 2,
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    url = tmp_path_factory.mktemp("export") / "set"
    with tc.Writer(
        url, schema=SCHEMA, classes={"class": ["cat", "dog"]}, shard_size="16KiB", block_size="2KiB"
    ) as writer:
        writer.write_batch(columns(N))
    return tc.Dataset(url)


def packed_again(folder, format_name, schema):
    """The data set that pack makes of an export, by the rule of the guide: schema= for formats that lack types."""
    states_types = format_name in ("parquet", "arrow")
    tc.pack(folder, f"{folder}.again", schema=None if states_types else schema)
    return tc.Dataset(f"{folder}.again")


def assert_same(found, expected):
    assert found.schema == expected.schema
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in other:
            assert is_same(one[name], other[name]), name


@pytest.mark.parametrize("format_name", FORMATS)
def test_an_export_that_is_packed_again_is_equal(dataset, tmp_path, format_name):
    some = dataset.select_columns([name for name in SCHEMA if name not in LACKING[format_name]])
    files = tc.export(some, tmp_path / "out", format=format_name, jobs=2)
    assert len(files) > 5
    assert_same(packed_again(tmp_path / "out", format_name, some.schema), some)


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_view_is_exported_in_its_order(dataset, tmp_path, format_name):
    some = dataset.select_columns(["id", "text"])
    views = {
        "filter": some.filter(pc.field("id") > 77),
        "order": some.select(np.arange(N)[::-3]),
        "mix": tc.mix([some.take(50), some.skip(50).take(100)], weights=[0.5, 0.5]),
    }
    for name, view in views.items():
        tc.export(view, tmp_path / name, format=format_name)
        again = packed_again(tmp_path / name, format_name, view.schema)
        assert [record["id"] for record in again] == [view[i]["id"] for i in range(len(view))]


@pytest.mark.parametrize("format_name", ["parquet", "arrow", "mds", "webdataset"])
def test_an_export_is_read_in_place(dataset, tmp_path, format_name):
    some = dataset.select_columns([name for name in SCHEMA if name not in LACKING[format_name]])
    tc.export(some, tmp_path / "out", format=format_name)
    found = tc.Dataset(tmp_path / "out")
    assert len(found) == N
    if format_name in ("parquet", "arrow"):
        assert_same(found, some)
    else:
        texts = found.select_columns(["text"])
        assert [next(iter(record.values())) for record in texts] == [record["text"] for record in some]


NUMBERS = {
    "int8": st.integers(-128, 127),
    "uint64": st.integers(0, 2**64 - 1),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "float32": st.floats(width=32, allow_nan=False),
    "float64": st.floats(allow_nan=False),
    "bool": st.booleans(),
}
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
JSON = st.recursive(
    st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
SHAPES = st.sampled_from([(2,), (1, 3), (None,), (None, 2), (2, None)])


@st.composite
def kinds(draw, format_name):
    """A type, and a strategy of its values: none that the format refuses."""
    family = draw(st.sampled_from(["number", "text", "json", "array", "arrow", "bytes", "image"]))
    dtype = draw(st.sampled_from(sorted(NUMBERS)))
    nullable = draw(st.booleans())
    if family in ("bytes", "image") and format_name == "jsonl":
        family = "text"
    if family in ("bytes", "image", "array") and format_name == "mds":
        nullable = False
    if family == "array":
        shape = draw(SHAPES)
        least = 1 if format_name == "jsonl" else 0
        sizes = st.tuples(*(st.integers(least, 3) if d is None else st.just(d) for d in shape))
        element = "uint8" if dtype == "bool" else dtype
        values = sizes.flatmap(
            lambda size: st.lists(NUMBERS[dtype], min_size=int(np.prod(size)), max_size=int(np.prod(size))).map(
                lambda flat: np.array(flat, element).astype(dtype).reshape(size)
            )
        )
        name = f"{dtype}[{', '.join('*' if d is None else str(d) for d in shape)}]"
    else:
        name, values = {
            "number": (dtype, NUMBERS[dtype]),
            "text": ("str", TEXT),
            "json": ("json", JSON),
            "arrow": ("struct<a: str?, b: list<int16>>", st.builds(lambda a, b: {"a": a, "b": b}, TEXT, st.just([1]))),
            "bytes": ("bytes", st.binary(max_size=9)),
            "image": (draw(st.sampled_from(["image", "image<png>", "image<webp>"])), st.binary(min_size=1, max_size=9)),
        }[family]
    return (f"{name}?", st.none() | values) if nullable else (name, values)


# Endings as names: a tar must tell them from those that it adds.
NAMES = st.sampled_from(["a", "b", "x.json", "jpg", "cls", "txt", "é", "a b", "n.npy", "bin"])


@st.composite
def data_sets(draw, format_name):
    columns = draw(st.dictionaries(NAMES, kinds(format_name), min_size=1, max_size=4))
    n = draw(st.integers(1, 6))
    records = [{name: draw(values) for name, (_, values) in columns.items()} for _ in range(n)]
    # A tar has no sample without a file, and no column that no sample has.
    records[0] = {name: draw(values.filter(lambda value: value is not None)) for name, (_, values) in columns.items()}
    keys = {"k": "int32"} if format_name == "webdataset" else {}
    for i, record in enumerate(records if keys else []):
        record["k"] = i
    return keys | {name: kind for name, (kind, _) in columns.items()}, records


@pytest.mark.parametrize("format_name", FORMATS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_records_survive_export_and_pack(tmp_path_factory, format_name, data):
    schema, records = data.draw(data_sets(format_name))
    folder = tmp_path_factory.mktemp("any")
    with tc.Writer(folder / "set", schema=schema) as writer:
        for record in records:
            writer.write(record)
    dataset = tc.Dataset(folder / "set")
    tc.export(dataset, folder / "out", format=format_name)
    assert_same(packed_again(folder / "out", format_name, dataset.schema), dataset)


@pytest.mark.parametrize(
    ("name", "format_name"),
    [("a.parquet", "parquet"), ("A.ARROW", "arrow"), ("a.ipc", "arrow"), ("a.tar", "webdataset"), ("a.jsonl", "jsonl")],
)
def test_the_name_of_one_file_says_its_format(dataset, tmp_path, name, format_name):
    some = dataset.select_columns(["id", "text"])
    assert tc.export(some, tmp_path / name) == [f"{tmp_path}/{name}"]
    tc.pack(tmp_path / name, tmp_path / "again", kind=format_name, schema=some.schema)
    assert_same(tc.Dataset(tmp_path / "again"), some)


def test_a_name_or_an_option_that_fits_no_format_is_refused_before_anything_is_written(dataset, tmp_path):
    def said(target, **options):
        with pytest.raises(ValueError, match=r"\w") as caught:
            tc.export(dataset, tmp_path / target, **options)
        return str(caught.value)

    assert "writes no .csv file: name a file that ends in .parquet" in said("a.csv")
    assert "no .parquet file as jsonl" in said("a.parquet", format="jsonl")
    assert "no .mds file" in said("a.mds", format="mds")
    assert "one of parquet, arrow, webdataset, mds, jsonl, got 'orc'" in said("a", format="orc")
    assert "compression of arrow must be one of none, lz4, zstd, got 'gzip'" in said("a.arrow", compression="gzip")
    assert list(tmp_path.iterdir()) == []


def test_a_column_or_value_that_a_format_lacks_is_an_error_that_names_formats_which_have_it(dataset, tmp_path):
    def said(names, format_name, records=slice(None)):
        with pytest.raises(tc.SchemaError) as caught:
            tc.export(dataset.select_columns(names), tmp_path / "out", format=format_name)
        return str(caught.value)

    assert "'picture': JSON has no image<png>; parquet and arrow have all types, webdataset" in said(
        ["picture"], "jsonl"
    )
    assert "'nothing': MDS has no int16[0]; parquet and arrow" in said(["nothing"], "mds")
    assert "'raw': record 0 has a null, and MDS has nulls only in JSON: leave such records out" in said(["raw"], "mds")
    assert "'matrix': record 0 has an array of the shape (0, 0)" in said(["matrix"], "jsonl")
    assert "record 0 has only nulls, and a tar has no sample without a file" in said(["note"], "webdataset")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


def test_images_texts_and_arrays_of_a_tar_have_the_endings_that_webdataset_decodes(dataset, tmp_path):
    names = ["picture", "photo", "class", "text", "meta", "matrix", "score", "blob"]
    tc.export(dataset.select_columns(names).take(3), tmp_path / "out.tar")
    with tarfile.open(tmp_path / "out.tar") as tar:
        first = [name.partition(".") for name in tar.getnames()][: len(names)]
        assert {key for key, _, _ in first} == {"000000000", "000000001"}
        assert {ending for _, _, ending in first} >= {"picture.png", "photo.jpg", "class.cls", "text", "blob"}
        assert {name.partition(".")[2] for name in tar.getnames()} >= {"meta.json", "matrix.npy", "score.json"}


def test_the_samples_of_a_tar_that_is_read_in_place_are_exported_with_their_keys_and_endings(tmp_path):
    with tc.Writer(tmp_path / "set", schema={"__key__": "str", "jpg": "image", "cls": "int64"}) as writer:
        for i in range(5):
            writer.write({"__key__": f"dir/{i:03d}", "jpg": bytes([i]), "cls": i})
    tc.export(tc.Dataset(tmp_path / "set"), tmp_path / "a.tar")
    again = tc.Dataset(tmp_path / "a.tar")
    assert again.schema == tc.Dataset(tmp_path / "set").schema
    tc.export(again, tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    for wrong in ("a.b", "__x__", "dir/"):
        with tc.Writer(tmp_path / "bad", schema={"__key__": "str", "cls": "int64"}, mode="overwrite") as writer:
            writer.write({"__key__": wrong, "cls": 1})
        with pytest.raises(tc.SchemaError, match="cannot be the key of a sample"):
            tc.export(tc.Dataset(tmp_path / "bad"), tmp_path / "c.tar")


def test_a_stopped_export_leaves_complete_files_and_no_index(dataset, tmp_path):
    some = dataset.select_columns(["id", "text"])

    def stop(n_records):
        if n_records > N // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tc.export(some, tmp_path / "out", format="mds", on_progress=stop)
    names = sorted(path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith("."))
    assert 0 < len(names) < 10
    assert "index.json" not in names
    with pytest.raises(tc.StoreError, match="already has a file of another export"):
        tc.export(some, tmp_path / "out", format="mds")
    tc.export(some, tmp_path / "out", format="mds", overwrite=True)
    assert len(tc.Dataset(tmp_path / "out")) == N

    with pytest.raises(KeyboardInterrupt):  # the old index would describe shards that were replaced
        tc.export(some, tmp_path / "out", format="mds", overwrite=True, on_progress=stop)
    assert not (tmp_path / "out" / "index.json").exists()


def test_an_export_in_another_format_replaces_the_files_of_the_one_before(dataset, tmp_path):
    some = dataset.select_columns(["id"])
    tc.export(some, tmp_path / "out", format="mds")
    (tmp_path / "out" / "README.md").write_text("kept")
    with pytest.raises(tc.StoreError, match="another export"):
        tc.export(some.take(5), tmp_path / "out", format="jsonl")
    tc.export(some.take(5), tmp_path / "out", format="arrow", overwrite=True)
    names = {path.name for path in (tmp_path / "out").iterdir() if path.suffix in (".mds", ".arrow", ".md")}
    assert names == {"part-00000.arrow", "README.md"}


def test_large_shards_become_several_shards_of_mds_with_sizes_and_hashes_in_the_index(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(MdsFile, "file_bytes", 1 << 8)
    monkeypatch.setattr(MdsFile, "group_bytes", 1)
    some = dataset.select_columns(["id", "text"])
    files = tc.export(some, tmp_path / "out", format="mds")
    index = json.loads((tmp_path / "out" / "index.json").read_bytes())
    assert len(index["shards"]) == len(files) - 1 > 13
    for shard in index["shards"]:
        content = (tmp_path / "out" / shard["raw_data"]["basename"]).read_bytes()
        assert shard["raw_data"]["bytes"] == len(content)
        assert shard["raw_data"]["hashes"] == {"sha256": hashlib.sha256(content).hexdigest()}
    assert_same(tc.Dataset(tmp_path / "out"), some)


def test_no_records_are_a_file_with_the_columns(dataset, tmp_path):
    none = dataset.take(0)
    tc.export(none, tmp_path / "out.arrow")
    assert pa.ipc.open_file(tmp_path / "out.arrow").schema.equals(none.schema.arrow)
    tc.export(none.select_columns(["id"]), tmp_path / "mds", format="mds")
    assert [shard["samples"] for shard in json.loads((tmp_path / "mds/index.json").read_bytes())["shards"]] == [0]


def test_an_image_that_is_neither_jpeg_nor_png_is_not_called_a_jpeg_after_an_export_to_mds(tmp_path):
    encoded = io.BytesIO()
    Image.new("RGB", (4, 3)).save(encoded, "webp")
    with tc.Writer(tmp_path / "set", schema={"image": "image"}) as writer:
        writer.write({"image": encoded.getvalue()})
    tc.export(tc.Dataset(tmp_path / "set"), tmp_path / "mds", format="mds")
    tc.pack(tmp_path / "mds", tmp_path / "again")
    for found in (tc.Dataset(tmp_path / "mds"), tc.Dataset(tmp_path / "again")):
        assert (str(found.schema.columns[0]), found[0]["image"]) == ("image", encoded.getvalue())
