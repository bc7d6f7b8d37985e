"""Frozen values that cross the borders between layers, and the text forms of sizes and durations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OWN_FOLDER = "_tiercache/"
"""Folder of a data set or tier for the objects of tiercache itself: versions, segments, placements, the lock."""

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgtp", start=1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024), ("i", 1024))
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")
_MOST_BYTES = 1 << 62  # what SQLite and int64 hold, with room for sums
_PERCENT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def parse_bytes(size: int | str, *, whole_bytes: int | None = None) -> int:
    """Bytes of a size: an integer, or "8KB", "256MiB", or "80%" where whole_bytes is given.

    Raises:
        ValueError: the text is not a size, or it is negative, above 100 %, or more than any disk holds.
        TypeError: neither int nor str.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise TypeError(f"a size is an int (bytes) or a str such as '256MiB', got {size!r}")
    if isinstance(size, int):
        if size < 0:
            raise ValueError(f"a size cannot be negative, got {size}")
        return _possible(size, size)
    if (match := _PERCENT.fullmatch(size)) and whole_bytes is not None:
        if float(match[1]) > 100:
            raise ValueError(f"not a size: {size!r}; a share is 100% at most")
        return int(whole_bytes * float(match[1]) / 100)
    match = _SIZE.fullmatch(size)
    if match is None or match[2].lower() not in _UNITS:
        percent = ", '80%'" if whole_bytes is not None else ""
        raise ValueError(f"not a size: {size!r}; write bytes as an int, or '8KB', '256MiB', '2TB'{percent}")
    return _possible(float(match[1]) * _UNITS[match[2].lower()], size)


def _possible(n_bytes: float, size: int | str) -> int:
    """The number that a size says, if it may be one."""
    if n_bytes > _MOST_BYTES:
        raise ValueError(f"not a size: {size!r}; no disk holds more than 4 EiB")
    return int(n_bytes)


def parse_duration(text: int | float | str) -> float:
    """Seconds of a duration: a number (seconds), or "30s", "5m", "24h", "7d".

    Raises:
        ValueError: the text is not a duration.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        return float(text)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d|w)\s*", str(text))
    if match is None:
        raise ValueError(f"not a duration: {text!r}; write seconds as a number, or '30s', '5m', '24h', '7d'")
    return float(match[1]) * _SECONDS[match[2]]


def parse_bool(value: object) -> bool:
    """A bool, or the texts true, 1, yes, on, y and their opposites, in any case.

    Raises:
        ValueError: neither.
    """
    text = str(value).strip().lower()
    if text in ("true", "1", "yes", "on", "y"):
        return True
    if text in ("false", "0", "no", "off", "n"):
        return False
    raise ValueError(f"not true or false: {value!r}")


def format_bytes(n_bytes: float) -> str:
    """A size for people: "1.5 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n_bytes) < 1024 or unit == "TiB":
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return ""  # not reached: the loop ends at TiB


@dataclass(frozen=True, slots=True, order=True)
class ByteRange:
    """Half-open range of bytes [start, end)."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(f"a byte range needs 0 <= start <= end, got [{self.start}, {self.end})")

    @property
    def n_bytes(self) -> int:
        """Its length."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What a store says of an object; None where it does not say.

    modified_s: seconds since the epoch, by the store's clock.
    """

    key: str
    n_bytes: int
    etag: str | None = None
    version: str | None = None
    crc32c: int | None = None
    modified_s: float | None = None
    storage_class: str | None = None
    restore: str | None = None


@dataclass(frozen=True, slots=True)
class ShardIdentity:
    """What a shard *is*, wherever it lies: the key of every copy. Ids are lower-case hex."""

    dataset_id: str
    shard_id: str
    n_bytes: int
    crc32c: int


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A row of a data set's segment: one shard. name: relative to the data set's URL; crc32c: of the whole file.

    stats_json: per-column statistics as JSON text: {column: {"min":, "max":, "nulls":, "bytes":, "stored":}}.
    """

    name: str
    shard_id: str
    n_records: int
    n_bytes: int
    crc32c: int
    footer_offset: int
    footer_bytes: int
    stats_json: str = "{}"

    def identity(self, dataset_id: str) -> ShardIdentity:
        """The identity that the cache and the tiers key copies by."""
        return ShardIdentity(dataset_id, self.shard_id, self.n_bytes, self.crc32c)


@dataclass(frozen=True, slots=True)
class Part:
    """What a source reads of one data set. Equal parts, in equal order, are equal records in equal order.

    Attributes:
        dataset_id: the same for all versions.
        version: its number.
        fingerprint: of the version's contents.
        selection: hash of which records of it; None: all.
    """

    dataset_id: str
    version: int
    fingerprint: str
    selection: str | None = None


class Keeper(Protocol):
    """Keeps blocks of a data set that nobody reads yet."""

    def forget(self) -> None:
        """Let go of them. Repeatable, from any thread."""


# A position in a ReadingPlan that is not reached as far as it looks.
NEVER = 1 << 62


@dataclass(frozen=True, slots=True, eq=False)
class ReadingPlan:
    """When a job reads each shard, by its own clock: stored bytes of shards read since its epoch began.

    Attributes:
        owner: for people: "rank 0 of 2, epoch 3, seed 7".
        shards: int64[m], numbers of shards, each once, rising.
        first: int64[m], the clock when a shard is read first in this epoch; NEVER: not in this epoch.
        last: int64[m], the clock when it has been read for the last time in this epoch; NEVER with first.
        then: int64[m], the clock when it is read first in a later epoch; NEVER: not as far as was looked.
        reader: the same in all epochs of a rank that others read beside: what it reads next stays known for a while
            after its epoch, though it is gone. Empty: nothing of it stays.
    """

    owner: str
    shards: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    then: NDArray[np.int64]
    reader: str = ""


class Following(Protocol):
    """A published ReadingPlan, which others on the machine see while its owner lives. Safe from any thread."""

    def advance(self, clock: int) -> None:
        """Say how far the job is. Cheap: a write to memory."""

    def close(self) -> None:
        """Withdraw it. Repeatable."""
