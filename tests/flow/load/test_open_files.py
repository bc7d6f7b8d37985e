"""Data sets of more shards than a process may open files: the limit is set in child processes, hard and soft."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tests.support import ROOT
from tests.support.warm_python import WarmPython

from tiercache._native.checksum import crc32c
from tiercache.errors import StoreError
from tiercache.model import ShardInfo
from tiercache.shard.footer import TAIL_BYTES, Footer, Tail, pack_head
from tiercache.shard.schema import Schema
from tiercache.shard.versions import commit
from tiercache.shard.writer import ShardOptions, ShardWriter
from tiercache.store import LocalFolder
from tiercache.store.local import os_errors

SCHEMA = Schema.of({"id": "int64", "double": "int64"})
N_RECORDS = 3  # of each shard
N_SHARDS, LIMIT = 200, 128

CHILD = """
import json, resource, sys
soft, hard, folder, cache, columns, way = json.loads(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
import numpy as np
import tiercache as tc
cached = tc.Cache(cache, size="1GiB") if cache else False
datasets = [tc.Dataset(folder, cache=cached) for _ in range(2 if way == "two" else 1)]
if columns:
    datasets = [dataset.select_columns(columns) for dataset in datasets]
n = len(datasets[0])
if way == "records":
    for first in range(0, n, 997):
        wanted = np.random.default_rng(first).integers(0, n, 400)
        assert (datasets[0][wanted.tolist()]["id"] == wanted).all()
else:
    options = tc.LoaderOptions(seed=1, shuffle_group_bytes="all", shuffle_window_bytes="1GiB")
    loaders = [tc.DataLoader(dataset, batch_size=n // 8, shuffle=True, options=options) for dataset in datasets]
    for _ in range(1 if n > 10_000 else 2):
        seen = np.zeros(n, int)
        for batches in zip(*loaders):
            for batch in batches:
                ids = batch["id"].numpy()
                seen[ids] += 1
                assert columns or (batch["double"].numpy() == 2 * ids).all()
        assert (seen == len(datasets)).all(), seen
print(json.dumps({"soft": resource.getrlimit(resource.RLIMIT_NOFILE)[0]}))
"""


def write(folder: Path, n_shards: int) -> None:
    """A data set of tiny shards: one is written, the others are made of it, because each shard's fsync takes 10 ms."""
    ids = np.arange(N_RECORDS)
    store = LocalFolder(folder)
    with ShardWriter(store, SCHEMA, ShardOptions(compression="none")) as writer:
        writer.write_batch({"id": ids, "double": 2 * ids})
    (first,) = writer.finish()
    data = bytearray((folder / first.name).read_bytes())
    tail = Tail.parse(bytes(data[-TAIL_BYTES:]), len(data), "")
    footer = Footer.parse(bytes(data[tail.footer_offset : -TAIL_BYTES]), tail, "")
    assert footer.n_blocks == 1
    infos = []
    for number in range(n_shards):
        body, chunks, pages = bytearray(data[: tail.footer_offset]), footer.chunks.copy(), footer.pages.copy()
        for column, factor in enumerate((1, 2)):
            values = (factor * (ids + number * N_RECORDS)).astype("<i8").tobytes()
            row = chunks[0, column]
            start, end = int(row["offset"]), int(row["offset"]) + int(row["stored"])
            body[start : start + len(values)] = values
            row["crc"] = pages[int(row["first_page"])] = crc32c(bytes(body[start:end]))
        shard_id = number.to_bytes(16, "big")
        body[:64] = pack_head(shard_id)
        stored, raw_bytes = dataclasses.replace(footer, shard_id=shard_id, chunks=chunks, pages=pages).pack()
        new_tail = Tail(tail.footer_offset, len(stored), raw_bytes, crc32c(stored))
        whole = bytes(body) + stored + new_tail.pack()
        name = f"shards/{number:05d}.tcs"
        (folder / name).write_bytes(whole)
        infos.append(
            ShardInfo(name, shard_id.hex(), N_RECORDS, len(whole), crc32c(whole), tail.footer_offset, len(stored))
        )
    commit(store, infos, schema=SCHEMA, mode="create")


def read(python: WarmPython, folder: Path, limit: int, *, cache=None, columns=(), way: str = "one", hard=None):
    """What a child process says that read the data set under a limit of open files."""
    argument = json.dumps([limit, hard or limit, str(folder), cache and str(cache), columns, way])
    done = python.run(["-c", CHILD, argument], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """More shards than the descriptors that the tests leave."""
    folder = tmp_path_factory.mktemp("few") / "data"
    write(folder, N_SHARDS)
    return folder


WAYS = {
    "a local folder": {},
    "the cache": {"cache": True},
    "parts in the cache": {"cache": True, "columns": ["id"]},
    "two data sets": {"way": "two"},
    "records by number": {"way": "records"},
}


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_a_window_of_more_shards_than_descriptors_is_served(few, tmp_path, warm_python, how):
    cache = tmp_path / "cache" if how.get("cache") else None
    read(warm_python, few, LIMIT, **(how | {"cache": cache}))


@pytest.mark.stress
@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", list(WAYS.values())[:3], ids=list(WAYS)[:3])
def test_ten_thousand_shards_in_one_window_are_served_at_1024_descriptors(tmp_path, warm_python, how):
    write(tmp_path / "data", 10_000)
    cache = tmp_path / "cache" if how.get("cache") else None
    read(warm_python, tmp_path / "data", 1024, **(how | {"cache": cache}))


def test_the_soft_limit_is_raised_when_open_shards_need_it_and_not_before(few, warm_python):
    assert read(warm_python, few, LIMIT, hard=4096, way="records")["soft"] == 4096
    assert read(warm_python, few, 1600, hard=4096, way="records")["soft"] == 1600


FULL = """
import json, os, resource, sys
soft, folder, n_left = json.loads(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
import tiercache as tc
dataset = tc.Dataset(folder, cache=False)
dataset[0]
mine = []
try:
    while True:
        mine.append(os.open(os.devnull, os.O_RDONLY))
except OSError:
    for fd in mine[:n_left]:
        os.close(fd)
try:
    print(json.dumps({"ids": [dataset[i]["id"].item() for i in range(len(dataset))]}))
except tc.StoreError as error:
    print(json.dumps({"message": str(error), "retryable": error.retryable}))
"""


def read_beside_files(python: WarmPython, folder: Path, n_left: int):
    argument = json.dumps([LIMIT, str(folder), n_left])
    done = python.run(["-c", FULL, argument], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_shards_hold_fewer_descriptors_if_other_files_are_open(few, warm_python):
    assert read_beside_files(warm_python, few, 12)["ids"] == list(range(N_SHARDS * N_RECORDS))


def test_the_error_at_the_limit_names_ulimit_and_the_limits_and_is_not_retryable(few, warm_python):
    found = read_beside_files(warm_python, few, 0)
    assert not found["retryable"]
    assert "ulimit -n" in found["message"]
    assert str(LIMIT) in found["message"]


def test_a_limit_of_the_whole_machine_is_no_limit_of_the_process():
    with pytest.raises(StoreError) as caught, os_errors("get", "/data"):
        raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
    assert caught.value.retryable
    assert "ulimit" not in str(caught.value)
