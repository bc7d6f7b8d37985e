"""Pictures for tests: smooth ones, which a decoder's rounding changes little, in any encoding."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


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
