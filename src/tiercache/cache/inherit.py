"""Descriptors that a forked child closes, without releasing the locks of its parent.

A descriptor that is inherited through fork shares its lock with the parent: close() keeps the parent's lock, LOCK_UN
would release it.
"""

from __future__ import annotations

import contextlib
import os

_private: set[int] = set()


def keep_private(fd: int) -> int:
    """Register fd as private to this process, and return it."""
    _private.add(fd)
    return fd


def close_private(fd: int) -> None:
    """Close a descriptor that keep_private() has registered."""
    # Deregistered first: a fork in between leaves the child one descriptor too many; in the other order, the child
    # could close another file.
    _private.discard(fd)
    os.close(fd)


def _close_inherited() -> None:
    while _private:
        with contextlib.suppress(OSError):
            os.close(_private.pop())


os.register_at_fork(after_in_child=_close_inherited)
