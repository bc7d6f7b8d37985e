"""Which part of a picture is shown: pure, from its size, the options and some random numbers to a frozen plan.

Random numbers are drawn before a picture's size is known, so many for every picture whether they are needed or not: the
numbers of position p are a function of key and p alone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tiercache.order.keys import derive_key

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.images.options import DecodeImage

# As torchvision's RandomResizedCrop: so many attempts at an area and a shape that fit, then the middle.
ATTEMPTS = 10
# Two numbers an attempt, two for the place, one for the flip, and one that makes whole blocks of Philox (4 numbers).
N_DRAWS = 24
_PLACE, _FLIP = 2 * ATTEMPTS, 2 * ATTEMPTS + 2
# What libjpeg makes of a picture while it decodes it; its other scales (7/8, 5/8, ...) are slower than a full decode.
REDUCTIONS = (8, 4, 2)


@dataclass(frozen=True, slots=True)
class CropPlan:
    """A box of a picture, and what it becomes.

    top, left, height, width: of the box, in pixels of the picture, not always whole ones; out_height, out_width:
    pixels that it is resized to; flip: mirror it.
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
        """By what a decoder may shrink the picture first, with the box still as large as the result: 1, 2, 4 or 8."""
        fits = (k for k in REDUCTIONS if self.height >= k * self.out_height and self.width >= k * self.out_width)
        return next(fits, 1)

    def pixels(self, picture: tuple[int, int], decoded: tuple[int, int]) -> tuple[int, int, int, int]:
        """The box as (top, bottom, left, right) of the decoded picture, whole pixels, at least one.

        Args:
            picture: (height, width) that the plan was made for.
            decoded: (height, width) that the decoder made of it.
        """
        rows = _edges(self.top, self.height, picture[0], decoded[0])
        return *rows, *_edges(self.left, self.width, picture[1], decoded[1])


def plan_crop(height: int, width: int, options: DecodeImage, draws: Sequence[float]) -> CropPlan:
    """What of a picture of height x width pixels is shown.

    Args:
        height, width: of the picture, 1 or more.
        options: crop, size, resize, scale, ratio, flip.
        draws: N_DRAWS numbers in [0, 1); none are looked at where nothing is random.
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
    """The key of an epoch's draws."""
    return derive_key(seed, "images", epoch)


def keyed_draws(key: bytes, runs: Iterable[tuple[int, int]]) -> NDArray[np.float64]:
    """float64[n, N_DRAWS] in [0, 1) of the positions of some half-open runs, in order.

    Philox 4x64 with the key, position p having the counters from p * N_DRAWS / 4 on. Part of what makes a run
    repeatable: stable for ever.
    """
    number = int.from_bytes(key, "little")
    words = [
        np.random.Philox(key=number, counter=start * (N_DRAWS // 4)).random_raw((stop - start) * N_DRAWS)
        for start, stop in runs
    ]
    bits = (np.concatenate(words) >> np.uint64(11)).astype(np.float64)
    return np.ldexp(bits, -53).reshape(-1, N_DRAWS)


def fresh_draws(n: int) -> NDArray[np.float64]:
    """float64[n, N_DRAWS] in [0, 1) from torch's generator if torch is imported, else from numpy's global one."""
    torch = sys.modules.get("torch")
    if torch is None:
        return np.random.random((n, N_DRAWS))
    drawn: NDArray[np.float64] = torch.rand(n, N_DRAWS, dtype=torch.float64).numpy()
    return drawn


def _random_box(
    height: int, width: int, options: DecodeImage, draws: Sequence[float]
) -> tuple[float, float, float, float]:
    """(top, left, height, width) as torchvision's RandomResizedCrop draws it."""
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
