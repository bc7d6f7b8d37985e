"""Windows in memory: how their blocks are loaded by threads, prefetched into the page cache, and limited by memory.

The blocks of a window are known before its first row is served. So threads read them whole, in file order, while the
window before is served. If windows do not fit memory, a piece is served in slices, whose blocks are read repeatedly.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, partial
from threading import Event
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from tiercache import config
from tiercache._native.mapping import are_resident
from tiercache.data.records import Records
from tiercache.errors import CorruptShard
from tiercache.load.pieces import AnyPiece, ArrayPiece, touched_blocks
from tiercache.model import format_bytes
from tiercache.order.window import AnyWindow
from tiercache.shard.blocks import Blocks, renew_checks
from tiercache.shard.schema import Column, Schema
from tiercache.shard.values import ColumnValues, gather_values
from tiercache.store.remote import cancel_calls_when, is_cancelled

# Load tasks per thread: at the end the other threads wait at most for one such task.
TASKS_A_THREAD = 2

# A task costs about 0.2 ms beside its bytes. A task of 16 MiB is decoded in 20 ms, which is how long close() may wait.
MIN_TASK_BYTES, MAX_TASK_BYTES = 1 << 20, 16 << 20


def cut_load_tasks(
    window: AnyWindow, needed: NDArray[np.bool_], n_threads: int, is_mapped: Callable[[int], bool]
) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Cut the needed blocks of a window into load tasks, each the indices of blocks of one shard, in its order.

    Returns whole shards that are only mapped; and the tasks of reading, fetching or decoding, of about the same size
    and at most MAX_TASK_BYTES unless a task is a single block.
    """
    indices = np.flatnonzero(needed)
    if not len(indices):
        return [], []
    shards = window.shards[indices]
    order = np.lexsort((window.blocks[indices], shards))
    indices, shards = indices[order], shards[order]
    starts = np.concatenate([[0], np.flatnonzero(shards[1:] != shards[:-1]) + 1])
    stops = [*starts[1:].tolist(), len(indices)]
    turns = np.argsort(np.minimum.reduceat(indices, starts))  # sorted by the first block of each shard in the window
    runs = [indices[starts[turn] : stops[turn]] for turn in turns.tolist()]
    free = [is_mapped(int(window.shards[run[0]])) for run in runs]
    mapped = [run for run, is_free in zip(runs, free, strict=True) if is_free]
    others = [run for run, is_free in zip(runs, free, strict=True) if not is_free]
    limit = task_bytes(sum(int(window.block_bytes[run].sum()) for run in others), n_threads)
    return mapped, [task for run in others for task in _cut(run, window, limit)]


def task_bytes(n_bytes: int, n_threads: int) -> int:
    return min(max(n_bytes // (n_threads * TASKS_A_THREAD), MIN_TASK_BYTES), MAX_TASK_BYTES)


def _cut(run: NDArray[np.int64], window: AnyWindow, limit_bytes: int) -> list[NDArray[np.int64]]:
    sums = np.cumsum(window.block_bytes[run])
    n_tasks = -(-int(sums[-1]) // limit_bytes)
    share = -(-int(sums[-1]) // max(n_tasks, 1))
    tasks, begin, start_bytes = [], 0, 0
    while begin < len(run):
        end = max(int(np.searchsorted(sums, start_bytes + share, side="right")), begin + 1)
        tasks.append(run[begin:end])
        begin, start_bytes = end, int(sums[end - 1])
    return tasks


T = TypeVar("T")

# Minimum number of threads that load windows. Where they send requests to a store, each waits for the one or two of its
# task. 16 requests at once are as many as a store's concurrency limit begins with.
MIN_LOAD_THREADS, MIN_REQUEST_THREADS = 4, 16


def loading_pool(n_threads: int, *, sends_requests: bool = False) -> ThreadPoolExecutor:
    least = MIN_REQUEST_THREADS if sends_requests else MIN_LOAD_THREADS
    return ThreadPoolExecutor(max(least, n_threads), "tiercache-load")


@dataclass(frozen=True, slots=True, eq=False)
class LoadedWindow:
    """The loaded blocks of a window. It owns their memory: addresses are valid while it lives.

    addresses: uint64[n_streams, n_blocks, 3], zeros for blocks that were not requested; block_groups: the
    blocks of each load task; group_of_block, position: int32[n_blocks], the index of the group that has the block (-1:
    none), and the block's index there; bytes_from: stored bytes of the blocks that were loaded last, by where they came
    from (see count_read).
    """

    window: AnyWindow
    addresses: NDArray[np.uint64]
    block_groups: tuple[Blocks, ...]
    group_of_block: NDArray[np.int32]
    position: NDArray[np.int32]
    bytes_from: Mapping[str, int]

    @property
    def checks(self) -> NDArray[np.uint64] | None:
        """Checks that the blocks still need, uint64[n_streams, n_blocks, 4] as Blocks.pending_checks; None: none."""
        checks = None
        for number, blocks in enumerate(self.block_groups):
            left = blocks.pending_checks
            if left is None:
                continue
            if checks is None:
                checks = np.zeros((*self.addresses.shape[:2], 4), np.uint64)
            indices = np.flatnonzero(self.group_of_block == number)
            checks[:, indices[np.argsort(self.position[indices])]] = left
        return checks

    @property
    def private_bytes(self) -> int:
        """Memory that is neither mapped nor shared: data that was read or decoded."""
        return sum(blocks.private_bytes for blocks in self.block_groups)

    def covers(self, needed: NDArray[np.bool_]) -> bool:
        return bool((self.group_of_block[needed] >= 0).all())

    def stored_block(self, block: int) -> int:
        return int(self.block_groups[self.group_of_block[block]].blocks[self.position[block]])

    def columns_of_row(
        self, schema: Schema, block: int, row: int
    ) -> Iterator[tuple[Column, Callable[..., ColumnValues]]]:
        """Yield each column with the function that reads its value of a row; see gather_values for its arguments."""
        url, only = (
            self.block_groups[self.group_of_block[block]].url,
            (np.zeros(1, np.uint32), np.array([row], np.uint32)),
        )
        first = 0
        for column in schema.columns:
            stop = first + len(column.streams(0))
            addresses = np.ascontiguousarray(self.addresses[first:stop, block : block + 1])
            yield column, partial(gather_values, column, addresses, *only, url=url)
            first = stop

    def value(self, block: int, row: int, column: int) -> object:
        blocks = self.block_groups[self.group_of_block[block]]
        return blocks.array(int(self.position[block]), blocks.columns[column])[int(row)].as_py()


class JoinedWindows:
    """Windows whose rows are served together; their blocks are numbered through, one window after the other."""

    def __init__(self, windows: Sequence[LoadedWindow]) -> None:
        self.windows = tuple(windows)
        parts = [loaded.addresses for loaded in self.windows]
        self.addresses: NDArray[np.uint64] = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        self._ends = np.cumsum([part.shape[1] for part in parts])
        self._checks: NDArray[np.uint64] | None = None
        self._n_asked = 0

    def checks_for(self, n_rows: int) -> NDArray[np.uint64] | None:
        """Return the checks of all windows for n_rows; some of the named pages may have been checked since.

        Computing the checks takes 0.2 us per chunk: for a few rows of many blocks that is more than checking each page
        once more. So they are computed once per as many rows as there are chunks.
        """
        self._n_asked += n_rows
        if self._checks is None or self._n_asked >= self.addresses.shape[0] * self.addresses.shape[1]:
            self._checks, self._n_asked = self._current_checks(), 0
        return self._checks

    def _current_checks(self) -> NDArray[np.uint64] | None:
        parts = [loaded.checks for loaded in self.windows]
        if len(parts) == 1 or all(part is None for part in parts):
            return parts[0]
        nothing = [np.zeros((*loaded.addresses.shape[:2], 4), np.uint64) for loaded in self.windows]
        return np.concatenate([n if part is None else part for part, n in zip(parts, nothing, strict=True)], axis=1)

    def find(self, block: int) -> tuple[LoadedWindow, int]:
        """Return the window of a block, and the block's number in that window."""
        number = int(np.searchsorted(self._ends, block, side="right"))
        return self.windows[number], block - (int(self._ends[number - 1]) if number else 0)


@dataclass(frozen=True, slots=True)
class LoadThreads:
    """Threads that load windows. stop: ends all waiting; limit_bytes: memory limit of the whole process."""

    executor: Executor
    stop: Future[None]
    n_threads: int
    limit_bytes: int

    def result(self, future: Future[T]) -> T:
        """Return the future's result. Raises CancelledError if stop is done first."""
        watched: tuple[Future[Any], ...] = (future, self.stop)
        wait(watched, return_when=FIRST_COMPLETED)
        if not future.done():
            raise CancelledError
        return future.result()


# Indices of blocks in their window; the blocks; and their stored bytes by where these came from.
_LoadedBlocks: TypeAlias = "tuple[NDArray[np.int64], tuple[Blocks, dict[str, int]]]"


def count_read(source: Records, shard: int, blocks: Blocks) -> dict[str, int]:
    """Count blocks as read; return their stored bytes by where they came from: "store", "cache", "disk" or "memory".

    Mapped blocks come from memory if a sample of their pages, the first of every eighth run, is in the page cache: a
    look at all pages took a tenth of a first epoch.
    """
    bytes_from = source.storage.count_read(shard, blocks)
    sample = blocks.pages[::8].copy()
    sample[:, 1] = np.minimum(sample[:, 1], mmap.PAGESIZE)
    if not blocks.private_bytes and is_in_memory(blocks, sample):
        bytes_from["memory"] = bytes_from.pop("cache", 0) + bytes_from.pop("disk", 0)
    return bytes_from


class WindowLoad:
    """A window that is being loaded: threads read and decode, in load tasks; finish() maps the rest.

    Mapping a shard takes some 0.3 ms of Python, for which threads would only wait for each other. The blocks of `base`,
    the same window with some blocks, are not loaded again.
    """

    def __init__(
        self,
        source: Records,
        window: AnyWindow,
        needed: NDArray[np.bool_],
        executor: Executor,
        n_threads: int,
        *,
        base: LoadedWindow | None = None,
        unwanted: Event | None = None,
    ) -> None:
        self.window = window
        self.needed = needed
        self._base = base
        missing = needed if base is None else needed & (base.group_of_block < 0)
        self._source = source
        self._cancelled = Event()
        self._unwanted = (self._cancelled,) if unwanted is None else (self._cancelled, unwanted)
        self._n_streams = sum(len(column.streams(0)) for column in source.schema.columns)
        self._mapped, tasks = cut_load_tasks(window, missing, n_threads, source.storage.is_mapped)
        self._loaded: list[_LoadedBlocks] = []
        self._tasks = [(indices, executor.submit(self._load_unless_unwanted, indices)) for indices in tasks]

    def finish(self, threads: LoadThreads) -> LoadedWindow:
        """Return the window when all of it is loaded. May be called once."""
        n_blocks, base = len(self.window.blocks), self._base
        groups: tuple[Blocks, ...] = ()
        addresses = np.zeros((self._n_streams, n_blocks, 3), np.uint64)
        holder, position = np.full(n_blocks, -1, np.int32), np.zeros(n_blocks, np.int32)
        if base is not None:
            groups, addresses = base.block_groups, base.addresses.copy()
            holder, position = base.group_of_block.copy(), base.position.copy()
        try:
            while self.map_next_shard():
                pass
            loaded = [*self._loaded, *((indices, threads.result(future)) for indices, future in self._tasks)]
        finally:
            self.cancel()  # after an error nobody needs the other tasks
            # The epoch refers to this object to its end, and must not keep this memory.
            self._loaded, self._tasks, self._base = [], [], None
        bytes_from: Counter[str] = Counter()
        for number, (indices, (blocks, sources)) in enumerate(loaded, len(groups)):
            bytes_from.update(sources)
            addresses[:, indices] = blocks.addresses
            holder[indices] = number
            position[indices] = np.arange(len(indices))
        groups += tuple(blocks for _, (blocks, _) in loaded)
        return LoadedWindow(self.window, addresses, groups, holder, position, bytes_from)

    def map_next_shard(self) -> bool:
        """Map the next mapped shard in this thread; False: there is none left. Raises as finish()."""
        if not self._mapped:
            return False
        indices = self._mapped.pop()
        self._loaded.append((indices, self._load(indices)))
        return True

    def cancel(self) -> None:
        """End the tasks, also those that read from a store; without an effect after finish()."""
        self._cancelled.set()
        for _, future in self._tasks:
            future.cancel()

    def _load_unless_unwanted(self, indices: NDArray[np.int64]) -> tuple[Blocks, dict[str, int]]:
        with cancel_calls_when(*self._unwanted):
            if is_cancelled():
                raise CancelledError
            return self._load(indices)

    def _load(self, indices: NDArray[np.int64]) -> tuple[Blocks, dict[str, int]]:
        shard = int(self.window.shards[indices[0]])
        try:
            blocks = self._source.load_blocks(shard, self.window.blocks[indices].tolist())
            # A single row needs one or two pages of 4 KiB; checking it would read 64 KiB.
            if self.window.reads_whole_blocks:
                renew_checks(blocks)
            return blocks, count_read(self._source, shard, blocks)
        except CorruptShard as error:
            error.location = shard, error.block, None  # used if corrupt records are replaced
            raise


# Share of the memory limit for windows, two of which are in memory at a time; the rest is for the model and the
# batches.
WINDOWS_SHARE = 2

# Rows examined for one slice: enough to fill any slice that does not hold its windows whole, and quick to examine.
LOOK_ROWS = 1 << 13


class MemoryPressure:
    """Decides whether windows fit memory twice: the one that is served and the next one. For the planner's thread.

    Mapped bytes do not count. The share of a window that is not mapped is learnt from the windows that were loaded;
    before the first one, all of it counts.
    """

    def __init__(self, is_mapped: Callable[[int], bool], limit_bytes: int) -> None:
        self._is_mapped = is_mapped
        self._room_bytes = limit_bytes // WINDOWS_SHARE // 2
        self._private_bytes = self._raw_bytes = 0
        self._need_bytes = 0

    @property
    def spare_bytes(self) -> int:
        """Bytes that further windows may take beside the two, a part of the half that the windows leave free."""
        return self._room_bytes // 4

    def record_usage(self, loaded: LoadedWindow) -> None:
        here = loaded.group_of_block >= 0
        self._raw_bytes += int(loaded.window.block_bytes[here].sum())
        self._private_bytes += loaded.private_bytes

    def fits(self, piece: AnyPiece) -> bool:
        need_bytes = sum(self._decoded_bytes(w, needed) for w, needed in zip(piece.windows, piece.needed, strict=True))
        if need_bytes <= self._room_bytes:
            return True
        self._need_bytes = max(self._need_bytes, need_bytes)
        return False

    def slices(self, piece: AnyPiece) -> Iterator[ArrayPiece]:
        """Yield the piece's rows in slices whose blocks fit memory twice.

        A slice has at least one row, even if its block does not fit.
        """
        block, row = piece.rows()
        sizes = np.concatenate([window.block_bytes for window in piece.windows])
        start = 0
        while start < len(row):
            stop = start + self._fitting(block[start : start + LOOK_ROWS], sizes)
            part = block[start:stop]
            yield ArrayPiece(piece.windows, touched_blocks(piece.windows, part), part, row[start:stop])
            start = stop

    def explain(self, url: str) -> str:
        return (
            f"{url}: the windows that are served together take {format_bytes(self._need_bytes)} when decoded, and two "
            f"such sets do not fit the {format_bytes(2 * self._room_bytes)} for windows (half of the memory limit), so "
            "blocks are read and decoded again and again, which is slow. Use more processes or more memory, or start "
            "a run with a smaller shuffle_window_bytes or fewer streams"
        )

    @property
    def _share(self) -> float:
        return self._private_bytes / self._raw_bytes if self._raw_bytes else 1.0

    def _decoded_bytes(self, window: AnyWindow, needed: NDArray[np.bool_]) -> int:
        if not self._share:
            return 0
        whole = self._share * int(window.block_bytes[needed].sum())
        if whole <= self._room_bytes // 64:  # asking for each shard would cost more than the answer is worth
            return int(whole)
        away = [shard for shard in set(window.shards[needed].tolist()) if not self._is_mapped(shard)]
        if not away:
            return 0
        return int(self._share * int(window.block_bytes[needed & np.isin(window.shards, away)].sum()))

    def _fitting(self, block: NDArray[np.uint32], sizes: NDArray[np.int64]) -> int:
        blocks, first = np.unique(block, return_index=True)
        turn = np.argsort(first)
        needed = np.cumsum(sizes[blocks[turn]]) * self._share
        n_blocks = max(int(np.searchsorted(needed, self._room_bytes, side="right")), 1)
        return int(first[turn[n_blocks]]) if n_blocks < len(blocks) else len(block)


# Share of the memory that the process does not use, for the pages of one window of each stream. Two windows are
# prefetched at a time; more pages would evict pages that are still to be served.
NEAR_SHARE = 3

# Bytes per request: enough to read any disk at full speed, and close() never waits for more.
STEP_BYTES = 4 << 20

_LINUX = sys.platform == "linux"

# Linux's numbers; COLD since 5.4, POPULATE_READ since 5.14.
_RANDOM, _WILLNEED, _DONTNEED, _COLD, _POPULATE_READ = 1, 3, 4, 20, 22


class PagePrefetcher:
    """Keeps the mapped pages of an epoch's windows in the page cache while they are served. For the planner's thread.

    stored_bytes: size of the whole data set: if it fits memory, served pages stay for the next epoch.
    """

    def __init__(self, threads: LoadThreads, stored_bytes: int) -> None:
        self._threads = threads
        self._stored_bytes = stored_bytes
        self._near: list[tuple[AnyWindow, list[Blocks]]] = []

    def prefetch_pages(self, windows: Sequence[LoadedWindow], served: Sequence[AnyWindow]) -> list[Future[int]]:
        """Start to read the mapped pages of windows, as far as there is room; returns at once.

        Pages without room are read when their rows are gathered; for shuffled rows the kernel then does not read their
        neighbours. A range that cannot be read is not an error here: the gather finds it and names it.
        """
        if not _LINUX or not windows:
            return []  # The advice numbers are Linux's.
        free_bytes = self._threads.limit_bytes - config.private_bytes()
        fits = self._stored_bytes <= free_bytes
        self._release_served(served, larger=not fits)
        room_bytes = free_bytes // NEAR_SHARE
        reads: list[Future[int]] = []
        for loaded in windows:
            sizes = [int(blocks.pages[:, 1].sum()) for blocks in loaded.block_groups]
            n_near = count_near(sizes, room_bytes)
            room_bytes -= sum(sizes[:n_near])
            if loaded.window.key is not None:
                for blocks in loaded.block_groups[n_near:]:
                    _expect_single_rows(blocks.pages)
            # These mappings are kept until the window is served. Decoded blocks are not: others may need their memory
            # before.
            self._near.append((loaded.window, [blocks for blocks in loaded.block_groups if not blocks.private_bytes]))
            reads += [self._start(blocks) for blocks in loaded.block_groups[:n_near] if len(blocks.pages)]
        return reads

    def _start(self, blocks: Blocks) -> Future[int]:
        # The query takes 0.2 ms for 512 MiB that are mapped; populating them again takes 18 to 33 ms of a core in each
        # epoch.
        if is_in_memory(blocks, blocks.pages):
            near: Future[int] = Future()
            near.set_result(int(blocks.pages[:, 1].sum()))
            return near
        return self._threads.executor.submit(_read, blocks, self._threads.stop)

    def _release_served(self, served: Sequence[AnyWindow], *, larger: bool) -> None:
        ids = set(map(id, served))
        gone = [near for near in self._near if id(near[0]) not in ids]
        self._near = [near for near in self._near if id(near[0]) in ids]
        for blocks in [blocks for _, of_window in gone for blocks in of_window] if larger else []:
            self._threads.executor.submit(_release_pages, blocks)


def is_in_memory(blocks: Blocks, pages: NDArray[np.uint64]) -> bool:
    return _LINUX and blocks.reports_residency and are_resident(pages)


def cut_steps(pages: NDArray[np.uint64]) -> list[tuple[int, int]]:
    return [
        (max(at, start), min(at + STEP_BYTES, start + n_bytes) - max(at, start))
        for start, n_bytes in pages.tolist()
        for at in range(start // STEP_BYTES * STEP_BYTES, start + n_bytes, STEP_BYTES)
    ]


def count_near(sizes: Sequence[int], room_bytes: int) -> int:
    return int(np.searchsorted(np.cumsum(np.array(sizes, np.int64)), room_bytes, side="right"))


def _expect_single_rows(pages: NDArray[np.uint64]) -> None:
    """Advise the kernel to read only the touched pages.

    Otherwise the kernel reads the neighbours too, and evicts what it read before. The range from the first page to the
    last is not split by block: each part with other advice counts against the process's limit of mappings.
    """
    if len(pages):
        start, stop = int(pages[0, 0]), int(pages[-1].sum())
        _advise(start, stop - start, _RANDOM)


def _read(blocks: Blocks, stop: Future[None]) -> int:
    steps = cut_steps(blocks.pages)
    # The disk gets all requests at once; the steps then wait for them.
    for address, n_bytes in steps:
        _advise(address, n_bytes, _WILLNEED)
    near_bytes = 0
    for address, n_bytes in steps:
        # A kernel before 5.14 refuses to populate, but its reads are under way and serve the first touches. For a
        # truncated file the call fails (EFAULT) and raises no signal.
        if stop.done() or not _advise(address, n_bytes, _POPULATE_READ):
            break
        near_bytes += n_bytes
    return near_bytes


def _release_pages(blocks: Blocks) -> None:
    """Unmap pages that were served, so that the page cache evicts them first.

    Looking for pages to evict among mapped ones cost half of the disk's speed: 300 and 426 MB/s without this call, 625
    with it, and 510 to 900 for reads that map nothing. DONTNEED alone is worse: it counts unmapped pages as used.
    """
    steps = cut_steps(blocks.pages)
    for advice in (_COLD, _DONTNEED):
        for address, n_bytes in steps:
            _advise(address, n_bytes, advice)


def _advise(address: int, n_bytes: int, advice: int) -> bool:
    """Call madvise and return whether it succeeded. ctypes is used because mmap.madvise holds the GIL."""
    return _libc_madvise()(address, n_bytes, advice) == 0


@cache
def _libc_madvise() -> Callable[[int, int, int], int]:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes, madvise.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return cast("Callable[[int, int, int], int]", madvise)
