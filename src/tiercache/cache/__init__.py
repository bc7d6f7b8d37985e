"""The local cache: a budgeted folder of copies, shared by all processes of a machine; its face is a store."""

from tiercache.cache.admin import Entry
from tiercache.cache.cache import Cache
from tiercache.cache.store import CachedStore
from tiercache.cache.warm import WarmPlan, WarmProgress, WarmReport

__all__ = ["Cache", "CachedStore", "Entry", "WarmPlan", "WarmProgress", "WarmReport"]
