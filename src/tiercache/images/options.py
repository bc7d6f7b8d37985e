"""Options for decoding the images of a column: plain values, checked on creation."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Crop = Literal["center", "random"]
Layout = Literal["CHW", "HWC"]
ImageDtype = Literal["uint8", "float32", "float16", "bfloat16"]
Dct = Literal["accurate", "fast"]
ResizeIn = Literal["rgb", "ycbcr"]


@dataclass(frozen=True, slots=True)
class DecodeImage:
    """How the images of a column are decoded: `Dataset(url, decode={"image": tc.DecodeImage(224)})`.

    Every result is RGB: grey is repeated, alpha is dropped, the upper 8 of 16 bits are kept, and CMYK is converted as
    Pillow does. An EXIF orientation is not applied, as by default in torchvision and Pillow.

    In a loader, random values (of the crop and the flip) are keyed by (seed, epoch, position in the epoch): they are
    the same after a resume and for any number of ranks and threads. All columns of a record share them, so that an
    image and its depth map are cropped alike. `dataset[i]` draws from torch's generator if torch is imported, else from
    numpy's global one.

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
        layout: "CHW" or "HWC".
        dct: Inverse DCT of libjpeg-turbo for JPEGs: "accurate" (JDCT_ISLOW), as in Pillow and torchvision; "fast"
            (JDCT_IFAST), as in FFCV and by default in TensorFlow: less work, with pixels that differ by 1 of 255 on
            average, and by more at qualities above 90. JPEGs that Pillow reads (CMYK, damaged ones) are decoded
            accurately. JPEGs decoded at a half, a quarter or an eighth of their size use other transforms, which "fast"
            does not change, except for the colours of 4:2:0 at a half.
        resize_in: Form in which a JPEG is resized: "rgb": the decoded image. "ycbcr": its planes as stored, which are
            converted to RGB at the size of the result: less work if chroma has a lower resolution than luma (nearly
            always), with pixels that differ by less than 1 of 255 on average. Crops are then widened to whole chroma
            pixels, by at most 1 pixel in 4:2:0. Needs the system's libturbojpeg. Other images, and images that are
            decoded at a half of their size or less or are not resized, are the same as with "rgb".

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
    resize_in: ResizeIn = "rgb"

    def __post_init__(self) -> None:
        """Check the values and normalise them: size to (height, width), dtype to a str."""
        _choice("crop", self.crop, get_args(Crop))
        _choice("layout", self.layout, get_args(Layout))
        _choice("dct", self.dct, get_args(Dct))
        _choice("resize_in", self.resize_in, get_args(ResizeIn))
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))  # torch.float16, np.dtype("f2")
        _choice("dtype", self.dtype, get_args(ImageDtype))
        if not isinstance(self.flip, bool):
            raise TypeError(f"flip is True or False, got {self.flip!r}")
        object.__setattr__(self, "size", _size(self.size))
        object.__setattr__(self, "scale", _span("scale", self.scale))
        object.__setattr__(self, "ratio", _span("ratio", self.ratio))
        if self.scale[1] > 1:
            raise ValueError(f"scale is a fraction of the image's area, at most 1, got {self.scale}")
        self._check_resize()

    def _check_resize(self) -> None:
        if self.size is None and self.crop == "random":
            raise ValueError("crop='random' needs a size: every crop is resized to it")
        if self.size is None and self.resize_in != "rgb":
            raise ValueError(f"resize_in={self.resize_in!r} needs a size: with size=None images are not resized")
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
        return (3, height, width) if self.layout == "CHW" else (height, width, 3)

    @property
    def itemsize(self) -> int:
        """Number of bytes of an element."""
        return {"uint8": 1, "float32": 4}.get(self.dtype, 2)

    @property
    def is_random(self) -> bool:
        """Whether the result depends on random numbers."""
        return self.flip or self.crop == "random"


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
