"""The SQLite tables of the cache and of the tiers. Everything in them can be rebuilt from the files and stores.

`accounts` keeps the bytes, reservations and uses of a cache folder; `tables` has its SQL. `tiers` keeps verified copies
and the journal of moves; `checksums` holds them in columns. `database` shares one SQLite file between processes.
`read_log` logs uses of single objects. `files` opens private files safely.
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
