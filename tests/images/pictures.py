"""Pictures for tests: smooth ones, which a decoder's rounding changes little, in any encoding."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiercache.images.decoder import load_turbojpeg


def has_turbojpeg() -> bool:
    """Whether this machine has what resize_in="ycbcr" needs."""
    try:
        load_turbojpeg()
    except ModuleNotFoundError:
        return False
    return True


BY_PLANES = pytest.mark.skipif(not has_turbojpeg(), reason="no libturbojpeg here (Debian: libturbojpeg0)")


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth random colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, how: str = "jpeg", **options: Any) -> bytes:
    """The encoded bytes; JPEG of quality 95."""
    stream = io.BytesIO()
    image.save(stream, how, **({"quality": 95} if how == "jpeg" else {}) | options)
    return stream.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    """The whole picture as Pillow reads it, uint8[h, w, 3]."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
