"""A damaged copy in the cache costs a fetch and never a run; a damaged source is an error."""

from __future__ import annotations

import itertools
import mmap
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.http_server import HttpFaultServer
from tests.support.mixed_shard import wait_until_settled
from tests.support.records import SCHEMA, check_batch, make_columns

import tiercache as tc
from tiercache.load import windows

N = 600
OPTIONS = tc.LoaderOptions(seed=3, memory_bytes=1)  # two batches ahead, no more


@pytest.fixture
def server(tmp_path):
    path = tmp_path / "data"
    with tc.Writer(path, schema=SCHEMA, shard_size="8KiB", block_size="1KiB") as writer:
        writer.write_batch(make_columns(N))
    files = [file for file in path.rglob("*") if file.is_file()]
    with HttpFaultServer({f"data/{f.relative_to(path).as_posix()}": f.read_bytes() for f in files}) as server:
        yield server


@pytest.fixture
def cache(tmp_path):
    with tc.Cache(tmp_path / "cache", size="64MiB") as cache:
        yield cache


def damage(cache: tc.Cache, how: str) -> int:
    """Damage every copy of a shard in the cache; how many there are."""
    copies = [path for path in (cache.path / "copies").iterdir() if "." not in path.name]
    for path in copies:
        data = bytearray(path.read_bytes())
        if how == "values":
            data[100] ^= 4
        elif how == "footer":
            data[-100] ^= 4
        else:
            data = data[: len(data) // 2]
        path.chmod(0o644)
        path.write_bytes(data)
    return len(copies)


def sent_shards(server: HttpFaultServer) -> list[str]:
    return sorted({seen.path for seen in server.log if "/shards/" in seen.path and seen.n_bytes})


@pytest.mark.parametrize(
    ("how", "read"),
    [("values", "loader"), ("footer", "records"), ("cut", "arrow"), ("values", "sampler"), ("cut", "loader")],
)
def test_a_corrupt_copy_is_fetched_again_and_the_run_continues(server, cache, how, read):
    first = tc.Dataset(f"{server.url}/data", cache=cache)
    first.warm()
    first.close()
    assert damage(cache, how) > len(first._source.leaves[0].table)
    server.log.clear()
    dataset = tc.Dataset(f"{server.url}/data", cache=cache)
    assert read_all(dataset, read, {}) == list(range(N))
    assert len(sent_shards(server)) == len(dataset._source.leaves[0].table)
    dataset.close()


@pytest.mark.parametrize("read", ["loader", "single records", "warm"])
def test_of_a_shard_with_one_corrupt_block_only_that_block_is_fetched_again(tmp_path, cache, read):
    path = tmp_path / "data"
    with tc.Writer(path, schema=SCHEMA, shard_size="64MiB", block_size="32KiB") as writer:
        for _ in range(40):
            writer.write_batch(make_columns(N))
    files = [file for file in path.rglob("*") if file.is_file()]
    with HttpFaultServer({f"data/{f.relative_to(path).as_posix()}": f.read_bytes() for f in files}) as server:
        dataset = tc.Dataset(f"{server.url}/data", cache=cache)
        dataset.warm()
        (copy,) = shards_of(cache, dataset)
        n_bytes = copy.stat().st_size
        copy.chmod(0o600)
        with copy.open("r+b") as file:
            file.seek(n_bytes // 2)
            file.write(bytes([file.read(1)[0] ^ 4]))
        server.log.clear()
        if read == "warm":
            assert cache.verify(repair=True).is_right
        elif read == "loader":
            assert len(list(itertools.chain(*map(check_batch, tc.DataLoader(dataset, 32, shuffle=True))))) == 40 * N
        else:
            assert [int(dataset[i]["id"]) for i in range(0, 40 * N, 7)] == [i % N for i in range(0, 40 * N, 7)]
        dataset.warm()
        assert 0 < server.n_bytes_sent < n_bytes // 50
        assert cache.verify().wrong == ()
        assert cache.stats()["quarantined"] == 1
        dataset.close()


def flip_bits(paths, how: str) -> None:
    """Flip a bit of each file: written, written with its times set back, or stored through a mapping."""
    for path in paths:
        status = path.stat()
        path.chmod(0o600)
        with path.open("r+b") as file:
            if how == "mapped":
                with mmap.mmap(file.fileno(), 0) as memory:
                    memory[100] ^= 4
            else:
                data = file.read(101)
                file.seek(100)
                file.write(bytes([data[100] ^ 4]))
        path.chmod(status.st_mode)
        if how == "restored":
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def shards_of(cache: tc.Cache, dataset: tc.Dataset) -> list[Path]:
    """The cached copies of a data set's shards, by the size that tells them from the list of shards."""
    sizes = set(np.asarray(dataset._source.leaves[0].table.n_bytes).tolist())
    files = [path for path in (cache.path / "copies").iterdir() if "." not in path.name]
    found = [path for path in files if path.stat().st_size in sizes]
    assert len(found) == len(dataset._source.leaves[0].table)
    return found


def read_all(dataset: tc.Dataset, how: str, loaders: dict[str, tc.DataLoader]) -> list[int]:
    """The ids of all records, sorted; by one loader however often it is called."""
    if how == "loader":
        loader = loaders.setdefault(how, tc.DataLoader(dataset, batch_size=32, shuffle=True))
        found = list(itertools.chain(*map(check_batch, loader)))
    elif how == "sampler":
        numbers = [i for start in range(97) for i in range(start, N, 97)]
        loader = loaders.setdefault(how, tc.DataLoader(dataset, 4, sampler=numbers))
        found = list(itertools.chain(*map(check_batch, loader)))
    elif how == "arrow":
        found = [i for table in dataset.to_arrow(50) for i in table["id"].to_pylist()]
    elif how == "single records":
        records = [dataset[i] for i in range(N)]
        assert [record["tokens"].tolist() for record in records] == make_columns(N)["tokens"].tolist()
        found = [int(record["id"]) for record in records]
    else:
        found = [i for start in range(0, N, 50) for i in check_batch(dataset[list(range(start, start + 50))])]
    return sorted(found)


WAYS = ["loader", "sampler", "records", "single records", "arrow"]


@pytest.mark.parametrize(
    ("read", "written"), [*zip(WAYS, ["plainly", "restored", "mapped", "restored", "plainly"], strict=True)]
)
def test_a_bit_that_flips_in_a_copy_after_its_check_is_never_served(server, cache, read, written):
    dataset, loaders = tc.Dataset(f"{server.url}/data", cache=cache), {}
    dataset.warm()
    for _ in range(2):
        assert read_all(dataset, read, loaders) == list(range(N))
    copies = shards_of(cache, dataset)
    before_ns = {path: path.stat().st_ctime_ns for path in copies}
    wait_until_settled(*copies)
    server.log.clear()
    flip_bits(copies, written)
    if any(path.stat().st_ctime_ns == before_ns[path] for path in copies):
        pytest.skip("this file system does not date what is written by a mapping")
    wait_until_settled(*copies)
    for _ in range(2):
        assert read_all(dataset, read, loaders) == list(range(N))
    assert cache.stats()["quarantined"] == len(copies)
    assert len(sent_shards(server)) == len(copies)
    dataset.close()


@pytest.mark.parametrize("read", ["loader", "single records"])
def test_a_bit_that_flips_in_a_local_folder_after_its_check_is_an_error(tmp_path, read):
    with tc.Writer(tmp_path / "data", schema=SCHEMA, shard_size="8KiB", block_size="1KiB") as writer:
        writer.write_batch(make_columns(N))
    dataset, loaders = tc.Dataset(tmp_path / "data"), {}
    for _ in range(2):
        assert read_all(dataset, read, loaders) == list(range(N))
    shards = list((tmp_path / "data").rglob("*.tcs"))
    flip_bits(shards, "restored")
    wait_until_settled(*shards)
    with pytest.raises(tc.CorruptShard, match="CRC-32C"):
        read_all(dataset, read, loaders)
    dataset.close()


def test_a_later_epoch_checks_pages_again_after_a_silent_change(server, cache, monkeypatch):
    dataset, loaders = tc.Dataset(f"{server.url}/data", cache=cache), {}
    dataset.warm()
    (first, *_) = copies = shards_of(cache, dataset)
    first.chmod(0o600)
    with first.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[100] ^= 0  # its page is dirty from here on, so that no further store to it is dated
        wait_until_settled(*copies)
        assert read_all(dataset, "loader", loaders) == list(range(N))
        memory[100] ^= 4
        wait_until_settled(*copies)
        monkeypatch.setattr("tiercache.shard.blocks.CHECKED_FOR_S", -1.0)
        loaders.clear()  # the windows with which its next epoch begins are loaded already
        for _ in range(2):
            assert read_all(dataset, "loader", loaders) == list(range(N))
    assert cache.stats()["quarantined"] == 1
    dataset.close()


@pytest.mark.skipif(sys.platform != "linux", reason="posix_fadvise and madvise as Linux has them")
def test_pages_that_are_read_from_disk_again_are_checked_again(tmp_path):
    with tc.Writer(tmp_path / "data", schema={"x": tc.Tensor("int64", (64,))}, compression="none") as writer:
        writer.write_batch({"x": np.arange(1024 * 64).reshape(1024, 64)})
    (path,) = (tmp_path / "data").rglob("*.tcs")
    dataset = tc.Dataset(tmp_path / "data")
    wait_until_settled(path)
    dataset[list(range(1024))]
    blocks = dataset._source.load_blocks(0, range(dataset._source.leaves[0]._footer(0).n_blocks))
    windows.renew_checks(blocks)
    assert blocks.pending_checks is None  # in memory, and checked a moment ago
    with path.open("rb") as file:
        os.fsync(file.fileno())
        windows._release_pages(blocks)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if windows.is_in_memory(blocks, blocks.pages):
        pytest.skip("the system keeps the file in memory")
    windows.renew_checks(blocks)
    assert blocks.pending_checks is not None
    dataset.close()


def test_a_copy_truncated_while_mapped_is_fetched_again_and_the_epoch_continues(server, cache, caplog):
    dataset = tc.Dataset(f"{server.url}/data", cache=cache)
    dataset.warm()
    reference = [check_batch(batch) for batch in tc.DataLoader(dataset, 8, shuffle=True, options=OPTIONS)]
    dataset.close()
    dataset = tc.Dataset(f"{server.url}/data", cache=cache)
    loader = tc.DataLoader(dataset, 8, shuffle=True, options=OPTIONS)
    batches = iter(loader)
    found = [check_batch(next(batches))]
    for path in (cache.path / "copies").iterdir():
        if "." not in path.name:
            path.chmod(0o644)
            os.truncate(path, 64)
    found += [check_batch(batch) for batch in batches]
    assert found == reference
    assert "fetched again" in caplog.text
    assert loader.stats()["samples"] == N
    dataset.close()


@pytest.mark.parametrize("shared", [True, False])
def test_readers_of_a_copy_that_was_replaced_continue(server, cache, shared):
    first = tc.Dataset(f"{server.url}/data", cache=cache)
    second = first if shared else tc.Dataset(f"{server.url}/data", cache=cache)  # as another process has it
    first.warm()
    loaders = [tc.DataLoader(dataset, 8, options=OPTIONS) for dataset in (first, second)]
    for loader in loaders:  # both have the copies open, and the next epoch's first window
        assert list(itertools.chain(*map(check_batch, loader))) == list(range(N))
    for path in (cache.path / "copies").iterdir():
        if "." not in path.name:
            path.chmod(0o644)
            os.truncate(path, 64)
    for loader in loaders:
        assert list(itertools.chain(*map(check_batch, loader))) == list(range(N))
    first.close()
    second.close()


def test_a_local_file_truncated_inside_a_checked_page_serves_no_zeros(tmp_path):
    path = tmp_path / "local"
    with tc.Writer(path, schema={"x": tc.Tensor("int64", (64,))}, block_size="64KiB", compression="none") as writer:
        writer.write_batch({"x": np.arange(1, 1 + 1024 * 64).reshape(1024, 64)})
    dataset = tc.Dataset(path)
    options = tc.LoaderOptions(shuffle_window_bytes="64KiB", memory_bytes=1)
    loader = tc.DataLoader(dataset, 16, options=options)
    assert sum(len(batch["x"]) for batch in loader) == 1024
    assert (dataset[[700, 900]]["x"] != 0).all()
    footer = dataset._source.leaves[0]._footer(0)
    os.truncate(path / dataset._source.leaves[0].table.info(0).name, int(footer.chunks[6, 0]["offset"]) + 100)
    seen: list[torch.Tensor] = []
    with pytest.raises(tc.CorruptShard, match="shorter than"):
        seen.extend(batch["x"] for batch in loader)
    assert all((x != 0).all() for x in seen)
    assert len(seen) <= 16  # of the windows that were mapped before
    dataset.close()
