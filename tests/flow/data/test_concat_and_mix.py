"""Concatenated and mixed data sets: records by every way of reading, and errors."""

from __future__ import annotations

import itertools
import json
import pickle
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from tests.support.records import SCHEMA, check_batch, join_loading, make_columns
from torch.utils.data import DataLoader as TorchLoader

import tiercache as tc
from tiercache.data.opened_version import OpenedVersion
from tiercache.model import NEVER, ReadingPlan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joined")
    for name, first, n in (("a", 0, 60), ("b", 1000, 45), ("c", 2000, 7)):
        with tc.Writer(folder / name, schema=SCHEMA, shard_size="4KiB", block_size="512B") as writer:
            writer.write_batch(make_columns(n, first))
    return folder


@pytest.fixture
def parts(folder):
    parts = [tc.Dataset(folder / name) for name in "abc"]
    yield parts
    join_loading()
    for part in parts:
        part.close()


A, B, C = list(range(60)), list(range(1000, 1045)), list(range(2000, 2007))


def native(dataset, **options):
    return list(itertools.chain(*map(check_batch, tc.DataLoader(dataset, batch_size=8, **options))))


def test_plus_concatenates_and_sums_are_flat(parts):
    a, b, c = parts
    assert [int(r["id"]) for r in a + b] == A + B
    many = a
    for _ in range(300):
        many = many + c
    assert len(many) == 60 + 300 * 7
    assert int(many[-1]["id"]) == 2006
    assert len(pickle.dumps(many)) < 5000
    assert len(pickle.loads(pickle.dumps(many))._source.storage.versions) == 2
    with pytest.raises(TypeError):
        _ = a + parts


def test_concatenated_data_sets_may_have_different_stores_and_caches(parts, tmp_path):
    url = f"memory://joined-{tmp_path.name}"
    with tc.Writer(url, schema=SCHEMA, shard_size="4KiB", compression="zstd") as writer:
        writer.write_batch(make_columns(20, 5000))
    cache = tc.Cache(tmp_path / "cache", size="64MiB")
    joined = parts[2] + tc.Dataset(url, cache=cache)
    assert native(joined) == C + list(range(5000, 5020))
    joined.warm()
    assert len(list(cache.entries())) >= 1
    assert check_batch(joined[[7, 0]]) == [5000, 2000]
    figures = joined._source.storage.figures()
    assert set(figures) >= {"requests", "bytes_fetched", "retries", "dollars"}
    joined.close()
    cache.close()


@pytest.mark.parametrize("joined", [tc.concat, lambda parts: tc.mix(parts, [1, 1, 1])], ids=["joined", "mixed"])
def test_if_one_reading_plan_cannot_be_published_the_others_are_withdrawn(parts, monkeypatch, joined):
    published, withdrawn = [], []

    def publish(version, plan):
        if version is parts[2]._source.leaves[0]:
            raise OSError("no room for a plan")
        published.append(version.url)
        return SimpleNamespace(close=lambda: withdrawn.append(version.url))

    source = joined(parts)._source
    shards = np.arange(len(source.shard_records))
    monkeypatch.setattr(OpenedVersion, "publish_plan", publish)
    with pytest.raises(OSError, match="no room for a plan"):
        source.storage.publish_plan(ReadingPlan("rank 0", shards, shards, shards + 1, np.full(len(shards), NEVER)))
    assert published == withdrawn == [part._source.url for part in parts[:2]]


def test_concatenated_views_of_one_data_set_share_its_open_shards_and_figures(parts):
    a = parts[0]
    a[:]
    joined = a.take(3) + a.skip(3)
    for made in (
        joined,
        joined.select_columns(["id", "text"]),
        joined.as_tuple("id"),
        joined.filter(pc.field("id") > 3),
    ):
        assert len(made._source.storage.versions) == 1
    assert len(joined._source.at_versions([1, 1]).storage.versions) == 1
    assert len(joined._source.for_scan(["id"]).storage.versions) == 1
    narrow = joined.select_columns(["id"])
    assert narrow._source.storage.figures() == joined._source.storage.figures() == a._source.storage.figures()
    assert [int(record["id"]) for record in narrow] == A


def test_labels_with_other_class_names_cannot_be_concatenated(tmp_path):
    for folder, names in (("a", ["cat", "dog"]), ("b", ["dog", "cat"]), ("c", None)):
        metadata = None if names is None else {"tiercache.classes": json.dumps(names)}
        schema = pa.schema([pa.field("label", pa.int64(), nullable=False, metadata=metadata)])
        with tc.Writer(tmp_path / folder, schema=schema) as writer:
            writer.write_batch({"label": np.arange(2)})
    a, b, c = (tc.Dataset(tmp_path / folder) for folder in "abc")
    with pytest.raises(tc.SchemaError, match=r"'label'.*other class names"):
        a + b
    assert (a + a + c).schema.columns[0].classes == ("cat", "dog")


@pytest.mark.parametrize("join", [tc.concat, lambda d: tc.mix(d, [1] * len(list(d)))], ids=["concat", "mix"])
def test_data_sets_that_differ_are_an_error_that_names_the_first_difference(parts, folder, join):
    a, b, _ = parts
    narrow = a.select_columns(["id"])

    class Mine(tc.Dataset):
        def __getitem__(self, index):
            return index

    def open_a(**options):
        return tc.Dataset(folder / "a", **options)

    for given, error, said in (
        ([], ValueError, "one or more data sets, got none"),
        ([a, [1, 2]], TypeError, "ConcatDataset"),
        (a, TypeError, "list of tiercache data sets"),
        ([a, b.select_columns(["id", "text"])], tc.SchemaError, "data set 0 has this column, but not"),
        ([a.select_columns(["id", "text"]), b.select_columns(["text", "id"])], tc.SchemaError, "order"),
        ([narrow, b.select_columns(["text"])], tc.SchemaError, "but not data set 1"),
        ([a.as_tuple("id"), b.select_columns(["id"])], tc.SchemaError, "as_tuple"),
        ([a, tc.mix([a, b], [1, 1])], ValueError, "mixture"),
        ([a, open_a(layouts={"boxes": "padded"})], tc.SchemaError, "'padded', data set 0 None"),
        ([open_a(fill_nulls={"score": 0.0}), open_a(fill_nulls={"score": 1.0})], tc.SchemaError, "score"),
        ([a, open_a(transform=_number)], ValueError, "different transforms"),
        ([a, Mine(folder / "a")], ValueError, "Mine"),
    ):
        with pytest.raises(error, match=said):
            join(given)
    assert list(open_a(transform=_number).take(2) + open_a(transform=_number).take(1)) == [0, 1, 0]
    padded = open_a(layouts={"boxes": "padded"})
    assert (padded.take(2) + padded.skip(58))[:]["boxes"].shape[0] == 4


def _number(record):
    return int(record["id"])


def test_a_filter_needs_columns_that_all_parts_have(parts, tmp_path):
    with tc.Writer(tmp_path / "d", schema={"id": "int64", "more": "int64"}) as writer:
        writer.write_batch({"id": np.arange(3), "more": np.arange(3)})
    joined = parts[2].select_columns(["id"]) + tc.Dataset(tmp_path / "d", columns=["id"])
    assert [int(r["id"]) for r in joined.filter(pc.field("id") <= 2000)] == [2000, 0, 1, 2]
    with pytest.raises(tc.SchemaError, match="more"):
        joined.filter(pc.field("more") == 1)


def test_a_mixture_serves_exact_shares_by_every_way_of_reading(parts):
    a, b, _ = parts
    mixed = tc.mix([a, b], weights=[0.25, 0.75])
    ids = [int(r["id"]) for r in mixed]
    assert len(ids) == len(mixed) == 60
    assert Counter(i >= 1000 for i in ids) == {True: 45, False: 15}
    assert [i for i in ids if i >= 1000] == B
    assert [i for i in ids if i < 1000] == A[:15]
    for start in range(50):
        assert 7 - 5 <= sum(i >= 1000 for i in ids[start : start + 10]) <= 7 + 5
    assert native(mixed) == ids
    assert check_batch(mixed[:]) == check_batch(mixed[list(range(60))]) == ids
    assert pa.Table.from_batches(list(mixed.to_arrow(7)))["id"].to_pylist() == ids
    assert check_batch(pickle.loads(pickle.dumps(mixed))[[5, -1]]) == [ids[5], ids[-1]]
    through_torch = TorchLoader(mixed, batch_size=8, collate_fn=tc.collate)
    assert list(itertools.chain(*map(check_batch, through_torch))) == ids
    sampled = tc.DataLoader(mixed, batch_size=8, sampler=[3, 59, 0])
    assert list(itertools.chain(*map(check_batch, sampled))) == [ids[3], ids[59], ids[0]]


SCHEDULE = [(0, {"a": 0.75, "b": 0.25}), (20, {"b": 0.9, "a": 0.1}), (45, {"b": 1})]


def test_the_weights_of_a_mixture_change_at_positions_of_the_epoch(parts):
    a, b, _ = parts
    mixed = tc.mix({"a": a, "b": b}, weights=SCHEDULE)
    ids = [int(r["id"]) for r in mixed]
    assert len(ids) == len(mixed) == 45 + 17  # of b, 5 + 22.5 records are served before position 45, and 17.5 are left
    for start, stop, expected in ((0, 20, 15), (20, 45, 3), (45, len(ids), 0)):
        assert sum(i < 1000 for i in ids[start:stop]) == expected
    assert native(mixed) == ids
    assert check_batch(pickle.loads(pickle.dumps(mixed))[:]) == ids
    in_order = [(position, [weights.get("a", 0), weights["b"]]) for position, weights in SCHEDULE]
    for weights in (in_order, iter(in_order)):
        assert tc.mix([a, b], weights).fingerprint == mixed.fingerprint
    assert tc.mix([a, b], in_order[:2]).fingerprint != mixed.fingerprint
    constant = tc.mix([a, b], [1, 3]).fingerprint
    assert tc.mix([a, b], [(0, [1, 3])]).fingerprint == constant
    for weights in ({"b": 3, "a": 1}, [1, 3]):
        assert tc.mix({"a": a, "b": b}, weights).fingerprint == constant


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_mixture_with_changing_weights_resumes_at_every_batch_on_other_ranks(parts, world_size):
    a, b, _ = parts

    def loader(rank, world_size, batch_size):
        options = tc.LoaderOptions(seed=4, rank=rank, world_size=world_size, shuffle_streams=3)
        mixed = tc.mix({"a": a, "b": b}, weights=SCHEDULE)
        return tc.DataLoader(mixed, batch_size=batch_size, shuffle=True, options=options)

    alone = loader(0, 1, 6)
    batches, states = [], [alone.state_dict()]
    for batch in alone:
        batches.append(sorted(check_batch(batch)))
        states.append(json.loads(json.dumps(alone.state_dict())))
    served = [i for batch in batches for i in batch]
    assert sorted(served) == sorted(set(served))
    for n, state in enumerate(states[:-1]):
        resumed = [loader(rank, world_size, 6 // world_size) for rank in range(world_size)]
        for one in resumed:
            one.load_state_dict(state)
        steps = zip(*(map(check_batch, one) for one in resumed), strict=True)
        found = [sorted({i for ids in step for i in ids}) for step in steps]
        assert found[: len(batches) - n - 1] == batches[n:-1]
        assert set(batches[-1]) <= set(found[-1])


def test_a_mixture_ignores_explicit_orders_of_its_parts(parts):
    mixed = tc.mix([parts[0].select([5, 3, 3]), parts[1].take(3)], [1, 1])
    assert [int(r["id"]) for r in mixed] == native(mixed) == [3, 1000, 3, 1001, 5, 1002]


def test_invalid_mixtures_are_errors(parts):
    a, b, _ = parts
    named = {"a": a, "b": b}
    for given, weights, error, said in (
        ([a, b], [1], ValueError, "2 parts need one weight each, got 1"),
        ([a, b], [1, 0], ValueError, "above 0"),
        ([a, b], [1, "2"], TypeError, "number above 0"),
        ([a, b.take(0)], [1, 1], ValueError, "no records"),
        ([a, b], {"a": 1, "b": 1}, ValueError, "weights by name need data sets by name"),
        ([a, b], [(0, {"a": 1})], ValueError, "weights by name need data sets by name"),
        (named, {"a": 1}, ValueError, "no weight of the data set 'b'"),
        (named, {"a": 1, "b": 1, "c": 1}, ValueError, r"'c', .* \['a', 'b'\]"),
        (named, [(0, {"c": 1})], ValueError, r"'c', .* \['a', 'b'\]"),
        ([a, b], [(1, [1, 1])], ValueError, "from position 0 on"),
    ):
        with pytest.raises(error, match=said):
            tc.mix(given, weights)
    with pytest.raises(ValueError, match="part 0 has weight 0"):
        tc.mix([a, b], [(0, [1, 1]), (9, [0, 1])], stop="all_exhausted")
    with pytest.raises(ValueError, match=r"'first_exhausted', .*'never'"):
        tc.mix([a, b], [1, 1], stop="never")
    for select in (lambda mixed: mixed.take(3), lambda mixed: mixed.filter(pc.field("id") > 3)):
        with pytest.raises(ValueError, match="cannot select from a mixture"):
            select(tc.mix([a, b], [1, 1]))


def part_numbers(ids) -> list[int]:
    return [int(i) // 1000 for i in ids]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_mixture_serves_the_number_of_each_record_s_source_in_every_way_of_reading(parts, shuffle):
    a, b, c = parts
    sources = [a.select([i for i in range(60) if i % 3]), b, c + c.take(3)]  # a view, and joined data sets
    mixed = tc.mix(sources, [5, 4, 1], "all_exhausted", source="from")
    assert mixed.column_names[-1] == mixed.schema.names[-1] == "from"
    assert str(mixed.schema.columns[-1]) == "int32"
    for dataset in (mixed, pickle.loads(pickle.dumps(mixed)), mixed.select_columns(["from", "id"])):
        batches = list(tc.DataLoader(dataset, batch_size=8, shuffle=shuffle))
        for batch in batches:
            assert batch["from"].dtype == batch["from"].new_zeros(1).int().dtype
            assert batch["from"].tolist() == part_numbers(batch["id"])
        assert {n for batch in batches for n in batch["from"].tolist()} == {0, 1, 2}
        assert dataset[:]["from"].tolist() == part_numbers(dataset[:]["id"])
        assert dataset[:0]["from"].tolist() == []
        assert [int(dataset[i]["from"]) for i in range(20)] == part_numbers(dataset[:20]["id"])
    (torchs,) = TorchLoader(mixed.select_columns(["id", "from"]), batch_size=len(mixed), collate_fn=tc.collate)
    assert torchs["from"].tolist() == part_numbers(torchs["id"])
    table = pa.Table.from_batches(mixed.to_arrow())
    assert table["from"].to_pylist() == part_numbers(table["id"].to_pylist())
    pairs = next(iter(tc.DataLoader(mixed.as_tuple("from", "id"), batch_size=8, shuffle=shuffle)))
    assert pairs[0].tolist() == part_numbers(pairs[1])
    plain = tc.mix(sources, [5, 4, 1], "all_exhausted")
    assert mixed.select_columns(plain.column_names).column_names == plain.column_names
    options = tc.LoaderOptions(seed=5)
    one, other = (tc.DataLoader(d, batch_size=8, shuffle=shuffle, options=options) for d in (plain, mixed))
    next(iter(one))
    other.load_state_dict(one.state_dict())  # the column has no part in the order
    assert native(plain, shuffle=shuffle, options=options)[8:] == [i for batch in other for i in batch["id"].tolist()]


def test_mixed_packed_rows_have_the_number_of_their_source(tmp_path):
    packed = []
    for number in range(2):
        with tc.Writer(tmp_path / str(number), schema={"tokens": tc.Ragged("int32", (None,))}) as writer:
            for n in range(100):
                writer.write({"tokens": np.full(n % 9, number + 1, "int32")})
        packed.append(tc.pack_sequences(tc.Dataset(tmp_path / str(number)), "tokens", 8))
    mixed = tc.mix(packed, [3, 1], source="source")
    for batch in tc.DataLoader(mixed, batch_size=6, shuffle=True):
        assert batch["source"].tolist() == (batch["tokens"][:, 0] - 1).tolist()
        assert batch["max_seqlen"] <= 8
    assert mixed[:]["source"].tolist() == (mixed[:]["tokens"][:, 0] - 1).tolist()
    join_loading()
    for one in packed:
        one.close()


def test_a_column_of_sources_that_is_taken_or_alone_is_an_error(parts):
    a, b, _ = parts
    with pytest.raises(tc.SchemaError, match="column 'id': the data sets have a column of this name"):
        tc.mix([a, b], [1, 1], source="id")
    mixed = tc.mix([a, b], [1, 1], source="from")
    with pytest.raises(tc.SchemaError, match="name another column too"):
        mixed.select_columns(["from"])
    with pytest.raises(tc.SchemaError, match="no such column"):
        mixed.select_columns(["id"]).select_columns(["from"])
