"""Mapped pages brought near: what is read, what is let go, and a file that is cut short meanwhile."""

import os
import re
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tiercache.load.windows import LoadThreads, PagePrefetcher

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="madvise as Linux has it")
N_BYTES = 1 << 20


@pytest.fixture
def mapped(tmp_path):
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, N_BYTES)  # no page is cached: a large folio may not be split where the file is cut (Linux 6.18)
    found = SimpleNamespace(path=path, memory=np.memmap(path, np.uint8, "r"))
    yield found
    found.memory = None  # pytest keeps what a fixture gave beyond the look for leaks


@pytest.fixture
def make_ahead():
    with ThreadPoolExecutor(2) as executor:
        yield lambda limit_bytes, stored_bytes=N_BYTES: PagePrefetcher(
            LoadThreads(executor, Future(), 2, limit_bytes), stored_bytes
        )


def window_of(memory: np.ndarray, n_parts: int = 1) -> SimpleNamespace:
    size = len(memory) // n_parts
    address = memory.__array_interface__["data"][0]
    held = [
        SimpleNamespace(
            pages=np.array([[address + n * size, size]], np.uint64), private_bytes=0, reports_residency=False
        )
        for n in range(n_parts)
    ]
    return SimpleNamespace(block_groups=held, window=SimpleNamespace(key=b"k"))


def prefetch_pages(ahead: PagePrefetcher, *windows: SimpleNamespace) -> list[Future[int]]:
    return ahead.prefetch_pages(windows, [loaded.window for loaded in windows])


def near_bytes(futures) -> int:
    return sum(future.result() for future in futures)


def test_a_whole_window_is_prefetched_if_there_is_room(mapped, make_ahead):
    memory = mapped.memory
    assert near_bytes(prefetch_pages(make_ahead(1 << 40), window_of(memory, 4))) == N_BYTES


def test_a_file_truncated_during_prefetching_does_not_kill_the_process(mapped, make_ahead):
    memory = mapped.memory
    os.truncate(mapped.path, 4096)
    n_bytes = near_bytes(prefetch_pages(make_ahead(1 << 40), window_of(memory, 4)))
    memory = mapped.memory = None  # pytest shows values if the test fails, and reading this memory is a bus error
    assert n_bytes == 0


@pytest.mark.parametrize("stored_bytes", [N_BYTES, 1 << 50])
def test_pages_of_windows_that_were_served_can_be_read_again(mapped, make_ahead, stored_bytes):
    memory = mapped.memory
    ahead = make_ahead(1 << 40, stored_bytes)
    for _ in range(4):
        assert near_bytes(prefetch_pages(ahead, window_of(memory))) == N_BYTES
        assert not memory.any()


def test_single_rows_without_room_are_read_alone(mapped, make_ahead):
    assert prefetch_pages(make_ahead(1), window_of(mapped.memory)) == []
    assert "rr" in _flags(mapped.memory)


def _flags(memory: np.ndarray) -> list[str]:
    """Return the kernel's flags of a mapping."""
    address = memory.__array_interface__["data"][0]
    is_it = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
            is_it = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif is_it and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []
