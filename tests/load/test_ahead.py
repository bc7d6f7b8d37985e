"""Mapped pages brought near: what is read, what is let go, and a file that is cut short meanwhile."""

import os
import re
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
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


@pytest.mark.parametrize(("kernel", "is_advised"), [((5, 18), True), ((5, 17), False), ((0, 0), False)])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_kernel_that_reads_huge_pages_is_advised_to(mapped, make_ahead, monkeypatch, kernel, is_advised, is_first):
    monkeypatch.setattr("tiercache.load.ahead._kernel", lambda: kernel)
    memory = mapped.memory
    ahead, window = make_ahead(1 << 40), window_of(memory)
    if is_first:
        ahead.expect_first([window])
    else:
        near_bytes(bring_near(ahead, window))
    if _huge_pages_are_known():
        assert ("hg" in _flags(memory)) == is_advised


def test_the_rows_of_a_first_window_that_is_large_are_read_as_usual(mapped, make_ahead, monkeypatch):
    monkeypatch.setattr("tiercache.load.ahead._FIRST_HUGE_BYTES", N_BYTES - 1)
    make_ahead(1 << 40).expect_first([window_of(mapped.memory)])
    assert "hg" not in _flags(mapped.memory)


def test_what_is_in_memory_already_is_not_advised_about(mapped, make_ahead):
    window = window_of(mapped.memory)
    window.held[0].copy = SimpleNamespace(tells_residence=True)
    mapped.memory.sum()
    ahead = make_ahead(1 << 40)
    ahead.expect_first([window])
    assert near_bytes(bring_near(ahead, window)) == N_BYTES
    assert "hg" not in _flags(mapped.memory)


def _huge_pages_are_known() -> bool:
    return Path("/sys/kernel/mm/transparent_hugepage").exists()


def _flags(memory: np.ndarray) -> list[str]:
    """What the kernel says of a mapping."""
    address = memory.__array_interface__["data"][0]
    is_it = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
            is_it = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif is_it and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


def test_windows_that_are_served_side_by_side_share_the_room(mapped, make_ahead, monkeypatch):
    monkeypatch.setattr("tiercache.load.ahead.config.private_bytes", lambda: 0)
    half = N_BYTES // 2
    first, second = window_of(mapped.memory[:half]), window_of(mapped.memory[half:])
    assert near_bytes(bring_near(make_ahead(NEAR_SHARE * N_BYTES), first, second)) == N_BYTES
    assert near_bytes(bring_near(make_ahead(NEAR_SHARE * (N_BYTES - 1)), first, second)) == half
