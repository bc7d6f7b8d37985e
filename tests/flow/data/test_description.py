"""How data sets, loaders, writers and batches are shown."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from torch.utils.data import RandomSampler

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
        joined = repr(tc.concat([dataset, dataset.take(3)]))
        assert joined.startswith(f"Dataset(concat of 2 data sets, {str(path)!r}, version 1, 15 records: ")
        assert "concat of 3 data sets, " in repr((dataset + dataset + dataset).take(2))
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
    @pytest.mark.parametrize("kind", [tc.DataLoader, tc.NumpyLoader])
    def test_it_shows_its_data_set_options_path_order_position_and_rank(self, path, kind):
        options = tc.LoaderOptions(seed=3, rank=1, world_size=2)
        dataset = tc.Dataset(path)
        loader = kind(dataset, 4, shuffle=True, drop_last=True, options=options)
        said = "batch_size=4, shuffle=True, drop_last=True, LoaderOptions(seed=3, rank=1, world_size=2), native path, "
        begin, order = f"{kind.__name__}({dataset!r}, ", "tiercache's shuffled order, at record {} of 12 in epoch {}"
        end = ", rank 1 of 2 (from options))"
        assert repr(loader) == begin + said + order.format(0, 0) + end
        iterator = iter(loader)
        next(iterator)
        assert repr(loader) == begin + said + order.format(8, 0) + end
        assert list(iterator) == []
        assert repr(loader) == begin + said + order.format(0, 1) + end
        plain = "batch_size=8, native path, stored order, at record 0 of 12 in epoch 0, rank 0 of 1 (alone))"
        assert repr(kind(dataset, 8)) == begin + plain

    def test_it_shows_why_torch_serves_it_and_whose_order_it_has(self, path):
        dataset = tc.Dataset(path)
        single = repr(tc.DataLoader(dataset, batch_size=None))
        assert "torch's path (batch_size=None asks for single records), stored order, at record 0 of 12" in single
        assert "is a list, not a tiercache.Dataset), the order of its SequentialSampler)" in repr(tc.DataLoader([1, 2]))
        loader = tc.DataLoader(dataset, 4, sampler=RandomSampler(dataset))
        next(iter(loader))
        assert "native path, the order of its RandomSampler, at batch 1 in epoch 0" in repr(loader)

    def test_a_description_does_not_begin_the_run(self, path):
        loader = tc.DataLoader(tc.Dataset(path), 4, shuffle=True, generator=torch.Generator().manual_seed(5))
        other = tc.DataLoader(tc.Dataset(path), 4, shuffle=True, generator=torch.Generator().manual_seed(6))
        seeds = [one.state_dict()["seed"] for one in (loader, other) if repr(one)]
        assert seeds[0] != seeds[1]

    @pytest.mark.parametrize("kind", [tc.DataLoader, tc.NumpyLoader])
    def test_a_path_and_options_as_arguments_are_refused_with_what_is_meant(self, path, kind):
        with pytest.raises(TypeError, match=r"takes a data set, got a path: \w+\(tiercache.Dataset\('data'\), ...\)"):
            kind("data", 4)
        with pytest.raises(TypeError, match=r"got a path"):
            kind(dataset=path, batch_size=4)
        meant = r"seed= is an option: \w+\(..., options=tiercache.LoaderOptions\(seed=3, threads=2\)\)"
        with pytest.raises(TypeError, match=meant):
            kind(tc.Dataset(path), 4, threads=2, seed=3)


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
