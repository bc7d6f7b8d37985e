"""The SQLite tables of the cache. Everything in them can be rebuilt from the files."""

from tiercache.catalog.accounts import (
    FIGURES,
    GHOSTS_SHARE,
    AccountChanges,
    Accounts,
    CacheFiles,
    CopyRow,
    charge_bytes,
)

__all__ = ["FIGURES", "GHOSTS_SHARE", "AccountChanges", "Accounts", "CacheFiles", "CopyRow", "charge_bytes"]
