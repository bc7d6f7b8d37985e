"""Nested views compared with a plain list of records, by every way of reading."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.http_server import HttpFaultServer
from tests.support.records import SCHEMA, check_batch, make_columns
from torch.utils.data import DataLoader as TorchLoader

import tiercache as tc
from tiercache._native.permute import permute_one
from tiercache.data import opened_version, records, scan
from tiercache.data.opened_version import OpenedVersion
from tiercache.order.epoch_order import derive_key
from tiercache.shard.reader import ShardReader

N = 150
# Written once: a shuffled view is what evaluations compare by, so a change here breaks users.
SHUFFLED = {0: [3, 0, 5, 6, 2, 1, 8, 9, 7, 4], 7: [7, 0, 2, 8, 4, 6, 5, 1, 3, 9]}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("views") / "data"
    with tc.Writer(path, schema=SCHEMA, shard_size="4KiB", block_size="512B") as writer:
        for first in range(0, N, 50):
            writer.write_batch(make_columns(50, first))
    return path


@pytest.fixture
def dataset(packed):
    dataset = tc.Dataset(packed)
    assert len(dataset._source.shard_records) > 4
    yield dataset
    dataset.close()


def ids_of(dataset: tc.Dataset) -> list[int]:
    return [int(record["id"]) for record in dataset]


# A step: its name, and what it needs: fractions of how many records there are, so that any step follows any other.
FRACTION = st.floats(0, 1)
STEP = st.one_of(
    st.tuples(st.just("take"), FRACTION),
    st.tuples(st.just("skip"), FRACTION),
    st.tuples(st.just("shard"), st.integers(1, 5), FRACTION),
    st.tuples(st.just("select"), st.lists(FRACTION, max_size=60)),
    st.tuples(st.just("sorted"), st.lists(FRACTION, max_size=60)),
    st.tuples(st.just("mask"), st.integers(0, 2**30)),
    st.tuples(st.just("filter"), st.integers(0, N), st.booleans()),
    st.tuples(st.just("concat"), st.integers(0, 20), st.integers(0, 20)),
    st.tuples(st.just("shuffle"), st.integers(-3, 2**70)),
)


def apply(step: tuple, dataset: tc.Dataset, ids: list[int]) -> tuple[tc.Dataset, list[int]]:
    """The step on a data set and on the list of the ids in it."""
    name, n = step[0], len(ids)

    def place(fraction: float) -> int:
        return min(int(fraction * n), n - 1)

    if name == "take":
        return dataset.take(int(step[1] * n)), ids[: int(step[1] * n)]
    if name == "skip":
        return dataset.skip(int(step[1] * n)), ids[int(step[1] * n) :]
    if name == "shard":
        index = min(int(step[2] * step[1]), step[1] - 1)
        return dataset.shard(num_shards=step[1], index=index), [a.tolist() for a in np.array_split(ids, step[1])][index]
    if name in ("select", "sorted"):
        places = [place(fraction) for fraction in step[1]] if n else []
        places = sorted(places) if name == "sorted" else places
        return dataset.select(places), [ids[p] for p in places]
    if name == "mask":
        mask = np.random.default_rng(step[1]).random(n) < 0.5
        return dataset.select(mask), [i for i, keep in zip(ids, mask, strict=True) if keep]
    if name == "filter":
        limit, with_flag = step[1:]
        condition = pc.field("id") < limit
        kept = [i for i in ids if i < limit and (i % 3 == 0 or not with_flag)]
        return dataset.filter(condition & pc.field("flag") if with_flag else condition), kept
    if name == "shuffle":
        key = derive_key(step[1], "shuffle of a view")
        return dataset.shuffle(step[1]), [ids[permute_one(key, n, place)] for place in range(n)]
    return dataset + dataset.skip(step[1]).take(step[2]), ids + ids[step[1] :][: step[2]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, min_size=1, max_size=4), data=st.data())
def test_every_way_of_reading_nested_views_gives_the_same_records(dataset, monkeypatch, steps, data):
    view, ids = dataset, list(range(N))
    monkeypatch.setattr(records, "LAID_OUT_ROWS", data.draw(st.sampled_from([3, 1 << 18])))
    monkeypatch.setattr(scan, "ORDER_RECORDS", data.draw(st.sampled_from([7, scan.ORDER_RECORDS])))
    for step in steps:
        view, ids = apply(step, view, ids)
    assert len(view) == len(ids)
    assert ids_of(view) == ids
    assert check_batch(view[:]) == ids
    if ids:
        assert check_batch(view[1::2]) == ids[1::2]
        asked = data.draw(st.lists(st.integers(-len(ids), len(ids) - 1), max_size=10))
        assert check_batch(view[asked]) == [ids[i] for i in asked]
        assert [int(view[i]["id"]) for i in asked] == [ids[i] for i in asked]
    table = pa.Table.from_batches(list(view.to_arrow(16)), view.schema.arrow)
    assert table["id"].to_pylist() == ids
    assert table["text"].to_pylist() == [f"text {i}" for i in ids]
    again = pickle.loads(pickle.dumps(view))
    assert ids_of(again) == ids
    assert again._source.parts == view._source.parts
    assert list(itertools.chain(*map(check_batch, tc.DataLoader(view, batch_size=16)))) == ids
    if ids:  # torch refuses to shuffle nothing
        shuffled = itertools.chain(*map(check_batch, tc.DataLoader(view, batch_size=16, shuffle=True)))
        assert sorted(shuffled) == sorted(ids)


def test_block_tables_are_returned_while_another_thread_evicts_them(packed, monkeypatch):
    source = tc.Dataset(packed)._source
    expected = [table.records.tolist() for table in source.block_sizes([0, 1])]
    source = tc.Dataset(packed)._source
    monkeypatch.setattr(opened_version, "MAX_KEPT_SIZES", 2)
    read = OpenedVersion._read_block_sizes

    def crowded(self, shard):
        if shard == 0:
            self.block_sizes([2, 3, 4])
        return read(self, shard)

    monkeypatch.setattr(OpenedVersion, "_read_block_sizes", crowded)
    assert [table.records.tolist() for table in source.block_sizes([0, 1])] == expected


def test_record_numbers_outside_a_view_are_errors(dataset):
    view = dataset.skip(10).take(5)
    assert view[-5]["id"] == 10
    for index in (5, -6, [0, 5]):
        with pytest.raises(IndexError):
            view[index]
    with pytest.raises(IndexError):
        view.select([5])
    assert ids_of(view.select([-1, 0])) == [14, 10]
    with pytest.raises(IndexError):
        dataset.take(0)[0]


def test_invalid_selections_are_errors_that_name_valid_ones(dataset):
    for call, error, said in (
        (lambda d: d.take(-1), ValueError, "0 or more"),
        (lambda d: d.skip(-1), ValueError, "0 or more"),
        (lambda d: d.take(1.5), TypeError, "integer"),
        (lambda d: d.shard(0, 0), ValueError, "num_shards must be 1 or more"),
        (lambda d: d.shard(3, 3), ValueError, "index must be 0 to 2"),
        (lambda d: d.shard(3, -1), ValueError, "index must be 0 to 2"),
        (lambda d: d.select([True, False]), ValueError, "mask has 2 values for 150"),
        (lambda d: d.select([0.5]), TypeError, "integers"),
        (lambda d: d.select(["a"]), TypeError, "integers"),
        (lambda d: d.select([[1, 2]]), TypeError, "dimensions"),
        (lambda d: d.select(3), TypeError, "the type int"),
        (lambda d: d.select(pc.field("id") == 3), TypeError, r"filter\(\)"),
        (lambda d: d.filter(lambda record: True), TypeError, "pyarrow expression"),
        (lambda d: d.filter("id == 3"), TypeError, "pyarrow expression"),
        (lambda d: d.select([2**63]), IndexError, "150"),
        (lambda d: d.select(range(10**12)), IndexError, "record 999999999999 of a data set of 150"),
        (lambda d: d.select(range(10**30, 0, -1)), IndexError, "150"),
        (lambda d: d.select(range(0, -152, -1)), IndexError, "record -151"),
        (lambda d: d.select(pa.array([None, *[True] * 149])), TypeError, "a number is missing"),
        (lambda d: d.select([10**30]), TypeError, "64 bits"),
        (lambda d: d.select_columns([]), ValueError, "columns is empty"),
        (lambda d: d.select_columns("id"), TypeError, "a list of names"),
        (lambda d: d.shuffle(1.5), TypeError, "integer"),
    ):
        with pytest.raises(error, match=said):
            call(dataset)
    for chosen in ((4, 2, 4), np.array([4, 2, 4], np.uint8), torch.tensor([4, 2, 4]), pa.array([4, 2, 4])):
        assert ids_of(dataset.select(chosen)) == [4, 2, 4]
    odd = dataset.select(np.arange(N) % 2 == 1)
    assert pa.Table.from_batches(list(odd.to_arrow()))["id"].to_pylist() == ids_of(odd) == list(range(1, N, 2))


def test_a_view_keeps_columns_transform_and_subclass(packed):
    class Named(tc.Dataset):
        pass

    named = Named(packed, columns=["id", "text"], transform=_text)
    named.name = "mine"
    view = named.skip(5).select([2, 0])
    assert (type(view), view.name, list(view)) == (Named, "mine", ["text 7", "text 5"])
    plain = tc.Dataset(packed).take(3)
    assert plain.select_columns(["text", "id"])[1] == {"text": "text 1", "id": 1}
    assert plain.select_columns(["id"]).skip(1).column_names == ["id"]
    for form in (np.array(["text", "id"]), iter(["text", "id"])):
        assert plain.select_columns(form).column_names == ["text", "id"]


def _text(record):
    return record["text"]


def test_shards_without_selected_records_are_neither_opened_nor_warmed(packed, monkeypatch):
    seen = []
    make = ShardReader.__init__

    def note(self, store, name, **options):
        seen.append(name)
        make(self, store, name, **options)

    monkeypatch.setattr(ShardReader, "__init__", note)
    view = tc.Dataset(packed).select([0, N - 1])
    names = [view._source.leaves[0].table.info(i).name for i in range(len(view._source.shard_records))]
    for read in (list, lambda v: v[:], lambda v: list(v.to_arrow()), lambda v: list(tc.DataLoader(v, shuffle=True))):
        seen.clear()
        view.close()
        read(view)
        assert set(seen) == {names[0], names[-1]}
    warmed = []
    monkeypatch.setattr(OpenedVersion, "warm", lambda self, shards, **options: warmed.extend(shards))
    view.warm()
    assert warmed == [0, len(names) - 1]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_view_resumes_at_every_batch_also_from_an_appended_data_set(tmp_path, shuffle):
    path = tmp_path / "d"
    with tc.Writer(path, schema={"id": "int64"}, shard_size="512B", block_size="128B") as writer:
        writer.write_batch({"id": np.arange(100)})
    views = {
        "filter": lambda d: d.filter((pc.field("id") > 20) & (pc.field("id") != 50)).skip(3),
        "select": lambda d: d.select([5, 3, 99, 3, *range(40, 70)]),
        "shard": lambda d: d.shard(num_shards=3, index=1),
        "shuffle": lambda d: d.take(50).shuffle(4),
        "split": lambda d: d.split({"a": 0.5, "b": 0.5}, by_hash="id")["a"],
        "joined": lambda d: d.take(20) + d.filter(pc.field("id") >= 70),
        "mixed": lambda d: tc.mix([d, d.filter(pc.field("id") < 30)], [2, 1], stop="all_exhausted"),
    }

    def loader(view):
        return tc.DataLoader(view(tc.Dataset(path)), 4, shuffle=shuffle, options=tc.LoaderOptions(seed=5))

    whole, states = {}, {}
    for name, view in views.items():
        whole[name] = [batch["id"].tolist() for batch in loader(view)]
        first = loader(view)
        states[name] = [first.state_dict() for _ in first]
    with tc.Writer(path, mode="append") as writer:
        writer.write_batch({"id": np.arange(100, 160)})
    for name, view in views.items():
        for n, state in enumerate(states[name][:-1], start=1):
            again = loader(view)
            again.load_state_dict(state)
            assert [batch["id"].tolist() for batch in again] == whole[name][n:], name


def test_a_state_of_another_selection_is_refused(dataset):
    loader = tc.DataLoader(dataset.take(50), batch_size=10)
    next(iter(loader))
    others = [dataset, dataset.take(51), dataset.skip(50), dataset + dataset, dataset.take(50).shuffle(5)]
    for other in others:
        with pytest.raises((tc.ObjectChanged, ValueError)):
            tc.DataLoader(other, batch_size=10).load_state_dict(loader.state_dict())
    assert len({each.fingerprint for each in others}) == len(others)
    tc.DataLoader(dataset.take(100).take(50), batch_size=10).load_state_dict(loader.state_dict())
    whole = tc.DataLoader(dataset, batch_size=10)
    next(iter(whole))
    everything = tc.DataLoader(dataset.take(10**6), batch_size=10)
    everything.load_state_dict(whole.state_dict())
    assert len(list(everything)) == 14
    assert dataset.take(N).fingerprint == dataset.fingerprint


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchs_workers_read_views_of_remote_and_cached_data_sets(tmp_path, packed, start):
    assert len(pickle.dumps(tc.Dataset(packed).take(100).skip(5).shard(3, 1))) < 2000
    with tc.Cache(tmp_path / "cache", size="64MiB") as cache, HttpFaultServer(packed) as server:
        view = tc.Dataset(server.url, cache=cache).filter(pc.field("flag")).select(range(20, 0, -1))
        view.warm()
        loader = TorchLoader(view, batch_size=6, num_workers=1, collate_fn=tc.collate, multiprocessing_context=start)
        assert list(itertools.chain(*map(check_batch, loader))) == [3 * i for i in range(20, 0, -1)]
        view.close()


def test_a_shuffle_is_an_order_of_its_own_for_each_seed_and_the_same_in_every_release(packed):
    orders = [ids_of(tc.Dataset(packed).shuffle(seed)) for seed in (0, 1, -5, 2**80)]
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert len({tc.Dataset(packed).shuffle(seed).fingerprint for seed in (0, 1, 2)}) == 3
    assert {seed: ids_of(tc.Dataset(packed).take(10).shuffle(seed)) for seed in SHUFFLED} == SHUFFLED
