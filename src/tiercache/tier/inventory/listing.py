"""Lists all tiers in parallel into columns: 1,000,000 objects take about 150 MB."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tiercache.errors import StoreError
from tiercache.model import ObjectInfo
from tiercache.tier.stores import state_of
from tiercache.tier.text_columns import as_numpy

if TYPE_CHECKING:
    from tiercache.tier.rules import RuleFile
    from tiercache.tier.stores import Stores

# Callback (tier, number of its objects listed so far), called from several threads.
ListingProgress: TypeAlias = Callable[[str, int], None]

NO_CRC = -1
# Rows that are Python objects at a time, few enough for the processor's cache: 16,384 took 1.5 times as long.
_BATCH = 1 << 10
_LARGE = pa.large_string()
_COLUMNS = {
    "key": _LARGE,
    "etag": _LARGE,
    "tier": pa.int8(),
    "n_bytes": pa.int64(),
    "modified_s": pa.float64(),
    "crc32c": pa.int64(),
    "storage_class": _LARGE,
    "restore": _LARGE,
}


@dataclass(frozen=True, slots=True, eq=False)
class Listing:
    """The objects of all tiers. Row i of every column is one object."""

    tiers: tuple[int, ...]  # numbers of the tiers that were listed
    unlisted: tuple[str, ...]  # names of the tiers that could not be listed
    classes: tuple[str, ...]  # names of storage classes; "" is the store's default
    keys: pa.Array  # large_string
    etags: pa.Array  # large_string, null where the store gives none
    tier: NDArray[np.int8]
    n_bytes: NDArray[np.int64]
    modified_s: NDArray[np.float64]  # where the store gives none, the time of the listing, the latest time possible
    crc32c: NDArray[np.int64]  # NO_CRC where it is unknown
    storage_class: NDArray[np.int16]  # indices of `classes`
    state: NDArray[np.uint8]  # READABLE, ARCHIVED, RESTORING or RESTORED

    def __len__(self) -> int:
        return len(self.keys)


def list_tiers(
    file: RuleFile,
    stores: Stores,
    *,
    now_s: float,
    on_progress: ListingProgress | None = None,
    may_miss: Collection[str] = (),
) -> Listing:
    """List all tiers; tiers with the same URL share one listing, which one thread makes.

    may_miss: Tiers that are left out if they cannot be listed. Raises StoreError if another tier cannot be listed.
    """
    stop = Event()
    unlisted: set[str] = set()

    def batches(names: tuple[str, ...]) -> list[pa.RecordBatch]:
        """List the URL of these tiers; empty if it cannot be listed and may be left out."""
        n_objects = dict.fromkeys(names, 0)
        found = []
        try:
            for batch in _batches(file, stores, names):
                found.append(_columns(batch, now_s))
                numbers = [number for number, _ in batch]
                for name in names:
                    n_objects[name] += numbers.count(file.index(name))
                    if on_progress is not None:
                        on_progress(name, n_objects[name])
                if stop.is_set():
                    break
        except StoreError:
            if not set(names).issubset(may_miss):
                stop.set()
                raise
            unlisted.update(names)
            return []
        return found

    urls = list(dict.fromkeys(stores.sharing(tier.name) for tier in file.tiers))
    with ThreadPoolExecutor(len(urls), "tiercache-listing") as pool:
        parts = [batch for some in pool.map(batches, urls) for batch in some]
    return _joined(file, pa.Table.from_batches(parts, pa.schema(_COLUMNS)), now_s, unlisted)


def _batches(file: RuleFile, stores: Stores, names: tuple[str, ...]) -> Iterator[list[tuple[int, ObjectInfo]]]:
    """Yield the objects at the URL of these tiers, each with the number of its tier; the last batch may be empty."""
    numbers = {name: file.index(name) for name in names}
    archive = stores.s3_classes(names[0])
    batch = []
    for info in stores.store(names[0]).list() if archive is None else archive.list():
        name = names[0] if len(names) == 1 else stores.tier_of(names, info)
        batch.append((numbers[name], info))
        if len(batch) == _BATCH:
            yield batch
            batch = []
    yield batch


def _columns(batch: list[tuple[int, ObjectInfo]], now_s: float) -> pa.RecordBatch:
    infos = [info for _, info in batch]
    columns = [
        keys_of(infos),
        pa.array([info.etag for info in infos], _LARGE),
        pa.array([number for number, _ in batch], pa.int8()),
        pa.array([info.n_bytes for info in infos], pa.int64()),
        pa.array([now_s if info.modified_s is None else info.modified_s for info in infos], pa.float64()),
        pa.array([NO_CRC if info.crc32c is None else info.crc32c for info in infos], pa.int64()),
        pa.array([info.storage_class or "" for info in infos], _LARGE),
        pa.array([info.restore or "" for info in infos], _LARGE),
    ]
    return pa.record_batch(columns, pa.schema(_COLUMNS))


def _joined(file: RuleFile, table: pa.Table, now_s: float, unlisted: Collection[str]) -> Listing:
    pairs = pc.binary_join_element_wise(table["storage_class"], table["restore"], pa.scalar("\n", _LARGE))
    pair = pairs.combine_chunks().dictionary_encode()
    words = [word.split("\n", 1) for word in pair.dictionary.to_pylist()]
    code = as_numpy(pair.indices, np.int64)
    classes = ["", *sorted({storage_class for storage_class, _ in words} - {""})]
    class_of = [classes.index(storage_class) for storage_class, _ in words]
    states = [state_of(ObjectInfo("", 0, storage_class=word[0], restore=word[1]), now_s) for word in words]
    return Listing(
        tiers=tuple(number for number, tier in enumerate(file.tiers) if tier.name not in unlisted),
        unlisted=tuple(tier.name for tier in file.tiers if tier.name in unlisted),
        classes=tuple(classes),
        keys=table["key"].combine_chunks(),
        etags=table["etag"].combine_chunks(),
        tier=as_numpy(table["tier"], np.int8),
        n_bytes=as_numpy(table["n_bytes"], np.int64),
        modified_s=as_numpy(table["modified_s"], np.float64),
        crc32c=as_numpy(table["crc32c"], np.int64),
        storage_class=np.array(class_of, np.int16)[code],
        state=np.array(states, np.uint8)[code],
    )


def keys_of(infos: Sequence[ObjectInfo]) -> pa.Array:
    """Return the keys as large_string. File names that are not UTF-8 get backslashes, which no valid key contains."""
    keys = [info.key for info in infos]
    try:
        return pa.array(keys, pa.large_string())
    except UnicodeEncodeError:
        return pa.array([key.encode(errors="backslashreplace").decode() for key in keys], pa.large_string())


@dataclass(frozen=True, slots=True, eq=False)
class ObjectTable:
    """The objects of some copies, as row numbers of columns that contain other objects too."""

    start: NDArray[np.int64]  # [n + 1], offsets of each copy's objects in row and crc32c
    row: NDArray[np.int64]  # row of each object in the columns below
    crc32c: NDArray[np.int64]  # of each object; NO_CRC where it is unknown
    keys: pa.Array  # large_string
    etags: pa.Array  # large_string, null where there is none
    n_bytes: NDArray[np.int64]
    modified_s: NDArray[np.float64]  # NaN where it is unknown

    def bytes_of_copies(self) -> NDArray[np.int64]:
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
