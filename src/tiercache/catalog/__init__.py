"""SQLite tables: what the cache and the tiers keep account of. Everything in them can be rebuilt from the files."""

from tiercache.catalog.accounts import Accounts, CopyRow, Files, charge_bytes
from tiercache.catalog.database import Database

__all__ = ["Accounts", "CopyRow", "Database", "Files", "charge_bytes"]
