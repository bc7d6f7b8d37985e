"""SQLite tables: what the cache and the tiers keep account of. Everything in them can be rebuilt from the files."""

from tiercache.catalog.accounts import GHOSTS_SHARE, Accounts, Files, charge_bytes
from tiercache.catalog.database import Database
from tiercache.catalog.tables import FIGURES, Changes, CopyRow

__all__ = ["FIGURES", "GHOSTS_SHARE", "Accounts", "Changes", "CopyRow", "Database", "Files", "charge_bytes"]
