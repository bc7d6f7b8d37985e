"""The local cache: a folder of shard copies with a size limit, shared by all processes of a machine.

`Cache` (`cache.py`) is the public class. `CachedStore` (`store.py`) wraps a store: readers read through it and cannot
tell whether a cache is present.

A read takes this path: `store.CachedStore` names the copy (`record.py`); `opened.Opened`, the open cache of one
process, looks for the copy in the folder (`folder.py`) and returns a lease on it (`lease.py`). On a miss,
`fetch.Fetcher` queues a fetch; `publisher.Publisher` takes the lock of the name, `evictor.Evictor` reserves space
(`policy.py` chooses the copies to evict, `plans.py` says when running jobs need each copy), `download.Download` writes
the bytes into a partial copy (`partial.py`), and the publisher verifies the complete copy and gives it its final name.
`check.py` and `quarantine.py` handle wrong copies, `warm.py` fills the cache in advance, and `replay.py` simulates
policies.
"""

from tiercache.cache.admin import Entry, WarmPlan, WarmProgress, WarmReport
from tiercache.cache.cache import Cache, CachedStore, drop_objects

__all__ = ["Cache", "CachedStore", "Entry", "WarmPlan", "WarmProgress", "WarmReport", "drop_objects"]
