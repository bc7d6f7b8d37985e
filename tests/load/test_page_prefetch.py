"""Mapped pages brought near: what is read, what is let go, and a file that is cut short meanwhile."""

import os
import re
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tiercache.load import prefetch as ahead_module
from tiercache.load.prefetch import NEAR_SHARE, LoadThreads, PagePrefetcher

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
    return SimpleNamespace(block_groups=held, window=SimpleNamespace(key=b"k", is_in_order=False))


def prefetch_pages(ahead: PagePrefetcher, *windows: SimpleNamespace) -> list[Future[int]]:
    return ahead.prefetch_pages(windows, [loaded.window for loaded in windows])


def near_bytes(futures) -> int:
    return sum(future.result() for future in futures)


def test_a_whole_window_is_prefetched_if_there_is_room(mapped, make_ahead):
    memory = mapped.memory
    assert near_bytes(prefetch_pages(make_ahead(1 << 40), window_of(memory, 4))) == N_BYTES


def test_nothing_is_prefetched_without_room(mapped, make_ahead):
    memory = mapped.memory
    assert prefetch_pages(make_ahead(1), window_of(memory)) == []


def test_a_file_truncated_during_prefetching_does_not_kill_the_process(mapped, make_ahead):
    memory = mapped.memory
    os.truncate(mapped.path, 4096)
    n_bytes = near_bytes(prefetch_pages(make_ahead(1 << 40), window_of(memory, 4)))
    # Not in one line: pytest shows the operands, and reading the truncated memory is a bus error.
    assert n_bytes == 0


@pytest.mark.parametrize("stored_bytes", [N_BYTES, 1 << 50])
def test_pages_of_windows_that_were_served_can_be_read_again(mapped, make_ahead, stored_bytes):
    memory = mapped.memory
    ahead = make_ahead(1 << 40, stored_bytes)
    for _ in range(4):
        assert near_bytes(prefetch_pages(ahead, window_of(memory))) == N_BYTES
        assert not memory.any()


HUGE = 2 << 20


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(8 * HUGE))
    found = SimpleNamespace(memory=np.memmap(path, np.uint8, "r"))
    yield found
    found.memory = None


def blocks_of(memory: np.ndarray, size: int, every: int, *, is_in_order: bool = False) -> SimpleNamespace:
    """A window of blocks of one shard that lie scattered."""
    address = memory.__array_interface__["data"][0]
    pages = np.array([[address + at, size] for at in range(0, len(memory), every)], np.uint64)
    held = [SimpleNamespace(pages=pages, private_bytes=0, reports_residency=False)]
    return SimpleNamespace(
        block_groups=held, window=SimpleNamespace(key=None if is_in_order else b"k", is_in_order=is_in_order)
    )


# Of each: the size of a block, from one's begin to the next one's; whether the data set fits memory.
WHOLE, BLOCKS, NARROW = (HUGE, HUGE), (HUGE // 2, HUGE), (HUGE // 8, HUGE)


@pytest.mark.parametrize(
    ("lie", "fits", "is_huge"),
    [
        (WHOLE, True, True),
        (WHOLE, False, True),
        (BLOCKS, True, True),
        (BLOCKS, False, False),
        (NARROW, True, False),
        (NARROW, False, False),
    ],
)
def test_huge_pages_read_few_bytes_that_are_not_needed(large, make_ahead, lie, fits, is_huge):
    ahead = make_ahead(1 << 40, len(large.memory) if fits else 1 << 50)
    near_bytes(prefetch_pages(ahead, blocks_of(large.memory, *lie)))
    assert _is_huge(large.memory) == (is_huge and _kernel_is_new())


@pytest.mark.parametrize("kernel", [(6, 15), (5, 18), (0, 0)])
def test_a_kernel_without_huge_pages_for_files_is_not_advised(large, make_ahead, monkeypatch, kernel):
    monkeypatch.setattr("tiercache.load.prefetch._kernel", lambda: kernel)
    near_bytes(prefetch_pages(make_ahead(1 << 40), blocks_of(large.memory, *WHOLE)))
    assert not _is_huge(large.memory)


@pytest.mark.parametrize("is_in_order", [True, False])
def test_rows_of_a_shuffled_window_do_not_wait_for_huge_pages(large, make_ahead, is_in_order):
    window = blocks_of(large.memory, *WHOLE, is_in_order=is_in_order)
    near_bytes(make_ahead(1 << 40).prefetch_pages([window], [window.window], is_served=True))
    assert _is_huge(large.memory) == (is_in_order and _kernel_is_new())


def test_single_rows_without_room_are_read_alone_after_huge_pages_were_advised(large, make_ahead):
    window = blocks_of(large.memory, *WHOLE)
    near_bytes(prefetch_pages(make_ahead(1 << 40), window))
    assert prefetch_pages(make_ahead(1), window) == []
    assert "rr" in _flags(large.memory)
    assert not _is_huge(large.memory)


def test_pages_in_memory_are_not_advised(large, make_ahead):
    window = blocks_of(large.memory, *WHOLE)
    window.block_groups[0].reports_residency = True
    large.memory.sum()
    assert near_bytes(prefetch_pages(make_ahead(1 << 40), window)) == len(large.memory)
    assert not _is_huge(large.memory)


def _kernel_is_new() -> bool:
    return ahead_module._kernel() >= (6, 16) and Path("/sys/kernel/mm/transparent_hugepage").exists()


def _is_huge(memory: np.ndarray) -> bool:
    return "hg" in _flags(memory)


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
    monkeypatch.setattr("tiercache.load.prefetch.config.private_bytes", lambda: 0)
    half = N_BYTES // 2
    first, second = window_of(mapped.memory[:half]), window_of(mapped.memory[half:])
    assert near_bytes(prefetch_pages(make_ahead(NEAR_SHARE * N_BYTES), first, second)) == N_BYTES
    assert near_bytes(prefetch_pages(make_ahead(NEAR_SHARE * (N_BYTES - 1)), first, second)) == half
