"""Records by number: the way through mapped shards gives what the way shard by shard gives, and reads no more."""

from __future__ import annotations

import json
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.every_kind import EVERY_KIND, columns_of_every_kind, is_same
from tests.support.http_server import HttpFaultServer
from tests.support.mixed_shard import wait_until_settled

import tiercache as tc
from tiercache.shard import blocks as shard_blocks
from tiercache.shard import reader as shard_reader
from tiercache.shard.reader import ShardReader
from tiercache.shard.source import ByteSource
from tiercache.waiting import wait_for

N = 300
PAGE_BYTES = 64 << 10


def pack(path: str | Path) -> None:
    with tc.Writer(path, schema=EVERY_KIND, shard_size="8KiB", block_size="1KiB", compression="none") as writer:
        writer.write_batch(columns_of_every_kind(N))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("records") / "data"
    pack(path)
    wait_until_settled(*(path / "shards").iterdir())  # until then shards are read anew each time, not mapped
    return path


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same in a store without local files."""
    url = f"memory://{tmp_path_factory.mktemp('far').name}/data"  # new, because pytest may make the fixture twice
    pack(url)
    return url


@pytest.fixture(params=["blocks", "pages"])
def both(packed: Path, far: str, request: pytest.FixtureRequest) -> Any:
    """Read through mapped shards, and shard by shard: from blocks that are checked every time, or by pages."""
    fast = tc.Dataset(packed)
    slow = tc.Dataset(packed, verify="always") if request.param == "blocks" else tc.Dataset(far)
    assert len(fast._source.leaves[0].table) > 5
    yield fast, slow
    fast.close()
    slow.close()


def mapped_now(dataset: tc.Dataset, indices: list[int]) -> bool:
    leaf, records = dataset._source.leaves[0], np.array(indices, np.int64)
    leaf.values(records)  # maps the shards if that is possible
    return leaf._mapped.take(records) is not None


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(indices=st.lists(st.integers(-N, N - 1), max_size=30))
def test_both_ways_give_the_same_records_and_batches_of_every_kind_of_column(both, indices):
    fast, slow = both
    assert is_same(fast[indices], slow[indices])
    assert is_same(list(fast.__getitems__(indices)), list(slow.__getitems__(indices)))
    assert fast[indices]["id"].tolist() == [i % N for i in indices]
    for index in indices[:1]:
        assert is_same(fast[index], slow[index])
        assert fast[index]["id"] == index % N


def test_records_of_mapped_shards_are_found_without_asking_them_one_by_one(both, monkeypatch):
    fast, slow = both
    assert mapped_now(fast, [3, 290, 100])
    assert not mapped_now(slow, [3, 290, 100])
    monkeypatch.setattr(ShardReader, "take", None)
    everything = fast[:]
    assert everything["id"].tolist() == list(range(N))
    assert fast[7]["id"] == 7


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_columns_that_cannot_stay_mapped_are_read_the_other_way(tmp_path, compression):
    columns = {"id": np.arange(100), "when": pa.array([{"a": [i]} for i in range(100)])}
    schema = {"id": "int64"} if compression == "zstd" else {"id": "int64", "when": columns["when"].type}
    with tc.Writer(tmp_path / "d", schema=schema, shard_size="4KiB", block_size="512B", compression=compression) as w:
        w.write_batch({name: columns[name] for name in schema})
    wait_until_settled(*(tmp_path / "d" / "shards").iterdir())
    dataset = tc.Dataset(tmp_path / "d")
    assert dataset[[70, 3, 99]]["id"].tolist() == [70, 3, 99]
    assert dataset[41] == {name: {"id": 41, "when": {"a": [41]}}[name] for name in schema}
    assert not mapped_now(dataset, [3])
    assert compression == "zstd" or mapped_now(dataset.select_columns(["id"]), [3])


@pytest.mark.parametrize("max_readers", [2, 256])
def test_many_threads_read_anything_while_shards_come_and_go(packed, monkeypatch, max_readers):
    monkeypatch.setattr(shard_reader, "MAX_READERS", max_readers)
    dataset = tc.Dataset(packed)
    wrong: list[object] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for size in rng.integers(1, 20, 12 if max_readers == 2 else 60).tolist():
                indices = rng.integers(0, N, size).tolist()
                batch = dataset[indices]
                if batch["id"].tolist() != indices or dataset[indices[0]]["tokens"][0] != indices[0] * 7:
                    wrong.append(indices)
                if seed == 0 and size % 5 == 0:
                    dataset.close()
        except tc.TierCacheError as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    dataset.close()


def test_a_forked_child_maps_shards_of_its_own(both):
    fast, slow = both
    indices = list(range(0, N, 7))
    expected = slow[indices]["id"].tolist()
    assert mapped_now(fast, indices)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        inherited = fast._source.record(3)
        fine = inherited is None and fast[indices]["id"].tolist() == expected and fast[3]["id"] == 3
        os._exit(0 if fine and fast._source.record(3) is not None else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert fast._source.record(3) is not None
    assert fast[indices]["id"].tolist() == expected


WIDE = {"id": "int64", "wide": tc.Tensor("uint8", (8 << 10,)), "text": "str"}


def wide(path: Path, n: int = 64) -> list[Path]:
    """Records of which eight make a page, in two shards; the shards' files, in order."""
    with tc.Writer(path, schema=WIDE, shard_size="256KiB", block_size="256KiB", compression="none") as writer:
        for i in range(n):
            writer.write({"id": i, "wide": np.full(8 << 10, i, np.uint8), "text": f"{i}"})
    dataset = tc.Dataset(path)
    files = [path / info.name for info in dataset._source.leaves[0].table.infos()]
    dataset.close()
    return files


def flip(file: Path, value: int) -> None:
    """Change a byte in the middle of the wide record whose bytes are all `value`, in place, as a disk would."""
    at = file.read_bytes().index(bytes([value]) * (8 << 10)) + (4 << 10)
    file.chmod(0o644)
    with file.open("r+b") as stream:
        stream.seek(at)
        stream.write(bytes([value ^ 1]))


@pytest.mark.parametrize(
    ("ask", "first"),
    [(lambda d, i: d[i]["id"], None), (lambda d, i: d[[i, i]]["id"][1], 3)],
    ids=["one, at once", "many, after others"],
)
def test_a_flipped_bit_is_found_by_the_records_of_its_page_and_by_no_others(tmp_path, ask, first):
    file = wide(tmp_path / "d")[0]
    flip(file, 20)
    everything = tc.Dataset(tmp_path / "d")
    dataset = everything.select_columns(["id", "wide"])
    if first is not None:
        assert ask(dataset, first) == first
    found, errors = {}, []
    for i in range(64):
        try:
            found[i] = ask(dataset, i)
        except tc.CorruptShard as error:
            errors.append(str(error))
    assert all(all(name in error for name in ("wide", "page", file.name)) for error in errors)
    bad = sorted(set(range(64)) - set(found))
    assert all(found[i] == i for i in found)
    assert 20 in bad
    assert 8 <= len(bad) <= 9  # those of the page, and the one that only begins or ends in it
    assert bad == list(range(bad[0], bad[-1] + 1))
    with pytest.raises(tc.CorruptShard, match="page"):
        dataset[[1, 20, 60]]
    others = everything.select_columns(["id", "text"])
    assert others[20] == {"id": 20, "text": "20"}
    for each in (dataset, others, everything):
        each.close()


def test_without_verification_a_flipped_bit_is_served(tmp_path):
    flip(wide(tmp_path / "d")[0], 20)
    dataset = tc.Dataset(tmp_path / "d", verify="never")
    assert (dataset[20]["wide"] != 20).sum() == 1
    assert (dataset[[20, 60]]["wide"][0] != 20).sum() == 1
    dataset.close()


def test_a_shard_that_is_cut_under_its_mapping_is_an_error_for_its_records_only(tmp_path):
    files = wide(tmp_path / "d")
    dataset = tc.Dataset(tmp_path / "d")
    assert dataset[[0, 63]]["id"].tolist() == [0, 63]
    os.truncate(files[0], 64)
    for index in (5, [5, 63]):
        with pytest.raises(tc.CorruptShard, match=r"cannot be read|truncated|shorter|64 bytes"):
            dataset[index]
    assert dataset[62]["id"] == 62
    dataset.close()


@pytest.fixture
def server(tmp_path):
    wide(tmp_path / "d")
    objects = {f"d/{f.relative_to(tmp_path / 'd').as_posix()}": f.read_bytes() for f in (tmp_path / "d").rglob("*.*")}
    with HttpFaultServer(objects) as server:
        yield server


@pytest.fixture
def remote(server):
    dataset = tc.Dataset(f"{server.url}/d", cache=False)
    server.log.clear()
    yield dataset, server
    dataset.close()


def body_ranges(dataset: tc.Dataset, server: HttpFaultServer) -> list[tuple[int, int]]:
    """Ranges of chunks that were asked for: all but the footers, in the shards."""
    ends = {f"/d/{info.name}": info.footer_offset for info in dataset._source.leaves[0].table.infos()}
    of_shards = [seen for seen in server.log if seen.path in ends]
    asked = [(seen.path, (seen.range or "").removeprefix("bytes=").split("-")) for seen in of_shards]
    ranges = [(path, int(first), int(last) + 1) for path, (first, last) in asked]
    return [(start, end) for path, start, end in ranges if start < ends[path]]


def test_a_record_takes_one_request_once_its_footer_is_known(tmp_path):
    columns = {"label": np.arange(400), "text": [bytes([i % 251]) * (30_000 + 50 * i) for i in range(400)]}
    with tc.Writer(tmp_path / "d", schema={"label": "int64", "text": "bytes"}, compression="none") as writer:
        writer.write_batch(columns)
    with HttpFaultServer(tmp_path) as server:
        dataset = tc.Dataset(f"{server.url}/d", cache=False)
        server.log.clear()
        assert dataset[100]["label"] == 100
        assert len(server.log) == 3  # the footer, the column of labels, and the block
        server.log.clear()
        assert dataset[101] == {"label": 101, "text": columns["text"][101]}  # of the same block
        assert server.log == []
        for index in (200, 300):
            assert dataset[index]["text"] == columns["text"][index]
        assert len(server.log) == 2
        assert max(seen.n_bytes for seen in server.log) <= 1 << 20
        dataset.close()


def test_records_of_a_cached_store_bring_their_blocks_until_these_took_as_long_as_the_shard(tmp_path):
    columns = {"label": np.arange(600), "text": [bytes([i % 251]) * 30_000 for i in range(600)]}
    with tc.Writer(tmp_path / "d", schema={"label": "int64", "text": "bytes"}, compression="none") as writer:
        writer.write_batch(columns)
    with HttpFaultServer(tmp_path) as server, tc.Cache(tmp_path / "cache", size="64MiB", min_free=0) as cache:
        dataset = tc.Dataset(f"{server.url}/d", cache=cache)
        server.log.clear()
        for index in (590, 10, 300, 11, 301):  # of three of the eighteen blocks
            assert dataset[index] == {"label": index, "text": columns["text"][index]}
        assert len(server.log) == 5  # the footer, the column of labels, and the blocks
        assert sum(seen.n_bytes for seen in server.log) <= 4 << 20
        for index in range(0, 600, 17):
            assert dataset[index]["label"] == index
        assert wait_for(lambda: not list((cache.path / "copies").glob("*.part")), 60)  # the whole shard has come
        dataset.close()


def test_neighbouring_records_of_a_page_are_fetched_once_and_pages_side_by_side_in_one_range(remote):
    dataset, server = remote
    wide_only = dataset.select_columns(["wide"])
    server.log.clear()
    assert wide_only[[2, 0, 1, 2, 0]]["wide"][:, 0].tolist() == [2, 0, 1, 2, 0]
    assert [end - start for start, end in body_ranges(wide_only, server)] == [PAGE_BYTES]
    server.log.clear()
    wide_only[[0, 9]]
    assert [end - start for start, end in body_ranges(wide_only, server)] == [2 * PAGE_BYTES]
    wide_only.close()


def test_a_cached_record_brings_the_copy_and_is_mapped_from_then_on(server, tmp_path):
    with tc.Cache(tmp_path / "cache", size="64MiB") as cache:
        dataset = tc.Dataset(f"{server.url}/d", cache=cache)
        assert dataset[37]["id"] == 37
        server.log.clear()
        assert dataset[38]["id"] == 38
        for copy in (cache.path / "copies").iterdir():
            wait_until_settled(copy)  # until then each read looks whether the new copy was written to
        assert dataset[38]["id"] == 38
        assert dataset._source.record(38) is not None
        assert [seen for seen in server.log if seen.n_bytes] == []
        assert json.loads(json.dumps(cache.stats()))["bytes_used"] > 0
        dataset.close()


def test_records_of_a_large_shard_come_page_by_page_until_that_costs_as_much_as_all(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_blocks, "_BYTES_A_REQUEST", 2 * PAGE_BYTES)  # of a column of 256 KiB in a shard
    wanted: list[int] = []
    want = ByteSource.prefetch_ranges
    monkeypatch.setattr(
        ByteSource,
        "prefetch_ranges",
        lambda self, ranges: (wanted.append(sum(r.n_bytes for r in ranges)), want(self, ranges))[1],
    )
    with tc.Cache(tmp_path / "cache", size="64MiB") as cache:
        dataset = tc.Dataset(f"{server.url}/d", cache=cache, columns=["wide"])
        server.log.clear()
        assert dataset[0]["wide"][0] == 0
        assert sum(seen.n_bytes for seen in server.log) < 2 * PAGE_BYTES  # a footer and a page
        assert wanted == []
        for i in (9, 17, 25):
            assert dataset[i]["wide"][0] == i
        n_records = int(dataset._source.shard_records[0])
        assert len(wanted) == 1
        assert wanted[0] >= n_records * (8 << 10)
        dataset.close()
