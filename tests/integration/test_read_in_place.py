"""Data that another library's own package has written, read in place and compared with that package's own reading."""

import io
import os
import pickle
import subprocess
import sys
from contextlib import closing
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.support.hub import Hub

import tiercache as tc
from tiercache.errors import SchemaError
from tiercache.layouts.splits import choose_split

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", str(tmp_path / "default-cache"))


@pytest.mark.parametrize("form", ["saved", "parquet", "packed parquet"])
def test_a_data_set_of_hugging_face_is_read_as_datasets_reads_it(tmp_path, monkeypatch, form):
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(pytest.importorskip("tqdm").tqdm, "monitor_interval", 0)  # it leaves a thread
    rng = np.random.default_rng(1)
    value = datasets.Value
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "tokens": datasets.Sequence(value("int32")),
            "grid": datasets.Array2D((2, 3), "float32"),
            "track": datasets.Array2D((None, 2), "int16"),
            "text": value("string"),
            "opt": value("float64"),
            "pair": {"x": value("int8"), "y": value("string")},
        }
    )
    rows = [
        {
            "image": None if i % 9 == 0 else image.fromarray(rng.integers(0, 255, (8, 9, 3), np.uint8)),
            "label": i % 2,
            "tokens": list(range(i % 7)),
            "grid": rng.random((2, 3)).tolist(),
            "track": rng.integers(0, 9, (1 + i % 3, 2)).tolist(),
            "text": f"é{i}",
            "opt": None if i % 4 == 0 else i / 3,
            "pair": {"x": i % 100, "y": None if i % 5 == 0 else str(i)},
        }
        for i in range(700)
    ]
    written = datasets.Dataset.from_list(rows, features=features)
    if form == "saved":
        written.save_to_disk(tmp_path / "saved", num_shards=3)
        theirs = datasets.load_from_disk(str(tmp_path / "saved"))
    else:
        (tmp_path / "saved").mkdir()
        written.to_parquet(tmp_path / "saved" / "a.parquet", batch_size=100)
        theirs = datasets.load_dataset(str(tmp_path / "saved"), split="train", cache_dir=str(tmp_path / "theirs"))
    if form == "packed parquet":
        tc.pack(tmp_path / "saved", tmp_path / "packed")
    ours = tc.Dataset(tmp_path / ("packed" if form == "packed parquet" else "saved"))
    assert len(ours) == len(theirs) == 700
    assert ours.schema.columns[ours.schema.index("label")].classes == ("cat", "dog")
    for found, expected in zip(ours, theirs, strict=True):
        if expected["image"] is None:
            assert found["image"] is None
        else:
            pixels = np.asarray(image.open(io.BytesIO(found["image"])))
            assert np.array_equal(pixels, np.asarray(expected["image"]))
        for name in ("tokens", "grid", "track"):
            assert np.array_equal(found[name], np.array(expected[name], found[name].dtype).reshape(found[name].shape))
        for name in ("label", "text", "opt", "pair"):
            assert found[name] == expected[name]


def test_documents_of_megatron_are_read_as_megatron_reads_them(tmp_path):
    torch = pytest.importorskip("torch")
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    rng = np.random.default_rng(1)
    prefix = str(tmp_path / "text_document")
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(2000):
        lengths = rng.integers(1, 500, rng.integers(1, 4)).tolist()
        builder.add_document(torch.from_numpy(rng.integers(0, 50_000, sum(lengths))), lengths)
    builder.finalize(f"{prefix}.idx")
    theirs = megatron.IndexedDataset(prefix)
    ours = tc.Dataset(prefix)
    bounds = theirs.document_indices.tolist()
    assert len(ours) == len(bounds) - 1 == 2000
    for found, start, end in zip(ours, bounds, bounds[1:], strict=False):
        expected = np.concatenate(theirs[start:end])
        assert found["tokens"].dtype == expected.dtype
        assert np.array_equal(found["tokens"], expected)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # streaming leaves files to the collector
@pytest.mark.parametrize("compression", [None, "zstd", "gz", "bz2", "br", "snappy"])
def test_a_data_set_of_mosaicml_is_read_as_its_streaming_data_set_reads_it(tmp_path, compression):
    streaming = pytest.importorskip("streaming")
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    columns = {name: name for name in ("int", "str", "bytes", "float64", "uint8", "json", "jpeg", "png", "pil")}
    columns |= {name: name for name in ("str_int", "str_float", "str_decimal", "ndarray")}
    columns |= {"tokens": "ndarray:uint16", "matrix": "ndarray:float32:2,3"}
    with streaming.MDSWriter(out=str(tmp_path), columns=columns, compression=compression, size_limit=1 << 18) as out:
        for i in range(200):
            picture = image.fromarray(rng.integers(0, 255, (8 + i % 5, 10, 3), np.uint8))
            out.write(
                {
                    "int": i,
                    "str": f"text {i}",
                    "bytes": bytes([i]) * (i % 9),
                    "float64": i / 7,
                    "uint8": i,
                    "json": {"a": [i, None]},
                    "jpeg": picture,
                    "png": picture,
                    "pil": picture,
                    "str_int": i * 10**9,
                    "str_float": i / 3,
                    "str_decimal": Decimal(i) / 8,
                    "ndarray": rng.integers(0, 9, (1 + i % 3, 2)),
                    "tokens": rng.integers(0, 60000, 1 + i % 400).astype(np.uint16),
                    "matrix": rng.random((2, 3), np.float32),
                }
            )
    theirs = streaming.StreamingDataset(local=str(tmp_path), shuffle=False, batch_size=1)
    ours = tc.Dataset(tmp_path)
    assert len(ours) == len(theirs) == 200
    for found, expected in zip(ours, (theirs[i] for i in range(200)), strict=True):
        for name in ("jpeg", "png"):
            assert np.array_equal(np.asarray(image.open(io.BytesIO(found[name]))), np.asarray(expected[name]))
        assert np.array_equal(found["pil"], np.asarray(expected["pil"]))
        for name in ("ndarray", "tokens", "matrix"):
            assert np.array_equal(found[name], expected[name])
            assert found[name].dtype == expected[name].dtype
        assert found["str_decimal"] == str(expected["str_decimal"])
        for name in ("int", "str", "bytes", "float64", "uint8", "json", "str_int", "str_float"):
            assert found[name] == expected[name]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as above
def test_shards_of_webdataset_are_read_as_webdataset_reads_them(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    rng = np.random.default_rng(0)
    with webdataset.ShardWriter(str(tmp_path / "shard-%03d.tar"), maxcount=70, verbose=0) as out:
        for i in range(200):
            picture = rng.integers(0, 255, (8 + i % 5, 10, 3), np.uint8)
            sample = {"__key__": f"{'x' * (i % 90)}/{i:06}", "png": picture, "cls": i % 7, "json": {"i": [i, None]}}
            out.write(sample | ({"txt": f"täxt {i}"} if i % 3 else {}))
    shards = sorted(map(str, tmp_path.glob("*.tar")))
    theirs = webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8")
    ours = tc.Dataset(tmp_path)
    n_seen = 0
    for found, expected in zip(ours, theirs, strict=True):
        n_seen += 1
        pixels = pytest.importorskip("PIL.Image").open(io.BytesIO(found["png"])).convert("RGB")
        assert np.array_equal(np.asarray(pixels), expected["png"])
        assert found["txt"] == expected.get("txt")
        for name in ("__key__", "cls", "json"):
            assert found[name] == expected[name]
    assert n_seen == 200


_CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: "a/*.parquet"
  - split: extra
    path: [b/1.parquet, "c/**"]
- config_name: other
  data_dir: d
---
"""


@pytest.mark.parametrize(
    ("names", "card"),
    [
        (
            [f"data/{name}.parquet" for name in ("train-00000-of-00002", "train-00001-of-00002", "few-00000-of-00001")],
            "",
        ),
        (["train/1.parquet", "train/x/2.parquet", "my-test/1.parquet", "dev_2/3.parquet"], ""),
        (["train.parquet", "x.eval.parquet", "validation-0.parquet"], ""),
        (["one.parquet", "two/three.parquet"], ""),
        (["a/1.parquet", "a/2.parquet", "b/1.parquet", "c/d/1.parquet", "d/1.parquet", "b/2.parquet"], _CARD),
    ],
)
def test_splits_are_those_that_datasets_finds(tmp_path, monkeypatch, names, card):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(pytest.importorskip("tqdm").tqdm, "monitor_interval", 0)  # it leaves a thread
    folder = tmp_path / "data"
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"x": [number]}), folder / name)
    (folder / "README.md").write_text(card)
    theirs = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "theirs"))
    for split in theirs:
        found = choose_split(str(folder), sorted(names), [split] if len(theirs) > 1 else [], lambda: card)
        assert sorted(names.index(name) for name in found) == sorted(theirs[split]["x"])
    if len(theirs) > 1:
        with pytest.raises(SchemaError, match=", ".join(sorted(theirs)).replace(", ", "|")):
            tc.Dataset(folder)


_READ_BY_DATASETS = """
import pickle, sys
import datasets
found = datasets.load_dataset("owner/name", *sys.argv[2:], split=sys.argv[1])
found = found.cast_column("image", datasets.Image(decode=False))
names = found.features["label"].names
sys.stdout.buffer.write(pickle.dumps(([dict(row) for row in found], names)))
"""


@pytest.mark.parametrize(
    ("split", "path"), [(["train"], "train"), (["few"], "few"), (["train", "small"], "small/train")], ids=str
)
def test_a_repository_of_the_hub_is_read_as_datasets_reads_it(tmp_path, monkeypatch, split, path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(pytest.importorskip("tqdm").tqdm, "monitor_interval", 0)  # it leaves a thread
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    files: dict[str, bytes] = {}
    for number, name in enumerate(("data/train-00000-of-00002", "data/train-00001-of-00002", "data/few-0", "small/1")):
        rows = [{"image": {"bytes": b"%d-%d" % (number, i), "path": None}, "label": i % 2} for i in range(50 + number)]
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet", batch_size=20)
        files[f"{name}.parquet"] = (tmp_path / "a.parquet").read_bytes()
    card = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: few, path: data/few-*}
- config_name: small
  data_dir: small
---
"""
    with Hub() as hub:
        hub.push("owner/name", files | {"README.md": card.encode()})
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        command = [sys.executable, "-c", _READ_BY_DATASETS, *split]
        done = subprocess.run(command, capture_output=True, env=environment, timeout=120)
        assert not done.returncode, done.stderr.decode()
        rows, classes = pickle.loads(done.stdout)
        with closing(tc.Dataset(f"hf://datasets/owner/name/{path}", storage_options={"endpoint": hub.url})) as ours:
            assert len(rows) >= 50
            found = [(record["image"], record["label"]) for record in ours]
            assert found == [(row["image"]["bytes"], row["label"]) for row in rows]
            assert ours.classes == classes
