"""CRC-32C (Castagnoli). Any thread may call the functions, and all kernels give identical checksums."""

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

KERNEL: str
"""Kernel in use: "sse42", "armv8" or "portable".

The default is the fastest kernel that runs on this machine. The environment variable TIERCACHE_KERNEL selects another
kernel; importing the module raises ImportError if that kernel is unknown or does not run here.
"""
KERNEL_NUMBER: int
"""Number of the kernel in csrc/crc32c.h."""

def kernels() -> tuple[str, ...]:
    """Return the names of the kernels that run on this machine, slowest ("portable") first."""

def crc32c(data: Buffer, seed: int = 0, *, kernel: str | None = None) -> int:
    """Return the checksum of data, continued from seed: seeded with the checksum of a, that of b is that of a + b.

    Args:
        data: Any C-contiguous buffer, writable or not, of any item type; held only during the call. The GIL is released
            for 32 KiB or more.
        seed: uint32 checksum of the preceding bytes.
        kernel: One of kernels(); for tests.

    Returns:
        uint32.

    Raises:
        BufferError, ValueError: data is strided (numpy raises ValueError), or the kernel is not usable (ValueError).
        OSError: EIO; data is a mapping whose file was truncated or could not be read.
    """

def crc32c_many(
    addresses: NDArray[np.uint64], lengths: NDArray[np.uint64], out: NDArray[np.uint32], *, kernel: str | None = None
) -> None:
    """Compute out[i] = checksum of the lengths[i] bytes at addresses[i], in one call without the GIL.

    Args:
        addresses, lengths: uint64[n]. The caller keeps the memory alive and readable during the call.
        out: uint32[n], owned by the caller and not kept; undefined after an error.
        kernel: One of kernels(); for tests.

    Raises:
        ValueError: The three lengths differ.
        OSError: EIO, as for crc32c().
    """

def crc32c_pages(
    address: int, n_bytes: int, page_bytes: int, out: NDArray[np.uint32], *, kernel: str | None = None
) -> int:
    """Compute out[i] = checksum of page i; the last page may be short. Return the checksum of all bytes.

    Args:
        address, n_bytes: Memory that the caller keeps alive and readable during the call.
        page_bytes: Size of a page, more than 0.
        out: uint32[ceil(n_bytes / page_bytes)], owned by the caller and not kept; undefined after an error.
        kernel: One of kernels(); for tests.

    Raises:
        ValueError: page_bytes is 0, or out has another length.
        OSError: EIO, as for crc32c().
    """

def lay_out(
    addresses: NDArray[np.uint64],
    lengths: NDArray[np.uint64],
    align: int,
    out: NDArray[np.uint8],
    page_bytes: int,
    sums: NDArray[np.uint32],
) -> int:
    """Copy pieces one after another, each padded with zeros to a multiple of align, and compute the checksums of out.

    Args:
        addresses, lengths: uint64[n]. The caller keeps the memory alive and readable during the call.
        align: Alignment of the pieces in bytes, more than 0.
        out: uint8[size of all padded pieces], owned by the caller and not kept; undefined after an error.
        page_bytes: Size of a page, more than 0.
        sums: uint32[number of pages]. Receives the checksum of each page, as in crc32c_pages().

    Returns:
        Checksum of all of out.

    Raises:
        ValueError: The lengths do not fit together, or align or page_bytes is 0.
        OSError: EIO, as for crc32c().
    """

def combine(crc_a: int, crc_b: int, n_bytes_b: int) -> int:
    """Return the checksum of a followed by b, from their checksums and the length of b in bytes."""

def combine_pages(sums: NDArray[np.uint32], page_bytes: int, n_bytes: int) -> int:
    """Return the checksum of n_bytes, from the checksums of their pages as crc32c_pages() computes them.

    Args:
        sums: uint32[ceil(n_bytes / page_bytes)]. May be read-only.
        page_bytes: Size of a page, more than 0; the last page may be short.
        n_bytes: Size of all pages.

    Raises:
        ValueError: page_bytes is 0, or sums has another length.
    """
