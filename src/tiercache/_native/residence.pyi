"""Mappings of files that hold no descriptor, and which mapped pages are in memory, as the kernel says (mincore(2))."""

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

class Mapping(Buffer):
    """The first n_bytes of an open file, read-only and shared, as a buffer; unmapped when the last user drops it.

    The mapping holds no descriptor (mmap.mmap duplicates the one that it is given and keeps the duplicate). On Linux it
    holds the open file: a flock(2) that was taken through fd lasts at least as long as the mapping.

    Raises:
        ValueError: n_bytes is smaller than 1.
        OSError: mmap(2) failed. A file that is shorter than n_bytes is no error: its missing pages cannot be read.
    """

    def __init__(self, fd: int, n_bytes: int) -> None: ...
    def __len__(self) -> int: ...

def are_resident(ranges: NDArray[np.uint64]) -> bool:
    """Whether all pages of all ranges are in memory; False too where one of them is not mapped.

    ranges: uint64[n, 2], (address, bytes), addresses at pages' beginnings.

    Raises:
        ValueError: another shape.
    """
