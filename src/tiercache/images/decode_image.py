"""How the images of a column are decoded: the options, and what becomes of an image by them.

The crop of an image is a pure function of its size, the options and some random numbers, and so are the adjustments of
its colours.
"""

from __future__ import annotations

import itertools
import math
import operator
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from tiercache._native import pixels
from tiercache._native.pixels import MAX_FACTOR
from tiercache.order.epoch_order import derive_key

Crop = Literal["center", "random"]

Layout = Literal["CHW", "HWC", "channels_last"]

ImageDtype = Literal["uint8", "float32", "float16", "bfloat16"]

Dct = Literal["accurate", "fast"]

# Largest finite float16.
_MAX_FLOAT16 = 65504.0

# Range of factors of an adjustment that changes nothing.
UNCHANGED = (1.0, 1.0)


@dataclass(frozen=True, slots=True)
class DecodeImage:
    """How the images of a column are decoded: `Dataset(url, decode={"image": tc.DecodeImage(224)})`.

    Every result is RGB: grey is repeated, alpha is dropped, the upper 8 of 16 bits are kept, and CMYK is converted as
    Pillow does. The steps are: decode, rotate by EXIF, crop, resize (as torchvision's bilinear resize with
    antialias=True), flip, adjust the colours, normalise.

    In a loader, random values (of the crop, the flip and the colours) are keyed by (seed, epoch, position in the
    epoch): they are the same after a resume and for any number of ranks and threads. All columns of a record share
    them, so that an image and its depth map are cropped alike. `dataset[i]` draws from torch's generator if torch is
    imported, else from numpy's global one.

    Attributes:
        size: Size of the result in pixels: an int for a square, or (height, width). None: whole images of any size,
            served as a list of tensors.
        crop: "center": the shorter side is resized to `resize`, then the center is cut out. "random": torchvision's
            RandomResizedCrop.
        resize: Shorter side before a "center" crop, in pixels; at least the longer side of `size`, which is also the
            default (None).
        scale: Smallest and largest fraction of the image's area for a "random" crop.
        ratio: Smallest and largest width / height for a "random" crop, log-uniform.
        flip: Whether to mirror images horizontally with probability 0.5.
        dtype: "uint8" for values 0 to 255; "float32", "float16" or "bfloat16" for 0 to 1, as torchvision's
            ToDtype(scale=True).
        layout: "CHW"; "HWC"; or "channels_last": the shape of "CHW" over the memory of "HWC", which is torch's memory
            format `torch.channels_last`.
        dct: Inverse DCT of libjpeg-turbo for JPEGs: "accurate" (JDCT_ISLOW), as in Pillow and torchvision; "fast"
            (JDCT_IFAST), as in FFCV and by default in TensorFlow: less work, with pixels that differ by 1 of 255 on
            average, and by more at qualities above 90. JPEGs that become at most a quarter ("accurate") or a half
            ("fast") as high and as wide are decoded at a reduced size by other transforms: the results of photographs
            differ by less than 1 of 255 on average, or by up to 4 with "fast", and those of fine patterns of strong
            colours by more. JPEGs that Pillow reads (CMYK, damaged ones) are decoded accurately.
        brightness: Range of the random factor of the brightness, as in torchvision's ColorJitter: (smallest, largest),
            or a number v for (max(0, 1 - v), 1 + v). Factors are at most 8; 1 changes nothing, and 0 gives black. The
            factors of brightness, contrast and saturation are uniform, and the three are applied in random order.
        contrast: Range of the factor of the contrast; 0 gives the mean grey of the image.
        saturation: Range of the factor of the saturation; 0 gives a grey image.
        mean: Mean of R, G and B (or one number for all), of values 0 to 1, that is subtracted: the result is
            (value - mean) / std, computed in float32 and rounded to `dtype`, which must be a float. Given with `std`.
        std: Standard deviation of R, G and B, or one number for all, of values 0 to 1.
        apply_exif_orientation: Whether to rotate and mirror an image as its EXIF orientation says, before the crop.
            False: images are served as they are stored, as by default in torchvision and Pillow.

    Raises:
        ValueError, TypeError: An argument is invalid; the message names it, the expected and the given value.
    """

    size: int | tuple[int, int] | None
    crop: Crop = "center"
    resize: int | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    dtype: ImageDtype = "uint8"
    layout: Layout = "CHW"
    dct: Dct = "accurate"
    brightness: float | tuple[float, float] = 0.0
    contrast: float | tuple[float, float] = 0.0
    saturation: float | tuple[float, float] = 0.0
    mean: float | tuple[float, float, float] | None = None
    std: float | tuple[float, float, float] | None = None
    apply_exif_orientation: bool = False

    def __post_init__(self) -> None:
        """Check the values and normalise them: size to (height, width), dtype to a str, ranges and means to tuples."""
        _choice("crop", self.crop, get_args(Crop))
        _choice("layout", self.layout, get_args(Layout))
        _choice("dct", self.dct, get_args(Dct))
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))  # torch.float16, np.dtype("f2")
        _choice("dtype", self.dtype, get_args(ImageDtype))
        for name in ("flip", "apply_exif_orientation"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is True or False, got {getattr(self, name)!r}")
        for name in ("brightness", "contrast", "saturation"):
            object.__setattr__(self, name, _factors(name, getattr(self, name)))
        object.__setattr__(self, "size", _size(self.size))
        object.__setattr__(self, "scale", _span("scale", self.scale))
        object.__setattr__(self, "ratio", _span("ratio", self.ratio))
        if self.scale[1] > 1:
            raise ValueError(f"scale is a fraction of the image's area, at most 1, got {self.scale}")
        self._check_resize()
        self._check_normalisation()

    def _check_normalisation(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean and std go together, got mean={self.mean!r}, std={self.std!r}")
        if self.mean is None or self.std is None:
            return
        if self.dtype == "uint8":
            raise ValueError(
                "mean and std need a float dtype, for example dtype='float16': uint8 cannot hold the results"
            )
        mean, std = _channels("mean", self.mean), _channels("std", self.std)
        if 0 in std:
            raise ValueError(f"std must be greater than 0, got {self.std!r}")
        largest = max(max(m, 1 - m) / s for m, s in zip(mean, std, strict=True))
        if self.dtype == "float16" and largest > _MAX_FLOAT16:
            raise ValueError(f"a normalised value can be {largest:g}, which float16 cannot hold: std={self.std!r}")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    def _check_resize(self) -> None:
        if self.size is None and self.crop == "random":
            raise ValueError("crop='random' needs a size: every crop is resized to it")
        if self.resize is None:
            return
        if self.size is None or self.crop == "random":
            why = "size=None returns whole images" if self.size is None else "crop='random' resizes the crop to size"
            raise ValueError(f"resize={self.resize!r} applies only to crop='center': {why}")
        object.__setattr__(self, "resize", _pixels("resize", self.resize))
        if self.resize < max(self.shape):
            least = max(self.shape)
            raise ValueError(f"resize must be {least} or more, the longer side of size, got {self.resize}")

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of every result. Raises ValueError if size is None."""
        if not isinstance(self.size, tuple):
            raise ValueError("size=None: whole images have no common shape")
        return self.size

    @property
    def batch_shape(self) -> tuple[int, int, int]:
        """Shape of every result in its layout. Raises ValueError if size is None."""
        height, width = self.shape
        return (height, width, 3) if self.layout == "HWC" else (3, height, width)

    def memory_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Return the shape of a result as it lies in memory: height, width and channels, or channels first.

        Args:
            height: Number of rows of pixels.
            width: Number of pixels of a row.
        """
        return (3, height, width) if self.layout == "CHW" else (height, width, 3)

    @property
    def factors(self) -> tuple[tuple[float, float], ...]:
        """Ranges of the factors of brightness, contrast and saturation."""
        ranges: Any = (self.brightness, self.contrast, self.saturation)  # normalised to pairs
        return tuple(ranges)

    @property
    def has_jitter(self) -> bool:
        """Whether colours are adjusted."""
        return any(factors != UNCHANGED for factors in self.factors)

    @property
    def itemsize(self) -> int:
        """Number of bytes of an element."""
        return {"uint8": 1, "float32": 4}.get(self.dtype, 2)

    @property
    def is_random(self) -> bool:
        """Whether the result depends on random numbers."""
        return self.flip or self.crop == "random" or self.has_jitter


def _choice(name: str, given: object, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {given!r}")


def _pixels(name: str, given: Any) -> int:
    try:
        pixels = operator.index(given)
    except TypeError as error:
        raise TypeError(f"{name} must be a whole number of pixels, got {given!r}") from error
    if pixels < 1 or isinstance(given, bool):
        raise ValueError(f"{name} must be 1 pixel or more, got {given!r}")
    return pixels


def _size(given: Any) -> tuple[int, int] | None:
    if given is None:
        return None
    if not isinstance(given, Sequence):
        side = _pixels("size", given)
        return side, side
    if len(given) != 2 or isinstance(given, str):
        raise ValueError(f"size is an int, (height, width) or None, got {given!r}")
    return _pixels("size", given[0]), _pixels("size", given[1])


def _span(name: str, given: Any) -> tuple[float, float]:
    try:
        low, high = (float(value) for value in given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is a pair of numbers (smallest, largest), got {given!r}") from error
    if not 0 < low <= high < float("inf"):
        raise ValueError(f"{name} is a pair of numbers, 0 < smallest <= largest, got {given!r}")
    return low, high


def _is_number(given: Any) -> bool:
    return isinstance(given, Real)


def _factors(name: str, given: Any) -> tuple[float, float]:
    try:
        low, high = (1 - given, 1 + given) if _is_number(given) else map(float, given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is a number or a pair (smallest, largest), got {given!r}") from error
    low = max(low, 0.0) if _is_number(given) else low
    if isinstance(given, bool) or not 0 <= low <= high <= MAX_FACTOR:
        expected = f"0 <= smallest <= largest <= {MAX_FACTOR:g}"
        raise ValueError(f"{name} is a number 0 or more, or a pair of factors, {expected}, got {given!r}")
    return float(low), float(high)


def _channels(name: str, given: Any) -> tuple[float, float, float]:
    try:
        red, green, blue = (given,) * 3 if _is_number(given) else map(float, given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is a number, or three for R, G and B, got {given!r}") from error
    channels = float(red), float(green), float(blue)
    if not all(math.isfinite(channel) and 0 <= channel <= 1 for channel in channels):
        raise ValueError(f"{name} is of values 0 to 1 (divide one of values 0 to 255 by 255), got {given!r}")
    return channels


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

# Scales at which libjpeg decodes faster; its other scales (7/8, 5/8, ...) are slower than a full decode.
_REDUCTIONS = (8, 4, 2)

# How many times as large as the result a reduced JPEG must be in both directions. Its pixels are averages over squares,
# which differ the more from those of the filter the fewer of them make a result: `bench_images.py --resizes` shows it.
_LEAST_SHRINK: dict[Dct, int] = {"accurate": 2, "fast": 1}

# Least half width of the filter over a reduced JPEG, in its pixels. At exactly a half it is the nearest to the filter
# over all pixels: 1 would be the averages themselves, which are sharper.
_LEAST_REDUCED_WIDTH = 1.15


class ResizeAxis(NamedTuple):
    """One direction of a resize, in pixels of the decoded image, as `pixels.resize` takes it."""

    start: float
    length: float
    half_width: float
    first: int
    stop: int

    def is_copy(self, n_out: int) -> bool:
        """Return whether n_out results are pixels of the image."""
        return self.half_width == 1 and self.length == n_out and float(self.start).is_integer()


@dataclass(frozen=True, slots=True)
class CropPlan:
    """Box of an image, in pixels, which may be fractions; its size in the result; and whether that is mirrored.

    is_cut: Whether the filter of the resize reads no pixels around the box: the image is cropped first, then resized.
    """

    top: float
    left: float
    height: float
    width: float
    out_height: int
    out_width: int
    flip: bool = False
    is_cut: bool = False

    def reduction(self, dct: Dct) -> int:
        """Return the factor 1, 2, 4 or 8 by which the decoder of a JPEG may shrink the image."""
        times = _LEAST_SHRINK[dct]
        height, width = times * self.out_height, times * self.out_width
        return next((k for k in _REDUCTIONS if self.height >= k * height and self.width >= k * width), 1)

    def axes(self, decoded: tuple[int, int], reduction: int) -> tuple[ResizeAxis, ResizeAxis]:
        """Return how the rows and the columns are resized: with a triangle, as by torchvision with antialias=True.

        Args:
            decoded: Height and width of the decoded image.
            reduction: Factor by which the decoder shrank the image.
        """
        rows = _axis(self.top, self.height, self.out_height, decoded[0], reduction, is_cut=self.is_cut)
        return rows, _axis(self.left, self.width, self.out_width, decoded[1], reduction, is_cut=self.is_cut)


def plan_crop(height: int, width: int, options: DecodeImage, draws: Sequence[float]) -> CropPlan:
    """Return the crop of an image.

    Args:
        height, width: Size of the image, after it was turned as its EXIF orientation says.
        draws: N_DRAWS random numbers in [0, 1); not read if nothing is random.
    """
    flip = options.flip and draws[_FLIP] < 0.5
    if options.size is None:
        return CropPlan(0, 0, height, width, height, width, flip)
    out_height, out_width = options.shape
    if options.crop == "random":
        return CropPlan(*_random_box(height, width, options, draws), out_height, out_width, flip, is_cut=True)
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
    """The random numbers of the images of one epoch, by position. Immutable."""

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


def _axis(start: float, length: float, n_out: int, n_decoded: int, reduction: int, *, is_cut: bool) -> ResizeAxis:
    start, length = start / reduction, length / reduction
    half_width = max(length / n_out, 1.0 if reduction == 1 else _LEAST_REDUCED_WIDTH)
    first, stop = (math.floor(start), math.ceil(start + length)) if is_cut else (0, n_decoded)
    return ResizeAxis(start, length, half_width, first, min(stop, n_decoded))


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
