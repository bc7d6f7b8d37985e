"""Mappings of files without a descriptor, and whether mapped pages are in the page cache (mincore(2))."""

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

class Mapping(Buffer):
    """A read-only, shared mapping of the start of an open file, as a buffer; unmapped when its last user drops it.

    The mapping holds no descriptor (mmap.mmap duplicates the descriptor and keeps the duplicate). On Linux it holds the
    open file, so a flock(2) taken through fd lasts at least as long as the mapping.

    Args:
        fd: Descriptor of an open file.
        n_bytes: Size of the mapping in bytes.

    Raises:
        ValueError: n_bytes is less than 1.
        OSError: mmap(2) failed. A file that is shorter than n_bytes is no error, but its missing pages cannot be read.
    """

    def __init__(self, fd: int, n_bytes: int) -> None: ...
    def __len__(self) -> int: ...

def are_resident(ranges: NDArray[np.uint64]) -> bool:
    """Return whether all pages of all ranges are in memory. Returns False if a page is not mapped.

    Args:
        ranges: uint64[n, 2] of (address, size in bytes). Addresses are multiples of the page size.

    Raises:
        ValueError: ranges has another shape.
    """
