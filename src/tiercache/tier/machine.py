"""What this machine's rule file says of a tier, for who only reads: by its URL, without the models that check a file.

Building those takes 50 ms, which every process of a training would pay. A file that is wrong says nothing here.
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
class HereTier:
    """A tier as the file has it. url: of a local folder its whole path, without a "/" at the end."""

    role: str
    url: str
    capacity: str | int | None = None
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def limit_bytes(self) -> int | None:
        """What it may hold; None: as its disk has room. Raises ValueError, TypeError, OSError."""
        if self.capacity is None:
            return None
        return parse_bytes(self.capacity, whole_bytes=shutil.disk_usage(existing(self.url)).total)


def tier_above(url: str) -> HereTier | None:
    """The tier that has url or a folder above it; None: this machine's rule file names none, or there is no file."""
    steps = url.split("/")
    if ".." in steps or "." in steps:
        return None
    return next((tier for tier in _tiers() if f"{url.rstrip('/')}/".startswith(f"{tier.url}/")), None)


def existing(path: str) -> str:
    """The nearest folder upwards that there is."""
    return str(next(folder for folder in (Path(path), *Path(path).parents) if folder.is_dir()))


def _tiers() -> list[HereTier]:
    try:
        file = config.find_file(Path.cwd())
        tables = {} if file is None else config.parse_toml(file, config.read_bytes(file)).get("tiers", {})
        return [] if file is None else [_tier(name, table, file.parent) for name, table in tables.items()]
    except (ValueError, TypeError, AttributeError, OSError):
        return []


def _tier(name: str, table: dict[str, Any], folder: Path) -> HereTier:
    url = str(table["url"]) if "url" in table else ""
    if not url:
        raise ValueError(f"tiers.{name}.url: not given")
    whole = url.rstrip("/") if "://" in url else os.path.normpath(folder / Path(url).expanduser())
    return HereTier(table.get("role", name), whole, table.get("capacity"), dict(table.get("storage_options", {})))
