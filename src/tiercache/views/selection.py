"""Selections: the records of a source that a view has, and the protocols of sources that can be read record by record.

A selection is runs of record numbers and their served order. The module also maps the rows of a selection to rows of
stored blocks, and writes the files by which large selections reach other processes.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import secrets
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from tiercache.errors import NotFound
from tiercache.load.source import Source

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    from tiercache.cache import Cache, WarmProgress
    from tiercache.shard.format.statistics import Statistics
    from tiercache.shard.read.values import ColumnValues
    from tiercache.shard.schema import Schema


class SourceSpec(Protocol):
    """Small picklable spec of a source: everything needed to open it, and nothing that is open."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the served columns, in order."""

    @property
    def versions(self) -> tuple[int, ...]:
        """Version number of each data set that is read."""

    def open(self, opened: dict[int, Any]) -> Readable:
        """Open the source.

        Args:
            opened: Sources that this call has already opened, by id() of their specs. They are shared.
        """


@runtime_checkable
class VersionHandle(Protocol):
    """One opened version below a source, where its counters are kept."""

    @property
    def url(self) -> str:
        """URL of the data set, without credentials."""

    @property
    def cache(self) -> Cache | None:
        """Cache that the version is read through; None: no cache."""

    def figures(self) -> Mapping[str, float]:
        """See Source.figures."""

    def versions(self) -> list[int]:
        """Return the numbers of all versions of the data set, oldest first."""

    def close(self) -> None:
        """See Readable.close."""


class Readable(Source, Protocol):
    """Source with what reading by index, filters and warming need. All methods may be called from any thread."""

    def at_versions(self, versions: Sequence[int]) -> Readable:
        """See Source.at_versions."""

    @property
    def spec(self) -> SourceSpec:
        """Spec that opens the source again."""

    @property
    def n_records(self) -> int:
        """Number of records that are served."""

    @property
    def first_record(self) -> NDArray[np.int64]:
        """int64[n_shards + 1]: number of each shard's first record in stored order, then the number of all records."""

    @property
    def is_in_stored_order(self) -> bool:
        """Whether served record i is record i of the concatenated shards."""

    @property
    def stored_schema(self) -> Schema:
        """All stored columns, served or not."""

    @property
    def opened_versions(self) -> tuple[VersionHandle, ...]:
        """Opened versions below the source, each once."""

    def statistics(self, shard: int) -> Statistics:
        """Return the statistics of a shard's columns: {column: {"nulls", "bytes", "stored", "min", "max"}}.

        Any entry may be missing. Entries have been checked for plausibility.

        Raises:
            CorruptShard: A value is impossible; the message names the segment, the shard, the column and the field.
        """

    def arrays(self, shard: int, block: int) -> list[pa.Array]:
        """Return a whole stored block as Arrow arrays of the served columns, completely checked."""

    def record(self, number: int) -> dict[str, Any] | None:
        """Return a served record as a dict of values by column; None if it is not mapped: then call `values`.

        Raises:
            IndexError: There is no such record.
        """

    def values(self, records: NDArray[np.int64]) -> list[ColumnValues]:
        """Return the values of served records, int64[n], by column. Raises as `load`, and IndexError."""

    def take_arrow(self, records: NDArray[np.int64]) -> list[pa.Array]:
        """Return the values of records as Arrow arrays; see `values`."""

    def with_columns(self, columns: Sequence[str]) -> Readable:
        """Return the same records with other columns of the stored schema. Raises SchemaError for an unknown column."""

    def for_scan(self, columns: Sequence[str]) -> Readable:
        """Return a source as `with_columns` does, for a single pass: shards that are not cached bypass the cache."""

    def warm(
        self, shards: Sequence[int], *, jobs: int, on_progress: Callable[[WarmProgress], None] | None = None
    ) -> None:
        """Fetch the served columns of shards into the cache.

        Args:
            shards: Numbers of the shards.
            jobs: Number of shards fetched in parallel.
            on_progress: Function called after each shard.
        """

    def close(self) -> None:
        """Release shards and connections. The source may be used again afterwards."""


if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Sequence[NDArray[np.int64] | None]

PREFIX = "tiercache-selection-"
_TOKEN_BYTES = 16

_lock = threading.Lock()


def _after_fork() -> None:
    global _lock  # a thread of the parent may hold it for ever
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


class Spool:
    """File of some arrays, written on the first request for its ticket and removed with this object. Thread-safe."""

    def __init__(self) -> None:
        self._file: _File | None = None

    def ticket(self, arrays: Arrays) -> tuple[Any, ...] | None:
        """Return plain values by which `restore` finds the arrays; None if no file can be written.

        A forked child writes its own file, because the parent may remove its file at any time.

        Args:
            arrays: Arrays to pass on; the same ones in each call.
        """
        with _lock:  # two threads that pickle at once share one file
            if self._file is None or self._file.pid != os.getpid():
                _sweep()
                try:
                    self._file = _write(arrays)
                except OSError:  # a full disk makes pickles large, not wrong
                    return None
            return self._file.ticket


class _File:
    """File that this process has written and removes."""

    def __init__(self, path: Path, fd: int, ticket: tuple[Any, ...]) -> None:
        self.ticket = ticket
        self.pid = os.getpid()
        weakref.finalize(self, _remove, path, fd, self.pid)


def restore(ticket: tuple[Any, ...]) -> list[NDArray[np.int64] | None]:
    """Return the arrays of a ticket, mapped read-only; they stay valid after the file is removed.

    Raises:
        NotFound: The file is gone, or another file has its name.
    """
    path, token, lengths = ticket
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _gone(path, lengths) from error
    try:
        n_bytes = _TOKEN_BYTES + sum(8 * n for n in lengths if n is not None)
        if os.fstat(fd).st_size != n_bytes or os.pread(fd, _TOKEN_BYTES, 0) != token:
            raise _gone(path, lengths)
        memory = mmap.mmap(fd, n_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
    arrays: list[NDArray[np.int64] | None] = []
    offset = _TOKEN_BYTES
    for n in lengths:
        arrays.append(None if n is None else np.frombuffer(memory, np.int64, n, offset))
        offset += 0 if n is None else 8 * n
    return arrays


def _gone(path: str, lengths: Sequence[int | None]) -> NotFound:
    n_records = lengths[-1] or "many"
    return NotFound(
        f"the file of a pickled selection of {n_records} records is gone: it exists on one machine, while the pickled "
        "data set exists. Keep that data set until its pickle has been read, or pickle its URL and record numbers",
        url=path,
    )


def _write(arrays: Arrays) -> _File:
    while True:
        fd, name = tempfile.mkstemp(prefix=PREFIX)
        path, token = Path(name), secrets.token_bytes(_TOKEN_BYTES)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            is_here = path.exists()  # False: another process swept it before it was locked
            with open(fd, "wb", closefd=False) as file:
                file.write(token)
                for array in arrays if is_here else ():
                    if array is not None:
                        file.write(array.data)
        except BaseException:
            _remove(path, fd, os.getpid())
            raise
        if is_here:
            return _File(path, fd, (name, token, tuple(None if array is None else len(array) for array in arrays)))
        os.close(fd)


def _remove(path: Path, fd: int, pid: int) -> None:
    """Close and remove the file; a forked child only closes its descriptor, because the file belongs to its parent."""
    os.close(fd)
    if pid == os.getpid():
        path.unlink(missing_ok=True)


def _sweep() -> None:
    """Remove the files of killed processes: no process holds a lock on them."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):  # another user's, already gone, or in use
            # O_NONBLOCK: opening a pipe of that name would block.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(fd)


# Arrays above this size are pickled as a reference to a file, so that a pickled view stays a few hundred bytes long.
INLINE_BYTES = 256


class Selection:
    """Record numbers of a source, each 0 or more, in served order; numbers may be repeated. Immutable.

    The sorted numbers (stored order) are kept as runs of consecutive numbers, so that a range costs the same whatever
    its length: 16 bytes per run, and 8 bytes per record if the served order differs from stored order.

    Attributes:
        starts: int64[k], first number of each run; read-only.
        first: int64[k + 1], count of numbers in the runs before each run; read-only.
        order: int64[n], place in stored order of each served record; read-only. None: the served order is the stored
            order.
    """

    def __init__(self, starts: NDArray[np.int64], first: NDArray[np.int64], order: NDArray[np.int64] | None) -> None:
        self.starts = _frozen(starts)
        self.first = _frozen(first)
        self.order = None if order is None else _frozen(order)
        self._spool = Spool()

    @staticmethod
    def span(start: int, stop: int) -> Selection:
        """Return the selection of the numbers [start, stop); empty if stop <= start."""
        if stop <= start:
            return Selection(np.empty(0, np.int64), np.zeros(1, np.int64), None)
        return Selection(np.array([start], np.int64), np.array([0, stop - start], np.int64), None)

    @staticmethod
    def of(numbers: NDArray[np.int64]) -> Selection:
        """Return the selection of these numbers in this order.

        Args:
            numbers: int64[n], record numbers, each 0 or more.
        """
        if len(numbers) < 2 or bool((numbers[1:] >= numbers[:-1]).all()):
            return Selection(*_runs_of(numbers), None)
        by_number = np.argsort(numbers, kind="stable")
        order = np.empty(len(numbers), np.int64)
        order[by_number] = np.arange(len(numbers))
        return Selection(*_runs_of(numbers[by_number]), order)

    @staticmethod
    def of_runs(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Selection:
        """Return the selection of runs of numbers. Adjacent runs are merged.

        Args:
            starts: int64[k], first number of each run, never descending.
            lengths: int64[k], length of each run, 1 or more.
        """
        if not len(starts):
            return Selection.span(0, 0)
        heads = np.flatnonzero(np.r_[True, starts[1:] != (starts + lengths)[:-1]])
        ends = np.cumsum(lengths)
        return Selection(starts[heads], np.r_[0, ends[np.r_[heads[1:] - 1, len(ends) - 1]]], None)

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def n_bytes(self) -> int:
        """Size of its arrays in bytes."""
        return self.starts.nbytes + self.first.nbytes + (0 if self.order is None else self.order.nbytes)

    @property
    def stop(self) -> int:
        """Largest number plus one; 0 if the selection is empty."""
        return int(self.starts[-1] + self.first[-1] - self.first[-2]) if len(self) else 0

    @cached_property
    def digest(self) -> str:
        """Hash of the numbers in served order: 32 hex digits."""
        found = hashlib.sha256(len(self.starts).to_bytes(8, "little"))
        for array in (self.starts, self.first, self.order):
            if array is not None:
                found.update(np.ascontiguousarray(array, "<i8").data)
        return found.hexdigest()[:32]

    def is_all(self, n: int) -> bool:
        """Return whether the selection is all of n records, in their order."""
        return len(self) == n and self.order is None and (n == 0 or (len(self.starts) == 1 and self.starts[0] == 0))

    def numbers(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the record numbers at served places, int64[n], each below len()."""
        return self.stored_numbers(places if self.order is None else self.order[places])

    def number(self, place: int) -> int:
        """Return the record number at one served place below len(): takes 2 us, `numbers` 6 us."""
        if self.order is not None:
            place = int(self.order[place])
        run = int(self.first.searchsorted(place, "right")) - 1
        return int(self.starts[run]) + place - int(self.first[run])

    def stored_numbers(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the record numbers at places of the stored order, int64[n], each below len()."""
        if len(self.starts) == 1:
            run: Any = 0
        else:
            run = np.searchsorted(self.first, places, side="right") - 1
        numbers: NDArray[np.int64] = self.starts[run] + (places - self.first[run])
        return numbers

    def n_below(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many of the selection's numbers are below each number, int64[m]: its place in stored order."""
        if not len(self.starts):
            return np.zeros(len(numbers), np.int64)
        run = np.searchsorted(self.starts, numbers, side="left") - 1
        before = np.maximum(run, 0)
        lengths = self.first[before + 1] - self.first[before]
        inside = np.clip(numbers - self.starts[before], 0, lengths)
        return np.where(run < 0, 0, self.first[before] + inside)

    def compose(self, chosen: Selection) -> Selection:
        """Return the selection of a selection.

        Args:
            chosen: Selection of places of this selection, in its served order.
        """
        if self.order is None and chosen.order is None:
            return self._cut(chosen) if len(chosen.starts) == 1 else self._compose_runs(chosen)
        places = chosen.numbers(np.arange(len(chosen)))
        return Selection.of(self.numbers(places))

    def _cut(self, chosen: Selection) -> Selection:
        """Return the selection of one run of places, by slicing (50 million runs: 0.2 s; `_compose_runs`: 10 s)."""
        low, high = int(chosen.starts[0]), chosen.stop
        begin, end = (np.searchsorted(self.first, [low, high - 1], side="right") - 1).tolist()
        starts = self.starts[begin : end + 1].copy()
        starts[0] += low - self.first[begin]
        return Selection(starts, np.clip(self.first[begin : end + 2], low, high) - low, None)

    def _compose_runs(self, chosen: Selection) -> Selection:
        """Return the selection of several runs of places. A run of places is cut where it crosses a run of numbers."""
        if not len(chosen):
            return chosen
        lengths = np.diff(chosen.first)
        low, high = chosen.starts, chosen.starts + lengths
        begin = np.searchsorted(self.first, low, side="right") - 1
        end = np.searchsorted(self.first, high - 1, side="right") - 1
        counts = end - begin + 1
        owner = np.repeat(np.arange(len(low)), counts)
        run = begin[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        start = np.maximum(low[owner], self.first[run])
        stop = np.minimum(high[owner], self.first[run + 1])
        return Selection.of_runs(self.starts[run] + (start - self.first[run]), stop - start)

    def pack(self) -> tuple[Any, ...]:
        """Return plain values from which `unpack` restores the selection: its arrays, or a file reference.

        Large arrays are written to a file. It belongs to this object and is removed with it or at the end of its
        process; a process that has unpacked it keeps the mapping.
        """
        if self.n_bytes > INLINE_BYTES:
            ticket = self._spool.ticket((self.starts, self.first, self.order))
            if ticket is not None:
                return ticket
        order = None if self.order is None else self.order.tobytes()
        return self.starts.tobytes(), self.first.tobytes(), order

    @staticmethod
    def unpack(packed: tuple[Any, ...]) -> Selection:
        """Return the selection of `pack`, in this or another process of the machine.

        Raises:
            NotFound: The file of the selection is gone.
        """
        if isinstance(packed[0], str):
            starts, first, order = restore(packed)
        else:
            starts, first, order = (None if part is None else np.frombuffer(part, np.int64) for part in packed)
        if starts is None or first is None:
            raise ValueError("not a packed selection: its arrays are missing")
        return Selection(starts, first, order)

    def __reduce__(self) -> tuple[Any, ...]:
        return Selection.unpack, (self.pack(),)

    def __deepcopy__(self, memo: object) -> Selection:
        return self

    def __repr__(self) -> str:
        return f"Selection({len(self)} records, {len(self.starts)} runs{'' if self.order is None else ', listed'})"


def _runs_of(numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (starts, first) of numbers that never descend."""
    if not len(numbers):
        return np.empty(0, np.int64), np.zeros(1, np.int64)
    heads = np.flatnonzero(np.r_[True, np.diff(numbers) != 1])
    return numbers[heads], np.r_[heads, len(numbers)]


def _frozen(array: NDArray[np.int64]) -> NDArray[np.int64]:
    array = np.ascontiguousarray(array, np.int64)
    array.flags.writeable = False
    return array


# Number of cached sets of blocks: the window that is served, and the one that is prefetched.
KEPT_TABLES = 2
# Rows laid out at a time; each takes 40 bytes meanwhile.
LAID_OUT_ROWS = 1 << 18


@dataclass(frozen=True, slots=True)
class BlockSpans:
    """Blocks, and a selection's records in them; int64[k] each.

    Attributes:
        stored: Number of the block's first record.
        place: Number of the selection's records before the block.
        n_rows: Number of the selection's records in the block.
    """

    stored: NDArray[np.int64]
    place: NDArray[np.int64]
    n_rows: NDArray[np.int64]


class RowTables:
    """Translates rows of a selection to rows of their blocks. Safe from any thread, and after a fork.

    If the selected rows of each block are one run, as with ranges, a row is shifted by the number of omitted rows
    before it. Otherwise the rows of all the blocks are laid out once (4 bytes each) and then looked up: a binary search
    per row would cost a cache miss per step.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._tables: OrderedDict[bytes, tuple[NDArray[np.int64], NDArray[np.uint32] | None]] = OrderedDict()
        self._lock, self._pid = threading.Lock(), os.getpid()

    def rows(
        self, key: bytes, spans: Callable[[], BlockSpans], block: NDArray[np.uint32], row: NDArray[np.uint32]
    ) -> NDArray[np.uint32]:
        """Return the rows in the stored blocks, uint32[n].

        Args:
            key: Key that identifies the blocks and their order.
            spans: Function that returns the spans of these blocks; called if the key is new.
            block: uint32[n], index of each row's block.
            row: uint32[n], number of each row among the selection's rows of its block.
        """
        if not len(block):
            return row
        shift, laid_out = self._table(key, spans)
        if laid_out is None:
            moved: NDArray[np.uint32] = row + shift.astype(np.uint32)[block] if shift.any() else row
            return moved
        found: NDArray[np.uint32] = laid_out[shift[block] + row]
        return found

    def _table(
        self, key: bytes, spans: Callable[[], BlockSpans]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint32] | None]:
        if self._pid != os.getpid():
            self._lock, self._pid = threading.Lock(), os.getpid()
        with self._lock:
            found = self._tables.get(key)
            if found is not None:
                self._tables.move_to_end(key)
                return found
        made = _lay_out(self._selection, spans())
        with self._lock:
            self._tables[key] = made
            while len(self._tables) > KEPT_TABLES:
                self._tables.popitem(last=False)
        return made


def _lay_out(selection: Selection, spans: BlockSpans) -> tuple[NDArray[np.int64], NDArray[np.uint32] | None]:
    """Return (shift of each block's rows, None), or (start of each block's rows in the layout, the layout)."""
    filled = spans.n_rows > 0
    place, n_rows, stored = spans.place[filled], spans.n_rows[filled], spans.stored[filled]
    shift = np.zeros(len(filled), np.int64)
    ends = np.searchsorted(selection.first, place + n_rows - 1, side="right")
    if bool((np.searchsorted(selection.first, place, side="right") == ends).all()):
        shift[filled] = selection.stored_numbers(place) - stored
        return shift, None
    last = np.cumsum(n_rows)
    shift[filled] = begin = last - n_rows
    laid_out = np.empty(int(last[-1]), np.uint32)
    cuts = np.searchsorted(last, np.arange(0, len(laid_out), LAID_OUT_ROWS), side="right").tolist()
    for lo, hi in pairwise([*dict.fromkeys(cuts), len(last)]):
        counts, rows = n_rows[lo:hi], slice(int(begin[lo]), int(last[hi - 1]))
        places = np.arange(rows.start, rows.stop) + np.repeat(place[lo:hi] - begin[lo:hi], counts)
        laid_out[rows] = selection.stored_numbers(places) - np.repeat(stored[lo:hi], counts)
    return shift, laid_out
