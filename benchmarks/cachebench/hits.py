"""Cache hits, and the same system calls in plain Python and in C without the interpreter."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

from compiled import compiled
from tiercache.cache.names import name_of_identity

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tiercache.cache.cache import CachedStore
    from tiercache.model import ShardIdentity

SOURCE = Path(__file__).with_name("hit.c")
Objects = list[tuple[str, "ShardIdentity"]]


def through_cache(store: CachedStore, objects: Objects) -> Callable[[int, int], None]:
    """Return a function that looks up, leases, maps and releases the copies [first, last)."""

    def hit(first: int, last: int) -> None:
        for key, identity in objects[first:last]:
            lease = store.open_local(key, identity)
            if lease is None or lease.fd < 0:
                raise RuntimeError(f"{key} is not in the cache")
            mapped = mmap.mmap(lease.fd, identity.n_bytes, prot=mmap.PROT_READ)
            mapped.close()
            lease.close()

    return hit


def by_hand(paths: Sequence[str]) -> Callable[[int, int], None]:
    """Return a function that calls open, flock, fstat, mmap and close from Python."""

    def hit(first: int, last: int) -> None:
        for path in paths[first:last]:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                found = os.fstat(fd)
                mmap.mmap(fd, found.st_size, prot=mmap.PROT_READ).close()
            finally:
                os.close(fd)

    return hit


def in_c(paths: Sequence[str], folder: Path) -> Callable[[int, int], None]:
    """Return a function that makes the same calls from C. folder: Folder of the compiled code."""
    library = _build(folder)
    encoded = (ctypes.c_char_p * len(paths))(*(path.encode() for path in paths))
    size = ctypes.sizeof(ctypes.c_char_p)

    def hit(first: int, last: int) -> None:
        place = ctypes.addressof(encoded) + first * size
        if library.hits(place, last - first) != last - first:
            raise OSError("a copy could not be opened and mapped")

    return hit


def paths_of(folder: Path, objects: Objects) -> list[str]:
    """Return the paths of the copies."""
    return [str(folder / "copies" / name_of_identity(identity)) for _, identity in objects]


def _build(folder: Path) -> ctypes.CDLL:
    library = compiled(SOURCE, folder)
    library.hits.argtypes, library.hits.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_long
    return library
