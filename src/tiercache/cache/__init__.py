"""The local cache: a folder of copies of objects with a size limit, shared by all processes of a machine.

`Cache` (`cache.py`) is the public class; its `CachedStore` wraps a store, and readers cannot tell whether it is there.

A read takes this path: `CachedStore` names the copy (`names.py`). `session.CacheSession`, the cache as one process has
it open, looks for it in the folder (`folder.py`) and returns a lease on it (`fetch.CopyLease`) with the open file
(`copy_file.CopyFile`). On a miss, the session runs a `fetch.Fetch` in one of its threads: it takes the lock of the
name, reserves space (`eviction.Evictor`, which evicts other copies; `reading_plans.py` says when running jobs need each
one; `accounts.py` keeps the bytes of all processes), writes what comes into a partial copy, verifies the complete copy
and gives it its final name. With peers (`tiercache.peers`), it reads from the machine that owns the copy.

`many_copies.py` warms and verifies many copies.
"""

from tiercache.cache.cache import Cache, CachedStore, Entry
from tiercache.cache.many_copies import WarmProgress

__all__ = ["Cache", "CachedStore", "Entry", "WarmProgress"]
