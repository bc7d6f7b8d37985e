"""Page checks on first touch: every corrupt page is found by the rows on it, and by no other rows."""

from __future__ import annotations

import mmap
import threading
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache._native import gather
from tiercache._native.checksum import crc32c
from tiercache._native.ring import Plan

PAGE = 65536
N_BYTES = 3 * PAGE + 1000  # the last page is short


@dataclass
class Stored:
    """A chunk: its bytes, the sums of its pages by the portable kernel, and a flag for each."""

    data: np.ndarray
    crcs: np.ndarray
    checked: np.ndarray

    @staticmethod
    def of(data: np.ndarray) -> Stored:
        pages = [data[at : at + PAGE] for at in range(0, len(data), PAGE)]
        sums = np.array([crc32c(page, kernel="portable") for page in pages], np.uint32)
        return Stored(data, sums, np.zeros(len(pages), np.uint8))

    @property
    def checks(self) -> np.ndarray:
        """One row of checks."""
        addresses = (self.crcs.ctypes.data, self.checked.ctypes.data)
        return np.array([[self.data.ctypes.data, len(self.data), *addresses]], np.uint64)

    def address(self, start: int = 0) -> int:
        return self.data.ctypes.data + start


def places(rows) -> tuple[np.ndarray, np.ndarray]:
    row = np.array(rows, np.uint32)
    return np.zeros(len(row), np.uint32), row


def random_chunk(n_bytes: int = N_BYTES) -> Stored:
    return Stored.of(np.random.default_rng(7).integers(0, 256, n_bytes, dtype=np.uint8))


def fixed(chunk: Stored, width: int, rows, start: int = 64) -> np.ndarray:
    out = np.zeros(len(rows) * width, np.uint8)
    sources = np.array([[chunk.address(start), 0, 0]], np.uint64)
    gather.gather(gather.FIXED, width, sources, *places(rows), out, checks=chunk.checks)
    return out.reshape(-1, width)


def pages_of(start: int, end: int) -> set[int]:
    """The pages that bytes [start, end) lie on."""
    return set(range(start // PAGE, (end - 1) // PAGE + 1)) if end > start else set()


@given(st.sampled_from([1, 2, 4, 8, 16, 60, 64, 2048, 12288, 70000]), st.integers(0, N_BYTES - 1), st.integers(0, 7))
def test_a_flipped_bit_is_found_by_the_rows_on_its_page_only(width, position, bit):
    chunk = random_chunk()
    whole = chunk.data.copy()
    chunk.data[position] ^= 1 << bit
    n_rows = (N_BYTES - 64) // width
    near = (np.array([0, PAGE, 2 * PAGE, 3 * PAGE, position]) - 64) // width
    rows = sorted({int(r) for n in near for r in (n - 1, n, n + 1) if 0 <= r < n_rows})
    for row in rows:
        start = 64 + row * width
        if position // PAGE in pages_of(start, start + width):
            with pytest.raises(gather.CorruptError):
                fixed(chunk, width, [row])
            sources = np.array([[chunk.address(64), 0, 0]], np.uint64)
            found = gather.locate(gather.FIXED, width, sources, chunk.checks, *places([row]))
            assert found == (0, position // PAGE)
        else:
            assert fixed(chunk, width, [row]).tobytes() == whole[start : start + width].tobytes()
    assert chunk.checked[position // PAGE] == 0
    assert gather.check_chunk(chunk.checks[0]) == position // PAGE


@pytest.mark.parametrize("rows", [range(96), [5, 90, 2, 61, 7]])
def test_verified_pages_are_not_checked_again(rows):
    chunk = random_chunk()
    fixed(chunk, 2048, list(rows))
    assert chunk.checked.all() == (list(rows) == list(range(96)) and len(chunk.checked) == 4)
    touched = {page for row in rows for page in pages_of(64 + row * 2048, 64 + (row + 1) * 2048)}
    assert set(np.flatnonzero(chunk.checked).tolist()) == touched
    chunk.data[:] ^= 1
    fixed(chunk, 2048, list(rows))


def test_validity_bits_are_checked_only_where_they_are_stored():
    chunk = random_chunk()
    chunk.data[PAGE + 5] ^= 4
    sources = np.array([[chunk.address(), 0, 0]], np.uint64)
    out = np.zeros(3, np.uint8)
    gather.gather(gather.BITS, 0, sources, *places([0, 8 * PAGE - 1, 16 * PAGE]), out, checks=chunk.checks)
    assert chunk.checked.tolist() == [1, 0, 1, 0]
    for rows in ([8 * PAGE, 3, 4], [8 * PAGE - 1, 8 * PAGE, 8 * PAGE + 1]):
        with pytest.raises(gather.CorruptError):
            gather.gather(gather.BITS, 0, sources, *places(rows), out, checks=chunk.checks)
    none = np.zeros((1, 3), np.uint64)
    gather.gather(gather.BITS, 0, none, *places([8 * PAGE, 3, 4]), out, checks=chunk.checks)
    assert out.tolist() == [1, 1, 1]


def text_chunk(n_rows: int = 20_000, width: int = 30) -> tuple[Stored, np.ndarray, int]:
    """A chunk of offsets and text, and where the text begins."""
    offsets = np.arange(n_rows + 1, dtype=np.int64) * width
    start = -(-offsets.nbytes // 64) * 64
    data = np.full(start + n_rows * width, ord("x"), np.uint8)
    data[: offsets.nbytes] = offsets.view(np.uint8)
    chunk = Stored.of(data)
    return chunk, np.array([[chunk.address(), chunk.address(0), 0]], np.uint64), start


@pytest.mark.parametrize("where", ["offsets", "values"])
def test_a_flipped_bit_of_varying_rows_is_found_by_the_rows_of_its_page_only(where):
    chunk, sources, start = text_chunk()
    sources[0, 0], sources[0, 2] = chunk.address(start), 20_000 * 30
    position = PAGE + 100 if where == "offsets" else start + 10_000 * 30
    # a wrong page whose bytes would still pass as offsets or text
    chunk.data[position] ^= 1
    page = position // PAGE
    served = 0
    for row in range(0, 20_000, 37):
        span = start + row * 30, start + (row + 1) * 30
        on_page = page in pages_of(8 * row, 8 * row + 16) | pages_of(*span)
        for read in (gather.gather_bytes, gather.gather_str):
            if on_page:
                with pytest.raises(gather.CorruptError):
                    read(sources, *places([row]), chunk.checks)
                assert gather.locate(gather.VAR, 1, sources, chunk.checks, *places([row])) == (0, page)
            else:
                assert len(read(sources, *places([row]), chunk.checks)[0]) == 30
                served += 1
    assert served > 300
    assert not chunk.checked[page]


@pytest.mark.parametrize("spoil", [(11, -1), (11, 2**40), (11, 5), (10, 2**62)])
@pytest.mark.parametrize("run", [True, False])
def test_offsets_that_decrease_or_leave_their_chunk_are_always_found(spoil, run):
    values, offsets = np.zeros(200, np.uint8), np.arange(21, dtype=np.int64) * 10
    offsets[spoil[0]] = spoil[1]
    sources = np.array([[values.ctypes.data, offsets.ctypes.data, 200]], np.uint64)
    wrong = {spoil[0] - 1, spoil[0]}
    good, bad = sorted(set(range(20)) - wrong), list(range(20)) if run else [3, 17, spoil[0], 2, spoil[0] - 1, 5]
    assert gather.gather_bytes(sources, *places(good)) == [bytes(10)] * len(good)
    assert gather.measure(sources, *places(good)).tolist() == [10 * k for k in range(len(good) + 1)]
    for read in (gather.gather_bytes, gather.gather_str, gather.measure):
        with pytest.raises(gather.CorruptError, match="offsets"):
            read(sources, *places(bad))
    index, page = gather.locate(gather.VAR, 1, sources, None, *places(bad))
    assert (bad[index] in wrong, page) == (True, None)


def test_offsets_that_change_after_measure_are_found():
    values, offsets = np.zeros(200, np.uint8), np.arange(21, dtype=np.int64) * 10
    sources = np.array([[values.ctypes.data, offsets.ctypes.data, 200]], np.uint64)
    for rows in (list(range(20)), [3, 19, 7]):
        measured = gather.measure(sources, *places(rows))
        offsets[rows[0]] += 195
        with pytest.raises(gather.CorruptError):
            gather.gather(gather.VAR, 1, sources, *places(rows), np.zeros(200, np.uint8), measured)
        offsets[rows[0]] -= 195


@pytest.mark.parametrize("damaged", [False, True])
def test_threads_that_check_the_same_pages_agree(damaged):
    chunk = random_chunk(64 * PAGE)
    whole = chunk.data.copy()
    if damaged:
        chunk.data[40 * PAGE] ^= 1
    found: list[object] = []
    begin = threading.Barrier(8)

    def read(seed: int) -> None:
        rows = np.random.default_rng(seed).permutation(64 * 32)
        begin.wait(30)
        try:
            out = fixed(chunk, 2048, rows, start=0)
            found.append(np.array_equal(out, whole.reshape(-1, 2048)[rows]))
        except gather.CorruptError:
            found.append("corrupt")

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == ["corrupt" if damaged else True] * 8
    assert chunk.checked[40] == (not damaged)
    assert damaged or chunk.checked.all()


def test_a_file_truncated_before_its_first_check_raises_an_error(tmp_path):
    path = tmp_path / "mapped"
    path.write_bytes(bytes(2 * PAGE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 2 * PAGE, access=mmap.ACCESS_READ) as mapping:
        chunk = Stored.of(np.frombuffer(mapping, np.uint8))
        file.truncate(PAGE)
        assert fixed(chunk, 64, [3], start=0).tolist() == [[0] * 64]
        for _ in range(2):
            with pytest.raises(OSError, match="truncated"):
                fixed(chunk, 64, [PAGE // 64 + 3], start=0)
            with pytest.raises(OSError, match="truncated"):
                gather.check_chunk(chunk.checks[0])
        assert chunk.checked.tolist() == [1, 0]
        del chunk


@pytest.mark.parametrize("shape", [(1, 3), (2, 4)])
def test_checks_of_the_wrong_shape_raise_an_error(shape):
    values, out = np.zeros(64, np.uint8), np.zeros(8, np.uint8)
    sources = np.array([[values.ctypes.data, 0, 0]], np.uint64)
    checks = np.zeros(shape, np.uint64)
    with pytest.raises(ValueError, match=r"checks need the shape \[1, 4\]"):
        gather.gather(gather.FIXED, 8, sources, *places([0]), out, checks=checks)
    with pytest.raises(ValueError, match="checks need the shape"):
        Plan(sources[None], *places([0]), None, checks[None])
