"""Crop planning: a pure function from an image's size, the options and random numbers to a frozen plan.

The random numbers are drawn before the image's size is known. Each image uses the same count, needed or not, so that
the numbers of position p depend only on the key and p.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiercache.order.epoch import derive_key

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.images.options import DecodeImage

# As in torchvision's RandomResizedCrop: number of attempts at an area and an aspect ratio that fit, before a center
# crop.
ATTEMPTS = 10
# Two numbers per attempt, two for the place, one for the flip, and one that fills up whole Philox blocks of 4 numbers.
N_DRAWS = 24
_PLACE, _FLIP = 2 * ATTEMPTS, 2 * ATTEMPTS + 2
# Scales at which libjpeg decodes faster; its other scales (7/8, 5/8, ...) are slower than a full decode.
REDUCTIONS = (8, 4, 2)


@dataclass(frozen=True, slots=True)
class CropPlan:
    """Box of an image, and its size in the result.

    Attributes:
        top, left, height, width: Box in pixels of the image; the values may be fractions.
        out_height, out_width: Size that the box is resized to, in pixels.
        flip: Whether the result is mirrored horizontally.
    """

    top: float
    left: float
    height: float
    width: float
    out_height: int
    out_width: int
    flip: bool = False

    @property
    def reduction(self) -> int:
        """Factor 1, 2, 4 or 8 by which the decoder may shrink the image: the box stays as large as the result."""
        fits = (k for k in REDUCTIONS if self.height >= k * self.out_height and self.width >= k * self.out_width)
        return next(fits, 1)

    def pixels(self, picture: tuple[int, int], decoded: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the box as (top, bottom, left, right) of the decoded image, in whole pixels, at least 1 x 1.

        Args:
            picture: (height, width) of the image that the plan was made for.
            decoded: (height, width) of the decoded image.
        """
        rows = _edges(self.top, self.height, picture[0], decoded[0])
        return *rows, *_edges(self.left, self.width, picture[1], decoded[1])


def plan_crop(height: int, width: int, options: DecodeImage, draws: Sequence[float]) -> CropPlan:
    """Return the crop of an image.

    Args:
        height: Height of the image in pixels, 1 or more.
        width: Width of the image in pixels, 1 or more.
        options: Options of which crop, size, resize, scale, ratio and flip are used.
        draws: N_DRAWS random numbers in [0, 1); not read if nothing is random.
    """
    flip = options.flip and draws[_FLIP] < 0.5
    if options.size is None:
        return CropPlan(0, 0, height, width, height, width, flip)
    out_height, out_width = options.shape
    if options.crop == "random":
        return CropPlan(*_random_box(height, width, options, draws), out_height, out_width, flip)
    short, long = min(height, width), max(height, width)
    resize = options.resize or max(options.shape)
    longer = int(resize * long / short)
    full_height, full_width = (resize, longer) if height <= width else (longer, resize)
    top, left = round((full_height - out_height) / 2), round((full_width - out_width) / 2)
    down, right = height / full_height, width / full_width
    return CropPlan(top * down, left * right, out_height * down, out_width * right, out_height, out_width, flip)


def draw_key(seed: int, epoch: int) -> bytes:
    """Return the key of an epoch's random numbers."""
    return derive_key(seed, "images", epoch)


def keyed_draws(key: bytes, runs: Iterable[tuple[int, int]]) -> NDArray[np.float64]:
    """Return the random numbers of positions, float64[n, N_DRAWS] in [0, 1).

    They are Philox 4x64 numbers with the key; position p has the counters from p * N_DRAWS / 4 on. A run is repeatable
    only if this never changes.

    Args:
        key: Key of the epoch, from draw_key().
        runs: Half-open ranges of positions, in order.
    """
    number = int.from_bytes(key, "little")
    words = [
        np.random.Philox(key=number, counter=start * (N_DRAWS // 4)).random_raw((stop - start) * N_DRAWS)
        for start, stop in runs
    ]
    bits = (np.concatenate(words) >> np.uint64(11)).astype(np.float64)
    return np.ldexp(bits, -53).reshape(-1, N_DRAWS)


def fresh_draws(n: int) -> NDArray[np.float64]:
    """Return float64[n, N_DRAWS] in [0, 1) from torch's generator if torch is imported, else from numpy's."""
    torch = sys.modules.get("torch")
    if torch is None:
        return np.random.random((n, N_DRAWS))
    drawn: NDArray[np.float64] = torch.rand(n, N_DRAWS, dtype=torch.float64).numpy()
    return drawn


def _random_box(
    height: int, width: int, options: DecodeImage, draws: Sequence[float]
) -> tuple[float, float, float, float]:
    """Return (top, left, height, width) as torchvision's RandomResizedCrop draws it."""
    area = height * width
    (smallest, largest), (narrow, wide) = options.scale, options.ratio
    log_narrow, log_wide = math.log(narrow), math.log(wide)
    for attempt in range(0, 2 * ATTEMPTS, 2):
        target = area * (smallest + (largest - smallest) * draws[attempt])
        ratio = math.exp(log_narrow + (log_wide - log_narrow) * draws[attempt + 1])
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[_PLACE] * (height - h + 1)), int(draws[_PLACE + 1] * (width - w + 1)), h, w
    w, h = width, height
    if width < narrow * height:
        h = round(width / narrow)
    elif width > wide * height:
        w = round(height * wide)
    return (height - h) // 2, (width - w) // 2, h, w


def _edges(start: float, length: float, whole: int, decoded: int) -> tuple[int, int]:
    factor = decoded / whole
    first = min(round(start * factor), decoded - 1)
    return first, min(max(round((start + length) * factor), first + 1), decoded)
