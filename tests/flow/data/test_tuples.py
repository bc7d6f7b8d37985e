"""as_tuple: records and batches as tuples under every loader."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.support.records import SCHEMA, make_columns
from torch.utils.data import DataLoader as TorchLoader

import tiercache as tc

N = 40


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("tuples") / "data"
    with tc.Writer(path, schema=SCHEMA, shard_size="4KiB", block_size="512B") as writer:
        writer.write_batch(make_columns(N))
    return path


@pytest.fixture
def dataset(packed):
    dataset = tc.Dataset(packed, layouts={"boxes": "padded", "text": "padded"})
    yield dataset
    dataset.close()


def test_as_tuple_gives_tuples_and_lists_in_the_order_of_the_names(dataset):
    pairs = dataset.as_tuple("flag", "id")
    assert pairs.column_names == ["flag", "id"]
    assert pairs[7] == (False, 7)
    assert type(pairs[7][1]) is np.int64
    assert [type(pairs[index]) for index in (3, [3], slice(0, 2))] == [tuple, list, list]
    flags, ids = pairs[[9, 4]]
    assert (flags.tolist(), ids.tolist()) == ([True, False], [9, 4])
    assert [record[1] for record in pairs] == list(range(N))
    assert pairs.skip(5).take(2)[:][1].tolist() == [5, 6]
    assert (pairs + pairs.take(1))[-1] == (True, 0)


LOADERS = {
    "native": tc.DataLoader,
    "shuffled": lambda d, **options: tc.DataLoader(d, shuffle=True, **options),
    "torch": lambda d, **options: TorchLoader(d, collate_fn=tc.collate, **options),
    "one by one": lambda d, **options: TorchLoader(
        d, collate_fn=lambda records: tc.collate([tuple(record) for record in records]), **options
    ),
    "workers": lambda d, **options: TorchLoader(d, collate_fn=tc.collate, num_workers=1, **options),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_batches_of_every_loader_are_lists_of_tensors_as_from_torchs_default_collate(dataset, make):
    seen = []
    for batch in make(dataset.as_tuple("tokens", "text.lengths", "id", "score.valid"), batch_size=16):
        assert type(batch) is list
        tokens, text_lengths, ids, valid = batch
        assert [t.dtype for t in (tokens, text_lengths, ids, valid)] == [
            torch.uint16,
            torch.int64,
            torch.int64,
            torch.bool,
        ]
        expected = [make_columns(1, i) for i in ids.tolist()]
        assert tokens.tolist() == [e["tokens"][0].tolist() for e in expected]
        assert text_lengths.tolist() == [len(e["text"][0]) for e in expected]
        assert valid.tolist() == [e["score"][0] is not None for e in expected]
        seen += ids.tolist()
    assert sorted(seen) == list(range(N))


def test_as_tuple_accepts_masks_and_lengths_without_their_column(dataset):
    only = dataset.as_tuple("score.valid", "boxes.lengths")
    assert only.column_names == ["score", "boxes"]
    assert only[[0, 1]][0].tolist() == [False, True]
    assert [tuple(map(int, only[i])) for i in (0, 3)] == [(0, 0), (1, 3)]


def test_as_tuple_refuses_unknown_names_and_nulls_without_their_mask(packed, dataset, tmp_path):
    for names, error, said in (
        ((), ValueError, "one column or more"),
        (("nothing",), tc.SchemaError, "no such column"),
        (("id", 3), TypeError, "names of columns"),
        (("id.valid",), tc.SchemaError, "nullable"),
        (("tokens.lengths",), tc.SchemaError, "padded"),
        (("score",), tc.SchemaError, "score.valid"),
    ):
        with pytest.raises(error, match=said):
            dataset.as_tuple(*names)
    with pytest.raises(ValueError, match="transform"):
        tc.Dataset(packed, transform=len).as_tuple("id")
    assert tc.Dataset(packed, fill_nulls={"score": -1.0}).as_tuple("score")[0] == (np.float32(-1),)
    with tc.Writer(tmp_path / "d", schema={"text": "str?"}) as writer:
        writer.write_batch({"text": ["a", None]})
    texts = tc.Dataset(tmp_path / "d").as_tuple("text")
    assert texts[:] == [["a", None]]
    assert list(tc.DataLoader(texts, batch_size=2)) == [[["a", None]]]
