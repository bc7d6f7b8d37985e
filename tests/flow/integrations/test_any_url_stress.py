"""Objects that are replaced again and again under threads of several processes, in a cache that is too small."""

from __future__ import annotations

import multiprocessing
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

import tiercache as tc

N_BYTES = 700_000
N_OBJECTS = 6
N_OPENINGS = 150
N_THREADS = 4


def contents(version: int) -> bytes:
    """Any four bytes tell the version."""
    return version.to_bytes(4, "little") * (N_BYTES // 4)


def read_one(fs, path, chance) -> int:
    """Read ranges of one open file; returns how many were of one version until the object was no longer to be had."""
    seen, n_read = None, 0
    try:
        with fs.open(path) as file:
            for _ in range(chance.randrange(1, 15)):
                start, n_bytes = chance.randrange(N_BYTES // 4) * 4, chance.choice([4, 400, 40_000, 400_000])
                file.seek(start)
                data = file.read(n_bytes)
                version = data[:4]
                assert len(data) == min(n_bytes, N_BYTES - start)
                assert data == version * (len(data) // 4)
                assert seen in (None, version)
                seen, n_read = version, n_read + 1
    except tc.ObjectChanged:
        pass
    return n_read


def _read_there(folder, seed, done):
    fs = fsspec.filesystem("tiercache", target_protocol="file", cache_dir=f"{folder}/cache", cache_size="2500KB")

    def work(number):
        chance = random.Random(number)
        return sum(read_one(fs, f"{folder}/source/{chance.randrange(N_OBJECTS)}", chance) for _ in range(N_OPENINGS))

    with ThreadPoolExecutor(N_THREADS) as pool:
        n_read = sum(pool.map(work, range(seed, seed + N_THREADS)))
    stats = fs.cache.stats()
    fs.close()
    done.put((n_read, stats["evicted"], stats["bytes_used"] <= stats["limit_bytes"]))


@pytest.mark.stress
@pytest.mark.timeout(600)
def test_every_open_file_is_of_one_version(tmp_path):
    (tmp_path / "source").mkdir()
    for number in range(N_OBJECTS):
        (tmp_path / "source" / str(number)).write_bytes(contents(number))
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    children = [context.Process(target=_read_there, args=(str(tmp_path), seed, done)) for seed in (0, 100, 200)]
    for child in children:
        child.start()
    version, chance = N_OBJECTS, random.Random(1)
    while any(child.is_alive() for child in children) and done.qsize() < len(children):
        version += 1
        new = tmp_path / "new"
        new.write_bytes(contents(version))
        new.replace(tmp_path / "source" / str(chance.randrange(N_OBJECTS)))
        children[0].join(0.05)
    found = [done.get(timeout=60) for child in children if child.join(60) is None and child.exitcode == 0]
    assert len(found) == len(children)
    assert all(n_read and is_within for n_read, _, is_within in found)
    assert sum(n_evicted for _, n_evicted, _ in found)
    assert not list(Path(tmp_path / "cache" / "quarantine").glob("*"))
    done.close()
    done.join_thread()
