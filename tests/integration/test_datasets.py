"""Hugging Face datasets: over `tiercache::`, by name and by wildcard, prepared and streamed; and as sources of pack."""

from __future__ import annotations

import importlib
import io
import random
from typing import ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from tests.support.image_files import png

import tiercache as tc

datasets = pytest.importorskip("datasets", reason="`make integration` has it")

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

N_ROWS = 20_000


class CountedLocal(LocalFileSystem):
    """Local files under a protocol of their own, so that nobody opens them past fsspec; counts what is read."""

    protocol = "countedlocal"
    local_file = False
    reads: ClassVar[list[int]] = []

    @classmethod
    def _strip_protocol(cls, path):
        # datasets drops a "/" after "://".
        return super()._strip_protocol("/" + str(path).removeprefix("countedlocal://").lstrip("/"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        data = super().cat_file(path, start, end, **kwargs)
        self.reads.append(len(data))
        return data


@pytest.fixture
def url(tmp_path, monkeypatch):
    """Two Parquet files, by wildcard, and a cache and home of the test's own."""
    fsspec.register_implementation("countedlocal", CountedLocal, clobber=True)
    monkeypatch.setenv("TIERCACHE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TIERCACHE_CACHE_SIZE", "64MiB")
    chance = random.Random(1)
    monkeypatch.setattr(importlib.import_module("tqdm").tqdm, "monitor_interval", 0)  # it leaves a thread
    for number in range(2):
        ids = range(number * N_ROWS, (number + 1) * N_ROWS)
        out = io.BytesIO()
        texts = [chance.randbytes(100).hex() for _ in ids]
        pq.write_table(pa.table({"id": ids, "text": texts}), out, compression="none", row_group_size=N_ROWS // 4)
        (tmp_path / f"part-{number}.parquet").write_bytes(out.getvalue())
    CountedLocal.reads.clear()
    yield f"tiercache://{tmp_path}/*.parquet::countedlocal://"
    tiercache = fsspec.get_filesystem_class("tiercache")
    for fs in list(tiercache._cache.values()):
        fs.close()
    for kind in (tiercache, CountedLocal):
        kind.clear_instance_cache()


def read_bytes():
    n_bytes = sum(CountedLocal.reads)
    CountedLocal.reads.clear()
    return n_bytes


@pytest.mark.parametrize("chain", ["tiercache::countedlocal://{}", "tiercache://{}::countedlocal://"])
def test_files_are_prepared_through_the_cache(url, tmp_path, chain):
    """Their own copy is made once for each cache_dir: another home finds the bytes here."""
    url = chain.format(f"{tmp_path}/*.parquet")
    size = sum(path.stat().st_size for path in tmp_path.glob("*.parquet"))
    for home, expected_bytes in (("first", size), ("second", 0)):
        rows = datasets.load_dataset("parquet", data_files=url, split="train", cache_dir=str(tmp_path / home))
        assert rows["id"][:] == list(range(2 * N_ROWS))
        assert read_bytes() == expected_bytes


@pytest.mark.parametrize("wildcard", [True, False], ids=["by wildcard", "by name"])
def test_files_are_streamed_through_the_cache(url, wildcard, tmp_path):
    """By the long form of the URL: datasets takes "tiercache" alone before the "::" for a local file."""
    files = url if wildcard else [url.replace("*", f"part-{number}") for number in range(2)]
    size = sum(path.stat().st_size for path in tmp_path.glob("*.parquet"))
    for is_first in (True, False):
        rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        assert [row["id"] for row in rows] == list(range(2 * N_ROWS))
        assert read_bytes() <= (1.1 * size if is_first else 0)


def test_a_missing_file_is_said_to_be_missing(url):
    with pytest.raises(FileNotFoundError):
        datasets.load_dataset("parquet", data_files=url.replace("*", "none"), split="train")
    assert tc.Cache.default().entries() == []


def labelled_rows():
    for i in range(60):
        image = None if i == 5 else {"bytes": png(bytes([i]) * 1000), "path": None}
        yield {"image": image, "label": i % 2, "text": f"t{i}", "v": [i, i + 1], "maybe": None if i == 3 else i}


@pytest.mark.parametrize("kind", ["in memory", "shuffled", "stream of shards", "stream of a generator"])
def test_a_data_set_of_hugging_face_is_packed_with_its_types_images_and_class_names(tmp_path, kind):
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "text": datasets.Value("string"),
            "v": datasets.Sequence(datasets.Value("int32")),
            "maybe": datasets.Value("int16"),
        }
    )
    source = datasets.Dataset.from_list(list(labelled_rows()), features=features)
    if kind == "shuffled":
        source = source.shuffle(seed=1)
    elif kind == "stream of shards":
        source = source.to_iterable_dataset(num_shards=4)
    elif kind == "stream of a generator":
        source = datasets.IterableDataset.from_generator(labelled_rows, features=features)
    expected = [{**record, "image": record["image"] and record["image"]["bytes"]} for record in source]
    for workers in (1, 2):
        url = tmp_path / str(workers)
        # decode=True is the default: it must not make arrays of the images.
        version = tc.pack(
            source.cast_column("image", datasets.Image()), url, workers=workers, shard_size=3000, block_size=500
        )
        assert [str(column) for column in version.schema.columns] == ["image?", "int64", "str", "int32[*]", "int16?"]
        assert version.schema.columns[1].classes == ("cat", "dog")
        found = [{**record, "v": list(record["v"])} for record in tc.Dataset(url)]
        assert found == expected


def test_a_frame_of_polars_is_packed_as_its_rows(tmp_path):
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame({"x": [1, 2, None], "s": ["a", "b", "c"]})
    tc.pack(frame, tmp_path / "out")
    assert list(tc.Dataset(tmp_path / "out")) == frame.to_dicts()
