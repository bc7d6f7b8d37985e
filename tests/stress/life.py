"""A cache's whole life in one script, for folders whose disk fails: what is read is right, and no reader is told."""

import sqlite3
import warnings
from collections.abc import Callable

import numpy as np
from tests.stress.scene import AMPLE, TIGHT, Scene

from tiercache.cache import Cache
from tiercache.errors import TierCacheError
from tiercache.model import ByteRange, ReadingPlan

# What the verbs for people say of a disk that fails; sqlite3's: of a catalog that cannot be written.
DOCUMENTED = (TierCacheError, OSError, sqlite3.Error)
KEYS = ("a", "c", "d", "f")


def life(scene: Scene, tell) -> None:
    """Open, fetch whole and in part, hit, pin, plan, warm, evict under pressure, close; and open again.

    Raises what no reader may meet: a wrong byte, or any error from reading or closing.
    """
    warnings.simplefilter("ignore", RuntimeWarning)  # notices say that the disk fails
    for size, policy in ((AMPLE, "lru"), (TIGHT // 2, "lru"), (TIGHT // 2, "plan")):
        cache = attempt(tell, lambda s=size, p=policy: scene.cache(s, p))
        if cache is not None:
            live(scene, tell, cache)


def attempt(tell, work: Callable[[], Cache | None]):
    """What work() returns; None where it says, as documented, that it could not."""
    try:
        return work()
    except DOCUMENTED as error:
        tell(f"object {type(error).__name__} a 0")
        return None


def live(scene: Scene, tell, cache: Cache) -> None:
    store = cache.store(scene.source)
    for key in KEYS:
        scene.read(store, key, [ByteRange(0, len(scene.data[key]) // 2)])
    for key in KEYS:
        store.fetch_ahead(key, scene.identity(key))
        scene.read(store, key)
        scene.read(store, key)
    scene.read(store, "x")
    name = scene.names["a"]
    tell(f"pinning {name}")
    attempt(tell, lambda: cache.pin(scene.source, scene.pairs("a"), jobs=1))
    follow(scene, store)
    attempt(tell, lambda: cache.warm(scene.source, scene.pairs("cd"), jobs=1))
    attempt(tell, cache.status)
    attempt(tell, cache.entries)
    attempt(tell, lambda: cache.evict(lambda entry: entry.n_bytes > 50_000))
    tell(f"unpinning {name}")
    attempt(tell, cache.unpin)
    cache.close()


def follow(scene: Scene, store) -> None:
    """Read along a published plan."""
    n = len(KEYS)
    names = np.array([list(bytes.fromhex(scene.names[key])) for key in KEYS], np.uint8)
    ends = np.cumsum([len(scene.data[key]) for key in KEYS])
    firsts = ends - [len(scene.data[key]) for key in KEYS]
    following = store.publish(names, ReadingPlan("a life", np.arange(n), firsts, ends, firsts + ends[-1]))
    for key, clock in zip(KEYS, ends.tolist(), strict=True):
        scene.read(store, key)
        following.advance(clock)
    following.close()
