"""One of many processes on one cache: `work(...)`, started by fork, spawn or forkserver.

Each has threads that read whole objects and ranges, evict and fetch ahead, and checks every byte that it reads.
"""

import random
import threading
import traceback
import warnings
from pathlib import Path

from tests.stress.scene import Scene
from tests.support.forks import ForkedChild

from tiercache.model import ByteRange
from tiercache.waiting import SYSTEM_CLOCK

FORK_DEADLINE_S = 90.0


def work(root: str, settings: dict, number: int, answers) -> None:
    """Read for settings["seconds"]; puts (number, reads, hits, what went wrong) into answers.

    settings: seconds, size and policy of the cache, n_threads.
    """
    warnings.simplefilter("ignore", RuntimeWarning)  # notices: another process has opened it with less
    scene = Scene(Path(root), make=False)
    crowd = _Threads(scene, settings, number)
    answers.put((number, *crowd.run()))


class _Threads:
    """The threads of one process, on one cache object. The lock guards the counts."""

    def __init__(self, scene: Scene, settings: dict, number: int) -> None:
        self.scene, self.settings, self.number = scene, settings, number
        self.end_s = SYSTEM_CLOCK.monotonic() + settings["seconds"]
        self.lock = threading.Lock()
        self.n_reads = self.n_by_cache = 0
        self.errors: list[str] = []

    def run(self) -> tuple[int, int, list[str]]:
        with self.scene.cache(self.settings["size"], self.settings["policy"]) as cache:
            store = cache.store(self.scene.source)
            threads = [
                threading.Thread(target=self._top, args=(cache, store, i)) for i in range(self.settings["n_threads"])
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return self.n_reads, self.n_by_cache, self.errors

    def _top(self, cache, store, i: int) -> None:
        try:
            self._read(cache, store, random.Random(f"{self.number}/{i}"))
        except BaseException:  # noqa: BLE001 - thread top: told to the parent
            self.errors.append(traceback.format_exc())

    def _read(self, cache, store, chance: random.Random) -> None:
        keys = sorted(self.scene.data)
        while SYSTEM_CLOCK.monotonic() < self.end_s and not self.errors:
            key = chance.choice(keys)
            n_bytes = len(self.scene.data[key])
            start, end = sorted(chance.randrange(n_bytes + 1) for _ in range(2))
            what = chance.random()
            by_cache = False
            if what < 0.05:
                cache.evict([self.scene.names[key]] if key in self.scene.names else [])
            elif what < 0.15:
                store.prefetch(key, self.scene.identity(key))
            elif what < 0.2:
                _in_a_fork(self.scene, store, key)
            else:
                by_cache = self.scene.read(store, key, [ByteRange(start, end)] if what < 0.6 else None)
            with self.lock:
                self.n_reads += 1
                self.n_by_cache += by_cache


def _in_a_fork(scene: Scene, store, key: str) -> None:
    """A child of a process with threads: its leases and locks are its own, or it is wrong."""
    ended = ForkedChild(lambda tell: scene.read(store, key), with_threads=True).wait(FORK_DEADLINE_S)
    if ended.code:
        raise AssertionError(f"a forked child {'hung' if ended.hung else 'failed'} over {key}:\n{ended.error}")
