"""The distribution tiercache-data: its version, the commands that install it, and a check for its namesake.

The package index has another project named tiercache, whose import package has that name, too. pip installs both into
one folder, where each replaces files of the other, such as `__init__.py` and `config.py`.
"""

from __future__ import annotations

import os
import warnings

__version__ = "0.1.0"

_NAME = "tiercache-data"
UPGRADE_COMMAND = f"pip install -U {_NAME}"


def install_command(extra: str) -> str:
    """Return the command that installs the packages of an extra."""
    return f"pip install '{_NAME}[{extra}]'"


def _warn_of_namesake() -> None:
    """Warn if the other project is installed in the folder of this package."""
    folder = os.path.dirname(os.path.dirname(__file__))  # noqa: PTH120 - pathlib would double the time of the import
    try:
        names = os.listdir(folder)  # noqa: PTH208 - takes 0.1 ms, importlib.metadata 40 ms
    except OSError:
        return
    for name in names:
        if name.startswith("tiercache-") and name.endswith(".dist-info"):
            other = name.removesuffix(".dist-info").replace("-", " ")
            warnings.warn(
                f"another project, {other}, is installed in {folder} beside {_NAME}, and each of them replaces files "
                f"of the other: run `pip uninstall tiercache`, then `pip install --force-reinstall --no-deps {_NAME}`",
                stacklevel=2,
            )


# At the import of this module, not in __init__.py, which the other project replaces: the command still imports this.
_warn_of_namesake()
