"""How data sets, loaders, writers and batches are shown."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
import pytest

import tiercache as tc

SCHEMA = {"image": tc.Image("jpeg", nullable=True), "id": "int64", "text": "str", "half": "float32"}
N = 12


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("shown") / "data"
    with tc.Writer(path, schema=SCHEMA) as writer:
        writer.write_batch({"image": [None] * N, "id": np.arange(N), "text": ["a"] * N, "half": np.zeros(N)})
    return path


class TestDataset:
    def test_it_shows_the_steps_of_a_view(self, path):
        dataset = tc.Dataset(path, columns=["id"])
        view = dataset.skip(2).take(9).shuffle(4).shard(2, 0).filter(pc.field("id") > 5).select([0])
        steps = "skip(2).take(9).shuffle(4).shard(2, 0).filter((id > 5)).select(<1 numbers>)"
        assert f"version 1, 1 record by {steps}: " in repr(view)
        part = dataset.split({"a": 0.75, "b": 0.25}, seed=3, by="id")["b"]
        assert "by split({'a': 0.75, 'b': 0.25}, seed=3, by='id')['b']: " in repr(part)
        assert "by mix(weights=[7, 3]): " in repr(tc.mix([dataset, dataset], [0.7, 0.3]))

    def test_it_shows_url_version_records_and_how_columns_are_served(self, path):
        columns = "image: image<jpeg>?, id: int64, text: str, half: float32"
        assert repr(tc.Dataset(path)) == f"Dataset({str(path)!r}, version 1, 12 records: Schema({columns}))"
        decode = {"image": tc.DecodeImage(32, crop="random", dtype="float16")}
        dataset = tc.Dataset(path, decode=decode, cast={"half": "float16"}, layouts={"text": "buffer"})
        shown = repr(dataset)
        assert "half: float16" in shown
        assert "decode={'image': DecodeImage(size=(32, 32), crop='random', dtype='float16')}" in shown
        assert "cast={'half': 'float16'}, layouts={'text': 'buffer'}" in shown
        assert "as_tuple=('id', 'half')" in repr(dataset.as_tuple("id", "half"))
        assert "transform=len" in repr(tc.Dataset(path, transform=len))


class TestLoader:
    def test_it_shows_its_data_set_options_and_rank(self, path):
        options = tc.LoaderOptions(seed=3, rank=1, world_size=2)
        dataset = tc.Dataset(path)
        loader = tc.DataLoader(dataset, 8, shuffle=True, drop_last=True, options=options)
        rest = "batch_size=8, shuffle=True, drop_last=True, LoaderOptions(seed=3, rank=1, world_size=2), rank 1 of 2"
        assert repr(loader) == f"DataLoader({dataset!r}, {rest} (from options))"
        loader = tc.NumpyLoader(dataset, 8, shuffle=True, drop_last=True, options=options)
        assert repr(loader) == f"NumpyLoader({dataset!r}, {rest} (from options))"
        assert repr(tc.DataLoader(dataset, 8)) == f"DataLoader({dataset!r}, batch_size=8, rank 0 of 1 (alone))"
        assert repr(tc.DataLoader(dataset, batch_size=None)).endswith("torch's path, rank 0 of 1 (alone))")


def test_a_writer_shows_its_state(tmp_path):
    writer = tc.Writer(tmp_path / "data")
    assert repr(writer) == (f"Writer({str(tmp_path / 'data')!r}, mode='create', open, 0 records: schema not known yet)")
    writer.write({"x": 1})
    assert "open, 1 record: Schema(x: int64)" in repr(writer)
    writer.close()
    assert "committed as version 1, 1 record:" in repr(writer)
    dropped = tc.Writer(tmp_path / "other", schema={"x": "int64"})
    dropped.abort()
    assert "aborted, 0 records" in repr(dropped)
