"""Old names of arguments, which are accepted with a DeprecationWarning for one release."""

from __future__ import annotations

import warnings
from typing import TypeVar

T = TypeVar("T")


def renamed_argument(owner: str, old: str, old_value: T | None, new: str, new_value: T | None) -> T | None:
    """Return the value of an argument that may have been given under its old name.

    Args:
        owner: Name of the function or class, for the messages.
        old: Old name of the argument.
        old_value: Value given under the old name; None: not given.
        new: Present name of the argument.
        new_value: Value given under the present name; None: not given.

    Raises:
        TypeError: Both names were given.
    """
    if old_value is None:
        return new_value
    if new_value is not None:
        raise TypeError(f"{owner}: {old}= is the old name of {new}=; give {new}= alone")
    # stacklevel: this function, the constructor, its caller.
    message = f"{owner}: {old}= is now called {new}=; the old name will be removed"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
    return old_value
