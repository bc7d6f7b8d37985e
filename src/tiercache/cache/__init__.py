"""The local cache: a folder of shard copies with a size limit, shared by all processes of a machine.

`Cache` (`cache.py`) is the public class. `CachedStore` (same module) wraps a store: readers read through it and cannot
tell whether a cache is present.

A read takes this path: `CachedStore` names the copy (`names.py`); `session.CacheSession`, the cache as one process has
it open, looks for the copy in the folder (`folder.py`) and returns a lease on it (`fetch.py`). On a miss,
`fetch.FetchQueue` queues a fetch; `download.FetchRunner` takes the lock of the name, `eviction.Evictor` reserves space
in the accounts (`accounts.py`) and evicts other copies (`reading_plans.py` says when running jobs need each copy),
`download.Download` writes the bytes into a partial copy (`partial.py`), and the fetch runner verifies the complete copy
and gives it its final name.

With peers (`tiercache.peers`), a fetch reads from the machine that owns the copy, and then from the store.

`warm.py` fetches many copies, `check.py` verifies them, and `simulate.py` simulates policies.
`data/opened_version.CopyNames`, outside this package, names the copies of a version's shards. `locks.py` has the file
locks, and the owners: which processes have the cache open.
"""

from tiercache.cache.cache import Cache, CachedStore, Entry
from tiercache.cache.warm import WarmPlan, WarmProgress, WarmReport

__all__ = ["Cache", "CachedStore", "Entry", "WarmPlan", "WarmProgress", "WarmReport"]
