"""Holds: pins with an end, kept beside the home, so that every mover of every machine sees them.

A hold protects groups, by path, like a pin of the rule file. `tiercache tier get` writes one for what it brings back.
Each hold is one object, which is never changed::

    _tiercache/holds/<32 hex digits>.json      paths, until_s, made_s, why

The newest hold of a path counts, also if it has ended: `tiercache tier get PATTERN --hold 0s` ends a hold. A run of the
mover removes the holds that no longer matter.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from tiercache.errors import NotFound, StoreError

if TYPE_CHECKING:
    from tiercache.store import Store

HOLDS_FOLDER = "_tiercache/holds/"
FORMAT, VERSION = "tiercache-hold", 1
# A million paths of 100 characters; a longer object was not written here.
_MOST_BYTES = 128 << 20
_THREADS = 8


@dataclass(frozen=True, slots=True)
class Hold:
    """A hold.

    Attributes:
        paths: Paths of the groups, below the URLs of the tiers.
        until_s: End, in seconds since the epoch.
        made_s: Time at which it was made, in seconds since the epoch.
        why: Reason, for people.
        key: Key of its object, below the home.
    """

    paths: tuple[str, ...]
    until_s: float
    made_s: float
    why: str
    key: str = ""

    @property
    def reason(self) -> str:
        until = datetime.fromtimestamp(self.until_s, UTC)
        return f"held until {until:%Y-%m-%dT%H:%MZ}: {self.why}"


class Holds:
    """The holds of a home at one time. Immutable and thread-safe."""

    def __init__(self, holds: Iterable[Hold], now_s: float) -> None:
        """Store the holds. now_s: Time at which they are evaluated, in seconds since the epoch."""
        self._now_s = now_s
        self._all = sorted(holds, key=lambda hold: (hold.made_s, hold.key))
        self._newest: dict[str, Hold] = {path: hold for hold in self._all for path in hold.paths}

    def __bool__(self) -> bool:
        return bool(self._newest)

    def of(self, path: str) -> Hold | None:
        hold = self._newest.get(path)
        return hold if hold is not None and hold.until_s > self._now_s else None

    def in_force(self) -> dict[str, Hold]:
        return {path: hold for path, hold in self._newest.items() if hold.until_s > self._now_s}

    @property
    def recalled(self) -> frozenset[str]:
        """Paths of all holds, also of those that have ended: a machine has recalled these groups."""
        return frozenset(self._newest)

    def obsolete(self, keep: Collection[str] = ()) -> tuple[str, ...]:
        """Return the keys of holds whose removal changes nothing: superseded, or ended with no older one in force.

        keep: Paths whose newest hold stays although it has ended.
        """
        shadowed = {
            path
            for hold in self._all
            for path in (hold.paths if hold.until_s > self._now_s else ())
            if self._newest[path] is not hold
        }
        needed = {*shadowed, *keep}
        stay = {hold.key for path, hold in self._newest.items() if hold.until_s > self._now_s or path in needed}
        return tuple(hold.key for hold in self._all if hold.key not in stay)


def put_hold(store: Store, paths: Iterable[str], *, until_s: float, now_s: float, why: str) -> Hold:
    """Write a hold beside the home. Raises StoreError. store: Store of the home tier. why: See Hold."""
    hold = Hold(tuple(sorted(set(paths))), until_s, now_s, why, f"{HOLDS_FOLDER}{secrets.token_hex(16)}.json")
    store.put(hold.key, encode_hold(hold))
    return hold


def read_holds(store: Store, now_s: float, keys: Sequence[str] | None = None) -> Holds:
    """Return the holds of a home. store: Store of the home tier. keys: Keys of the holds, if they were listed already.

    Raises StoreError if the store failed, or if a hold cannot be read: then nobody knows what it protects.
    """

    def read(key: str) -> Hold | None:
        with suppress(NotFound):  # removed since it was listed
            return decode_hold(store.get(key), key, url=store.url)
        return None

    if keys is None:
        keys = [info.key for info in store.list(HOLDS_FOLDER)]
    with ThreadPoolExecutor(_THREADS, "tiercache-holds") as pool:
        return Holds([hold for hold in pool.map(read, keys) if hold is not None], now_s)


def remove_obsolete_holds(store: Store, now_s: float, *, keep: Collection[str] = ()) -> None:
    """Remove the holds that no longer matter. Only the holder of the tier lock may call this. Raises StoreError.

    keep: Paths of groups with more than one copy. Their holds stay, because they alone tell a machine whose catalog
    lacks one of the copies that another machine has recalled it.
    """
    if obsolete := read_holds(store, now_s).obsolete(keep):
        store.delete(obsolete)


def encode_hold(hold: Hold) -> bytes:
    facts = {"made_s": hold.made_s, "until_s": hold.until_s, "why": hold.why, "paths": hold.paths}
    return json.dumps({"format": FORMAT, "version": VERSION, **facts}).encode() + b"\n"


def decode_hold(data: bytes, key: str, *, url: str) -> Hold:
    """Return the hold in an object. url: URL of the home, for errors. Raises StoreError for what is not a hold."""
    try:
        body: dict[str, Any] = json.loads(data[: _MOST_BYTES + 1])
        if body["format"] != FORMAT or body["version"] != VERSION:
            raise ValueError(f"expected {FORMAT} {VERSION}, found {body['format']} {body['version']}")
        paths = tuple(map(str, body["paths"]))
        hold = Hold(paths, float(body["until_s"]), float(body["made_s"]), str(body["why"]), key)
        if not math.isfinite(hold.made_s) or not 0 <= hold.until_s < _NEVER_S:
            raise ValueError("times that no clock has")
        return hold
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        message = f"this hold cannot be read, so what it protects is unknown: restore or remove it ({error})"
        raise StoreError(message, url=f"{url}/{key}") from error


_NEVER_S = 1e11  # the year 5138: a later time has no date
