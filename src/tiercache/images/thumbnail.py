"""Small previews of images, for notebooks and terminals."""

from __future__ import annotations

import io
from importlib import import_module
from typing import Any

from tiercache.images.decoder import DecodeError, Decoder
from tiercache.images.options import DecodeImage


def thumbnail(data: Any, side: int) -> Any:
    """Return an image as a Pillow image in RGB of at most side x side pixels; None if it cannot be decoded.

    Args:
        data: Bytes of the encoded image.
        side: Longest side of the result in pixels. A smaller image keeps its size.

    Raises:
        ModuleNotFoundError: A library is missing; the message says how to install it.
    """
    decoder = Decoder(DecodeImage(None, layout="HWC"))
    try:
        pixels = decoder.decode(data, ())
    except DecodeError:
        return None
    image = import_module("PIL.Image").fromarray(pixels)
    image.thumbnail((side, side))
    return image


def as_png(image: Any) -> bytes:
    """Return a Pillow image as PNG."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
