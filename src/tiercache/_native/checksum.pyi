"""CRC-32C (Castagnoli). All functions may be called from any thread; kernels give identical sums."""

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

KERNEL: str
"""The kernel in use: "sse42", "armv8" or "portable". The fastest usable, or what the environment variable
TIERCACHE_KERNEL names; importing the module raises ImportError where that is unknown or does not run here."""
KERNEL_NUMBER: int
"""Its number in csrc/crc32c.h."""

def kernels() -> tuple[str, ...]:
    """Names of the kernels that run on this machine, slowest ("portable") first."""

def crc32c(data: Buffer, seed: int = 0, *, kernel: str | None = None) -> int:
    """The sum of data, going on from seed, so that sums chain: crc32c of b, seeded with that of a, is that of a + b.

    Args:
        data: any C-contiguous buffer, read-only or not, of any item type; held for the call only. The GIL is dropped
            from 32 KiB up.
        seed: uint32, the sum of what came before.
        kernel: one of kernels(); for tests.

    Returns:
        uint32.

    Raises:
        BufferError, ValueError: data is strided (numpy says it with a ValueError); an unusable kernel is a ValueError.
        OSError: EIO, data is a mapping and its file was truncated or could not be read.
    """

def crc32c_many(
    addresses: NDArray[np.uint64], lengths: NDArray[np.uint64], out: NDArray[np.uint32], *, kernel: str | None = None
) -> None:
    """out[i] = the sum of the lengths[i] bytes at addresses[i], in one call without the GIL.

    Args:
        addresses, lengths: uint64[n]; the caller keeps the memory alive and readable for the call.
        out: uint32[n], owned by the caller, not kept; undefined after an error.

    Raises:
        ValueError: the three lengths differ.
        OSError: EIO, as for crc32c().
    """

def crc32c_pages(
    address: int, n_bytes: int, page_bytes: int, out: NDArray[np.uint32], *, kernel: str | None = None
) -> int:
    """out[i] = the sum of page i (the last may be short). Returns the sum of all n_bytes, without reading them twice.

    Args:
        address, n_bytes: the memory, kept alive and readable by the caller for the call.
        page_bytes: more than 0.
        out: uint32[ceil(n_bytes / page_bytes)], owned by the caller, not kept; undefined after an error.

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
    """Copy the pieces one after another, each filled up with zeros to a multiple of align; sum out as crc32c_pages().

    Args:
        addresses, lengths: uint64[n]; the caller keeps the memory alive and readable for the call.
        align, page_bytes: more than 0.
        out, sums: uint8[all pieces filled up] and uint32[its pages]; the caller's, not kept; undefined after an error.

    Returns:
        The sum of all of out.

    Raises:
        ValueError: lengths do not fit one another, or align or page_bytes is 0.
        OSError: EIO, as for crc32c().
    """

def combine(crc_a: int, crc_b: int, n_bytes_b: int) -> int:
    """The sum of a followed by b from their sums and b's length in bytes."""
