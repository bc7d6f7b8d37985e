"""Decoding of a JPEG in Python: Pillow, the centre square, resized."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from workloads import DECODED_SIZE


def decode(data: bytes) -> np.ndarray:
    """Return the decoded image, uint8[size, size, 3]."""
    with Image.open(io.BytesIO(data)) as image:
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        size = (DECODED_SIZE, DECODED_SIZE)
        return np.array(image.convert("RGB").resize(size, Image.Resampling.BILINEAR, box=box))
