"""Objects that are corrupt at their source: `poison/NAME.json`; for some minutes they are not fetched again."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tiercache.cache.names import NAME
from tiercache.catalog.database import read_text, replace_whole
from tiercache.crash_points import crash_point

if TYPE_CHECKING:
    from tiercache.cache.folder import Folder


# Long enough that an epoch does not fetch a corrupt shard for each of its blocks; short enough that a repaired shard is
# soon cached again.
POISON_S = 600.0


@dataclass(frozen=True, slots=True)
class CorruptSource:
    """An object whose bytes were wrong twice.

    Attributes:
        url: URL without credentials.
        expected: Expected CRC-32C of the whole object; None if unknown.
        found: CRC-32C that was found; None if only a part was fetched.
    """

    url: str
    expected: int | None
    found: int | None


def record_corrupt_source(folder: Folder, name: str, poison: CorruptSource) -> None:
    """Record that an object is corrupt at its source, and delete old records. Raises OSError."""
    crash_point("poison.found")
    replace_whole(folder.poison / f"{name}.json", json.dumps({"format": 0} | asdict(poison)) + "\n", folder.rights.file)
    crash_point("poison.noted")
    sweep_corrupt_sources(folder)


def corrupt_source_of(folder: Folder, name: str) -> CorruptSource | None:
    """Return what is known about a corrupt source of a copy; None: nothing, or the record is too old."""
    path = f"{folder.poison}/{name}.json"
    try:
        if not _is_young(os.lstat(path)):
            return None
        fields = json.loads(read_text(path))
        return CorruptSource(str(fields["url"]), _sum_or_none(fields["expected"]), _sum_or_none(fields["found"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sum_or_none(value: object) -> int | None:
    return None if value is None else int(str(value))


def corrupt_sources(folder: Folder) -> dict[str, CorruptSource]:
    """Return all objects that are known to be corrupt now, by the names of their copies, except those cached since."""
    found = {name: corrupt_source_of(folder, name) for name in _names(folder) if not folder.has_copy(name)}
    return {name: poison for name, poison in found.items() if poison is not None}


def forget_corrupt_source(folder: Folder, name: str) -> bool:
    """Allow an object to be fetched again; return False if it was not known to be corrupt."""
    return folder.remove_file("poison", f"{name}.json")


def sweep_corrupt_sources(folder: Folder) -> None:
    """Remove records that are too old."""
    for name in _names(folder):
        with suppress(FileNotFoundError):
            if not _is_young((folder.poison / f"{name}.json").lstat()):
                forget_corrupt_source(folder, name)


def _names(folder: Folder) -> list[str]:
    try:
        return [file.stem for file in folder.poison.iterdir() if file.suffix == ".json" and NAME.fullmatch(file.stem)]
    except OSError:
        return []


def _is_young(status: os.stat_result) -> bool:
    # The absolute value: after the clock was set back, a record must not stay valid for a year.
    return abs(time.time() - status.st_mtime) < POISON_S
