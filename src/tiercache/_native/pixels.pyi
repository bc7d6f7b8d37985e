"""Resize (csrc/resize.h), colour jitter and conversion by tables (csrc/pixels.h) of a decoded picture."""

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

def resize(
    picture: NDArray[np.uint8],
    rows: tuple[float, float, float, int, int],
    columns: tuple[float, float, float, int, int],
    out: NDArray[np.uint8],
) -> None:
    """Resize a box of a picture with a triangle filter. Releases the GIL. Results are exact up to one level.

    Args:
        picture: uint8[height, width, 3], contiguous in each row. Held only during the call.
        rows: How the rows of out come from those of the picture: start and length of the box, which may be fractions of
            pixels; half the width of the filter in pixels of the picture; and the half-open range of pixels that are
            read.
        columns: The same of the columns.
        out: uint8[height, width, 3], C-contiguous. The caller owns it; it must not overlap picture.

    Raises:
        ValueError: The shapes or an axis are invalid.
    """
