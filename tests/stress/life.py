"""A cache's whole life in chapters, for folders whose disk fails: what is read is right, and no reader is told.

Each chapter opens the cache that the ones before have left, and closes it: a fault that comes late need not wait for
all that comes before.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from tests.stress.jobs import age, damage, follow, holds, read_doubting
from tests.stress.scene import AMPLE, OBJECTS, TIGHT, Scene
from tests.support.forks import SendLine

from tiercache.cache import Cache
from tiercache.errors import TierCacheError
from tiercache.model import ByteRange, ShardIdentity

# What the verbs for people say of a disk that fails.
DOCUMENTED = (TierCacheError, OSError)
KEYS = ("a", "c", "d", "f")
ROTTEN = ("c", "d")


def attempt(work: Callable[[], Cache | None]):
    """What work() returns; None where it says, as documented, that it could not."""
    try:
        return work()
    except DOCUMENTED:
        return None


def ample(scene: Scene, tell) -> None:
    """All has room."""
    _live(scene, tell, AMPLE, "lru")


def tight_lru(scene: Scene, tell) -> None:
    """A limit that is smaller than before, and evicting for every copy."""
    _live(scene, tell, TIGHT // 2, "lru")


def tight_plan(scene: Scene, tell) -> None:
    """Evicting along a plan."""
    _live(scene, tell, TIGHT // 2, "plan")


def _live(scene: Scene, tell, size: int, policy: str) -> None:
    """Open, fetch whole and in part, hit, pin, plan, warm, evict under pressure, close.

    Raises what no reader may meet: a wrong byte, or any error from reading or closing.
    """
    cache = attempt(lambda: scene.cache(size, policy))
    if cache is None:
        return
    store = cache.store(scene.source)
    for key in KEYS:
        scene.read(store, key, [ByteRange(0, len(scene.data[key]) // 2)])
    for key in KEYS:
        store.prefetch(key, scene.identity(key))
        scene.read(store, key)
        scene.read(store, key)
    scene.read(store, "x")
    name = scene.names["a"]
    tell(f"pinning {name}")
    attempt(lambda: cache.pin(scene.source, scene.pairs("a"), jobs=1))
    follow(scene, store, KEYS)
    attempt(lambda: cache.warm(scene.source, scene.pairs("cd"), jobs=1))
    attempt(cache.status)
    attempt(cache.entries)
    attempt(lambda: cache.evict(lambda entry: entry.n_bytes > 50_000))
    tell(f"unpinning {name}")
    attempt(cache.unpin)
    cache.close()


def rot(scene: Scene) -> None:
    """Two copies of the folder are wrong, from now on."""
    with scene.cache() as cache:
        store = cache.store(scene.source)
        for key in ROTTEN:
            scene.read(store, key)
            damage(scene.cache_root / "copies" / scene.names[key])


def damaged(scene: Scene, tell) -> None:
    """One wrong copy is found by a reader, one by a person; an object is bad at its source, another is replaced."""
    for key in ROTTEN:
        tell(f"rotting {scene.names[key]}")
    cache = attempt(scene.cache)
    if cache is None:
        return
    store = cache.store(scene.source)
    first, second = ROTTEN
    read_doubting(scene, store, first)
    attempt(lambda: cache.verify(repair=True, jobs=1))
    read_doubting(scene, store, second)
    _meet_poison(scene, store)
    for key in OBJECTS:
        scene.read(store, key)
    attempt(lambda: store.put("x", scene.data["x"]))
    scene.read(store, "x")
    cache.close()


def _meet_poison(scene: Scene, store) -> None:
    (scene.source_root / "bad").write_bytes(scene.data["c"][:-1] + b"\0")
    good = scene.identity("c")
    identity = ShardIdentity(good.dataset_id, "bad0", good.n_bytes, good.crc32c)
    for _ in range(2):
        if holds(store.open_local("bad", identity), good.n_bytes):
            store.remove_if_corrupt("bad", identity)


def cut_off(scene: Scene) -> None:
    """A machine comes back after a power failure: a part and books of a boot before, or no books at all."""
    with scene.cache() as cache:
        scene.read(cache.store(scene.source), "h", [ByteRange(0, 100_000), ByteRange(500_000, 1_000_000)])
    age(scene.cache_root)


def come_back(scene: Scene, tell) -> None:
    """What was cut off is checked and goes on; then somebody deletes the catalog's contents under the open cache."""
    cache = attempt(scene.cache)
    if cache is None:
        return
    store = cache.store(scene.source)
    scene.read(store, "h", [ByteRange(0, 100_000)])
    scene.read(store, "h")
    with suppress(OSError):
        os.truncate(scene.cache_root / "catalog.sqlite", 0)
    scene.read(store, "g")
    cache.close()


@dataclass(frozen=True, slots=True)
class Chapter:
    """work: with faults; prepare: before it, without."""

    work: Callable[[Scene, SendLine], None]
    prepare: Callable[[Scene], None] | None = None


CHAPTERS = (Chapter(ample), Chapter(tight_lru), Chapter(tight_plan), Chapter(damaged, rot), Chapter(come_back, cut_off))
