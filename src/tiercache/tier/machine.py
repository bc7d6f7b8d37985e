"""The tiers in this machine's rule file, for readers: found by URL, without the models that validate a rule file.

Building these models takes 50 ms, which every process of a training job would pay. An invalid rule file counts as none.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiercache import config
from tiercache.model import parse_bytes


@dataclass(frozen=True, slots=True)
class LocalTier:
    """A tier of the rule file. url: For a local folder, its absolute path without a "/" at the end."""

    role: str
    url: str
    capacity: str | int | None = None
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def limit_bytes(self) -> int | None:
        """Capacity in bytes; None: limited only by the disk. Raises ValueError, TypeError, OSError."""
        if self.capacity is None:
            return None
        return parse_bytes(self.capacity, whole_bytes=shutil.disk_usage(existing(self.url)).total)


def tier_above(url: str) -> LocalTier | None:
    """Return the tier at url or at a folder above it; None if this machine's rule file has none, or is missing."""
    steps = url.split("/")
    if ".." in steps or "." in steps:
        return None
    return next((tier for tier in _tiers() if f"{url.rstrip('/')}/".startswith(f"{tier.url}/")), None)


def existing(path: str) -> str:
    """Return the nearest existing folder, from path upwards."""
    return str(next(folder for folder in (Path(path), *Path(path).parents) if folder.is_dir()))


def _tiers() -> list[LocalTier]:
    try:
        file = config.find_file(Path.cwd())
        tables = {} if file is None else config.parse_toml(file, config.read_file(file)).get("tiers", {})
        return [] if file is None else [_tier(name, table, file.parent) for name, table in tables.items()]
    except (ValueError, TypeError, AttributeError, OSError):
        return []


def _tier(name: str, table: dict[str, Any], folder: Path) -> LocalTier:
    url = str(table["url"]) if "url" in table else ""
    if not url:
        raise ValueError(f"tiers.{name}.url: not given")
    whole = url.rstrip("/") if "://" in url else os.path.normpath(folder / Path(url).expanduser())
    return LocalTier(table.get("role", name), whole, table.get("capacity"), dict(table.get("storage_options", {})))
