"""are_resident(): whether all pages of all ranges are in memory."""

import mmap
import os
import sys

import numpy as np
import pytest

from tiercache._native.mapping import are_resident

PAGE = mmap.PAGESIZE
N_PAGES = 9000  # three calls

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks the page cache as Linux has it")


@pytest.fixture
def memory(tmp_path):
    """A mapped file of which nothing was read yet, and which may be thrown out of the page cache."""
    path = tmp_path / "file"
    path.write_bytes(bytes(N_PAGES * PAGE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    memory.madvise(mmap.MADV_RANDOM)  # a touch reads its page and no other
    if are_resident(ranges(memory, (0, 1))):
        pytest.skip("this file system keeps all of its files in memory")
    yield memory
    memory.close()


def ranges(memory, *pages):
    """Of pages [first, stop) each."""
    address = np.frombuffer(memory, np.uint8).ctypes.data
    return np.array([(address + PAGE * first, PAGE * (stop - first)) for first, stop in pages], np.uint64)


def touch(memory, first, stop):
    assert sum(memory[page * PAGE] for page in range(first, stop)) == 0


def test_ranges_are_resident_once_all_their_pages_were_read(memory):
    touch(memory, 0, N_PAGES - 1)
    assert are_resident(ranges(memory, (0, N_PAGES - 1)))
    assert not are_resident(ranges(memory, (0, N_PAGES)))
    touch(memory, N_PAGES - 1, N_PAGES)
    assert are_resident(ranges(memory, (0, N_PAGES)))


def test_one_missing_page_makes_the_ranges_not_resident(memory):
    pages = [(page, page + 10) for page in range(0, 100, 20)]
    for first, stop in pages:
        touch(memory, first, stop)
    assert are_resident(ranges(memory, *pages))
    for missing in (0, 5, 9):
        assert not are_resident(ranges(memory, *pages, (101 + missing, 102 + missing)))
        assert not are_resident(ranges(memory, (99 + missing, 101 + missing), *pages))


def test_a_range_that_ends_inside_a_page_includes_that_page(memory):
    touch(memory, 0, 1)
    part = ranges(memory, (0, 1))
    part[0, 1] += 1
    assert not are_resident(part)
    touch(memory, 1, 2)
    assert are_resident(part)


def test_an_unmapped_range_is_not_resident():
    memory = mmap.mmap(-1, 4 * PAGE)
    gone = ranges(memory, (0, 4))
    memory.close()
    assert not are_resident(gone)


def test_no_ranges_are_resident_and_wrong_shapes_raise_an_error():
    assert are_resident(np.zeros((0, 2), np.uint64))
    assert are_resident(np.zeros((1, 2), np.uint64))
    with pytest.raises(ValueError, match=r"\[n, 2\]"):
        are_resident(np.zeros((3, 3), np.uint64))
