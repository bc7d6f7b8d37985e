"""The demo's input: real files from packages that the demo needs anyway."""

from __future__ import annotations

import sysconfig
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiercache.errors import TierCacheError

HELD_OUT_EVERY = 6
GREY_STEP = 15  # scikit-learn's digits have 17 shades, 0 to 16

TEXT_PACKAGES = ("sklearn", "numpy")
TEXT_BYTES = 1 << 20
WINDOW_BYTES = 128


def check_packages(names: tuple[str, ...]) -> None:
    """Check that the packages of the extra `demo` are installed.

    Raises:
        TierCacheError: A package is missing; the message says how to install it.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise TierCacheError(
            f"the demo needs {', '.join(missing)}: pip install 'tiercache[demo]'", missing=tuple(missing)
        )


def write_digits(folder: Path) -> tuple[int, int]:
    """Write scikit-learn's digits as folder/{train,test}/<digit>/<number>.png, 8 x 8 grey pixels each.

    Returns:
        The numbers of images in train and in test.
    """
    # These packages belong to an extra, so this module must be importable without them.
    datasets: Any = import_module("sklearn.datasets")
    pillow: Any = import_module("PIL.Image")
    digits = datasets.load_digits()
    counts = {"train": 0, "test": 0}
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        part = "test" if number % HELD_OUT_EVERY == 0 else "train"
        path = folder / part / str(label) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pillow.fromarray((pixels * GREY_STEP).astype(np.uint8)).save(path)
        counts[part] += 1
    return counts["train"], counts["test"]


def python_windows(n_bytes: int = TEXT_BYTES) -> npt.NDArray[np.uint8]:
    """Return installed Python source as byte tokens: uint8[n, WINDOW_BYTES + 1], each window with its next byte.

    Files are read in the order of their paths, until there are n_bytes.
    """
    packages = Path(sysconfig.get_paths()["purelib"])
    text = bytearray()
    for package in TEXT_PACKAGES:
        for path in sorted((packages / package).rglob("*.py")):
            text += path.read_bytes()
            if len(text) >= n_bytes:
                break
    width = WINDOW_BYTES + 1
    n_windows = min(len(text), n_bytes) // width
    return np.frombuffer(bytes(text[: n_windows * width]), np.uint8).reshape(n_windows, width)
