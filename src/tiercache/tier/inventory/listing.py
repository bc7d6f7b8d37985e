"""Lists all tiers in parallel into columns: 1,000,000 objects take about 150 MB."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tiercache.errors import StoreError
from tiercache.model import ObjectInfo
from tiercache.tier.stores import state_of

if TYPE_CHECKING:
    from tiercache.tier.rules import RuleFile
    from tiercache.tier.stores import Stores

# Callback (tier, number of its objects listed so far), called from several threads.
Progress: TypeAlias = Callable[[str, int], None]

NO_CRC = -1
# Rows that are Python objects at a time, few enough for the processor's cache: 16,384 took 1.5 times as long.
_BATCH = 1 << 10


@dataclass(frozen=True, slots=True, eq=False)
class Listing:
    """The objects of all tiers. Row i of every column is one object.

    Attributes:
        tiers: Numbers of the tiers that were listed.
        missed: Names of the tiers that could not be listed.
        classes: Names of storage classes; "" is the store's default.
        keys: large_string[n].
        etags: large_string[n], null where the store gives none.
        tier: int8[n].
        n_bytes: int64[n].
        modified_s: float64[n]; where the store gives none, the time of the listing, the latest time possible.
        crc32c: int64[n], NO_CRC where it is unknown.
        storage_class: int16[n], indices of `classes`.
        state: uint8[n], READABLE, ARCHIVED, RESTORING or RESTORED.
    """

    tiers: tuple[int, ...]
    missed: tuple[str, ...]
    classes: tuple[str, ...]
    keys: pa.Array
    etags: pa.Array
    tier: NDArray[np.int8]
    n_bytes: NDArray[np.int64]
    modified_s: NDArray[np.float64]
    crc32c: NDArray[np.int64]
    storage_class: NDArray[np.int16]
    state: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.keys)


def list_tiers(
    file: RuleFile,
    stores: Stores,
    *,
    now_s: float,
    on_progress: Progress | None = None,
    may_miss: Collection[str] = (),
) -> Listing:
    """List all tiers; tiers with the same URL share one listing.

    Args:
        file: Rule file.
        stores: Stores of its tiers.
        now_s: Current time, in seconds since the epoch.
        on_progress: See Progress.
        may_miss: Tiers that are left out if they cannot be listed.

    Raises:
        StoreError: A tier that is not in may_miss cannot be listed.
    """
    work = _Work(file, stores, now_s, on_progress or _say_nothing, frozenset(may_miss))
    places = [shared for shared in map(stores.sharing, (tier.name for tier in file.tiers)) if shared]
    once = list(dict.fromkeys(places))
    with ThreadPoolExecutor(max(len(once), 1), "tiercache-listing") as pool:
        parts = list(pool.map(work.place, once))
    return _joined(file, [part for part in parts if part is not None], sorted(work.missed), work.words)


def keys_of(infos: Sequence[ObjectInfo]) -> pa.Array:
    """Return the keys as large_string. File names that are not UTF-8 get backslashes, which no valid key contains."""
    keys = [info.key for info in infos]
    try:
        return pa.array(keys, pa.large_string())
    except UnicodeEncodeError:
        return pa.array([key.encode(errors="backslashreplace").decode() for key in keys], pa.large_string())


@dataclass(frozen=True, slots=True, eq=False)
class ObjectTable:
    """The objects of some copies, as row numbers of columns that contain other objects too.

    Attributes:
        start: int64[n + 1], offsets of each copy's objects in row and crc32c.
        row: int64[m], row of each object in the columns below.
        crc32c: int64[m], NO_CRC where it is unknown.
        keys: large_string[k].
        etags: large_string[k], null where there is none.
        n_bytes: int64[k].
        modified_s: float64[k], NaN where it is unknown.
    """

    start: NDArray[np.int64]
    row: NDArray[np.int64]
    crc32c: NDArray[np.int64]
    keys: pa.Array
    etags: pa.Array
    n_bytes: NDArray[np.int64]
    modified_s: NDArray[np.float64]

    def bytes_of_copies(self) -> NDArray[np.int64]:
        """Return the total size of each copy's objects; int64[n]."""
        sums = np.concatenate([[0], np.cumsum(self.n_bytes[self.row])])
        return np.asarray(sums[self.start[1:]] - sums[self.start[:-1]], np.int64)

    def named(self, start: int, end: int) -> Iterator[tuple[str, int, str | None, float | None, int | None]]:
        """Yield (key, n_bytes, etag, modified_s, crc32c) of each object of the copies from start to end."""
        part = slice(*self.start[[start, end]].tolist())
        row = self.row[part]
        return zip(
            self.keys.take(pa.array(row)).to_pylist(),
            self.n_bytes[row].tolist(),
            self.etags.take(pa.array(row)).to_pylist(),
            [None if time_s != time_s else time_s for time_s in self.modified_s[row].tolist()],
            [None if crc == NO_CRC else crc for crc in self.crc32c[part].tolist()],
            strict=True,
        )


def release_memory() -> None:
    """Return free memory to the system: Arrow and the C library keep freed memory for reuse."""
    # The next stage cannot reuse all of it: 200 MB per million objects stayed idle. The second call trims malloc.
    pa.default_memory_pool().release_unused()
    pa.system_memory_pool().release_unused()


def _say_nothing(tier: str, n_objects: int) -> None:
    del tier, n_objects


class _Words:
    """Distinct pairs of storage class and restore state. The lock guards the table."""

    def __init__(self, now_s: float) -> None:
        self._lock, self._now_s = Lock(), now_s
        self.numbers: dict[tuple[str | None, str | None], int] = {}
        self.states: list[int] = []

    def number(self, info: ObjectInfo) -> int:
        word = info.storage_class, info.restore
        found = self.numbers.get(word)
        if found is not None:
            return found
        with self._lock:
            if word not in self.numbers:
                self.states.append(state_of(info, self._now_s))
                self.numbers[word] = len(self.numbers)
            return self.numbers[word]


@dataclass(slots=True, eq=False)
class _Part:
    """Columns of one location, one chunk per batch."""

    tiers: tuple[int, ...]
    columns: list[tuple[pa.Array, pa.Array, NDArray[np.int8], NDArray[np.int64], NDArray[np.float64]]]
    rest: list[tuple[NDArray[np.int64], NDArray[np.int32]]] = field(default_factory=list)


class _Work:
    """One listing of all locations. Each location is listed by one thread; `words` has a lock."""

    def __init__(
        self, file: RuleFile, stores: Stores, now_s: float, on_progress: Progress, may_miss: frozenset[str]
    ) -> None:
        self.file, self.stores, self.now_s, self.on_progress, self.may_miss = file, stores, now_s, on_progress, may_miss
        self.words = _Words(now_s)
        self.missed: list[str] = []
        self._stop = Event()

    def place(self, names: tuple[str, ...]) -> _Part | None:
        """List the location of these tiers; None: it could not be listed and may be left out."""
        try:
            return self._listed(names)
        except StoreError:
            if not self.may_miss.issuperset(names):
                self._stop.set()
                raise
            self.missed.extend(names)
            return None

    def _listed(self, names: tuple[str, ...]) -> _Part:
        numbers = {name: self.file.index(name) for name in names}
        part, batch, n_objects = _Part(tuple(numbers.values()), []), [], dict.fromkeys(names, 0)
        for info in self._objects(names[0]):
            name = names[0] if len(names) == 1 else self.stores.tier_of(names, info)
            n_objects[name] += 1
            batch.append((numbers[name], info))
            if len(batch) == _BATCH:
                self._add(part, batch)
                batch = []
                if self._stop.is_set():
                    break
                self._tell(n_objects)
        self._add(part, batch)
        self._tell(n_objects)
        return part

    def _tell(self, n_objects: dict[str, int]) -> None:
        for name, n in n_objects.items():
            self.on_progress(name, n)

    def _objects(self, name: str) -> Iterator[ObjectInfo]:
        archive = self.stores.archive(name)
        return self.stores.store(name).list() if archive is None else archive.list()

    def _add(self, part: _Part, batch: list[tuple[int, ObjectInfo]]) -> None:
        infos = [info for _, info in batch]
        part.columns.append(
            (
                keys_of(infos),
                pa.array([info.etag for info in infos], pa.large_string()),
                np.array([number for number, _ in batch], np.int8),
                np.array([info.n_bytes for info in infos], np.int64),
                np.array([self.now_s if i.modified_s is None else i.modified_s for i in infos], np.float64),
            )
        )
        crcs = np.array([NO_CRC if info.crc32c is None else info.crc32c for info in infos], np.int64)
        part.rest.append((crcs, np.array([self.words.number(info) for info in infos], np.int32)))


def _joined(file: RuleFile, parts: list[_Part], missed: list[str], words: _Words) -> Listing:
    columns = [column for part in parts for column in part.columns]
    rest = [column for part in parts for column in part.rest]
    classes = ["", *sorted({name for name, _ in words.numbers if name})]
    class_of = np.array([classes.index(name or "") for name, _ in words.numbers], np.int16)
    word = np.concatenate([np.empty(0, np.int32), *(column[1] for column in rest)])
    empty = pa.array([], pa.large_string())
    return Listing(
        tiers=tuple(sorted(number for part in parts for number in part.tiers)),
        missed=tuple(tier.name for tier in file.tiers if tier.name in missed),
        classes=tuple(classes),
        keys=pa.concat_arrays([empty, *(column[0] for column in columns)]),
        etags=pa.concat_arrays([empty, *(column[1] for column in columns)]),
        tier=np.concatenate([np.empty(0, np.int8), *(column[2] for column in columns)]),
        n_bytes=np.concatenate([np.empty(0, np.int64), *(column[3] for column in columns)]),
        modified_s=np.concatenate([np.empty(0, np.float64), *(column[4] for column in columns)]),
        crc32c=np.concatenate([np.empty(0, np.int64), *(column[0] for column in rest)]),
        storage_class=class_of[word],
        state=np.array(words.states, np.uint8)[word],
    )
