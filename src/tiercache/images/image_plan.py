"""What becomes of an image: its crop, its mirroring and its colours, from the options and random numbers.

The crop of an image is a pure function of its size, its EXIF orientation, the options and some random numbers, and so
are the adjustments of its colours.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from tiercache._native import pixels
from tiercache.images.options import UNCHANGED
from tiercache.order.epoch_order import derive_key

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tiercache.images.options import DecodeImage


# As in torchvision's RandomResizedCrop: number of attempts at an area and an aspect ratio that fit, before a center
# crop.
ATTEMPTS = 10
# Two numbers per attempt, two for the place, one for the flip, and one that fills up whole Philox blocks of 4 numbers.
N_DRAWS = 24
_PLACE, _FLIP = 2 * ATTEMPTS, 2 * ATTEMPTS + 2
# After these, if colours are adjusted, from a key of their own, so that crops do not depend on whether they are: the
# factors of brightness, contrast and saturation, and their order.
N_COLOUR_DRAWS = 4
_KINDS = (pixels.BRIGHTNESS, pixels.CONTRAST, pixels.SATURATION)
_ORDERS = tuple(itertools.permutations(range(3)))
# EXIF orientation: (whether to mirror top to bottom, left to right). Orientations 5 to 8 are transposed before.
_MIRRORED = {1: (False, False), 2: (False, True), 3: (True, True), 4: (True, False)}
_MIRRORED |= {orientation + 4: how for orientation, how in _MIRRORED.items()}
# Scales at which libjpeg decodes faster; its other scales (7/8, 5/8, ...) are slower than a full decode.
REDUCTIONS = (8, 4, 2)


@dataclass(frozen=True, slots=True)
class CropPlan:
    """Box of an image, in pixels, which may be fractions; its size in the result; and how the result is turned.

    All lengths are those of the stored image. If it is transposed, its height in the result is the width that is shown.

    Attributes:
        orientation: EXIF orientation that is applied to the result; 1 changes nothing.
        flip: Whether the result is mirrored left to right afterwards.
    """

    top: float
    left: float
    height: float
    width: float
    out_height: int
    out_width: int
    flip: bool = False
    orientation: int = 1

    @property
    def is_transposed(self) -> bool:
        """Whether rows of the stored image become columns of the result."""
        return self.orientation > 4

    @property
    def shown_shape(self) -> tuple[int, int]:
        """(height, width) of the result, after it is turned."""
        return (self.out_width, self.out_height) if self.is_transposed else (self.out_height, self.out_width)

    @property
    def mirror(self) -> int | None:
        """How OpenCV's flip() mirrors the result after it is transposed: 0, 1, -1 (both), or None."""
        vertical, horizontal = _MIRRORED[self.orientation]
        horizontal ^= self.flip
        return None if not (vertical or horizontal) else -1 if vertical and horizontal else int(horizontal)

    @property
    def reduction(self) -> int:
        """Factor 1, 2, 4 or 8 by which the decoder may shrink the image: the box stays as large as the result."""
        fits = (k for k in REDUCTIONS if self.height >= k * self.out_height and self.width >= k * self.out_width)
        return next(fits, 1)

    def pixels(self, picture: tuple[int, int], decoded: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the box as (top, bottom, left, right) of the decoded image, in whole pixels, at least 1 x 1.

        The arguments are (height, width) of the image that the plan was made for, and of the decoded image.
        """
        rows = _edges(self.top, self.height, picture[0], decoded[0])
        return *rows, *_edges(self.left, self.width, picture[1], decoded[1])


def plan_crop(height: int, width: int, options: DecodeImage, draws: Sequence[float], orientation: int = 1) -> CropPlan:
    """Return the crop of an image.

    Args:
        height, width: Size of the stored image.
        options: Options of the column.
        draws: N_DRAWS random numbers in [0, 1); not read if nothing is random.
        orientation: EXIF orientation to apply, 1 to 8. The crop is that of the turned image.
    """
    if orientation == 1:
        return _plan_shown_crop(height, width, options, draws)
    shown = (width, height) if orientation > 4 else (height, width)
    plan = _plan_shown_crop(*shown, options, draws)
    vertical, horizontal = _MIRRORED[orientation]
    top = shown[0] - plan.top - plan.height if vertical else plan.top
    left = shown[1] - plan.left - plan.width if horizontal else plan.left
    if orientation <= 4:
        return replace(plan, top=top, left=left, orientation=orientation)
    sides = plan.width, plan.height, plan.out_width, plan.out_height
    return CropPlan(left, top, *sides, flip=plan.flip, orientation=orientation)


def _plan_shown_crop(height: int, width: int, options: DecodeImage, draws: Sequence[float]) -> CropPlan:
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


def plan_colours(options: DecodeImage, draws: Sequence[float]) -> tuple[tuple[int, float], ...]:
    """Return the adjustments of an image's colours, in order: (kind, factor) as `pixels.adjust` takes them.

    draws: N_DRAWS + N_COLOUR_DRAWS random numbers in [0, 1); not read if colours are not adjusted.
    """
    if not options.has_jitter:
        return ()
    *drawn, order = draws[N_DRAWS : N_DRAWS + N_COLOUR_DRAWS]
    factors = [low + (high - low) * draw for (low, high), draw in zip(options.factors, drawn, strict=True)]
    numbers = _ORDERS[int(order * len(_ORDERS))]
    return tuple((_KINDS[number], factors[number]) for number in numbers if options.factors[number] != UNCHANGED)


def draw_key(seed: int, epoch: int, purpose: str = "images") -> bytes:
    """Return the key of an epoch's random numbers. purpose: "images", or "colours" for the additional numbers."""
    return derive_key(seed, purpose, epoch)


def keyed_draws(key: bytes, runs: Iterable[tuple[int, int]], n_draws: int = N_DRAWS) -> NDArray[np.float64]:
    """Return the random numbers of positions, float64[n, n_draws] in [0, 1).

    They are Philox 4x64 numbers with the epoch's key; position p has the counters from p * n_draws / 4 on. A run is
    repeatable only if this never changes.

    Args:
        key: Key of the epoch.
        runs: Half-open ranges of positions, in order.
        n_draws: Numbers of a position, a multiple of 4.
    """
    number = int.from_bytes(key, "little")
    words = [
        np.random.Philox(key=number, counter=start * (n_draws // 4)).random_raw((stop - start) * n_draws)
        for start, stop in runs
    ]
    bits = (np.concatenate(words) >> np.uint64(11)).astype(np.float64)
    return np.ldexp(bits, -53).reshape(-1, n_draws)


class ImageDraws:
    """The random numbers of the images of one epoch, by position. Immutable.

    Args:
        seed, epoch: Seed of the run, and number of the epoch.
        options: Options of all decoded columns.
    """

    def __init__(self, seed: int, epoch: int, options: Iterable[DecodeImage]) -> None:
        columns = list(options)
        self._is_random = any(column.is_random for column in columns)
        self._has_jitter = any(column.has_jitter for column in columns)
        self._key, self._colour_key = draw_key(seed, epoch), draw_key(seed, epoch, "colours")

    def of(self, positions: NDArray[np.int64]) -> Sequence[Sequence[float]]:
        """Return the numbers of each position, as plan_crop and plan_colours take them; none if nothing is random."""
        if not self._is_random:
            return [()] * len(positions)
        runs = _runs(positions)
        draws = keyed_draws(self._key, runs)
        if self._has_jitter:
            draws = np.concatenate([draws, keyed_draws(self._colour_key, runs, N_COLOUR_DRAWS)], axis=1)
        drawn: list[list[float]] = draws.tolist()
        return drawn


def _runs(positions: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return consecutive positions as half-open ranges."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(positions) != 1) + 1])
    ends = np.concatenate([starts[1:], [len(positions)]])
    return list(zip(positions[starts].tolist(), (positions[ends - 1] + 1).tolist(), strict=True))


def fresh_draws(n: int, n_draws: int = N_DRAWS) -> NDArray[np.float64]:
    """Return float64[n, n_draws] in [0, 1) from torch's generator if torch is imported, else from numpy's."""
    torch = sys.modules.get("torch")
    if torch is None:
        return np.random.random((n, n_draws))
    drawn: NDArray[np.float64] = torch.rand(n, n_draws, dtype=torch.float64).numpy()
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


def colour_tables(options: DecodeImage) -> NDArray[np.uint8] | None:
    """Return the results for the values 0, 1, ... 255 of R, G and B, the bytes of [3, 256] elements; None for uint8.

    They are computed in float32 and then rounded, as torch does: without a mean they equal torchvision's
    ToDtype(scale=True) bit for bit, and with one its Normalize of float32.
    """
    if options.dtype == "uint8":
        return None
    values = np.tile(np.arange(256, dtype=np.float32) * np.float32(1 / 255), (3, 1))
    if options.mean is not None:
        mean, std = (np.array(channels, np.float32).reshape(3, 1) for channels in (options.mean, options.std))
        values = (values - mean) / std
    if options.dtype == "float16":
        return values.astype(np.float16).view(np.uint8)
    if options.dtype == "bfloat16":  # the upper 16 bits, rounded to nearest even
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.uint8)
    return values.view(np.uint8)
