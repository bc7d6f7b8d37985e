"""How pictures of a column are decoded: plain values, checked when they are given."""

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
    """How the pictures of a column are decoded: `Dataset(url, decode={"image": tc.DecodeImage(224)})`.

    A picture comes as RGB, whatever it is stored as: grey is repeated, alpha dropped, of 16 bits the upper 8 are taken,
    CMYK is converted as Pillow does. An EXIF orientation is not applied, as torchvision and Pillow do not by default.

    What is random (the crop, the flip) is keyed by (seed, epoch, position in the epoch) in a loader: the same after a
    resume and for any number of ranks and threads, and one draw for all columns of a record, so that an image and its
    depth map are cut alike. `dataset[i]` draws from torch's generator if torch is imported, else from numpy's global
    one.

    Attributes:
        size: of the result, pixels: an int for a square, (height, width), or None: whole pictures of whatever size, a
            list of tensors.
        crop: "center": the shorter side is resized to `resize`, then the middle is cut out; "random": torchvision's
            RandomResizedCrop.
        resize: of "center", pixels; at least the longer side of `size`, which is what None means.
        scale: of "random", smallest and largest share of the picture's area.
        ratio: of "random", smallest and largest width by height, log-uniform.
        flip: mirror every second picture, at random.
        dtype: "uint8", 0 to 255; "float32", "float16" or "bfloat16", 0 to 1, as torchvision's ToDtype(scale=True).
        layout: "CHW" or "HWC".
        dct: libjpeg-turbo's transform of a JPEG: "accurate" (JDCT_ISLOW), as Pillow and torchvision take; "fast"
            (JDCT_IFAST), as FFCV takes, and TensorFlow by default: less work, for pixels that differ by 1 of 255 on
            average, by more at qualities above 90. JPEGs that are left to Pillow (CMYK, damaged ones) are decoded
            accurately. At a half, a quarter or an eighth of its size a JPEG has other transforms, which "fast" does not
            change but for the colours of 4:2:0 at a half.
        resize_in: what of a JPEG is resized: "rgb", the decoded picture; "ycbcr", its planes as they are stored, which
            become RGB at the size of the result: less work wherever chroma is stored at less than luma (nearly
            everywhere), for pixels that differ by less than 1 of 255 on average. Crops are then widened to whole pixels
            of chroma, by 1 pixel at most in 4:2:0. Needs the system's libturbojpeg; what is no such JPEG, or is decoded
            at a half of its size or less, or not resized at all, comes as by "rgb".

    Raises:
        ValueError, TypeError: naming the argument, what it takes and what was given.
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
        """Check the values and bring them to one form: size as (height, width), dtype as a str."""
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
            raise ValueError(f"scale is a share of the picture's area, at most 1, got {self.scale}")
        self._check_resize()

    def _check_resize(self) -> None:
        if self.size is None and self.crop == "random":
            raise ValueError("crop='random' needs a size: a crop of any size is resized to it")
        if self.size is None and self.resize_in != "rgb":
            raise ValueError(f"resize_in={self.resize_in!r} needs a size: whole pictures are not resized")
        if self.resize is None:
            return
        if self.size is None or self.crop == "random":
            why = "size=None gives whole pictures" if self.size is None else "crop='random' resizes what it cuts out"
            raise ValueError(f"resize={self.resize!r} is for crop='center': {why}")
        object.__setattr__(self, "resize", _pixels("resize", self.resize))
        if self.resize < max(self.shape):
            least = max(self.shape)
            raise ValueError(f"resize must be {least} or more, the longer side of size, got {self.resize}")

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of every result. Raises ValueError where size is None."""
        if not isinstance(self.size, tuple):
            raise ValueError("whole pictures have no common size")
        return self.size

    @property
    def batch_shape(self) -> tuple[int, int, int]:
        """Shape of every result in its layout. Raises ValueError where size is None."""
        height, width = self.shape
        return (3, height, width) if self.layout == "CHW" else (height, width, 3)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return {"uint8": 1, "float32": 4}.get(self.dtype, 2)

    @property
    def is_random(self) -> bool:
        """Whether a result follows from more than the picture."""
        return self.flip or self.crop == "random"


def _choice(name: str, given: object, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise ValueError(f"{name} is one of {', '.join(map(repr, allowed))}, got {given!r}")


def _pixels(name: str, given: Any) -> int:
    try:
        pixels = operator.index(given)
    except TypeError as error:
        raise TypeError(f"{name} is in whole pixels, got {given!r}") from error
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
