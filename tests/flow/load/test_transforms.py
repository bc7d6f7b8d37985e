"""Transforms on the native path, in the training thread: what they see, draw and serve, and how they end."""

from __future__ import annotations

import itertools
import json
import pickle
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.decoded import make_columns as make_pictures
from tests.support.decoded import write as write_pictures
from tests.support.every_kind import EVERY_KIND, columns_of_every_kind, is_same
from tests.support.records import SCHEMA, make_columns
from tests.support.transformed import draw, fail_at_seven, loader_of, options, rows_of, together
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import default_collate

import tiercache as tc

N = 101  # a prime: no batch size and no number of ranks divides it


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("transforms") / "data"
    with tc.Writer(path, schema=SCHEMA, shard_size="2KiB", block_size="512B") as writer:
        writer.write_batch(make_columns(N))
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "data", make_pictures(40))


def is_native(loader):
    return loader.native_rank is not None


def test_a_transform_sees_the_records_that_indexing_gives(tmp_path):
    url = tmp_path / "data"
    with tc.Writer(url, schema=EVERY_KIND, block_size="1KiB") as writer:
        writer.write_batch(columns_of_every_kind(30))
    for asked in (
        {},
        {"columns": ["id"]},
        {"fill_nulls": {"label": -1, "note": "none", "raw": b"none", "cut": np.zeros((2, 1)), "score": 9.5}},
        {"cast": {"id": "int32", "tokens": "int64", "halves": "float32"}},
    ):
        plain, seen = tc.Dataset(url, **asked), []
        dataset = tc.Dataset(url, transform=lambda record, seen=seen: seen.append(record) or 0, **asked)
        loader = tc.DataLoader(dataset, batch_size=7, shuffle=True, options=options())
        assert is_native(loader)
        list(loader)
        assert len(seen) == 30
        for record in seen:
            assert is_same(record, plain[int(record["id"])]), asked


@pytest.mark.parametrize(("size", "dtype"), [(12, "uint8"), (None, "bfloat16")])
def test_a_transform_sees_decoded_pictures_and_encoded_ones_as_indexing_gives_them(pictures, size, dtype):
    decode = {"image": tc.DecodeImage(size, dtype=dtype)}
    for more in ({"decode": decode}, {}):
        plain, seen = tc.Dataset(pictures, **more), []
        dataset = tc.Dataset(pictures, transform=lambda record, seen=seen: seen.append(record) or 0, **more)
        list(tc.DataLoader(dataset, batch_size=9))
        assert len(seen) == 40
        assert all(is_same(record, plain[i]) for i, record in enumerate(seen))


def test_the_results_are_collated_as_torch_does(path):
    def results(record):
        return {"pair": (record["id"], float(record["id"])), "text": record["text"], "x": record["tokens"] / 7}

    def plain(record):
        return {"x": record["tokens"], "id": record["id"]}

    for transform, collate_fn in ((results, None), (results, default_collate), (plain, tc.collate), (results, list)):
        dataset = tc.Dataset(path, transform=transform)
        ours = tc.DataLoader(dataset, batch_size=10, collate_fn=collate_fn)
        assert is_native(ours)
        for batch, expected in zip(ours, TorchLoader(dataset, batch_size=10, collate_fn=collate_fn), strict=True):
            assert str(batch) == str(expected)


def test_a_batch_transform_gets_the_batch_that_the_loader_would_serve(path):
    def remember(batch):
        seen.append(batch)
        return {"ids": batch["id"] if isinstance(batch, dict) else batch[0]}

    seen = []
    plain = tc.Dataset(path, layouts={"text": "padded"})
    expected = list(tc.DataLoader(plain, batch_size=8, shuffle=True, options=options()))
    by_options = tc.DataLoader(plain, batch_size=8, shuffle=True, options=options(batch_transform=remember))
    by_dataset = tc.DataLoader(
        tc.Dataset(path, layouts={"text": "padded"}, batch_transform=remember), 8, shuffle=True, options=options()
    )
    for loader in (by_options, by_dataset):
        seen.clear()
        assert is_native(loader)
        assert [batch["ids"].tolist() for batch in loader] == [batch["id"].tolist() for batch in expected]
        assert [str(batch) for batch in seen] == [str(batch) for batch in expected]
    pairs = plain.as_tuple("id", "text", "text.lengths")
    seen.clear()
    list(tc.DataLoader(pairs, batch_size=50, options=tc.LoaderOptions(batch_transform=remember)))
    assert [str(b) for b in seen] == [str(b) for b in tc.DataLoader(pairs, batch_size=50)]


def test_transforms_are_applied_in_a_fixed_order(path):
    def add(name):
        def transform(batch):
            return [*batch, name] if isinstance(batch, list) else [*batch["of"][:1], name]

        return transform

    dataset = tc.Dataset(path, transform=lambda _: {"of": "record"}, batch_transform=add("data set"))
    loader = tc.DataLoader(dataset, batch_size=3, options=tc.LoaderOptions(batch_transform=add("options")))
    assert next(iter(loader)) == ["record", "data set", "options"]


@pytest.mark.parametrize("transform", [None, draw])
def test_paths_that_are_torchs_apply_batch_transforms_too(path, transform):
    class Own(tc.Dataset):
        def __getitem__(self, index):
            return super().__getitem__(index)

    def mark(batch):
        return {"id": batch["id"], "drawn": tc.rng().seed}

    for dataset, more in (
        (Own(path, columns=["id"], transform=transform, batch_transform=mark), {}),
        (tc.Dataset(path, columns=["id"], transform=transform, batch_transform=mark), {"sampler": iter_sampler()}),
    ):
        loader = tc.DataLoader(dataset, batch_size=8, **more)
        assert not is_native(loader)
        batch = next(iter(loader))
        assert list(batch) == ["id", "drawn"]
    with pytest.raises(ValueError, match="batch_size=None"):
        tc.DataLoader(dataset, batch_size=None)


def iter_sampler():
    class Own(torch.utils.data.Sampler):
        def __iter__(self):
            return iter(range(16))

        def __len__(self):
            return 16

    return Own()


def test_a_loader_that_is_rebuilt_from_anothers_attributes_applies_each_transform_once(path):
    def add(batch):
        return {"id": batch["id"] + 1000}

    dataset = tc.Dataset(path, columns=["id"], batch_transform=add)
    loader = tc.DataLoader(dataset, 8, options=tc.LoaderOptions(batch_transform=add))
    expected = [batch["id"].tolist() for batch in loader]
    assert expected[0] == list(range(2000, 2008))
    for kind in (tc.DataLoader, TorchLoader):
        rebuilt = kind(loader.dataset, loader.batch_size, collate_fn=loader.collate_fn)
        assert [batch["id"].tolist() for batch in rebuilt] == expected


def test_a_batch_transform_must_be_a_function_and_return_a_batch(path):
    with pytest.raises(TypeError, match="batch_transform"):
        tc.LoaderOptions(batch_transform=3)
    loader = tc.DataLoader(tc.Dataset(path), 8, options=tc.LoaderOptions(batch_transform=lambda batch: None))
    with pytest.raises(TypeError, match="returned None"):
        next(iter(loader))


def test_data_sets_with_other_batch_transforms_are_not_joined(path):
    one, two = tc.Dataset(path, batch_transform=len), tc.Dataset(path, batch_transform=list)
    with pytest.raises(ValueError, match="transform"):
        one + two
    joined = one.take(3) + one.skip(90)
    assert joined.batch_transform is len
    assert pickle.loads(pickle.dumps(joined.select_columns(["id"]))).batch_transform is len


# -- random numbers


def test_draws_differ_by_seed_and_epoch(path):
    whole = sorted(rows_of(loader_of(path)))
    assert sorted(rows_of(loader_of(path, options=options(seed=6)))) != whole
    loader = loader_of(path)
    first, second = rows_of(loader), rows_of(loader)
    assert sorted(first) == whole
    assert {row[1:] for row in first}.isdisjoint(row[1:] for row in second)


def test_every_record_draws_numbers_of_its_own_and_so_does_the_batch(path):
    rows = rows_of(loader_of(path, collate_fn=together))
    assert len({value for _, _, *drawn in rows for value in drawn}) == 3 * N
    assert len({row[0] for row in rows}) == 13  # the batch's number is the same for its records


def test_a_replaced_record_has_the_key_of_the_position_where_it_is_served(tmp_path):
    columns = make_pictures(12)
    columns["image"][4] = b"\xff\xd8\xff broken"
    url = write_pictures(tmp_path / "data", columns)

    def transform(record):
        return {"id": record["id"], "seed": np.int64(tc.rng().seed >> 1)}

    def serve(dataset, **more):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loader = tc.DataLoader(dataset, batch_size=5, options=tc.LoaderOptions(seed=1, **more))
            return rows_of(loader), loader.stats()["skipped"]

    decode = {"image": tc.DecodeImage(8)}
    expected, _ = serve(tc.Dataset(url, columns=["id"], transform=transform))
    found, n_skipped = serve(tc.Dataset(url, decode=decode, transform=transform), on_corrupt="previous")
    assert n_skipped == 1
    assert [row[1] for row in found] == [row[1] for row in expected]
    assert [row[0] for row in found] == [0, 1, 2, 3, 3, *range(5, 12)]
    with pytest.raises(tc.CorruptShard) as caught:
        serve(tc.Dataset(url, decode=decode, transform=transform))
    assert caught.value.record == 4


def test_tiercaches_random_numbers_leave_the_programs_generators_alone(path):
    states = []
    for _ in range(2):
        list(loader_of(path))
        states.append((torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()))
    assert states[0] == states[1]


# -- resume


def serve(path, state, n_ranks, batch_size, n_batches, **more):
    """The rows that some ranks are served in lockstep, and the state after them; n_batches None: to the end."""
    loaders = [
        loader_of(path, batch_size=batch_size, options=options(rank, n_ranks, **STREAMS), **more)
        for rank in range(n_ranks)
    ]
    for loader in loaders:
        loader.load_state_dict(state)
    iterators = [iter(loader) for loader in loaders]
    rows = []
    for _ in itertools.count() if n_batches is None else range(n_batches):
        batches = [next(iterator, None) for iterator in iterators]
        if batches[0] is None:
            assert batches == [None] * n_ranks
            break
        rows += rows_of(batches)
    states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
    assert states == [states[0]] * n_ranks
    return rows, states[0]


STREAMS = {"shuffle_streams": 4}
N_FEW = 23
# Each example is some epochs of several loaders.
SOME = settings.default.max_examples if settings.default.max_examples > 100 else 8
STEP = st.tuples(st.integers(1, 4), st.sampled_from([1, 3, 8]), st.integers(0, 5))


@pytest.mark.filterwarnings("ignore:the order's 4 streams do not divide")
@settings(max_examples=SOME)
@given(st.lists(STEP, max_size=3), STEP)
def test_a_run_that_is_killed_again_and_again_sees_the_same_augmentations(path, steps, last):
    expected = sorted(rows_of(loader_of(path, n=N_FEW, options=options(**STREAMS))))
    rows, state = [], {}
    for n_ranks, batch_size, n_batches in steps:
        more, after = serve(path, state, n_ranks, batch_size, n_batches, n=N_FEW)
        if after.get("epoch"):  # the epoch ended
            assert sorted(set(rows + more)) == expected
            return
        rows, state = rows + more, after
    rest, _ = serve(path, state, last[0], last[1], None, n=N_FEW)
    assert sorted(set(rows + rest)) == expected
    assert len(rows) + len(rest) - N_FEW < 4  # each record once, but for the padding of the last step


# -- errors, memory and ends


def test_an_error_comes_in_place_of_its_batch_with_its_own_traceback(path):
    loader = loader_of(path, fail_at_seven, shuffle=False, batch_size=4)
    iterator = iter(loader)
    assert next(iterator)["id"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ArithmeticError, match="no sevens") as caught:
        next(iterator)
    assert "fail_at_seven" in [entry.name for entry in caught.traceback]
    assert loader.state_dict()["offset"] == 4  # the batch that failed was not handed out
    with pytest.raises(RuntimeError, match="closed"):
        next(iterator)


def test_an_error_names_the_record_by_its_number_in_its_data_set(path):
    view = tc.Dataset(path, transform=fail_at_seven).select([90, 3, 7, 5])
    mixed = tc.mix([view.take(2), view.skip(2)], [1, 1])
    expected = f"record 7 of {str(path)!r}, version 1"
    for dataset in (view, view.take(2) + view.skip(2), mixed):
        for shuffle in (False, True):
            with pytest.raises(ArithmeticError) as raised:
                list(tc.DataLoader(dataset, batch_size=3, shuffle=shuffle))
            assert raised.value.__notes__ == [f"tiercache: in the transform of {expected}"]
        for read in (lambda d=dataset: d[:4], lambda d=dataset: list(TorchLoader(d)), lambda d=dataset: [d[2], d[3]]):
            with pytest.raises(ArithmeticError) as raised:
                read()
            assert raised.value.__notes__ == [f"tiercache: in the transform of {expected}"]

    def fail(batch):
        raise ArithmeticError

    for where in ({"collate_fn": fail}, {"options": tc.LoaderOptions(batch_transform=fail)}):
        with pytest.raises(ArithmeticError) as raised:
            list(tc.DataLoader(tc.Dataset(path).skip(7), batch_size=3, **where))
        assert raised.value.__notes__ == [f"tiercache: in the batch that begins with {expected}"]


def test_ctrl_c_in_a_transform_loses_no_batch_of_a_state_that_is_saved_then(path):
    def transform(record):
        if record["id"] == 9:
            raise KeyboardInterrupt
        return {"id": record["id"]}

    loader = loader_of(path, transform, shuffle=False, batch_size=4)
    iterator = iter(loader)
    rows = rows_of(itertools.islice(iterator, 2))
    with pytest.raises(KeyboardInterrupt):
        next(iterator)
    resumed = loader_of(path, lambda record: {"id": record["id"]}, shuffle=False, batch_size=4)
    resumed.load_state_dict(loader.state_dict())
    assert rows + rows_of(resumed) == [(i,) for i in range(N)]


@pytest.mark.parametrize("kind", [StopIteration, TimeoutError, SystemExit])
def test_an_error_that_would_end_the_loop_in_silence_is_wrapped_and_an_exit_is_one(path, kind):
    def transform(record):
        raise kind("why")

    told = (SystemExit, "why") if kind is SystemExit else (RuntimeError, f"raised {kind.__name__}: why")
    with pytest.raises(told[0], match=told[1]):
        list(loader_of(path, transform))


def test_transforms_run_in_the_training_thread_and_none_is_ahead(path):
    threads, seen = set(), []
    iterator = iter(loader_of(path, lambda record: threads.add(threading.get_ident()) or seen.append(1) or 0))
    for n_batches in range(1, 5):
        next(iterator)
        assert len(seen) == 8 * n_batches
    iterator.close()
    assert threads == {threading.get_ident()}


def test_records_may_be_changed_and_kept(path):
    kept = []

    def transform(record):
        record["tokens"] += 1
        kept.append(record)
        return {"id": record["id"]}

    list(loader_of(path, transform))
    for record in kept:
        expected = make_columns(1, int(record["id"]))
        assert record["tokens"].tolist() == (expected["tokens"][0] + 1).tolist()
        assert record["boxes"].tolist() == expected["boxes"][0].tolist()
        assert record["blob"] == expected["blob"][0]
