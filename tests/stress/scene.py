"""A small world for rounds that are forked by the thousand: a source, a cache folder, and what must be true of it."""

import os
import random
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.folder_check import Expected

from tiercache._native.checksum import crc32c
from tiercache.cache import Cache, CachedStore
from tiercache.cache.names import name_of_identity
from tiercache.model import ByteRange, ShardIdentity
from tiercache.store import LocalFolder

# Files of one byte, of less and of more than a block, and of many units; all fit AMPLE, and few of them fit TIGHT.
SIZES = {"a": 1, "b": 4096, "c": 10_000, "d": 70_000, "e": 150_000, "f": 300_001, "g": 524_288, "h": 1_100_000}
OBJECTS = {"x": 20_000, "y": 100_000}  # without identity
AMPLE, TIGHT = 6 << 20, 700_000
DEADLINE_S = 60.0


def content(key: str, version: int = 0) -> bytes:
    data = random.Random(f"{key}/{version}").randbytes((SIZES | OBJECTS)[key])
    return version.to_bytes(8) + data[8:] if key in OBJECTS else data


class Scene:
    """Objects in a local folder, and a cache folder that lives through all rounds."""

    def __init__(self, root: Path, *, make: bool = True) -> None:
        """make: write the source's objects; else they are there already."""
        self.root, self.source_root, self.cache_root = root, root / "source", root / "cache"
        self.data = {key: content(key) for key in SIZES | OBJECTS}
        if make:
            self.source_root.mkdir(parents=True, exist_ok=True)
            for key, data in self.data.items():
                (self.source_root / key).write_bytes(data)
        self.source = LocalFolder(self.source_root)
        self.names = {key: name_of_identity(self.identity(key)) for key in SIZES}

    def identity(self, key: str) -> ShardIdentity | None:
        """What the manifest would say; None for an object of no data set."""
        if key in OBJECTS:
            return None
        data = self.data[key]
        return ShardIdentity("d" * 32, key.encode().hex(), len(data), crc32c(data))

    def cache(self, size=AMPLE, policy="lru", **options) -> Cache:
        return Cache(self.cache_root, size=size, policy=policy, min_free="0%", **options)

    def pairs(self, keys) -> list[tuple[str, ShardIdentity | None]]:
        return [(key, self.identity(key)) for key in keys]

    def read(self, store: CachedStore, key: str, ranges=None) -> bool:
        """Read ranges of an object (all of it) as a reader does, and check every byte; whether the cache gave them."""
        data = self.data[key]
        wanted = [ByteRange(0, len(data))] if ranges is None else ranges
        lease = store.open_local(key, self.identity(key))
        if lease is not None:
            with lease:
                lease.prefetch(wanted)
                if lease.wait(wanted, deadline_s=DEADLINE_S) and all(_is_right(lease.fd, key, data, w) for w in wanted):
                    return True
        for one in wanted:
            buffer = bytearray(one.n_bytes)
            store.read_into(key, [(one, memoryview(buffer))])
            check(key, data, one, bytes(buffer))
        return False


def _is_right(fd: int, key: str, data: bytes, wanted: ByteRange) -> bool:
    """Check a range of a copy; False: the disk fails, so that a reader asks the source."""
    try:
        found = os.pread(fd, wanted.n_bytes, wanted.start)
    except OSError:
        return False
    check(key, data, wanted, found)
    return True


def check(key: str, data: bytes, wanted: ByteRange, found: bytes) -> None:
    """Raise for a wrong byte."""
    expected = data[wanted.start : wanted.end]
    if found != expected:
        pairs = enumerate(zip(found, expected, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
        raise AssertionError(f"{key}: wrong from byte {wanted.start + first} on, of {wanted}")


@dataclass
class Model:
    """The outside record: what children have promised, line by line.

    "pinning NAME" and "unpinning NAME" are told before, "pinned" and "unpinned" after; "have NAME" once a copy was
    read whole, "dropping" before anything unpinned may go; "rotting NAME" before a bit of it is turned, "fresh" before
    the folder is deleted; "object NAME KEY VERSION" before one without identity comes.
    """

    data: dict[str, bytes]
    pins: set[str] = field(default_factory=set)
    maybe_pins: set[str] = field(default_factory=set)
    have: set[str] = field(default_factory=set)
    rotten: set[str] = field(default_factory=set)
    foreign: dict[str, bytes] = field(default_factory=dict)

    def take_in(self, lines) -> None:
        for line in lines:
            verb, *rest = line.split(" ")
            getattr(self, f"_{verb}")(*rest)

    def _pinning(self, name) -> None:
        self.maybe_pins.add(name)

    def _pinned(self, name) -> None:
        self.pins.add(name)

    def _unpinning(self, name) -> None:
        self.pins.discard(name)
        self.maybe_pins.add(name)

    def _unpinned(self, name) -> None:
        self.maybe_pins.discard(name)

    def _have(self, name) -> None:
        self.have.add(name)
        self.rotten.discard(name)

    def _dropping(self) -> None:
        self.have &= self.pins  # what a person holds cannot be evicted

    def _rotting(self, name) -> None:
        self.have.discard(name)
        self.rotten.add(name)

    def _fresh(self) -> None:
        self.maybe_pins |= self.pins
        self.pins, self.have, self.foreign = set(), set(), {}

    def _object(self, name, key, version) -> None:
        self.data[name] = content(key, int(version))

    def settle(self, pins: set[str]) -> None:
        """Nobody is at work: what is pinned is known."""
        self.pins, self.maybe_pins = set(pins), set()

    def expected(self) -> Expected:
        data = {name: data for name, data in self.data.items() if name not in self.rotten}
        return Expected(data, self.foreign, self.pins, self.maybe_pins)
