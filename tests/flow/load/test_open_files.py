"""Data sets of more shards than a process may open files: the limit is set in child processes, hard and soft."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tests.support import ROOT
from tests.support.warm_python import WarmPython

import tiercache as tc
from tiercache.errors import StoreError
from tiercache.store.local import os_errors

N_SHARDS, LIMIT = 200, 128  # of one record each; open files

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
    for first in range(0, n, 97):
        wanted = np.random.default_rng(first).integers(0, n, 400)
        assert (datasets[0][wanted.tolist()]["id"] == wanted).all()
else:
    options = tc.LoaderOptions(seed=1, shuffle_group_bytes="all", shuffle_window_bytes="1GiB")
    loaders = [tc.DataLoader(dataset, batch_size=n // 8, shuffle=True, options=options) for dataset in datasets]
    for _ in range(2):
        seen = np.zeros(n, int)
        for batches in zip(*loaders):
            for batch in batches:
                ids = batch["id"].numpy()
                seen[ids] += 1
                assert columns or (batch["double"].numpy() == 2 * ids).all()
        assert (seen == len(datasets)).all(), seen
print(json.dumps({"soft": resource.getrlimit(resource.RLIMIT_NOFILE)[0]}))
"""


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
    with tc.Writer(folder, schema={"id": "int64", "double": "int64"}, shard_size=1) as writer:
        writer.write_batch({"id": np.arange(N_SHARDS), "double": 2 * np.arange(N_SHARDS)})
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
    assert read_beside_files(warm_python, few, 12)["ids"] == list(range(N_SHARDS))


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
