"""Mapped pages brought near: what is read, what is let go, and a file that is cut short meanwhile."""

import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from tiercache.load.ahead import NEAR_SHARE, Ahead
from tiercache.load.window import Threads

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="madvise as Linux has it")
N_BYTES = 1 << 20


@pytest.fixture
def mapped(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(N_BYTES))
    found = SimpleNamespace(path=path, memory=np.memmap(path, np.uint8, "r"))
    yield found
    found.memory = None  # pytest keeps what a fixture gave beyond the look for leaks


@pytest.fixture
def make_ahead():
    with ThreadPoolExecutor(2) as executor:
        yield lambda limit_bytes, stored_bytes=N_BYTES: Ahead(Threads(executor, Future(), 2, limit_bytes), stored_bytes)


def window_of(memory: np.ndarray, n_parts: int = 1) -> SimpleNamespace:
    size = len(memory) // n_parts
    address = memory.__array_interface__["data"][0]
    held = [
        SimpleNamespace(mapped=np.array([[address + n * size, size]], np.uint64), private_bytes=0, copy=None)
        for n in range(n_parts)
    ]
    return SimpleNamespace(held=held, window=SimpleNamespace(key=b"k"))


def bring_near(ahead: Ahead, *windows: SimpleNamespace) -> list[Future[int]]:
    return ahead.bring_near(windows, [loaded.window for loaded in windows])


def near_bytes(futures) -> int:
    return sum(future.result() for future in futures)


def test_all_of_a_window_is_brought_near_when_there_is_room(mapped, make_ahead):
    memory = mapped.memory
    assert near_bytes(bring_near(make_ahead(1 << 40), window_of(memory, 4))) == N_BYTES


def test_nothing_is_brought_near_without_room(mapped, make_ahead):
    memory = mapped.memory
    assert bring_near(make_ahead(1), window_of(memory)) == []


def test_a_file_cut_short_meanwhile_is_less_near_and_no_dead_process(mapped, make_ahead):
    memory = mapped.memory
    os.truncate(mapped.path, 4096)
    assert near_bytes(bring_near(make_ahead(1 << 40), window_of(memory, 4))) == 0


@pytest.mark.parametrize("stored_bytes", [N_BYTES, 1 << 50])
def test_pages_of_windows_that_were_served_can_be_read_again(mapped, make_ahead, stored_bytes):
    memory = mapped.memory
    ahead = make_ahead(1 << 40, stored_bytes)
    for _ in range(4):
        assert near_bytes(bring_near(ahead, window_of(memory))) == N_BYTES
        assert not memory.any()


def test_windows_that_are_served_side_by_side_share_the_room(mapped, make_ahead, monkeypatch):
    monkeypatch.setattr("tiercache.load.ahead.config.private_bytes", lambda: 0)
    half = N_BYTES // 2
    first, second = window_of(mapped.memory[:half]), window_of(mapped.memory[half:])
    assert near_bytes(bring_near(make_ahead(NEAR_SHARE * N_BYTES), first, second)) == N_BYTES
    assert near_bytes(bring_near(make_ahead(NEAR_SHARE * (N_BYTES - 1)), first, second)) == half
