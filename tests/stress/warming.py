"""A process to be killed, which warms every object of SOURCE into CACHE.

    python -m tests.stress.warming PROGRESS SOURCE CACHE SIZE

PROGRESS gets a line when warming begins, one for each copy that came, and one at the end: who kills it knows where.
Reading takes a moment that differs from part to part, so that a kill at a random instant meets every step.
"""

import sys
import time
from pathlib import Path

from tests.support.stores import LatencyStore

from tiercache._native.checksum import crc32c
from tiercache.cache import Cache
from tiercache.model import ShardIdentity
from tiercache.store import LocalFolder


def identities(source: Path) -> list[tuple[str, ShardIdentity]]:
    found = []
    for path in sorted(source.iterdir()):
        data = path.read_bytes()
        found.append((path.name, ShardIdentity("d" * 32, path.name.encode().hex(), len(data), crc32c(data))))
    return found


def main(progress: str, source: str, cache_folder: str, size: str) -> None:
    wanted = identities(Path(source))
    with Path(progress).open("a") as file:
        warm(source, cache_folder, file, size, wanted)


def warm(source, cache_folder, file, size, wanted) -> None:
    store = LatencyStore(LocalFolder(source), seed=time.time_ns(), longest_s=0.03)
    print("begin", file=file, flush=True)
    with Cache(cache_folder, size=size, policy="lru", min_free=0) as cache:
        cache.warm(store, wanted, jobs=3, on_progress=lambda p: print(p.n_done, p.last, file=file, flush=True))
        print("warm", file=file, flush=True)
        stats = cache.stats()
        assert stats["bytes_used"] <= stats["limit_bytes"], stats
    print("end", file=file, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
