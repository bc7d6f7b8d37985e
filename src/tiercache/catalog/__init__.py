"""The SQLite tables of the cache and of the tiers. Everything in them can be rebuilt from the files and stores.

`accounts` keeps the bytes, reservations and uses of a cache folder. `tiers` keeps verified copies, the move journal
and the log of uses of single objects. `database` shares one SQLite file between processes, and has private files.
"""

from tiercache.catalog.accounts import (
    FIGURES,
    GHOSTS_SHARE,
    AccountChanges,
    Accounts,
    CacheFiles,
    CopyRow,
    charge_bytes,
)
from tiercache.catalog.database import Database

__all__ = ["FIGURES", "GHOSTS_SHARE", "AccountChanges", "Accounts", "CacheFiles", "CopyRow", "Database", "charge_bytes"]
