"""Colour jitter of a decoded picture, and conversion of its values by tables (csrc/pixels.h)."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

BRIGHTNESS: Final[int]
CONTRAST: Final[int]
SATURATION: Final[int]
MAX_FACTOR: Final[float]
"""Largest factor of an adjustment."""

def adjust(planes: NDArray[np.uint8], steps: Sequence[tuple[int, float]]) -> None:
    """Adjust the colours of a picture in place, one step after the other. Releases the GIL.

    Args:
        planes: uint8[3, n], C-contiguous: R, G and B. The caller owns it.
        steps: At most three pairs (BRIGHTNESS, CONTRAST or SATURATION; factor from 0 to MAX_FACTOR).

    Raises:
        ValueError: The shape or a step is invalid.
    """

def look_up(
    values: NDArray[np.uint8], is_planar: bool, tables: NDArray[np.uint8], out: NDArray[np.uint8], to_planar: bool
) -> None:
    """Replace the values of a picture by elements of the tables of their channels. Releases the GIL.

    Args:
        values: uint8[3 * n], C-contiguous: R, G and B of n pixels.
        is_planar: Whether all values of R precede those of G. False: the three values of a pixel are together.
        tables: The bytes of a table of 256 elements of 2 or 4 bytes for each channel, uint8[3, 512 or 1024].
        out: The bytes of 3 * n such elements. The caller owns it; it must not overlap the others.
        to_planar: As is_planar, for out.

    Raises:
        ValueError: The sizes do not match, or tables or out are not aligned to their elements.
    """
