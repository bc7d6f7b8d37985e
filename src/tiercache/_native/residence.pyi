"""Which mapped pages are in memory, as the kernel says (mincore(2)), asked without the GIL."""

import numpy as np
from numpy.typing import NDArray

def are_resident(ranges: NDArray[np.uint64]) -> bool:
    """Whether all pages of all ranges are in memory; False too where one of them is not mapped.

    ranges: uint64[n, 2], (address, bytes), addresses at pages' beginnings.

    Raises:
        ValueError: another shape.
    """
