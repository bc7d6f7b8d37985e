"""How data sets, loaders, writers and batches are shown."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image
from tests.images.pictures import encode, picture

import tiercache as tc
from tiercache.data import description

SCHEMA = {"image": tc.Image("jpeg", nullable=True), "id": "int64", "text": "str", "half": "float32"}
N = 12


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("shown") / "data"
    images = [encode(picture(60, 300, seed=i)) for i in range(N)]
    images[1], images[2] = b"\xff\xd8\xff no image", None
    with tc.Writer(path, schema=SCHEMA) as writer:
        writer.write_batch({"image": images, "id": np.arange(N), "text": ["a"] * N, "half": np.zeros(N)})
    return path


class TestDataset:
    def test_it_shows_url_version_records_and_columns(self, path):
        columns = "image: image<jpeg>?, id: int64, text: str, half: float32"
        assert repr(tc.Dataset(path)) == f"Dataset({str(path)!r}, version 1, 12 records: Schema({columns}))"

    def test_it_shows_the_steps_of_a_view(self, path):
        dataset = tc.Dataset(path, columns=["id"])
        view = dataset.skip(2).take(9).shuffle(4).shard(2, 0).filter(pc.field("id") > 5).select([0])
        steps = "skip(2).take(9).shuffle(4).shard(2, 0).filter((id > 5)).select(<1 numbers>)"
        assert f"version 1, 1 record by {steps}: " in repr(view)
        part = dataset.split({"a": 0.75, "b": 0.25}, seed=3, by="id")["b"]
        assert "by split({'a': 0.75, 'b': 0.25}, seed=3, by='id')['b']: " in repr(part)
        assert "by mix(weights=[7, 3]): " in repr(tc.mix([dataset, dataset], [0.7, 0.3]))

    def test_it_shows_how_columns_are_served(self, path):
        decode = {"image": tc.DecodeImage(32, crop="random", dtype="float16")}
        dataset = tc.Dataset(path, decode=decode, cast={"half": "float16"}, layouts={"text": "buffer"})
        shown = repr(dataset)
        assert "half: float16" in shown
        assert "decode={'image': DecodeImage(size=(32, 32), crop='random', dtype='float16')}" in shown
        assert "cast={'half': 'float16'}, layouts={'text': 'buffer'}" in shown
        assert "as_tuple=('id', 'half')" in repr(dataset.as_tuple("id", "half"))
        assert "transform=len" in repr(tc.Dataset(path, transform=len))

    def test_it_hides_secrets_of_the_url(self, path):
        assert "secret" not in repr(tc.Dataset(f"file://{path}"))


class TestHtml:
    def pictures(self, text):
        found = re.findall(r'src="data:image/png;base64,([^"]*)" width="(\d+)" height="(\d+)"', text)
        images = [Image.open(io.BytesIO(base64.b64decode(data))) for data, *_ in found]
        assert [image.size for image in images] == [(int(width), int(height)) for _, width, height in found]
        return images

    def test_it_has_thumbnails_of_the_first_images_of_bounded_size(self, path):
        text = tc.Dataset(path)._repr_html_()
        images = self.pictures(text)
        assert [image.size for image in images] == [(96, 19)] * 6  # of eight: one is null, one cannot be decoded
        assert len(text) < 8 * 96 * 96 * 3 * 4 / 3
        first = np.asarray(images[0].convert("RGB"), np.int16)
        expected = np.asarray(picture(60, 300, seed=0).resize((96, 19)), np.int16)
        assert np.abs(first - expected).mean() < 6

    def test_corrupt_images_and_nulls_are_named(self, path):
        text = tc.Dataset(path)._repr_html_()
        assert text.count("(cannot be decoded)") == text.count("(null)") == 1

    def test_texts_are_escaped(self, tmp_path):
        with tc.Writer(tmp_path / "<b>x", schema={"<i>y": "int64"}) as writer:
            writer.write({"<i>y": 1})
        text = tc.Dataset(tmp_path / "<b>x")._repr_html_()
        assert "<b>" not in text
        assert "<i>" not in text
        assert "&lt;i&gt;y" in text

    def test_it_shows_how_a_column_is_served_and_the_view(self, path):
        text = tc.Dataset(path, decode={"image": tc.DecodeImage(32)}).take(3)._repr_html_()
        assert "decode=DecodeImage(size=(32, 32))" in text
        assert "<td colspan=2>take(3)</td>" in text
        assert len(self.pictures(text)) == 1

    def test_without_images_or_records_there_are_none(self, path):
        assert "<img" not in tc.Dataset(path, columns=["id"])._repr_html_()
        assert "<img" not in tc.Dataset(path).take(0)._repr_html_()

    def test_a_data_set_that_cannot_be_read_is_shown_without_pictures(self, path, monkeypatch):
        dataset = tc.Dataset(path)
        monkeypatch.setattr(type(dataset._source), "values", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            dataset._repr_html_()

        def corrupt(*_):
            raise tc.CorruptShard("no", url="x")

        monkeypatch.setattr(type(dataset._source), "values", corrupt)
        text = dataset._repr_html_()
        assert "<img" not in text
        assert "image&lt;jpeg&gt;" in text

    def test_without_the_libraries_it_says_so(self, path, monkeypatch):
        def missing(*_):
            raise ModuleNotFoundError("simplejpeg")

        monkeypatch.setattr(description, "thumbnail", missing)
        assert "tiercache-data[images]" in tc.Dataset(path)._repr_html_()

    def test_captions_are_class_names(self, tmp_path):
        for name in ("ant", "bee"):
            (tmp_path / "photos" / name).mkdir(parents=True)
            (tmp_path / "photos" / name / "1.png").write_bytes(encode(picture(8, 8), "png"))
        tc.pack(tmp_path / "photos", tmp_path / "packed")
        text = tc.Dataset(tmp_path / "packed")._repr_html_()
        assert re.findall("<figcaption>(.*?)</figcaption>", text) == ["ant", "bee"]


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
        assert repr(tc.DataLoader(dataset, 8, collate_fn=len)).endswith("torch's path, rank 0 of 1 (alone))")

    def test_showing_it_neither_begins_a_run_nor_fails_within_an_epoch(self, path):
        loader = tc.DataLoader(tc.Dataset(path, columns=["id"]), 4, shuffle=True)
        state = torch.get_rng_state()
        repr(loader)
        assert torch.equal(torch.get_rng_state(), state)
        iterator = iter(loader)
        next(iterator)
        assert "batch_size=4" in repr(loader)
        iterator.close()


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


class TestBatch:
    def test_a_line_describes_each_entry(self, path):
        dataset = tc.Dataset(path, layouts={"text": "buffer"}, decode={"image": tc.DecodeImage(4)}).skip(3)
        lines = [
            "image        uint8[4, 3, 4, 4], 192 B",
            "image.valid  bool[4], 4 B",
            "id           int64[4], 32 B",
            "text         buffer of 4 values: uint8[4], 4 B",
            "half         float32[4], 16 B",
        ]
        assert tc.describe(next(iter(tc.DataLoader(dataset, 4)))).splitlines() == lines
        assert tc.describe(next(iter(tc.NumpyLoader(dataset, 4)))).splitlines() == lines
        assert tc.describe(dataset[:4]).splitlines() == lines

    def test_lists_show_their_elements(self):
        batch = {
            "bytes": [b"abc", None, b"d"],
            "str": ["a", "b"],
            "ragged": [torch.zeros(2), torch.zeros(3)],
            "mixed": [1, "a"],
            "nothing": [],
            "other": {1: 2},
            "nested": torch.nested.nested_tensor_from_jagged(torch.zeros(5), torch.tensor([0, 2, 5])),
        }
        assert tc.describe(batch).splitlines() == [
            "bytes    list of 3 bytes, 4 B, 1 null",
            "str      list of 2 str",
            "ragged   list of 2 arrays of float32, 20 B",
            "mixed    list of 2",
            "nothing  list of 0",
            "other    dict",
            "nested   nested float32, 2 values, 20 B",
        ]

    def test_a_tuple_of_columns_is_numbered(self):
        assert tc.describe([np.zeros(2), torch.zeros(2, 3)]) == "0  float64[2], 16 B\n1  float32[2, 3], 24 B"

    def test_anything_else_is_an_error(self):
        with pytest.raises(TypeError, match="a batch is a dict, a list or a tuple, got int"):
            tc.describe(3)
