"""Descriptors that a forked child must not keep: it closes them, and never unlocks what its parent has locked.

A descriptor inherited through fork shares its lock with the parent's: closing it leaves the parent's hold, LOCK_UN
would end it.
"""

from __future__ import annotations

import contextlib
import os

_private: set[int] = set()


def keep_private(fd: int) -> int:
    """Note that fd is this process's own; returns it."""
    _private.add(fd)
    return fd


def close_private(fd: int) -> None:
    """Close a descriptor that keep_private() has noted."""
    # Off the list first: a fork between the two leaves the child one descriptor too many, not another file's closed.
    _private.discard(fd)
    os.close(fd)


def _close_inherited() -> None:
    while _private:
        with contextlib.suppress(OSError):
            os.close(_private.pop())


os.register_at_fork(after_in_child=_close_inherited)
