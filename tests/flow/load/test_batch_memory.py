"""Memory of decoded batches: whose it is, when it is used again, what is held and what is not."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from tests.support.decoded import N, loader_of, make_columns, write

import tiercache as tc
from tiercache._native.ring import held_bytes
from tiercache.load.batch import BatchMemory
from tiercache.load.decode import _DecodeQueue, _Job


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pictures") / "data", make_columns(N))


@pytest.fixture
def made(monkeypatch):
    """Size and address of all batch memory that was lent."""
    made, lend = set(), BatchMemory.lend

    def seen(self, n_bytes, size_bytes):
        lent = lend(self, n_bytes, size_bytes)
        made.add((size_bytes, lent.ctypes.data))
        return lent

    monkeypatch.setattr(BatchMemory, "lend", seen)
    return made


def test_an_epoch_reuses_the_memory_of_the_epoch_before(path, made):
    loader = loader_of(path)
    n_batches = len(list(loader))  # all are held at once
    assert len(made) == n_batches
    for _ in range(2):
        for _batch in loader:
            pass
    assert len(made) == n_batches
    iterator = iter(loader)
    kept = next(iterator)
    content = kept["image"].clone()
    del loader
    assert len(list(iterator)) == n_batches - 1
    assert torch.equal(kept["image"], content)


def test_columns_of_unlike_sizes_use_their_memory_again(tmp_path, made):
    images = make_columns(60)["image"]
    path = write(tmp_path / "two", {"a": images, "b": images}, {"a": tc.Image("jpeg"), "b": tc.Image("jpeg")})
    dataset = tc.Dataset(path, decode={"a": tc.DecodeImage(32), "b": tc.DecodeImage(64)})
    for _batch in tc.DataLoader(dataset, batch_size=2):
        pass
    assert max(Counter(size_bytes for size_bytes, _ in made).values()) <= 6


def test_no_batch_is_opened_after_a_corrupt_image():
    line, broken = _DecodeQueue(ahead=4), _Job({}, columns=(None,), n_rows=1)
    line.next_task()
    line.add(broken)
    assert line.next_task() == (broken, 0)
    assert line.next_task()[1] == -1  # another thread opens the next batch, while the picture turns out to be broken
    line.done(broken, 0, ValueError("broken"), 1)
    line.add(_Job({}, columns=(None,), n_rows=1))
    assert line.next_task()[1] == 0
    closing = threading.Timer(0.05, line.close)
    closing.start()
    assert line.next_task() is None
    closing.join()


def test_memory_beyond_the_batches_ahead_is_freed():
    owner = BatchMemory(keep=2)
    lent = [owner.lend(10, 16) for _ in range(5)]
    addresses = {array.ctypes.data for array in lent}
    assert len(addresses) == 5
    assert all(array.size == 10 for array in lent)
    other = owner.lend(24, 24)
    del lent
    again = [owner.lend(16, 16) for _ in range(2)]
    assert {array.ctypes.data for array in again} <= addresses
    assert other.ctypes.data not in addresses
    assert owner.free_bytes == 0
    del again
    assert owner.free_bytes == 32


def test_a_batch_that_is_kept_keeps_no_encoded_pictures(path):
    before = held_bytes()
    kept = list(loader_of(path))
    assert held_bytes() - before == 8 * N  # the column `id`
    assert [i for b in kept for i in b["id"].tolist()] != list(range(N))


def test_memory_that_the_consumer_holds_is_counted(path):
    loader = loader_of(path)
    iterator = iter(loader)
    before = loader.stats()["held_bytes"]
    batches = list(iterator)
    held = loader.stats()["held_bytes"] - before
    assert held >= sum(b["image"].nbytes for b in batches[6:])
    view = batches[0]["image"].numpy()[0]
    content = view.copy()
    del batches
    assert len(list(loader_of(path))) == 9
    assert np.array_equal(view, content)


FAULTS_OF_EPOCHS = """
import resource, sys
import tiercache as tc

loader = tc.DataLoader(tc.Dataset(sys.argv[1]), batch_size=64)
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert sum(len(batch["content"]) for batch in loader) == 1024
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.stress
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about how glibc's malloc gives memory back")
def test_lists_of_bytes_reuse_memory(tmp_path):
    with tc.Writer(tmp_path / "data", schema={"content": "bytes"}, compression="none") as writer:
        writer.write_batch({"content": [bytes([n % 256]) * 20_000 for n in range(1024)]})
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS_OF_EPOCHS, str(tmp_path / "data")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environ)
    assert int(done.stdout) < 100  # of 16 batches of 320 pages; where malloc gives them back it is 478 and more
