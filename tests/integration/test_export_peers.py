"""Files that tc.export has written, read by the real packages of their formats."""

import io
from contextlib import closing

import numpy as np
import pytest
from tests.flow.packer.test_export import LACKING, SCHEMA, columns

import tiercache as tc

pytestmark = [
    pytest.mark.integration,
    # streaming and webdataset leave files to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
]
N = 120


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", str(tmp_path / "default-cache"))
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)

    def encoded(kind):
        file = io.BytesIO()
        image.fromarray(rng.integers(0, 255, (6, 7, 3), np.uint8)).save(file, kind)
        return file.getvalue()

    found = columns(N)
    found["picture"] = [encoded("png") for _ in range(N)]
    found["photo"] = [encoded("jpeg") for _ in range(N)]
    with tc.Writer(tmp_path / "set", schema=SCHEMA, shard_size="16KiB", block_size="2KiB") as writer:
        writer.write_batch(found)
    with closing(tc.Dataset(tmp_path / "set")) as dataset:
        yield dataset


def pixels(image):
    return np.asarray(image.convert("RGB"))


def decoded(data):
    return pixels(pytest.importorskip("PIL.Image").open(io.BytesIO(data)))


def numbers(value):
    return value.float().numpy() if hasattr(value, "detach") else np.asarray(value)


def check(column, theirs, ours):
    """Compare a value as their reader returns it with ours: the same number, text, object, array or image."""
    if ours is None:
        assert theirs is None
    elif column.encoding or str(column) == "image":
        assert np.array_equal(pixels(theirs), decoded(ours))
    elif column.shape or column.dtype:
        assert np.array_equal(numbers(theirs), numbers(ours))
        assert numbers(theirs).shape == numbers(ours).shape
    else:
        assert theirs == ours


def test_mosaicml_streaming_reads_an_exported_data_set(dataset, tmp_path):
    streaming = pytest.importorskip("streaming")
    ours = dataset.select_columns([name for name in SCHEMA if name not in LACKING["mds"]])
    tc.export(ours, tmp_path / "mds", format="mds")
    theirs = streaming.StreamingDataset(local=str(tmp_path / "mds"), shuffle=False, batch_size=1)
    assert len(theirs) == N
    for i in range(N):
        record, expected = theirs[i], ours[i]
        assert list(record) == list(expected)
        for column in ours.schema.columns:
            check(column, record[column.name], expected[column.name])
    # A remote data set is fetched shard by shard, with its sizes and hashes checked.
    remote = streaming.StreamingDataset(
        remote=str(tmp_path / "mds"), local=str(tmp_path / "local"), validate_hash="sha256", shuffle=False, batch_size=1
    )
    assert [int(remote[i]["id"]) for i in range(N)] == list(range(N))


def test_webdataset_decodes_an_exported_data_set(dataset, tmp_path):
    wds = pytest.importorskip("webdataset")
    files = tc.export(dataset, tmp_path / "tars", format="webdataset")
    theirs = list(wds.WebDataset(files, shardshuffle=False, empty_check=False).decode("pil"))
    assert [sample["__key__"] for sample in theirs] == [f"{i:09d}" for i in range(N)]
    for i, sample in enumerate(theirs):
        members = {name.partition(".")[0]: value for name, value in sample.items() if not name.startswith("__")}
        for column in dataset.schema.columns:
            check(column, members.get(column.name), dataset[i][column.name])


def test_hugging_face_datasets_reads_exported_parquet_arrow_and_json_lines(dataset, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(pytest.importorskip("tqdm").tqdm, "monitor_interval", 0)  # it leaves a thread
    ours = dataset.select_columns(["id", "text", "score", "label", "names", "pairs"])
    expected = [ours[i] for i in range(N)]
    for builder, suffix in (("parquet", "parquet"), ("json", "jsonl"), ("arrow", "arrow")):
        files = tc.export(ours, tmp_path / suffix, format=suffix)
        theirs = datasets.load_dataset(builder, data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
        assert list(theirs) == expected
