"""Pictures in a terminal: the escape sequences of four protocols."""

from __future__ import annotations

import base64
import sys
from importlib import import_module
from typing import Any

import numpy as np

from tiercache import config
from tiercache.images.thumbnail import as_png, thumbnail

AUTO, NONE = "auto", "none"
PROTOCOLS = ("kitty", "iterm2", "sixel", "blocks")
# Longest side in pixels; in characters for "blocks", whose characters are one pixel wide and two high.
_SIDE, _SIDE_IN_BLOCKS = 160, 40
_KITTY_CHUNK = 4096  # base64 characters in a sequence: the protocol's limit
_SIXEL_COLOURS = 64


def choose_protocol(choice: str) -> str | None:
    """Return the protocol for standard output; None: show no pictures.

    Pictures are shown only on a terminal. "auto" takes the protocol that the terminal announces in the environment.

    Raises:
        ValueError: The choice is unknown.
    """
    if choice not in (AUTO, NONE, *PROTOCOLS):
        raise ValueError(f"--pictures is {', '.join((AUTO, *PROTOCOLS))} or {NONE}, got {choice!r}")
    if choice == NONE or not _is_terminal():
        return None
    return config.terminal_pictures() if choice == AUTO else choice


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def picture(data: bytes, protocol: str) -> str:
    """Return the text that shows an encoded image in a terminal; "" if it cannot be decoded.

    Raises:
        ModuleNotFoundError: A library is missing; the message says how to install it.
    """
    image = thumbnail(data, _SIDE_IN_BLOCKS if protocol == "blocks" else _SIDE)
    return "" if image is None else _ENCODERS[protocol](image)


def _kitty(image: Any) -> str:
    encoded = base64.b64encode(as_png(image)).decode()
    chunks = [encoded[i : i + _KITTY_CHUNK] for i in range(0, len(encoded), _KITTY_CHUNK)]
    # a=T: transmit and show; f=100: PNG; q=2: the terminal must not answer on standard input.
    keys = ["a=T,f=100,q=2,", *[""] * (len(chunks) - 1)]
    more = [*[1] * (len(chunks) - 1), 0]
    parts = zip(keys, more, chunks, strict=True)
    return "".join(f"\x1b_G{key}m={flag};{chunk}\x1b\\" for key, flag, chunk in parts)


def _iterm2(image: Any) -> str:
    data = as_png(image)
    return f"\x1b]1337;File=inline=1;size={len(data)}:{base64.b64encode(data).decode()}\x07"


def _sixel(image: Any) -> str:
    quantized = image.quantize(_SIXEL_COLOURS)
    colours = np.array(quantized.getpalette(), np.int64)[: 3 * _SIXEL_COLOURS].reshape(-1, 3) * 100 // 255
    pixels = np.asarray(quantized)
    parts = [f'\x1bPq"1;1;{image.width};{image.height}']
    parts += [f"#{number};2;{r};{g};{b}" for number, (r, g, b) in enumerate(colours.tolist())]
    for top in range(0, len(pixels), 6):
        band = pixels[top : top + 6]
        weights = 1 << np.arange(len(band))[:, None]  # a character has six pixels, one below the other
        for number in np.unique(band).tolist():
            line = ((band == number) * weights).sum(0) + 63
            parts.append(f"#{number}{bytes(line.astype(np.uint8)).decode('ascii')}$")
        parts.append("-")
    return "".join([*parts, "\x1b\\"])


def _blocks(image: Any) -> str:
    if image.height % 2:  # a character shows two pixels, one above the other
        grown = import_module("PIL.Image").new("RGB", (image.width, image.height + 1))
        grown.paste(image)
        image = grown
    pixels = np.asarray(image).tolist()
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        cells = [
            f"\x1b[38;2;{r};{g};{b}m\x1b[48;2;{r2};{g2};{b2}m\u2580"
            for (r, g, b), (r2, g2, b2) in zip(upper, lower, strict=True)
        ]
        lines.append("".join([*cells, "\x1b[0m"]))
    return "\n".join(lines)


_ENCODERS = {"kitty": _kitty, "iterm2": _iterm2, "sixel": _sixel, "blocks": _blocks}
