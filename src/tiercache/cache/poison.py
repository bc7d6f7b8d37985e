"""Objects that are bad at their source: remembered for some minutes, so that nobody fetches them again and again."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from tiercache.cache.record import NAME
from tiercache.catalog.files import read_text, replace_whole
from tiercache.points import reach

if TYPE_CHECKING:
    from tiercache.cache.folder import Folder

# Long enough that an epoch does not fetch a bad shard for each of its blocks, short enough that a repaired one is soon
# cached again.
POISON_S = 600.0


@dataclass(frozen=True, slots=True)
class Poison:
    """An object whose bytes were wrong twice.

    url: without credentials; expected, found: CRC-32C of the whole, None where nobody knows it, or only a part came.
    """

    url: str
    expected: int | None
    found: int | None


def remember(folder: Folder, name: str, poison: Poison) -> None:
    """Note that an object is bad at its source; old notes go. Raises OSError."""
    reach("poison.found")
    replace_whole(folder.poison / f"{name}.json", json.dumps({"format": 0} | asdict(poison)) + "\n", folder.rights.file)
    reach("poison.noted")
    sweep(folder)


def poison_of(folder: Folder, name: str) -> Poison | None:
    """What is known to be wrong with the source of a copy; None: nothing, or it was long ago."""
    path = f"{folder.poison}/{name}.json"
    try:
        if not _is_young(os.lstat(path)):
            return None
        fields = json.loads(read_text(path))
        return Poison(str(fields["url"]), _sum_or_none(fields["expected"]), _sum_or_none(fields["found"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sum_or_none(value: object) -> int | None:
    return None if value is None else int(str(value))


def poisons(folder: Folder) -> dict[str, Poison]:
    """All objects that are known to be bad now, by the names of their copies; not those that came right since."""
    found = {name: poison_of(folder, name) for name in _names(folder) if not folder.has_copy(name)}
    return {name: poison for name, poison in found.items() if poison is not None}


def forget(folder: Folder, name: str) -> bool:
    """Let an object be fetched again; False: it was not known to be bad."""
    return folder.remove_file("poison", f"{name}.json")


def sweep(folder: Folder) -> None:
    """Remove notes that hold no more."""
    for name in _names(folder):
        with suppress(FileNotFoundError):  # another process swept it
            if not _is_young((folder.poison / f"{name}.json").lstat()):
                forget(folder, name)


def _names(folder: Folder) -> list[str]:
    try:
        return [file.stem for file in folder.poison.iterdir() if file.suffix == ".json" and NAME.fullmatch(file.stem)]
    except OSError:
        return []


def _is_young(status: os.stat_result) -> bool:
    # Both ways: a clock that was set back must not make a note hold for a year.
    return abs(time.time() - status.st_mtime) < POISON_S
