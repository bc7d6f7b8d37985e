"""Files that another library's own package has written, packed and compared with that package's own reading."""

import io

import numpy as np
import pytest

import tiercache as tc

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("compression", ["", "GZIP"])
def test_examples_of_tensorflow_are_packed_as_tensorflow_parses_them(tmp_path, compression):
    tf = pytest.importorskip("tensorflow")
    rng = np.random.default_rng(0)
    train = tf.train
    (tmp_path / "in").mkdir()
    number = iter(range(1000))
    for name in ("a", "b"):
        options = tf.io.TFRecordOptions(compression_type=compression)
        with tf.io.TFRecordWriter(str(tmp_path / "in" / f"{name}.tfrecord"), options) as writer:
            for i in (next(number) for _ in range(300)):
                feature = {
                    "id": train.Feature(int64_list=train.Int64List(value=[i - 300])),
                    "tokens": train.Feature(int64_list=train.Int64List(value=rng.integers(-(2**63), 2**63, i % 50))),
                    "score": train.Feature(float_list=train.FloatList(value=[i / 7])),
                    "x": train.Feature(float_list=train.FloatList(value=rng.random(5))),
                    "text": train.Feature(bytes_list=train.BytesList(value=[f"é{i}".encode()])),
                    "raw": train.Feature(bytes_list=train.BytesList(value=[rng.bytes(i % 9), b"x"])),
                }
                if i % 3 == 0:
                    feature["opt"] = train.Feature(int64_list=train.Int64List(value=[i]))
                writer.write(train.Example(features=train.Features(feature=feature)).SerializeToString())
    tc.pack(tmp_path / "in", tmp_path / "out", schema={"text": "str"})
    spec = {name: tf.io.VarLenFeature(tf.int64) for name in ("id", "tokens", "opt")}
    spec |= {name: tf.io.VarLenFeature(tf.float32) for name in ("score", "x")}
    spec |= {name: tf.io.VarLenFeature(tf.string) for name in ("text", "raw")}
    paths = [str(tmp_path / "in" / f"{name}.tfrecord") for name in ("a", "b")]
    theirs = [
        {name: tf.sparse.to_dense(value).numpy() for name, value in tf.io.parse_single_example(record, spec).items()}
        for record in tf.data.TFRecordDataset(paths, compression)
    ]
    ours = tc.Dataset(tmp_path / "out")
    assert len(ours) == len(theirs) == 600
    for found, expected in zip(ours, theirs, strict=True):
        assert [found["id"]] == expected["id"].tolist()
        assert [found["score"]] == expected["score"].tolist()
        assert [found["text"].encode()] == expected["text"].tolist()
        assert list(found["raw"]) == expected["raw"].tolist()
        assert [value for value in [found["opt"]] if value is not None] == expected["opt"].tolist()
        for name in ("tokens", "x"):
            assert found[name].dtype == expected[name].dtype
            assert np.array_equal(found[name], expected[name])


@pytest.mark.filterwarnings("ignore")  # of LitData and of the packages that it imports
@pytest.mark.parametrize("compression", ["", "zstd chunk", "zstd batch", "zstd sample"])
def test_a_data_set_of_litdata_is_packed_as_its_streaming_data_set_reads_it(tmp_path, compression):
    writer = pytest.importorskip("litdata.streaming.writer")
    torch = pytest.importorskip("torch")
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    codec, _, level = compression.partition(" ")
    how = {"compression": codec, "compression_level": level} if codec else {}
    out = writer.BinaryWriter(str(tmp_path / "in"), chunk_size=70, **how)
    for i in range(200):
        picture = image.fromarray(rng.integers(0, 255, (8 + i % 5, 10, 3), np.uint8))
        encoded = io.BytesIO()
        picture.save(encoded, "JPEG")
        encoded.seek(0)
        out[i] = {
            "int": i - 100,
            "float": i / 7,
            "str": f"é{i}",
            "bytes": rng.bytes(i % 9),
            "bool": i % 3 == 0,
            "tensor": torch.from_numpy(rng.random((2, 1 + i % 3))),
            "half": torch.full((2, 2), i, dtype=torch.float16),
            "tokens": torch.arange(i % 8, dtype=torch.int32),
            "matrix": rng.integers(0, 9, (3, 2)).astype(np.uint16),
            "vector": rng.random(4, np.float32),
            "jpeg": image.open(encoded),
            "pil": picture,
            "nested": {"a": i, "b": str(i)},
        }
    out.done()
    out.merge()
    tc.pack(tmp_path / "in", tmp_path / "out")
    reader = pytest.importorskip("litdata").StreamingDataset(str(tmp_path / "in"), shuffle=False)
    ours = tc.Dataset(tmp_path / "out")
    assert len(ours) == len(reader) == 200
    for found, expected in zip(ours, (reader[i] for i in range(200)), strict=True):
        for name in ("int", "float", "str", "bool"):
            assert found[name] == expected[name]
        assert found["bytes"] == memoryview(expected["bytes"]).tobytes()
        for name in ("tensor", "half", "tokens", "matrix", "vector"):
            assert found[name].dtype == np.asarray(expected[name]).dtype
            assert np.array_equal(found[name], expected[name])
        assert np.array_equal(found["pil"], np.asarray(expected["pil"]))
        decoded = np.asarray(image.open(io.BytesIO(found["jpeg"])))
        assert np.array_equal(decoded.transpose(2, 0, 1), expected["jpeg"])
        assert {"a": found["nested.a"], "b": found["nested.b"]} == expected["nested"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compression", ["", "zstd"])
def test_records_of_plain_values_of_litdata_are_packed_as_its_streaming_data_set_reads_them(tmp_path, compression):
    writer = pytest.importorskip("litdata.streaming.writer")
    rows = [
        {
            "id": 2**40 + i,
            "text": f"é{i}",
            "raw": b"x" * (i % 4),
            "ok": i % 3 == 0,
            "turns": [{"who": str(i), "n": i}] * (i % 3),
            "maybe": None if i % 5 else i,
        }
        for i in range(1000)
    ]
    out = writer.BinaryWriter(str(tmp_path / "in"), chunk_size=300, compression=compression or None)
    for i, row in enumerate(rows):
        out[i] = row
    out.done()
    out.merge()
    reader = pytest.importorskip("litdata").StreamingDataset(str(tmp_path / "in"), shuffle=False)
    tc.pack(tmp_path / "in", tmp_path / "out")
    assert list(tc.Dataset(tmp_path / "out")) == [reader[i] for i in range(1000)] == rows
