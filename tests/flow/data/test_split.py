"""dataset.split(), classes and class_counts: disjoint parts of exact sizes, which stay the same."""

from __future__ import annotations

import hashlib
import pickle
import string
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiercache as tc
from tiercache.data.scan import share_out
from tiercache.order.epoch_order import derive_key
from tiercache.shard.schema import CLASSES_KEY

N = 300
FRACTIONS = {"train": 0.8, "val": 0.15, "test": 0.05}
# Written once: which records are held out must never change, so a change here breaks users.
GOLDEN = (
    ({}, [2, 4, 9, 11, 19, 25, 30, 31, 35, 36]),
    ({"seed": 7}, [4, 15, 16, 23, 24, 25, 31, 35, 36, 39]),
    ({"by": "label"}, [2, 4, 9, 11, 19, 22, 25, 30, 31, 36]),
    ({"seed": 1, "by": "kind"}, [1, 8, 10, 13, 17, 26, 30, 32, 35, 39]),
    ({"seed": 1, "by_hash": "user"}, [6, 7, 26, 31, 36]),
    ({"by_hash": "id"}, [6, 9, 10, 11, 22, 32, 36]),
)


def columns_of(first, stop):
    ids = np.arange(first, stop)
    return {
        "id": ids,
        "label": ids // 30,
        "user": [f"user {i % 50}" for i in ids],
        "key": [bytes([i % 40]) for i in ids],
        "flag": ids % 4 == 0,
        "kind": [None if i % 7 == 0 else string.ascii_letters[i % 5] for i in ids],
        "score": ids / 2,
    }


SCHEMA = {"id": "int64", "label": "int16", "user": "str", "key": "bytes", "flag": "bool", "kind": "str?"}
SCHEMA |= {"score": "float32"}


def write(path, first, stop, **options):
    with tc.Writer(path, schema=SCHEMA, shard_size="4KiB", block_size="1KiB", **options) as writer:
        writer.write_batch(columns_of(first, stop))
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("split") / "data", 0, N)


def ids_of(dataset):
    return dataset.select_columns(["id"])[:]["id"].tolist()


def parts_of(dataset, *args, **options):
    return {name: ids_of(part) for name, part in dataset.split(*args, **options).items()}


def test_the_parts_are_disjoint_and_together_all_records_in_their_order(path):
    for options in ({}, {"by": "label"}, {"by": "kind"}, {"by": "flag"}, {"by_hash": "id"}):
        parts = parts_of(tc.Dataset(path), FRACTIONS, seed=3, **options)
        assert list(parts) == list(FRACTIONS)
        assert all(part == sorted(part) for part in parts.values())
        assert sorted(i for part in parts.values() for i in part) == list(range(N)), options


@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=30),
    weights=st.lists(st.integers(1, 20), min_size=1, max_size=5),
)
def test_shares_are_exact_for_each_class_and_nearly_so_in_sum(counts, weights):
    sizes, total = share_out(counts, weights), sum(weights)
    assert [sum(row) for row in sizes] == counts
    for row, count in zip(sizes, counts, strict=True):
        assert all(abs(n - Fraction(count * w, total)) < 1 for n, w in zip(row, weights, strict=True))
    for part, weight in enumerate(weights):
        error = abs(sum(row[part] for row in sizes) - Fraction(sum(counts) * weight, total))
        assert error <= Fraction(1, 2) if len(weights) == 2 else error < 2


def test_the_parts_are_the_same_in_every_release(path):
    for options, expected in GOLDEN:
        part = tc.Dataset(path).take(40).split({"a": 0.75, "b": 0.25}, **options)["b"]
        assert ids_of(part) == expected, options
        data = pickle.dumps(part)
        assert len(data) < 2000
        assert ids_of(pickle.loads(data)) == expected


def test_the_part_of_a_key_can_be_computed_by_hand(path):
    key = derive_key(5, "split by hash")
    for column in ("id", "user", "key", "kind"):
        for name, part in tc.Dataset(path).split({"train": 0.75, "val": 0.25}, seed=5, by_hash=column).items():
            for value in part.select_columns([column])[:][column]:
                plain = value if isinstance(value, bytes) else b"" if value is None else str(value).encode()
                digest = hashlib.blake2b(plain, digest_size=8, key=key).digest()
                assert (int.from_bytes(digest, "little") < 0.75 * 2**64) == (name == "train")


def test_records_of_equal_keys_stay_together_and_keep_their_part_when_data_is_added_or_repacked(path, tmp_path):
    before = parts_of(tc.Dataset(path), FRACTIONS, by_hash="user")
    users = {name: {i % 50 for i in part} for name, part in before.items()}
    assert not users["train"] & users["val"]
    grown = write(tmp_path / "grown", 100, N)
    write(grown, 0, 100, mode="append")
    write(grown, N, N + 100, mode="append")
    after = parts_of(tc.Dataset(grown), FRACTIONS, by_hash="user")
    for name in FRACTIONS:
        assert {i for i in after[name] if i < N} == set(before[name])


def test_the_column_need_not_be_served_and_views_can_be_split(path):
    dataset = tc.Dataset(path, columns=["id"])
    whole = parts_of(tc.Dataset(path), FRACTIONS, by="label")
    assert parts_of(dataset, FRACTIONS, by="label") == whole
    odd = dataset.select(range(1, N, 2))
    parts = parts_of(odd, {"a": 0.5, "b": 0.5}, by="label")
    assert sorted(parts["a"] + parts["b"]) == list(range(1, N, 2))
    shuffled = dataset.shuffle(1)
    parts = parts_of(shuffled, {"a": 0.5, "b": 0.5}, by="label")
    order = ids_of(shuffled)
    assert parts["a"] == [i for i in order if i in set(parts["a"])]
    for part in parts.values():
        assert np.bincount(np.array(part) // 30).tolist() == [15] * 10
    assert parts_of(shuffled, FRACTIONS, by_hash="user").keys() == FRACTIONS.keys()
    for name, part in parts_of(shuffled, FRACTIONS, by_hash="user").items():
        assert sorted(part) == parts_of(dataset, FRACTIONS, by_hash="user")[name]


def test_joined_data_sets_are_split_and_counted_as_one(path, tmp_path):
    joined = tc.Dataset(path, columns=["id"]) + tc.Dataset(write(tmp_path / "more", N, N + 60), columns=["id"])
    parts = joined.split({"a": 0.5, "b": 0.5}, by="label")
    assert sorted(ids_of(parts["a"]) + ids_of(parts["b"])) == list(range(N + 60))
    assert joined.class_counts("label") == dict.fromkeys(range(12), 30)
    assert all(part.class_counts("label") == dict.fromkeys(range(12), 15) for part in parts.values())
    alone = {name: set(ids_of(part)) for name, part in tc.Dataset(path).split(FRACTIONS, by_hash="user").items()}
    for name, part in joined.split(FRACTIONS, by_hash="user").items():
        assert {i for i in ids_of(part) if i < N} == alone[name]


def test_arguments_that_cannot_split_are_errors(path):
    for fractions, options, error, said in (
        ({"a": 0.5, "b": 0.4}, {}, ValueError, "sum up to 1"),
        ({"a": 1.1, "b": -0.1}, {}, ValueError, "above 0"),
        ({"a": 1, "b": 0}, {}, ValueError, "above 0"),
        ({"a": float("nan")}, {}, ValueError, "sum up to 1"),
        ({}, {}, ValueError, "parts, got 0"),
        ({"a": "1"}, {}, TypeError, "a number"),
        ([0.9, 0.1], {}, TypeError, "a mapping"),
        ({"a": 0.999, "b": 0.001}, {}, ValueError, "'b' would have none of the 300 records"),
        ({"a": 1}, {"by": "label", "by_hash": "id"}, ValueError, "exclude each other"),
        ({"a": 1}, {"by": "lable"}, tc.SchemaError, "lable"),
        ({"a": 1}, {"by_hash": "idd"}, tc.SchemaError, "idd"),
        ({"a": 1}, {"by": "score"}, tc.SchemaError, "classes"),
        ({"a": 1}, {"by": "key"}, tc.SchemaError, "classes"),
        ({"a": 1}, {"by_hash": "score"}, tc.SchemaError, "keys"),
        ({"a": 1}, {"by_hash": "flag"}, tc.SchemaError, "keys"),
        ({"a": 1}, {"seed": 0.5}, TypeError, "integer"),
    ):
        with pytest.raises(error, match=said):
            tc.Dataset(path).split(fractions, **options)
    dataset = tc.Dataset(path)
    mixed = tc.mix([dataset.take(10), dataset.skip(10)], [1, 1])
    for call in (lambda: mixed.split({"a": 1}), lambda: mixed.shuffle(1), lambda: mixed.class_counts("label")):
        with pytest.raises(ValueError, match="mixture"):
            call()


class TestClasses:
    @pytest.fixture
    def named(self, tmp_path):
        names = pa.field("label", pa.int64(), False, {CLASSES_KEY: b'["ant", "bee", "cat", "dog"]'})
        schema = pa.schema([pa.field("x", pa.int32(), False), names])
        with tc.Writer(tmp_path / "named", schema=schema, shard_size="1KiB", block_size="256B") as writer:
            writer.write_batch({"x": np.arange(400), "label": np.repeat([0, 1, 3, 7], 100)})
        return tc.Dataset(tmp_path / "named")

    def test_classes_are_the_names_in_the_schema(self, named):
        assert named.classes == ["ant", "bee", "cat", "dog"]
        assert named.select_columns(["x"]).classes == named.classes

    def test_without_class_names_there_is_no_such_attribute(self, path):
        assert not hasattr(tc.Dataset(path), "classes")
        with pytest.raises(AttributeError, match="class names"):
            tc.Dataset(path).class_counts()

    def test_counts_are_by_name_with_zeros_and_unnamed_labels_last(self, named):
        assert list(named.class_counts().items()) == [("ant", 100), ("bee", 100), ("cat", 0), ("dog", 100), (7, 100)]
        assert named.take(150).class_counts() == {"ant": 100, "bee": 50, "cat": 0, "dog": 0}
        assert named.select([0, 0, 399]).class_counts() == {"ant": 2, "bee": 0, "cat": 0, "dog": 0, 7: 1}

    def test_counts_of_other_columns_are_by_value_in_order(self, path):
        dataset = tc.Dataset(path)
        kinds = [None if i % 7 == 0 else string.ascii_letters[i % 5] for i in range(N)]
        expected = {kind: kinds.count(kind) for kind in [*sorted(set(kinds) - {None}), None]}
        assert list(dataset.class_counts("kind").items()) == list(expected.items())
        assert dataset.class_counts("flag") == {False: 225, True: 75}
        assert dataset.shuffle(1).class_counts("label") == dict.fromkeys(range(10), 30)


def test_a_part_of_a_split_by_hash_is_split_again_only_with_another_seed(path):
    part = tc.Dataset(path).split({"train": 0.5, "val": 0.5}, by_hash="id")["train"]
    for view in (part, part.shuffle(1).skip(1), part + part):
        with pytest.raises(ValueError, match="another seed="):
            view.split({"a": 0.5, "b": 0.5}, by_hash="id")
    again = part.split({"a": 0.5, "b": 0.5}, seed=1, by_hash="id")
    assert sorted(ids_of(again["a"]) + ids_of(again["b"])) == sorted(ids_of(part))
    assert part.split({"a": 0.5, "b": 0.5}, by_hash="user").keys() == {"a", "b"}
