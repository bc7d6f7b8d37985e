"""Frozen values that cross layer borders, and the text forms of sizes and durations."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OWN_FOLDER = "_tiercache/"
"""Folder in a data set or tier that holds tiercache's own objects: versions, segments, placements, the lock."""

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgtp", start=1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024), ("i", 1024))
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*")
_MOST_BYTES = 1 << 62  # fits SQLite and int64, with room for sums
_PERCENT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*%\s*")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def parse_bytes(size: int | str, *, whole_bytes: int | None = None) -> int:
    """Return a size in bytes, given as a number or as a text such as "8KB" or "256MiB". Raises ValueError, TypeError.

    whole_bytes: Bytes that 100% stands for, in a text such as "80%"; None: percentages are not allowed.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise TypeError(f"a size is an int (bytes) or a str such as '256MiB', got {size!r}")
    if isinstance(size, int):
        if size < 0:
            raise ValueError(f"a size cannot be negative, got {size}")
        return _possible(size, size)
    if (match := _PERCENT.fullmatch(size)) and whole_bytes is not None:
        if float(match[1]) > 100:
            raise ValueError(f"not a size: {size!r}; a percentage is at most 100%")
        return int(whole_bytes * float(match[1]) / 100)
    match = _SIZE.fullmatch(size)
    if match is None or match[2].lower() not in _UNITS:
        percent = ", '80%'" if whole_bytes is not None else ""
        raise ValueError(f"not a size: {size!r}; write bytes as an int, or '8KB', '256MiB', '2TB'{percent}")
    return _possible(float(match[1]) * _UNITS[match[2].lower()], size)


def _possible(n_bytes: float, size: int | str) -> int:
    """Return the size as an int. Raises ValueError if it is above the limit."""
    if n_bytes > _MOST_BYTES:
        raise ValueError(f"not a size: {size!r}; the maximum is 4 EiB")
    return int(n_bytes)


def parse_duration(text: int | float | str) -> float:
    """Return a duration in seconds, from a number of seconds or a text such as "30s", "24h". Raises ValueError."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        return float(text)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(ms|s|m|h|d|w)\s*", str(text))
    if match is None:
        raise ValueError(f"not a duration: {text!r}; write a number with a unit: '30s', '5m', '24h', '7d'")
    return float(match[1]) * _SECONDS[match[2]]


def parse_bool(value: object) -> bool:
    """Return the truth value of a bool or of a text: true, 1, yes, on, y and their opposites. Raises ValueError."""
    text = str(value).strip().lower()
    if text in ("true", "1", "yes", "on", "y"):
        return True
    if text in ("false", "0", "no", "off", "n"):
        return False
    raise ValueError(f"not true or false: {value!r}")


def format_bytes(n_bytes: float) -> str:
    """Return a size as text for people: "1.5 MiB"."""
    if abs(n_bytes) < 1024:
        return f"{n_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        n_bytes /= 1024
        if abs(n_bytes) < 1024:
            return f"{n_bytes:.1f} {unit}"
    return f"{n_bytes / 1024:.1f} TiB"


def short_repr(options: Any) -> str:
    """Return the repr() of a dataclass's instance with only those fields that differ from their defaults."""
    required = [field.name for field in fields(options) if field.default is MISSING]
    plain = type(options)(**{name: getattr(options, name) for name in required})  # which may convert its defaults
    given = [(field.name, getattr(options, field.name)) for field in fields(options)]
    changed = [f"{name}={value!r}" for name, value in given if name in required or value != getattr(plain, name)]
    return f"{type(options).__name__}({', '.join(changed)})"


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
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """Metadata of an object as its store reports it; None for a field that the store does not report."""

    key: str
    n_bytes: int
    etag: str | None = None
    version: str | None = None
    crc32c: int | None = None  # of the whole object
    modified_s: float | None = None  # by the store's clock, in seconds since the Unix epoch
    storage_class: str | None = None
    restore: str | None = None  # state of a restore from archive storage, as the store reports it


@dataclass(frozen=True, slots=True)
class ShardIdentity:
    """Identity of a shard, independent of its location; the key of every copy of the shard. Ids are lower-case hex.

    A file of another library's layout has an identity made of its URL, size and ETag, and no known CRC-32C. etag: Its
    ETag, or another text that begins with "W/"; None for a shard, which has checksums inside.
    """

    dataset_id: str
    shard_id: str
    n_bytes: int
    crc32c: int | None
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One shard: a row of a segment of a data set."""

    name: str  # key relative to the data set's URL
    shard_id: str  # lower-case hex
    n_records: int
    n_bytes: int
    crc32c: int  # of the whole file
    footer_offset: int
    footer_bytes: int

    def identity(self, dataset_id: str) -> ShardIdentity:
        """Return the identity by which the cache and the tiers key copies of the shard."""
        return ShardIdentity(dataset_id, self.shard_id, self.n_bytes, self.crc32c)


@dataclass(frozen=True, slots=True)
class SourcePart:
    """Records that a source reads from one data set. Equal parts in equal order are equal records in equal order."""

    dataset_id: str
    version: int
    fingerprint: str
    selection: str | None = None  # hash of the selected records; None: all records


# Clock value in a ReadingPlan for a read that does not happen within the planned horizon.
NEVER = 1 << 62


@dataclass(frozen=True, slots=True, eq=False)
class ReadingPlan:
    """When a job reads each shard, by the job's clock: stored bytes of shards read since its epoch began.

    reader: Id that is the same in all epochs of a rank if other ranks read the same shards: its next reads stay
    published for a while after its epoch has ended. Empty: nothing stays published.
    """

    owner: str  # for people: "rank 0 of 2, epoch 3, seed 7"
    shards: NDArray[np.int64]  # [m], each once, ascending
    first: NDArray[np.int64]  # [m], clock of the first read in this epoch; NEVER if there is none
    last: NDArray[np.int64]  # [m], clock at which it has been read for the last time in this epoch, or NEVER
    first_later: NDArray[np.int64]  # [m], clock of the first read in a later epoch; NEVER beyond the horizon
    reader: str = ""


class PublishedPlan(Protocol):
    """Published ReadingPlan, visible to other processes of the machine while its owner lives. Safe from any thread."""

    def advance(self, clock: int) -> None:
        """Set the job's clock. The call is cheap: one write to memory."""

    def close(self) -> None:
        """Withdraw the plan. May be called repeatedly."""
