"""A small world for the cache's tests: objects with identities, an inner store that counts, caches that are closed."""

import contextlib
import os
import random
from pathlib import Path

import numpy as np
import pytest
from tests.support.stores import CountingStore

from tiercache._native.checksum import crc32c
from tiercache.cache import Cache
from tiercache.cache.copy_file import CopyFile
from tiercache.model import ByteRange, ShardIdentity
from tiercache.store import LocalFolder


def turn(path: Path, at: int) -> None:
    """Turn a bit of a file, as a rotten disk would; its rights stay."""
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    path.chmod(mode)


def write_units(part: CopyFile, start: int, data: np.ndarray) -> None:
    """Write whole units of a partial copy, as a fetch does."""
    part.write(start, data.data)
    part.mark_present(ByteRange(start, start + len(data)))


def open_below(folder: Path) -> list[str]:
    """What this process has open of a folder."""
    targets = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this listing
            targets.append(str(link.readlink()))
    return sorted(target for target in targets if target.startswith(f"{folder}/"))


class World:
    """Objects in a local folder behind a counting store, and caches in folders beside it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = LocalFolder(root / "source")
        self.inner = CountingStore(self.folder)
        self.data: dict[str, bytes] = {}
        self.caches: list[Cache] = []

    def put(self, key: str, n_bytes: int = 10_000) -> ShardIdentity:
        """Make an object of random bytes."""
        data = random.Random(key).randbytes(n_bytes)
        path = self.root / "source" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.data[key] = data
        return self.identity(key)

    def identity(self, key: str) -> ShardIdentity:
        data = self.data[key]
        return ShardIdentity("d" * 32, key.encode().hex(), len(data), crc32c(data))

    def cache(self, size="10MB", name="cache", **options) -> Cache:
        cache = Cache(self.root / name, size=size, **{"min_free": "0%"} | options)
        self.caches.append(cache)
        return cache

    def store(self, cache: Cache | None = None):
        return (cache or self.cache()).store(self.inner)

    def read(self, store, key: str, identity=None) -> bytes | None:
        """The bytes of the cached copy, waited for; None: not by this way."""
        with_identity = identity if identity is not None else self.identity(key)
        lease = store.open_local(key, with_identity)
        if lease is None:
            return None
        try:
            if not lease.wait([ByteRange(0, lease.n_bytes)], deadline_s=60):
                return None
            lease.note_read(lease.n_bytes, lambda: [ByteRange(0, lease.n_bytes)])
            return os.pread(lease.fd, lease.n_bytes, 0)
        finally:
            lease.close()

    def fetch(self, store, key: str) -> None:
        assert self.read(store, key) == self.data[key]

    def copies(self, name="cache") -> list[Path]:
        return [p for p in sorted((self.root / name / "copies").iterdir()) if "." not in p.name]

    def copy(self, key: str) -> Path:
        """Where the copy of the only object lies."""
        (path,) = self.copies()
        return path

    def parts(self, name="cache") -> list[Path]:
        """Copies in part, and maps that are left."""
        copies = self.root / name / "copies"
        return sorted([*copies.glob("*.part"), *copies.glob("*.map")])

    def copy_of(self, key: str) -> Path:
        """Where the copy of an object lies, as long as it is right."""
        (path,) = [p for p in self.copies() if p.read_bytes() == self.data[key]]
        return path

    def damage(self, key: str, at: int = 5000) -> Path:
        """Turn a bit of the copy of an object; where that lies."""
        path = self.copy_of(key)
        turn(path, at)
        return path

    def n_reads(self, keys="*") -> int:
        return self.inner.n_calls("read_into", keys)


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    for cache in world.caches:
        cache.close()
