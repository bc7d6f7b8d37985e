"""What the children of a round do in the cache's folder; each job tells what it promises, and checks what it reads."""

import os
import shutil
import sqlite3
import struct
import warnings
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from tests.stress.scene import AMPLE, DEADLINE_S, OBJECTS, SIZES, TIGHT, Scene, content
from tests.support.folder_check import BLOCK_BYTES, allocated_bytes

from tiercache._native.checksum import crc32c
from tiercache.cache.copy_file import _HEAD, HEAD_BYTES
from tiercache.cache.names import name_of_identity
from tiercache.crash_points import set_hook
from tiercache.errors import CorruptShard, StoreError
from tiercache.model import ByteRange, ReadingPlan, ShardIdentity


class Job:
    """One run of one job. tell: to the outside record; random: seeded by the round."""

    def __init__(self, scene: Scene, tell, random) -> None:
        self.scene, self.tell, self.random = scene, tell, random
        warnings.simplefilter("ignore", RuntimeWarning)  # notices: a smaller limit, a disk that fails

    def keys(self, n: int) -> list[str]:
        return self.random.sample(sorted(SIZES), n)

    def ranges(self, key: str, n: int = 2) -> list[ByteRange]:
        n_bytes = SIZES[key]
        starts = [self.random.randrange(n_bytes + 1) for _ in range(n)]
        return [ByteRange(start, min(start + self.random.randrange(n_bytes // 8 + 2), n_bytes)) for start in starts]

    def read_whole(self, store, key: str) -> None:
        if self.scene.read(store, key):
            self.tell(f"have {self.scene.names[key]}")

    def read_some(self, size, policy) -> None:
        if size != AMPLE:
            self.tell("dropping")
        with self.scene.cache(size, policy) as cache:
            store = cache.store(self.scene.source)
            for key in self.keys(5):
                if self.random.random() < 0.5:
                    self.scene.read(store, key, self.ranges(key))
                else:
                    self.read_whole(store, key)
            check_limit(cache)

    def evict_some(self, n: int) -> None:
        """So that there is something to do."""
        self.tell("dropping")
        with self.scene.cache() as cache:
            kept = set(self.random.sample(sorted(self.scene.names.values()), len(SIZES) - n))
            cache.evict(lambda entry: entry.name not in kept)


def read_doubting(scene: Scene, store, key: str) -> None:
    """As a shard's reader does: what is wrong is said to be so, and must be right when it is read again."""
    try:
        scene.read(store, key)
    except AssertionError:
        store.remove_if_corrupt(key, scene.identity(key))
        scene.read(store, key)


def check_limit(cache) -> None:
    """Raise where a cache holds more than it may, by its books or on the disk.

    What a person holds may be more than a limit that was made smaller after; a block is the foreign file's.
    """
    stats = cache.stats()
    most_bytes = max(stats["limit_bytes"], stats["pinned_bytes"])
    taken_bytes = allocated_bytes(cache.path / "copies") - BLOCK_BYTES
    if max(stats["bytes_used"], taken_bytes) > most_bytes:
        raise AssertionError(f"more than the limit is used, the files take {taken_bytes} bytes of disk: {stats}")


def fetch(job: Job) -> None:
    """A few objects, whole, into a cache that holds all."""
    job.evict_some(4)
    with job.scene.cache() as cache:
        store = cache.store(job.scene.source)
        for key in job.keys(4):
            job.read_whole(store, key)


def fetch_in_part(job: Job) -> None:
    """Ranges of a few objects, some of them up to the last byte; then the same in another open cache."""
    job.evict_some(len(SIZES))
    for _ in range(2):
        with job.scene.cache() as cache:
            store = cache.store(job.scene.source)
            for key in ("h", *job.keys(2)):
                for _ in range(2):
                    job.scene.read(store, key, job.ranges(key))


def prefetch(job: Job) -> None:
    job.evict_some(4)
    with job.scene.cache() as cache:
        store = cache.store(job.scene.source)
        keys = job.keys(4)
        for key in keys:
            store.prefetch(key, job.scene.identity(key))
        for key in keys:
            job.read_whole(store, key)


def press_lru(job: Job) -> None:
    job.read_some(TIGHT, "lru")


def publish(scene: Scene, store, keys: Sequence[str]):
    """A plan to read keys in this order, and the clock's end of each."""
    n_bytes = np.array([SIZES[key] for key in keys])
    names = np.array([list(bytes.fromhex(scene.names[key])) for key in keys], np.uint8)
    ends = np.cumsum(n_bytes)
    plan = ReadingPlan("a job of the rig", np.arange(len(keys)), ends - n_bytes, ends, ends - n_bytes + ends[-1])
    return store.publish_plan(names, plan), ends.tolist()


def follow_a_plan(job: Job) -> None:
    """Publish a reading plan, read along it in a cache that holds half, and withdraw it."""
    job.tell("dropping")
    keys = job.keys(6)
    with job.scene.cache(TIGHT, "plan") as cache:
        store = cache.store(job.scene.source)
        follow(job.scene, store, keys)
        check_limit(cache)


def follow(scene: Scene, store, keys: Sequence[str]) -> None:
    """Read along a published plan."""
    following, ends = publish(scene, store, keys)
    for key, clock in zip(keys, ends, strict=True):
        scene.read(store, key)
        following.advance(clock)
    following.close()


def after_a_death(job: Job) -> None:
    """A process has died with a plan published, a part half fetched, and the cache open."""
    job.evict_some(len(SIZES))
    pid = os.fork()
    if pid == 0:
        set_hook(None)  # it is the one that comes after it that may be struck
        try:
            cache = job.scene.cache()
            store = cache.store(job.scene.source)
            kept = publish(job.scene, store, job.keys(6))
            job.scene.read(store, "h", job.ranges("h"))
            os._exit(kept is None)  # not withdrawn, as it would be if nobody kept it
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    with job.scene.cache(TIGHT, "plan") as cache:
        store = cache.store(job.scene.source)
        for key in job.keys(6):
            job.scene.read(store, key)


def another_boot(job: Job) -> None:
    """What a machine finds that was cut off from its power: parts and books of a boot before."""
    job.evict_some(len(SIZES))
    with job.scene.cache() as cache:
        job.scene.read(cache.store(job.scene.source), "h", job.ranges("h"))
    age(job.scene.cache_root)
    with job.scene.cache() as cache:
        store = cache.store(job.scene.source)
        for _ in range(2):
            job.scene.read(store, "h", job.ranges("h"))


def age(cache_root: Path) -> None:
    """Make parts and books those of a boot before."""
    change_heads(cache_root, boot="0" * 16)
    with closing(sqlite3.connect(cache_root / "catalog.sqlite")) as db, db:
        db.execute("UPDATE meta SET value = 'before' WHERE key = 'boot'")


def change_heads(cache_root: Path, boot: str | None = None) -> None:
    """Let the maps of all parts name the parts that lie there, which may have been copied; boot: and another boot."""
    for part in (cache_root / "copies").glob("*.part"):
        path = part.with_suffix(".map")
        head = path.read_bytes()[:HEAD_BYTES] if path.exists() else b""
        if len(head) == HEAD_BYTES:
            *facts, _, of_boot, _ = _HEAD.unpack(head)
            body = _HEAD.pack(*facts, part.stat().st_ino, of_boot if boot is None else boot.encode(), 0)[:-4]
            with path.open("r+b") as file:
                file.write(body + struct.pack("<I", crc32c(body)))


def pin(job: Job) -> None:
    with job.scene.cache() as cache:
        for key in job.keys(2):
            name = job.scene.names[key]
            job.tell(f"pinning {name}")
            cache.pin(job.scene.source, job.scene.pairs([key]), jobs=1)
            job.tell(f"have {name}")
            job.tell(f"pinned {name}")


def unpin(job: Job) -> None:
    pin(job)
    with job.scene.cache() as cache:
        for entry in [entry for entry in cache.entries() if entry.pinned]:
            job.tell(f"unpinning {entry.name}")
            cache.unpin([entry.name])
            job.tell(f"unpinned {entry.name}")


def warm(job: Job) -> None:
    job.evict_some(4)
    with job.scene.cache() as cache:
        keys = job.keys(5)
        cache.warm(job.scene.source, job.scene.pairs(keys), jobs=2)
        for key in keys:
            job.tell(f"have {job.scene.names[key]}")


def warm_too_much(job: Job) -> None:
    job.tell("dropping")
    with job.scene.cache(TIGHT) as cache:
        try:
            cache.warm(job.scene.source, job.scene.pairs(SIZES), jobs=2)
        except StoreError as error:
            if error.code != "CacheFull":
                raise
            return
    raise AssertionError("more was warmed than the cache holds")


def evict(job: Job) -> None:
    fetch(job)
    job.tell("dropping")
    with job.scene.cache() as cache:
        cache.evict()


def shrink(job: Job) -> None:
    fetch(job)
    job.tell("dropping")
    job.scene.cache(TIGHT // 2).close()


def objects(job: Job) -> None:
    """Objects without identity; one of them is replaced through the store, which drops its copy."""
    with job.scene.cache() as cache:
        store = cache.store(job.scene.source)
        for key in OBJECTS:
            read_object(job, store, key)
        store.put("x", content("x", job.random.randrange(1 << 20)))
        read_object(job, store, "x")


def read_object(job: Job, store, key: str) -> None:
    # Earlier rounds have replaced it: what the source holds now is what counts.
    job.scene.data[key] = (job.scene.source_root / key).read_bytes()
    job.tell(f"object {store.spec_of(key).name} {key} {int.from_bytes(job.scene.data[key][:8])}")
    job.scene.read(store, key)


def damage(file: Path, at: float = 0.5) -> bool:
    """Turn a bit of a file of the folder; False: it is not there, or empty."""
    if not file.exists() or not file.stat().st_size:
        return False
    file.chmod(0o600)
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 1
    file.write_bytes(data)
    file.chmod(0o400)
    return True


def distrust(job: Job) -> None:
    """A reader finds a copy wrong: it is checked, put aside, and fetched again."""
    key = job.random.choice("cdef")
    name = job.scene.names[key]
    with job.scene.cache() as cache:
        store = cache.store(job.scene.source)
        job.scene.read(store, key)
        job.tell(f"rotting {name}")
        if damage(job.scene.cache_root / "copies" / name):
            store.remove_if_corrupt(key, job.scene.identity(key))
        job.read_whole(store, key)


def poison(job: Job) -> None:
    """An object that is not what its identity says never becomes a copy; who reads its part finds it wrong."""
    (job.scene.source_root / "bad").write_bytes(job.scene.data["c"][:-1] + b"\0")
    good = job.scene.identity("c")
    identity = ShardIdentity(good.dataset_id, "bad0", good.n_bytes, good.crc32c)
    with job.scene.cache() as cache:
        store = cache.store(job.scene.source)
        for _ in range(2):
            is_held = holds(store.open_local("bad", identity), good.n_bytes)
            if (job.scene.cache_root / "copies" / name_of_identity(identity)).exists():
                raise AssertionError("what is bad at its source was published as a copy")
            if is_held:
                store.remove_if_corrupt("bad", identity)


def holds(lease, n_bytes: int) -> bool:
    """Whether a lease gives all of an object that is bad: as a part, whose sum nobody has made yet."""
    if lease is None:
        return False
    with lease:
        try:
            return lease.wait([ByteRange(0, n_bytes)], deadline_s=DEADLINE_S)
        except (CorruptShard, StoreError):
            return False


def new_folder(job: Job) -> None:
    """A cache where there was none."""
    job.tell("fresh")
    shutil.rmtree(job.scene.cache_root, ignore_errors=True)
    fetch(job)


def lost_catalog(job: Job) -> None:
    catalog = job.scene.cache_root / "catalog.sqlite"
    if job.random.random() < 0.5:
        for path in job.scene.cache_root.glob("catalog.sqlite*"):
            path.unlink(missing_ok=True)
    elif catalog.exists():
        catalog.write_bytes(b"not a catalog" * 1000)
    fetch(job)


def repair(job: Job) -> None:
    """A person has the whole cache checked while a copy is wrong."""
    key = job.random.choice("cdef")
    with job.scene.cache() as cache:
        job.scene.read(cache.store(job.scene.source), key)
        job.tell(f"rotting {job.scene.names[key]}")
        damage(job.scene.cache_root / "copies" / job.scene.names[key])
        cache.verify(repair=True)


JOBS = {
    work.__name__: work
    for work in (
        fetch,
        fetch_in_part,
        prefetch,
        press_lru,
        follow_a_plan,
        after_a_death,
        another_boot,
        pin,
        unpin,
        warm,
        warm_too_much,
        evict,
        shrink,
        objects,
        distrust,
        poison,
        new_folder,
        lost_catalog,
        repair,
    )
}
