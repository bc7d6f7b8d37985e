"""Options for decoding the images of a column: plain values, checked on creation."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

from tiercache._native.pixels import MAX_FACTOR

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
    Pillow does. The steps are: decode, rotate by EXIF, crop, resize, flip, adjust the colours, normalise.

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
            average, and by more at qualities above 90. JPEGs that Pillow reads (CMYK, damaged ones) are decoded
            accurately. JPEGs decoded at a half, a quarter or an eighth of their size use other transforms, which "fast"
            does not change, except for the colours of 4:2:0 at a half.
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
