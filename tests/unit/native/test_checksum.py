"""CRC-32C: published values, SIMD kernels against portable C and the definition, combine, pages, failing mappings."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiercache._native import checksum
from tiercache._native.checksum import combine, combine_pages, crc32c, crc32c_many, crc32c_pages, kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# RFC 3720, B.4, and the check value of the CRC catalogues.
PUBLISHED = [
    (b"", 0),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (
        bytes.fromhex(
            "01c000000000000000000000000000001400000000000400000000140000001828000000000000000200000000000000"
        ),
        0xD9963A56,
    ),
]
# Lengths at which the kernels change their stride: words, three short runs, three long runs.
STRIDES = [0, 1, 7, 8, 9, 255, 256, 767, 768, 769, 775, 12287, 12288, 12289, 12288 + 768 + 8 + 3, 32767, 32768, 70001]
NOISE = np.random.default_rng(20).integers(0, 256, 80_000, dtype=np.uint8)
seeds = st.integers(0, 2**32 - 1)


def bit_by_bit(data: bytes, seed: int = 0) -> int:
    """The definition, one bit at a time."""
    crc = seed ^ 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def address_of(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


@pytest.mark.parametrize("kernel", kernels())
def test_published_checksums_are_reproduced(kernel: str) -> None:
    assert [crc32c(data, kernel=kernel) for data, _ in PUBLISHED] == [expected for _, expected in PUBLISHED]


@pytest.mark.parametrize("kernel", kernels())
@given(data=st.binary(max_size=300), seed=seeds)
def test_every_kernel_equals_the_definition(kernel: str, data: bytes, seed: int) -> None:
    assert crc32c(data, seed, kernel=kernel) == bit_by_bit(data, seed)


@pytest.mark.parametrize("kernel", kernels())
@given(start=st.integers(0, 70), n_bytes=st.sampled_from(STRIDES) | st.integers(0, 79_000), seed=seeds)
def test_every_kernel_equals_portable_at_any_length_alignment_and_seed(
    kernel: str, start: int, n_bytes: int, seed: int
) -> None:
    data = NOISE[start : start + n_bytes]
    assert crc32c(data, seed, kernel=kernel) == crc32c(data, seed, kernel="portable")


@pytest.mark.parametrize("kernel", kernels())
def test_a_long_buffer_equals_the_definition(kernel: str) -> None:
    data = NOISE[: 12288 + 768 + 8 + 5].tobytes()
    assert crc32c(data, 7, kernel=kernel) == bit_by_bit(data, 7)


@given(a=st.binary(max_size=2000), b=st.binary(max_size=2000))
def test_checksums_continue_from_a_seed_and_are_joined_by_combine(a: bytes, b: bytes) -> None:
    assert crc32c(b, crc32c(a)) == crc32c(a + b) == combine(crc32c(a), crc32c(b), len(b))


@given(crc=seeds, first=st.integers(0, 2**63 - 1), second=st.integers(0, 2**63 - 1))
def test_combine_accepts_lengths_beyond_memory(crc: int, first: int, second: int) -> None:
    # Zero bytes after a sum, in two steps or in one: the definition of a power.
    assert combine(combine(crc, 0, first), 0, second) == combine(crc, 0, first + second)


@pytest.mark.parametrize("kernel", kernels())
@given(n_bytes=st.sampled_from(STRIDES) | st.integers(0, 79_000), page_bytes=st.integers(500, 90_000))
def test_crc32c_pages_returns_the_checksum_of_each_page_and_of_all(kernel: str, n_bytes: int, page_bytes: int) -> None:
    data = NOISE[:n_bytes]
    out = np.zeros(-(-n_bytes // page_bytes), np.uint32)
    whole = crc32c_pages(address_of(data), n_bytes, page_bytes, out, kernel=kernel)
    assert whole == crc32c(data, kernel="portable")
    assert whole == combine_pages(out, page_bytes, n_bytes)
    assert out.tolist() == [crc32c(data[at : at + page_bytes]) for at in range(0, n_bytes, page_bytes)]


@pytest.mark.parametrize("kernel", kernels())
def test_many_addresses_get_checksums_in_one_call(kernel: str) -> None:
    starts = np.arange(len(STRIDES), dtype=np.uint64)
    lengths = np.array(STRIDES, np.uint64)
    out = np.zeros(len(STRIDES), np.uint32)
    crc32c_many(starts + np.uint64(address_of(NOISE)), lengths, out, kernel=kernel)
    expected = [crc32c(NOISE[i : i + n], kernel="portable") for i, n in enumerate(STRIDES)]
    assert out.tolist() == expected


def test_empty_input_is_no_error_and_wrong_arguments_are() -> None:
    three, empty = np.zeros(3, np.uint64), np.zeros(0, np.uint64)
    crc32c_many(empty, empty, np.zeros(0, np.uint32))
    assert crc32c_pages(0, 0, 4096, np.zeros(0, np.uint32)) == 0
    assert combine_pages(np.zeros(0, np.uint32), 4096, 0) == 0
    assert crc32c(b"", 5) == 5
    with pytest.raises(ValueError, match="4097 bytes in pages of 4096 bytes, got 1 checksums"):
        combine_pages(np.zeros(1, np.uint32), 4096, 4097)
    with pytest.raises(ValueError, match="3 addresses need as many"):
        crc32c_many(three, three[:2], np.zeros(3, np.uint32))
    with pytest.raises(ValueError, match="2 pages"):
        crc32c_pages(address_of(NOISE), 5000, 4096, np.zeros(3, np.uint32))
    with pytest.raises(ValueError, match="page"):
        crc32c_pages(address_of(NOISE), 5000, 0, np.zeros(3, np.uint32))
    with pytest.raises((BufferError, ValueError), match="contiguous"):
        crc32c(NOISE[::2])
    with pytest.raises(OverflowError):
        crc32c(b"", 2**32)


def test_buffers_of_any_item_type_are_read_as_bytes() -> None:
    floats = np.linspace(0, 1, 1000, dtype=np.float32).reshape(10, 100)
    assert (
        crc32c(floats) == crc32c(floats.tobytes()) == crc32c(memoryview(floats)) == crc32c(bytearray(floats.tobytes()))
    )


def _import_with(kernel: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from tiercache._native.checksum import KERNEL, crc32c; print(KERNEL, crc32c(b'123456789'))",
        ],
        env={**os.environ, "TIERCACHE_KERNEL": kernel},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("kernel", kernels())
def test_the_environment_variable_selects_a_kernel(kernel: str) -> None:
    done = _import_with(kernel)
    assert (done.returncode, done.stdout.split()) == (0, [kernel, str(0xE3069283)])


@pytest.mark.parametrize("kernel", sorted({"avx1024", "sse42", "armv8"} - set(kernels())))
def test_an_unavailable_kernel_fails_at_import(kernel: str) -> None:
    done = _import_with(kernel)
    assert done.returncode != 0
    assert f"ImportError: TIERCACHE_KERNEL={kernel}" in done.stderr
    assert "portable" in done.stderr


def test_the_fastest_usable_kernel_is_the_default() -> None:
    if not os.environ.get("TIERCACHE_KERNEL"):
        assert kernels()[-1] == checksum.KERNEL


@pytest.fixture
def truncated(tmp_path: Path) -> Iterator[mmap.mmap]:
    """A mapping of 1 MiB whose file has lost all but its first page."""
    path = tmp_path / "shard"
    path.write_bytes(bytes(1 << 20))
    with path.open("r+b") as file:
        mapping = mmap.mmap(file.fileno(), 0)
        file.truncate(4096)
    with mapping:
        yield mapping


def errno_of(call: Callable[[], object]) -> int | None:
    try:
        call()
    except OSError as error:
        return error.errno
    return None


def sums_of(mapping: mmap.mmap, kernel: str) -> list[int | None]:
    """What each function makes of the mapping. No view of it outlives the call, so that it can be closed."""
    whole = np.frombuffer(mapping, np.uint8)
    address, n_bytes = np.array([address_of(whole)], np.uint64), np.array([whole.size], np.uint64)
    return [
        errno_of(lambda: crc32c(mapping, kernel=kernel)),
        errno_of(lambda: crc32c(whole[5000:5010], kernel=kernel)),
        errno_of(lambda: crc32c_many(address, n_bytes, np.zeros(1, np.uint32), kernel=kernel)),
        errno_of(lambda: crc32c_pages(int(address[0]), whole.size, 65536, np.zeros(16, np.uint32), kernel=kernel)),
        errno_of(lambda: crc32c(whole[:4096], kernel=kernel)),
    ]


@pytest.mark.parametrize("kernel", kernels())
def test_a_truncated_mapping_raises_an_error_and_the_process_survives(kernel: str, truncated: mmap.mmap) -> None:
    assert sums_of(truncated, kernel) == [errno.EIO] * 4 + [None]


def test_a_file_truncated_while_threads_read_it_raises_an_error_in_each(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(1 << 20))
    expected, started, failures = crc32c(bytes(1 << 20)), threading.Barrier(4), []
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:

        def sum_until_it_fails() -> None:
            started.wait()
            try:
                while crc32c(mapping) == expected:
                    pass
            except OSError as error:
                failures.append(error.errno)

        threads = [threading.Thread(target=sum_until_it_fails) for _ in range(3)]
        for thread in threads:
            thread.start()
        started.wait()
        file.truncate(4096)
        for thread in threads:
            thread.join()
    assert failures == [errno.EIO] * 3
