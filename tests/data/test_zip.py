"""tc.zip_columns: the columns of two data sets with the same records, whatever the limits of their shards are."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.load.conftest import SCHEMA, check_batch, join_loading, make_columns
from tests.support.http_server import HttpFaultServer
from torch.utils.data import DataLoader as TorchLoader

import tiercache as tc

N = 211
LEFT, RIGHT = ("id", "flag", "text", "score"), ("tokens", "blob", "boxes")


def write(path: Any, columns: tuple[str, ...], n: int = N, first: int = 0, **options: Any) -> None:
    with tc.Writer(path, schema={name: SCHEMA[name] for name in columns}, **options) as writer:
        found = make_columns(n, first)
        writer.write_batch({name: found[name] for name in columns})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two data sets of the same records, with other shards and blocks; one is compressed."""
    folder = tmp_path_factory.mktemp("zip")
    write(folder / "left", LEFT, shard_size="2KiB", block_size="512B", compression="none")
    write(folder / "right", RIGHT, shard_size="3KiB", block_size="700B", compression="zstd")
    return folder


@pytest.fixture
def zipped(folder) -> Iterator[tc.Dataset]:
    dataset = tc.zip_columns(tc.Dataset(folder / "left"), tc.Dataset(folder / "right"))
    yield dataset
    join_loading()
    dataset.close()


def ids_of(batches: Any) -> list[int]:
    """The ids of the batches, each column checked against them."""
    return list(itertools.chain(*map(check_batch, batches)))


def test_the_blocks_of_the_two_data_sets_have_other_limits(folder):
    limits = []
    for name in ("left", "right"):
        source = tc.Dataset(folder / name)._source
        tables = source.block_sizes(range(len(source.shard_records)))
        limits.append(set(np.cumsum(np.concatenate([table.records for table in tables])).tolist()))
    assert len(limits[0] & limits[1]) < min(map(len, limits)) / 2
    assert min(map(len, limits)) > 8


def test_every_way_of_reading_serves_the_columns_of_both(zipped):
    assert zipped.column_names == [*LEFT, *RIGHT]
    assert len(zipped) == N
    assert check_batch(zipped[:]) == list(range(N))
    assert check_batch(zipped[[5, 200, 5]]) == [5, 200, 5]
    assert zipped[7]["text"] == "text 7"
    assert zipped[7]["tokens"].tolist() == make_columns(1, 7)["tokens"][0].tolist()
    assert ids_of(tc.DataLoader(zipped, batch_size=8)) == list(range(N))
    assert ids_of(TorchLoader(zipped, batch_size=8, collate_fn=tc.collate)) == list(range(N))
    table = pa.Table.from_batches(list(zipped.to_arrow(50)))
    assert table["id"].to_pylist() == list(range(N))
    assert table["blob"].to_pylist() == make_columns(N)["blob"]
    assert ids_of(tc.DataLoader(pickle.loads(pickle.dumps(zipped)), batch_size=8)) == list(range(N))


def test_the_order_is_that_of_the_left_data_set(folder, zipped):
    options = tc.LoaderOptions(seed=5, shuffle_window_bytes="all", shuffle_group_bytes="all")
    both = tc.DataLoader(zipped, batch_size=10, shuffle=True, options=options)
    left = tc.DataLoader(tc.Dataset(folder / "left"), batch_size=10, shuffle=True, options=options)
    assert ids_of(both) == [i for batch in left for i in batch["id"].tolist()]
    assert "native" not in repr(both)  # it names torch's path if it takes that
    assert both.stats()["samples"] == N
    left.dataset.close()


def test_a_loader_resumes_at_every_batch_on_other_ranks(zipped):
    def loader(rank, world_size):
        options = tc.LoaderOptions(
            seed=4, rank=rank, world_size=world_size, shuffle_streams=2, shuffle_window_bytes="1KiB"
        )
        return tc.DataLoader(zipped, batch_size=12 // world_size, shuffle=True, drop_last=True, options=options)

    alone = loader(0, 1)
    batches, states = [], [alone.state_dict()]
    for batch in alone:
        batches.append(sorted(check_batch(batch)))
        states.append(json.loads(json.dumps(alone.state_dict())))
    assert len({i for batch in batches for i in batch}) == N // 12 * 12
    for n in (0, 1, 5, 16):
        ranks = [loader(rank, 2) for rank in range(2)]
        for rank in ranks:
            rank.load_state_dict(states[n])
        steps = zip(*(map(check_batch, rank) for rank in ranks), strict=True)
        assert [sorted(itertools.chain(*step)) for step in steps] == batches[n:]


def test_a_state_names_both_versions(tmp_path):
    for name, columns in (("left", LEFT), ("right", RIGHT)):
        write(tmp_path / name, columns, 50)
    loader = tc.DataLoader(
        tc.zip_columns(tc.Dataset(tmp_path / "left"), tc.Dataset(tmp_path / "right")), batch_size=5, shuffle=True
    )
    batches = iter(loader)
    check_batch(next(batches))
    state, rest = loader.state_dict(), ids_of(batches)
    for name, columns in (("left", LEFT), ("right", RIGHT)):
        with tc.Writer(tmp_path / name, mode="append") as writer:
            found = make_columns(20, 50)
            writer.write_batch({column: found[column] for column in columns})
    longer = tc.zip_columns(tc.Dataset(tmp_path / "left"), tc.Dataset(tmp_path / "right"))
    assert len(longer) == 70
    resumed = tc.DataLoader(longer, batch_size=5, shuffle=True)
    resumed.load_state_dict(state)
    assert ids_of(resumed) == rest
    other = tc.DataLoader(tc.zip_columns(longer_of(tmp_path, "left"), copy_of(tmp_path)), batch_size=5, shuffle=True)
    with pytest.raises(tc.ObjectChanged, match="another data set"):
        other.load_state_dict(state)


def longer_of(folder: Any, name: str) -> tc.Dataset:
    return tc.Dataset(folder / name)


def copy_of(folder: Any) -> tc.Dataset:
    """A data set with the records of the right one, and another id."""
    write(folder / "copy", RIGHT, 70)
    return tc.Dataset(folder / "copy")


def test_columns_are_selected_in_any_order_from_either_side(zipped):
    for names in (["tokens", "id", "blob"], ["blob"], ["text", "id"], ["boxes", "tokens"]):
        chosen = zipped.select_columns(names)
        whole = next(iter(tc.DataLoader(zipped, batch_size=N)))
        (batch,) = tc.DataLoader(chosen, batch_size=N)
        assert [name for name in batch if "." not in name] == names
        assert [name for name in chosen[:] if "." not in name] == names
        assert {name: plain(batch[name]) for name in names} == {name: plain(whole[name]) for name in names}
        join_loading()
        chosen.close()


def plain(values: Any) -> list[Any]:
    """A column of a batch as plain values."""
    return [value.tolist() if hasattr(value, "tolist") else value for value in values]


def test_views_filters_joins_and_mixtures_of_a_zipped_data_set(zipped):
    assert ids_of(tc.DataLoader(zipped.select([9, 3, 100]), batch_size=2)) == [9, 3, 100]
    assert ids_of(tc.DataLoader(zipped.skip(200), batch_size=2)) == list(range(200, N))
    by_left, by_right = zipped.filter(pc.field("id") > 190), zipped.filter(pc.field("blob") == b"")
    assert ids_of(tc.DataLoader(by_left, batch_size=2)) == list(range(191, N))
    assert ids_of(tc.DataLoader(by_right, batch_size=2)) == [i for i in range(N) if i % 11 == 0]
    joined = zipped.take(10) + zipped.skip(205)
    assert ids_of(tc.DataLoader(joined, batch_size=3)) == [*range(10), *range(205, N)]
    mixed = tc.mix([zipped.take(20), zipped.skip(100)], [1, 1])
    assert ids_of(tc.DataLoader(mixed, batch_size=4)) == check_batch(mixed[:])
    assert {*range(20)} < set(ids_of(tc.DataLoader(mixed, batch_size=4, shuffle=True)))


def test_output_options_of_both_apply(folder):
    left = tc.Dataset(folder / "left", fill_nulls={"score": -1.0}, layouts={"text": "buffer"})
    right = tc.Dataset(folder / "right", cast={"tokens": "int64"}, layouts={"boxes": "padded"})
    batch = next(iter(tc.DataLoader(tc.zip_columns(left, right), batch_size=N)))
    expected = make_columns(N)
    assert batch["tokens"].dtype.is_signed
    assert batch["tokens"].tolist() == expected["tokens"].tolist()
    assert batch["score"].tolist() == [-1.0 if score is None else score for score in expected["score"]]
    assert batch["boxes.lengths"].tolist() == [len(box) for box in expected["boxes"]]
    assert bytes(batch["text"][3]) == b"text 3"


SIZES = st.integers(100, 1000)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=5)
@given(st.integers(0, 90), st.permutations([LEFT, RIGHT]), st.tuples(SIZES, SIZES), st.tuples(SIZES, SIZES))
def test_shards_and_blocks_may_have_any_sizes_on_either_side(tmp_path_factory, n, columns, left, right):
    folder = tmp_path_factory.mktemp("sizes")
    for name, of_side, (shard, block) in (("left", columns[0], left), ("right", columns[1], right)):
        write(folder / name, of_side, n, shard_size=3 * shard, block_size=block)
    dataset = tc.zip_columns(tc.Dataset(folder / "left"), tc.Dataset(folder / "right"))
    assert sorted(ids_of(tc.DataLoader(dataset, batch_size=7, shuffle=True))) == list(range(n))
    assert check_batch(dataset[:]) == list(range(n))
    dataset.close()


@pytest.mark.parametrize("nested_side", ["left", "right"])
def test_json_and_columns_of_arrow_types_lie_side_by_side_with_numbers(tmp_path, nested_side):
    kinds = {"tags": "json", "spans": pa.list_(pa.struct([("at", pa.int64()), ("name", pa.string())]))}
    values = {
        "tags": [{"n": i} for i in range(60)],
        "spans": [[{"at": j, "name": str(i)} for j in range(i % 3)] for i in range(60)],
    }
    with tc.Writer(tmp_path / "nested", schema=kinds, block_size="200B", shard_size="1KiB") as writer:
        writer.write_batch(values)
    write(tmp_path / "flat", ("id",), 60, block_size="100B", shard_size="300B")
    sides = [tc.Dataset(tmp_path / "nested"), tc.Dataset(tmp_path / "flat")]
    dataset = tc.zip_columns(*(sides if nested_side == "left" else sides[::-1]))
    n = 0
    for batch in tc.DataLoader(dataset, batch_size=7, shuffle=True):
        for i, tags, spans in zip(batch["id"].tolist(), batch["tags"], batch["spans"], strict=True):
            assert (tags, spans) == (values["tags"][i], values["spans"][i])
            n += 1
    assert n == 60
    dataset.close()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda a, b: (a, b.take(3)), ValueError, "data set 1 is a view"),
        (lambda a, b: (tc.concat([a, a]), b), ValueError, "data set 0 is a view, joined"),
        (lambda a, b: (tc.zip_columns(a, b), b), ValueError, "data set 0 is a view, joined, mixed, zipped or packed"),
        (lambda a, b: (a, a), ValueError, r"both .*left and .*left have the column 'flag': leave it out"),
        (lambda a, b: (a.as_tuple("id"), b), ValueError, "data set 0 has a transform, serves tuples"),
        (lambda a, b: (a, [1, 2]), TypeError, "got a list"),
    ],
)
def test_what_cannot_be_zipped_is_an_error(folder, make, error, message):
    with pytest.raises(error, match=message):
        tc.zip_columns(*make(tc.Dataset(folder / "left"), tc.Dataset(folder / "right")))


def test_other_numbers_of_records_are_an_error_that_names_both(folder, tmp_path):
    write(tmp_path / "short", RIGHT, N - 1)
    with pytest.raises(ValueError, match=r"equally many records: .*left has 211, .*short has 210"):
        tc.zip_columns(tc.Dataset(folder / "left"), tc.Dataset(tmp_path / "short"))


def test_both_are_fetched_through_their_cache_once(folder, tmp_path):
    objects = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with HttpFaultServer(objects) as server, tc.Cache(tmp_path / "cache", size="10MB", min_free="0%") as cache:
        sides = [tc.Dataset(f"{server.url}/{name}", cache=cache) for name in ("left", "right")]
        dataset = tc.zip_columns(*sides)
        loader = tc.DataLoader(dataset, batch_size=10, shuffle=True, options=tc.LoaderOptions(seed=1))
        assert sorted(ids_of(loader)) == list(range(N))
        server.log.clear()
        assert sorted(ids_of(loader)) == list(range(N))
        assert [seen.path for seen in server.log if "/shards/" in seen.path] == []
        assert loader.stats()["bytes_fetched"] >= sum(len(data) for key, data in objects.items() if "/shards/" in key)
        join_loading()
        dataset.close()


def test_warming_fetches_the_served_columns_of_both(folder, tmp_path):
    objects = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with HttpFaultServer(objects) as server, tc.Cache(tmp_path / "cache", size="10MB", min_free="0%") as cache:
        sides = [tc.Dataset(f"{server.url}/{name}", cache=cache) for name in ("left", "right")]
        dataset = tc.zip_columns(*sides)
        dataset.warm(jobs=2)
        server.log.clear()
        assert ids_of(tc.DataLoader(dataset, batch_size=10)) == list(range(N))
        assert [seen.path for seen in server.log if "/shards/" in seen.path] == []
        join_loading()
        dataset.close()


def damaged(folder: Any, tmp_path: Any, side: str, *, shards: slice = slice(1)) -> tc.Dataset:
    """Copies of both data sets side by side, with some bytes of shards of one side overwritten."""
    for name in ("left", "right"):
        (tmp_path / name).mkdir()
        for path in (folder / name).rglob("*"):
            if path.is_file():
                target = tmp_path / name / path.relative_to(folder / name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    for shard in sorted((tmp_path / side).glob("shards/*"))[shards]:
        data = bytearray(shard.read_bytes())
        end = 220 if shards == slice(1) else len(data) - 64
        data[200:end] = bytes(end - 200)
        shard.write_bytes(data)
    return tc.zip_columns(tc.Dataset(tmp_path / "left"), tc.Dataset(tmp_path / "right"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_corrupt_records_of_either_side_are_replaced_or_an_error_that_names_the_shard(folder, tmp_path, side):
    dataset = damaged(folder, tmp_path, side)
    with pytest.raises(tc.CorruptShard, match=rf"/{side}/shards/.*: block 0, column") as caught:
        ids_of(tc.DataLoader(dataset, batch_size=10))
    if side == "right":
        assert caught.value.record == 0
        assert "(records 0 to " in str(caught.value)
    careful = tc.DataLoader(dataset, batch_size=10, options=tc.LoaderOptions(on_corrupt="previous"))
    with pytest.warns(RuntimeWarning, match=rf"/{side}/shards/.* its records that cannot be read are replaced"):
        served = ids_of(careful)
    assert len(served) == N
    assert 0 < careful.stats()["skipped"] < N / 2
    assert set(served) < set(range(N))
    dataset.close()


@pytest.mark.filterwarnings("ignore:.*cannot be read are replaced:RuntimeWarning")
def test_a_side_of_which_nothing_can_be_read_is_named(folder, tmp_path):
    dataset = damaged(folder, tmp_path, "right", shards=slice(None))
    careful = tc.DataLoader(dataset, batch_size=10, options=tc.LoaderOptions(on_corrupt="previous"))
    with pytest.raises(tc.CorruptShard, match=r"/right/shards/.*no record of this rank's share"):
        ids_of(careful)
    dataset.close()


def test_a_column_with_the_name_of_a_padded_columns_lengths_is_an_error(tmp_path):
    with tc.Writer(tmp_path / "a", schema={"rag": tc.Ragged("int32", (None,))}) as writer:
        writer.write_batch({"rag": [np.arange(n, dtype=np.int32) for n in range(5)]})
    with tc.Writer(tmp_path / "b", schema={"rag.lengths": "int64"}) as writer:
        writer.write_batch({"rag.lengths": np.arange(5) + 1000})
    padded, other = tc.Dataset(tmp_path / "a", layouts={"rag": "padded"}), tc.Dataset(tmp_path / "b")
    for pair in ((padded, other), (other, padded)):
        with pytest.raises(ValueError, match=r"rag\.lengths"):
            tc.zip_columns(*pair)
    assert tc.zip_columns(tc.Dataset(tmp_path / "a"), other)[2]["rag.lengths"] == 1002
